"""The decision function: compute or reuse, for every site, step and branch, and why. Pure, total, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, assert_never

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.traversal import names_in
from cachepolicy.language.vocabulary import KEPT_LIMIT
from cachepolicy.planning.plan import BoundRule, Plan

OVER_LIMIT = "over the memory limit"
"""The fact of a site that computes because its history does not fit the memory limit."""

WHILE_IS_FALSE = "its `while` is false"
"""The reason of a compute whose owner's condition does not hold."""

Verdict = Literal["compute", "reuse", "hidden"]


@dataclass(frozen=True, slots=True)
class Tick:
    """The clock at one call of the root model.

    `step` counts scheduler steps from 0; `t` is the timestep in training units (0..1000); `steps` and `sigma` are None
    where the run does not tell; `branch` names the guidance branch ("" where there is one).
    """

    step: int
    t: float | None = None
    steps: int | None = None
    sigma: float | None = None
    branch: str = ""
    uncond_skipped: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """What a decision knows of a site's past on one branch. Never changed, only replaced."""

    last: int | None = None
    computes: int = 0
    reuses: Mapping[int, int] = field(default_factory=dict[int, int])
    accumulated: Mapping[tuple[int, ir.Call], float] = field(default_factory=dict[tuple[int, ir.Call], float])
    previous: Mapping[ir.Expression, float] = field(default_factory=dict[ir.Expression, float])
    kept: Mapping[ir.Expression, tuple[float, ...]] = field(default_factory=dict[ir.Expression, tuple[float, ...]])
    seen: int | None = None

    def age(self, step: int) -> int:
        """Steps since the last compute; before the first, step + 1."""
        return step - self.last if self.last is not None else step + 1


FRESH = Memory()


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a site at one call, by which rule, and why.

    `rule` is the owner's number among the policy's rules (None: no rule owns the site), `action` what the owner does
    when it reuses. `inputs` are the numbers the decision was made from; `explain` needs no others.
    """

    verdict: Verdict
    reason: str
    rule: int | None = None
    action: ir.Action | None = None
    accumulated: Mapping[tuple[int, ir.Call], float] = field(default_factory=dict[tuple[int, ir.Call], float])
    inputs: Inputs | None = field(default=None, repr=False, compare=False)

    @property
    def computes(self) -> bool:
        """True where the site's own forward runs."""
        return self.verdict == "compute"

    @property
    def letter(self) -> str:
        """`C` computes, `R` reuses, `.` is hidden inside a site that reuses."""
        return {"compute": "C", "reuse": "R", "hidden": "."}[self.verdict]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that one decision was made from."""

    tick: Tick
    memory: Memory
    signals: Mapping[str, float]
    tables: Mapping[str, Sequence[int | float]]
    followed: Mapping[str, Decision] = field(default_factory=dict[str, "Decision"])
    fact: str | None = None


HIDDEN = Decision("hidden", "inside a site that reuses")
WAITING = Decision("compute", "waits for its signals")
"""Stands for a decision that cannot be made before the signals of its rule are measured."""


# --- one site --------------------------------------------------------------------------------------------


def decide(rules: Sequence[BoundRule], inputs: Inputs) -> Decision:
    """Compute or reuse, for one site at one call; the first rule whose `when` holds owns it.

    `inputs.fact` is what only the run can know (the history does not fit, memory is short): it turns a reuse into a
    compute and is the reason then.
    """
    owner = owner_of(rules, inputs)
    if owner is None:
        return Decision("compute", "no rule owns it", inputs=inputs)
    return _owned(owner, inputs, environment_of(owner, inputs))


def owner_of(rules: Sequence[BoundRule], inputs: Inputs) -> BoundRule | None:
    """The first rule whose `when` holds; it needs the clock alone."""
    for bound in rules:
        if bound.rule.when is None or holds(
            bound.rule.when, Environment(clock_words(inputs.tick, inputs.memory), inputs.tables)
        ):
            return bound
    return None


def _owned(bound: BoundRule, inputs: Inputs, environment: Environment) -> Decision:
    rule, memory, tick = bound.rule, inputs.memory, inputs.tick
    environment, accumulated = accumulate(bound, inputs, environment)

    def verdict(verdict: Verdict, reason: str) -> Decision:
        return Decision(verdict, reason, bound.index, rule.action, accumulated, inputs)

    if isinstance(rule.action, ir.Compute):
        return verdict("compute", "the rule computes")
    if isinstance(rule.action, ir.ApproximateUncond) and tick.branch in COND_BRANCHES:
        return verdict("compute", "the conditional call computes")
    if rule.follow is not None and tick.branch != rule.follow:
        reason = unfollowed(bound, inputs)
        return verdict("compute", reason) if reason else _answered(bound, inputs, verdict)
    if rule.schedule is not None and due(rule.schedule, environment):
        return verdict("compute", "its schedule says so")
    if not holds(rule.condition, environment):
        return verdict("compute", WHILE_IS_FALSE)
    for bound_clause in rule.bounds:
        if not within(bound_clause, bound.index, memory, tick, environment):
            scope = "in a row" if bound_clause.scope == "row" else "in all"
            return verdict("compute", f"at most so many {scope}")
    return _answered(bound, inputs, verdict)


def _answered(bound: BoundRule, inputs: Inputs, verdict: Any) -> Decision:
    if not isinstance(bound.rule.action, ir.Skip) and inputs.memory.computes == 0:
        return verdict("compute", "nothing is kept yet")
    if inputs.fact is not None:
        return verdict("compute", inputs.fact)
    return verdict("reuse", "the rule reuses")


def unfollowed(bound: BoundRule, inputs: Inputs) -> str:
    """Why a following branch computes; empty where it may reuse."""
    followed = inputs.followed.get(bound.rule.follow or "")
    if followed is None:
        return f"`{bound.rule.follow}` has not run in this step"
    if followed.rule != bound.index or followed.verdict != "reuse":
        return f"`{bound.rule.follow}` computed"
    return ""


def due(schedule: ir.ScheduleClause, environment: Environment) -> bool:
    """True where the schedule says compute; also where a number that it reads is undefined."""
    step: int = environment.names["step"]
    try:
        match schedule:
            case ir.Every():
                return _every(schedule, step, environment)
            case ir.OnSteps():
                steps = evaluate(schedule.steps, environment)
                return steps is None or step in steps
            case ir.Mask():
                mask = evaluate(schedule.mask, environment)
                return mask is None or step >= len(mask) or mask[step] == "1"
            case _:
                assert_never(schedule)
    except Undefined:
        return True


def floored(number: Any) -> Any:
    """Rounds the number of a schedule or bound down. `None` stands for `off`."""
    return math.floor(number) if number is not None and math.isfinite(number) else number


def _every(schedule: ir.Every, step: int, environment: Environment) -> bool:
    interval = floored(evaluate(schedule.interval, environment))
    if interval is None or interval <= 0:
        return True
    match schedule.anchor:
        case "start":
            offset = 0 if schedule.offset is None else math.floor(evaluate(schedule.offset, environment))
            return (step - offset) % interval == 0
        case "end":
            return (evaluate(_STEPS, environment) - 1 - step) % interval == 0
        case "compute":
            return environment.names["age"] >= interval
        case _:
            assert_never(schedule.anchor)


_STEPS = ir.Name(name="steps")


def within(bound: ir.Bound, rule: int, memory: Memory, tick: Tick, environment: Environment) -> bool:
    """True where one more reuse stays within the bound."""
    try:
        count = floored(evaluate(bound.count, environment))
    except Undefined:
        return False
    if count is None:
        return True
    return memory.age(tick.step) <= count if bound.scope == "row" else memory.reuses.get(rule, 0) < count


def holds(clause: ir.Expression | None, environment: Environment) -> bool:
    """True where the clause is true; false where a number that it reads is undefined."""
    if clause is None:
        return True
    try:
        return bool(evaluate(clause, environment))
    except Undefined:
        return False


def clock_words(tick: Tick, memory: Memory) -> dict[str, Any]:
    """The clock as the names of the language; what the run does not tell is None."""
    steps = tick.steps
    progress = None if steps is None else tick.step / (steps - 1) if steps > 1 else 0.0
    return {
        "step": tick.step,
        "t": tick.t,
        "steps": steps,
        "progress": progress,
        "sigma": tick.sigma,
        "branch": tick.branch,
        "uncond_skipped": tick.uncond_skipped,
        "age": memory.age(tick.step),
    }


def environment_of(bound: BoundRule, inputs: Inputs) -> Environment:
    """What the clauses of a rule are evaluated in."""
    names = {**inputs.signals, **clock_words(inputs.tick, inputs.memory)}
    if not bound.memories:
        return Environment(names, inputs.tables)
    return Environment(names, inputs.tables, _remembered(bound.memories, inputs, names))


def _remembered(calls: Sequence[ir.Call], inputs: Inputs, names: Mapping[str, Any]) -> dict[ir.Call, float]:
    """What each `prev` and `kept` of the clause is worth now; those without a value are left out."""
    memory, step = inputs.memory, inputs.tick.step
    values = dict[ir.Call, float]()
    for call in calls:
        what = call.arguments[0]
        if call.function == "prev":
            if memory.seen == step - 1 and what in memory.previous:
                values[call] = memory.previous[what]
            continue
        depth = 1 if len(call.arguments) == 1 else int(evaluate(call.arguments[1], Environment(names)))
        kept = memory.kept.get(what, ())
        if 0 < depth <= len(kept):
            values[call] = kept[depth - 1]
    return values


_Accumulated = dict[tuple[int, ir.Call], float]


def accumulate(
    bound: BoundRule, inputs: Inputs, environment: Environment
) -> tuple[Environment, Mapping[tuple[int, ir.Call], float]]:
    """The clause's `sum`s and `product`s advanced by this step, the inner ones first."""
    if not bound.accumulators:
        return environment, {}
    advanced: _Accumulated = {}
    for call in bound.accumulators:
        key = (bound.index, call)
        start = 0.0 if call.function == "sum" else 1.0
        before = inputs.memory.accumulated.get(key, start)
        try:
            now = evaluate(call.arguments[0], environment)
            value = before + now if call.function == "sum" else before * now
        except Undefined:
            value = float("nan")
        advanced[key] = value
        environment = replace(environment, stateful={**environment.stateful, call: value})  # pyright: ignore[reportUnhashable]
    return environment, advanced


def advance(rules: Sequence[BoundRule], inputs: Inputs, decision: Decision) -> Memory:
    """The site's memory after the call: ages count on, counts and kept values follow what was decided."""
    memory, step = inputs.memory, inputs.tick.step
    now = _measured(rules, inputs)
    previous, seen = (now, step) if now else (memory.previous, memory.seen)
    match decision.verdict:
        case "hidden":
            return memory if not now else replace(memory, previous=previous, seen=seen)
        case "reuse":
            owner = -1 if decision.rule is None else decision.rule
            counted = {**memory.reuses, owner: memory.reuses.get(owner, 0) + 1}
            kept_on = {**memory.accumulated, **decision.accumulated}
            return Memory(memory.last, memory.computes, counted, kept_on, previous, memory.kept, seen)
        case "compute":
            kept = {what: (value, *memory.kept.get(what, ()))[:KEPT_LIMIT] for what, value in now.items()}
            return Memory(step, memory.computes + 1, memory.reuses, {}, previous, kept, seen)
        case _:
            assert_never(decision.verdict)


def _measured(rules: Sequence[BoundRule], inputs: Inputs) -> dict[ir.Expression, float]:
    """The numbers below `prev` and `kept` as they are at this step, also where no rule owns the site."""
    values = dict[ir.Expression, float]()
    for bound in rules:
        if not bound.memories:
            continue
        environment = environment_of(bound, inputs)
        for call in bound.memories:
            try:
                values[call.arguments[0]] = evaluate(call.arguments[0], environment)
            except Undefined:
                values[call.arguments[0]] = float("nan")
    return values


# --- all sites of a call ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Sites that share rules and past, so that one decision holds for all: its sites, and the groups around it."""

    rules: tuple[BoundRule, ...]
    sites: tuple[int, ...]
    parents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Partition:
    """All sites of a plan in groups, outer groups before those that they can hide."""

    groups: tuple[Group, ...]
    group_of: tuple[int, ...]

    def spread(self, decisions: Sequence[Decision]) -> list[Decision]:
        """The decisions by site number, from those by group."""
        return [decisions[group] for group in self.group_of]

    def start(self) -> list[Memory]:
        """The memories of a trajectory that has not begun, by group."""
        return [FRESH] * len(self.groups)


@dataclass(frozen=True, slots=True)
class Program:
    """A plan laid out for deciding: `coarse` while all sites of a group have the same past, else `fine`.

    Sites of equal rules in equal surroundings differ only by facts of the run (`Inputs.fact`); after the first of
    those a
    trajectory goes on with one group per site.
    """

    plan: Plan
    coarse: Partition
    fine: Partition
    tables: Mapping[str, Sequence[int | float]]
    measured: frozenset[int]
    """The rules whose `while` reads signals."""
    alike: Partition
    """Sites of equal rules in equal surroundings together, whatever their signals."""

    def split(self, memories: Sequence[Memory]) -> list[Memory]:
        """Memories by group of `coarse`, as memories by group of `fine`."""
        return [memories[self.coarse.group_of[group.sites[0]]] for group in self.fine.groups]


def prepare(plan: Plan) -> Program:
    """Lay a plan out for `decide_all`."""
    rules = [plan.groups.rules[plan.groups.group_of[site.index]] for site in plan.sites]
    names = {signal.name for signal in plan.resolved.signals}
    measured = frozenset(
        bound.index
        for bound in plan.rules
        if bound.rule.condition is not None and names & names_in(bound.rule.condition)
    )
    fine = _partition(plan, rules, coarse=False)
    # Signals may be worth something else at each site, so that sites of one rule part.
    alike = _partition(plan, rules, coarse=True)
    return Program(plan, fine if measured else alike, fine, plan.resolved.tables, measured, alike)


def _partition(plan: Plan, rules: Sequence[tuple[BoundRule, ...]], *, coarse: bool) -> Partition:
    keys = dict[int, tuple[object, ...]]()
    numbers = dict[tuple[object, ...], int]()
    members = list[list[int]]()
    around = list[tuple[int, ...]]()
    for site in sorted(plan.sites, key=lambda site: len(site.parents)):
        parents = tuple(numbers[keys[parent]] for parent in site.parents)
        key = (id(rules[site.index]), parents) if coarse else (site.index,)
        keys[site.index] = key
        if key not in numbers:
            numbers[key] = len(members)
            members.append([])
            around.append(parents)
        members[numbers[key]].append(site.index)
    groups = tuple(
        Group(rules[sites[0]], tuple(sites), parents) for sites, parents in zip(members, around, strict=True)
    )
    return Partition(groups, tuple(numbers[keys[site.index]] for site in plan.sites))


def decide_all(
    program: Program,
    partition: Partition,
    memories: Sequence[Memory],
    tick: Tick,
    *,
    signals: Mapping[str, float] | None = None,
    signals_of: Mapping[int, Mapping[str, float]] | None = None,
    followed: Mapping[str, Sequence[Decision]] | None = None,
    facts: Mapping[int, str] | None = None,
) -> tuple[list[Decision], list[Memory]]:
    """Decide every group at one call; gives the decisions and the memories after it, by group number.

    `signals` are the same for all sites. A run measures them at each site instead: with `signals_of`, by site number, a
    group whose rule reads signals that are not there yet is `WAITING`. `followed` holds the decisions of the
    followed branches, by name and site number. `facts` by site number ask for `program.fine`.
    """
    given = signals or {}
    decisions = list[Decision]()
    after = list[Memory]()
    for group, memory in zip(partition.groups, memories, strict=True):
        site = group.sites[0]
        leaders = {name: decided[site] for name, decided in followed.items()} if followed else _NO_LEADERS
        here = given if signals_of is None else signals_of.get(site, given)
        inputs = Inputs(tick, memory, here, program.tables, leaders, facts.get(site) if facts else None)
        if group.parents and any(hides(decisions[parent], tick.branch) for parent in group.parents):
            decision = HIDDEN
        elif signals_of is not None and site not in signals_of and _waits(program, group, inputs):
            decisions.append(WAITING)
            after.append(memory)
            continue
        else:
            decision = decide(group.rules, inputs)
        decisions.append(decision)
        after.append(advance(group.rules, inputs, decision))
        if isinstance(decision.action, ir.ApproximateUncond) and decision.verdict == "reuse":
            tick = replace(tick, uncond_skipped=True)
    return decisions, after


def rebuilds_uncond(program: Program, partition: Partition, memories: Sequence[Memory], tick: Tick) -> bool:
    """Whether the unconditional call at `tick` will be answered: then the conditional one of its step runs alone."""
    for group, memory in zip(partition.groups, memories, strict=True):
        if any(isinstance(bound.rule.action, ir.ApproximateUncond) for bound in group.rules):
            decision = decide(group.rules, Inputs(tick, memory, {}, program.tables))
            return decision.verdict == "reuse" and isinstance(decision.action, ir.ApproximateUncond)
    return False


_NO_LEADERS: Mapping[str, Decision] = {}


def _waits(program: Program, group: Group, inputs: Inputs) -> bool:
    if not program.measured:
        return False
    owner = owner_of(group.rules, inputs)
    return owner is not None and owner.index in program.measured


def hides(decision: Decision, branch: str) -> bool:
    """Return True if the sites inside do not run.

    A model whose unconditional half is rebuilt runs for the conditional half of a batch. An unconditional call of its
    own is answered, and nothing runs.
    """
    runs = isinstance(decision.action, ir.ApproximateUncond) and branch not in UNCOND_BRANCHES
    return decision.verdict == "reuse" and not runs


def follows(plan: Plan) -> frozenset[str]:
    """The branches that some rule follows."""
    return frozenset(rule.rule.follow for rule in plan.rules if rule.rule.follow is not None)


def untold(plan: Plan, tick: Tick) -> PolicyError | None:
    """The error to raise where the clock does not tell what the policy reads, or a mask has another length.

    Called once at the start of a trajectory; `decide` itself computes when in doubt and never raises.
    """
    words = clock_words(tick, FRESH)
    missing = [word for word in sorted(plan.needs) if words.get(word) is None]
    if missing:
        named = ", ".join(f"`{word}`" for word in missing)
        return PolicyError.of(
            "E250", f"the policy reads {named}, which this run does not tell", help=_HOW.get(missing[0])
        )
    for bound in plan.rules:
        schedule = bound.rule.schedule
        if isinstance(schedule, ir.Mask) and isinstance(schedule.mask, ir.Text) and tick.steps is not None:
            length = len(schedule.mask.value)
            if length != tick.steps:
                message = f"a mask of {counted(length, 'letter')} on a run of {counted(tick.steps, 'step')}"
                return PolicyError.of("E251", message, help="one letter a step: 1 computes, 0 reuses")
    return None


_HOW = {
    "steps": "pass `steps=` to `apply`, or apply to the pipeline",
    "progress": "pass `steps=` to `apply`, or apply to the pipeline",
    "sigma": "pass `scheduler=` to `apply`, or apply to the pipeline",
    "t": "pass `timestep=` to `apply`: a function that returns the current timestep",
}
