"""The decision function: compute or reuse, for every site, step and branch, and why. It is pure and total."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, assert_never

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.traversal import names_in
from cachepolicy.language.vocabulary import KEPT_LIMIT, LASTING, WINDOW_LIMIT
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import feedback, is_mean, is_whole, needed_results, whole_results
from cachepolicy.planning.plan import BoundRule, Plan, measured_clauses

DUE = "its schedule says so"
"""The reason of a decision at a step at which the schedule of its rule computes."""

WHILE_IS_FALSE = "its `while` is false"
"""The reason of a compute whose owner's condition does not hold."""

UNDEFINED_ARGUMENT = "an argument of its action has no value"
"""The reason of a site that computes because its action reads a number that is missing or not finite."""

HALF_KEPT = "the history holds half of the guidance batch"
"""The reason of a site that computes in a call of a whole guidance batch, because it lately ran on half of one."""

HALF_CALLED = "its predictor works on no half of a guidance batch"
"""The reason of a site that computes in a call of half a guidance batch, which `align` and `band` do not answer."""

UNOWNED = "no rule owns it"
RULE_COMPUTES = "the rule computes"
COND_COMPUTES = "the conditional call computes"
TWO_CALLS = "both halves of guidance have a call of their own"
BOUND_IN_A_ROW = "at most so many in a row"
BOUND_IN_ALL = "at most so many in all"
ANSWERS = "the rule reuses"

NOT_CALLED = "the model did not call it"
"""The fact of a site that a forward pass has not called. It neither computes nor reuses, as a hidden site."""

Accumulated = Mapping[tuple[int, ir.Call], float | bool]
"""Values of accumulators by rule number and call."""

Tables = Mapping[str, Sequence[int | float]]
"""Values of tables by name."""

Verdict = Literal["compute", "reuse", "hidden"]


# The four classes below are frozen for the type checker only: several instances are made at each call of the root
# model, and `__init__` of a frozen dataclass takes four times as long.


@dataclass(frozen=TYPE_CHECKING, slots=True, unsafe_hash=True)
class Tick:
    """The clock at one call of the root model.

    Attributes:
        step: Number of the scheduler step, from 0.
        t: Timestep in training units, 0 to 1000.
        steps: Number of steps; None if not known.
        sigma: Sigma of the step; None if not known.
        branch: Name of the guidance branch, "" if there is only one.
        uncond_skipped: Whether the call computes the conditional half only.
    """

    step: int
    t: float | None = None
    steps: int | None = None
    sigma: float | None = None
    branch: str = ""
    uncond_skipped: bool = False

    @property
    def halved(self) -> bool:
        """True where the call runs half of a guidance batch. Calls of named branches run one half each."""
        return self.uncond_skipped and self.branch not in COND_BRANCHES | UNCOND_BRANCHES


@dataclass(frozen=TYPE_CHECKING, slots=True, unsafe_hash=True)
class Memory:
    """What a decision knows of the past of a site on one branch. It is never changed.

    Attributes:
        last: Step of the last compute.
        computes: Number of computes.
        reuses: Number of reuses by rule number.
        accumulated: Values of accumulators by rule number and call.
        previous: Numbers at the last step that were measured, by the expression below `prev`.
        kept: Numbers at the last computes, newest first, by the expression below `kept`.
        seen: Step of `previous`.
        half: How many results are newer than the newest one of half a guidance batch; None if no such result is near.
        gap: Steps between the last two computes; None before the second.
    """

    last: int | None = None
    computes: int = 0
    reuses: Mapping[int, int] = field(default_factory=dict[int, int])
    accumulated: Accumulated = field(default_factory=dict[tuple[int, ir.Call], "float | bool"])
    previous: Mapping[ir.Expression, float] = field(default_factory=dict[ir.Expression, float])
    kept: Mapping[ir.Expression, tuple[float, ...]] = field(default_factory=dict[ir.Expression, tuple[float, ...]])
    seen: int | None = None
    half: int | None = None
    gap: int | None = None

    def age(self, step: int) -> int:
        """Returns the steps since the last compute; before the first compute, step + 1."""
        return step - self.last if self.last is not None else step + 1


FRESH = Memory()


@dataclass(frozen=TYPE_CHECKING, slots=True, unsafe_hash=True)
class Decision:
    """What happens to a site at one call, and why.

    Attributes:
        verdict: Compute, reuse, or hidden: in a site that reuses, or because the model did not call the site.
        reason: The reason in words.
        rule: Number of the rule that owns the site; None if no rule does.
        action: The action of that rule.
        accumulated: Accumulators of the rule after this call.
        inputs: All that the decision was made from.
    """

    verdict: Verdict
    reason: str
    rule: int | None = None
    action: ir.Action | None = None
    accumulated: Accumulated = field(default_factory=dict[tuple[int, ir.Call], "float | bool"])
    inputs: Inputs | None = field(default=None, repr=False, compare=False)

    @property
    def computes(self) -> bool:
        """True where the forward of the site runs."""
        return self.verdict == "compute"

    @property
    def letter(self) -> str:
        """`C` computes, `R` reuses, `.` is hidden inside a site that reuses."""
        return {"compute": "C", "reuse": "R", "hidden": "."}[self.verdict]

    @property
    def verb(self) -> str:
        """The verdict in a sentence about the site: it `computes`, `reuses` or `is hidden`."""
        return {"compute": "computes", "reuse": "reuses", "hidden": "is hidden"}[self.verdict]


@dataclass(frozen=TYPE_CHECKING, slots=True, unsafe_hash=True)
class Inputs:
    """All that one decision is made from.

    Attributes:
        tick: The clock.
        memory: The past of the site.
        signals: Numbers of signals and externals by name.
        tables: Tables by name.
        followed: Decisions of the same site on followed branches, by branch.
        fact: What only the run knows. It turns a reuse into a compute and is the reason then.
    """

    tick: Tick
    memory: Memory
    signals: Mapping[str, float]
    tables: Tables
    followed: Mapping[str, Decision] = field(default_factory=dict[str, "Decision"])
    fact: str | None = None


HIDDEN = Decision("hidden", "inside a site that reuses")
UNCALLED = Decision("hidden", NOT_CALLED)
WAITING = Decision("compute", "waits for its signals")
"""A decision that cannot be made before the signals of its rule are measured."""


# --- one site --------------------------------------------------------------------------------------------


def decide(rules: Sequence[BoundRule], inputs: Inputs) -> Decision:
    """Decides one site at one call. The first rule whose `when` holds owns it.

    Args:
        rules: The rules of the site, in the order of the policy.
        inputs: The clock, the memory and the measured numbers.
    """
    owner = owner_of(rules, inputs)
    if owner is None:
        return Decision("compute", UNOWNED, inputs=inputs)
    return _owned(owner, inputs, environment_of(owner, inputs))


def owner_of(rules: Sequence[BoundRule], inputs: Inputs) -> BoundRule | None:
    """Returns the first rule whose `when` holds. It depends on the clock and the memory only."""
    environment = None
    for bound in rules:
        if bound.rule.when is None:
            return bound
        environment = environment or Environment(clock_words(inputs.tick, inputs.memory), inputs.tables)
        if holds(bound.rule.when, environment):
            return bound
    return None


def _owned(bound: BoundRule, inputs: Inputs, environment: Environment) -> Decision:
    rule, memory, tick = bound.rule, inputs.memory, inputs.tick
    environment, accumulated = accumulate(bound, inputs, environment)

    def verdict(verdict: Verdict, reason: str) -> Decision:
        return Decision(verdict, reason, bound.index, rule.action, accumulated, inputs)

    if isinstance(rule.action, ir.Compute):
        return verdict("compute", RULE_COMPUTES)
    if isinstance(rule.action, ir.ApproximateUncond) and tick.branch in COND_BRANCHES:
        return verdict("compute", COND_COMPUTES)
    if is_mean(rule.action) and tick.branch in COND_BRANCHES | UNCOND_BRANCHES:
        return verdict("compute", TWO_CALLS)
    if rule.follow is not None and tick.branch not in (rule.follow, ""):
        reason = unfollowed(bound, inputs)
        return verdict("compute", reason) if reason else _answered(bound, inputs, environment, verdict)
    if rule.schedule is not None and due(rule.schedule, environment):
        return verdict("compute", DUE)
    if not holds(rule.condition, environment):
        return verdict("compute", WHILE_IS_FALSE)
    for bound_clause in rule.bounds:
        if not within(bound_clause, bound.index, memory, tick, environment):
            return verdict("compute", BOUND_IN_A_ROW if bound_clause.scope == "row" else BOUND_IN_ALL)
    return _answered(bound, inputs, environment, verdict)


def _answered(bound: BoundRule, inputs: Inputs, environment: Environment, verdict: Any) -> Decision:
    missing = History(bound.rule.action).missing(inputs)
    if missing is not None:
        return verdict("compute", missing)
    if undefined_argument(bound, environment) is not None:
        return verdict("compute", UNDEFINED_ARGUMENT)
    if inputs.fact is not None:
        return verdict("compute", inputs.fact)
    return verdict("reuse", ANSWERS)


class History:
    """What an action needs of the results of a site before it can answer.

    Args:
        action: The action.

    Attributes:
        needed: How many results there must be.
    """

    __slots__ = ("_halves", "_mean", "_whole", "needed")

    def __init__(self, action: ir.Action) -> None:
        self.needed = needed_results(action)
        self._whole = whole_results(action)
        self._halves = not is_whole(action)
        self._mean = is_mean(action)

    def missing(self, inputs: Inputs, _slots: object = None) -> str | None:
        """Returns the reason if the results of the site or the rows of the call do not let the action answer."""
        half = inputs.memory.half
        if inputs.memory.computes < self.needed:
            return Fact.NO_HISTORY
        if inputs.tick.halved and not self._halves:
            return HALF_CALLED
        if inputs.tick.halved and not self._mean:
            return None
        return HALF_KEPT if half is not None and half < self._whole else None


def undefined_argument(bound: BoundRule, environment: Environment) -> ir.Argument | None:
    """Returns the first argument of the action that the clock tells and that has no value now."""
    for argument in bound.arguments:
        try:
            evaluate(argument.value, environment)
        except Undefined:
            return argument
    return None


def unfollowed(bound: BoundRule, inputs: Inputs) -> str:
    """Returns why a following branch computes, or an empty text if it may reuse."""
    followed = inputs.followed.get(bound.rule.follow or "")
    if followed is None:
        return f"`{bound.rule.follow}` has not run in this step"
    if followed.rule != bound.index or followed.verdict != "reuse":
        return f"`{bound.rule.follow}` computed"
    return ""


def due(schedule: ir.ScheduleClause, environment: Environment) -> bool:
    """Returns whether the schedule says compute, or a number that it reads is undefined."""
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
            offset = 0 if schedule.offset is None else floored(evaluate(schedule.offset, environment))
            return (step - offset) % interval == 0
        case "end":
            return (evaluate(_STEPS, environment) - 1 - step) % interval == 0
        case "compute":
            return environment.names["age"] >= interval
        case _:
            assert_never(schedule.anchor)


_STEPS = ir.Name(name="steps")


def within(bound: ir.Bound, rule: int, memory: Memory, tick: Tick, environment: Environment) -> bool:
    """Returns whether another reuse stays within the bound."""
    try:
        count = floored(evaluate(bound.count, environment))
    except Undefined:
        return False
    if count is None:
        return True
    return memory.age(tick.step) <= count if bound.scope == "row" else memory.reuses.get(rule, 0) < count


def holds(clause: ir.Expression | None, environment: Environment) -> bool:
    """Returns whether a clause is true. It is false where a number that it reads is undefined."""
    if clause is None:
        return True
    try:
        return bool(evaluate(clause, environment))
    except Undefined:
        return False


def progress(step: int, steps: int | None) -> float | None:
    """Returns the clock word `progress`, from 0 to 1; None if the number of steps is not known."""
    return None if steps is None else step / (steps - 1) if steps > 1 else 0.0


def clock_words(tick: Tick, memory: Memory) -> dict[str, Any]:
    """Returns the clock as names of the language; None for what is not known."""
    return {
        "step": tick.step,
        "t": tick.t,
        "steps": tick.steps,
        "progress": progress(tick.step, tick.steps),
        "sigma": tick.sigma,
        "branch": tick.branch,
        "uncond_skipped": tick.uncond_skipped,
        "age": memory.age(tick.step),
        "gap": memory.gap,
        "computes": memory.computes,
    }


def environment_of(bound: BoundRule, inputs: Inputs) -> Environment:
    """Returns the environment in which the clauses of a rule are evaluated."""
    # A signal may be called like a clock word that was added later.
    names = {**clock_words(inputs.tick, inputs.memory), **inputs.signals}
    if not bound.memories:
        return Environment(names, inputs.tables)
    return Environment(names, inputs.tables, _remembered(bound.memories, inputs, names))


def _remembered(
    calls: Sequence[ir.Call], inputs: Inputs, names: Mapping[str, Any]
) -> dict[ir.Expression, float | bool]:
    """Returns the values of the `prev` and `kept` calls. Calls without a value are left out."""
    memory, step = inputs.memory, inputs.tick.step
    values = dict[ir.Expression, float | bool]()
    for call in calls:
        expression = call.arguments[0]
        if call.function == "prev":
            if memory.seen == step - 1 and expression in memory.previous:
                values[call] = memory.previous[expression]
            continue
        depth = 1 if len(call.arguments) == 1 else int(evaluate(call.arguments[1], Environment(names)))
        kept = memory.kept.get(expression, ())
        if 0 < depth <= len(kept):
            values[call] = kept[depth - 1]
    return values


def accumulate(bound: BoundRule, inputs: Inputs, environment: Environment) -> tuple[Environment, Accumulated]:
    """Returns the environment with the accumulators of a rule advanced by this step, and what they keep.

    An accumulator that reads an undefined number has no value at this step. `sum` and `product` have none until the
    next compute; the others keep what they had.
    """
    if not bound.accumulators:
        return environment, {}
    advanced = dict[tuple[int, ir.Call], float | bool]()
    for call in bound.accumulators:
        key = (bound.index, call)
        before = inputs.memory.accumulated.get(key)
        try:
            value = _accumulated(call, before, environment)
        except Undefined:
            value = float("nan")
        if call.function not in LASTING or not math.isnan(value):
            advanced[key] = value
        environment = replace(environment, stateful={**environment.stateful, call: value})  # pyright: ignore[reportUnhashable]
    return environment, advanced


def _accumulated(call: ir.Call, before: float | bool | None, environment: Environment) -> float | bool:
    """Returns the value of an accumulator at this step from its value before, None at its start."""
    if call.function == "latch":
        return before is True or bool(evaluate(call.arguments[0], environment))
    if call.function == "at_step":
        step, x = call.arguments
        if math.floor(evaluate(step, environment)) == environment.names["step"]:
            return evaluate(x, environment)
        return math.nan if before is None else before
    now = evaluate(call.arguments[0], environment)
    match call.function:
        case "product":
            return (1.0 if before is None else before) * now
        case "ema":
            share = evaluate(call.arguments[1], environment)
            return now if before is None else before + (now - before) * share
        case _:
            decay = [evaluate(argument.value, environment) for argument in call.labelled]
            return (0.0 if before is None else before) * (decay[0] if decay else 1) + now


def advance(rules: Sequence[BoundRule], inputs: Inputs, decision: Decision) -> Memory:
    """Returns the memory of a site after a call with a decision."""
    return advanced(inputs, decision, _measured(rules, inputs))


def advanced(inputs: Inputs, decision: Decision, now: Mapping[ir.Expression, float]) -> Memory:
    """Returns the memory of a site after a call with a decision.

    Args:
        inputs: What the decision was made from.
        decision: The decision.
        now: The numbers below `prev` and `kept` at this step.
    """
    memory, step = inputs.memory, inputs.tick.step
    previous, seen = (now, step) if now else (memory.previous, memory.seen)
    match decision.verdict:
        case "hidden":
            return memory if not now else replace(memory, previous=previous, seen=seen)
        case "reuse":
            owner = -1 if decision.rule is None else decision.rule
            counted = {**memory.reuses, owner: memory.reuses.get(owner, 0) + 1}
            more = decision.accumulated
            kept_on = {**memory.accumulated, **more} if more else memory.accumulated
            half = _half(inputs) if feedback(decision.action) else memory.half
            return Memory(memory.last, memory.computes, counted, kept_on, previous, memory.kept, seen, half, memory.gap)
        case "compute":
            # Most rules remember nothing. Then the empty tables of the memory go on.
            kept: Mapping[ir.Expression, tuple[float, ...]] = memory.kept
            if now or kept:
                kept = {key: (value, *kept.get(key, ()))[:KEPT_LIMIT] for key, value in now.items()}
            lasting: Accumulated = memory.accumulated
            if lasting or decision.accumulated:
                both = {**lasting, **decision.accumulated}
                lasting = {key: value for key, value in both.items() if key[1].function in LASTING}
            gap = None if memory.last is None else step - memory.last
            half = _half(inputs)
            return Memory(step, memory.computes + 1, memory.reuses, lasting, previous, kept, seen, half, gap)
        case _:
            assert_never(decision.verdict)


def _half(inputs: Inputs) -> int | None:
    """Returns `Memory.half` after a result of this call."""
    if inputs.tick.halved:
        return 0
    half = inputs.memory.half
    return None if half is None or half + 1 >= WINDOW_LIMIT else half + 1


def _measured(rules: Sequence[BoundRule], inputs: Inputs) -> dict[ir.Expression, float]:
    """Returns the numbers below `prev` and `kept` at this step, also where no rule owns the site."""
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


class Decider:
    """Decides sites by interpreting their rules. `lowered.LoweredRules` makes the same decisions without a walk.

    Args:
        rules: The rules of the sites, in the order of the policy.
    """

    __slots__ = ("rules",)

    def __init__(self, rules: Sequence[BoundRule]) -> None:
        self.rules = rules

    def __reduce__(self) -> tuple[Any, ...]:
        # Lowered rules are closures, which cannot be pickled. A copy interprets the rules.
        return Decider, (self.rules,)

    def owner(self, inputs: Inputs) -> BoundRule | None:
        """Returns the first rule whose `when` holds."""
        return owner_of(self.rules, inputs)

    def decide(self, inputs: Inputs) -> Decision:
        """Decides one site at one call."""
        return decide(self.rules, inputs)

    def advance(self, inputs: Inputs, decision: Decision) -> Memory:
        """Returns the memory of a site after a call with a decision."""
        return advance(self.rules, inputs, decision)


@dataclass(frozen=True, slots=True)
class Group:
    """Sites with equal rules and an equal past, which share one decision.

    Attributes:
        rules: Their rules.
        sites: Their numbers.
        parents: Numbers of the groups around them.
        decider: Decides them.
    """

    rules: tuple[BoundRule, ...]
    sites: tuple[int, ...]
    parents: tuple[int, ...]
    decider: Decider = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Partition:
    """All sites of a plan in groups, outer groups first.

    Attributes:
        groups: The groups.
        group_of: Group number of each site.
    """

    groups: tuple[Group, ...]
    group_of: tuple[int, ...]

    def spread(self, decisions: Sequence[Decision]) -> list[Decision]:
        """Returns decisions by site number from decisions by group number."""
        return [decisions[group] for group in self.group_of]

    def start(self) -> list[Memory]:
        """Returns the memories at the start of a trajectory, by group number."""
        return [FRESH] * len(self.groups)


@dataclass(frozen=True, slots=True)
class Program:
    """A plan prepared for deciding.

    Attributes:
        plan: The plan.
        coarse: Groups of sites with equal rules and equal groups around them. They have an equal past until a fact of
            the run concerns one of them; then the trajectory continues with `fine`.
        fine: One group for each site.
        tables: Tables by name.
        measured: Numbers of the rules whose `while` reads signals.
        externals: The externals that a `while` reads.
        alike: As `coarse`, also where rules read signals, which may differ from site to site.
    """

    plan: Plan
    coarse: Partition
    fine: Partition
    tables: Tables
    measured: frozenset[int]
    alike: Partition
    externals: tuple[str, ...]

    def split(self, memories: Sequence[Memory]) -> list[Memory]:
        """Returns memories by group of `fine` from memories by group of `coarse`."""
        return [memories[self.coarse.group_of[group.sites[0]]] for group in self.fine.groups]


def prepare(plan: Plan, decider: Callable[[Sequence[BoundRule]], Decider] = Decider) -> Program:
    """Prepares a plan for `decide_all`.

    Args:
        plan: The plan.
        decider: Makes what decides the sites with equal rules, from their rules.
    """
    rules = [plan.groups.rules[plan.groups.group_of[site.index]] for site in plan.sites]
    names = {signal.name for signal in plan.resolved.signals}
    read = {
        bound.index: set[str]().union(*(names_in(clause) for clause in clauses))
        for bound in plan.rules
        if (clauses := measured_clauses(bound.rule))
    }
    measured = frozenset(rule for rule, known in read.items() if names & known)
    externals = tuple(name for name in plan.resolved.externals if any(name in known for known in read.values()))
    deciders = {id(bound): decider(bound) for bound in plan.groups.rules}
    fine = _partition(plan, rules, deciders, coarse=False)
    # Signals may differ from site to site, so sites with equal rules may be decided differently.
    alike = _partition(plan, rules, deciders, coarse=True)
    return Program(plan, fine if measured else alike, fine, plan.resolved.tables, measured, alike, externals)


def _partition(
    plan: Plan, rules: Sequence[tuple[BoundRule, ...]], deciders: Mapping[int, Decider], *, coarse: bool
) -> Partition:
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
        Group(rules[sites[0]], tuple(sites), parents, deciders[id(rules[sites[0]])])
        for sites, parents in zip(members, around, strict=True)
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
    """Decides every group at one call.

    Args:
        program: The plan.
        partition: `program.coarse` or `program.fine`.
        memories: The memory of each group.
        tick: The clock.
        signals: Numbers of signals and externals that are equal at all sites.
        signals_of: Numbers that a run measured, by site number. A group whose rule reads numbers that are missing is
            `WAITING`.
        followed: Decisions of followed branches, by branch and site number.
        facts: What only the run knows, by site number. They need `program.fine`.

    Returns:
        The decisions and the memories after the call, by group number.
    """
    shared = signals or {}
    decisions = list[Decision]()
    after = list[Memory]()
    for group, memory in zip(partition.groups, memories, strict=True):
        site = group.sites[0]
        leaders = {name: decided[site] for name, decided in followed.items()} if followed else _NO_LEADERS
        numbers = shared if signals_of is None else signals_of.get(site, shared)
        if not (group.parents or facts) and signals_of is not None and site not in signals_of:
            first = group.rules[0]
            if first.rule.when is None and first.index in program.measured:
                decisions.append(WAITING)
                after.append(memory)
                continue
        inputs = Inputs(tick, memory, numbers, program.tables, leaders, facts.get(site) if facts else None)
        if group.parents and any(hides(decisions[parent], tick.branch) for parent in group.parents):
            decision = HIDDEN
        elif inputs.fact == NOT_CALLED:
            decision = UNCALLED
        elif signals_of is not None and site not in signals_of and _waits(program, group, inputs):
            decisions.append(WAITING)
            after.append(memory)
            continue
        else:
            decision = group.decider.decide(inputs)
        decisions.append(decision)
        after.append(group.decider.advance(inputs, decision))
        if isinstance(decision.action, ir.ApproximateUncond) and decision.verdict == "reuse":
            tick = replace(tick, uncond_skipped=True)
    return decisions, after


def rebuilds_uncond(program: Program, partition: Partition, memories: Sequence[Memory], tick: Tick) -> bool:
    """Returns whether the unconditional call at `tick` will be answered, so that the conditional call runs alone."""
    for group, memory in zip(partition.groups, memories, strict=True):
        if any(isinstance(bound.rule.action, ir.ApproximateUncond) for bound in group.rules):
            decision = group.decider.decide(Inputs(tick, memory, {}, program.tables))
            return decision.verdict == "reuse" and isinstance(decision.action, ir.ApproximateUncond)
    return False


_NO_LEADERS: Mapping[str, Decision] = {}


def _waits(program: Program, group: Group, inputs: Inputs) -> bool:
    if not program.measured:
        return False
    owner = group.decider.owner(inputs)
    return owner is not None and owner.index in program.measured


def hides(decision: Decision, branch: str) -> bool:
    """Returns True if the sites inside do not run.

    A model whose unconditional half is rebuilt runs for the conditional half of a batch. An unconditional call of its
    own is answered, and nothing runs.
    """
    runs = isinstance(decision.action, ir.ApproximateUncond) and branch not in UNCOND_BRANCHES
    return decision.verdict == "reuse" and not runs


def follows(plan: Plan) -> frozenset[str]:
    """Returns the branches that rules follow."""
    return frozenset(rule.rule.follow for rule in plan.rules if rule.rule.follow is not None)


def untold(plan: Plan, tick: Tick) -> PolicyError | None:
    """Returns the error of a clock that does not provide what the policy reads, or of a mask of another length.

    It is called once, at the start of a trajectory. `decide` computes when in doubt and does not raise.
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
