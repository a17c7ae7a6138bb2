"""What a report shows over the steps of a run: signals against their limits, and the time and memory of each call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cachepolicy.language.formatter import format_node
from cachepolicy.planning.schedule import Decision
from cachepolicy.reports.html.markup import Markup, tag
from cachepolicy.reports.html.svg import Mark, bars, curve, number, table
from cachepolicy.reports.stats import Curve, Point, curves, format_short_bytes, percent, series
from cachepolicy.reports.text import Outcome
from cachepolicy.tracing.trace import CallRecord, Trajectory

_MOST_CURVES = 6
"""Lines in one drawing: more cannot be told apart, and stand in the table."""


def branch_name(outcome: Outcome, branch: str) -> Markup | None:
    """A heading where there is more than one branch."""
    return tag("h3", f"Branch {branch or 'first'}") if len(outcome.branches) > 1 else None


def signals(outcome: Outcome) -> Iterator[Markup]:
    """The section of signals, of a policy that decides by any."""
    found = [
        tag("div", branch_name(outcome, branch), *drawn, data_branch=branch)
        for branch in outcome.branches
        if (drawn := [drawing for each in curves(outcome.plan) for drawing in _curve(outcome, each, branch)])
    ]
    if found:
        note = "Squares compute, circles reuse; the dashed line is what the rule compares with."
        yield tag("section", tag("h2", "Signals"), tag("p", note, class_="note"), *found)


def _curve(outcome: Outcome, each: Curve, branch: str) -> Iterator[Markup]:
    runs = list(series(outcome.plan, each, list(outcome), branch).values())
    if not runs:
        return
    label = f"Rule {each.rule + 1}: {each.text}" + (f", branch {branch}" if branch else "")
    lines = [[_mark_of(point, each) for point in run] for _, run in runs[:_MOST_CURVES]]
    limits = [(point.tick.step, point.limit) for point in runs[0][1]]
    more = f"{_MOST_CURVES} of {len(runs)} different curves are drawn; the table has all."
    rows = [_row(names, point) for names, run in runs for point in run]
    yield tag(
        "figure",
        tag("figcaption", "Rule ", each.rule + 1, ": ", tag("code", each.text)),
        tag("p", more, class_="note") if len(runs) > _MOST_CURVES else None,
        tag("div", curve(lines, limits, label=label), class_="scroll", tabindex="0", role="group", aria_label=label),
        table(label, ("step", "site", format_node(each.value), "limit", "decision"), rows),
    )


def _row(sites: Sequence[str], point: Point) -> tuple[str, ...]:
    more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    return str(point.tick.step), sites[0] + more, _of(point.value), _of(point.limit), point.decision.verdict


def _mark_of(point: Point, each: Curve) -> Mark:
    told = f"step {point.tick.step}: {_of(point.value)} {each.operator} {_of(point.limit)}? {_verb(point.decision)}"
    return Mark(point.tick.step, point.value, point.decision.computes, told)


def _of(value: float | None) -> str:
    return "undefined" if value is None else number(value)


def _verb(decision: Decision) -> str:
    return f"{'computes' if decision.computes else 'reuses'}: {decision.reason}"


# --- the run ---------------------------------------------------------------------------------------------


def calls(trajectory: Trajectory) -> Iterator[Markup]:
    """The section of time and memory, and that of time by module where the run was profiled."""
    calls = trajectory.calls
    told = [_told(call) for call in calls]
    rows = [
        (
            str(index),
            str(call.tick.step),
            call.tick.branch or "first",
            _milliseconds(call),
            _share(call),
            format_short_bytes(call.held),
        )
        for index, call in enumerate(calls)
    ]
    caption = "Milliseconds of each call of the model, one after the other"
    seconds = [(1e3 * call.seconds, _kind(call)) for call in calls]
    figures = [_figure(caption, bars(seconds, told, label="Milliseconds of each call", unit="ms"))]
    if any(call.held for call in calls):
        unit, held = _in_one_unit([call.held for call in calls])
        drawn = bars([(value, "held") for value in held], told, label="Memory held after each call", unit=unit)
        figures.append(_figure("Memory that the session held after each call", drawn))
    heads = ("call", "step", "branch", "milliseconds", "skipped", "held")
    yield tag("section", tag("h2", "Time and memory"), *figures, table("Every call of the model", heads, rows))
    if any(call.profile for call in calls):
        yield _profile(trajectory)


def _figure(caption: str, drawing: Markup) -> Markup:
    scroll = tag("div", drawing, class_="scroll", tabindex="0", role="group", aria_label=caption)
    return tag("figure", tag("figcaption", caption), scroll)


def _in_one_unit(counts: Sequence[int]) -> tuple[str, list[float]]:
    power, unit = 0, "B"
    for name in ("KiB", "MiB", "GiB"):
        if max(counts) >= 1024 ** (power + 1):
            power, unit = power + 1, name
    return unit, [count / 1024**power for count in counts]


def _kind(call: CallRecord) -> str:
    reused = any(decision.verdict == "reuse" for decision in call.decided)
    return "reuses" if reused else "computes"


def _share(call: CallRecord) -> str:
    decisions = call.decisions
    return percent(sum(not decision.computes for decision in decisions), len(decisions))


def _told(call: CallRecord) -> str:
    branch = f", branch {call.tick.branch}" if call.tick.branch else ""
    held = format_short_bytes(call.held)
    return f"step {call.tick.step}{branch}: {_milliseconds(call)} ms, {_share(call)} skipped, {held} held"


def _milliseconds(call: CallRecord) -> str:
    return number(1e3 * call.seconds)


def _profile(trajectory: Trajectory) -> Markup:
    """The time of each site, computed and answered."""
    spent: dict[str, tuple[list[float], list[float]]] = {}
    sites = {name: site.index for site in trajectory.plan.sites for name in site.modules}
    for call in trajectory.calls:
        decisions = call.decisions
        for each in call.profile:
            if each.module in sites:
                computed, answered = spent.setdefault(each.module, ([], []))
                (computed if decisions[sites[each.module]].computes else answered).append(each.seconds)
    longest = sorted(spent.items(), key=lambda item: -sum(map(sum, item[1])))
    rows = [(name, *map(_mean, times), number(sum(map(sum, times)))) for name, times in longest]
    heads = ("module", "ms computing", "ms reusing", "seconds in all")
    drawn = table("Mean time of each call of a module", heads, rows, shown=True)
    return tag("section", tag("h2", "Time by module"), drawn)


def _mean(seconds: Sequence[float]) -> str:
    return f"{number(1e3 * sum(seconds) / len(seconds))} ({len(seconds)} calls)" if seconds else "never"
