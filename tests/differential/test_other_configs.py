"""diffusers' TaylorSeer, MagCache, SeaCache and TextKV configs decide as its own hooks do, with equal tensors."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest

pytest.importorskip("diffusers.hooks.sea_cache")

import torch
from blocks import blocks, sample
from diffusers.hooks import hooks, mag_cache, sea_cache, taylorseer_cache, text_kv_cache
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.sea_cache import SeaCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.hooks.text_kv_cache import TextKVCacheConfig
from harness import Run, difference
from torch import nn

import cachepolicy
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Watched = Callable[[nn.Module], dict[str, nn.Module]]
Guidance = Literal["none", "batched", "sequential"]

GUIDANCE: tuple[Guidance, ...] = ("none", "batched", "sequential")
TIMESTEPS = tuple(950.0 - 60 * step for step in range(14))

ATTENTION = ("flux", "sd3", "qwenimage", "nucleusmoe", "hunyuan_video", "ltx2", "minimax_music3")
"""Models with attention that diffusers' default identifiers name."""

MORE_ATTENTION = (
    "flux2",
    "chroma",
    "sd35",
    "auraflow",
    "bria",
    "bria_fibo",
    "longcat_image",
    "ovis_image",
    "flux3",
    "qwenimage21",
    "hunyuan_image",
    "krea2",
    "hunyuan_video_token_replace",
    "hunyuan_video15",
    "hunyuan_framepack",
    "motif_video",
    "stable_audio3",
    "longcat_audio",
)

PROJECTION = ("flux", "wan", "ltx", "cogview4", "hunyuan_video")
"""Models whose last projection diffusers forecasts while it runs no block."""

CHAIN = ("flux", "dit", "pixart", "wan", "cogvideox", "hunyuan_video")
"""Models with registered blocks, by whose residual MagCache reuses."""

MORE_CHAIN = (
    "sd3",
    "sd35",
    "qwenimage",
    "cogview4",
    "prior",
    "hunyuan_image",
    "ltx",
    "mochi",
    "cogvideox15",
    "hunyuan_video_token_replace",
    "hunyuan_framepack",
    "kandinsky5",
    "motif_video",
    "wan_i2v",
)

GRIDS = ("wan", "dit", "pixart", "mochi", "cogvideox", "hunyuan_video")
"""Models whose latents are a grid, which SeaCache filters; Wan's without a callback."""

MORE_GRIDS = ("wan_i2v", "cogview4", "motif_video", "hunyuan_image", "kandinsky5")


def with_guidance(fast: tuple[str, ...], more: tuple[str, ...]) -> list[Any]:
    """Pairs of a model and a form of guidance. The suite takes one form for each of the fast ones, in turn."""
    pairs = [
        (name, guidance) for name in (*fast, *more) for guidance in GUIDANCE[: 3 if zoo.entry(name).batches else 1]
    ]
    chosen = {(name, GUIDANCE[number % 3]) for number, name in enumerate(fast)}
    return [pytest.param(*pair, marks=() if pair in chosen else pytest.mark.deep, id="-".join(pair)) for pair in pairs]


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that diffusers' default identifiers name."""
    patterns = taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS
    return {
        name: module for name, module in model.named_modules() if any(re.fullmatch(each, name) for each in patterns)
    }


class InContexts:
    """A model, each call of which is in the context of its branch and step."""

    def __init__(self, model: nn.Module, guidance: Guidance, *, ours: bool) -> None:
        self._model: Any = model
        self._names = ("cond", "uncond") if guidance == "sequential" else ("only",)
        self._ours, self._calls = ours, 0

    def __call__(self, **arguments: Any) -> Any:
        """The model's answer."""
        step, branch = divmod(self._calls, len(self._names))
        self._calls += 1
        clock = {"step_index": step, "sigma": TIMESTEPS[step] / 1000, "num_inference_steps": len(TIMESTEPS)}
        if self._ours:
            with cachepolicy.cache_context(self._model, self._names[branch], **clock):
                return self._model(**arguments)
        hooks._set_cache_context(self._model, hooks.CacheContext(self._names[branch], **clock))
        return self._model(**arguments)


def run_theirs(
    name: str,
    model: nn.Module,
    apply: Any,
    config: Any,
    watched: Watched = blocks,
    *,
    contexts: bool = True,
    **more: Any,
) -> Run:
    """The loop under diffusers' hooks, on a copy."""
    twin = copy.deepcopy(model)
    modules = watched(twin)
    apply(twin, config)
    call = InContexts(twin, more.get("guidance", "none"), ours=False) if contexts else None
    return sample(name, twin, TIMESTEPS, watched=modules, call=call, **more)


def run_ours(
    name: str, model: nn.Module, config: Any, watched: Watched = blocks, *, contexts: bool = False, **more: Any
) -> Run:
    """The loop under the same config, converted; the calls of branches are in no context, unless told so."""
    twin = copy.deepcopy(model)
    run = cachepolicy.enable_cache(twin, config)
    call = InContexts(twin, more.get("guidance", "none"), ours=True) if contexts else None
    result = sample(name, twin, TIMESTEPS, watched=watched(twin), call=call, **more)
    run.remove()
    return result


def assert_close(expected: Run, actual: Run) -> None:
    """The same modules ran, and the outputs differ by rounding alone, which later steps amplify."""
    assert expected.computed == actual.computed
    for one, other in zip(expected.outputs, actual.outputs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


# --- TaylorSeer


def taylorseer(draw: random.Random, **fields: Any) -> TaylorSeerCacheConfig:
    """A drawn setting, with differences in the dtype of the model."""
    drawn = {
        "cache_interval": draw.randint(2, 5),
        "disable_cache_before_step": draw.randint(1, 4),
        "disable_cache_after_step": draw.choice([None, 11]),
        "max_order": draw.randint(0, 3),
    }
    return TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **{**drawn, **fields})


@pytest.mark.parametrize(("name", "guidance"), with_guidance(ATTENTION, MORE_ATTENTION))
def test_taylorseer(name: str, guidance: Guidance) -> None:
    """The attention that diffusers names is forecast at its steps, by its expansion, on each branch by its own."""
    for seed in range(2):
        config = taylorseer(random.Random(f"{name}-{guidance}-{seed}"))
        model, more = zoo.build(name, seed), {"guidance": guidance, "seed": seed}
        theirs = run_theirs(name, model, taylorseer_cache.apply_taylorseer_cache, config, attentions, **more)
        assert difference(theirs, run_ours(name, model, config, attentions, **more)) is None
        assert len(set(theirs.computed)) > 1


@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_taylorseer_by_names(name: str) -> None:
    """Identifiers are matched with the whole name of a module."""
    config = taylorseer(random.Random(name), cache_identifiers=[r".*blocks\.\d+\.attn", r".*\.ff"])
    model = zoo.build(name)

    def watched(model: nn.Module) -> dict[str, nn.Module]:
        return {key: module for key, module in model.named_modules() if re.fullmatch(r".*blocks\.\d+\.(attn|ff)", key)}

    theirs = run_theirs(name, model, taylorseer_cache.apply_taylorseer_cache, config, watched)
    assert difference(theirs, run_ours(name, model, config, watched)) is None


@pytest.mark.parametrize(("name", "guidance"), with_guidance(PROJECTION, ()))
def test_taylorseer_lite(name: str, guidance: Guidance) -> None:
    """In the lite mode no block runs while the last projection is forecast."""
    config = taylorseer(random.Random(name), use_lite_mode=True)
    model = zoo.build(name)
    theirs = run_theirs(name, model, taylorseer_cache.apply_taylorseer_cache, config, guidance=guidance)
    assert difference(theirs, run_ours(name, model, config, guidance=guidance)) is None


def test_differences_in_bfloat16() -> None:
    """By default diffusers rounds the stored results to bfloat16, so that its answers are rounded; ours are not, and
    are nearer to those of differences in the model's dtype: they are these."""
    name, model = "flux", zoo.build("flux")
    full, rounded = (
        run_theirs(
            name,
            model,
            taylorseer_cache.apply_taylorseer_cache,
            TaylorSeerCacheConfig(taylor_factors_dtype=dtype),
            attentions,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    ours = run_ours(name, model, TaylorSeerCacheConfig(), attentions)
    assert difference(full, ours) is None
    assert difference(rounded, ours) is not None


def test_a_lite_mode_without_a_projection() -> None:
    """Where a model has no `proj_out`, diffusers gives zeros for its blocks and forecasts nothing; ours refuses."""
    name, model = "dit", zoo.build("dit")
    config = TaylorSeerCacheConfig(use_lite_mode=True)
    theirs = run_theirs(name, model, taylorseer_cache.apply_taylorseer_cache, config)
    assert len(set(theirs.computed)) > 1
    with pytest.raises(cachepolicy.PolicyError, match="proj_out"):
        run_ours(name, model, config)


@pytest.mark.parametrize(("name", "runs"), [("latte", "ours"), ("omnigen", "theirs")])
def test_a_lite_mode_that_runs_blocks(name: str, runs: str) -> None:
    """Predictions are equal, but blocks run whose results are not read: here those of Latte, whose lists take turns, in
    diffusers those of lists with other names."""
    model, config = zoo.build(name), taylorseer(random.Random(name), use_lite_mode=True, disable_cache_before_step=2)
    theirs, ours = (
        run_theirs(name, model, taylorseer_cache.apply_taylorseer_cache, config),
        run_ours(name, model, config),
    )
    for expected, actual in zip(theirs.outputs, ours.outputs, strict=True):
        assert torch.equal(expected, actual)
    busy, idle = (ours, theirs) if runs == "ours" else (theirs, ours)
    assert len(set(busy.computed)) == 1
    assert len(set(idle.computed)) > 1


# --- MagCache


def magcache(draw: random.Random) -> MagCacheConfig:
    """A drawn setting, with a table as long as the trajectory, or longer."""
    return MagCacheConfig(
        threshold=draw.uniform(0.02, 0.2),
        max_skip_steps=draw.randint(1, 4),
        retention_ratio=draw.uniform(0.1, 0.4),
        num_inference_steps=len(TIMESTEPS),
        mag_ratios=[1.0, *(draw.uniform(0.93, 1.05) for _ in range(draw.choice([13, 20])))],
    )


@pytest.mark.parametrize(("name", "guidance"), with_guidance(CHAIN, MORE_CHAIN))
def test_magcache(name: str, guidance: Guidance) -> None:
    """Residuals are reused where diffusers' table and bounds say so, on each branch by its own count of steps."""
    for seed in range(2):
        config = magcache(random.Random(f"{name}-{guidance}-{seed}"))
        model, more = zoo.build(name, seed), {"guidance": guidance, "seed": seed}
        theirs = run_theirs(name, model, mag_cache.apply_mag_cache, config, **more)
        assert difference(theirs, run_ours(name, model, config, **more)) is None
        assert len(set(theirs.computed)) > 1


def test_magcache_of_streams_that_are_joined() -> None:
    """Flux 2 joins its streams between its lists of blocks; ours keeps a residual before and one after, so that the
    sums are rounded otherwise."""
    model, config = zoo.build("flux2"), magcache(random.Random(1))
    theirs = run_theirs("flux2", model, mag_cache.apply_mag_cache, config)
    assert_close(theirs, run_ours("flux2", model, config))


def test_magcache_without_contexts() -> None:
    """Without contexts diffusers counts the calls of both branches as steps of one; ours needs none."""
    name, model, config = "wan", zoo.build("wan"), magcache(random.Random(0))
    more: dict[str, Any] = {"guidance": "sequential"}
    named = run_theirs(name, model, mag_cache.apply_mag_cache, config, **more)
    bare = run_theirs(name, model, mag_cache.apply_mag_cache, config, contexts=False, **more)
    assert difference(named, bare) is not None
    assert difference(named, run_ours(name, model, config, **more)) is None


@pytest.mark.parametrize("name", ["hidream", "joyimage"])
def test_lists_of_blocks_with_other_names(name: str) -> None:
    """MagCache of diffusers knows some names of lists, and caches nothing elsewhere; ours finds the blocks."""
    model, config = zoo.build(name), magcache(random.Random(0))
    theirs = run_theirs(name, model, mag_cache.apply_mag_cache, config)
    assert len(set(theirs.computed)) == 1
    assert len(set(run_ours(name, model, config).computed)) > 1


def test_a_trajectory_longer_than_told() -> None:
    """Behind the steps of the setting a new trajectory begins, as in diffusers."""
    name, model = "wan", zoo.build("wan")
    config = MagCacheConfig(num_inference_steps=8, mag_ratios=[1.0] * 8)
    theirs, ours = run_theirs(name, model, mag_cache.apply_mag_cache, config), run_ours(name, model, config)
    assert difference(theirs, ours) is None
    assert theirs.computed[8] == theirs.computed[0]


# --- SeaCache


def vision(name: str) -> Callable[..., list[torch.Tensor]] | None:
    """The callback that gives the latents of each sample as (C, T, H, W); None where diffusers finds them itself."""
    if name.startswith("wan"):
        return None

    def latents(_: nn.Module, __: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
        return [each if each.ndim == 4 else each[:, None] for each in arguments[zoo.entry(name).latent]]

    return latents


def seacache(draw: random.Random, order: int) -> SeaCacheConfig:
    """A drawn setting."""
    return SeaCacheConfig(
        threshold=draw.uniform(0.02, 0.6),
        residual_order=order,
        max_consecutive_cached=draw.randint(0, 2),
        retention_steps=draw.randint(1, 2),
        cache_end_steps=draw.randint(1, 3),
    )


def with_sea_cache(name: str, model: nn.Module, config: SeaCacheConfig, **more: Any) -> tuple[Run, Run]:
    """The run of diffusers, and ours."""
    theirs = copy.copy(config)
    theirs.raw_vision_callback = vision(name)  # pyright: ignore[reportAttributeAccessIssue]
    expected = run_theirs(name, model, sea_cache.apply_sea_cache, theirs, **more)
    return expected, run_ours(name, model, config, contexts=True, **more)


@pytest.mark.parametrize(("name", "guidance"), with_guidance(GRIDS, MORE_GRIDS))
def test_seacache(name: str, guidance: Guidance) -> None:
    """Residuals are reused where diffusers' filtered latents say so. Forecasts differ by rounding: diffusers multiplies
    the difference of two residuals once, a Taylor expansion divides and multiplies it."""
    for seed in range(2):
        draw, more = random.Random(f"{name}-{guidance}-{seed}"), {"guidance": guidance, "seed": seed}
        model = zoo.build(name, seed)
        assert difference(*with_sea_cache(name, model, seacache(draw, 0), **more)) is None
        assert_close(*with_sea_cache(name, model, seacache(draw, 1), **more))


def test_seacache_of_a_batch() -> None:
    """Each takes one number for a batch: diffusers the mean of the changes of the samples, ours the change of the whole
    batch. A threshold between them tells them apart."""
    name, model = "dit", zoo.build("dit")
    seen = list[torch.Tensor]()

    def record(**arguments: Any) -> Any:
        seen.append(arguments["hidden_states"])
        return model(**arguments)

    with torch.no_grad():
        for _ in zoo.trajectory(name, record, TIMESTEPS[:2], batch=3):  # pyright: ignore[reportArgumentType]
            pass
    before, after = (
        torch.stack([sea_cache._apply_sea_filter(each[:, None].movedim(0, -1), t / 1000, 3.0) for each in states])
        for states, t in zip(seen, TIMESTEPS, strict=False)
    )
    changes, sizes = ((after - before).abs().flatten(1).mean(1), before.abs().flatten(1).mean(1))
    samples, whole = float((changes / sizes).mean()), float(changes.mean() / sizes.mean())
    config = SeaCacheConfig(threshold=(samples + whole) / 2, residual_order=0)
    theirs, ours = with_sea_cache(name, model, config, batch=3)
    everything = theirs.computed[0]
    assert (samples > config.threshold) == (theirs.computed[1] == everything)
    assert (whole > config.threshold) == (ours.computed[1] == everything)
    assert theirs.computed[1] != ours.computed[1]


def test_seacache_where_the_last_block_gives_no_text() -> None:
    """SD3's last block returns None for the text, so that diffusers keeps no residual, and never reuses; ours does."""
    model, config = zoo.build("sd3"), SeaCacheConfig(threshold=5.0, residual_order=0)
    theirs, ours = with_sea_cache("sd3", model, config)
    assert len(set(theirs.computed)) == 1
    assert len(set(ours.computed)) > 1


# --- TextKV


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """The projections of the prompt to keys and values."""
    ends = ("encoder_proj", "add_k_proj", "add_v_proj", "norm_added_k")
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_text_kv(guidance: Guidance) -> None:
    """The keys and values of a prompt are computed once; predictions are diffusers' and the bare model's."""
    config, model, more = TextKVCacheConfig(), zoo.build("nucleusmoe"), {"guidance": guidance}
    bare = sample("nucleusmoe", copy.deepcopy(model), TIMESTEPS, **more)
    theirs = run_theirs("nucleusmoe", model, text_kv_cache.apply_text_kv_cache, config, projections, **more)
    ours = run_ours("nucleusmoe", model, config, projections, **more)
    assert [True, *[False] * 13] == [bool(names) for names in ours.computed]
    for expected, diffusers, actual in zip(bare.outputs, theirs.outputs, ours.outputs, strict=True):
        assert torch.equal(expected, actual)
        assert torch.equal(diffusers, actual)
