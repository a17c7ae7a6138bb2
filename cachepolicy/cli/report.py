"""What the `report` command shows of a saved trace, and the files that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

from cachepolicy.cli import output
from cachepolicy.errors import PolicyError
from cachepolicy.reports import text as report_text
from cachepolicy.reports.html.page import page
from cachepolicy.tracing.perfetto import to_json as perfetto_json
from cachepolicy.tracing.trace import Trace


def show_trace(trace: Trace, *, html: str | None, perfetto: str | None, as_json: bool) -> None:
    """Print the newest session; write its page, and all that the trace holds for a viewer of traces.

    Raises:
        PolicyError: E152, a file cannot be written.
    """
    if html is not None:
        _write(html, page(trace.latest))
    if perfetto is not None:
        _write(perfetto, perfetto_json(trace))
    if as_json:
        output.say_json([report_text.outcome_to_json(each) for each in trace.latest])
        return
    drawn = [
        report_text.draw(each, width=output.columns(), colour=output.coloured(sys.stdout)) for each in trace.latest
    ]
    output.say("\n\n".join(drawn) or str(trace))


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PolicyError.of("E152", f"`{path}` cannot be written: {(error.strerror or str(error)).lower()}") from error
