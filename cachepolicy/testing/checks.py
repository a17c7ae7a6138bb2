"""What holds of every schedule and every run: checks that raise AssertionError and say where.

Each takes a `Schedule` of `simulate` or a `Trajectory` of a run's trace: both give their calls with their decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.planning.plan import Plan, Site
from cachepolicy.planning.schedule import Decision, Inputs, Tick, clock_words
from cachepolicy.planning.simulation import replay

if TYPE_CHECKING:
    from torch import nn

    from cachepolicy.engine.run import PolicyLike
    from cachepolicy.tracing.trace import Trace, Trajectory

__all__ = [
    "bounds_hold",
    "computes_on_ticks",
    "engine_agrees",
    "first_match_wins",
    "nesting_hides",
    "never_reuses_before_compute",
    "staleness_bounded",
    "trace_agrees",
    "well_formed",
]


class Decided(Protocol):
    """Calls in the order they run, each with its decisions by site number."""

    @property
    def plan(self) -> Plan:
        """The sites and rules that were decided for."""
        ...

    def __iter__(self) -> Iterator[tuple[Tick, Sequence[Decision]]]: ...


def _each(schedule: Decided) -> Iterator[tuple[Site, Tick, Decision]]:
    for tick, decisions in schedule:
        for site in schedule.plan.sites:
            yield site, tick, decisions[site.index]


def _where(site: Site, tick: Tick) -> str:
    branch = f" on branch `{tick.branch}`" if tick.branch else ""
    return f"`{site.name}` at step {tick.step}{branch}"


def _owner(schedule: Decided, decision: Decision) -> ir.Rule | None:
    return None if decision.rule is None else schedule.plan.rules[decision.rule].rule


def never_reuses_before_compute(schedule: Decided) -> None:
    """No site is answered from a history before it has computed on that branch; `skip` needs none."""
    computed = set[tuple[int, str]]()
    for site, tick, decision in _each(schedule):
        if decision.verdict == "compute":
            computed.add((site.index, tick.branch))
        elif decision.verdict == "reuse" and not isinstance(decision.action, ir.Skip):
            assert (site.index, tick.branch) in computed, f"{_where(site, tick)} reuses and has never computed"


def computes_on_ticks(schedule: Decided) -> None:
    """A site computes wherever its owner's schedule asks for it; a rule that follows leaves that to its leader."""
    for site, tick, decision in _each(schedule):
        rule = _owner(schedule, decision)
        if rule is None or rule.schedule is None or (rule.follow is not None and rule.follow != tick.branch):
            continue
        assert decision.inputs is not None
        if _asks(rule.schedule, decision.inputs):
            assert decision.verdict == "compute", f"{_where(site, tick)} reuses on a tick of its schedule"


def _asks(schedule: ir.ScheduleClause, inputs: Inputs) -> bool:
    """Whether a schedule asks for a compute, by its definition; where it reads what is undefined, it does."""
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
                return words["age"] >= value(schedule.interval)
            case ir.Every(anchor="end"):
                return step in range(words["steps"] - 1, -1, -max(1, value(schedule.interval)))
            case ir.Every():
                interval = value(schedule.interval)
                offset = 0 if schedule.offset is None else value(schedule.offset)
                return interval <= 0 or (step - offset) / interval == (step - offset) // interval
    except Undefined:
        return True


def staleness_bounded(schedule: Decided, n: int) -> None:
    """No site answers with results that are older than `n` steps; hidden sites are not asked."""
    last = dict[tuple[int, str], int]()
    for site, tick, decision in _each(schedule):
        key = (site.index, tick.branch)
        if decision.verdict == "compute":
            last[key] = tick.step
        elif decision.verdict == "reuse":
            age = tick.step - last.get(key, -1)
            assert age <= n, f"{_where(site, tick)} reuses at age {age}, beyond {n}"


def first_match_wins(schedule: Decided) -> None:
    """The owner of a site is the first rule that takes it and whose `when` holds; without one it computes."""
    for site, tick, decision in _each(schedule):
        if decision.verdict == "hidden":
            continue
        assert decision.inputs is not None
        environment = Environment(clock_words(tick, decision.inputs.memory), decision.inputs.tables)
        mine = [bound for bound in schedule.plan.rules if site.index in bound.sites]
        first = next((bound.index for bound in mine if _true(bound.rule.when, environment)), None)
        assert decision.rule == first, f"{_where(site, tick)} is owned by rule {decision.rule}, not by {first}"
        assert first is not None or decision.verdict == "compute", f"{_where(site, tick)} reuses without a rule"


def _true(clause: ir.Expression | None, environment: Environment) -> bool:
    try:
        return clause is None or bool(evaluate(clause, environment))
    except Undefined:
        return False


def nesting_hides(schedule: Decided) -> None:
    """A site is hidden exactly where a site around it is answered from its history or skipped."""
    for tick, decisions in schedule:
        for site in schedule.plan.sites:
            around = [decisions[parent] for parent in site.parents]
            hidden = any(
                each.verdict == "reuse" and not isinstance(each.action, ir.ApproximateUncond) for each in around
            )
            assert hidden == (decisions[site.index].verdict == "hidden"), (
                f"{_where(site, tick)} is {'not ' if hidden else ''}hidden"
            )


def bounds_hold(schedule: Decided) -> None:
    """`at most N in a row` and `at most N in all` hold for every rule, site and branch that decides for itself."""
    last = dict[tuple[int, str], int]()
    reuses = Counter[tuple[int, int, str]]()
    for site, tick, decision in _each(schedule):
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
        words = Environment(clock_words(tick, decision.inputs.memory), decision.inputs.tables)
        for bound in rule.bounds:
            used = tick.step - last.get(key, -1) if bound.scope == "row" else reuses[decision.rule, *key]
            assert used <= evaluate(bound.count, words), f"{_where(site, tick)} reuses beyond its bound"


def well_formed(schedule: Decided) -> None:
    """Everything above that holds of any schedule whatever its policy."""
    for check in (never_reuses_before_compute, computes_on_ticks, first_match_wins, nesting_hides, bounds_hold):
        check(schedule)


# --- runs ------------------------------------------------------------------------------------------------


def trace_agrees(trajectory: Trajectory) -> None:
    """The simulator, given the trajectory's clock, signals and facts, decides the same for the same reasons."""
    ticks = [call.tick for call in trajectory.calls]
    expected = replay(trajectory.plan, ticks, signals=trajectory.signals, facts=trajectory.facts)
    for (tick, wanted), call in zip(expected, trajectory.calls, strict=True):
        for site in trajectory.plan.sites:
            ours, theirs = wanted[site.index], call.decisions[site.index]
            assert (ours.verdict, ours.rule, ours.reason) == (theirs.verdict, theirs.rule, theirs.reason), (
                f"{_where(site, tick)}: simulated {ours.verdict} ({ours.reason}), "
                f"run {theirs.verdict} ({theirs.reason})"
            )


def saved_alike(trace: Trace) -> None:
    """A trace that is saved and read back tells the same: its decisions are made once more and held to the saved."""
    from cachepolicy.tracing.trace import from_json

    again = from_json(trace.to_json())
    assert trace.to_json() == again.to_json()
    for ours, theirs in zip(trace, again, strict=True):
        assert ours.counts() == theirs.counts()
        assert [call.tick for call in ours.calls] == [call.tick for call in theirs.calls]
        assert {branch: ours.rows(branch) for branch in ours.branches} == {
            branch: theirs.rows(branch) for branch in theirs.branches
        }


def engine_agrees(
    model: nn.Module, policy: PolicyLike, run: Callable[[nn.Module], object], **options: Any
) -> tuple[Trajectory, ...]:
    """Run a policy on a live model and hold its trace against the simulator and against what was executed.

    `run` calls the model as a sampling loop does; `options` are those of `apply`. The executions of every site that
    is one
    module are counted below the interception. The policy is taken off again; the trajectories are given for a closer
    look.
    Not for sites that one forward calls several times: the trace counts such a call of the root as one.
    """
    import cachepolicy
    from cachepolicy.testing.models import Probes

    probes = Probes(model)
    try:
        with cachepolicy.apply(model, policy, **options) as attached:
            run(model)
            assert attached.trace is not None, "engine_agrees needs the trace"
            trajectories = attached.trace.trajectories
            saved_alike(attached.trace)
    finally:
        executed = probes.take()
        probes.remove()
    for trajectory in trajectories:
        well_formed(trajectory)
        trace_agrees(trajectory)
    _executions_agree(trajectories, executed)
    return trajectories


def _executions_agree(trajectories: Iterable[Trajectory], executed: dict[str, int]) -> None:
    told, sites = Counter[str](), dict[str, Site]()
    for trajectory in trajectories:
        for site, _, decision in _each(trajectory):
            if len(site.modules) == 1:
                sites[site.modules[0]] = site
                told[site.modules[0]] += decision.verdict == "compute"
    for name, site in sites.items():
        assert executed[name] == told[name], (
            f"`{site.name}` was executed {executed[name]} times, and the trace tells of {told[name]}"
        )
