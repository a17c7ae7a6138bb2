"""Renders runs and schedules as one HTML file that loads nothing. Text of policies and models is always escaped."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cachepolicy._resources import render_template, template
from cachepolicy.errors import counted
from cachepolicy.language import ir
from cachepolicy.language.formatter import format, format_node
from cachepolicy.language.highlighting import coloured
from cachepolicy.language.parser import parse
from cachepolicy.planning.cost_model import Work, format_bytes, format_flops
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.tally import percent
from cachepolicy.reports.html._cells import CellReasons, decision_grid
from cachepolicy.reports.html._charts import Chart, Mark, bar_chart, curve_chart, number
from cachepolicy.reports.run_record import Picture, RunRecord
from cachepolicy.reports.stats import Curve, Gains, Point, curves, gains, series
from cachepolicy.reports.text import Outcome, signals_text
from cachepolicy.tracing.schema import settings_of
from cachepolicy.tracing.trace import CallRecord, Trajectory

_MOST_CURVES = 6
"""Curves in one chart. More cannot be told apart; the table has all of them."""

Rows = list[tuple[str, ...]]


def page(
    outcomes: Sequence[Outcome],
    *,
    work: Work | None = None,
    uncached: float | Sequence[float | None] | None = None,
    labels: Sequence[str] = (),
    record: RunRecord | None = None,
) -> str:
    """Renders trajectories or schedules as one HTML page.

    Args:
        outcomes: What ran, or what would run. A pipeline with two denoisers has one outcome for each.
        work: The FLOPs of one call of the model.
        uncached: Seconds in the calls of all denoisers without the policy, or those of each outcome.
        labels: What stands behind the title of each outcome, such as its seed.
        record: The samples of the run, which stand above.

    Returns:
        The text of the page.
    """
    reasons = CellReasons()
    # The seconds of all denoisers are known together, so each of them has the same speed-up.
    total = sum(map(_seconds, outcomes))
    shares = (
        [_part_of(uncached, _seconds(outcome), total) for outcome in outcomes]
        if uncached is None or isinstance(uncached, float | int)
        else uncached
    )
    parts = [
        _part(outcome, reasons, gains(outcome, work=work, uncached=seconds), label)
        for outcome, seconds, label in zip(outcomes, shares, [*labels, *[""] * len(outcomes)], strict=False)
    ]
    script = template("report.js")
    rules = [[format_node(bound.rule) for bound in outcome.plan.rules] for outcome in outcomes]
    return render_template(
        "report.html",
        title=parts[0]["title"] if parts else "nothing has run yet",
        parts=parts,
        record=record,
        pictures=[] if record is None else [_pictures(heading, files) for heading, files in record.pictures],
        style=template("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data={**reasons.to_json(), "rules": rules},
    )


def _pictures(heading: str, files: Sequence[Picture]) -> dict[str, Any]:
    images = [(f"data:{file.kind};base64,{base64.b64encode(file.content).decode()}", file.caption) for file in files]
    return {"heading": heading, "images": images}


def _seconds(outcome: Outcome) -> float:
    return outcome.seconds if isinstance(outcome, Trajectory) else 0.0


def _part_of(uncached: float | None, seconds: float, total: float) -> float | None:
    return uncached if uncached is None or not total else uncached * seconds / total


def _part(outcome: Outcome, reasons: CellReasons, gained: Gains, label: str) -> dict[str, Any]:
    """Returns what the template shows of one outcome."""
    plan = outcome.plan
    policy = plan.policy
    recorded = isinstance(outcome, Trajectory)
    branches = outcome.branches if plan.sites else ()
    settings = [f"{name} = {value}" for name, value in settings_of(plan.resolved).items()]
    return {
        "title": f"{policy.title or policy.name or 'a policy'} on {plan.skeleton.name}{f', {label}' if label else ''}",
        "recorded": recorded,
        "open_signals": signals_text(outcome),
        "source": policy.source,
        "digest": plan.resolved.digest,
        "figures": list(_figures(outcome, gained)),
        "grids": [decision_grid(outcome, branch, reasons) for branch in branches],
        "signals": [(branch, charts) for branch in branches if (charts := _signal_charts(outcome, branch))],
        "settings": ", ".join(settings),
        "own_rules": [(_coloured(text), share) for text, share in _own_rules(plan, gained)],
        "used_rules": [
            (_coloured(format_node(plan.rules[rule].rule)), _share(plan, rule, gained))
            for rule, source in enumerate(plan.resolved.sources)
            if source.policy is not policy
        ],
        "errors": _errors(outcome) if recorded else None,
        **(_calls(outcome) if recorded and outcome.calls else {"calls": None, "profile": None}),
    }


def _table(caption: str, heads: Sequence[str], rows: Rows) -> dict[str, Any]:
    return {"caption": caption, "heads": heads, "rows": rows}


def _figures(outcome: Outcome, gained: Gains) -> Iterator[tuple[str, str, str]]:
    """Yields the name, the value and a note of each figure at the head of the report."""
    hidden = gained.tally.calls["hidden"]
    steps = len({tick.step for tick, _ in outcome})
    most = gained.most or gained
    calls = f"{_range(most.tally.skipped, gained.tally.skipped, '{:g}'.format)} of {gained.tally.total}"
    calls += f", {hidden} of them hidden" if hidden else ""
    share = _range(most.tally.skipped, gained.tally.skipped, lambda part: percent(part, gained.tally.total))
    yield "Site calls skipped", share, calls + (f"; {signals_text(outcome)} decides" if gained.most else "")
    yield (
        "Steps",
        str(steps),
        f"{counted(gained.calls, 'call')} of the model, {counted(len(outcome.plan.sites), 'site')}",
    )
    if gained.flops is not None:
        flops, fewest = gained.flops, most.flops or gained.flops
        of_total = f"{_range(fewest.skipped, flops.skipped, format_flops)} of {format_flops(flops.total)}"
        yield "FLOPs skipped", _range(fewest.skipped, flops.skipped, lambda part: percent(part, flops.total)), of_total
        bound = _range(fewest.speed_up, flops.speed_up, lambda factor: f"{factor:.2f}×" if factor < math.inf else "all")
        yield "Speed-up of the model, predicted", bound, "at most, by the FLOPs"
    if gained.seconds is not None:
        if gained.speed_up is not None:
            against = (
                "estimated from calls that computed everything" if gained.estimated else "against the uncached run"
            )
            yield "Speed-up of the model, measured", f"{gained.speed_up:.2f}×", against
        each_call = f"{gained.seconds / max(1, gained.calls) * 1e3:.1f} ms a call"
        yield "Time in the model", f"{number(gained.seconds)} s", each_call
    if isinstance(outcome, Trajectory) and outcome.worst is not None:
        name, step, error = outcome.worst
        yield "Largest error of an answer", f"{error:.2%}", f"{name} at step {step}; every module computed"
    if gained.held:
        yield "Memory held", format_bytes(gained.held, digits=1), "of histories, at most"


def _errors(trajectory: Trajectory) -> dict[str, Any] | None:
    """Returns a table of the errors of an audited trajectory, the site with the largest first."""
    found = dict[int, list[tuple[float, int]]]()
    for call in trajectory.calls:
        for site, error in call.errors.items():
            found.setdefault(site, []).append((error, call.tick.step))
    rows: Rows = [
        (
            trajectory.plan.sites[site].name,
            str(len(errors)),
            f"{sum(error for error, _ in errors) / len(errors):.2%}",
            f"{max(errors)[0]:.2%}",
            str(max(errors)[1]),
        )
        for site, errors in sorted(found.items(), key=lambda item: -max(item[1])[0])
    ]
    heads = ("site", "answers", "mean error", "largest error", "at step")
    return _table("Errors of the answers", heads, rows) if rows else None


def _range(low: float, high: float, shown: Callable[[float], str]) -> str:
    """Returns a number as text, or the range of two different ones."""
    return shown(high) if low == high else f"{shown(low)} to {shown(high)}"


# --- signals ---------------------------------------------------------------------------------------------


def _signal_charts(outcome: Outcome, branch: str) -> list[tuple[Chart, int, str, str, dict[str, Any]]]:
    """Returns for each curve its chart, the number and the text of its comparison, a note and a table."""
    charts = list[tuple[Chart, int, str, str, dict[str, Any]]]()
    for curve in curves(outcome.plan):
        runs = list(series(outcome.plan, curve, list(outcome), branch).values())
        if not runs:
            continue
        label = f"Rule {curve.rule + 1}: {curve.text}" + (f", branch {branch}" if branch else "")
        lines = [[_mark(point, curve) for point in points] for _, points in runs[:_MOST_CURVES]]
        limits = [(point.tick.step, point.limit) for point in runs[0][1]]
        note = f"{_MOST_CURVES} of {len(runs)} different curves are drawn; the table has all."
        heads = ("step", "site", format_node(curve.value), "limit", "decision")
        table = _table(label, heads, [_signal_row(sites, point) for sites, points in runs for point in points])
        chart = curve_chart(lines, limits, label=label)
        charts.append((chart, curve.rule + 1, curve.text, note if len(runs) > _MOST_CURVES else "", table))
    return charts


def _signal_row(sites: Sequence[str], point: Point) -> tuple[str, ...]:
    more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    value, limit = _number(point.value), _number(point.limit)
    return str(point.tick.step), sites[0] + more, value, limit, point.decision.verdict


def _mark(point: Point, curve: Curve) -> Mark:
    decision = point.decision
    asked = f"step {point.tick.step}: {_number(point.value)} {curve.operator} {_number(point.limit)}?"
    title = f"{asked} {'computes' if decision.computes else 'reuses'}: {decision.reason}"
    return Mark(point.tick.step, point.value, decision.computes, title)


def _number(value: float | None) -> str:
    return "undefined" if value is None else number(value)


# --- time and memory -------------------------------------------------------------------------------------


def _calls(trajectory: Trajectory) -> dict[str, Any]:
    """Returns charts and tables of the time and memory of each call, and of each module of a profiled run."""
    calls = trajectory.calls
    rows: Rows = [
        (
            str(index),
            str(call.tick.step),
            call.tick.branch or "first",
            _milliseconds(call),
            _skipped(call),
            format_bytes(call.held, digits=1),
        )
        for index, call in enumerate(calls)
    ]
    titles = [
        f"step {step}{f', branch {call.tick.branch}' if call.tick.branch else ''}: "
        f"{milliseconds} ms, {skipped} skipped, {held} held"
        for call, (_, step, _, milliseconds, skipped, held) in zip(calls, rows, strict=True)
    ]
    seconds = [(1e3 * call.seconds, _kind(call)) for call in calls]
    caption = "Milliseconds of each call of the model, one after the other"
    charts = [(bar_chart(seconds, titles, label="Milliseconds of each call", unit="ms"), caption)]
    most = max(call.held for call in calls)
    if most:
        power = max(power for power in range(4) if most >= 1024**power)
        held = [(call.held / 1024**power, "held") for call in calls]
        chart = bar_chart(held, titles, label="Memory held after each call", unit=("B", "KiB", "MiB", "GiB")[power])
        charts.append((chart, "Memory that the session held after each call"))
    heads = ("call", "step", "branch", "milliseconds", "skipped", "held")
    table = _table("Every call of the model", heads, rows)
    return {"call_charts": charts, "calls": table, "profile": _profile(trajectory)}


def _kind(call: CallRecord) -> str:
    return "reuses" if any(decision.verdict == "reuse" for decision in call.decided) else "computes"


def _skipped(call: CallRecord) -> str:
    decisions = call.decisions
    return percent(sum(not decision.computes for decision in decisions), len(decisions))


def _milliseconds(call: CallRecord) -> str:
    return number(1e3 * call.seconds)


def _profile(trajectory: Trajectory) -> dict[str, Any] | None:
    """Returns the time of each profiled module, of calls that computed and of calls that reused."""
    spent: dict[str, tuple[list[float], list[float]]] = {}
    sites = {name: site.index for site in trajectory.plan.sites for name in site.modules}
    for call in trajectory.calls:
        decisions = call.decisions
        for module_call in call.profile:
            if module_call.module in sites:
                computed, reused = spent.setdefault(module_call.module, ([], []))
                (computed if decisions[sites[module_call.module]].computes else reused).append(module_call.seconds)
    if not any(call.profile for call in trajectory.calls):
        return None
    longest = sorted(spent.items(), key=lambda item: -sum(map(sum, item[1])))
    rows: Rows = [(name, *map(_mean, times), number(sum(map(sum, times)))) for name, times in longest]
    return _table(
        "Mean time of each call of a module", ("module", "ms computing", "ms reusing", "seconds in all"), rows
    )


def _mean(seconds: Sequence[float]) -> str:
    return f"{number(1e3 * sum(seconds) / len(seconds))} ({counted(len(seconds), 'call')})" if seconds else "never"


def _coloured(text: str) -> list[tuple[str, str]]:
    """Returns the text of a policy in pieces, each with the class of its colour, "" for none."""
    pieces = list[tuple[str, str]]()
    for piece, role in coloured(text):
        kind = _COLOURS.get(role, "")
        before = pieces.pop()[0] if pieces and pieces[-1][1] == kind else ""
        pieces.append((before + piece, kind))
    return pieces


_COLOURS = {
    "comment": "note", "string": "text", "number": "number", "statement": "word", "clause": "word", "action": "act",
    "connective": "word", "kind": "name", "probe": "name", "clock": "name", "function": "name", "type": "name",
    "constant": "number",
}  # fmt: skip
"""The class of each role of a piece of text."""


# --- the policy's text -----------------------------------------------------------------------------------


def _own_rules(plan: Plan, gained: Gains) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yields the policy's text in pieces, each rule with its share of the decisions."""
    text = format(plan.policy)
    lines, done = text.splitlines(), 0
    sources = plan.resolved.sources
    rules = {source.statement: rule for rule, source in enumerate(sources) if source.policy is plan.policy}
    for index, statement in enumerate(parse(text).statements):
        if isinstance(statement, ir.Rule) and statement.span is not None:
            yield from _lines(lines[done : statement.span.line - 1])
            done = statement.span.end_line
            yield "\n".join(lines[statement.span.line - 1 : done]), _share(plan, rules.get(index), gained)
    yield from _lines(lines[done:])


def _lines(lines: Sequence[str]) -> Iterator[tuple[str, None]]:
    if any(lines):
        yield "\n".join(lines).strip("\n"), None


def _share(plan: Plan, rule: int | None, gained: Gains) -> dict[str, Any]:
    """Returns what is shown beside a rule: the share of the decisions that it makes."""
    if rule is None:
        return {"rule": None, "text": "off"}
    if not plan.rules[rule].sites:
        return {"rule": None, "text": f"Rule {rule + 1} takes nothing here"}
    owned, reused, halved = (counts[rule] for counts in (gained.tally.owned, gained.tally.reused, gained.tally.halved))
    text = f"decides {percent(owned, gained.tally.total)}, reuses {reused} of {owned}"
    text += f", {halved} of them by half" if halved else ""
    if gained.flops is not None:
        text += f", skips {percent(gained.flops.skipped_by_rule.get(rule, 0), gained.flops.total)} of the FLOPs"
    of_all = 100 / max(1, gained.tally.total)
    return {
        "rule": rule + 1,
        "text": text,
        "owned": f"{of_all * owned:.2f}",
        "reused": f"{of_all * (reused - halved / 2):.2f}",
    }
