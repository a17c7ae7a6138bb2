"""Policies of the settings of cache-dit 1.5.3, and of the engines and programs that have its DBCache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

from cachepolicy.language import ir
from cachepolicy.language.parser import parse
from cachepolicy.methods.settings import Conversion, Fields, inlined, using, written

_STATIC = """policy dbcache "DBCache"
source "github.com/vipshop/cache-dit"
param first: int = 8 in [1, inf)
param end: int = 1000
param order: int = 0 in [0, 4]
param steps_mask: string = "1"
match blocks[first:end] mask steps_mask -> predict taylor(order: order) of residual
"""

_WITHOUT_EFFECT = ("enable_separate_cfg", "num_inference_steps", "force_refresh_step_policy")
"""Fields that tell of the pipeline, which the engine finds out by itself, or that do nothing alone."""

_EXTRAS = {"l1_hidden_states_diff_threshold": (), "important_condition_threshold": (0,), "downsample_factor": (1,)}
"""Internal settings of the signal, with the values with which they do nothing."""

_ABOVE_ALL = 1e9
"""A threshold above all changes."""

_Runs = tuple[tuple[int, ...], tuple[int, ...]]

_BINS: dict[int, dict[str, _Runs]] = {
    28: {
        "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    },
    15: {
        "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
        "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
        "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
        "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
    },
    9: {
        "slow": ((5, 2, 1), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
    8: {
        "slow": ((5, 1, 1), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
    6: dict.fromkeys(("slow", "medium", "fast", "ultra"), ((3, 1), (2,))),
    4: dict.fromkeys(("slow", "medium", "fast", "ultra"), ((2, 1), (1,))),
}
"""Lengths of the runs of computed and of other steps of cache-dit's named masks, by the number of steps."""

NAMED = tuple(_BINS[28])
"""The names of cache-dit's masks."""


def named_mask(name: str, steps: int) -> str | None:
    """Returns one of cache-dit's masks by name for a number of steps, or None if cache-dit has none."""
    base = 28 if steps >= 16 else 15 if steps > 9 else steps
    if base not in _BINS:
        return None
    ones, zeros = map(list, _BINS[base][name])
    if steps > base:
        _lengthen(ones, zeros, steps)
    _shorten(ones, zeros, steps)
    mask = "".join("1" * one + "0" * zero for one, zero in zip_longest(ones, zeros, fillvalue=0))
    return mask[:-1] + "1"


def _lengthen(ones: list[int], zeros: list[int], steps: int) -> None:
    """Adds to the runs, one by one in their order, until they cover the steps."""
    bases = [(runs, tuple(runs)) for runs in (ones, zeros)]
    while True:
        for place in range(min(len(ones), len(zeros))):
            for runs, base in bases:
                runs[place] += max(int(base[place] * (steps / 28 * 0.5)), 1)
                if sum(ones) + sum(zeros) >= steps:
                    return
        ones[-1] += 1
        if sum(ones) + sum(zeros) >= steps:
            return


def _shorten(ones: list[int], zeros: list[int], steps: int) -> None:
    """Takes single steps away from the last runs, in turn, until as many are left."""
    while True:
        for runs in (zeros, ones):
            if sum(ones) + sum(zeros) <= steps:
                return
            if runs:
                runs[-1] -= 1
                if not runs[-1]:
                    runs.pop()


def dbcache(
    config: Fields, order: int, *, first: int = 8, warmup: int = 8, threshold: float = 0.08, both: bool = False
) -> ir.Policy:
    """Returns the policy of a DBCache setting under cache-dit's names of fields.

    Args:
        config: The setting.
        order: The order of the forecast of the residual; 0 reuses it.
        first: The default of `Fn_compute_blocks`.
        warmup: The default of `max_warmup_steps`.
        threshold: The default of `residual_diff_threshold`.
        both: Whether the warm-up holds beside a mask.
    """
    values = _span(config, first, warmup, threshold) | {
        "streak": config.limit("max_continuous_cached_steps"),
        "most": config.limit("max_cached_steps"),
        "order": order,
    }
    _rest(config)
    total = config.number("max_accumulated_residual_diff_threshold", 0)
    follows = bool(config.get("enable_separate_cfg")) and not config.switch("cfg_diff_compute_separate", default=True)
    if follows and config.switch("cfg_compute_first", default=False):
        config.refuse("cfg_compute_first", "the unconditional call would follow one that comes after it")
    mask = _mask(config)
    static = config.choice("steps_computation_policy", "dynamic", ("dynamic", "static")) == "static"
    if mask is None:
        return _dynamic(config, values, total, follows=follows)
    values["steps_mask"] = mask
    if not both:
        # cache-dit cuts the warm-up to the steps at the beginning that the mask computes anyway.
        values["warmup"] = 0
    if static:
        # Nothing but the mask decides.
        kept = ("first", "end", "order", "steps_mask")
        return written(_STATIC, {name: values[name] for name in kept if name in values})
    return _dynamic(config, values, total, follows=follows)


def _dynamic(config: Fields, values: Mapping[str, object], total: float, *, follows: bool) -> ir.Policy:
    """Returns the policy in which the change decides, with a bound of the sum of all changes if `total` is not 0."""
    if total > 0 and any(values.get(name) is not None for name in ("streak", "most", "steps_mask")):
        why = "cache-dit adds no change at a step at which another bound or the mask computes, and a rule adds all"
        config.refuse("max_accumulated_residual_diff_threshold", why)
    # All ones at the beginning of a mask compute, in a warm-up or not.
    interval = _pause(config) if values.get("steps_mask") is None and values["warmup"] else 1
    if total <= 0 and not follows and interval == 1:
        return using("dbcache", values, ("first", "threshold", "warmup"))
    text = f"param drift: float = 0\nmatch blocks while total(drift) - drift < {total} -> reuse"
    bound = parse(text).statements[-1]

    def change(rule: ir.Rule) -> ir.Rule:
        condition = rule.condition
        if total > 0 and condition is not None and isinstance(bound, ir.Rule) and bound.condition is not None:
            condition = ir.Both(operands=(condition, bound.condition))
        changed = rule.model_copy(update={"condition": condition, "follow": "cond" if follows else rule.follow})
        return _with_pauses(changed, interval)

    return inlined("dbcache", values, change)


def _span(config: Fields, first: int = 8, warmup: int = 8, threshold: float = 0.08) -> dict[str, object]:
    """Returns the params that DBCache and DBPrune share: the blocks that are reused, the threshold and the warm-up."""
    values: dict[str, object] = {"first": config.whole("Fn_compute_blocks", first, low=1)}
    if last := config.whole("Bn_compute_blocks", 0):
        values["end"] = -last
    return values | {
        "threshold": _threshold(config, threshold),
        "warmup": config.whole("max_warmup_steps", warmup),
    }


def _threshold(config: Fields, default: float) -> float:
    threshold = config.threshold("residual_diff_threshold", default, low=-math.inf)
    # From 1 on, cache-dit reuses without measuring.
    return _ABOVE_ALL if threshold >= 1 else threshold


def _pause(config: Fields) -> int:
    """Returns the interval of the steps of a warm-up that compute; the others of it are decided as later ones."""
    return config.whole("warmup_interval", 1, low=1)


def _with_pauses(rule: ir.Rule, interval: int) -> ir.Rule:
    """Returns the rule owning the steps of the warm-up that are no multiple of the interval."""
    text = f"param warmup: int = 0\nmatch blocks when step >= warmup or step % {interval} != 0 -> reuse"
    other = parse(text).statements[-1]
    when = other.when if isinstance(other, ir.Rule) else None
    return rule.model_copy(update={"when": when}) if interval > 1 else rule


def _rest(config: Fields) -> None:
    config.only("force_refresh_step_hint", why="a trajectory cannot begin anew at a step")
    config.ignore("cfg_compute_first", "cfg_diff_compute_separate", "warmup_interval", *_WITHOUT_EFFECT)
    for name, harmless in _EXTRAS.items():
        config.only(name, *harmless, why="it changes how the change is measured")


def _mask(config: Fields) -> str | None:
    mask = config.get("steps_computation_mask")
    if mask is None:
        return None
    if isinstance(mask, str) and mask in NAMED:
        steps = config.whole("num_inference_steps", 0)
        if steps == 0:
            config.refuse("steps_computation_mask", f"`{mask}` depends on `num_inference_steps`; give it")
        named = named_mask(mask, steps)
        if named is None:
            config.refuse("steps_computation_mask", f"cache-dit has no mask `{mask}` for {steps} steps")
        return named
    items = list(cast("Sequence[Any]", mask)) if isinstance(mask, str | list | tuple) else []
    letters = "".join(str(int(item)) if isinstance(item, bool) else str(item) for item in items)
    letters = letters.replace(",", "").replace(" ", "")
    if not letters or set(letters) - {"0", "1"}:
        config.refuse("steps_computation_mask", "it takes a 1 or a 0 for each step")
    return letters


def dbprune(config: Fields) -> ir.Policy:
    """Returns the policy of a DBPrune setting."""
    values = _span(config)
    for name in ("max_continuous_cached_steps", "max_cached_steps"):
        config.only(name, -1, why="cache-dit counts the steps of all blocks together, a rule those of each block")
    config.only("steps_computation_mask", why="the policy `dbprune` has no mask")
    config.only("enable_dynamic_prune_threshold", False, why="the threshold of a rule is a number")
    if config.number("max_accumulated_residual_diff_threshold", 0) > 0:
        config.refuse("max_accumulated_residual_diff_threshold", "cache-dit adds up the changes of all blocks together")
    if config.get("enable_separate_cfg") and not config.switch("cfg_diff_compute_separate", default=True):
        config.refuse("cfg_diff_compute_separate", "the rule of the policy decides for each branch")
    kept = _blocks(config)
    config.ignore("max_dynamic_prune_threshold", "dynamic_prune_threshold_relax_ratio", "force_reduce_calibrator_vram")
    config.ignore("steps_computation_policy")
    _rest(config)
    interval = _pause(config) if values["warmup"] else 1
    if interval > 1:
        policy = inlined("dbprune", values, lambda rule: _with_pauses(rule, interval))
    else:
        policy = using("dbprune", values, ("first", "threshold", "warmup"))
    if not kept:
        return policy
    rules = parse("".join(f"match optional each blocks[{block}:{block + 1}] -> compute\n" for block in kept))
    return policy.model_copy(update={"statements": (*rules.statements, *policy.statements)})


def _blocks(config: Fields) -> list[int]:
    """Returns the numbers of the blocks that DBPrune always computes."""
    value = config.get("non_prune_block_ids", [])
    blocks = list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else list[Any]([None])
    if not all(isinstance(block, int) and not isinstance(block, bool) and 0 <= block < 10**6 for block in blocks):
        config.refuse("non_prune_block_ids", "it takes a list of numbers of blocks, from 0")
    return sorted(set(blocks))


@dataclass(frozen=True)
class _Calibrator:
    """A TaylorSeer calibrator.

    Attributes:
        order: The order of the forecast; 0 where it is off.
        without: The field that keeps the second stream of the blocks from being forecast, if it is not.
    """

    order: int = 0
    without: str | None = None


def _calibrator(setting: Fields, *, enabled: str, encoder: str, cache_type: str) -> _Calibrator:
    on = setting.switch(enabled, default=False)
    both = setting.switch(encoder, default=False)
    order = setting.whole("taylorseer_order", 1)
    setting.only(cache_type, "residual", why="the residual of the blocks is forecast")
    if both and not on:
        setting.refuse(encoder, f"no second stream is forecast without the first one, `{enabled}`")
    return _Calibrator(order, None if both else encoder) if on else _Calibrator()


def of_objects(config: Any, calibrator: Any = None) -> Conversion:
    """Returns the policy of cache-dit's config objects.

    Args:
        config: A `DBCacheConfig`, `DBPruneConfig` or `BasicCacheConfig`, or a `ParamsModifier` with one.
        calibrator: A config of a calibrator, or None.

    Raises:
        PolicyError: A field has a wrong value (E161, E162), or no policy expresses it (E168).
    """
    overrides = getattr(config, "_context_kwargs", None)
    if isinstance(overrides, Mapping):
        # A `ParamsModifier` holds the configs.
        held = cast("Mapping[str, Any]", overrides)
        setting = Fields("`ParamsModifier`", held)
        config, calibrator = setting.get("cache_config"), setting.get("calibrator_config", calibrator)
        setting.finish()
        if config is None:
            setting.refuse("cache_config", "it has no config of a cache")
    setting = Fields.of(config, type(config).__name__)
    return _finished(setting, _Calibrator() if calibrator is None else _of_object(calibrator))


def _of_object(calibrator: Any) -> _Calibrator:
    setting = Fields.of(calibrator, type(calibrator).__name__)
    setting.only("calibrator_type", "taylorseer", why="of cache-dit's calibrators, TaylorSeer alone is expressed")
    setting.ignore("calibrator_kwargs")
    found = _calibrator(
        setting,
        enabled="enable_calibrator",
        encoder="enable_encoder_calibrator",
        cache_type="calibrator_cache_type",
    )
    setting.finish()
    return found


_ONE_STREAM = ("cache-dit forecasts the first stream of the blocks alone; no block after them reads the other one.",)


def _finished(setting: Fields, calibrator: _Calibrator) -> Conversion:
    kind = str(setting.get("cache_type", "DBCache"))
    if kind == "DBPrune":
        if calibrator.order:
            setting.refuse("cache_type", "the policy `dbprune` reuses residuals, and forecasts none")
        policy = dbprune(setting)
    elif kind == "DBCache":
        policy = dbcache(setting, calibrator.order)
    else:
        setting.refuse("cache_type", "it is `DBCache` or `DBPrune`")
    if calibrator.without is not None and setting.whole("Bn_compute_blocks", 0):
        setting.refuse(calibrator.without, "all streams of a block are forecast, and the last blocks read them")
    setting.finish()
    return Conversion(policy, () if calibrator.without is None else _ONE_STREAM)


_BESIDE = ("parallelism_config", "attention_backend", "quantize_config")
"""Sections of cache-dit's files that do not concern caching."""


def of_mapping(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of a mapping in the form of cache-dit's YAML files, nested or flat.

    Raises:
        PolicyError: A field has a wrong value (E161, E162), or no policy expresses it (E168).
    """
    inner = values.get("cache_config")
    if isinstance(inner, Mapping):
        outer = Fields("the cache-dit file", values)
        outer.ignore("cache_config", *_BESIDE)
        outer.finish()
        values = cast("Mapping[str, Any]", inner)
    setting = Fields("the cache-dit setting", values)
    for name in ("enable_dmd", "enable_foca", "enable_encoder_dmd", "enable_encoder_foca"):
        setting.only(name, False, why="of cache-dit's calibrators, TaylorSeer alone is expressed")
    calibrator = _calibrator(
        setting,
        enabled="enable_taylorseer",
        encoder="enable_encoder_taylorseer",
        cache_type="taylorseer_cache_type",
    )
    return _finished(setting, calibrator)


KEYS = frozenset({"Fn_compute_blocks", "Bn_compute_blocks", "residual_diff_threshold", "max_warmup_steps"})
"""Keys by which a flat setting of cache-dit is recognised."""
