"""Policies of diffusers' configs that have no counterpart under their own name: TaylorSeer, MagCache and SeaCache."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from cachepolicy.methods.settings import Conversion, Fields, using, written

_ATTENTION = (
    "^blocks.*attn$",
    "^transformer_blocks.*attn$",
    "^single_transformer_blocks.*attn$",
    "^temporal_transformer_blocks.*attn$",
)
"""diffusers' default identifiers, which are matched with the whole name of a module."""

_NAMED_MODULES = """policy taylorseer "TaylorSeer"
source "arXiv:2503.06923"
param names: list = [""]
param interval: int = 5
param first: int = 3
param last: float = inf
param order: int = 1 in [0, 8]
match names when step < first -> compute
match names when step >= last -> compute
match names every interval offset first + 1 -> predict taylor(order: order)
"""

_LITE = """policy taylorseer_lite "TaylorSeer-Lite"
source "arXiv:2503.06923"
param interval: int = 5
param first: int = 3
param last: float = inf
param order: int = 1 in [0, 8]
match blocks when first <= step < last every interval offset first + 1 -> reuse residual
match "^proj_out$" when step < first -> compute
match "^proj_out$" when step >= last -> compute
match "^proj_out$" every interval offset first + 1 -> predict taylor(order: order)
"""


def _taylorseer(config: Fields) -> Conversion:
    last = config.get("disable_cache_after_step")
    values: dict[str, object] = {
        "interval": config.whole("cache_interval", 5, low=1),
        "first": config.whole("disable_cache_before_step", 3),
        "last": float("inf") if last is None else config.whole("disable_cache_after_step", 0),
        "order": config.whole("max_order", 1),
    }
    notes = _precision(config)
    names = config.texts("cache_identifiers")
    if config.switch("use_lite_mode", default=False):
        # diffusers ignores both lists of identifiers in this mode, and warns.
        config.ignore("skip_predict_identifiers")
        return Conversion(written(_LITE, values), notes)
    if config.texts("skip_predict_identifiers"):
        config.refuse("skip_predict_identifiers", "no action answers with zeros; `use_lite_mode` is expressed")
    if names:
        return Conversion(written(_NAMED_MODULES, {"names": [f"^(?:{name})$" for name in names], **values}), notes)
    shown = ("interval", "first", "order")
    return Conversion(using("taylorseer", {**values, "diffusers": True, "names": list(_ATTENTION)}, shown), notes)


def _precision(config: Fields) -> tuple[str, ...]:
    dtype = str(config.get("taylor_factors_dtype", "")).removeprefix("torch.")
    if not dtype:
        return ()
    return (f"diffusers rounds the differences to {dtype}; here they have the dtype of the modules' outputs.",)


def _magcache(config: Fields) -> Conversion:
    if config.switch("calibrate", default=False):
        config.refuse("calibrate", "`cachepolicy calibrate` measures a model's ratios")
    steps = config.whole("num_inference_steps", 28, low=1)
    values = {
        "threshold": config.number("threshold", 0.06, low=0),
        "skips": config.most("max_skip_steps", 3),
        "retention": config.number("retention_ratio", 0.2, low=0, high=1),
        "ratios": [_shortest(ratio) for ratio in config.numbers("mag_ratios")],
    }
    return Conversion(using("magcache", values, tuple(values)), (f"The setting is for {steps} steps.",), steps)


def _shortest(number: float) -> float:
    """Returns the shortest decimal number that has the same value in single precision, which diffusers stores."""
    import struct

    single = struct.pack("f", number)
    return next(
        (
            short
            for digits in range(1, 10)
            if struct.pack("f", short := float(Decimal(format(number, f".{digits}g")))) == single
        ),
        number,
    )


_SEACACHE = """policy seacache "SeaCache"
source "arXiv:2602.18993"
param threshold: float = 0.25 in [0, inf)
param order: int = 1 in [0, 1]
param first: int = 1
param last: int = 1
param streak: int? = off in [1, inf)
param beta: float = 3
signal filtered = wiener(input(model), beta: beta)
signal change = relative_l1(filtered, prev(filtered))
match blocks when first <= step < steps - last while sum(change) < threshold
  at most streak in a row -> predict taylor(order: order) of residual
"""
"""diffusers filters the latents, not the modulated input of the first block."""


def seacache(config: Fields) -> Conversion:
    """Returns the rules of a SeaCache setting under diffusers' names of fields."""
    config.only("raw_vision_callback", why="the latents are those that the model is called with")
    values = {
        "threshold": config.number("threshold", 0.25, low=0),
        "order": config.whole("residual_order", 1),
        "first": config.whole("retention_steps", 1),
        "last": config.whole("cache_end_steps", 1),
        "streak": config.whole("max_consecutive_cached", 2) or None,
        "beta": config.number("power_exp", 3.0, low=0),
    }
    return Conversion(written(_SEACACHE, values))


def _text_kv(_config: Fields) -> Conversion:
    return Conversion(using("textkv", {}))


_CONVERSIONS: dict[str, Callable[[Fields], Conversion]] = {
    "TaylorSeerCacheConfig": _taylorseer,
    "MagCacheConfig": _magcache,
    "SeaCacheConfig": seacache,
    "TextKVCacheConfig": _text_kv,
}

NAMES = tuple(_CONVERSIONS)
"""Names of the classes of diffusers that `of_diffusers` knows."""


def of_diffusers(name: str, config: Any) -> Conversion | None:
    """Returns the policy of diffusers' config of a class, or None for other classes.

    Args:
        name: The name of the class.
        config: The config.

    Raises:
        PolicyError: A field has a wrong value (E161, E162), or no policy expresses it (E168).
    """
    convert = _CONVERSIONS.get(name)
    if convert is None:
        return None
    known = Fields.of(config, name)
    conversion = convert(known)
    known.finish()
    return conversion
