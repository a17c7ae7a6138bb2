"""The numbers of a report: what a run gains, and the values that `while` clauses compare with their limits."""

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
from cachepolicy.planning.tally import Tally, tally
from cachepolicy.reports.text import Outcome, most_cost
from cachepolicy.tracing.trace import Trajectory


@dataclass(frozen=True, slots=True)
class Gains:
    """The figures of a report.

    Attributes:
        calls: Calls of the model.
        tally: Counts of the site calls.
        flops: FLOPs that are skipped, if the FLOPs of a call are known.
        seconds: Seconds in the calls of the model; None for a schedule.
        uncached: Seconds of the calls without the policy: those that the caller measured, or an estimate.
        estimated: Whether `uncached` is an estimate: as many calls at the median of those that computed everything.
        held: Most bytes that the session held; None for a schedule.
        most: The figures of the most cost, where signals that are not known decide; these are then of the least.
        audited: Whether every module computed, so that the seconds tell nothing of the policy.
    """

    calls: int
    tally: Tally
    flops: Forecast | None
    seconds: float | None
    uncached: float | None
    estimated: bool
    held: int | None
    audited: bool = False
    most: Gains | None = None

    @property
    def speed_up(self) -> float | None:
        """The speed-up of the calls of the model, as `speed_up` defines it."""
        return None if self.audited else speed_up(self.seconds, self.uncached, self.tally.skipped)


def speed_up(seconds: float | None, uncached: float | None, skipped: float) -> float | None:
    """Returns how many times faster the calls of the model were than without the policy.

    Args:
        seconds: Seconds in the calls of the model with the policy.
        uncached: Seconds in the same calls without it.
        skipped: Number of skipped site calls. If there are none, a difference is noise and the result is None.
    """
    return uncached / seconds if seconds and uncached and skipped else None


def gains(outcome: Outcome, *, work: Work | None = None, uncached: float | None = None) -> Gains:
    """Adds up a schedule or a trajectory.

    Args:
        outcome: The schedule or trajectory.
        work: The FLOPs of one call.
        uncached: Seconds that the calls of the model take without the policy.
    """
    calls = outcome.calls if isinstance(outcome, Trajectory) else []
    estimate = None if uncached is not None or not isinstance(outcome, Trajectory) else _estimated(outcome)
    return Gains(
        calls=len(list(outcome)),
        tally=tally(outcome),
        flops=None if work is None else forecast(outcome.plan, outcome, work),
        seconds=sum(call.seconds for call in calls) if calls else None,
        uncached=uncached if estimate is None else estimate,
        estimated=estimate is not None,
        held=max((call.held for call in calls), default=None),
        most=None if (most := most_cost(outcome)) is None else gains(most, work=work),
        audited=isinstance(outcome, Trajectory) and outcome.audited,
    )


def _estimated(trajectory: Trajectory) -> float | None:
    """Returns the seconds of all calls at the median of those that computed everything.

    The first call is left out, because it includes the warm-up of the model.
    """
    full = [call.seconds for call in trajectory.calls[1:] if all(decision.computes for decision in call.decided)]
    return statistics.median(full) * len(trajectory.calls) if full else None


# --- curves and their limits ---


@dataclass(frozen=True, slots=True)
class Curve:
    """A comparison in a rule's `while`: `value operator limit`, where the value is measured or remembered."""

    rule: int
    value: ir.Expression
    operator: str
    limit: ir.Expression

    @property
    def text(self) -> str:
        """The comparison in the language: `drift <= 0.05`."""
        return f"{format_node(self.value)} {self.operator} {format_node(self.limit)}"


@dataclass(frozen=True, slots=True)
class Point:
    """A curve at one call of one site: value and limit (None: undefined), and the decision."""

    tick: Tick
    value: float | None
    limit: float | None
    decision: Decision


def curves(plan: Plan) -> tuple[Curve, ...]:
    """Returns every comparison of a measured or remembered value, by rule, in the order of the text."""
    signals = frozenset([*(signal.name for signal in plan.resolved.signals), *plan.resolved.externals])
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
    denied = _denied(condition)
    for node in walk(condition):
        match node:
            case ir.Comparison() | ir.Membership() if id(node) in denied and not _one_limit(node):
                pass  # one of two limits has to be exceeded, whichever
            case ir.Comparison():
                operators = [_OPPOSITE[each] for each in node.operators] if id(node) in denied else node.operators
                for operator, left, right in zip(operators, node.operands, node.operands[1:], strict=False):
                    if _moves(left, signals):
                        yield left, operator, right
                    elif _moves(right, signals):
                        yield right, _TURNED[operator], left
            case ir.Membership(container=ir.Interval() as interval) if _moves(node.value, signals):
                yield node.value, ">=" if interval.low_closed else ">", interval.low
                yield node.value, "<=" if interval.high_closed else "<", interval.high
            case _:
                pass


def _one_limit(node: ir.Expression) -> bool:
    return isinstance(node, ir.Comparison) and len(node.operators) == 1


def _denied(condition: ir.Expression) -> frozenset[int]:
    """Returns the ids of the nodes that stand below an odd number of `not`, where a comparison means its opposite."""
    denied, pending = set[int](), [(condition, False)]
    while pending:
        node, inverted = pending.pop()
        if inverted:
            denied.add(id(node))
        match node:
            case ir.Negation():
                pending.append((node.operand, not inverted))
            case ir.Both() | ir.Either():
                pending += [(operand, inverted) for operand in node.operands]
            case _:
                pass
    return frozenset(denied)


_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def _moves(node: ir.Expression, signals: frozenset[str]) -> bool:
    """Returns whether an expression reads a signal or a memory. An expression of the clock alone is no curve."""
    calls = {call.function for call in walk(node) if isinstance(call, ir.Call)}
    return bool(names_in(node) & signals or calls & (ACCUMULATORS | MEMORIES))


def points(
    plan: Plan, curve: Curve, site: int, calls: Iterable[tuple[Tick, Sequence[Decision]]], branch: str
) -> list[Point]:
    """Returns the points of a curve at the calls of a branch in which its rule decided for the site."""
    curve_points = list[Point]()
    bound = plan.rules[curve.rule]
    for tick, decisions in calls:
        decision = decisions[site]
        if tick.branch == branch and decision.rule == curve.rule and decision.inputs is not None:
            environment = _environment(bound, decision)
            value, limit = (_number(side, environment) for side in (curve.value, curve.limit))
            curve_points.append(Point(tick, value, limit, decision))
    return curve_points


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
    """Returns the points of a curve by their values, with the names of the sites that share them."""
    alike: dict[Series, tuple[list[str], list[Point]]] = {}
    for site in plan.rules[curve.rule].sites:
        run = points(plan, curve, site, calls, branch)
        if run:
            key = tuple((point.value, point.limit, point.decision.verdict) for point in run)
            alike.setdefault(key, ([], run))[0].append(plan.sites[site].name)
    return alike
