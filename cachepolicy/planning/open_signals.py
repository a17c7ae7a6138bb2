"""Schedules before signals are known: the decisions that signals make, and the range of the cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import is_measured
from cachepolicy.language.traversal import close_signals, names_in, substitute, walk
from cachepolicy.planning.history_spec import whole_results
from cachepolicy.planning.plan import BoundRule, Plan
from cachepolicy.planning.schedule import FRESH, HIDDEN, Decision, Inputs, Memory, Tick, advance, decide, hides, prepare
from cachepolicy.planning.simulation import MeasuredNumbers, Schedule, replay, simulate


@dataclass(frozen=TYPE_CHECKING, slots=True, unsafe_hash=True)
class OpenDecision(Decision):
    """A decision that a signal makes in a run. Its verdict is that of the schedule with the least cost."""

    @property
    def letter(self) -> str:
        """`S`: a signal decides."""
        return "S"

    @property
    def verb(self) -> str:
        """What stands in place of a verdict."""
        return "waits for a signal"


def simulate_open(plan: Plan, *, signals: Mapping[str, Any] | None = None, **arguments: Any) -> Schedule:
    """Simulates a plan. Signals of rules that are not given may have any value.

    Args:
        plan: The plan.
        signals: Numbers of signals by name, as for `simulate`.
        arguments: Other arguments of `simulate`.

    Returns:
        The schedule. Where a signal that is not given decides, it has `most`, and its decisions there have the letter
        `S` and the verdict of the least cost: all of them reuse, as far as the other clauses of the policy allow it.

    Raises:
        PolicyError: An argument does not fit.
    """
    given = signals or {}
    return _open(plan, frozenset(given), lambda bound: simulate(bound, signals=given, **arguments))


def replay_open(plan: Plan, ticks: Sequence[Tick], measured: MeasuredNumbers) -> Schedule:
    """Simulates a plan on the clock and with the numbers of a recorded run. Other signals may have any value.

    Args:
        plan: The plan.
        ticks: The calls, in the order they ran.
        measured: Numbers of signals by name for each site number, by step and branch. A number that is missing at a
            step is undefined there.
    """
    given = frozenset(name for sites in measured.values() for numbers in sites.values() for name in numbers)
    every = {
        (tick.step, tick.branch): {
            site.index: measured.get((tick.step, tick.branch), {}).get(site.index, {}) for site in plan.sites
        }
        for tick in ticks
    }
    return _open(plan, given, lambda bound: replay(bound, ticks, signals=every))


def _open(plan: Plan, given: frozenset[str], run: Callable[[Plan], Schedule]) -> Schedule:
    unknown = _Unknown(plan, given)
    by_rule = {bound.index: names for bound in plan.rules if bound.sites and (names := unknown.read_by(bound))}
    if not by_rule:
        return run(plan)
    either = tuple(unknown.settled(value=value) for value in (True, False))
    least, most = map(run, either)
    doubtful = _doubtful(either, least, most)
    decisions = {
        call: [
            _opened(one, other, plan, by_rule) if (call, site) in doubtful or one.verdict != other.verdict else one
            for site, (one, other) in enumerate(zip(made, most.decisions[call], strict=True))
        ]
        for call, made in least.decisions.items()
    }
    names = tuple(dict.fromkeys(name for names in by_rule.values() for name in names))
    return Schedule(plan, least.ticks, decisions, most=replace(most, plan=plan), signals=names)


def _opened(least: Decision, most: Decision, plan: Plan, by_rule: Mapping[int, Sequence[str]]) -> OpenDecision:
    """Returns the decision of the least cost as one that a signal makes."""
    owner = next((decision.rule for decision in (least, most) if decision.rule in by_rule), None)
    condition = None if owner is None else plan.rules[owner].rule.condition
    reason = "it follows from what a signal decides"
    if condition is not None:
        reason = f"it reuses if `{format_node(condition)}`, as far as the rule allows"
    return OpenDecision(least.verdict, reason, least.rule, least.action, least.accumulated)


def _doubtful(either: Sequence[Plan], least: Schedule, most: Schedule) -> set[tuple[tuple[str, int], int]]:
    """Returns the calls, by branch and step, and the site numbers whose verdict depends on a signal.

    At each step, every state that the steps before may have left a site in is decided with the unknown comparisons
    true and with them false.
    """
    first, second = (prepare(plan) for plan in either)
    doubtful = set[tuple[tuple[str, int], int]]()
    for branch in least.branches:
        ticks = [tick for tick in least.ticks if tick.branch == branch]
        hiding = list[list[set[bool]]]()
        for reusing, computing in zip(first.alike.groups, second.alike.groups, strict=True):
            rules = [reusing.rules, computing.rules]
            around = [hiding[parent] for parent in reusing.parents]
            states: Iterable[Memory] = [FRESH]
            own = list[set[bool]]()
            for index, tick in enumerate(ticks):
                call, site = (branch, tick.step), reusing.sites[0]
                known = least.decisions[call][site].inputs or most.decisions[call][site].inputs
                inputs = Inputs(tick, FRESH, {}, first.tables) if known is None else known
                hidden = [parent[index] for parent in around]
                outcomes = list(_outcomes(rules, states, inputs, hidden))
                if len({decision.verdict for decision, _ in outcomes}) > 1:
                    doubtful |= {(call, member) for member in reusing.sites}
                own.append({hides(decision, branch) or decision is HIDDEN for decision, _ in outcomes})
                states = {_state(rules[0], memory): memory for _, memory in outcomes}.values()
            hiding.append(own)
    return doubtful


def _outcomes(
    rules: Sequence[Sequence[BoundRule]], states: Iterable[Memory], inputs: Inputs, hidden: Sequence[set[bool]]
) -> Iterator[tuple[Decision, Memory]]:
    """Yields the possible decisions of a group at a call, each with the memory after it."""
    for memory in states:
        here = replace(inputs, memory=memory)
        if any(True in may for may in hidden):
            yield HIDDEN, advance(rules[0], here, HIDDEN)
        if all(False in may for may in hidden):
            for settled in rules:
                decision = decide(settled, here)
                yield decision, advance(settled, here, decision)


def _state(rules: Sequence[BoundRule], memory: Memory) -> tuple[object, ...]:
    """Returns what tells two memories of a group apart: the last compute, and what else its rules read."""
    read = set[str]().union(*(names_in(bound.rule) for bound in rules))
    whole = max((whole_results(bound.rule.action) for bound in rules), default=0)
    counted = [bound.index for bound in rules if any(limit.scope == "all" for limit in bound.rule.bounds)]
    return (
        memory.last,
        memory.half if memory.half is not None and memory.half < whole else None,
        memory.gap if "gap" in read else None,
        memory.computes if "computes" in read else None,
        *(memory.reuses.get(rule, 0) for rule in counted),
    )


class _Unknown:
    """The parts of conditions that are not known before a run: what only a run can measure and is not given."""

    def __init__(self, plan: Plan, given: frozenset[str]) -> None:
        self._plan = plan
        self._values = close_signals(plan.resolved.signals, given)
        self._externals = frozenset(plan.resolved.externals) - given

    def read_by(self, bound: BoundRule) -> list[str]:
        """Returns the names of the unknown signals in the `while` of a rule."""
        condition = bound.rule.condition
        if condition is None or not self._reads(condition):
            return []
        read = [name for name, value in self._values.items() if self._reads(value) and name in names_in(condition)]
        read += [name for name in self._plan.resolved.externals if name in self._externals & names_in(condition)]
        return read or [format_node(condition)]

    def _reads(self, node: ir.Expression) -> bool:
        parts = list(walk(substitute(node, self._values)))
        return any(
            isinstance(part, ir.Probe)
            or is_measured(part)
            or (isinstance(part, ir.Name) and part.name in self._externals)
            for part in parts
        )

    def settled(self, *, value: bool) -> Plan:
        """Returns the plan in which every unknown comparison makes its `while` as true (or false) as it can."""
        rules = tuple(
            bound
            if bound.rule.condition is None
            else replace(
                bound,
                rule=bound.rule.model_copy(update={"condition": self._settled(bound.rule.condition, value=value)}),
            )
            for bound in self._plan.rules
        )
        return replace(self._plan, rules=rules)

    def _settled(self, node: ir.Expression, *, value: bool) -> ir.Expression:
        if not self._reads(node):
            return node
        match node:
            case ir.Both() | ir.Either():
                operands = tuple(self._settled(operand, value=value) for operand in node.operands)
                return node.model_copy(update={"operands": operands})
            case ir.Negation():
                return node.model_copy(update={"operand": self._settled(node.operand, value=not value)})
            case _:
                return ir.Boolean(value=value)
