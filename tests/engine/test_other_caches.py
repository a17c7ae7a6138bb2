"""Other caches on the same model: refused by name, in either order, and everything comes off again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from tests.support import tiny_pipelines, zoo

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

diffusers = pytest.importorskip("diffusers")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0)
EVERY_2 = parse("match attention every 2 -> reuse")
BLOCKS = parse("match block every 2 -> reuse")


@torch.no_grad()
def run(model: nn.Module) -> list[Tensor]:
    return list(zoo.trajectory("flux", model, TIMESTEPS))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def expected(policy: Any = EVERY_2) -> list[Tensor]:
    model = zoo.build("flux")
    with cachepolicy.apply(model, policy):
        return run(model)


CONFIGS = {
    "Pyramid Attention Broadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "First Block Cache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "FasterCache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, is_guidance_distilled=True
    ),
    "MagCache": lambda: diffusers.MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6),
    "TaylorSeer": diffusers.TaylorSeerCacheConfig,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_of_diffusers_is_not_enabled_over_a_policy(name: str) -> None:
    """`enable_cache` says so at once and by name, nothing has changed, and `disable_cache` has nothing to do."""
    model, config = zoo.build("flux"), CONFIGS[name]()
    with cachepolicy.apply(model, EVERY_2):
        with pytest.raises(PolicyError, match=type(config).__name__) as caught:
            model.enable_cache(config)
        assert ["E340"] == [each.code for each in caught.value.diagnostics]
        assert not model.is_cache_enabled
        model.disable_cache()
        assert same(expected(), run(model))
    model.enable_cache(config)
    assert model.is_cache_enabled


@pytest.mark.parametrize("name", CONFIGS)
def test_a_policy_is_not_applied_over_a_cache_of_diffusers(name: str) -> None:
    """`apply` names the cache and leaves it alone; once it is disabled the policy goes on."""
    model = zoo.build("flux")
    model.enable_cache(CONFIGS[name]())
    with pytest.raises(PolicyError, match=f"diffusers' {name}"):
        cachepolicy.apply(model, EVERY_2)
    assert not any("_cachepolicy" in each.__dict__ for each in model.modules())
    model.disable_cache()
    with cachepolicy.apply(model, EVERY_2):
        assert same(expected(), run(model))


APPLIED: dict[str, Callable[[Any], None]] = {
    "Pyramid Attention Broadcast": lambda model: diffusers.hooks.apply_pyramid_attention_broadcast(
        model, CONFIGS["Pyramid Attention Broadcast"]()
    ),
    "First Block Cache": lambda model: diffusers.hooks.apply_first_block_cache(model, CONFIGS["First Block Cache"]()),
}


@pytest.mark.parametrize("policy", [EVERY_2, BLOCKS], ids=["attention", "blocks"])
@pytest.mark.parametrize("name", APPLIED)
def test_hooks_of_a_cache_are_seen_when_a_trajectory_starts(name: str, policy: Any) -> None:
    """The `apply_*` functions of diffusers ask nobody: the next call says what is on, and `remove` leaves it whole."""
    model = zoo.build("flux")
    attached = cachepolicy.apply(model, policy)
    run(model)
    APPLIED[name](model)
    with pytest.raises(PolicyError, match=f"diffusers' {name}"):
        run(model)
    attached.remove()
    twin = zoo.build("flux")
    APPLIED[name](twin)
    for each in (model, twin):
        context = each.cache_context("one") if name == "First Block Cache" else torch.no_grad()
        with context:
            run(each)
    assert not any("_cachepolicy" in each.__dict__ for each in model.modules())


def test_blocks_are_known_to_those_who_look_them_up_by_class() -> None:
    """Layer skipping of diffusers finds the blocks of a model with a policy, and both are right."""
    skip = diffusers.hooks.LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    results = list[list[Tensor]]()
    for first in ("policy", "neighbour"):
        model = zoo.build("flux")
        if first == "neighbour":
            diffusers.hooks.apply_layer_skip(model, skip)
        with cachepolicy.apply(model, BLOCKS):
            if first == "policy":
                diffusers.hooks.apply_layer_skip(model, skip)
            results.append(run(model))
    assert same(*results)
    assert not same(expected(BLOCKS), results[0])


# --- cache-dit -------------------------------------------------------------------------------------------


def cache_dit() -> Any:
    found = pytest.importorskip("cache_dit")
    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    return found


def enable(target: Any) -> None:
    library = cache_dit()
    library.enable_cache(
        target,
        cache_config=library.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, num_inference_steps=6
        ),
    )


def test_a_policy_and_cache_dit_refuse_each_other_on_a_model() -> None:
    """Whichever was first, the policy names cache-dit; each comes off and leaves the other whole."""
    model = zoo.build("flux")
    bare = run(model)
    enable(model)
    with pytest.raises(PolicyError, match="cache-dit's cache"):
        cachepolicy.apply(model, EVERY_2)
    cache_dit().disable_cache(model)
    with cachepolicy.apply(model, EVERY_2):
        assert same(expected(), run(model))
        enable(model)
        with pytest.raises(PolicyError, match="cache-dit's cache"):
            run(model)
        cache_dit().disable_cache(model)
        assert same(expected(), run(model))
    assert same(bare, run(model))


@pytest.mark.parametrize("first_off", ["cache-dit", "policy"])
def test_a_policy_and_cache_dit_refuse_each_other_on_a_pipeline(first_off: str) -> None:
    """cache-dit changes the class of a pipeline: what it changed of ours does not reach other pipelines."""
    tiny, other = tiny_pipelines.flux(), tiny_pipelines.flux()
    wanted = other()
    attached = cachepolicy.apply(tiny.pipe, EVERY_2)
    enable(tiny.pipe)
    with pytest.raises(PolicyError, match="cache-dit's cache"):
        tiny()
    if first_off == "policy":
        attached.remove()
    cache_dit().disable_cache(tiny.pipe)
    attached.remove()
    assert torch.equal(wanted, tiny())
    with cachepolicy.apply(other.pipe, EVERY_2) as again:
        other()
        assert "R" in "".join(again.trace.rows().values())
    assert torch.equal(wanted, other())
