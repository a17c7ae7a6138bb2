"""Presets: which of a policy's `preset` statements fit a model, and what they set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from cachepolicy.errors import Diagnostic, PolicyError, suggestion
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.formatter import format_node
from cachepolicy.language.patterns import searcher

Entry = Annotated[int | float | bool | str, Field(union_mode="smart")]
ShortText = Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What presets ask of a model.

    Attributes:
        class_name: The class of the model.
        width: Number of channels of the block stream; None if it is not known.
        depth: Number of blocks that `blocks` takes.
        config: The entries of the model's configuration that are numbers, booleans and strings.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    class_name: ShortText
    width: int | None = None
    depth: int = 0
    config: Annotated[tuple[tuple[ShortText, Entry], ...], Field(max_length=2000)] = ()


def fits(preset: ir.Preset, model: ModelFacts) -> bool:
    """Returns whether a preset is for a model. A condition that reads a missing entry does not hold."""
    if not searcher(preset.for_class)(model.class_name):
        return False
    if preset.when is None:
        return True
    names = {**dict(model.config), "width": model.width, "depth": model.depth}
    try:
        return evaluate(preset.when, Environment(names)) is True
    except (Undefined, TypeError):
        return False


def by_name(preset: ir.Preset, model: ModelFacts) -> bool:
    """Returns whether a preset is for models of this class, but has to be chosen by name: its condition is `false`."""
    return (
        isinstance(preset.when, ir.Boolean)
        and not preset.when.value
        and bool(searcher(preset.for_class)(model.class_name))
    )


def short_text(value: ir.Expression) -> str:
    """Returns the text of a value; of a list with more than eight items, its ends and its length."""
    if isinstance(value, ir.ListOf) and len(value.items) > 8:
        first, last = format_node(value.items[0]), format_node(value.items[-1])
        return f"[{first}, ..., {last}] of {len(value.items)}"
    return format_node(value)


def choose(
    presets: Sequence[ir.Preset], model: ModelFacts | None, chosen: str | None, given: Mapping[str, object]
) -> tuple[str | None, dict[str, ir.Expression]]:
    """Returns the name of the preset that applies, and the values that it sets.

    Args:
        presets: The presets of a policy.
        model: The model. Without one, the first preset stands for any.
        chosen: The name of the preset that the caller chose.
        given: The parameters that the caller sets. They are left out of the values.

    Raises:
        PolicyError: There is no preset with this name, or several fit and set what is not given (E167).
    """
    if chosen is not None:
        fitting = [preset for preset in presets if preset.name == chosen]
        if not fitting:
            names = [preset.name for preset in presets]
            help = suggestion(chosen, names) if names else "the policy has no presets"
            raise PolicyError.of("E167", f"the policy has no preset `{chosen}`", help=help)
    elif model is None:
        fitting = list(presets[:1])
    else:
        fitting = [preset for preset in presets if fits(preset, model)]
    values = [
        {setting.name: setting.value for setting in preset.settings if setting.name not in given} for preset in fitting
    ]
    if len(fitting) > 1 and any(values):
        named = ", ".join(f"`{preset.name}`" for preset in fitting)
        where = f" `{model.class_name}`" if model is not None else ""
        raise PolicyError.of("E167", f"several presets fit{where}: {named}", help='choose one: `preset="..."`')
    return (fitting[0].name, values[0]) if len(fitting) == 1 else (None, {})


def missing(params: Sequence[ir.Param], presets: Sequence[ir.Preset], model: ModelFacts | None) -> Diagnostic:
    """Returns the diagnostic for parameters that have no value (E166)."""
    names = " and ".join(f"`{param.name}`" for param in params)
    verb = "has" if len(params) == 1 else "have"
    if not presets:
        return Diagnostic("E166", f"{names} {verb} no value", span=params[0].span, help=f"pass `{params[0].name}=`")
    of = f" of `{model.class_name}`" if model is not None else ""
    known = "; ".join(format_node(preset).partition(" with ")[0].removeprefix("preset ") for preset in presets[:20])
    message = f"{names} {verb} no value, and no preset fits the model{of}"
    help = f'pass `{params[0].name}=`, or choose by `preset="..."`; the presets are: {known}'
    return Diagnostic("E166", message, span=params[0].span, help=help)
