"""The grid in a few lines of HTML, for notebooks: no script, and colours that stand on light and dark."""

from __future__ import annotations

from collections.abc import Mapping

from cachepolicy.markup import Markup, tag
from cachepolicy.planning.grid import alike, folded

_CELL = "padding:0 .15em;text-align:center;font-family:monospace;border:0;"
_COLOURS = {"C": "background:#f7dcae;color:#5a3800", "R": "background:#bfe5d5;color:#0a4634", ".": "opacity:.55"}
_MOST = 40


def glance(rows: Mapping[str, Mapping[str, str]], summary: str) -> str:
    """The rows of letters of each branch, those that read alike on one line, under a line that sums them up."""
    parts = [tag("p", summary)]
    for branch, each in rows.items():
        if len(rows) > 1:
            parts.append(tag("p", f"branch {branch or 'first'}"))
        parts.append(_table(each))
    return tag("div", *parts, style="overflow-x:auto")


def _table(rows: Mapping[str, str]) -> Markup:
    lines = [(name, row) for row, names in alike(rows).items() for name in folded(names)]
    body = [_line(name, row) for name, row in lines[:_MOST]]
    more = tag("p", f"and {len(lines) - _MOST} rows more") if len(lines) > _MOST else None
    table = tag("table", tag("tbody", *body), style="border-collapse:collapse;line-height:1.2;margin:0")
    return Markup(table + (more or ""))


def _line(name: str, row: str) -> Markup:
    head = tag(
        "th", name, scope="row", style="text-align:left;font-weight:normal;font-family:monospace;padding-right:1em"
    )
    return tag("tr", head, *(tag("td", letter, style=_CELL + _COLOURS.get(letter, "")) for letter in row))
