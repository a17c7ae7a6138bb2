"""Rules that can never own a site, because earlier ones take it whenever they would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cachepolicy.language import ir
from cachepolicy.planning.plan import BoundRule


def shadowed(rules: Sequence[BoundRule]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The numbers of rules that never decide, each with those of the earlier rules that decide in its place."""
    for number, bound in enumerate(rules):
        wanted = _parts(bound.rule.when)
        left, by = set(bound.sites), list[int]()
        for earlier in rules[:number]:
            covered = left.intersection(earlier.sites)
            if covered and all(_follows(part, wanted) for part in _parts(earlier.rule.when)):
                by.append(earlier.index)
                left -= covered
        if bound.sites and not left:
            yield bound.index, tuple(by)


def _parts(when: ir.Expression | None) -> tuple[ir.Expression, ...]:
    """What must all hold for a `when` to hold."""
    match when:
        case None | ir.Boolean(value=True):
            return ()
        case ir.Both():
            return tuple(part for operand in when.operands for part in _parts(operand))
        case _:
            return (when,)


def _follows(part: ir.Expression, given: Sequence[ir.Expression]) -> bool:
    """True where `part` holds whenever all of `given` hold, as far as equal texts and intervals tell."""
    if part in given:
        return True
    outer = interval(part)
    return outer is not None and any(
        inner is not None and inner[0] == outer[0] and _inside(inner, outer) for inner in map(interval, given)
    )


Bounds = tuple[ir.Expression, float, bool, float, bool]
"""What is bounded, its lower end and whether that is in, its upper end and whether that is in."""


def interval(part: ir.Node) -> Bounds | None:
    """What a comparison with constants, or a membership in a constant interval, bounds."""
    match part:
        case ir.Membership(container=ir.Interval(low=ir.Number() as low, high=ir.Number() as high) as interval):
            return part.value, low.value, interval.low_closed, high.value, interval.high_closed
        case ir.Comparison(operands=(ir.Number(value=first), value, ir.Number(value=last)), operators=(left, right)):
            if {left, right} <= {"<", "<="}:
                return value, first, left == "<=", last, right == "<="
            return (value, last, right == ">=", first, left == ">=") if {left, right} <= {">", ">="} else None
        case ir.Comparison(operands=(value, ir.Number() as end), operators=(operator,)):
            return _half(value, operator, end.value)
        case ir.Comparison(operands=(ir.Number() as end, value), operators=(operator,)):
            return _half(value, _TURNED.get(operator, operator), end.value)
        case _:
            return None


_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def _half(value: ir.Expression, operator: str, end: float) -> Bounds | None:
    match operator:
        case "<" | "<=":
            return value, float("-inf"), True, end, operator == "<="
        case ">" | ">=":
            return value, end, operator == ">=", float("inf"), True
        case "==":
            return value, end, True, end, True
        case _:
            return None


def _inside(inner: Bounds, outer: Bounds) -> bool:
    _, low, low_in, high, high_in = inner
    _, outer_low, outer_low_in, outer_high, outer_high_in = outer
    above = low > outer_low or (low == outer_low and (outer_low_in or not low_in))
    below = high < outer_high or (high == outer_high and (outer_high_in or not high_in))
    return above and below
