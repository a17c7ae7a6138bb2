"""The numbers of a report: what a run gains, and what its `while` clauses compare with which limits."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.formatter import format_node
from cachepolicy.language.traversal import names_in, walk
from cachepolicy.language.vocabulary import ACCUMULATORS, MEMORIES
from cachepolicy.planning.cost_model import Forecast, Work, forecast
from cachepolicy.planning.plan import BoundRule, Plan
from cachepolicy.planning.schedule import Decision, Tick, accumulate, environment_of
from cachepolicy.reports.text import Outcome, Tally, tally
from cachepolicy.tracing.trace import Trajectory


@dataclass(frozen=True, slots=True)
class Gains:
    """The numbers at the head of a report.

    `seconds` were spent in the model and `uncached` would have been without the policy: as the caller measured, or,
    where `estimated`, as many calls as there were at the median of those that computed everything. Both are None where
    there is nothing to tell them from. `held` are the most bytes that the session held.
    """

    calls: int
    tally: Tally
    flops: Forecast | None
    seconds: float | None
    uncached: float | None
    estimated: bool
    held: int | None

    @property
    def skipped(self) -> int:
        """Site calls that did not compute, hidden ones included."""
        return self.tally.calls["reuse"] + self.tally.calls["hidden"]

    @property
    def site_calls(self) -> int:
        """Site calls in all."""
        return sum(self.tally.calls.values())

    @property
    def speed_up(self) -> float | None:
        """How many times faster the calls of the model were than without the policy."""
        return self.uncached / self.seconds if self.seconds and self.uncached else None


def gains(outcome: Outcome, *, work: Work | None = None, uncached: float | None = None) -> Gains:
    """Add up a schedule or a trajectory; `uncached` are the seconds that the model takes without the policy."""
    run = outcome.calls if isinstance(outcome, Trajectory) else []
    seconds = sum(call.seconds for call in run) if run else None
    estimate = None if uncached is not None or not isinstance(outcome, Trajectory) else _estimated(outcome)
    return Gains(
        calls=len(list(outcome)),
        tally=tally(outcome),
        flops=None if work is None else forecast(outcome.plan, outcome, work),
        seconds=seconds,
        uncached=uncached if estimate is None else estimate,
        estimated=estimate is not None,
        held=max((call.held for call in run), default=None),
    )


def _estimated(trajectory: Trajectory) -> float | None:
    """What all calls would have taken at the speed of those that computed everything, without the very first one.

    The first call of a model warms up what later ones find warm.
    """
    full = [call.seconds for call in trajectory.calls[1:] if all(decision.computes for decision in call.decided)]
    return statistics.median(full) * len(trajectory.calls) if full else None


# --- curves and their limits ---


@dataclass(frozen=True, slots=True)
class Curve:
    """A side of a comparison that a rule's `while` reads: `value operator limit` speaks for reuse, as it is written."""

    rule: int
    value: ir.Expression
    operator: str
    limit: ir.Expression

    @property
    def text(self) -> str:
        """`drift <= 0.05`, in the language."""
        return f"{format_node(self.value)} {self.operator} {format_node(self.limit)}"


@dataclass(frozen=True, slots=True)
class Point:
    """A curve at one call of one site: its value and its limit, None where they are undefined, and what was decided."""

    tick: Tick
    value: float | None
    limit: float | None
    decision: Decision


def curves(plan: Plan) -> tuple[Curve, ...]:
    """Every comparison of something measured or remembered with a number, by rule, in the order they are written."""
    signals = frozenset(signal.name for signal in plan.resolved.signals)
    return tuple(
        dict.fromkeys(
            Curve(bound.index, value, operator, limit)
            for bound in plan.rules
            if bound.sites and bound.rule.condition is not None
            for value, operator, limit in _comparisons(bound.rule.condition, signals)
        )
    )


def _comparisons(
    condition: ir.Expression, signals: frozenset[str]
) -> Iterator[tuple[ir.Expression, str, ir.Expression]]:
    for node in walk(condition):
        match node:
            case ir.Comparison():
                for operator, left, right in zip(node.operators, node.operands, node.operands[1:], strict=False):
                    if _moves(left, signals):
                        yield left, operator, right
                    elif _moves(right, signals):
                        yield right, _TURNED[operator], left
            case ir.Membership(container=ir.Interval() as interval) if _moves(node.value, signals):
                yield node.value, ">=" if interval.low_closed else ">", interval.low
                yield node.value, "<=" if interval.high_closed else "<", interval.high
            case _:
                pass


_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def _moves(node: ir.Expression, signals: frozenset[str]) -> bool:
    """True where the expression reads a signal, or what a site remembers: the clock alone is no curve."""
    calls = {each.function for each in walk(node) if isinstance(each, ir.Call)}
    return bool(names_in(node) & signals or calls & (ACCUMULATORS | MEMORIES))


def points(
    plan: Plan, curve: Curve, site: int, calls: Iterable[tuple[Tick, Sequence[Decision]]], branch: str
) -> list[Point]:
    """The curve along the calls of a branch in which its rule decided for the site."""
    found = list[Point]()
    bound = plan.rules[curve.rule]
    for tick, decisions in calls:
        decision = decisions[site]
        if tick.branch == branch and decision.rule == curve.rule and decision.inputs is not None:
            environment = _environment(bound, decision)
            value, limit = (_number(each, environment) for each in (curve.value, curve.limit))
            found.append(Point(tick, value, limit, decision))
    return found


def _environment(bound: BoundRule, decision: Decision) -> Environment:
    assert decision.inputs is not None
    return accumulate(bound, decision.inputs, environment_of(bound, decision.inputs))[0]


def _number(node: ir.Expression, environment: Environment) -> float | None:
    try:
        value = evaluate(node, environment)
    except Undefined:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


Series = tuple[tuple[float | None, float | None, str], ...]


def series(
    plan: Plan, curve: Curve, calls: Sequence[tuple[Tick, Sequence[Decision]]], branch: str
) -> Mapping[Series, tuple[list[str], list[Point]]]:
    """The sites that the curve runs alike for, with its points; those where it has none are left out."""
    alike: dict[Series, tuple[list[str], list[Point]]] = {}
    for site in plan.rules[curve.rule].sites:
        run = points(plan, curve, site, calls, branch)
        if run:
            key = tuple((each.value, each.limit, each.decision.verdict) for each in run)
            alike.setdefault(key, ([], run))[0].append(plan.sites[site].name)
    return alike
