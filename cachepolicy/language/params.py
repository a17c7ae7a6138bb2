"""Converts parameter values from Python or text, and checks them against type and domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import assert_never, cast

from cachepolicy.errors import Diagnostic, PolicyError, Span, suggestion
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined, Value, constant

LIST_LIMIT = 100_000
"""Items of a list parameter: more than any run has steps or any model modules."""


def settled(
    params: Sequence[ir.Param], settings: Mapping[str, object], places: Mapping[str, Span | None] | None = None
) -> dict[str, ir.Expression]:
    """The constant that each parameter is worth, as `settings` or else its default says.

    A setting is a Python value (None for `off`, a tuple `(low, high)` for an open range) or an expression; `places`
    tells where in a text it stands.

    Raises:
        PolicyError: E160, no such parameter; E161, another type; E162, outside the domain. All of them at once.
    """
    known, at = {param.name: param for param in params}, places or {}
    findings = [replace(_unknown(name, list(known)), span=at.get(name)) for name in settings if name not in known]
    values = dict[str, ir.Expression]()
    for name, param in known.items():
        try:
            values[name] = typed(param, settings.get(name, param.default))
        except PolicyError as error:
            findings += [replace(each, span=at.get(name)) for each in error.diagnostics]
    if findings:
        raise PolicyError(findings)
    return values


def _unknown(name: str, known: list[str]) -> Diagnostic:
    help = suggestion(name, known) if known else "the policy has no parameters"
    return Diagnostic("E160", f"the policy has no parameter `{name}`", help=help)


def typed(param: ir.Param, given: object) -> ir.Expression:
    """`given` as a constant of the parameter's type, within its domain.

    Raises:
        PolicyError: E161 or E162.
    """
    if given is None or isinstance(given, ir.Off):
        if param.optional:
            return ir.Off()
        raise _mistyped(param, given, f"only a `{param.type}?` can be off")
    match param.type:
        case "int":
            value: ir.Expression = ir.Number(value=_whole(param, given))
        case "float":
            value = ir.Number(value=float(_real(param, given)))
        case "bool":
            value = ir.Boolean(value=_boolean(param, given))
        case "string":
            value = ir.Text(value=_string(param, given))
        case "range":
            value = _range(param, given)
        case "list":
            value = _list(param, given)
        case _:
            assert_never(param.type)
    _within(param, value)
    return value


def python(value: ir.Expression) -> Value:
    """Converts a constant to a Python value: a tuple for a list, an `Interval` for a range, `None` for `off`."""
    return constant(value)


def _mistyped(param: ir.Param, given: object, help: str | None = None) -> PolicyError:
    shown = "off" if given is None or isinstance(given, ir.Off) else _shown(given)
    return PolicyError.of("E161", f"`{param.name}` takes {_ARTICLE[param.type]}, not `{shown}`", help=help)


_ARTICLE = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "range": "a range",
    "list": "a list",
}


def _shown(given: object) -> str:
    if isinstance(given, ir.Node):
        try:
            given = constant(given)  # pyright: ignore[reportArgumentType]
        except Undefined:
            given = given.name if isinstance(given, ir.Name) else type(given).__name__.lower()
    text = given if isinstance(given, str) else repr(given)
    return text if len(text) <= 60 else text[:59] + "…"


def _plain(given: object) -> object:
    """Converts a constant expression to its Python value. Other values are returned unchanged."""
    if isinstance(given, ir.Number | ir.Boolean | ir.Text):
        return given.value
    if isinstance(given, ir.Negative | ir.Arithmetic):
        try:
            return constant(given)
        except Undefined:
            return given
    return given


def _whole(param: ir.Param, given: object) -> int:
    value = _plain(given)
    if isinstance(value, bool) or not isinstance(value, Integral):
        whole = isinstance(value, float) and value.is_integer()
        raise _mistyped(param, given, f"write `{int(value)}`" if whole else None)  # pyright: ignore[reportArgumentType]
    return int(value)


def _real(param: ir.Param, given: object) -> float:
    value = _plain(given)
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise _mistyped(param, given)
    return float(value) if not isinstance(value, Integral) else int(value)


def _boolean(param: ir.Param, given: object) -> bool:
    value = _plain(given)
    if not isinstance(value, bool):
        raise _mistyped(param, given)
    return value


def _string(param: ir.Param, given: object) -> str:
    value = given.name if isinstance(given, ir.Name) else _plain(given)
    if not isinstance(value, str):
        raise _mistyped(param, given)
    return value


def _range(param: ir.Param, given: object) -> ir.Interval:
    """A tuple is an open interval, as in Python's callers of PAB; `[a, b]` in text is a closed one."""
    if isinstance(given, ir.Interval):
        low, high = given.low, given.high
        closed = given.low_closed, given.high_closed
    elif isinstance(given, ir.ListOf) and len(given.items) == 2:
        (low, high), closed = given.items, (True, True)
    elif isinstance(given, tuple) and len(pair := cast("tuple[object, ...]", given)) == 2:
        (low, high), closed = pair, (False, False)
    else:
        raise _mistyped(param, cast("object", given), "write the tuple `(low, high)`; both ends stay outside")
    first, last = _real(param, low), _real(param, high)
    if first > last or (first == last and closed != (True, True)):
        raise PolicyError.of("E162", f"the range of `{param.name}` is empty: {first} to {last}")
    return ir.Interval(
        low=ir.Number(value=first), high=ir.Number(value=last), low_closed=closed[0], high_closed=closed[1]
    )


def _list(param: ir.Param, given: object) -> ir.ListOf:
    items: Sequence[object]
    if isinstance(given, ir.ListOf | ir.SetOf):
        items = given.items
    elif isinstance(given, list | tuple | range):
        items = cast("Sequence[object]", given)
    else:
        help = f'write `["{given}"]`' if isinstance(given, str) and len(given) < 60 else None
        raise _mistyped(param, given, help)
    if len(items) > LIST_LIMIT:
        raise PolicyError.of("E162", f"the list `{param.name}` has {len(items)} items; at most {LIST_LIMIT} are taken")
    return ir.ListOf(items=tuple(_item(param, item) for item in items))


def _item(param: ir.Param, given: object) -> ir.Expression:
    value = _plain(given)
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
            raise _mistyped(param, given, "a list holds numbers, strings or booleans")


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
