"""Explains why a site computed or reused at a step: its rules, clause by clause, with the values that they read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.formatter import format_node
from cachepolicy.language.traversal import names_in, walk
from cachepolicy.planning.plan import BoundRule, Plan, find_site
from cachepolicy.planning.schedule import (
    HALF_CALLED,
    HALF_KEPT,
    Decision,
    History,
    Inputs,
    accumulate,
    due,
    environment_of,
    holds,
    unfollowed,
    within,
)
from cachepolicy.planning.simulation import simulate
from cachepolicy.tracing.trace import Trajectory


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause of a rule: its text, whether it allows a reuse, and the values that it read."""

    text: str
    holds: bool
    values: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        read = ", ".join(f"{name} = {_short(value)}" for name, value in self.values)
        return f"{'yes' if self.holds else 'no '}  {self.text}" + (f"   ({read})" if read else "")


@dataclass(frozen=True, slots=True)
class AskedRule:
    """One rule of a site: its number and text, whether it owns the step, and its clauses."""

    rule: int
    text: str
    outcome: str
    clauses: tuple[Clause, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation of one decision.

    `error` is the relative error of the answer in an audited trajectory, None elsewhere.
    """

    site: str
    step: int
    branch: str
    decision: Decision
    asked: tuple[AskedRule, ...]
    error: float | None = None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        branch = f" on branch `{self.branch}`" if self.branch else ""
        yield f"{self.site} {self.decision.verb} at step {self.step}{branch}: {self.decision.reason}"
        if self.error is not None:
            measure = "norm of the difference / norm of the computed output"
            yield f"  audited: the answer is {self.error:.2%} off ({measure})"
        for rule in self.asked:
            yield f"  rule {rule.rule + 1}: {rule.text}"
            yield f"    {rule.outcome}"
            for clause in rule.clauses:
                yield f"      {clause}"


def explain(
    policy: str | os.PathLike[str] | ir.Policy | Plan,
    where: str,
    *,
    steps: int,
    branch: str | None = None,
    **options: Any,
) -> Explanation:
    """Explains why a site computes or reuses at a step of a simulated schedule.

    Args:
        policy: A file, the name of a shipped policy, a policy, or a plan.
        where: `SITE@STEP`.
        steps: Number of steps.
        branch: Name of the branch; the first by default.
        options: Other arguments of `simulate`.

    Raises:
        PolicyError: As `simulate`, or `where` names no site (E252) or step (E253) of the schedule.
    """
    site, step = _place(where)
    schedule = simulate(policy, steps=steps, **options)
    name = schedule.branches[0] if branch is None else branch
    decision = schedule.decision(site, step, name)
    return explain_decision(schedule.plan, find_site(schedule.plan, site).name, step, name, decision)


def explain_run(trajectory: Trajectory, where: str, *, branch: str | None = None) -> Explanation:
    """Explains why a site computed or reused in a recorded run.

    Args:
        trajectory: The record.
        where: `SITE@STEP`.
        branch: Name of the branch; the first that ran by default.

    Raises:
        PolicyError: `where` has another form (E258), there is no such site (E252), or the branch has no call at that
            step (E253).
    """
    site, step = _place(where)
    matching = find_site(trajectory.plan, site)
    wanted = next(iter(trajectory.branches), "") if branch is None else branch
    for call in trajectory.calls:
        if (call.tick.step, call.tick.branch) == (step, wanted):
            decision = call.decisions[matching.index]
            explanation = explain_decision(trajectory.plan, matching.name, step, wanted, decision)
            return replace(explanation, error=call.errors.get(matching.index))
    of = f" of branch `{wanted}`" if wanted else ""
    help = f"its branches are {', '.join(f'`{name}`' for name in trajectory.branches)}" if branch is not None else None
    raise PolicyError.of("E253", f"the run has no step {step}{of}", help=help)


def _place(where: str) -> tuple[str, int]:
    site, at, number = where.rpartition("@")
    if not at or not number.isdecimal():
        raise PolicyError.of(
            "E258", f"`{where}` is not a place in a schedule", help="write it as `transformer_blocks.0.attn1@17`"
        )
    return site, int(number)


def explain_decision(plan: Plan, site: str, step: int, branch: str, decision: Decision) -> Explanation:
    """Explains a decision from the inputs that it carries.

    Args:
        plan: The plan of the decision.
        site: Name of the site.
        step: Number of the step.
        branch: Name of the branch.
        decision: The decision.
    """
    inputs = decision.inputs
    if inputs is None:
        return Explanation(site, step, branch, decision, ())
    index = next(other.index for other in plan.sites if other.name == site)
    rules = plan.groups.rules[plan.groups.group_of[index]]
    return Explanation(site, step, branch, decision, tuple(_asked(bound, inputs, decision) for bound in rules))


def _asked(bound: BoundRule, inputs: Inputs, decision: Decision) -> AskedRule:
    text = format_node(bound.rule)
    environment = environment_of(bound, inputs)
    if decision.rule is not None and bound.index > decision.rule:
        return AskedRule(bound.index, text, "was not asked: an earlier rule owns the step")
    if bound.index != decision.rule:
        return AskedRule(bound.index, text, "does not own the step", tuple(_when(bound.rule, environment)))
    return AskedRule(bound.index, text, "owns the step", tuple(_clauses(bound, inputs, environment)))


def _when(rule: ir.Rule, environment: Environment) -> Iterator[Clause]:
    if rule.when is not None:
        yield _clause(f"when {format_node(rule.when)}", holds(rule.when, environment), rule.when, environment)


def _clauses(bound: BoundRule, inputs: Inputs, environment: Environment) -> Iterator[Clause]:
    rule = bound.rule
    yield from _when(rule, environment)
    if rule.follow is not None and inputs.tick.branch not in (rule.follow, ""):
        reason = unfollowed(bound, inputs)
        yield Clause(f"follow {rule.follow}", not reason, (("because", reason),) if reason else ())
        return
    if rule.schedule is not None:
        text = f"{format_node(rule.schedule)} does not ask for a compute"
        yield _clause(text, not due(rule.schedule, environment), rule.schedule, environment, extra=("step", "age"))
    if rule.condition is not None:
        environment, _ = accumulate(bound, inputs, environment)
        yield _clause(
            f"while {format_node(rule.condition)}", holds(rule.condition, environment), rule.condition, environment
        )
    for limit in rule.bounds:
        ok = within(limit, bound.index, inputs.memory, inputs.tick, environment)
        yield _clause(format_node(limit), ok, limit, environment, extra=("age",) if limit.scope == "row" else ())
    for argument in bound.arguments:
        try:
            evaluate(argument.value, environment)
            defined = True
        except Undefined:
            defined = False
        text = f"`{format_node(argument)}` has a value"
        yield _clause(text, defined, argument.value, environment)
    history = History(rule.action)
    if needed := history.needed:
        what = "something is" if needed == 1 else f"{needed} results are"
        yield Clause(f"{what} kept from an earlier step", inputs.memory.computes >= needed)
    if (missing := history.missing(inputs)) in {HALF_CALLED, HALF_KEPT}:
        yield Clause(missing, holds=False)
    if inputs.fact is not None:
        yield Clause(inputs.fact, holds=False)


def _clause(text: str, holds: bool, node: ir.Node, environment: Environment, *, extra: tuple[str, ...] = ()) -> Clause:
    names = sorted(names_in(node) | {name for name in extra if name in environment.names})
    values: list[tuple[str, object]] = [(name, environment.names[name]) for name in names if name in environment.names]
    for call in (part for part in walk(node) if isinstance(part, ir.Call)):
        try:
            values.append((format_node(call), evaluate(call, environment)))
        except Undefined as error:
            values.append((format_node(call), f"undefined: {error}"))
    return Clause(text, holds, tuple(values))


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "not known" if value is None else str(value)
