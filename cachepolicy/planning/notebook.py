"""A schedule's grid as a short piece of HTML for notebooks: no script, readable on light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from cachepolicy.planning.grid import alike, folded

if TYPE_CHECKING:
    from jinja2 import Template

_COLOURS = {"C": "background:#f7dcae;color:#5a3800", "R": "background:#bfe5d5;color:#0a4634", ".": "opacity:.55"}
_MAX_ROWS = 40
_TEMPLATE = """\
<div style="overflow-x:auto"><p>{{ summary }}</p>
{%- for branch, lines in tables %}
{%- if tables|length > 1 %}<p>branch {{ branch or "first" }}</p>{% endif -%}
<table style="border-collapse:collapse;line-height:1.2;margin:0"><tbody>
{%- for name, row in lines[:max_rows] -%}
<tr><th scope="row" style="text-align:left;font-weight:normal;font-family:monospace;padding-right:1em">{{ name }}</th>
{%- for letter in row -%}
<td style="padding:0 .15em;text-align:center;font-family:monospace;border:0;{{ colours[letter] }}">{{ letter }}</td>
{%- endfor %}</tr>
{%- endfor %}</tbody></table>
{%- if lines|length > max_rows %}<p>and {{ lines|length - max_rows }} rows more</p>{% endif -%}
{%- endfor %}</div>"""


@cache
def _template() -> Template:
    # Imported on first use: `import cachepolicy` and the command line do not need jinja2.
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(_TEMPLATE)


def notebook_html(rows: Mapping[str, Mapping[str, str]], summary: str) -> str:
    """Returns the rows of each branch as HTML tables below a summary line.

    Args:
        rows: For each branch name, one string of `C`, `R` and `.` letters per site. Sites with equal rows share a line.
        summary: One line of text above the tables. All text is escaped.
    """
    tables = [
        (branch, [(name, row) for row, names in alike(sites).items() for name in folded(names)])
        for branch, sites in rows.items()
    ]
    return _template().render(summary=summary, tables=tables, colours=_COLOURS, max_rows=_MAX_ROWS)
