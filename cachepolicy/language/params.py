"""Converts parameter values from Python or text, and checks them against type and domain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import assert_never, cast

from cachepolicy.errors import Diagnostic, PolicyError, Span, suggestion
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined, constant

LIST_LIMIT = 100_000
"""Maximum number of items of a list parameter. No run has as many steps, and no model as many modules."""


def settled(
    params: Sequence[ir.Param], settings: Mapping[str, object], spans: Mapping[str, Span | None] | None = None
) -> dict[str, ir.Expression]:
    """Determines the constant of each parameter: its setting, or else its default.

    Args:
        params: The parameters of a policy.
        settings: The settings by name: Python values (`None` for `off`, a tuple `(low, high)` for an open range) or
            expressions.
        spans: The span of each setting that stands in a text.

    Returns:
        The constant of each parameter that has a setting or a default.

    Raises:
        PolicyError: A parameter does not exist (E160), a value has another type (E161) or is outside the domain (E162).
            The exception holds all such faults.
    """
    known, spans = {param.name: param for param in params}, spans or {}
    findings = [replace(_unknown(name, list(known)), span=spans.get(name)) for name in settings if name not in known]
    values = dict[str, ir.Expression]()
    for name, param in known.items():
        if name not in settings and param.default is None:
            continue
        try:
            values[name] = typed(param, settings.get(name, param.default))
        except PolicyError as error:
            findings += [replace(finding, span=spans.get(name)) for finding in error.diagnostics]
    if findings:
        raise PolicyError(findings)
    return values


def _unknown(name: str, known: list[str]) -> Diagnostic:
    help = suggestion(name, known) if known else "the policy has no parameters"
    return Diagnostic("E160", f"the policy has no parameter `{name}`", help=help)


def typed(param: ir.Param, setting: object) -> ir.Expression:
    """Converts a setting to a constant of the parameter's type.

    Args:
        param: The parameter.
        setting: A Python value or an expression.

    Returns:
        The constant.

    Raises:
        PolicyError: The setting has another type (E161) or is outside the domain (E162).
    """
    if setting is None or isinstance(setting, ir.Off):
        if param.optional:
            return ir.Off()
        raise _mistyped(param, setting, f"only a `{param.type}?` can be off")
    match param.type:
        case "int":
            value: ir.Expression = ir.Number(value=_whole(param, setting))
        case "float":
            value = ir.Number(value=float(_real(param, setting)))
        case "bool":
            value = ir.Boolean(value=_boolean(param, setting))
        case "string":
            value = ir.Text(value=_string(param, setting))
        case "range":
            value = _range(param, setting)
        case "list":
            value = _list(param, setting)
        case _:
            assert_never(param.type)
    _within(param, value)
    return value


def _mistyped(param: ir.Param, setting: object, help: str | None = None) -> PolicyError:
    shown = "off" if setting is None or isinstance(setting, ir.Off) else _shown(setting)
    if help is None and isinstance(setting, str | ir.Text) and param.type != "string":
        text = setting if isinstance(setting, str) else setting.value
        if re.fullmatch(r"-?[0-9.]+|true|false|off|[\[(].*[\])]", text, re.IGNORECASE):
            help = f"write `{text}` without quotes"
    return PolicyError.of("E161", f"`{param.name}` takes {_ARTICLE[param.type]}, not `{shown}`", help=help)


_ARTICLE = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "range": "a range",
    "list": "a list",
}


def _shown(setting: object) -> str:
    if isinstance(setting, ir.Node):
        try:
            setting = constant(setting)  # pyright: ignore[reportArgumentType]
        except Undefined:
            setting = setting.name if isinstance(setting, ir.Name) else type(setting).__name__.lower()
    text = f'"{setting}"' if isinstance(setting, str) else repr(setting)
    return text if len(text) <= 60 else text[:59] + "…"


def _plain(setting: object) -> object:
    """Converts a constant expression to its Python value. Other values are returned unchanged."""
    if isinstance(setting, ir.Number | ir.Boolean | ir.Text):
        return setting.value
    if isinstance(setting, ir.Negative | ir.Arithmetic):
        try:
            return constant(setting)
        except Undefined:
            return setting
    return setting


def _whole(param: ir.Param, setting: object) -> int:
    value = _plain(setting)
    if isinstance(value, bool) or not isinstance(value, Integral):
        whole = isinstance(value, float) and value.is_integer()
        raise _mistyped(param, setting, f"write `{int(value)}`" if whole else None)  # pyright: ignore[reportArgumentType]
    return int(value)


def _real(param: ir.Param, setting: object) -> float:
    value = _plain(setting)
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise _mistyped(param, setting)
    return float(value) if not isinstance(value, Integral) else int(value)


def _boolean(param: ir.Param, setting: object) -> bool:
    value = _plain(setting)
    if not isinstance(value, bool):
        raise _mistyped(param, setting)
    return value


def _string(param: ir.Param, setting: object) -> str:
    value = setting.name if isinstance(setting, ir.Name) else _plain(setting)
    if not isinstance(value, str):
        raise _mistyped(param, setting)
    return value


def _range(param: ir.Param, setting: object) -> ir.Interval:
    """Converts a setting to an interval. A tuple is open, as in diffusers' PAB; `[a, b]` in a text is closed."""
    if isinstance(setting, ir.Interval):
        low, high = setting.low, setting.high
        closed = setting.low_closed, setting.high_closed
    elif isinstance(setting, ir.ListOf) and len(setting.items) == 2:
        (low, high), closed = setting.items, (True, True)
    elif isinstance(setting, tuple) and len(pair := cast("tuple[object, ...]", setting)) == 2:
        (low, high), closed = pair, (False, False)
    else:
        raise _mistyped(param, cast("object", setting), "write the tuple `(low, high)`; both ends stay outside")
    first, last = _real(param, low), _real(param, high)
    if first > last or (first == last and closed != (True, True)):
        raise PolicyError.of("E162", f"the range of `{param.name}` is empty: {first} to {last}")
    return ir.Interval(
        low=ir.Number(value=first), high=ir.Number(value=last), low_closed=closed[0], high_closed=closed[1]
    )


def _list(param: ir.Param, setting: object) -> ir.ListOf:
    items: Sequence[object]
    if isinstance(setting, ir.ListOf | ir.SetOf):
        items = setting.items
    elif isinstance(setting, list | tuple | range):
        items = cast("Sequence[object]", setting)
    else:
        help = f'write `["{setting}"]`' if isinstance(setting, str) and len(setting) < 60 else None
        raise _mistyped(param, setting, help)
    if len(items) > LIST_LIMIT:
        raise PolicyError.of("E162", f"the list `{param.name}` has {len(items)} items; at most {LIST_LIMIT} are taken")
    return ir.ListOf(items=tuple(_item(param, item) for item in items))


def _item(param: ir.Param, setting: object) -> ir.Expression:
    value = _plain(setting)
    match value:
        case bool():
            return ir.Boolean(value=value)
        case str():
            return ir.Text(value=value)
        case Integral():
            return ir.Number(value=int(value))
        case Real() if not math.isnan(value):
            return ir.Number(value=float(value))
        case _:
            raise _mistyped(param, setting, "a list holds numbers, strings or booleans")


# --- domains ---------------------------------------------------------------------------------------------


def _within(param: ir.Param, value: ir.Expression) -> None:
    """Checks a number or string, the items of a list, or both ends of a range against the domain."""
    if param.domain is None:
        return
    match value:
        case ir.ListOf():
            parts: tuple[ir.Expression, ...] = value.items
        case ir.Interval():
            parts = (value.low, value.high)
        case _:
            parts = (value,)
    for part in parts:
        if not _contains(param.domain, part):
            shown = _shown(part)
            raise PolicyError.of("E162", f"`{param.name}` is {shown}, outside its domain {_domain(param.domain)}")


def _contains(domain: ir.Interval | ir.SetOf, value: ir.Expression) -> bool:
    number = constant(value)
    if isinstance(domain, ir.SetOf):
        return any(number == constant(item) for item in domain.items)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return constant(ir.Membership(value=value, container=domain)) is True


def _domain(domain: ir.Interval | ir.SetOf) -> str:
    if isinstance(domain, ir.SetOf):
        return "{" + ", ".join(_shown(item) for item in domain.items) + "}"
    left, right = "[" if domain.low_closed else "(", "]" if domain.high_closed else ")"
    return f"{left}{_shown(domain.low)}, {_shown(domain.high)}{right}"
