"""The policy's text in a report, each rule beside its share of the decisions."""

from __future__ import annotations

from collections.abc import Sequence

from cachepolicy.language import ir
from cachepolicy.language.formatter import format, format_node
from cachepolicy.language.parser import parse
from cachepolicy.planning.plan import Plan
from cachepolicy.reports.html.markup import Markup, tag
from cachepolicy.reports.stats import Gains, percent
from cachepolicy.tracing.schema import settings_of


def policy(plan: Plan, gained: Gains) -> Markup:
    """The policy's text, beside each rule its share of the decisions; below it the rules that come by `use`."""
    own, text = plan.policy, format(plan.policy)
    lines = text.splitlines()
    sources = plan.resolved.sources
    by_statement = {source.statement: rule for rule, source in enumerate(sources) if source.policy is own}
    rows, done = list[Markup | None](), 0
    for place, statement in enumerate(parse(text).statements):
        if isinstance(statement, ir.Rule) and statement.span is not None:
            rows.append(_text_row(lines[done : statement.span.line - 1], None))
            done = statement.span.end_line
            share = _rule_share(plan, by_statement.get(place), gained)
            rows.append(_text_row(lines[statement.span.line - 1 : done], share))
    rows.append(_text_row(lines[done:], None))
    used = [
        _text_row([format_node(plan.rules[rule].rule)], _rule_share(plan, rule, gained))
        for rule, source in enumerate(sources)
        if source.policy is not own
    ]
    settings = [f"{name} = {value}" for name, value in settings_of(plan.resolved).items()]
    return tag(
        "section",
        tag("h2", "Policy"),
        tag("p", "Set: ", tag("code", ", ".join(settings)), class_="note") if settings else None,
        tag("div", *rows, class_="policy"),
        [tag("h3", "Rules that it uses"), tag("div", *used, class_="policy")] if used else None,
    )


def _text_row(lines: Sequence[str], share: Markup | None) -> Markup | None:
    if not any(lines) and share is None:
        return None
    text = tag("pre", "\n".join(lines).strip("\n"))
    return tag("div", text, share, class_="rule" if share else None)


def _rule_share(plan: Plan, rule: int | None, gained: Gains) -> Markup:
    if rule is None:
        return tag("p", "off", class_="share")
    if not plan.rules[rule].sites:
        return tag("p", f"Rule {rule + 1} takes nothing here", class_="share")
    owned, reused = gained.tally.owned[rule], gained.tally.reused[rule]
    told = f"decides {percent(owned, gained.site_calls)}, reuses {reused} of {owned}"
    flops = gained.flops
    if flops is not None:
        told += f", skips {percent(flops.skipped_by_rule.get(rule, 0), flops.total)} of the FLOPs"
    bar = tag(
        "span",
        class_="bar",
        aria_hidden="true",
        style=f"--owned:{_part_of(owned, gained)};--reused:{_part_of(reused, gained)}",
    )
    return tag("p", tag("b", f"Rule {rule + 1}"), f" {told}", bar, class_="share")


def _part_of(count: int, gained: Gains) -> str:
    return f"{100 * count / max(1, gained.site_calls):.2f}%"
