"""Which results of the histories a later step may still read, from the rules and the clock.

Where signals, counts or facts of the run decide, a result that may be read counts as read. Where only the clock
decides, exactly the results that are read are kept. A fact turns a reuse into a compute and never the reverse, and a
compute adds a newer result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cachepolicy.planning._possible_values import Range
from cachepolicy.planning.history_spec import keeping
from cachepolicy.planning.possible_decisions import NOTHING, Ahead, Moment, Outlook, Outlooks, Reads, reads_age
from cachepolicy.planning.schedule import Program, Tick

_FAR = 64  # steps that are examined one by one if their number is not known
_MOST = 20_000  # remembered results
_SAME = {NOTHING: NOTHING}


class Liveness:
    """What may be read later, for all groups of a program (by number in `program.alike`) on one clock.

    Args:
        program: The plan.
        ahead: What is known of the rest of the trajectory.
        loose: As for `Outlooks`.
    """

    def __init__(self, program: Program, ahead: Ahead, *, loose: bool = False) -> None:
        self.outlooks = Outlooks(program, ahead, loose=loose)
        self.full = [_full(program, group) for group in range(len(program.alike.groups))]
        """The results that the rules of each group read at most."""
        self._ages = [any(map(reads_age, group.rules)) for group in program.alike.groups]
        self._measures = bool(program.measured)
        self._wanted: dict[tuple[object, ...], Reads] = {}
        self._seen: dict[tuple[object, ...], Outlook] = {}
        self._later: dict[tuple[object, ...], bool] = {}

    def wanted(self, group: int, tick: Tick, last: int | None) -> Reads:
        """Returns the results that may be read after the call at `tick`.

        Args:
            group: Number of the group.
            tick: The call.
            last: The step at which the site last computed; None if it never did.
        """
        if last is None or not self.full[group]:
            return NOTHING
        if not self._ages[group]:
            last = None
        key = ("wanted", group, tick.branch, tick.step, last, *self._present(tick))
        needed = self._wanted.get(key)
        if needed is None:
            self._make_room()
            wanted = self._wanted_after(group, tick, last)
            # Equal results are one object, so that callers see by identity that nothing has changed.
            needed = self._wanted[key] = _SAME.setdefault(wanted, wanted)
        return needed

    def measures(self, tick: Tick, *, now: bool) -> bool:
        """Returns whether a rule that reads signals may own a site in a later call of this branch, or `now`."""
        if not self._measures:
            return False
        start = tick.step if now else tick.step + 1
        return self._ever("measures", tick, start, lambda step: self.outlooks.measures(Moment(tick, step, tick.branch)))

    def approximates(self, tick: Tick, *, now: bool) -> bool:
        """Returns whether the unconditional half may be approximated at a later step, or `now`."""
        if not self.outlooks.approximating:
            return False
        start = tick.step if now else tick.step + 1
        return self._ever(
            "approximates", tick, start, lambda step: self.outlooks.approximates(Moment(tick, step, tick.branch))
        )

    # --- looking ahead -----------------------------------------------------------------------------------

    def _present(self, tick: Tick) -> tuple[object, ...]:
        """Returns what results depend on besides the step, if the timesteps ahead are not known."""
        return () if self.outlooks.ahead.timesteps is not None else (tick.step, tick.t, tick.steps)

    def _make_room(self) -> None:
        if len(self._wanted) + len(self._seen) + len(self._later) > _MOST:
            for remembered in (self._wanted, self._seen, self._later):
                remembered.clear()

    def _outlook(self, group: int, moment: Moment, last: int | None) -> Outlook:
        key = (group, moment.branch, moment.step, last, *self._present(moment.now))
        outlook = self._seen.get(key)
        if outlook is None:
            outlook = self._seen[key] = self.outlooks.of(group, moment, last)
        return outlook

    def _ever(self, name: str, tick: Tick, start: int, holds: Callable[[int | Range], bool]) -> bool:
        key = (name, tick.branch, start, *self._present(tick))
        result = self._later.get(key)
        if result is None:
            self._make_room()
            end = self.outlooks.end(tick)
            if self.outlooks.ahead.timesteps is not None and end is not None:
                result = any(holds(step) for step in range(end - 1, start - 1, -1))
            else:
                result = (end is None or start < end) and holds(Range(start, math.inf if end is None else end - 1))
            self._later[key] = result
        return result

    def _wanted_after(self, group: int, tick: Tick, last: int | None) -> Reads:
        if self.outlooks.end(tick) is None and not self._far(group, tick, tick.step + 1):
            return NOTHING
        return self._scan(group, tick, last, tick.step + 1, 0)

    def _far(self, group: int, tick: Tick, start: int) -> Reads:
        """Returns the results that may be read at any step from `start` on."""
        return reads(self._outlook(group, Moment(tick, Range(start, math.inf), tick.branch), None))

    def _scan(self, group: int, tick: Tick, last: int | None, start: int, pushed: int) -> Reads:
        """Returns which results older than the last `pushed` ones may be read from `start` on."""
        full, end = self.full[group], self.outlooks.end(tick)
        wanted = NOTHING
        for step in range(start, tick.step + 1 + _FAR if end is None else end):
            outlook = self._outlook(group, Moment(tick, step, tick.branch), last)
            wanted |= reads(outlook).older(pushed)
            if all(event.pushes for event in outlook):
                pushed += 1
                last = step if self._ages[group] and all(event.what == "compute" for event in outlook) else None
            elif last is not None and pushed + 1 < full.depth:
                # A fact of the run may make it compute here, and ages count from here.
                wanted |= self._scan_from(group, tick, step, pushed + 1)
            if wanted == full.older(pushed) or pushed >= full.depth:
                return wanted
        return wanted | self._far(group, tick, start).older(pushed) if end is None else wanted

    def _scan_from(self, group: int, tick: Tick, last: int, pushed: int) -> Reads:
        key = ("since", group, tick.branch, last, pushed, *self._present(tick))
        needed = self._wanted.get(key)
        if needed is None:
            needed = self._wanted[key] = self._scan(group, tick, last, last + 1, pushed)
        return needed


def reads(outlook: Outlook) -> Reads:
    """Returns the results that the events of an outlook read at most."""
    most = NOTHING
    for event in outlook:
        most |= event.reads
    return most


def _full(program: Program, group: int) -> Reads:
    kept = keeping([bound.rule for bound in program.alike.groups[group].rules], span=False, halves=False)
    return Reads(kept.outputs, kept.residuals)
