"""Draw a schedule, simulated or traced, for a terminal, and count what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachepolicy.plan import Plan, label
from cachepolicy.schedule import Decision, Tick
from cachepolicy.simulation import Schedule
from cachepolicy.trace import Trajectory

Outcome = Schedule | Trajectory

_COLOURS = {"C": "\x1b[33;1m", "R": "\x1b[32m", ".": "\x1b[2m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def draw(outcome: Outcome, *, width: int = 80, colour: bool = False) -> str:
    """The grid of sites by steps, one a branch where branches differ, the rules' shares and a summary line."""
    parts = list[str]()
    for branches, rows in _by_branch(outcome):
        if len(outcome.branches) > 1:
            parts.append(f"branch {' and '.join(f'`{name}`' for name in branches)}")
        parts.append(grid(rows, width=width, colour=colour))
    legend = f"C computes  R reuses{'  . hidden in a site that reuses' if tally(outcome).calls['hidden'] else ''}"
    if not outcome.branches or not plan_of(outcome).sites:
        parts, legend = [], "no site: every module computes at every step"
    return "\n".join(
        [*parts, f"{_DIM}{legend}{_RESET}" if colour else legend, "", *_shares(outcome, width), summary(outcome)]
    )


def summary(outcome: Outcome) -> str:
    """One line: sites, steps, the share of their calls that is skipped, and the semantic hash of the policy."""
    plan, calls = plan_of(outcome), tally(outcome).calls
    total = sum(calls.values())
    skipped = total - calls["compute"]
    hidden = f", {calls['hidden']} of them hidden" if calls["hidden"] else ""
    share = f"{100 * skipped / total:.1f} %" if total else "0 %"
    steps = len({tick.step for tick, _ in _calls(outcome)})
    return (
        f"{_many(steps, 'step')}, {_many(len(plan.sites), 'site')}: {skipped} of {total} site calls skipped "
        f"({share}{hidden}); policy {plan.resolved.digest[:12]}"
    )


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The same as plain data: sites, a row of letters for each by branch, the rules' shares, the counts."""
    plan, counted = plan_of(outcome), tally(outcome)
    rules = [
        {
            "rule": bound.index + 1,
            "text": label(bound.rule, width=1000),
            "sites": [plan.sites[index].name for index in bound.sites],
            "owned": counted.owned[bound.index],
            "reused": counted.reused[bound.index],
        }
        for bound in plan.rules
    ]
    first = outcome.branches[0] if outcome.branches else ""
    return {
        "policy": plan.policy.name,
        "digest": plan.resolved.digest,
        "model": plan.skeleton.name,
        "timesteps": [tick.t for tick, _ in _calls(outcome) if tick.branch == first],
        "sites": [{"name": site.name, "modules": list(site.modules)} for site in plan.sites],
        "rows": {branch: rows_of(outcome, branch) for branch in outcome.branches},
        "rules": rules,
        "calls": {verdict: counted.calls[verdict] for verdict in ("compute", "reuse", "hidden")},
    }


# --- counts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tally:
    """Site calls by verdict, and by rule how many it owned and how many of those it answered."""

    calls: Counter[str]
    owned: Counter[int]
    reused: Counter[int]


def tally(outcome: Outcome) -> Tally:
    """Count the decisions of all calls."""
    counted = Tally(Counter(), Counter(), Counter())
    for _, decisions in _calls(outcome):
        for decision in decisions:
            counted.calls[decision.verdict] += 1
            if decision.rule is not None:
                counted.owned[decision.rule] += 1
                counted.reused[decision.rule] += decision.verdict == "reuse"
    return counted


def plan_of(outcome: Outcome) -> Plan:
    """The plan that the decisions belong to."""
    return outcome.plan


def rows_of(outcome: Outcome, branch: str) -> dict[str, str]:
    """One letter a step for each site."""
    return outcome.rows_of(branch) if isinstance(outcome, Schedule) else outcome.rows(branch)


def _calls(outcome: Outcome) -> Iterator[tuple[Tick, Sequence[Decision]]]:
    if isinstance(outcome, Schedule):
        yield from outcome
    else:
        yield from ((call.tick, call.decisions) for call in outcome.calls)


def _by_branch(outcome: Outcome) -> list[tuple[list[str], dict[str, str]]]:
    """The rows of each branch; branches with the same rows stand together."""
    found = list[tuple[list[str], dict[str, str]]]()
    for branch in outcome.branches:
        rows = rows_of(outcome, branch)
        for names, known in found:
            if known == rows:
                names.append(branch)
                break
        else:
            found.append(([branch], rows))
    return found


def _shares(outcome: Outcome, width: int) -> Iterator[str]:
    counted = tally(outcome)
    for bound in plan_of(outcome).rules:
        head = f"rule {bound.index + 1}"
        if not bound.sites:
            yield f"{head}: takes nothing here   {label(bound.rule, width=max(20, width - len(head) - 24))}"
            continue
        owned, reused = counted.owned[bound.index], counted.reused[bound.index]
        share = f"{head}: owns {_many(owned, 'call')}, answers {reused}   "
        yield share + label(bound.rule, width=max(20, width - len(share)))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# --- the grid --------------------------------------------------------------------------------------------


def grid(rows: Mapping[str, str], *, width: int = 80, colour: bool = False) -> str:
    """Rows of letters under a ruler of steps; sites that read the same share a line.

    What does not fit `width` columns goes on in a further panel below.
    """
    lines = [(name, row) for row, names in _alike(rows).items() for name in folded(names)]
    if not lines:
        return ""
    steps = max(len(row) for _, row in lines)
    names = min(max(len(name) for name, _ in lines), max(12, width // 2))
    room = max(10, (width - names - 2) // 10 * 10 if width - names - 2 < steps else steps)
    panels = list[str]()
    for start in range(0, max(1, steps), room):
        ruler = " " * (names + 2) + _ruler(start, min(room, steps - start))
        panels.append(f"{_DIM}{ruler}{_RESET}" if colour else ruler)
        for name, row in lines:
            letters = row[start : start + room]
            panels.append(f"{_cut(name, names):<{names}}  {_painted(letters) if colour else letters}".rstrip())
    return "\n".join(panels)


def _ruler(start: int, count: int) -> str:
    marks = "".join(f"{step:<10}" for step in range(start, start + count, 10))
    return marks[: max(count, len(marks.rstrip()))].rstrip()


def _painted(letters: str) -> str:
    painted, before = "", ""
    for letter in letters:
        painted += letter if letter == before else f"{_RESET if before else ''}{_COLOURS.get(letter, '')}{letter}"
        before = letter
    return painted + (_RESET if before else "")


def _cut(name: str, width: int) -> str:
    """The end of a name tells sites apart better than its middle."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def _alike(rows: Mapping[str, str]) -> dict[str, list[str]]:
    alike = dict[str, list[str]]()
    for name, row in rows.items():
        alike.setdefault(row, []).append(name)
    return alike


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ in one number written as one: `blocks.0.attn1`, `blocks.1.attn1` as `blocks.0-1.attn1`."""
    parts = [tuple(name.split(".")) for name in names]
    for place in reversed(range(max(map(len, parts), default=0))):
        parts = _folded_at(parts, place)
    return [".".join(each) for each in parts]


def _folded_at(names: Sequence[tuple[str, ...]], place: int) -> list[tuple[str, ...]]:
    groups = dict[tuple[str, ...], list[int]]()
    for name in names:
        if len(name) > place and name[place].isdecimal():
            groups.setdefault((*name[:place], "#", *name[place + 1 :]), []).append(int(name[place]))
        else:
            groups.setdefault(name, [])
    return [
        (*name[:place], _ranges(sorted(numbers)), *name[place + 1 :]) if numbers else name
        for name, numbers in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
