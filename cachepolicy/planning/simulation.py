"""Simulates a trajectory without a model: the schedule of a policy with its reasons."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.errors import Diagnostic, PolicyError, counted, suggestion
from cachepolicy.language import ir
from cachepolicy.language.linker import is_measured, load, resolve
from cachepolicy.language.loader import located
from cachepolicy.language.traversal import close_signals, names_in, substitute, walk
from cachepolicy.planning.bind import bind, needs
from cachepolicy.planning.grid import notebook_html
from cachepolicy.planning.module_tree import Skeleton, builtin, sites_skeleton
from cachepolicy.planning.plan import BoundRule, Plan, find_site, label
from cachepolicy.planning.schedule import (
    Decision,
    Tick,
    decide_all,
    follows,
    prepare,
    rebuilds_uncond,
    untold,
)
from cachepolicy.planning.tally import tally

SignalValues = float | Sequence[float] | Mapping[str, Sequence[float]]
Facts = Mapping[tuple[str, int, str], str]
MeasuredNumbers = Mapping[tuple[int, str], Mapping[int, Mapping[str, float]]]
"""The numbers of signals by name, for each site number, by step and branch."""

STEPS_LIMIT = 100_000
"""Most steps of a schedule."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The decisions of one simulated trajectory, by branch and step.

    Attributes:
        plan: The plan.
        ticks: The calls in the order they run.
        decisions: The decisions by site number, for each branch and step.
        most: The schedule with the most cost, if signals that are not given decide. This schedule then has the least.
        signals: The names of those signals.
    """

    plan: Plan
    ticks: tuple[Tick, ...]
    decisions: Mapping[tuple[str, int], Sequence[Decision]] = field(repr=False)
    most: Schedule | None = field(default=None, repr=False)
    signals: tuple[str, ...] = ()

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches in the order they run within a step."""
        return tuple(dict.fromkeys(tick.branch for tick in self.ticks))

    @property
    def steps(self) -> int:
        """Number of simulated steps."""
        return len({tick.step for tick in self.ticks})

    def rows_of(self, branch: str) -> dict[str, str]:
        """Returns one letter a step for each site: `C` computes, `R` reuses, `.` is hidden in a site that reuses.

        With `most`, `S` stands where a signal decides.
        """
        calls = [self.decisions[branch, step] for step in range(self.steps)]
        return {site.name: "".join(decisions[site.index].letter for decisions in calls) for site in self.plan.sites}

    @property
    def rows(self) -> dict[str, str]:
        """`rows_of` the first branch."""
        return self.rows_of(self.branches[0])

    def decision(self, site: str, step: int, branch: str | None = None) -> Decision:
        """Returns what happens to a site at a step, by which rule and why.

        Args:
            site: Name of the site.
            step: Number of the step.
            branch: Name of the branch; the first by default.

        Raises:
            PolicyError: There is no such site (E252) or step (E253).
        """
        where = self.branches[0] if branch is None else branch
        index = find_site(self.plan, site).index
        if (where, step) not in self.decisions:
            raise PolicyError.of("E253", f"no step {step} in a schedule of {counted(self.steps, 'step')}")
        return self.decisions[where, step][index]

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        """The warnings of the plan, and one for each rule with sites that decides no call of this schedule (W515)."""
        owners = {decision.rule for _, decisions in self for decision in decisions}
        shadowed = {warning.span for warning in self.plan.warnings if warning.code in ("W510", "W512")}
        unused = [bound for bound in self.plan.rules if bound.sites and bound.index not in owners]
        return (*self.plan.warnings, *(self._unused(bound) for bound in unused if bound.rule.span not in shadowed))

    def _unused(self, bound: BoundRule) -> Diagnostic:
        number, steps = bound.index + 1, counted(self.steps, "step")
        message = f"rule {number}, `{label(bound.rule)}`, decides no call in {steps}"
        help = "its `when` never holds, rules above it decide, or its sites are inside sites that reuse"
        diagnostic = Diagnostic("W515", message, "warning", span=bound.rule.span, help=help)
        return located(diagnostic, self.plan.resolved.sources[bound.index].policy, None)

    def _repr_html_(self) -> str:
        size = f"{counted(self.steps, 'step')}, {counted(len(self.plan.sites), 'site')}"
        return notebook_html({branch: self.rows_of(branch) for branch in self.branches}, f"{size}: {tally(self)}")

    def __iter__(self) -> Iterator[tuple[Tick, Sequence[Decision]]]:
        """Yields the calls in the order they run, with their decisions by site number."""
        for tick in self.ticks:
            yield tick, self.decisions[tick.branch, tick.step]


def simulate(
    policy: str | os.PathLike[str] | ir.Policy | Plan,
    *,
    steps: int,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    sites: Sequence[str] | None = None,
    skeleton: Skeleton | None = None,
    signals: Mapping[str, SignalValues] | None = None,
    branches: Sequence[str] = ("",),
    facts: Facts | None = None,
    **settings: Any,
) -> Schedule:
    """Simulates a policy by the decision function that the engine uses.

    Args:
        policy: A file, the name of a shipped policy, a policy, or a plan.
        steps: Number of steps, 1 to `STEPS_LIMIT`.
        timesteps: Timestep of each step in training units, 0 to 1000. They fall evenly from 999 to 0 by default.
        sigmas: Sigma of each step.
        sites: Module names of a model, instead of a module tree.
        skeleton: Module tree of a model. A generic transformer by default.
        signals: Numbers of signals and externals by name: one number, one for each step, or those by branch.
        branches: Names of the calls of a step, in the order they run.
        facts: What only a run can know, by (site, step, branch). A fact turns a reuse into a compute, or hides a site
            that the model did not call.
        settings: Values of the policy's params.

    Raises:
        PolicyError: The policy, a setting or an argument does not fit.
    """
    bound = policy if isinstance(policy, Plan) else plan(policy, skeleton=skeleton, sites=sites, **settings)
    bound = _with_numbers(bound, frozenset(signals or ()))
    ticks = _ticks(steps, timesteps, sigmas, branches)
    error = untold(bound, ticks[0]) if ticks else None
    if error is not None:
        raise error
    series = {name: _by_branch(name, value, steps, branches) for name, value in (signals or {}).items()}
    values = {
        (tick.step, tick.branch): {name: numbers[tick.branch][tick.step] for name, numbers in series.items()}
        for tick in ticks
    }
    return Schedule(bound, tuple(ticks), _run(bound, ticks, values, facts or {}))


def plan(
    policy: str | os.PathLike[str] | ir.Policy,
    *,
    skeleton: Skeleton | None = None,
    sites: Sequence[str] | None = None,
    **settings: Any,
) -> Plan:
    """Binds a policy to a model.

    Args:
        policy: A file, the name of a shipped policy, or a policy.
        skeleton: Module tree of the model. A generic transformer by default.
        sites: Module names of the model, instead of a module tree.
        settings: Values of the policy's params.

    Raises:
        PolicyError: The policy or a setting is wrong, or a rule selects nothing.
    """
    if skeleton is None:
        skeleton = sites_skeleton(sites) if sites is not None else builtin()
    return bind(resolve(load(policy), settings, model=skeleton.facts), skeleton)


def replay(
    bound: Plan, ticks: Sequence[Tick], *, signals: MeasuredNumbers | None = None, facts: Facts | None = None
) -> Schedule:
    """Simulates a plan on any clock, such as that of a recorded run, where a branch may miss steps.

    Args:
        bound: The plan.
        ticks: The calls, in the order they run.
        signals: Measured numbers, as `Trajectory.signals` has them.
        facts: What only the run could know, as `Trajectory.facts` has it.
    """
    return Schedule(bound, tuple(ticks), _run(bound, ticks, {}, facts or {}, signals))


def rule_visits(bound: Plan, steps: int) -> int:
    """Returns the number of rules that a simulation of `steps` calls visits, over all groups of sites."""
    return steps * sum(len(group.rules) for group in prepare(bound).coarse.groups)


def _run(
    bound: Plan,
    ticks: Sequence[Tick],
    values: Mapping[tuple[int, str], Mapping[str, float]],
    facts: Facts,
    measured: MeasuredNumbers | None = None,
) -> dict[tuple[str, int], Sequence[Decision]]:
    program, followed = prepare(bound), follows(bound)
    partition = program.fine if facts else program.coarse
    memories = {tick.branch: partition.start() for tick in ticks}
    decided = dict[tuple[str, int], Sequence[Decision]]()
    begun = set[str]()
    for read in ticks:
        tick = read
        # As in a run, a branch is not known before its first call.
        for other in UNCOND_BRANCHES & begun if tick.branch in COND_BRANCHES else ():
            alone = rebuilds_uncond(program, partition, memories[other], replace(tick, branch=other))
            tick = replace(tick, uncond_skipped=alone)
        call = tick.step, tick.branch
        leaders = {name: decided[name, tick.step] for name in followed if (name, tick.step) in decided}
        here = {
            site.index: facts[site.name, tick.step, tick.branch]
            for site in bound.sites
            if (site.name, tick.step, tick.branch) in facts
        }
        decisions, memories[tick.branch] = decide_all(
            program,
            partition,
            memories[tick.branch],
            tick,
            signals=values.get(call),
            signals_of=None if measured is None else measured.get(call, {}),
            followed=leaders,
            facts=here,
        )
        begun.add(tick.branch)
        decided[tick.branch, tick.step] = partition.spread(decisions)
    return decided


def _ticks(
    steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, branches: Sequence[str]
) -> list[Tick]:
    if isinstance(steps, bool) or not 1 <= steps <= STEPS_LIMIT:
        raise PolicyError.of("E254", f"`steps` is {steps}, and a schedule has 1 to {STEPS_LIMIT} steps")
    if timesteps is None:
        timesteps = evenly(steps)
    for name, numbers in (("timesteps", timesteps), ("sigmas", sigmas)):
        if numbers is not None and len(numbers) != steps:
            raise PolicyError.of("E254", f"{len(numbers)} {name} for {counted(steps, 'step')}", help="one a step")
    return [
        Tick(step, float(timesteps[step]), steps, None if sigmas is None else float(sigmas[step]), branch)
        for step in range(steps)
        for branch in branches
    ]


def evenly(steps: int) -> list[float]:
    """Returns timesteps that fall evenly from 999 to 0, the default clock."""
    return [999.0 * (steps - 1 - step) / (steps - 1) if steps > 1 else 999.0 for step in range(steps)]


def _by_branch(name: str, value: SignalValues, steps: int, branches: Sequence[str]) -> Mapping[str, Sequence[float]]:
    if isinstance(value, Mapping):
        return {branch: numbers_by_step(name, value.get(branch, ()), steps) for branch in branches}
    return dict.fromkeys(branches, numbers_by_step(name, value, steps))


def numbers_by_step(name: str, value: float | Sequence[float], steps: int) -> Sequence[float]:
    """Returns the given numbers of a signal by step.

    Raises:
        PolicyError: E255, there is not one number for each step.
    """
    if isinstance(value, int | float):
        return [float(value)] * steps
    if len(value) != steps:
        raise PolicyError.of(
            "E255",
            f"{counted(len(value), 'value')} of `{name}` for {counted(steps, 'step')}",
            help="one a step, or one number",
        )
    return [float(number) for number in value]


def refuse_unknown(bound: Plan, numbers: Iterable[str]) -> None:
    """Refuses numbers of what is neither a signal nor an external of the policy.

    Raises:
        PolicyError: E256.
    """
    known = [*(signal.name for signal in bound.resolved.signals), *bound.resolved.externals]
    unknown = next((name for name in numbers if name not in known), None)
    if unknown is not None:
        raise PolicyError.of("E256", f"the policy has no signal `{unknown}`", help=suggestion(unknown, known))


def _with_numbers(bound: Plan, numbers: frozenset[str]) -> Plan:
    """Returns the plan with signals that follow from given numbers substituted.

    Raises:
        PolicyError: A clause reads a signal that is neither given nor computable, or a given name is unknown.
    """
    refuse_unknown(bound, numbers)
    signals = {signal.name: signal.value for signal in bound.resolved.signals}
    values = close_signals(bound.resolved.signals, numbers)
    rules = list[BoundRule]()
    for rule in bound.rules:
        condition = rule.rule.condition
        if condition is None or not rule.sites:  # a rule without sites is never asked
            rules.append(rule)
            continue
        _require_externals(condition, frozenset(bound.resolved.externals) - numbers)
        if not values:
            rules.append(rule)
            continue
        substituted = substitute(condition, values)
        _require_numbers(condition, substituted, signals)
        rules.append(replace(rule, rule=rule.rule.model_copy(update={"condition": substituted})))
    # A run need not tell what only the signals read whose numbers are given.
    measured = [signal for signal in bound.resolved.signals if signal.name not in numbers]
    return replace(bound, rules=tuple(rules), needs=needs(rules, measured))


def _require_externals(condition: ir.Expression, missing: frozenset[str]) -> None:
    unknown = sorted(missing & names_in(condition))
    if unknown:
        name = unknown[0]
        raise PolicyError.of(
            "E257",
            f"a rule reads the external `{name}`, which the caller of a run supplies",
            help=f"give its numbers: `signals={{'{name}': [...]}}`, or `with {name} = [...]` in an `expect`",
        )


def _require_numbers(
    condition: ir.Expression, substituted: ir.Expression, signals: Mapping[str, ir.Expression]
) -> None:
    if not any(isinstance(node, ir.Probe) or is_measured(node) for node in walk(substituted)):
        return
    read = sorted(name for name in names_in(condition) if name in signals)
    first = read[0] if read else next(iter(signals))
    declared = not is_measured(signals[first]) or first.isidentifier()
    expected = f"or `with {first} = [...]` in an `expect`" if declared else f"or declare it: `signal NAME = {first}`"
    raise PolicyError.of(
        "E257",
        f"a rule reads the signal `{first}`, which only a run can measure",
        help=f"give its numbers: `signals={{'{first}': [...]}}`, {expected}",
    )
