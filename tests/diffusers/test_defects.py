"""What diffusers' caches get wrong, and is right here: those defects that no other test shows.

The whole list is in docs/diffusers-defects.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy import FasterCacheConfig, FirstBlockCacheConfig, PolicyError, PyramidAttentionBroadcastConfig
from cachepolicy.testing import models
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LATE = (600.0, 520.0, 400.0, 300.0, 180.0, 90.0)
"""Timesteps that are all inside FasterCache's windows."""


def calls(name: str, model: nn.Module, timesteps: Sequence[float] = LATE, *, batch: int = 1, **more: Any) -> list[Any]:
    """What the model answers to the same latents at each timestep."""
    one = zoo.entry(name)
    with torch.no_grad():
        return [zoo.output(model(**{**one.inputs(batch=batch, t=t, seed=0), **more})) for t in timesteps]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- FasterCache


def test_a_plain_batch_of_two_is_never_taken_for_guidance() -> None:
    """Two prompts without guidance stay two prompts; where nothing tells which it is, that is an error (d07)."""
    model = zoo.build("cogvideox")
    plain = calls("cogvideox", model, batch=2)
    with cachepolicy.apply(model, "fastercache", guidance=False):
        assert same(plain, calls("cogvideox", model, batch=2))
    with cachepolicy.apply(model, "fastercache"), pytest.raises(PolicyError, match="E330"):
        calls("cogvideox", model, batch=2)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_has_no_halves_computes(batch: int) -> None:
    """Also where guidance was promised, a batch of one or three is run as it is (d08)."""
    model = zoo.build("cogvideox")
    plain = calls("cogvideox", model, batch=batch)
    with cachepolicy.apply_faster_cache(model, FasterCacheConfig(tensor_format="BFCHW")):
        assert same(plain, calls("cogvideox", model, batch=batch))


def test_an_argument_that_is_none_has_no_half() -> None:
    """A batched input may be None at a skipped step (d09)."""
    model = zoo.build("pixart")
    with cachepolicy.apply_faster_cache(model, FasterCacheConfig(tensor_format="BCHW")) as run:
        calls("pixart", model, batch=2, encoder_attention_mask=None)
        assert "R" in run.trace.rows()["model"]


@pytest.mark.parametrize("name", ["unet2d_condition", "unet3d"])
def test_the_outputs_of_a_unet_are_rebuilt(name: str) -> None:
    """Output classes of any name keep their class, with both halves in them (d11)."""
    model, one = zoo.build(name), zoo.entry(name)
    with cachepolicy.apply(model, "fastercache", guidance=True) as run, torch.no_grad():
        outputs = [model(**one.inputs(batch=2, t=t, seed=0)) for t in LATE]
        assert "R" in run.trace.rows()["model"]
    assert {type(outputs[0])} == {type(each) for each in outputs}
    assert {outputs[0].sample.shape} == {each.sample.shape for each in outputs}


def test_a_distilled_model_may_start_inside_the_window() -> None:
    """With nothing kept yet attention computes, wherever the first timestep lies (d12)."""
    model = zoo.build("flux")
    with cachepolicy.apply_faster_cache(model, FasterCacheConfig(is_guidance_distilled=True)) as run:
        calls("flux", model)
        assert {"CRCRCR"} == {row for row in run.trace.rows().values() if "R" in row}


@pytest.mark.parametrize("every", [None, 2])
def test_the_conditional_half_may_come_first(every: int | None) -> None:
    """With `layout = "cond first"` the same samples in the other order give the same predictions (d14)."""
    model, one = zoo.build("pixart"), zoo.entry("pixart")

    def flipped(value: Any) -> Any:
        return value.flip(0) if isinstance(value, Tensor) and value.ndim and value.shape[0] == 2 else value

    outputs = list[list[Tensor]]()
    for layout, turn in (("uncond first", lambda value: value), ("cond first", flipped)):
        said = {"guidance": True, "layout": layout, "spatial_every": every}
        with cachepolicy.apply(model, "fastercache", **said) as run, torch.no_grad():
            given = [one.inputs(batch=2, t=t, seed=0) for t in LATE]
            outputs.append([zoo.output(model(**{key: turn(each) for key, each in call.items()})) for call in given])
            assert all("R" in row for row in run.trace.rows().values())
    for first, second in zip(*outputs, strict=True):
        assert torch.allclose(first, second.flip(0), atol=1e-5)


def test_identifiers_may_name_any_module() -> None:
    """Modules outside diffusers' own list, as in `layers`, are taken when they are named (d06)."""
    model = zoo.build("lumina2")
    config = FasterCacheConfig(spatial_attention_block_identifiers=["^layers.*attn"], is_guidance_distilled=True)
    with cachepolicy.apply_faster_cache(model, config) as run:
        calls("lumina2", model)
        rows = run.trace.rows()
    assert any(name.startswith("layers.") and "R" in row for name, row in rows.items())


def test_no_callback_is_needed() -> None:
    """Without `current_timestep_callback` the model's own timestep tells the same (d15)."""
    model, now = zoo.build("cogvideox"), [0.0]

    def told() -> float:
        return now[0]

    outputs = list[list[Tensor]]()
    for config in (
        FasterCacheConfig(tensor_format="BFCHW"),
        FasterCacheConfig(tensor_format="BFCHW", current_timestep_callback=told),
    ):
        with cachepolicy.apply_faster_cache(model, config) as run:
            outputs.append([])
            for now[0] in LATE:
                outputs[-1] += calls("cogvideox", model, (now[0],), batch=2)
            assert "R" in run.trace.rows()["model"]
    assert same(*outputs)


# --- First Block Cache


def test_a_model_of_one_block_has_nothing_to_skip() -> None:
    """That is an error at once, which says so (d34)."""
    model = models.Toy(blocks=1).build()
    with pytest.raises(PolicyError, match="E202"):
        cachepolicy.apply_first_block_cache(model, FirstBlockCacheConfig())


# --- what is selected


@pytest.mark.parametrize(
    "config",
    [
        PyramidAttentionBroadcastConfig(2, spatial_attention_block_identifiers=["nowhere"]),
        FasterCacheConfig(spatial_attention_block_identifiers=["nowhere"], is_guidance_distilled=True),
    ],
    ids=["pab", "fastercache"],
)
def test_where_nothing_matches_that_is_an_error(config: Any) -> None:
    """No cache is called enabled that would do nothing (d27)."""
    model = zoo.build("wan")
    with pytest.raises(PolicyError):
        cachepolicy.enable_cache(model, config)
    assert not cachepolicy.is_cache_enabled(model)


def test_identifiers_that_name_no_attention_are_told_of() -> None:
    """Where the unconditional half is skipped all the same, that is a warning (d06)."""
    model = zoo.build("wan")
    with pytest.warns(UserWarning, match="name no attention in `WanTransformer3DModel`"):
        cachepolicy.enable_cache(model, FasterCacheConfig(spatial_attention_block_identifiers=["nowhere"]))
    assert cachepolicy.is_cache_enabled(model)


# --- clocks and contexts


def test_a_call_before_the_run_does_not_shift_it() -> None:
    """After a warm-up call the same steps are computed as without one (d45)."""
    from diffusers import EulerDiscreteScheduler

    model, scheduler = zoo.build("pixart"), EulerDiscreteScheduler()
    config = PyramidAttentionBroadcastConfig(2, spatial_attention_timestep_skip_range=(-1, 1001))
    rows = list[dict[str, str]]()
    for warm in 0, 1:
        with cachepolicy.apply(model, config, scheduler=scheduler) as run, torch.no_grad():
            scheduler.set_timesteps(6)
            for t in scheduler.timesteps[:warm]:
                calls("pixart", model, (float(t),))
            scheduler.set_timesteps(6)
            x = zoo.entry("pixart").inputs(batch=1, seed=0)["hidden_states"]
            for t in scheduler.timesteps:
                (prediction,) = calls("pixart", model, (float(t),), hidden_states=x)
                x = scheduler.step(prediction[:, : x.shape[1]], t, x).prev_sample
            rows.append(run.trace.rows())
    assert rows[0] == rows[1]
    assert "CRCRCR" in rows[0].values()


def test_contexts_nest() -> None:
    """Leaving an inner context gives the outer one back (d20)."""
    model: Any = zoo.build("wan")
    one = zoo.entry("wan")
    with cachepolicy.apply_first_block_cache(model, FirstBlockCacheConfig(0.5)) as run, torch.no_grad():
        for t in LATE[:3]:
            with model.cache_context("cond"):
                with model.cache_context("uncond"):
                    model(**one.inputs(batch=1, t=t, seed=1))
                model(**one.inputs(batch=1, t=t, seed=0))
        assert {"cond", "uncond"} == set(run.trace.last.branches)
        assert {"CRR"} == set(run.trace.rows("cond").values())


def test_a_policy_may_come_after_a_context_was_used() -> None:
    """A model that has run within a context can be given a policy (d21), and needs no context afterwards (d33)."""
    model: Any = zoo.build("wan")
    with model.cache_context("cond"):
        calls("wan", model, LATE[:1])
    with cachepolicy.apply_first_block_cache(model, FirstBlockCacheConfig(0.5)) as run:
        with model.cache_context("cond"):
            calls("wan", model, LATE[:2])
        assert {"CR"} == set(run.trace.rows("cond").values())
        calls("wan", model, LATE[:2])


@pytest.mark.parametrize("name", ["pixart", "sd3", "unet2d_condition"])
def test_a_second_run_is_as_the_first_without_a_mixin(name: str) -> None:
    """Models that nothing resets give the same twice, and take another size (d18)."""
    model = zoo.build(name)
    with cachepolicy.apply_pyramid_attention_broadcast(model, PyramidAttentionBroadcastConfig(2)):
        first = calls(name, model)
        assert same(first, calls(name, model))
        calls(name, model, batch=2)
        assert same(first, calls(name, model))


def test_the_timestep_is_read_once_a_call() -> None:
    """However many modules there are, so that a tensor on a device is waited for once (d46)."""
    model, asked = zoo.build("flux"), list[float]()

    def timestep() -> Tensor:
        asked.append(LATE[len(asked)])
        return torch.tensor(asked[-1])

    config = PyramidAttentionBroadcastConfig(2, current_timestep_callback=timestep)
    with cachepolicy.apply_pyramid_attention_broadcast(model, config) as run:
        calls("flux", model)
        assert len(run.plan.sites) > 1
    assert LATE == tuple(asked)


def test_what_happened_can_be_shown_for_outputs_of_any_kind() -> None:
    """A run over modules that return tuples prints like any other (d35)."""
    model = zoo.build("flux")
    with cachepolicy.apply_pyramid_attention_broadcast(model, PyramidAttentionBroadcastConfig(2)) as run:
        calls("flux", model)
        assert "CRCR" in str(run.trace).replace(" ", "")
        assert repr(run)


# --- the list


def test_every_defect_has_its_row_and_every_test_that_is_named_is_there() -> None:
    """The table has d01 to d47, each once, and a row that says mended names a test that exists."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "diffusers-defects.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (d\d\d) \| [^|]+ \| (mended|kept|left|not ours|no defect) \| ([^|]+) \|$", page, re.MULTILINE
    )
    assert [f"d{number:02}" for number in range(1, 48)] == [name for name, _, _ in rows]
    tests = {
        name
        for file in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", page))
    assert [] == sorted(named - tests)
    assert [] == [name for name, state, rest in rows if state == "mended" and "`test_" not in rest]
