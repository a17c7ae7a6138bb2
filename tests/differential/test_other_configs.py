"""diffusers' TaylorSeer and MagCache configs decide what diffusers' own hooks decide, with equal tensors."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("diffusers.hooks.sea_cache")

import torch
from blocks import blocks, sample
from diffusers.hooks import mag_cache, sea_cache, taylorseer_cache, text_kv_cache
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.sea_cache import SeaCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.hooks.text_kv_cache import TextKVCacheConfig
from harness import Clock, Run, Watch, flat
from torch import nn

import cachepolicy
from tests.support import zoo
from tests.support.caching import set_cache_context

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TIMESTEPS = tuple(950.0 - 60 * step for step in range(14))
ATTENTION = ("flux", "longcat_image", "qwenimage21", "nucleusmoe", "minimax_music3")
"""Models with attention that diffusers' default identifiers name."""

WHOLE = ("prior", "dit", "pixart", "wan", "ltx", "flux")
"""Models with a chain of blocks, by which MagCache reuses."""


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of blocks whose names end in `attn`."""
    return {name: module for name, module in model.named_modules() if name.endswith("attn") and "blocks." in name[:30]}


def run_theirs(name: str, model: nn.Module, apply: Any, config: Any, watched: Any) -> Run:
    """The loop under diffusers' hooks, on a copy."""
    twin = copy.deepcopy(model)
    watch = watched(twin)
    apply(twin, config)
    set_cache_context(twin, "only")
    return sample(name, twin, TIMESTEPS, watched=watch)


def run_ours(name: str, model: nn.Module, config: Any, watched: Any) -> Run:
    """The loop under the same config, converted."""
    twin = copy.deepcopy(model)
    run = cachepolicy.enable_cache(twin, config)
    result = sample(name, twin, TIMESTEPS, watched=watched(twin))
    run.remove()
    return result


def assert_same(theirs: Run, ours: Run) -> None:
    """The same modules ran at the same steps, some did not, and the outputs have the same bits."""
    assert theirs.computed == ours.computed
    assert len(set(ours.computed)) > 1
    for step, (expected, actual) in enumerate(zip(theirs.outputs, ours.outputs, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True)), step


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(
    "fields",
    [
        {"cache_interval": 4, "max_order": 2},
        {"disable_cache_before_step": 2, "disable_cache_after_step": 11},
        {"cache_interval": 3, "cache_identifiers": [r".*blocks\.\d+\.attn"]},
    ],
)
def test_taylorseer(name: str, fields: dict[str, Any]) -> None:
    """The attention that diffusers names is forecast at its steps, by its expansion."""
    config = TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **fields)
    model = zoo.build(name)
    theirs = run_theirs(name, model, taylorseer_cache.apply_taylorseer_cache, config, attentions)
    assert_same(theirs, run_ours(name, model, config, attentions))


@pytest.mark.parametrize("name", ["flux", "wan", "ltx"])
def test_taylorseer_lite(name: str) -> None:
    """In the lite mode no block runs while the last projection is forecast."""
    config = TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True, taylor_factors_dtype=torch.float32)
    model = zoo.build(name)
    theirs = run_theirs(name, model, taylorseer_cache.apply_taylorseer_cache, config, blocks)
    assert_same(theirs, run_ours(name, model, config, blocks))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("seed", range(2))
def test_magcache(name: str, seed: int) -> None:
    """Blocks are reused where diffusers' table and bounds say so."""
    draw = random.Random(seed)
    config = MagCacheConfig(
        threshold=draw.uniform(0.02, 0.2),
        max_skip_steps=draw.randint(1, 4),
        retention_ratio=draw.uniform(0.1, 0.4),
        num_inference_steps=len(TIMESTEPS),
        mag_ratios=[1.0, *(draw.uniform(0.93, 1.05) for _ in range(draw.choice([13, 20])))],
    )
    model = zoo.build(name)
    theirs = run_theirs(name, model, mag_cache.apply_mag_cache, config, blocks)
    ours = run_ours(name, model, config, blocks)
    assert theirs.computed == ours.computed
    assert len(set(ours.computed)) > 1


def run_in_contexts(model: nn.Module, context: Any) -> Run:
    """The loop of Wan with a context for each step."""
    watch, run, clock = Watch(blocks(model)), Run(), Clock()

    def timesteps() -> Iterator[float]:
        for step, t in enumerate(clock.over(TIMESTEPS)):
            with context("cond", step_index=step, sigma=t / 1000, num_inference_steps=len(TIMESTEPS)):
                yield t

    with torch.no_grad():
        for prediction in zoo.trajectory("wan", model, timesteps()):
            run.outputs.append(flat(prediction))
            run.computed.append(watch.take())
    return run


@pytest.mark.parametrize("seed", range(4))
def test_seacache(seed: int) -> None:
    """Blocks are reused where diffusers' filtered latents say so; a forecast differs by rounding alone."""
    draw = random.Random(seed)
    config = SeaCacheConfig(
        threshold=draw.uniform(0.02, 0.6),
        residual_order=seed % 2,
        max_consecutive_cached=seed % 3,
        retention_steps=1 + seed % 2,
        cache_end_steps=draw.randint(1, 3),
    )
    model = zoo.build("wan")
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    sea_cache.apply_sea_cache(theirs, config)
    expected = run_in_contexts(theirs, theirs.cache_context)
    run = cachepolicy.enable_cache(ours, config)
    actual = run_in_contexts(ours, partial(cachepolicy.cache_context, ours))
    run.remove()
    assert expected.computed == actual.computed
    assert len(set(actual.computed)) > 1
    for one, other in zip(expected.outputs, actual.outputs, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """The projections of the prompt to keys and values."""
    ends = ("encoder_proj", "add_k_proj", "add_v_proj", "norm_added_k")
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


def test_text_kv() -> None:
    """The keys and values of a prompt are computed once; predictions are diffusers' and the bare model's."""
    config = TextKVCacheConfig()
    model = zoo.build("nucleusmoe")
    bare = sample("nucleusmoe", copy.deepcopy(model), TIMESTEPS)
    theirs = run_theirs("nucleusmoe", model, text_kv_cache.apply_text_kv_cache, config, projections)
    ours = run_ours("nucleusmoe", model, config, projections)
    assert [True, *[False] * 13] == [bool(names) for names in ours.computed]
    for expected, diffusers, actual in zip(bare.outputs, theirs.outputs, ours.outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(diffusers, actual, strict=True))
