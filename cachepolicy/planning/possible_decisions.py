"""The events that are possible for a site at a later call, from the rules and what is known of the clock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined
from cachepolicy.language.traversal import names_in
from cachepolicy.planning._possible_values import BOTH, EITHER, Range, Truth, View, known, truth
from cachepolicy.planning.history_spec import feedback, history_depth, is_mean, needed_results
from cachepolicy.planning.plan import BoundRule
from cachepolicy.planning.schedule import Program, Tick, due, floored, progress


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is known of the rest of a trajectory.

    Attributes:
        timesteps: Timesteps of all steps, if known from a scheduler.
        sigmas: Sigmas of all steps, if known.
        direction: Direction of `t` if the timesteps are not known: -1 falls, 1 rises, 0 unknown.
        lowest: Lower bound of `t`.
    """

    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    direction: int = 0
    lowest: float = -math.inf


@dataclass(frozen=True, slots=True)
class Moment:
    """A later call on a branch, at one step or at any step of a range. `now` is the present call."""

    now: Tick
    step: int | Range
    branch: str


@dataclass(frozen=True, slots=True)
class Reads:
    """The number of newest results that may be read, by form."""

    outputs: int = 0
    residuals: int = 0

    def __bool__(self) -> bool:
        return self.outputs > 0 or self.residuals > 0

    def __or__(self, other: Reads) -> Reads:
        return Reads(max(self.outputs, other.outputs), max(self.residuals, other.residuals))

    @property
    def depth(self) -> int:
        """The larger of the two numbers."""
        return max(self.outputs, self.residuals)

    def older(self, pushed: int) -> Reads:
        """Returns how many of the results are read that are older than the newest `pushed` ones."""
        return Reads(max(0, self.outputs - pushed), max(0, self.residuals - pushed)) if pushed else self


NOTHING = Reads()

What = Literal["compute", "read", "skip", "approximate", "hidden"]


@dataclass(frozen=True, slots=True)
class Event:
    """One possible event. A `read` whose answer enters the history also `feeds` it."""

    what: What
    reads: Reads = NOTHING
    feeds: bool = False

    @property
    def pushes(self) -> bool:
        """True where the history gets a newer result."""
        return self.what == "compute" or self.feeds

    @property
    def hides(self) -> bool:
        """True if the sites inside do not run."""
        return self.what in {"read", "skip"}

    def may_hide(self, branch: str) -> bool:
        """Returns True if the sites inside may not run. An unconditional call of its own is answered as a whole."""
        return self.hides or (self.what == "approximate" and branch in UNCOND_BRANCHES)


Outlook = frozenset[Event]
"""All possible events."""

_COMPUTE, _SKIP, _APPROXIMATE, _HIDDEN = (Event(kind) for kind in ("compute", "skip", "approximate", "hidden"))


class Outlooks:
    """The possible events of the groups of a program (by number in `program.alike`) on one clock.

    Args:
        program: The plan.
        ahead: What is known of the rest of the trajectory.
        loose: Whether a run may prevent reuses, so that no site is certain to hide the sites inside it.
    """

    def __init__(self, program: Program, ahead: Ahead, *, loose: bool = False) -> None:
        self.program = program
        self.ahead = ahead
        self.loose = loose
        self.approximating = [
            number
            for number, group in enumerate(program.alike.groups)
            if any(isinstance(bound.rule.action, ir.ApproximateUncond) for bound in group.rules)
        ]

    def end(self, now: Tick) -> int | None:
        """Returns the number of steps, None if it is not known."""
        return now.steps if self.ahead.timesteps is None else len(self.ahead.timesteps)

    def of(self, group: int, moment: Moment, last: int | None) -> Outlook:
        """Returns the possible events of a site that last computed at step `last` (None: not known)."""
        around = self._around(group, moment)
        if not around.false:
            return frozenset({_HIDDEN})
        own = self._own(group, moment, last)
        return own | {_HIDDEN} if around.true else own

    def measures(self, moment: Moment) -> bool:
        """Returns whether a rule that reads signals may own a site."""
        return any(
            bound.index in self.program.measured
            for group in range(len(self.program.alike.groups))
            for bound, _ in self._owners(group, self._view(group, moment, None))
        )

    def approximates(self, moment: Moment) -> bool:
        """Returns True if the unconditional half of that step may be rebuilt, on this branch or on one of its own."""
        branches = UNCOND_BRANCHES | ({moment.branch} - COND_BRANCHES)
        return any(
            _APPROXIMATE in self._own(group, replace(moment, branch=branch), None)
            for group in self.approximating
            for branch in branches
        )

    def _around(self, group: int, moment: Moment) -> Truth:
        """Returns whether the sites around a group may hide it, and whether they may not."""
        may, may_not = False, True
        for parent in self.program.alike.groups[group].parents:
            events = self._own(parent, moment, None)
            may |= any(event.may_hide(moment.branch) for event in events)
            may_not &= self.loose or not all(event.hides for event in events)
        return Truth(may, may_not)

    def _own(self, group: int, moment: Moment, last: int | None) -> Outlook:
        view = self._view(group, moment, last)
        events, owned = set[Event](), False
        for bound, always in self._owners(group, view):
            events |= self._owned(bound, group, moment, view)
            owned = always
        return frozenset(events if owned else events | {_COMPUTE})

    def _owners(self, group: int, view: View) -> Iterator[tuple[BoundRule, bool]]:
        """Yields the rules that may own a site, and whether they do if no rule before does."""
        for bound in self.program.alike.groups[group].rules:
            when = truth(bound.rule.when, view)
            if when.true:
                yield bound, not when.false
            if not when.false:
                return

    def _owned(self, bound: BoundRule, group: int, moment: Moment, view: View) -> set[Event]:
        """Returns the possible events of a site that the rule owns, case by case as in `schedule.decide`."""
        rule = bound.rule
        if isinstance(rule.action, ir.Compute):
            return {_COMPUTE}
        if isinstance(rule.action, ir.ApproximateUncond) and moment.branch in COND_BRANCHES:
            return {_COMPUTE}
        if is_mean(rule.action) and moment.branch in COND_BRANCHES | UNCOND_BRANCHES:
            return {_COMPUTE}
        answers = _answers(rule.action)
        if rule.follow is not None and moment.branch not in (rule.follow, ""):
            leader = replace(moment, branch=rule.follow)
            follows = self._owned(bound, group, leader, self._view(group, leader, None))
            return {_COMPUTE, answers} if answers in follows else {_COMPUTE}
        clauses = [_not(_due(rule.schedule, view)), truth(rule.condition, view)]
        clauses += [_within(bound, view) for bound in rule.bounds]
        clauses += [_defined(argument, view) for argument in bound.arguments]
        if not all(clause.true for clause in clauses):
            return {_COMPUTE}
        # A history of half a guidance batch cannot answer a call of the whole batch.
        half = bool(self.approximating) and group not in self.approximating and answers is not _SKIP
        half &= moment.branch not in COND_BRANCHES | UNCOND_BRANCHES
        half |= is_mean(rule.action)  # of a batch that is not one of guidance
        few = needed_results(rule.action) > 1  # the number of results is not followed here
        return {_COMPUTE, answers} if half or few or any(clause.false for clause in clauses) else {answers}

    # --- the clock ---------------------------------------------------------------------------------------

    def _view(self, group: int, moment: Moment, last: int | None) -> View:
        """Returns what the clauses of a group can know of the clock at a later call."""
        names = self._clock(moment)
        if last is not None and isinstance(moment.step, int):
            names["age"] = moment.step - last
        if self.approximating and group not in self.approximating:
            names["uncond_skipped"] = EITHER if self.approximates(moment) else False
        return View(names, self.program.tables)

    def _clock(self, moment: Moment) -> dict[str, Any]:
        names: dict[str, Any] = {
            "step": moment.step,
            "branch": moment.branch,
            "uncond_skipped": False,
            "age": Range(1, math.inf),
            "computes": Range(0, math.inf),
        }
        steps = self.end(moment.now)
        if steps is not None:
            names["steps"] = steps
            names["progress"] = EITHER if isinstance(moment.step, Range) else progress(moment.step, steps)
        if self.ahead.timesteps is not None:
            self._scheduled(names, moment.step, self.ahead.timesteps)
        elif moment.now.t is not None:
            falls, rises = self.ahead.direction < 0, self.ahead.direction > 0
            low = moment.now.t if rises else self.ahead.lowest
            names["t"] = Range(low, moment.now.t if falls else math.inf)
        return names

    def _scheduled(self, names: dict[str, Any], step: int | Range, timesteps: tuple[float, ...]) -> None:
        if isinstance(step, Range):
            names["t"] = Range(min(timesteps), max(timesteps))
            return
        names["t"] = timesteps[step]
        if self.ahead.sigmas is not None and step < len(self.ahead.sigmas):
            names["sigma"] = self.ahead.sigmas[step]


def _answers(action: ir.Action) -> Event:
    """Returns the event of a reuse by this action."""
    match action:
        case ir.Reuse():
            return Event("read", Reads(residuals=1) if action.residual else Reads(outputs=1))
        case ir.Predict():
            many = history_depth(action)
            return Event("read", Reads(residuals=many) if action.residual else Reads(outputs=many), feedback(action))
        case ir.Skip():
            return _SKIP
        case ir.ApproximateUncond():
            return _APPROXIMATE
        case ir.Compute():
            return _COMPUTE
        case _:
            assert_never(action)


def reads_age(bound: BoundRule) -> bool:
    """Returns whether a rule depends on when the site last computed."""
    rule = bound.rule
    since = isinstance(rule.schedule, ir.Every) and rule.schedule.anchor == "compute"
    return since or any(limit.scope == "row" for limit in rule.bounds) or "age" in names_in(rule)


# --- clauses ---------------------------------------------------------------------------------------------

_TRUE, _FALSE = Truth(true=True, false=False), Truth(true=False, false=True)


def _not(one: Truth) -> Truth:
    return Truth(one.false, one.true)


def _sure(value: object) -> Truth:
    return _TRUE if value else _FALSE


def _due(schedule: ir.ScheduleClause | None, view: View) -> Truth:
    """Returns whether a schedule may say compute, and whether it may say reuse."""
    if schedule is None:
        return _FALSE
    anchor = schedule.anchor if isinstance(schedule, ir.Every) else "start"
    clock = "age" if anchor == "compute" else "step"
    now = view.names[clock]
    if isinstance(now, Range) and clock == "age":
        # A schedule that is due at the lowest age is due at every age.
        now = now.low
    if isinstance(now, Range) or (anchor == "end" and "steps" not in view.names) or not view.knows(schedule):
        return BOTH
    if due(schedule, Environment({**view.names, clock: now}, view.tables)):
        return _TRUE
    return _FALSE if now == view.names[clock] else BOTH


def _defined(argument: ir.Argument, view: View) -> Truth:
    """Returns whether an argument of an action may have a value, and whether it may have none."""
    try:
        return BOTH if known(argument.value, view) is EITHER else _TRUE
    except Undefined:
        return _FALSE


def _within(bound: ir.Bound, view: View) -> Truth:
    """Returns whether another reuse may stay within the bound, and whether it may not."""
    try:
        count = known(bound.count, view)
    except Undefined:
        return _FALSE
    age = view.names["age"]
    if count is None:
        return _TRUE
    if count is EITHER:
        return BOTH
    count = floored(count)
    if bound.scope == "all":
        return BOTH if count > 0 else _FALSE
    if isinstance(age, Range):
        return BOTH if age.low <= count else _FALSE
    return _sure(age <= count)
