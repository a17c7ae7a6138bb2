"""Rules lowered to closures: they decide as `schedule.decide` does, without walking the expressions of the rules.

A closure reads the one number that it needs from the `Inputs` of a decision. The second argument of all closures of a
rule is the list of its accumulators at this step, in the order of `BoundRule.accumulators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.language import ir
from cachepolicy.language.closures import Closure, Compiler, Constant
from cachepolicy.language.evaluate import Undefined, finite
from cachepolicy.language.vocabulary import CLOCK, LASTING
from cachepolicy.planning.history_spec import is_mean
from cachepolicy.planning.plan import BoundRule
from cachepolicy.planning.schedule import (
    ANSWERS,
    BOUND_IN_A_ROW,
    BOUND_IN_ALL,
    COND_COMPUTES,
    DUE,
    RULE_COMPUTES,
    TWO_CALLS,
    UNDEFINED_ARGUMENT,
    UNOWNED,
    WHILE_IS_FALSE,
    Accumulated,
    Decider,
    Decision,
    History,
    Inputs,
    Memory,
    Tables,
    advanced,
    floored,
    progress,
    unfollowed,
)

Gate = Callable[[Inputs, Sequence[Any]], "str | None"]
"""Gives the reason why a site computes, or None."""

_NOTHING: Accumulated = {}
_NO_SLOTS: Sequence[Any] = ()


class Lowering:
    """Makes the deciders of a plan. Each rule is lowered once, however many groups of sites it takes."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._known: dict[int, LoweredRule] = {}

    def __call__(self, rules: Sequence[BoundRule]) -> LoweredRules:
        """Returns the decider of the sites with these rules."""
        for bound in rules:
            if bound.index not in self._known:
                self._known[bound.index] = LoweredRule(bound, self._tables)
        return LoweredRules(rules, tuple(self._known[bound.index] for bound in rules))


class LoweredRules(Decider):
    """Decides the sites of a group by its lowered rules."""

    __slots__ = ("_lowered", "_measures")

    def __init__(self, rules: Sequence[BoundRule], lowered: Sequence[LoweredRule]) -> None:
        super().__init__(rules)
        self._lowered = lowered
        self._measures = tuple(pair for rule in lowered for pair in rule.measures)

    def owner(self, inputs: Inputs) -> BoundRule | None:
        """Returns the first rule whose `when` holds."""
        rule = self._owner(inputs)
        return None if rule is None else rule.bound

    def _owner(self, inputs: Inputs) -> LoweredRule | None:
        for rule in self._lowered:
            if rule.when is None or rule.when(inputs):
                return rule
        return None

    def decide(self, inputs: Inputs) -> Decision:
        """Decides one site at one call."""
        rule = self._owner(inputs)
        return Decision("compute", UNOWNED, inputs=inputs) if rule is None else rule.decide(inputs)

    def advance(self, inputs: Inputs, decision: Decision) -> Memory:
        """Returns the memory of a site after a call with a decision."""
        now = dict[ir.Expression, float]()
        for expression, closure in self._measures:
            try:
                now[expression] = closure(inputs, _NO_SLOTS)
            except Undefined:
                now[expression] = math.nan
        return advanced(inputs, decision, now)


class LoweredRule:
    """One rule as closures.

    Attributes:
        bound: The rule.
        when: Whether it owns a site, or None if it always does.
        measures: The expressions below `prev` and `kept`, with their closures.
    """

    __slots__ = ("_accumulators", "_answers", "_clauses", "bound", "measures", "when")

    def __init__(self, bound: BoundRule, tables: Tables) -> None:
        self.bound = bound
        rule = bound.rule
        clock = Compiler(_clock_leaf, tables)
        self.when = None if rule.when is None else _holds(clock.closure(rule.when))
        self._accumulators = [
            _Accumulator(bound, call, _compiler(bound, tables, bound.accumulators[:number]))
            for number, call in enumerate(bound.accumulators)
        ]
        remembering = _compiler(bound, tables, ())
        self.measures = [(call.arguments[0], remembering.closure(call.arguments[0])) for call in bound.memories]
        compiler = _compiler(bound, tables, bound.accumulators)
        self._answers = tuple(_answer_gates(bound, compiler))
        self._clauses = (*_clause_gates(bound, compiler), *self._answers)

    def decide(self, inputs: Inputs) -> Decision:
        """Decides a site that the rule owns."""
        bound = self.bound
        slots, accumulated = _NO_SLOTS, _NOTHING
        if self._accumulators:
            slots, accumulated = self._accumulate(inputs)
        gates, reason, follow, branch = self._clauses, None, bound.rule.follow, inputs.tick.branch
        if follow is not None and branch and branch != follow and not isinstance(bound.rule.action, ir.Compute):
            gates = self._following(inputs)
        for gate in gates:
            reason = gate(inputs, slots)
            if reason is not None:
                return Decision("compute", reason, bound.index, bound.rule.action, accumulated, inputs)
        return Decision("reuse", ANSWERS, bound.index, bound.rule.action, accumulated, inputs)

    def _following(self, inputs: Inputs) -> Sequence[Gate]:
        """Returns the gates of a branch that follows another one: its own schedule and conditions do not count."""
        reason = unfollowed(self.bound, inputs)
        first = _branch_gates(self.bound)
        return (*first, lambda _inputs, _slots: reason) if reason else (*first, *self._answers)

    def _accumulate(self, inputs: Inputs) -> tuple[Sequence[Any], Accumulated]:
        slots, kept = list[Any](), dict[tuple[int, ir.Call], float | bool]()
        for accumulator in self._accumulators:
            try:
                value = accumulator.step(inputs.memory.accumulated.get(accumulator.key), inputs, slots)
            except Undefined:
                value = math.nan
            slots.append(value)
            if not (accumulator.lasts and math.isnan(value)):
                kept[accumulator.key] = value
        return slots, kept


# --- what closures read ----------------------------------------------------------------------------------


_WORDS: Mapping[str, Callable[[Inputs], Any]] = {
    "step": lambda inputs: inputs.tick.step,
    "t": lambda inputs: inputs.tick.t,
    "steps": lambda inputs: inputs.tick.steps,
    "sigma": lambda inputs: inputs.tick.sigma,
    "branch": lambda inputs: inputs.tick.branch,
    "uncond_skipped": lambda inputs: inputs.tick.uncond_skipped,
    "progress": lambda inputs: progress(inputs.tick.step, inputs.tick.steps),
    "age": lambda inputs: inputs.memory.age(inputs.tick.step),
    "gap": lambda inputs: inputs.memory.gap,
    "computes": lambda inputs: inputs.memory.computes,
}


def _checked(name: str, read: Callable[[Inputs], Any]) -> Closure:
    """Returns a closure that raises where a value is not known or not finite."""
    unknown, label = f"`{name}` is not known here", f"`{name}`"

    def value(inputs: Inputs, _slots: Any) -> Any:
        number = read(inputs)
        if number is None:
            raise Undefined(unknown)
        return finite(number, label) if isinstance(number, float) else number

    return value


def _clock_leaf(expression: ir.Expression) -> Closure | None:
    """Returns the closure of a name in a `when`, which reads the clock only."""
    if isinstance(expression, ir.Name) and expression.name in CLOCK:
        return _checked(expression.name, _WORDS[expression.name])
    return None


def _raw(name: str) -> Callable[[Inputs], Any]:
    """Returns the function that reads a name. A signal may be called like a clock word that was added later."""
    if name not in CLOCK:
        return lambda inputs: inputs.signals.get(name)
    word = _WORDS[name]
    return lambda inputs: inputs.signals[name] if name in inputs.signals else word(inputs)


def named(name: str) -> Closure:
    """Returns the closure of a clock word, signal or external. Its first argument is the `Inputs`."""
    return _checked(name, _raw(name))


def _compiler(bound: BoundRule, tables: Tables, accumulators: Sequence[ir.Call]) -> Compiler:
    """Returns the compiler of the clauses of a rule that read these of its accumulators."""

    def leaf(expression: ir.Expression) -> Closure | None:
        if isinstance(expression, ir.Name):
            return named(expression.name)
        if not isinstance(expression, ir.Call):
            return None
        if expression in accumulators:
            return _slot(accumulators.index(expression), f"`{expression.function}(...)`")
        return _remembered(expression, leaf) if expression in bound.memories else None

    return Compiler(leaf, tables)


def _one(_inputs: Inputs, _slots: Sequence[Any]) -> int:
    return 1


def _slot(number: int, label: str) -> Closure:
    return lambda _inputs, slots: finite(slots[number], label)


def _remembered(call: ir.Call, leaf: Callable[[ir.Expression], Closure | None]) -> Closure:
    """Returns the closure of a `prev` or `kept`."""
    expression, label = call.arguments[0], f"`{call.function}(...)`"
    if call.function == "prev":

        def previous(inputs: Inputs, _slots: Any) -> float:
            memory = inputs.memory
            if memory.seen != inputs.tick.step - 1 or expression not in memory.previous:
                raise Undefined(f"{label} has no value yet")
            return finite(memory.previous[expression], label)

        return previous
    back = Compiler(leaf, {}).closure(call.arguments[1]) if len(call.arguments) > 1 else _one

    def kept(inputs: Inputs, slots: Any) -> float:
        values, depth = inputs.memory.kept.get(expression, ()), int(back(inputs, slots))
        if not 0 < depth <= len(values):
            raise Undefined(f"{label} has no value yet")
        return finite(values[depth - 1], label)

    return kept


# --- accumulators ----------------------------------------------------------------------------------------


class _Accumulator:
    """An accumulator of a rule.

    Attributes:
        key: Its key in `Memory.accumulated`.
        lasts: Whether it keeps its value where it has none at a step.
        step: Gives its value at a step, from the value before (None at its start), the inputs and the slots.
    """

    __slots__ = ("key", "lasts", "step")

    def __init__(self, bound: BoundRule, call: ir.Call, compiler: Compiler) -> None:
        self.key = bound.index, call
        self.lasts = call.function in LASTING
        self.step: Callable[[Any, Inputs, Sequence[Any]], Any] = _step_of(call, compiler)


def _step_of(call: ir.Call, compiler: Compiler) -> Callable[[Any, Inputs, Sequence[Any]], Any]:
    first, *others = [compiler.closure(argument) for argument in call.arguments]
    match call.function:
        case "latch":
            return lambda before, inputs, slots: before is True or bool(first(inputs, slots))
        case "at_step":
            present, value = _raw("step"), others[0]

            def at_step(before: Any, inputs: Inputs, slots: Sequence[Any]) -> Any:
                if math.floor(first(inputs, slots)) == present(inputs):
                    return value(inputs, slots)
                return math.nan if before is None else before

            return at_step
        case "product":
            return lambda before, inputs, slots: (1.0 if before is None else before) * first(inputs, slots)
        case "ema":
            share = others[0]

            def ema(before: Any, inputs: Inputs, slots: Sequence[Any]) -> Any:
                now, part = first(inputs, slots), share(inputs, slots)
                return now if before is None else before + (now - before) * part

            return ema
        case _:
            decay = compiler.closure(call.labelled[0].value) if call.labelled else _one

            def total(before: Any, inputs: Inputs, slots: Sequence[Any]) -> Any:
                now = first(inputs, slots)
                return (0.0 if before is None else before) * decay(inputs, slots) + now

            return total


# --- clauses ---------------------------------------------------------------------------------------------


def _holds(closure: Closure) -> Callable[[Inputs], bool]:
    def holds(inputs: Inputs) -> bool:
        try:
            return bool(closure(inputs, _NO_SLOTS))
        except Undefined:
            return False

    return holds


def _branch_gates(bound: BoundRule) -> list[Gate]:
    action = bound.rule.action
    if isinstance(action, ir.ApproximateUncond):
        return [lambda inputs, _slots: COND_COMPUTES if inputs.tick.branch in COND_BRANCHES else None]
    if is_mean(action):
        named = COND_BRANCHES | UNCOND_BRANCHES
        return [lambda inputs, _slots: TWO_CALLS if inputs.tick.branch in named else None]
    return []


def _clause_gates(bound: BoundRule, compiler: Compiler) -> list[Gate]:
    """Returns what comes before the gates of an answer, in the order of `schedule.decide`."""
    rule = bound.rule
    if isinstance(rule.action, ir.Compute):
        return [lambda _inputs, _slots: RULE_COMPUTES]
    gates = _branch_gates(bound)
    if rule.schedule is not None:
        gates.append(_schedule_gate(_due(rule.schedule, compiler)))
    if rule.condition is not None:
        gates.append(_condition_gate(compiler.closure(rule.condition)))
    for bound_clause in rule.bounds:
        count = compiler.form(bound_clause.count)
        if not (isinstance(count, Constant) and count.value is None):
            gates.append(_bound_gate(bound_clause, bound.index, compiler.closure(bound_clause.count)))
    return gates


def _schedule_gate(due: Closure) -> Gate:
    def gate(inputs: Inputs, slots: Sequence[Any]) -> str | None:
        try:
            return DUE if due(inputs, slots) else None
        except Undefined:
            return DUE

    return gate


def _due(schedule: ir.ScheduleClause, compiler: Compiler) -> Closure:
    step = _raw("step")
    match schedule:
        case ir.Every():
            return _every(schedule, compiler)
        case ir.OnSteps():
            steps = compiler.closure(schedule.steps)

            def on(inputs: Inputs, slots: Sequence[Any]) -> bool:
                listed = steps(inputs, slots)
                return listed is None or step(inputs) in listed

            return on
        case ir.Mask():
            mask = compiler.closure(schedule.mask)

            def masked(inputs: Inputs, slots: Sequence[Any]) -> bool:
                letters, now = mask(inputs, slots), step(inputs)
                return letters is None or now >= len(letters) or letters[now] == "1"

            return masked


def _every(schedule: ir.Every, compiler: Compiler) -> Closure:
    interval, count = compiler.closure(schedule.interval), _counted(schedule, compiler)
    since_compute = schedule.anchor == "compute"

    def due(inputs: Inputs, slots: Sequence[Any]) -> bool:
        every = floored(interval(inputs, slots))
        if every is None or every <= 0:
            return True
        number = count(inputs, slots)
        return number >= every if since_compute else number % every == 0

    return due


def _counted(schedule: ir.Every, compiler: Compiler) -> Closure:
    """Returns the closure of the number of steps since, or until, what an `every` is anchored to."""
    step = _raw("step")
    match schedule.anchor:
        case "compute":
            age = _raw("age")
            return lambda inputs, _slots: age(inputs)
        case "end":
            steps = compiler.closure(ir.Name(name="steps"))
            return lambda inputs, slots: steps(inputs, slots) - 1 - step(inputs)
        case "start":
            if schedule.offset is None:
                return lambda inputs, _slots: step(inputs)
            offset = compiler.closure(schedule.offset)
            return lambda inputs, slots: step(inputs) - floored(offset(inputs, slots))


def _condition_gate(condition: Closure) -> Gate:
    def gate(inputs: Inputs, slots: Sequence[Any]) -> str | None:
        try:
            return None if condition(inputs, slots) else WHILE_IS_FALSE
        except Undefined:
            return WHILE_IS_FALSE

    return gate


def _bound_gate(bound: ir.Bound, rule: int, count: Closure) -> Gate:
    in_a_row = bound.scope == "row"
    reason = BOUND_IN_A_ROW if in_a_row else BOUND_IN_ALL

    def gate(inputs: Inputs, slots: Sequence[Any]) -> str | None:
        try:
            most = floored(count(inputs, slots))
        except Undefined:
            return reason
        if most is None:
            return None
        memory = inputs.memory
        within = memory.age(inputs.tick.step) <= most if in_a_row else memory.reuses.get(rule, 0) < most
        return None if within else reason

    return gate


def _answer_gates(bound: BoundRule, compiler: Compiler) -> list[Gate]:
    """Returns what decides whether a site can answer, once the clauses of its rule allow it."""
    gates = list[Gate]()
    history = History(bound.rule.action)
    if history.needed:
        gates.append(history.missing)
    gates += [_argument_gate(compiler.closure(argument.value)) for argument in bound.arguments]
    gates.append(lambda inputs, _slots: inputs.fact)
    return gates


def _argument_gate(argument: Closure) -> Gate:
    def gate(inputs: Inputs, slots: Sequence[Any]) -> str | None:
        try:
            argument(inputs, slots)
        except Undefined:
            return UNDEFINED_ARGUMENT
        return None

    return gate
