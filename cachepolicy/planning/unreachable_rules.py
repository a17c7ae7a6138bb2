"""Rules that can never own a site, because earlier rules take it whenever they would."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cachepolicy.language import ir
from cachepolicy.planning.plan import BoundRule, group_rules

COMPARED = 100
"""Earlier `when` clauses of several parts that one rule is compared with. Single parts are found by a search."""

End = tuple[float, int]
"""An end of an interval, so that ends compare: (0, 0) is a closed lower or an open upper end, (0, 1) the other."""


def shadowed(rules: Sequence[BoundRule]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the number of each rule that never decides, and the numbers of the earlier rules that do in its place.

    The work is one visit for each rule and group of sites with equal rules. Clauses are compared as far as equal texts
    and intervals of constants tell, and with `COMPARED` earlier clauses of several parts.
    """
    groups = group_rules(rules)
    earlier = [_Earlier() for _ in groups.rules]
    for bound in rules:
        clause = _Clause.of(bound.rule.when)
        if ir.Boolean(value=False) in clause.others:
            # The params turn this rule off, as another level of quality does.
            continue
        by = [earlier[group].visit(clause, bound.index) for group in groups.taken_by[bound.index]]
        if by and None not in by:
            yield bound.index, tuple(sorted({rule for rule in by if rule is not None}))


@dataclass(slots=True)
class _Clause:
    """What must hold for a `when` to hold: intervals of values, and other expressions."""

    others: set[ir.Expression] = field(default_factory=set[ir.Expression])
    intervals: dict[ir.Expression, tuple[End, End]] = field(default_factory=dict[ir.Expression, tuple[End, End]])

    @classmethod
    def of(cls, when: ir.Expression | None) -> _Clause:
        clause = cls()
        for part in parts_of(when):
            bounds = interval(part)
            if bounds is None:
                clause.others.add(part)
            else:
                value, low, high = bounds
                before = clause.intervals.get(value, (low, high))
                clause.intervals[value] = max(low, before[0]), min(high, before[1])
        return clause

    def follows_from(self, other: _Clause) -> bool:
        """Returns whether this clause holds whenever `other` holds."""
        return self.others <= other.others and all(
            value in other.intervals and low <= other.intervals[value][0] and other.intervals[value][1] <= high
            for value, (low, high) in self.intervals.items()
        )


@dataclass(slots=True)
class _Earlier:
    """The clauses of the earlier rules of one group of sites, with the numbers of the rules."""

    always: int | None = None
    others: dict[ir.Expression, int] = field(default_factory=dict[ir.Expression, int])
    intervals: dict[ir.Expression, list[tuple[End, End, int]]] = field(
        default_factory=dict[ir.Expression, list[tuple[End, End, int]]]
    )
    """For each value intervals of which none is inside another, so that both ends ascend."""
    compound: list[tuple[_Clause, int]] = field(default_factory=list[tuple[_Clause, int]])

    def visit(self, clause: _Clause, rule: int) -> int | None:
        """Returns an earlier rule that decides in place of this one. Without one the rule is added."""
        decider = self._decider(clause)
        if decider is None:
            self._add(clause, rule)
        return decider

    def _decider(self, clause: _Clause) -> int | None:
        if self.always is not None:
            return self.always
        for part in clause.others:
            if part in self.others:
                return self.others[part]
        for value, (low, high) in clause.intervals.items():
            known = self.intervals.get(value, [])
            position = bisect_right(known, low, key=lambda entry: entry[0]) - 1
            if position >= 0 and known[position][1] >= high:
                return known[position][2]
        return next((rule for earlier, rule in self.compound if earlier.follows_from(clause)), None)

    def _add(self, clause: _Clause, rule: int) -> None:
        match [*clause.others], [*clause.intervals.items()]:
            case [], []:
                self.always = rule
            case [part], []:
                self.others[part] = rule
            case [], [(value, (low, high))]:
                known = self.intervals.setdefault(value, [])
                start = bisect_left(known, low, key=lambda entry: entry[0])
                end = bisect_right(known, high, key=lambda entry: entry[1])
                known[start : max(start, end)] = [(low, high, rule)]
            case _ if len(self.compound) < COMPARED:
                self.compound.append((clause, rule))
            case _:
                pass


def parts_of(when: ir.Expression | None) -> Iterator[ir.Expression]:
    """Yields the parts of a `when` that must all hold for it to hold."""
    match when:
        case None | ir.Boolean(value=True):
            pass
        case ir.Both():
            for operand in when.operands:
                yield from parts_of(operand)
        case _:
            yield when


def interval(part: ir.Node) -> tuple[ir.Expression, End, End] | None:
    """Returns what a comparison or a membership bounds by constants, with the lower and the upper end.

    The interval is empty where the lower end is not below the upper one.
    """
    match part:
        case ir.Membership(container=ir.Interval(low=ir.Number() as low, high=ir.Number() as high) as container):
            return part.value, (low.value, int(not container.low_closed)), (high.value, int(container.high_closed))
        case ir.Comparison(operands=(ir.Number(value=first), value, ir.Number(value=last)), operators=(left, right)):
            if {left, right} <= {"<", "<="}:
                return value, (first, int(left == "<")), (last, int(right == "<="))
            if {left, right} <= {">", ">="}:
                return value, (last, int(right == ">")), (first, int(left == ">="))
            return None
        case ir.Comparison(operands=(value, ir.Number(value=end)), operators=(operator,)):
            return _half_line(value, operator, end)
        case ir.Comparison(operands=(ir.Number(value=end), value), operators=(operator,)):
            return _half_line(value, _TURNED.get(operator, operator), end)
        case _:
            return None


_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def _half_line(value: ir.Expression, operator: str, end: float) -> tuple[ir.Expression, End, End] | None:
    match operator:
        case "<" | "<=":
            return value, (-math.inf, 0), (end, int(operator == "<="))
        case ">" | ">=":
            return value, (end, int(operator == ">")), (math.inf, 1)
        case "==":
            return value, (end, 0), (end, 1)
        case _:
            return None
