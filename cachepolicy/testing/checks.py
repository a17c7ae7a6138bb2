"""Checks of schedules and runs. Each raises AssertionError with the site and the step that break it.

The checks of schedules take a `Schedule` of `simulate` or a `Trajectory` of a trace. Both iterate over their calls and
the decisions of each call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.planning.history_spec import needed_results
from cachepolicy.planning.plan import Plan, Site
from cachepolicy.planning.schedule import UNCALLED, Decision, Inputs, Tick, clock_words, hides
from cachepolicy.planning.simulation import replay

if TYPE_CHECKING:
    from torch import nn

    from cachepolicy.engine.apply import PolicyLike
    from cachepolicy.tracing.trace import Trace, Trajectory

__all__ = [
    "bounds_hold",
    "computes_on_ticks",
    "engine_agrees",
    "first_match_wins",
    "nesting_hides",
    "never_reuses_before_compute",
    "saved_alike",
    "staleness_bounded",
    "trace_agrees",
    "well_formed",
]


class Decided(Protocol):
    """The calls of a schedule or trajectory in the order in which they run, each with one decision for each site."""

    @property
    def plan(self) -> Plan:
        """The plan whose sites and rules the decisions are about."""
        ...

    def __iter__(self) -> Iterator[tuple[Tick, Sequence[Decision]]]: ...


def _decisions(schedule: Decided) -> Iterator[tuple[Site, Tick, Decision]]:
    for tick, decisions in schedule:
        for site in schedule.plan.sites:
            yield site, tick, decisions[site.index]


def _where(site: Site, tick: Tick) -> str:
    branch = f" on branch `{tick.branch}`" if tick.branch else ""
    return f"`{site.name}` at step {tick.step}{branch}"


def _owner(schedule: Decided, decision: Decision) -> ir.Rule | None:
    return None if decision.rule is None else schedule.plan.rules[decision.rule].rule


def never_reuses_before_compute(schedule: Decided) -> None:
    """Check that no site reuses before it has computed on the same branch. `skip` needs no history and is exempt.

    Args:
        schedule: A simulated schedule or a traced trajectory.

    Raises:
        AssertionError: A site reuses and has never computed on that branch.
    """
    computed = set[tuple[int, str]]()
    for site, tick, decision in _decisions(schedule):
        if decision.verdict == "compute":
            computed.add((site.index, tick.branch))
        elif decision.verdict == "reuse" and decision.action and needed_results(decision.action):
            assert (site.index, tick.branch) in computed, f"{_where(site, tick)} reuses and has never computed"


def computes_on_ticks(schedule: Decided) -> None:
    """Check that a site computes on every step on which the schedule clause of its owning rule asks for it.

    A rule with `follow` decides on the branch that it follows only, so it is checked on that branch only.

    Args:
        schedule: A simulated schedule or a traced trajectory.

    Raises:
        AssertionError: A site reuses where its rule's schedule clause asks for a compute.
    """
    for site, tick, decision in _decisions(schedule):
        rule = _owner(schedule, decision)
        if rule is None or rule.schedule is None or (rule.follow is not None and rule.follow != tick.branch):
            continue
        assert decision.inputs is not None
        if _asks_for_compute(rule.schedule, decision.inputs):
            assert decision.verdict == "compute", f"{_where(site, tick)} reuses on a tick of its schedule"


def _asks_for_compute(schedule: ir.ScheduleClause, inputs: Inputs) -> bool:
    """Return True if a schedule clause asks for a compute by its definition, or reads an undefined value."""
    words = clock_words(inputs.tick, inputs.memory)
    step: int = words["step"]

    def value(expression: ir.Expression) -> Any:
        return evaluate(expression, Environment(words, inputs.tables))

    try:
        match schedule:
            case ir.OnSteps():
                return step in value(schedule.steps)
            case ir.Mask():
                return value(schedule.mask)[step : step + 1] != "0"
            case ir.Every(anchor="compute"):
                return words["age"] >= math.floor(value(schedule.interval))
            case ir.Every(anchor="end"):
                return step in range(words["steps"] - 1, -1, -max(1, math.floor(value(schedule.interval))))
            case ir.Every():
                interval = math.floor(value(schedule.interval))
                offset = 0 if schedule.offset is None else math.floor(value(schedule.offset))
                return interval <= 0 or (step - offset) / interval == (step - offset) // interval
    except Undefined:
        return True


def staleness_bounded(schedule: Decided, n: int) -> None:
    """Check that no site answers with results that are older than `n` steps. Hidden sites are not checked.

    Args:
        schedule: A simulated schedule or a traced trajectory.
        n: The greatest allowed age of a reused result, in steps. 1 allows a reuse on the step after a compute.

    Raises:
        AssertionError: A site reuses a result that is older than `n` steps.
    """
    last = dict[tuple[int, str], int]()
    for site, tick, decision in _decisions(schedule):
        key = (site.index, tick.branch)
        if decision.verdict == "compute":
            last[key] = tick.step
        elif decision.verdict == "reuse":
            age = tick.step - last.get(key, -1)
            assert age <= n, f"{_where(site, tick)} reuses at age {age}, beyond {n}"


def first_match_wins(schedule: Decided) -> None:
    """Check that the first rule that selects a site and whose `when` holds owns it, and that sites without one compute.

    Args:
        schedule: A simulated schedule or a traced trajectory.

    Raises:
        AssertionError: Another rule owns a site, or a site without an owner reuses.
    """
    for site, tick, decision in _decisions(schedule):
        if decision.verdict == "hidden":
            continue
        assert decision.inputs is not None
        environment = Environment(clock_words(decision.inputs.tick, decision.inputs.memory), decision.inputs.tables)
        rules = [bound for bound in schedule.plan.rules if site.index in bound.sites]
        first = next((bound.index for bound in rules if _holds(bound.rule.when, environment)), None)
        assert decision.rule == first, f"{_where(site, tick)} is owned by rule {decision.rule}, not by {first}"
        assert first is not None or decision.verdict == "compute", f"{_where(site, tick)} reuses without a rule"


def _holds(clause: ir.Expression | None, environment: Environment) -> bool:
    try:
        return clause is None or bool(evaluate(clause, environment))
    except Undefined:
        return False


def nesting_hides(schedule: Decided) -> None:
    """Check that a site is hidden exactly where a site that contains it reuses.

    `approximate uncond` hides nothing in a guidance batch, because the modules of the model run on half of it. It hides
    every site of an unconditional call of its own. Sites that the model did not call are not checked.

    Args:
        schedule: A simulated schedule or a traced trajectory.

    Raises:
        AssertionError: A site is hidden and no site around it reuses, or the other way round.
    """
    for tick, decisions in schedule:
        for site in schedule.plan.sites:
            if decisions[site.index] is UNCALLED:
                continue
            hidden = any(hides(decisions[parent], tick.branch) for parent in site.parents)
            assert hidden == (decisions[site.index].verdict == "hidden"), (
                f"{_where(site, tick)} is {'not ' if hidden else ''}hidden"
            )


def bounds_hold(schedule: Decided) -> None:
    """Check the bounds `at most N in a row` and `at most N in all` of every rule, for each site and branch.

    A branch on which a rule follows another branch is not checked: the rule's bounds count on the followed branch.

    Args:
        schedule: A simulated schedule or a traced trajectory.

    Raises:
        AssertionError: A site reuses more often than its rule allows.
    """
    last = dict[tuple[int, str], int]()
    reuses = Counter[tuple[int, int, str]]()
    for site, tick, decision in _decisions(schedule):
        key = (site.index, tick.branch)
        if decision.verdict == "compute":
            last[key] = tick.step
        rule = _owner(schedule, decision)
        if rule is None or decision.rule is None or decision.verdict != "reuse":
            continue
        reuses[decision.rule, *key] += 1
        if rule.follow is not None and rule.follow != tick.branch:
            continue
        assert decision.inputs is not None
        words = Environment(clock_words(decision.inputs.tick, decision.inputs.memory), decision.inputs.tables)
        for bound in rule.bounds:
            used = tick.step - last.get(key, -1) if bound.scope == "row" else reuses[decision.rule, *key]
            assert used <= evaluate(bound.count, words), f"{_where(site, tick)} reuses beyond its bound"


def well_formed(schedule: Decided) -> None:
    """Run all checks that hold for any schedule, whatever its policy.

    These are `never_reuses_before_compute`, `computes_on_ticks`, `first_match_wins`, `nesting_hides` and `bounds_hold`.

    Args:
        schedule: A simulated schedule or a traced trajectory.

    Raises:
        AssertionError: One of the checks fails.
    """
    for check in (never_reuses_before_compute, computes_on_ticks, first_match_wins, nesting_hides, bounds_hold):
        check(schedule)


# --- runs ------------------------------------------------------------------------------------------------


def trace_agrees(trajectory: Trajectory) -> None:
    """Check that the simulator makes the decisions of a traced trajectory, with the same rules and reasons.

    The simulator gets the clock, the signals and the facts that the trajectory recorded.

    Args:
        trajectory: One trajectory of `run.trace`.

    Raises:
        AssertionError: Simulation and trace differ at a site and step.
    """
    ticks = [call.tick for call in trajectory.calls]
    expected = replay(trajectory.plan, ticks, signals=trajectory.signals, facts=trajectory.facts)
    for (tick, decisions), call in zip(expected, trajectory.calls, strict=True):
        for site in trajectory.plan.sites:
            simulated, traced = decisions[site.index], call.decisions[site.index]
            assert (simulated.verdict, simulated.rule, simulated.reason) == (
                traced.verdict,
                traced.rule,
                traced.reason,
            ), (
                f"{_where(site, tick)}: simulated {simulated.verdict} ({simulated.reason}), "
                f"run {traced.verdict} ({traced.reason})"
            )


def saved_alike(trace: Trace) -> None:
    """Check that a trace keeps its content when it is written to JSON and read back.

    Reading replays the decisions of each trajectory and compares them with the saved ones.

    Args:
        trace: The trace of a run.

    Raises:
        AssertionError: The trace that was read back differs.
        PolicyError: The written trace cannot be read.
    """
    from cachepolicy.tracing.trace import from_json

    restored = from_json(trace.to_json())
    assert trace.to_json() == restored.to_json()
    for original, copy in zip(trace, restored, strict=True):
        assert original.counts() == copy.counts()
        assert [call.tick for call in original.calls] == [call.tick for call in copy.calls]
        assert {branch: original.rows(branch) for branch in original.branches} == {
            branch: copy.rows(branch) for branch in copy.branches
        }


def engine_agrees(
    model: nn.Module, policy: PolicyLike, run: Callable[[nn.Module], object], **options: Any
) -> tuple[Trajectory, ...]:
    """Run a policy on a live model and compare its trace with the simulator and with the modules that really ran.

    The executions of every site that is a single module are counted on the original forward. Sites that one forward
    pass of the root calls several times are not supported: the trace records them once for each call of the root.

    Args:
        model: The model. The policy is removed again before this function returns.
        policy: What `cachepolicy.apply` takes as a policy.
        run: A function that calls the model as a sampling loop does.
        options: Keyword arguments of `cachepolicy.apply`, such as params of the policy.

    Returns:
        The recorded trajectories, in the order in which they began.

    Raises:
        AssertionError: The trace, the simulator and the executed modules disagree.
        PolicyError: The policy cannot be applied to the model.
    """
    import cachepolicy
    from cachepolicy.testing.models import Probes

    probes = Probes(model)
    try:
        with cachepolicy.apply(model, policy, **options) as applied:
            run(model)
            assert applied.trace is not None, "engine_agrees needs the trace"
            trajectories = applied.trace.trajectories
            saved_alike(applied.trace)
    finally:
        executed = probes.take()
        probes.remove()
    for trajectory in trajectories:
        well_formed(trajectory)
        trace_agrees(trajectory)
    _executions_agree(trajectories, executed)
    return trajectories


def _executions_agree(trajectories: Iterable[Trajectory], executed: dict[str, int]) -> None:
    traced, sites = Counter[str](), dict[str, Site]()
    for trajectory in trajectories:
        for site, tick, decision in _decisions(trajectory):
            if len(site.modules) == 1:
                sites[site.modules[0]] = site
                half = decision.verdict == "reuse" and not hides(decision, tick.branch)
                traced[site.modules[0]] += half or decision.verdict == "compute"
    for name, site in sites.items():
        assert executed[name] == traced[name], (
            f"`{site.name}` was executed {executed[name]} times, the trace records {traced[name]} computes"
        )
