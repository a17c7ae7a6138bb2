"""The possible values of clauses that read what is not known yet: true, false, or both.

A name has a value, a `Range` of numbers, or `EITHER` (an unknown value), or is absent (it may be undefined). The result
contains every value that the clause can have, and may contain others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate, reads_steps
from cachepolicy.language.linker import is_measured
from cachepolicy.language.traversal import walk
from cachepolicy.language.vocabulary import ACCUMULATORS, MEMORIES


@dataclass(frozen=True, slots=True)
class Range:
    """A finite number that is at least `low` and at most `high`."""

    low: float
    high: float


class _Either:
    """An unknown value."""

    def __repr__(self) -> str:
        return "EITHER"


EITHER: Final = _Either()


@dataclass(frozen=True, slots=True)
class Truth:
    """Whether a clause may be true, and whether it may be false."""

    true: bool
    false: bool


BOTH = Truth(true=True, false=True)


@dataclass(frozen=True, slots=True)
class View:
    """The known names, and the tables."""

    names: Mapping[str, Any]
    tables: Mapping[str, Sequence[int | float]] = field(default_factory=dict[str, Sequence[int | float]])

    def knows(self, expression: ir.Node) -> bool:
        """Returns whether all that an expression reads has one known value."""
        names, stateful = _reads(expression)  # pyright: ignore[reportArgumentType] (nodes have a hash)
        return not stateful and all(
            name in self.names and not isinstance(self.names[name], Range | _Either) for name in names
        )


@functools.lru_cache(maxsize=4096)
def _reads(expression: ir.Node) -> tuple[frozenset[str], bool]:
    """Returns the names below an expression, and whether it reads what only a run can measure or count."""
    nodes = list(walk(expression))
    names = frozenset(node.name for node in nodes if isinstance(node, ir.Name))
    stateful = any(
        isinstance(node, ir.Probe)
        or is_measured(node)
        or (isinstance(node, ir.Call) and node.function in ACCUMULATORS | MEMORIES)
        for node in nodes
    )
    looks_up = any(reads_steps(node) for node in nodes)
    return names | {"steps"} if looks_up else names, stateful


def truth(clause: ir.Expression | None, view: View) -> Truth:
    """Returns the possible values of a `when` or `while`. A clause that reads an undefined number is false."""
    if clause is None:
        return Truth(true=True, false=False)
    looking = _Looking(view)
    try:
        value = looking.at(clause)
    except Undefined:
        return Truth(true=False, false=True)
    if isinstance(value, Range | _Either):
        return BOTH
    return Truth(bool(value), not value or looking.unsure)


def known(expression: ir.Expression, view: View) -> Any:
    """Returns the value of an expression, `EITHER` if it is not known.

    Raises:
        Undefined: The expression has no value, whatever the unknown names are.
    """
    return evaluate(expression, Environment(view.names, view.tables)) if view.knows(expression) else EITHER


class _Looking:
    """One evaluation. `unsure` is set when something is read that may be undefined."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.unsure = False

    def at(self, expression: ir.Expression) -> Any:
        if self.view.knows(expression):
            return evaluate(expression, Environment(self.view.names, self.view.tables))
        match expression:
            case ir.Name():
                value = self.view.names.get(expression.name)
                return value if value is not None else self._lost()
            case ir.Negative():
                return _negative(self.at(expression.operand))
            case ir.Arithmetic():
                return self._arithmetic(expression)
            case ir.Comparison():
                return self._compared(expression)
            case ir.Membership():
                return self._contained(expression)
            case ir.Both():
                return self._joined([self.at(operand) for operand in expression.operands], decides=False)
            case ir.Either():
                return self._joined([self.at(operand) for operand in expression.operands], decides=True)
            case ir.Negation():
                value = self.at(expression.operand)
                return EITHER if isinstance(value, Range | _Either) else not value
            case _:
                return self._lost()

    def _lost(self) -> _Either:
        self.unsure = True
        return EITHER

    def _joined(self, values: Sequence[Any], *, decides: bool) -> Any:
        sure = [value for value in values if not isinstance(value, Range | _Either)]
        if any(bool(value) is decides for value in sure):
            return decides
        return (not decides) if len(sure) == len(values) else EITHER

    def _arithmetic(self, expression: ir.Arithmetic) -> Any:
        left, right = _range(self.at(expression.left)), _range(self.at(expression.right))
        if left is None or right is None or expression.operator not in {"+", "-", "*"}:
            return self._lost()
        match expression.operator:
            case "+":
                ends = [left.low + right.low, left.high + right.high]
            case "-":
                ends = [left.low - right.high, left.high - right.low]
            case _:
                ends = [one * other for one in (left.low, left.high) for other in (right.low, right.high)]
        # A result beyond the largest number is undefined.
        self.unsure |= not all(math.isfinite(end) for end in ends)
        return self._lost() if any(math.isnan(end) for end in ends) else Range(min(ends), max(ends))

    def _compared(self, expression: ir.Comparison) -> Any:
        values = [self.at(operand) for operand in expression.operands]
        if any(value is None for value in values):
            raise Undefined("a value that is compared is off")
        pairs = zip(expression.operators, values, values[1:], strict=False)
        return self._joined([_compare(sign, left, right) for sign, left, right in pairs], decides=False)

    def _contained(self, expression: ir.Membership) -> Any:
        value, container = self.at(expression.value), expression.container
        if isinstance(container, ir.Interval):
            ends = (
                _compare("<=" if container.low_closed else "<", self.at(container.low), value),
                _compare("<=" if container.high_closed else "<", value, self.at(container.high)),
            )
            return self._joined(ends, decides=False)
        if not self.view.knows(container):
            return self._lost()
        items = evaluate(container, Environment(self.view.names, self.view.tables))
        if items is None:
            return False
        if isinstance(items, ir.Interval) or not isinstance(value, Range):
            return EITHER
        return self._joined([_compare("==", value, item) for item in items], decides=True)


def _range(value: Any) -> Range | None:
    if isinstance(value, Range):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Range(value, value) if number else None


def _negative(value: Any) -> Any:
    ends = _range(value)
    return EITHER if ends is None else Range(-ends.high, -ends.low)


def _compare(sign: str, left: Any, right: Any) -> Any:
    """Returns True or False if the comparison has that result for all numbers of both ranges."""
    one, other = _range(left), _range(right)
    if one is None or other is None:
        return EITHER
    match sign:
        case "<":
            sure, never = one.high < other.low, one.low >= other.high
        case "<=":
            sure, never = one.high <= other.low, one.low > other.high
        case ">" | ">=":
            return _compare("<" if sign == ">" else "<=", other, one)
        case _:
            sure = one.low == one.high == other.low == other.high
            never = one.high < other.low or one.low > other.high
            sure, never = (never, sure) if sign == "!=" else (sure, never)
    return True if sure else False if never else EITHER
