"""diffusers' cache configs. Each validates its fields and corresponds to a shipped policy with its params set.

Names, fields, defaults and their order are those of diffusers 0.42.1. Neither torch nor diffusers is imported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Annotated, Any, Protocol, cast, runtime_checkable

from pydantic import ConfigDict, PlainValidator, ValidationInfo
from pydantic.dataclasses import dataclass

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.params import typed
from cachepolicy.language.patterns import searcher
from cachepolicy.language.traversal import transform
from cachepolicy.methods.of_diffusers import NAMES, of_diffusers
from cachepolicy.methods.settings import params, shipped, using

TENSOR_FORMATS = ("BCFHW", "BFCHW", "BCHW", "BSC")
"""Layouts of a prediction: the three of diffusers, and token sequences."""


# --- validators of fields -------------------------------------------------------------------------------


def _wrong(
    info: ValidationInfo, takes: str, value: object, *, code: str = "E161", help: str | None = None
) -> PolicyError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:59] + "…"
    return PolicyError.of(code, f"`{info.field_name}` takes {takes}, not `{shown}`", help=help)


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _items(value: Any) -> tuple[Any, ...] | None:
    """Return the items of a tuple or list, or None for other values."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list | tuple) else None


def _interval(value: Any, info: ValidationInfo) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise _wrong(info, "a whole number from 1, or None", value)
    return int(value)


def _window(value: Any, info: ValidationInfo) -> tuple[float, float]:
    pair = _items(value)
    if pair is None or len(pair) != 2 or not all(map(_number, pair)):
        raise _wrong(info, "two numbers `(low, high)`", value)
    if not pair[0] < pair[1]:
        raise _wrong(info, "`(low, high)` with the lower timestep first", value, code="E162")
    return pair[0], pair[1]


def _texts(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    texts = _items(value)
    if texts is None or not all(isinstance(text, str) for text in texts):
        help = f"write `({value!r},)`" if isinstance(value, str) else None
        raise _wrong(info, "a tuple of strings", value, help=help)
    return texts


def _regexes(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    texts = _texts(value, info)
    for text in texts:
        try:
            searcher(text)
        except ValueError as error:
            message = f"`{info.field_name}` holds the regex `{text}`, which RE2 refuses: {error}"
            raise PolicyError.of("E164", message, help="RE2 has no lookaround and no backreferences") from error
    return texts


def _amount(value: Any, info: ValidationInfo) -> float:
    if not _number(value) or value < 0:
        raise _wrong(info, "a finite number from 0", value)
    return value


def _function(value: Any, info: ValidationInfo) -> Any:
    if value is not None and not callable(value):
        raise _wrong(info, "a function, or None", value)
    return value


def _format(value: Any, info: ValidationInfo) -> str:
    if value not in TENSOR_FORMATS:
        raise _wrong(info, " or ".join(f'"{tensor_format}"' for tensor_format in TENSOR_FORMATS), value, code="E162")
    return value


def _switch(value: Any, info: ValidationInfo) -> bool:
    if not isinstance(value, bool):
        raise _wrong(info, "True or False", value)
    return value


SkipInterval = Annotated[int | None, PlainValidator(_interval)]
Window = Annotated[tuple[float, float], PlainValidator(_window)]
Texts = Annotated[tuple[str, ...] | list[str], PlainValidator(_texts)]
Regexes = Annotated[tuple[str, ...] | list[str], PlainValidator(_regexes)]
Amount = Annotated[float, PlainValidator(_amount)]
TimestepCallback = Annotated[Callable[[], Any] | None, PlainValidator(_function)]
WeightCallback = Annotated[Callable[[Any], float] | None, PlainValidator(_function)]
Format = Annotated[str, PlainValidator(_format)]
Switch = Annotated[bool, PlainValidator(_switch)]

_STRICT = ConfigDict(extra="forbid", validate_assignment=True)


# --- the configs -----------------------------------------------------------------------------------------


@runtime_checkable
class CacheConfig(Protocol):
    """An object that provides a policy together with arguments of `apply`."""

    def policy(self) -> ir.Policy:
        """Return the policy, which expresses all fields except the callbacks."""
        ...

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `apply` that belong to the policy."""
        ...


@dataclass(config=_STRICT)
class PyramidAttentionBroadcastConfig:
    """Pyramid Attention Broadcast (arXiv:2408.12588), as the policy `pab`.

    A skip range N computes at every Nth step and reuses in between, while the timestep is strictly inside the range of
    the kind. None switches the kind off. If all three are None, spatial attention gets 2, with a warning. Without
    `current_timestep_callback`, the clock reads the pipeline's scheduler or the timestep argument of the model.

    Raises:
        PolicyError: A field has an invalid value. The message names it.
    """

    spatial_attention_block_skip_range: SkipInterval = None
    temporal_attention_block_skip_range: SkipInterval = None
    cross_attention_block_skip_range: SkipInterval = None
    spatial_attention_timestep_skip_range: Window = (100, 800)
    temporal_attention_timestep_skip_range: Window = (100, 800)
    cross_attention_timestep_skip_range: Window = (100, 800)
    spatial_attention_block_identifiers: Regexes = (
        "blocks",
        "transformer_blocks",
        "single_transformer_blocks",
        "layers",
        "visual_transformer_blocks",
    )
    temporal_attention_block_identifiers: Regexes = ("temporal_transformer_blocks",)
    cross_attention_block_identifiers: Regexes = ("blocks", "transformer_blocks", "layers")
    current_timestep_callback: TimestepCallback = None

    def policy(self) -> ir.Policy:
        """Return `pab` with its params set."""
        spatial = self.spatial_attention_block_skip_range
        if (
            spatial is None
            and self.temporal_attention_block_skip_range is None
            and self.cross_attention_block_skip_range is None
        ):
            warnings.warn(
                "no kind of attention has a skip range, so `spatial_attention_block_skip_range` is taken as 2",
                UserWarning,
                stacklevel=2,
            )
            spatial = 2
        return using(
            "pab",
            {
                "spatial_every": spatial,
                "temporal_every": self.temporal_attention_block_skip_range,
                "cross_every": self.cross_attention_block_skip_range,
                "spatial_range": self.spatial_attention_timestep_skip_range,
                "temporal_range": self.temporal_attention_timestep_skip_range,
                "cross_range": self.cross_attention_timestep_skip_range,
                "spatial_names": self.spatial_attention_block_identifiers,
                "temporal_names": self.temporal_attention_block_identifiers,
                "cross_names": self.cross_attention_block_identifiers,
            },
            shown=("spatial_every", "temporal_every", "cross_every"),
        )

    def arguments(self) -> dict[str, Any]:
        """Return `timestep` if a callback is given."""
        return _timestep(self.current_timestep_callback)


@dataclass(config=_STRICT)
class FasterCacheConfig:
    """FasterCache (arXiv:2410.19355) in diffusers' variant, as the policy `fastercache` with `feedback = true`.

    Timestep ranges exclude their ends, and skip ranges are as in `PyramidAttentionBroadcastConfig`; None switches a
    part off. `attention_weight_callback` is called with the module once per answer, the frequency callbacks with the
    model once per rebuilt step. Without them, the weight is 0.5 and the bands grow by alpha within their ranges. With
    the default list of batched inputs, batched inputs are detected by their size. Any other list is used as given.

    Raises:
        PolicyError: A field has an invalid value. The message names it.
    """

    spatial_attention_block_skip_range: SkipInterval = 2
    temporal_attention_block_skip_range: SkipInterval = None
    spatial_attention_timestep_skip_range: Window = (-1, 681)
    temporal_attention_timestep_skip_range: Window = (-1, 681)
    low_frequency_weight_update_timestep_range: Window = (99, 901)
    high_frequency_weight_update_timestep_range: Window = (-1, 301)
    alpha_low_frequency: Amount = 1.1
    alpha_high_frequency: Amount = 1.1
    unconditional_batch_skip_range: SkipInterval = 5
    unconditional_batch_timestep_skip_range: Window = (-1, 641)
    spatial_attention_block_identifiers: Regexes = (
        "^blocks.*attn",
        "^transformer_blocks.*attn",
        "^single_transformer_blocks.*attn",
    )
    temporal_attention_block_identifiers: Regexes = ("^temporal_transformer_blocks.*attn",)
    attention_weight_callback: WeightCallback = None
    low_frequency_weight_callback: WeightCallback = None
    high_frequency_weight_callback: WeightCallback = None
    tensor_format: Format = "BCFHW"
    is_guidance_distilled: Switch = False
    current_timestep_callback: TimestepCallback = None
    _unconditional_conditional_input_kwargs_identifiers: Texts = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "attention_mask",
        "encoder_attention_mask",
    )

    def policy(self) -> ir.Policy:
        """Return `fastercache` with its params set, or its rules with externals in place of weights with callbacks."""
        spatial = self.spatial_attention_block_skip_range
        inputs = self._unconditional_conditional_input_kwargs_identifiers
        values = {
            "spatial_every": spatial,
            "temporal_every": self.temporal_attention_block_skip_range,
            "uncond_every": self.unconditional_batch_skip_range,
            "spatial_range": self.spatial_attention_timestep_skip_range,
            "temporal_range": self.temporal_attention_timestep_skip_range,
            "uncond_range": self.unconditional_batch_timestep_skip_range,
            "low": self.alpha_low_frequency,
            "high": self.alpha_high_frequency,
            "low_range": self.low_frequency_weight_update_timestep_range,
            "high_range": self.high_frequency_weight_update_timestep_range,
            "feedback": True,
            # A kind that is off selects no module, so that the other kind can select all of its own.
            "spatial_names": () if spatial is None else self.spatial_attention_block_identifiers,
            "temporal_names": self.temporal_attention_block_identifiers,
            "format": self.tensor_format,
            "inputs": () if tuple(inputs) == _DEFAULT_INPUTS else inputs,
            "distilled": self.is_guidance_distilled,
        }
        externals = {label: name for name, label in _ASKED.items() if getattr(self, f"{name}_callback") is not None}
        if externals:
            return _asking("fastercache", values, externals)
        return using("fastercache", values, shown=("spatial_every", "temporal_every", "uncond_every", "feedback"))

    def arguments(self) -> dict[str, Any]:
        """Return `guidance` (whether batches contain both halves), and `timestep` and externals for given callbacks."""
        asked = {name: getattr(self, f"{name}_callback") for name in _ASKED}
        return (
            _timestep(self.current_timestep_callback)
            | {name: WeightSupplier(function) for name, function in asked.items() if function is not None}
            | {"guidance": not self.is_guidance_distilled}
        )


@dataclass(config=_STRICT)
class FirstBlockCacheConfig:
    """First Block Cache, as the policy `fbc`.

    All blocks except the first are reused while the relative change of the first block's residual is at most
    `threshold`.

    Raises:
        PolicyError: The threshold is not a finite number from 0.
    """

    threshold: Amount = 0.05

    def policy(self) -> ir.Policy:
        """Return `fbc` with its threshold set."""
        return using("fbc", {"threshold": self.threshold}, shown=("threshold",))

    def arguments(self) -> dict[str, Any]:
        """Return no arguments, because the policy expresses the threshold."""
        return {}


_ASKED = {"attention_weight": "weight", "low_frequency_weight": "low", "high_frequency_weight": "high"}
"""The externals for FasterCache's callbacks, and the action arguments that they supply."""

_DEFAULT_INPUTS: tuple[str, ...] = next(item.default for item in fields(FasterCacheConfig) if item.name.startswith("_"))  # pyright: ignore[reportArgumentType, reportAssignmentType]


class WeightSupplier:
    """Supplies an external from a callback that takes the answered module."""

    takes_module = True

    def __init__(self, function: Callable[[Any], float]) -> None:
        self._function = function

    def __call__(self, module: Any = None) -> float:
        """Return the number for a module."""
        return float(self._function(module))


def _timestep(callback: Callable[[], Any] | None) -> dict[str, Any]:
    return {} if callback is None else {"timestep": callback}


# --- conversion to policies -----------------------------------------------------------------------------------------


def _asking(name: str, values: Mapping[str, object], externals: Mapping[str, str]) -> ir.Policy:
    """Return the rules of the shipped policy with `values` as defaults, and externals for some action arguments."""

    def rewrite(node: ir.Node) -> ir.Node:
        if isinstance(node, ir.Argument) and node.label in externals:
            return ir.Argument(label=node.label, value=ir.Name(name=externals[node.label]))
        return node

    known = params(shipped(name))
    constants = {param: typed(known[param], value) for param, value in values.items()}
    replaced = {param for label in externals for param in (label, f"{label}_range")}
    statements: list[Any] = [ir.External(name=external) for external in externals.values()]
    for statement in shipped(name).statements:
        match statement:
            case ir.Param() if statement.name not in replaced:
                statements.append(
                    statement.model_copy(update={"default": constants.get(statement.name, statement.default)})
                )
            case ir.Rule():
                statements.append(transform(statement, rewrite))
            case _:
                pass
    policy = shipped(name)
    return ir.Policy(name=policy.name, title=policy.title, source=policy.source, statements=tuple(statements))


# --- configs of diffusers ------------------------------------------------------------------------------------

_CONFIGS: dict[str, Any] = {
    config_class.__name__: config_class
    for config_class in (PyramidAttentionBroadcastConfig, FasterCacheConfig, FirstBlockCacheConfig)
}


def config_of(config: object) -> CacheConfig | None:
    """Return a config of this package for `config`, which may be diffusers' own config, or None for other objects.

    Raises:
        PolicyError: It is diffusers' config for another cache (E150), one of its fields has an invalid value, or no
            policy expresses a field (E168).
    """
    if isinstance(config, CacheConfig):
        return config
    for cls in type(config).__mro__:
        if not cls.__module__.startswith("diffusers.hooks."):
            continue
        own = _CONFIGS.get(cls.__name__)
        if own is not None:
            return own(**{field.name: getattr(config, field.name) for field in fields(own)})
        conversion = of_diffusers(cls.__name__, config)
        if conversion is not None:
            return conversion
        if cls.__name__.endswith("Config"):
            known = ", ".join(f"`{name}`" for name in (*_CONFIGS, *NAMES))
            raise PolicyError.of("E150", f"`{cls.__name__}` is no policy here", help=f"known are {known}")
    return None
