"""Why a trajectory reused nothing: what was measured and what the rules asked for, from its record."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from cachepolicy.diffusers.guidance import COND_BRANCHES
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.formatter import format_node
from cachepolicy.language.traversal import names_in
from cachepolicy.planning.guidance import NO_UNCOND, distilled_help
from cachepolicy.planning.plan import BoundRule
from cachepolicy.planning.schedule import DUE, WHILE_IS_FALSE, Decision, clock_words, holds
from cachepolicy.planning.unreachable_rules import interval, parts_of
from cachepolicy.reports.stats import Curve, Point, curves, series
from cachepolicy.tracing.trace import Trajectory

_MOST_RULES = 3
"""Rules that are explained in one message."""


def why_nothing_was_reused(trajectory: Trajectory, *, distilled: bool = False) -> str:
    """Returns a clause for each of the first rules that had sites, joined by semicolons.

    Args:
        trajectory: The record of the trajectory.
        distilled: Whether the model is known to be guidance-distilled.
    """
    rules = [bound for bound in trajectory.plan.rules if bound.sites]
    reasons = [(bound, why) for bound in rules if (why := _why(trajectory, bound, distilled=distilled))]
    clauses = [f"rule {bound.index + 1}: {why}" if len(rules) > 1 else why for bound, why in reasons[:_MOST_RULES]]
    more = [f"and {len(reasons) - _MOST_RULES} more rules"] if len(reasons) > _MOST_RULES else []
    return "; ".join([*clauses, *more])


def _why(trajectory: Trajectory, bound: BoundRule, *, distilled: bool) -> str:
    if isinstance(bound.rule.action, ir.Compute):
        return ""
    owned = [decision for decision in _decisions(trajectory, bound) if decision.rule == bound.index]
    if not owned:
        return _never_owned(trajectory, bound)
    reasons = Counter(decision.reason for decision in owned if decision.computes)
    # A schedule computes at some steps of any run, so it explains nothing where later steps have other reasons.
    hindered = Counter(
        decision.reason
        for decision in owned
        if decision.computes and decision.reason != DUE and decision.inputs is not None and decision.inputs.tick.step
    )
    reasons = hindered or reasons
    reason = max(reasons, key=reasons.__getitem__, default="its sites are inside sites that reuse")
    if isinstance(bound.rule.action, ir.ApproximateUncond):
        conditional_alone = COND_BRANCHES.issuperset(trajectory.branches)
        reason = NO_UNCOND if distilled else "there was no unconditional call" if conditional_alone else reason
        help = distilled_help(trajectory.plan) if distilled or conditional_alone else None
        return reason + (f", {help}" if help else "")
    measured = [_measured(trajectory, curve) for curve in curves(trajectory.plan) if curve.rule == bound.index]
    return ", and ".join(filter(None, measured)) if reason == WHILE_IS_FALSE and any(measured) else reason


def _decisions(trajectory: Trajectory, bound: BoundRule) -> Iterator[Decision]:
    for _, decisions in trajectory:
        yield from (decisions[site] for site in bound.sites)


def _never_owned(trajectory: Trajectory, bound: BoundRule) -> str:
    """Returns the first part of the `when` that no call fulfilled; an empty text for a rule that params switch off."""
    clocks = [
        clock_words(decision.inputs.tick, decision.inputs.memory)
        for decision in _decisions(trajectory, bound)
        if decision.inputs is not None
    ]
    environments = [Environment(clock, trajectory.plan.resolved.tables) for clock in clocks]
    for part in parts_of(bound.rule.when):
        if environments and not any(holds(part, environment) for environment in environments):
            return _never(part, environments) if names_in(part) else ""
    return "its `when` never held, or rules above it decided"


def _never(part: ir.Expression, environments: list[Environment]) -> str:
    bounds = interval(part)
    if bounds is None:
        return f"`{format_node(part)}` never held"
    values = list[float]()
    for environment in environments:
        with contextlib.suppress(Undefined):
            values.append(float(evaluate(bounds[0], environment)))
    value, text = format_node(bounds[0]), format_node(part)
    never = f"was never {text.removeprefix(f'{value} ')}" if isinstance(part, ir.Membership) else f"never met `{text}`"
    return f"`{value}` {never}" + (f", it was {_spread(values)}" if values else "")


def _measured(trajectory: Trajectory, curve: Curve) -> str:
    """Returns the range of a curve beside its limit, and a limit that a third of the steps would have met."""
    runs = [
        points
        for branch in trajectory.branches
        for _, points in series(trajectory.plan, curve, list(trajectory), branch).values()
    ]
    points = max(runs, key=len, default=list[Point]())
    values = sorted(point.value for point in points if point.value is not None and math.isfinite(point.value))
    limits = [point.limit for point in points if point.limit is not None]
    name = f"`{format_node(curve.value)}`"
    if not values:
        return f"{name} was never defined" if points else ""
    text = f"{name} was {_spread(values)}" + (f", the limit is {_spread(limits)}" if limits else "")
    if curve.operator in {"<", "<="}:
        near = _rounded(values[(len(values) - 1) // 3], math.ceil)
        return f"{text}; at {sum(value <= near for value in values)} of {len(points)} steps it was at most {near:.3g}"
    if curve.operator in {">", ">="}:
        near = _rounded(values[-1 - (len(values) - 1) // 3], math.floor)
        return f"{text}; at {sum(value >= near for value in values)} of {len(points)} steps it was at least {near:.3g}"
    return text


def _spread(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _rounded(value: float, whole: Callable[[float], int]) -> float:
    """Returns a number with two significant digits, rounded by `math.ceil` or `math.floor`."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    return float(f"{whole(round(value / unit, 6)) * unit:.2g}")
