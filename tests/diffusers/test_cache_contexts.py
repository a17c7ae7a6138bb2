"""diffusers' caches as a client uses them: two calls in one `cache_context`, at one timestep and without a scheduler.

The sequences run under diffusers' own hooks and under ours; the tensors are the same to the last bit. diffusers'
FasterCache fails where its first call is inside the window, so that ours runs alone there.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from torch import Tensor

import cachepolicy
import cachepolicy.diffusers as ours
from cachepolicy.language.parser import parse
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MODELS = ("flux", "wan", "cogvideox", "qwenimage")
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "first block cache": ("FirstBlockCacheConfig", {"threshold": 10.0}),
    "pyramid attention broadcast": (
        "PyramidAttentionBroadcastConfig",
        {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500},
    ),
    "faster cache": (
        "FasterCacheConfig",
        {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (-1, 901),
            "is_guidance_distilled": True,
            "current_timestep_callback": lambda: 500,
        },
    ),
}


def made(module: Any, kind: str) -> Any:
    name, fields = CONFIGS[kind]
    return getattr(module, name)(**fields)


def call(name: str, model: Any, *, noise: int = 0, seed: int = 0) -> Tensor:
    """One call at timestep 500, with unit noise on its latents where `noise` is not 0."""
    entry = zoo.entry(name)
    inputs = entry.inputs(batch=1, t=500.0, seed=seed)
    if noise:
        latents = inputs[entry.latent]
        inputs[entry.latent] = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(noise))
    with torch.no_grad():
        return zoo.output(model(**inputs))


def by_diffusers(name: str, kind: str, calls: int) -> list[Tensor]:
    model: Any = zoo.build(name)
    model.enable_cache(made(diffusers, kind))
    with model.cache_context("client"):
        return [call(name, model, noise=number) for number in range(calls)]


@pytest.mark.parametrize("calls", [2, 5])
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "faster cache"])
@pytest.mark.parametrize("name", MODELS)
def test_calls_inside_one_entry_are_steps(name: str, kind: str, calls: int) -> None:
    """Each call repeats the last on other latents: successive steps of one branch, as diffusers takes them."""
    expected, model = by_diffusers(name, kind, calls), zoo.build(name)
    ours.enable_cache(model, made(ours, kind))
    with model.cache_context("client"):
        got = [call(name, model, noise=number) for number in range(calls)]
    assert all(map(torch.equal, expected, got))
    ours.disable_cache(model)
    bare = [call(name, model, noise=number) for number in range(calls)]
    assert torch.equal(bare[0], got[0])
    assert not torch.allclose(bare[1], got[1], atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_reset_begins_anew(kind: str) -> None:
    """After `_reset_stateful_cache` the first call of an entry computes, and the second reuses."""
    model: Any = zoo.build("wan")
    bare = call("wan", model, noise=3)
    ours.enable_cache(model, made(ours, kind))
    for _ in range(2):
        with model.cache_context("client"):
            assert torch.equal(bare, call("wan", model, noise=3))
            assert not torch.allclose(bare, call("wan", model, noise=4), atol=1e-5)
        model._reset_stateful_cache()


def test_the_state_of_a_cache_is_told_and_changes_once() -> None:
    """Enabled, disabled, enabled again; twice is an error, and the model is left as it was."""
    model: Any = zoo.build("wan")
    bare = call("wan", model)
    for _ in range(2):
        ours.enable_cache(model, made(ours, "first block cache"))
        with pytest.raises(cachepolicy.PolicyError, match="E301"):
            ours.enable_cache(model, made(ours, "first block cache"))
        ours.disable_cache(model)
        assert torch.equal(bare, call("wan", model))


def test_tiles_enter_the_context_anew() -> None:
    """Far latents in an entry of their own are a tile of the step, which computes and has a history of its own."""
    model: Any = zoo.build("wan")
    with cachepolicy.apply(model, parse("match attention every 2 -> reuse")) as run:
        for _ in range(2):
            for tile in (11, 12):
                with model.cache_context("cond"):
                    call("wan", model, noise=tile, seed=tile)
        assert {0} == {each.tick.step for each in run.trace.last.calls[:2]}
        assert 2 == len({each.tick.branch for each in run.trace.last.calls[:2]})


@pytest.mark.parametrize("named", [True, False])
def test_branches_in_turn_have_an_entry_each(named: bool) -> None:
    """Two halves of guidance at one timestep are one step; the halves of the next timestep are the next."""
    model: Any = zoo.build("wan")
    with cachepolicy.apply(model, parse("match attention every 2 -> reuse")) as run:
        for t in (500.0, 400.0):
            for seed, name in enumerate(("cond", "uncond")):
                entry = model.cache_context(name) if named else contextlib.nullcontext()
                with entry, torch.no_grad():
                    model(**zoo.entry("wan").inputs(batch=1, t=t, seed=seed))
        assert [0, 0, 1, 1] == [each.tick.step for each in run.trace.last.calls]


def test_a_budget_of_steps_ends_inside_an_entry() -> None:
    """With `steps=2` every second call of one entry begins a trajectory."""
    model: Any = zoo.build("wan")
    with cachepolicy.apply(model, parse("match attention every 2 -> reuse"), steps=2) as run:
        with model.cache_context("client"):
            for number in range(4):
                call("wan", model, noise=number)
        assert [[0, 1], [0, 1]] == [[each.tick.step for each in one.calls] for one in run.trace]
