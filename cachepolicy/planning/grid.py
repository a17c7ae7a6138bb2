"""Grids of a schedule for a terminal and for notebooks; module names that differ in a number, written as one name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from cachepolicy._resources import render_template

_COLOURS = {"C": "\x1b[33;1m", "R": "\x1b[32m", "S": "\x1b[36m", ".": "\x1b[2m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_STYLES = {
    "C": "background:#f7dcae;color:#5a3800",
    "R": "background:#bfe5d5;color:#0a4634",
    "S": "background:#d6dcf5;color:#26326e",
    ".": "opacity:.55",
}
_MOST_ROWS = 40


def grid(rows: Mapping[str, str], *, width: int = 80, colour: bool = False) -> str:
    """Draws rows of letters under a ruler of steps. Sites with equal rows share a line.

    Args:
        rows: The row of each site.
        width: Width in columns. Steps that do not fit continue in another panel below.
        colour: Whether to use ANSI colours.
    """
    lines = [(name, row) for row, names in alike(rows).items() for name in folded(names)]
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


def notebook_html(rows: Mapping[str, Mapping[str, str]], summary: str) -> str:
    """Returns the rows of each branch as HTML tables below a summary line, without a script.

    Args:
        rows: For each branch name, one string of `C`, `R` and `.` letters per site. Sites with equal rows share a line.
        summary: One line of text above the tables. All text is escaped.
    """
    tables = [
        (branch, [(name, row) for row, names in alike(sites).items() for name in folded(names)])
        for branch, sites in rows.items()
    ]
    return render_template("notebook.html", summary=summary, tables=tables, colours=_STYLES, max_rows=_MOST_ROWS)


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
    """Returns a name without a part of its middle, because the end distinguishes sites better."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def alike(rows: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the names by the row that they share, in the order of the rows."""
    names = dict[str, list[str]]()
    for name, row in rows.items():
        names.setdefault(row, []).append(name)
    return names


def folded(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns names that differ in numbers under one: `blocks.0.attn1`, `blocks.1.attn1` under `blocks.0-1.attn1`."""
    parts = {tuple(name.split(".")): [name] for name in names}
    for position in reversed(range(max(map(len, parts), default=0))):
        parts = _folded_at(parts, position)
    return {".".join(name): members for name, members in parts.items()}


_Parts = tuple[str, ...]


def _folded_at(names: Mapping[_Parts, list[str]], position: int) -> dict[_Parts, list[str]]:
    """Returns names that are equal but for a number at one position under one name with a range of numbers."""
    groups = dict[tuple[_Parts, _Parts | None], dict[str, list[str]]]()
    for name, members in names.items():
        part = name[position] if len(name) > position else ""
        key = (name[:position], name[position + 1 :]) if part.isdecimal() else (name, None)
        groups.setdefault(key, {})[part] = members
    return {
        before if after is None else (*before, _ranges(sorted(map(int, parts))), *after): list(chain(*parts.values()))
        for (before, after), parts in groups.items()
    }


def _ranges(numbers: Sequence[int]) -> str:
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
