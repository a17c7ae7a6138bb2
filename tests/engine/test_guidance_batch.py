"""Guidance batches of real pipelines: two halves are believed on evidence only, and the right half is rebuilt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.diffusers.guidance import COND_FIRST_MODELS, ORDERS
from cachepolicy.engine.guidance_batch import GuidanceSource
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from tests.support import zoo
from tests.support.tiny_pipelines import (
    NO_ENCODERS,
    STEPS,
    UNCHECKED,
    Tiny,
    dit,
    normal,
    pixart,
    sd3,
    texts,
    unet_sd,
    vae_of,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:the policy reused nothing", "ignore::FutureWarning", "ignore::UserWarning:diffusers.*"
)

REBUILT = "match model every 2 -> approximate uncond spectral(low: 1, high: 1{})"
LAST = -1


# --- pipelines -------------------------------------------------------------------------------------------


def instruct_pix2pix(prompts: int) -> Tiny:
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae_of(),
        unet=zoo.build("unet2d_condition", in_channels=8),
        scheduler=diffusers.EulerDiscreteScheduler(),
        **UNCHECKED,
    )
    images = torch.rand(prompts, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Tiny(pipe, {"image": images, **texts(8, rows=prompts)}, denoisers=("unet",))


def pag(prompts: int) -> Tiny:
    model = zoo.build("unet2d_condition", mid_block_type="UNetMidBlock2DCrossAttn")
    pipe = diffusers.StableDiffusionPAGPipeline(
        vae=vae_of(), unet=model, scheduler=diffusers.DDIMScheduler(), pag_applied_layers="mid", **UNCHECKED
    )
    return Tiny(pipe, {"height": 16, "width": 16, "pag_scale": 3.0, **texts(8, rows=prompts)}, denoisers=("unet",))


def z_image(prompts: int) -> Tiny:
    pipe = diffusers.ZImagePipeline(
        transformer=zoo.build("z_image"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **NO_ENCODERS
    )
    embeddings = {
        "prompt_embeds": [normal(5, 16, seed=3 + each) for each in range(prompts)],
        "negative_prompt_embeds": [normal(4, 16, seed=9 + each) for each in range(prompts)],
    }
    return Tiny(pipe, {"prompt": None, "height": 64, "width": 64, "guidance_scale": 4.0, **embeddings})


def two_prompts(tiny: Tiny) -> Tiny:
    """The same call with two rows of every text."""
    for name, value in tiny.arguments.items():
        if isinstance(value, Tensor) and "embeds" in name:
            tiny.arguments[name] = torch.cat([value, value + 0.5])
    return tiny


# --- the right half --------------------------------------------------------------------------------------


class Ideal:
    """The forward of a model with the unconditional half rebuilt at every second call, with the order written out."""

    def __init__(self, model: Any, *, cond_first: bool) -> None:
        self._inner, self._cond_first = model.forward, cond_first
        self._count, self._kept = 0, dict[int, Tensor]()
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._inner(*args, **kwargs)
        prediction = output[0]
        rows = list(prediction)
        half = len(rows) // 2
        for index in range(half):
            cond, uncond = (index, half + index) if self._cond_first else (half + index, index)
            if self._count % 2 == 0:
                self._kept[index] = rows[uncond] - rows[cond]
            else:
                rows[uncond] = rows[cond] + self._kept[index]
        self._count += 1
        rebuilt = rows if isinstance(prediction, list) else torch.stack(rows)
        return (rebuilt, *output[1:]) if isinstance(output, tuple) else type(output)(rebuilt)


TWO_HALVES: dict[str, tuple[Callable[[], Tiny], bool]] = {
    "sd3": (lambda: two_prompts(sd3()), False),
    "unet_sd": (lambda: two_prompts(unet_sd(diffusers.DDIMScheduler())), False),
    "z_image": (lambda: z_image(2), True),
    "z_image, one prompt": (lambda: z_image(1), True),
}


@pytest.mark.parametrize("name", TWO_HALVES)
def test_the_unconditional_half_of_a_pipeline_is_the_one_that_is_rebuilt(name: str) -> None:
    """Without a word of the policy, conditional-first pipelines are rebuilt as well as all others."""
    build, cond_first = TWO_HALVES[name]
    reference, tiny = build(), build()
    bare = build()()
    Ideal(getattr(reference.pipe, reference.denoisers[0]), cond_first=cond_first)
    expected = reference()
    with cachepolicy.apply(tiny.pipe, parse(REBUILT.format(""))) as run:
        got = tiny()
        row = run.trace.rows()["model"]
    assert row == "CR" * (STEPS // 2)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(bare, expected, rtol=1e-3, atol=1e-4)


def cogview4() -> Tiny:
    pipe = diffusers.CogView4Pipeline(
        transformer=zoo.build("cogview4"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **NO_ENCODERS
    )
    return Tiny(pipe, {"prompt": None, "height": 64, "width": 64, **texts(rows=2)}, branches=("cond", "uncond"))


class SequentialIdeal:
    """The same for guidance in two calls, of which the conditional one comes first."""

    def __init__(self, model: Any) -> None:
        self._inner, self._count = model.forward, 0
        self._cond = self._kept = torch.empty(0)
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, uncond = divmod(self._count, 2)
        self._count += 1
        output = self._inner(*args, **kwargs)
        if not uncond:
            self._cond = output[0]
        elif step % 2 == 0:
            self._kept = output[0] - self._cond
        else:
            return (self._cond + self._kept, *output[1:])
        return output


def test_guidance_in_two_named_calls_is_rebuilt_from_the_conditional_one() -> None:
    """CogView4 calls the conditional branch first; the unconditional call is answered from it."""
    reference, tiny = cogview4(), cogview4()
    bare = cogview4()()
    SequentialIdeal(reference.pipe.transformer)
    expected = reference()
    with cachepolicy.apply(tiny.pipe, parse(REBUILT.format(""))) as run:
        got = tiny()
        [trajectory] = run.trace.trajectories
        rows = {
            branch: "".join(
                "R" if each.decided[0].verdict == "reuse" else "C"
                for each in trajectory.calls
                if each.tick.branch == branch
            )
            for branch in trajectory.branches
        }
    assert rows == {"cond": "C" * STEPS, "uncond": "CR" * (STEPS // 2)}
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(bare, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["cond first", "uncond first"])
def test_the_layout_of_the_policy_overrides_the_table(layout: str) -> None:
    """The policy's word counts, right or wrong."""
    reference, tiny = z_image(2), z_image(2)
    Ideal(reference.pipe.transformer, cond_first=layout == "cond first")
    with cachepolicy.apply(tiny.pipe, parse(REBUILT.format(f', layout: "{layout}"'))):
        torch.testing.assert_close(tiny(), reference(), rtol=1e-3, atol=1e-4)


# --- more than two parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("build", [instruct_pix2pix, pag])
def test_pipelines_with_three_parts_are_refused_by_name(build: Callable[[int], Tiny], prompts: int) -> None:
    """Two prompts give six rows, which can be halved and have no two halves; the pipeline stays usable."""
    tiny = build(prompts)
    bare = tiny()
    with cachepolicy.apply(tiny.pipe, parse(REBUILT.format(""))), pytest.raises(PolicyError, match="E333") as caught:
        tiny()
    assert type(tiny.pipe).__name__ in caught.value.diagnostics[0].message
    assert torch.equal(bare, tiny())


def test_perturbed_attention_of_a_pipeline_that_tells_of_no_guidance_is_refused_too() -> None:
    """PixArt-Sigma's has no `do_classifier_free_guidance`; to advise `guidance=True` would lead to the same refusal."""
    tiny = pixart()
    tiny.pipe = diffusers.PixArtSigmaPAGPipeline(**tiny.pipe.components, pag_applied_layers="blocks.0")
    for guidance in (None, True):
        with (
            cachepolicy.apply(tiny.pipe, parse(REBUILT.format("")), guidance=guidance),
            pytest.raises(PolicyError, match=r"E333.*`PixArtSigmaPAGPipeline`.*perturbed"),
        ):
            tiny(pag_scale=3.0)


@pytest.mark.parametrize("build", [instruct_pix2pix, pag])
def test_six_rows_are_no_two_halves_for_a_bare_model(build: Callable[[int], Tiny]) -> None:
    """Where `guidance=True` was said for the model alone, a batch of three parts is computed and the trace says why."""
    tiny = build(2)
    bare = tiny()
    model, scheduler = tiny.pipe.unet, tiny.pipe.scheduler
    for more in ({}, {"scheduler": scheduler}):
        with cachepolicy.apply(model, parse(REBUILT.format("")), guidance=True, **more) as run:
            assert torch.equal(bare, tiny())
            row = run.trace.rows()["model"]
            [*_, last] = run.trace.trajectories[LAST].calls
        assert set(row) == {"C"}
        reason = last.decided[0].reason
        assert "3 parts" in reason


def test_perturbed_attention_that_is_off_leaves_two_halves() -> None:
    """The same pipeline without perturbed attention guidance is rebuilt."""
    tiny = pag(2)
    tiny.arguments["pag_scale"] = 0.0
    with cachepolicy.apply(tiny.pipe, parse(REBUILT.format(""))) as run:
        tiny()
        assert run.trace.rows()["model"] == "CR" * (STEPS // 2)


# --- advice ----------------------------------------------------------------------------------------------


def test_a_pipeline_that_does_not_tell_is_not_told_to_apply_to_the_pipeline() -> None:
    """The advice of E330 names what is left to say."""
    tiny = dit()
    with cachepolicy.apply(tiny.pipe, parse(REBUILT.format(""))), pytest.raises(PolicyError, match="E330") as caught:
        tiny()
    [found] = caught.value.diagnostics
    assert "DiTPipeline" in found.message
    assert found.help is not None
    assert "apply the policy to the pipeline" not in found.help
    assert "no third part" in found.help


def test_a_pipeline_that_steps_both_halves_is_believed_by_its_latents() -> None:
    """DiT's scheduler steps the doubled batch, and the conditional half comes first."""
    reference, tiny = dit(), dit()
    Ideal(reference.pipe.transformer, cond_first=True)
    with cachepolicy.apply(tiny.pipe, parse(REBUILT.format("")), guidance=True) as run:
        got = tiny()
        assert run.trace.rows()["model"] == "CR" * (STEPS // 2)
    torch.testing.assert_close(got, reference(), rtol=1e-3, atol=1e-3)


def test_an_assumption_about_a_bare_model_is_stated() -> None:
    """Where pipelines of the class put the conditional half first, a bare model is assumed otherwise with a warning."""
    model = zoo.build("dit")
    with pytest.warns(UserWarning, match="assumed to come first"):
        assert GuidanceSource(True).layout("found", model) == "uncond first"


# --- the table -------------------------------------------------------------------------------------------


def test_the_parts_of_a_batch_are_judged_by_rows_and_samples() -> None:
    """Twice the samples are two halves, three times are not, and equal rows count only where nothing contradicts."""
    model = nn.Identity()
    same = torch.cat([normal(3, 2)] * 2)
    assert GuidanceSource(True, samples=3).problem(normal(6, 2), model) is None
    assert GuidanceSource(True, samples=2).problem(same, model) is not None
    assert GuidanceSource(True, samples=6).problem(same, model) is None
    assert GuidanceSource(True).problem(same, model) is None
    assert GuidanceSource(True).problem(normal(3, 2), model) is not None
    assert GuidanceSource(True).problem(torch.cat([normal(2, 2)] * 3), model) is not None


def test_the_word_of_the_caller_counts_for_a_bare_model() -> None:
    """Without a scheduler and a pipeline, `guidance=True` is evidence; a pipeline has to show the halves."""
    model = nn.Identity()
    assert GuidanceSource(True).problem(normal(6, 2), model) is None
    assert GuidanceSource(True, pipeline=object()).problem(normal(6, 2), model) is not None
    assert GuidanceSource(True, samples=6).problem(normal(6, 2), model) is not None


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_only_batches_of_two_parts_are_believed(parts: int, samples: int, equal: bool, stepped: bool) -> None:
    """Whatever the number of samples, and also where all samples have the same noise, if the scheduler tells it."""
    noise = normal(1, 2).expand(samples, 2) if equal else normal(samples, 2)
    source = GuidanceSource(None, pipeline=object(), samples=samples if stepped else None)
    believed = source.problem(torch.cat([noise] * parts), nn.Identity()) is None
    if stepped and parts > 1:
        assert believed == (parts == 2)
    elif not equal:
        assert believed == (parts % 2 == 0)


def _named(name: str) -> Any:
    return type(name, (), {"__module__": f"diffusers.pipelines.any.{name.lower()}"})()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("LEditsPPPipelineStableDiffusionXL", "uncond first"),
        ("OmniGenPipeline", "cond first"),
        ("DreamLitePipeline", "uncond first"),
    ],
)
@pytest.mark.parametrize("samples", [1, 2, None])
def test_pipelines_that_may_have_more_parts_are_judged_by_rows(name: str, layout: str, samples: int | None) -> None:
    """With two parts they are rebuilt in their order; with more, or where nothing tells, they are not."""
    source, model = GuidanceSource(True, pipeline=_named(name), samples=samples), nn.Identity()
    assert source.require()
    assert source.layout("found", model) == layout
    for parts in (2, 3, 4):
        problem = source.problem(torch.cat([normal(samples or 2, 2)] * parts), model)
        assert (problem is None) == (parts == 2 and samples is not None)


def test_every_pipeline_of_the_table_exists_and_so_does_every_model() -> None:
    """The table has names of diffusers only, current or deprecated."""
    missing = [name for name in ORDERS if not hasattr(diffusers, name)]
    assert missing == []
    assert {type(zoo.build(name)).__name__ for name in ("dit", "z_image", "lumina_next")} <= {
        path.rpartition(".")[2] for path in COND_FIRST_MODELS
    }
