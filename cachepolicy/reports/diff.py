"""Compares the schedules of two policies on one model and clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachepolicy.errors import counted
from cachepolicy.planning.grid import grid
from cachepolicy.planning.module_tree import ancestors
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.simulation import Schedule, SignalValues, simulate
from cachepolicy.reports.text import summary

PARTLY = "~"
"""The letter of a span of which only some modules run."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two schedules on one model and clock.

    Attributes:
        first: The schedule of the first policy.
        second: The schedule of the second policy.
        rows: The letters of both, by branch and module or span. Sites of only one of the policies are included.
    """

    first: Schedule
    second: Schedule
    rows: Mapping[str, Mapping[str, tuple[str, str]]]

    @property
    def same_policy(self) -> bool:
        """True where both policies have the same meaning, on any model and clock."""
        return self.first.plan.resolved.digest == self.second.plan.resolved.digest

    @property
    def differing(self) -> int:
        """Number of module calls that are decided differently."""
        return sum(one != other for pairs in self._pairs() for one, other in zip(*pairs, strict=True))

    @property
    def calls(self) -> int:
        """Number of compared module calls."""
        return sum(len(first) for first, _ in self._pairs())

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for rows in self.rows.values():
            yield from rows.values()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "digests": [schedule.plan.resolved.digest for schedule in (self.first, self.second)],
            "calls": self.calls,
            "differing": self.differing,
            "rows": {branch: {name: list(pair) for name, pair in rows.items()} for branch, rows in self.rows.items()},
        }


def compare(
    first: Plan,
    second: Plan,
    *,
    signals: Mapping[str, SignalValues] | None = None,
    **clock: Any,
) -> Difference:
    """Simulates two plans on one clock.

    Args:
        first: A plan.
        second: Another plan on the same model.
        signals: Numbers of signals and externals. A signal that only one of the policies has is given to that one.
        clock: Other arguments of `simulate`.

    Raises:
        PolicyError: As `simulate`.
    """
    named = [_signals(plan) for plan in (first, second)]
    one, other = (
        # A name that neither knows stays, so that `simulate` raises.
        simulate(
            plan,
            signals={name: numbers for name, numbers in (signals or {}).items() if name not in others - own},
            **clock,
        )
        for plan, own, others in ((first, named[0], named[1]), (second, named[1], named[0]))
    )
    return Difference(one, other, {branch: _rows(one, other, branch) for branch in one.branches})


def _signals(plan: Plan) -> set[str]:
    return {signal.name for signal in plan.resolved.signals} | set(plan.resolved.externals)


def _rows(first: Schedule, second: Schedule, branch: str) -> dict[str, tuple[str, str]]:
    """Returns the letters of every site of either schedule, in model order."""
    sites = {site.modules: site.name for schedule in (first, second) for site in schedule.plan.sites}
    position = first.plan.skeleton.position
    ordered = sorted(sites, key=lambda modules: (position[modules[0]], -len(modules)))
    letters = [_letters(schedule, branch) for schedule in (first, second)]
    steps = first.steps
    return {sites[modules]: (_row(letters[0], modules, steps), _row(letters[1], modules, steps)) for modules in ordered}


def _letters(schedule: Schedule, branch: str) -> dict[str, str]:
    """Returns a row for each module that a site covers."""
    rows = schedule.rows_of(branch)
    letters = dict[str, str]()
    for site in schedule.plan.sites:
        for name in site.modules:
            inner = rows[site.name]
            # Of two sites on one module the outer one comes first; where it computes, the inner one decides.
            outer = letters.get(name, inner)
            letters[name] = "".join(o if o in "R." else i for o, i in zip(outer, inner, strict=True))
    return letters


def _row(letters: Mapping[str, str], modules: Sequence[str], steps: int) -> str:
    columns = zip(*(_of_module(letters, name, steps) for name in modules), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else PARTLY for column in columns)


def _of_module(letters: Mapping[str, str], name: str, steps: int) -> str:
    """Returns the row of a module. A module without one computes, unless a module around it reuses."""
    around = [letters[outer] for outer in ancestors(name) if outer in letters]
    own = letters.get(name, "C" * steps)
    return "".join("." if any(row[step] in "R." for row in around) else own[step] for step in range(steps))


def draw_diff(difference: Difference, names: tuple[str, str], *, width: int = 80, colour: bool = False) -> str:
    """Returns both grids where they differ, what each policy skips, and the number of differences.

    Args:
        difference: The comparison.
        names: Names of the two policies.
        width: Width of the terminal in columns.
        colour: Whether to use ANSI colours.
    """
    lines = list[str]()
    for branch, rows in difference.rows.items():
        unlike = {name: pair for name, pair in rows.items() if pair[0] != pair[1]}
        if unlike and len(difference.rows) > 1:
            lines.append(f"branch `{branch}`")
        for number, name in enumerate(names):
            if unlike:
                lines.append(f"{name}:")
                lines.append(grid({site: pair[number] for site, pair in unlike.items()}, width=width, colour=colour))
    for name, schedule in zip(names, (difference.first, difference.second), strict=True):
        lines.append(f"{name}: {summary(schedule)}")
    return "\n".join([*lines, _verdict(difference)])


def _verdict(difference: Difference) -> str:
    if difference.same_policy:
        return "The two mean the same, on any model."
    if difference.differing == 0:
        return "Here the two decide alike at every call."
    return f"They decide {difference.differing} of {counted(difference.calls, 'module call')} differently."
