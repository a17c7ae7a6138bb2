"""The schedule a second time: site by site, from the whole log, in the words of the language's description.

Slow and plain. A memory is not carried along but looked up: `prev(x)` is x evaluated at the step before, `kept(x)` x
evaluated where the site last computed, `sum(x)` the sum over the steps since. Shares no code with the package.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.language import ir

OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "%": operator.mod,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
    "abs": abs, "min": min, "max": max,
}  # fmt: skip


class NotFinite(Exception):
    """A clause read a number that does not exist."""


@dataclass
class Entry:
    """One step of one site on one branch: the clock, the letter, the owner and whether it reused."""

    clock: Mapping[str, Any]
    letter: str = "?"
    owner: int | None = None


@dataclass
class Log:
    """The past of one site on one branch, oldest first; the last entry is the present step."""

    entries: list[Entry] = field(default_factory=list)

    def computes(self, before: int) -> list[int]:
        return [index for index in range(before) if self.entries[index].letter == "C"]


def finite(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise NotFinite
    return value


def value(node: Any, log: Log, at: int, owner: int | None) -> Any:
    """The value of an expression at entry `at`; `owner` is the rule whose accumulators it reads."""
    if at < 0:
        raise NotFinite

    def of(each: Any) -> Any:
        return value(each, log, at, owner)

    match node:
        case ir.Number() | ir.Boolean() | ir.Text():
            return finite(node.value)
        case ir.Name():
            return finite(log.entries[at].clock[node.name])
        case ir.Negative():
            return -of(node.operand)
        case ir.Arithmetic():
            left, right = of(node.left), of(node.right)
            if node.operator in "/%" and right == 0:
                raise NotFinite
            return finite(OPERATORS[node.operator](left, right))
        case ir.Comparison():
            values = [of(each) for each in node.operands]
            return all(OPERATORS[o](a, b) for o, a, b in zip(node.operators, values, values[1:], strict=False))
        case ir.Both():
            return all([of(each) for each in node.operands])
        case ir.Either():
            return any([of(each) for each in node.operands])
        case ir.Negation():
            return not of(node.operand)
        case ir.Membership(container=ir.SetOf()):
            return of(node.value) in [of(each) for each in node.container.items]
        case ir.Membership(container=ir.Interval()):
            low, x, high = of(node.container.low), of(node.value), of(node.container.high)
            return (low < x or (node.container.low_closed and low == x)) and (
                x < high or (node.container.high_closed and x == high)
            )
        case ir.Call(function="prev"):
            return value(node.arguments[0], log, at - 1, owner)
        case ir.Call(function="kept"):
            depth = node.arguments[1].value if len(node.arguments) > 1 else 1
            computes = log.computes(at)
            if len(computes) < depth:
                raise NotFinite
            return value(node.arguments[0], log, computes[-depth], owner)
        case ir.Call(function="sum" | "product"):
            since = max(log.computes(at), default=-1) + 1
            mine = [i for i in range(since, at + 1) if i == at or log.entries[i].owner == owner]
            values = [value(node.arguments[0], log, i, owner) for i in mine]
            if node.function == "product":
                return finite(math.prod(values))
            decays = [value(node.labelled[0].value, log, i, owner) for i in mine] if node.labelled else [1] * len(mine)
            result = 0.0
            for decay, each in zip(decays, values, strict=True):
                result = result * decay + each
            return finite(result)
        case ir.Call(function="total" | "ema" | "latch" | "at_step"):
            return lasting(node, log, [i for i in range(at + 1) if i == at or log.entries[i].owner == owner], owner)
        case ir.Call(function="floor"):
            return math.floor(of(node.arguments[0]))
        case ir.Call():
            return finite(OPERATORS[node.function](*(of(each) for each in node.arguments)))
        case _:
            raise TypeError(node)


def lasting(node: Any, log: Log, mine: Sequence[int], owner: int | None) -> Any:
    """The value of an accumulator that computes do not reset, from the steps `mine` of its rule, the last one now."""

    def defined(part: Any, i: int) -> Any:
        try:
            return value(part, log, i, owner)
        except NotFinite:
            return None

    past = mine[:-1]
    match node.function:
        case "latch":
            held = any(defined(node.arguments[0], i) for i in past)
            return held or bool(value(node.arguments[0], log, mine[-1], owner))
        case "at_step":
            at = [i for i in mine if (k := defined(node.arguments[0], i)) is not None and math.floor(k) == i]
            return finite(value(node.arguments[1], log, at[-1], owner) if at else None)
        case "total":
            now = value(node.arguments[0], log, mine[-1], owner)
            return finite(sum(each for i in past if (each := defined(node.arguments[0], i)) is not None) + now)
        case _:
            now, share = value(node.arguments[0], log, mine[-1], owner), node.arguments[1].value
            numbers = [each for i in past if (each := defined(node.arguments[0], i)) is not None]
            average = None
            for each in [*numbers, now]:
                average = each if average is None else average + (each - average) * share
            return finite(average)


def true(node: Any, log: Log, owner: int | None) -> bool:
    try:
        return node is None or bool(value(node, log, len(log.entries) - 1, owner))
    except NotFinite:
        return False


def exists(node: Any, log: Log) -> bool:
    """Whether an argument of an action has a value now."""
    try:
        value(node, log, len(log.entries) - 1, None)
    except NotFinite:
        return False
    return True


def scheduled(schedule: Any, log: Log) -> bool:
    """Whether the schedule asks for a compute now."""
    clock = log.entries[-1].clock
    step = clock["step"]
    try:
        match schedule:
            case None:
                return False
            case ir.OnSteps():
                return step in [each.value for each in schedule.steps.items]
            case ir.Mask():
                return step >= len(schedule.mask.value) or schedule.mask.value[step] == "1"
            case ir.Every():
                n = math.floor(value(schedule.interval, log, len(log.entries) - 1, None))
                if n <= 0:
                    return True
                if schedule.anchor == "compute":
                    return clock["age"] >= n
                if schedule.anchor == "end":
                    return (clock["steps"] - 1 - step) % n == 0
                offset = value(schedule.offset, log, len(log.entries) - 1, None) if schedule.offset else 0
                return (step - math.floor(offset)) % n == 0
    except NotFinite:
        return True
    raise TypeError(schedule)


def outcome(rules: Sequence[tuple[int, ir.Rule]], log: Log, branch: str, led: Entry | None) -> tuple[str, int | None]:
    """The letter of a site that nothing hides, and the rule that owns it."""
    here = log.entries[-1]
    for index, rule in rules:
        if not true(rule.when, log, index):
            continue
        past = [each for each in log.entries[:-1] if each.letter == "R" and each.owner == index]
        if rule.follow is not None and branch not in (rule.follow, ""):
            reuses = led is not None and led.letter == "R" and led.owner == index
        else:
            here.owner = index
            reuses = not scheduled(rule.schedule, log) and true(rule.condition, log, index)
            for bound in rule.bounds:
                used = here.clock["age"] - 1 if bound.scope == "row" else len(past)
                reuses = reuses and used < math.floor(value(bound.count, log, len(log.entries) - 1, index))
        if isinstance(rule.action, ir.Compute):
            reuses = False
        if isinstance(rule.action, ir.Predict):
            reuses = reuses and all(exists(argument.value, log) for argument in rule.action.arguments)
        if not isinstance(rule.action, ir.Skip) and not log.computes(len(log.entries) - 1):
            reuses = False
        return ("R" if reuses else "C"), index
    return "C", None


def rows(
    rules: Sequence[tuple[ir.Rule, Sequence[int]]],
    parents: Sequence[Sequence[int]],
    timesteps: Sequence[float],
    branches: Sequence[str] = ("",),
) -> dict[str, list[str]]:
    """A row of letters for each site, by branch; `rules` come with their sites, `parents` hold each site's holders."""
    logs = {branch: [Log() for _ in parents] for branch in branches}
    order = sorted(range(len(parents)), key=lambda site: len(parents[site]))
    for step, t in enumerate(timesteps):
        for branch in branches:
            for site in order:
                log = logs[branch][site]
                last = log.computes(len(log.entries))
                steps = len(timesteps)
                age = step - last[-1] if last else step + 1
                progress = step / (steps - 1) if steps > 1 else 0.0
                clock = {"step": step, "t": t, "steps": steps, "progress": progress, "branch": branch, "age": age}
                clock |= {"computes": len(last), "gap": last[-1] - last[-2] if len(last) > 1 else None}
                log.entries.append(Entry(clock))
                if any(logs[branch][parent].entries[-1].letter == "R" for parent in parents[site]):
                    log.entries[-1].letter = "."
                    continue
                mine = [(number, rule) for number, (rule, sites) in enumerate(rules) if site in sites]
                leader = logs["cond"][site] if "cond" in logs else log
                led = leader.entries[step] if leader is not log and len(leader.entries) > step else None
                log.entries[-1].letter, log.entries[-1].owner = outcome(mine, log, branch, led)
    return {branch: ["".join(e.letter for e in log.entries) for log in logs[branch]] for branch in branches}
