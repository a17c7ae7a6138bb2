"""The report of a run or of a schedule as one HTML file: it loads nothing, and what a policy or model says is text."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from string import Template

from cachepolicy._resources import template
from cachepolicy.language.formatter import format_node
from cachepolicy.planning.forecast import Work, format_flops
from cachepolicy.planning.plan import Plan
from cachepolicy.reports.html import ledger, timeline
from cachepolicy.reports.html.grid import Reasons, html_grid
from cachepolicy.reports.html.markup import Markup, data, joined, tag
from cachepolicy.reports.html.svg import number
from cachepolicy.reports.stats import Gains, format_short_bytes, gains, percent
from cachepolicy.reports.text import Outcome
from cachepolicy.tracing.trace import Trajectory


def page(outcomes: Sequence[Outcome], *, work: Work | None = None, uncached: float | None = None) -> str:
    """The HTML of one or more trajectories or schedules: of several, as where a pipeline has two denoisers, in turn.

    `work` are the FLOPs of one call of the model, `uncached` the seconds that it takes without the policy.
    """
    script, reasons = template("report.js"), Reasons()
    body = [
        _part(outcome, place, reasons, gains(outcome, work=work, uncached=uncached))
        for place, outcome in enumerate(outcomes)
    ]
    title = _title(outcomes[0].plan) if outcomes else "nothing has run yet"
    rules = [[format_node(bound.rule) for bound in outcome.plan.rules] for outcome in outcomes]
    return Template(template("report.html")).substitute(
        title=joined(title),
        style=template("report.css"),
        script=script,
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        body=joined(body or tag("p", "Nothing has run yet.")),
        data=data({**reasons.to_json(), "rules": rules}),
    )


def _title(plan: Plan) -> str:
    policy = plan.policy
    return f"{policy.title or policy.name or 'a policy'} on {plan.skeleton.name}"


def _part(outcome: Outcome, place: int, reasons: Reasons, gained: Gains) -> Markup:
    plan = outcome.plan
    heading = tag("h1", _title(plan), id=f"part-{place}")
    sections = [tag("header", heading, _lead(outcome), _figures(outcome, gained))]
    if not plan.sites or not outcome.branches:
        sections.append(tag("p", "No site: every module computes at every step."))
    else:
        sections.append(_decisions(outcome, place, reasons))
        sections += timeline.signals(outcome)
    if isinstance(outcome, Trajectory) and outcome.calls:
        sections += timeline.calls(outcome)
    sections.append(ledger.policy(plan, gained))
    return tag("article", *sections, data_part=place, aria_labelledby=f"part-{place}")


def _lead(outcome: Outcome) -> Markup:
    source = outcome.plan.policy.source
    digest = outcome.plan.resolved.digest
    return tag(
        "p",
        "What a run did. " if isinstance(outcome, Trajectory) else "What a run will do. ",
        f"The policy is from {source}. " if source else None,
        "Its hash is ",
        tag("code", digest, class_="hash"),
        ".",
        class_="lead",
    )


# --- figures ---------------------------------------------------------------------------------------------


def _figures(outcome: Outcome, gained: Gains) -> Markup:
    items = [
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", note)))
        for name, value, note in _numbers(outcome, gained)
    ]
    return tag("dl", *items, class_="figures")


def _numbers(outcome: Outcome, gained: Gains) -> Iterator[tuple[str, str, str]]:
    plan = outcome.plan
    hidden = gained.tally.calls["hidden"]
    steps = len({tick.step for tick, _ in outcome})
    yield (
        "Site calls skipped",
        percent(gained.skipped, gained.site_calls),
        f"{gained.skipped} of {gained.site_calls}" + (f", {hidden} of them hidden" if hidden else ""),
    )
    yield "Steps", str(steps), f"{gained.calls} calls of the model, {len(plan.sites)} sites"
    if gained.flops is not None:
        flops = gained.flops
        yield (
            "FLOPs skipped",
            percent(flops.skipped, flops.total),
            f"{format_flops(flops.skipped)} of {format_flops(flops.total)}",
        )
        bound = f"{flops.speed_up:.2f}×" if flops.share < 1 else "all"
        yield "Speed-up, predicted", bound, "at most, by the FLOPs"
    if gained.seconds is not None:
        if gained.speed_up is not None:
            against = (
                "estimated from calls that computed everything" if gained.estimated else "against the uncached run"
            )
            yield "Speed-up, measured", f"{gained.speed_up:.2f}×", against
        yield (
            "Time in the model",
            f"{number(gained.seconds)} s",
            f"{gained.seconds / max(1, gained.calls) * 1e3:.1f} ms a call",
        )
    if gained.held:
        yield "Memory held", format_short_bytes(gained.held), "of histories, at most"


# --- decisions -------------------------------------------------------------------------------------------


def _decisions(outcome: Outcome, place: int, reasons: Reasons) -> Markup:
    grids = [
        tag("div", timeline.branch_name(outcome, branch), html_grid(outcome, branch, reasons), data_branch=branch)
        for branch in outcome.branches
    ]
    legend = tag(
        "p",
        tag("span", "C", class_="key C"), " computes ",
        tag("span", "R", class_="key R"), " reuses ",
        tag("span", "·", class_="key H"), " is hidden in a site that reuses",
        class_="legend",
    )  # fmt: skip
    help = "Point at a cell, or walk with the arrow keys, to see which rule decided and why."
    inspector = tag("div", tag("p", help), class_="inspector", id=f"why-{place}")
    controls = tag("div", _chooser(outcome, place), _modes(place), legend, class_="controls")
    return tag("section", tag("h2", "Decisions"), controls, *grids, inspector)


def _chooser(outcome: Outcome, place: int) -> Markup | None:
    if len(outcome.branches) < 2:
        return None
    return _radios("Branch", f"branch-{place}", [(branch, branch or "first") for branch in outcome.branches])


def _modes(place: int) -> Markup:
    return _radios("Cells show", f"mode-{place}", [("letters", "the decision"), ("rules", "the rule")])


def _radios(legend: str, name: str, options: Sequence[tuple[str, str]]) -> Markup:
    labels = [
        tag("label", tag("input", type="radio", name=name, value=value, checked=not index), " ", text)
        for index, (value, text) in enumerate(options)
    ]
    return tag("fieldset", tag("legend", legend), *labels, class_="choice")
