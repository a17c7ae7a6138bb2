"""A whole trajectory decided ahead, without a model: the schedule of a policy, and the reasons in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.errors import PolicyError, counted, suggestion
from cachepolicy.language import ir
from cachepolicy.language.linker import load, resolve
from cachepolicy.language.traversal import names_in, substitute, walk
from cachepolicy.planning.bind import bind
from cachepolicy.planning.grid import notebook_html
from cachepolicy.planning.module_tree import Skeleton, builtin, sites_skeleton
from cachepolicy.planning.plan import BoundRule, Plan
from cachepolicy.planning.schedule import (
    Decision,
    Tick,
    decide_all,
    follows,
    prepare,
    rebuilds_uncond,
    untold,
)

SignalValues = float | Sequence[float] | Mapping[str, Sequence[float]]
Facts = Mapping[tuple[str, int, str], str]
MeasuredNumbers = Mapping[tuple[int, str], Mapping[int, Mapping[str, float]]]
"""The numbers of signals by name, for each site number, by step and branch."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The decisions of one simulated trajectory, by branch and step."""

    plan: Plan
    ticks: tuple[Tick, ...]
    decisions: Mapping[tuple[str, int], Sequence[Decision]] = field(repr=False)

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches, in the order they run within a step."""
        return tuple(dict.fromkeys(tick.branch for tick in self.ticks))

    @property
    def steps(self) -> int:
        """How many steps were simulated."""
        return len({tick.step for tick in self.ticks})

    def rows_of(self, branch: str) -> dict[str, str]:
        """One letter a step for each site: `C` computes, `R` reuses, `.` is hidden in a site that reuses."""
        rows = dict[str, str]()
        for site in self.plan.sites:
            rows[site.name] = "".join(self.decisions[branch, step][site.index].letter for step in range(self.steps))
        return rows

    @property
    def rows(self) -> dict[str, str]:
        """`rows_of` the first branch."""
        return self.rows_of(self.branches[0])

    def decision(self, site: str, step: int, branch: str | None = None) -> Decision:
        """What happens to `site` at `step`, by which rule and why.

        Raises:
            PolicyError: no such site or step.
        """
        where = self.branches[0] if branch is None else branch
        for each in self.plan.sites:
            if each.name == site and (where, step) in self.decisions:
                return self.decisions[where, step][each.index]
        names = [each.name for each in self.plan.sites]
        if site in names:
            raise PolicyError.of("E253", f"no step {step} in a schedule of {counted(self.steps, 'step')}")
        raise PolicyError.of("E252", f"no rule selects a site `{site}`", help=suggestion(site, names))

    def _repr_html_(self) -> str:
        skipped = sum(not each.computes for decisions in self.decisions.values() for each in decisions)
        calls = sum(map(len, self.decisions.values()))
        size = f"{counted(self.steps, 'step')}, {counted(len(self.plan.sites), 'site')}"
        summary = f"{size}: {skipped} of {counted(calls, 'site call')} skipped"
        return notebook_html({branch: self.rows_of(branch) for branch in self.branches}, summary)

    def __iter__(self) -> Iterator[tuple[Tick, Sequence[Decision]]]:
        """The calls in the order they run, each with its decisions by site number."""
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
    """The schedule of a policy over `steps` steps, by the same decision function that the engine asks.

    `timesteps` are in training units (default: evenly from 999 to 0). Sites come from a model's `skeleton`, from plain
    `sites` names, or from the built-in skeleton. `signals` gives the numbers of signals and externals by name: one
    number,
    one a step, or those by branch. `facts` names what only a run can know, by (site, step, branch). Other keywords
    set the
    policy's params.

    Raises:
        PolicyError: the policy, a setting, or an argument does not fit.
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
    """Bind a policy to the sites of a model that is known by its skeleton or by its site names.

    Raises:
        PolicyError: the policy or a setting is wrong, or a rule selects nothing.
    """
    if skeleton is None:
        skeleton = sites_skeleton(sites) if sites is not None else builtin()
    return bind(resolve(load(policy), settings), skeleton)


def replay(
    bound: Plan, ticks: Sequence[Tick], *, signals: MeasuredNumbers | None = None, facts: Facts | None = None
) -> Schedule:
    """The schedule of a plan over any clock, such as that of a run's trace: a branch may miss steps.

    `signals` and `facts` are what a run measured and found, in the form in which its trajectories give them.
    """
    return Schedule(bound, tuple(ticks), _run(bound, ticks, {}, facts or {}, signals))


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
    for read in ticks:
        tick = read
        for other in UNCOND_BRANCHES & memories.keys() if tick.branch in COND_BRANCHES else ():
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
        decided[tick.branch, tick.step] = partition.spread(decisions)
    return decided


def _ticks(
    steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, branches: Sequence[str]
) -> list[Tick]:
    if isinstance(steps, bool) or steps < 1:
        raise PolicyError.of("E254", f"`steps` is {steps}, and a schedule has at least one step")
    if timesteps is None:
        timesteps = evenly(steps)
    for name, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        if given is not None and len(given) != steps:
            raise PolicyError.of("E254", f"{len(given)} {name} for {counted(steps, 'step')}", help="one a step")
    return [
        Tick(step, float(timesteps[step]), steps, None if sigmas is None else float(sigmas[step]), branch)
        for step in range(steps)
        for branch in branches
    ]


def evenly(steps: int) -> list[float]:
    """Timesteps that fall evenly from 999 to 0, the clock where nobody gives one."""
    return [999.0 * (steps - 1 - step) / (steps - 1) if steps > 1 else 999.0 for step in range(steps)]


def _by_branch(name: str, value: SignalValues, steps: int, branches: Sequence[str]) -> Mapping[str, Sequence[float]]:
    if isinstance(value, Mapping):
        return {branch: _a_step(name, value.get(branch, ()), steps) for branch in branches}
    series = _a_step(name, value, steps)
    return dict.fromkeys(branches, series)


def _a_step(name: str, value: float | Sequence[float], steps: int) -> Sequence[float]:
    if isinstance(value, int | float):
        return [float(value)] * steps
    if len(value) != steps:
        raise PolicyError.of(
            "E255",
            f"{counted(len(value), 'value')} of `{name}` for {counted(steps, 'step')}",
            help="one a step, or one number",
        )
    return [float(each) for each in value]


def _with_numbers(bound: Plan, given: frozenset[str]) -> Plan:
    """The plan with signals that follow from the given numbers written out; the rest must be given.

    Raises:
        PolicyError: a clause reads a signal that is neither given nor computable, or a given name is unknown.
    """
    signals = {signal.name: signal.value for signal in bound.resolved.signals}
    unknown = [name for name in given if name not in signals and name not in bound.resolved.externals]
    if unknown:
        known = [*signals, *bound.resolved.externals]
        raise PolicyError.of("E256", f"the policy has no signal `{unknown[0]}`", help=suggestion(unknown[0], known))
    written = dict[str, ir.Expression]()
    for name, value in signals.items():
        if name not in given:
            written[name] = substitute(value, written)
    rules = list[BoundRule]()
    for rule in bound.rules:
        condition = rule.rule.condition
        if condition is not None:
            condition = substitute(condition, {name: value for name, value in written.items() if name not in given})
            _require_numbers(rule.rule.condition, condition, signals)
        rules.append(replace(rule, rule=rule.rule.model_copy(update={"condition": condition})))
    return replace(bound, rules=tuple(rules))


def _require_numbers(
    written: ir.Expression | None, condition: ir.Expression, signals: Mapping[str, ir.Expression]
) -> None:
    if not any(isinstance(node, ir.Probe) for node in walk(condition)):
        return
    read = sorted(name for name in names_in(written or condition) if name in signals)
    first = read[0] if read else next(iter(signals))
    raise PolicyError.of(
        "E257",
        f"a rule reads the signal `{first}`, which only a run can measure",
        help=f"give its numbers: `signals={{'{first}': [...]}}`, or `with {first} = [...]` in an `expect`",
    )
