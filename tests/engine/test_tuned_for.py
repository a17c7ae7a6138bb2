# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false
"""What `tuned` statements say of a run: warnings where it differs, and lists that are cut."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator
from typing import Any

import diffusers
import pytest
import torch

import cachepolicy
from cachepolicy.engine.tuned_for import active_adapters, config_hash
from tests.support import zoo
from tests.support.tiny_pipelines import UNCHECKED, Tiny, flux_true_cfg, normal, texts, vae_of

STEPS = 10
RULE = "match model on {0, 1, 3, 6, 8} -> predict taylor(order: 1)\n"


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    parts: dict[str, Any] = UNCHECKED
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae_of(),
        unet=zoo.build("unet2d_condition"),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        **parts,
    )
    told = {**texts(8), "image": normal(1, 3, 16, 16).clamp(0, 1), "strength": 1.0, "num_inference_steps": STEPS}
    return Tiny(pipe, told)


@contextlib.contextmanager
def codes() -> Generator[list[str]]:
    """The codes of the warnings inside."""
    found = list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(each.message)[8:12] for each in caught if str(each.message).startswith("warning[W61")]


def rows(tiny: Tiny, text: str, **changes: Any) -> tuple[list[str], list[str], list[int]]:
    """The row of the model, the codes, and the steps of the trace."""
    with codes() as found, cachepolicy.apply(tiny.pipe, cachepolicy.parse(text)) as run:
        tiny(**changes)
        steps = [call.tick.step for call in run.trace.last.calls]
    return list(run.trace.rows().values()), found, steps


def test_a_list_is_cut_where_image_to_image_begins(tiny: Tiny) -> None:
    """With the last 6 of 10 steps, the list goes on from step 4, which computes; W615 says so."""
    assert (["CRCRCR"], ["W615"], [4, 5, 6, 7, 8, 9]) == rows(tiny, f"{RULE}tuned over {STEPS} steps\n", strength=0.6)


def test_without_the_statement_steps_count_from_the_first(tiny: Tiny) -> None:
    """The same list is applied to the 6 steps as they are counted."""
    assert (["CCRCRR"], [], [0, 1, 2, 3, 4, 5]) == rows(tiny, RULE, strength=0.6)


def test_a_cut_list_predicts_as_the_same_list_by_hand(tiny: Tiny) -> None:
    """The pictures are those of the rule with its numbers counted from the first step that is run."""
    pictures = []
    for text in (f"{RULE}tuned over {STEPS} steps\n", "match model on {0, 2, 4} -> predict taylor(order: 1)\n"):
        with codes(), cachepolicy.apply(tiny.pipe, cachepolicy.parse(text)):
            pictures.append(tiny(strength=0.6))
    assert torch.equal(pictures[0], pictures[1])


def test_a_whole_schedule_is_not_cut(tiny: Tiny) -> None:
    """A trajectory of all steps gives the list as it is, without a word."""
    assert (["CCRCRRCRCR"], [], list(range(STEPS))) == rows(tiny, f"{RULE}tuned over {STEPS} steps\n")


def test_what_agrees_gives_no_warning(tiny: Tiny) -> None:
    """Class, config, timesteps, guidance, adapters and latents of this run."""
    tiny.pipe.scheduler.set_timesteps(STEPS)
    timesteps = [float(each) * 1.001 for each in tiny.pipe.scheduler.timesteps]
    text = f"""{RULE}tuned over {STEPS} steps with denoiser = "UNet2DConditionModel",
  config = "{config_hash(tiny.pipe.unet)}", timesteps = {timesteps}, guidance = 7.5, adapters = [], latents = [4, 8, 8]
"""
    assert [] == rows(tiny, text, guidance_scale=7.5)[1]


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("W610", 'denoiser = "FluxTransformer2DModel"'),
        ("W610", 'config = "0123456789ab"'),
        ("W611", "timesteps = [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]"),
        ("W611", "timesteps = [901]"),
        ("W612", "guidance = 5"),
        ("W613", 'adapters = ["style"]'),
        ("W614", "latents = [4, 64, 64]"),
    ],
)
def test_what_differs_is_told_once(tiny: Tiny, code: str, settings: str) -> None:
    """One warning for all calls of the run."""
    with (
        codes() as found,
        cachepolicy.apply(tiny.pipe, cachepolicy.parse(f"{RULE}tuned over {STEPS} steps with {settings}\n")),
    ):
        tiny(guidance_scale=7.5)
        tiny(guidance_scale=7.5)
    assert [code] == found


def test_every_number_that_guides_is_compared() -> None:
    """An argument of the call beside the guidance scale, given or by its default, is told by its name."""
    tiny = flux_true_cfg()
    text = "match model every 2 -> reuse\ntuned over 4 steps with guidance = 3.5, true_cfg_scale = 4\n"
    with codes() as found, cachepolicy.apply(tiny.pipe, cachepolicy.parse(text)):
        tiny(num_inference_steps=4)
    assert [] == found
    with (
        pytest.warns(UserWarning, match="tuned at a `true_cfg_scale` of 4, and this one is 2"),
        cachepolicy.apply(tiny.pipe, cachepolicy.parse(text)),
    ):
        tiny(num_inference_steps=4, true_cfg_scale=2.0)


def test_another_number_of_steps_is_told(tiny: Tiny) -> None:
    """The message has the numbers that the policy was tuned for."""
    text = f"{RULE}tuned over {STEPS} steps\ntuned over 20 steps\n"
    with (
        pytest.warns(UserWarning, match="tuned over 10 and 20 steps, and this trajectory has 4") as caught,
        cachepolicy.apply(tiny.pipe, cachepolicy.parse(text)),
    ):
        tiny(num_inference_steps=4)
    assert any("W611" in str(each.message) for each in caught)


def test_a_statement_for_another_param_is_not_meant(tiny: Tiny) -> None:
    """Of several statements over as many steps, that with the value of the param counts."""
    text = f"""param level: float = 2
match model when level == 2 every 2 -> reuse
tuned over {STEPS} steps with level = 2, guidance = 7.5
tuned over {STEPS} steps with level = 3, guidance = 1
"""
    assert [] == rows(tiny, text, guidance_scale=7.5)[1]


def test_active_adapters_are_known() -> None:
    """Names of adapters that act: not of disabled ones."""
    peft = pytest.importorskip("peft")
    model = zoo.build("flux")
    assert [] == active_adapters(model)
    config = config_hash(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    assert ["style"] == active_adapters(model)
    assert config == config_hash(model)
    model.disable_adapters()
    assert [] == active_adapters(model)
