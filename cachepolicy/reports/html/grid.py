"""The grid of a report: sites that are decided alike share a row, and every cell knows why it is what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.planning.grid import folded
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import Decision, Tick
from cachepolicy.reports.explanation import AskedRule, explain_decision
from cachepolicy.reports.html.markup import Markup, tag
from cachepolicy.reports.html.svg import number
from cachepolicy.reports.text import Outcome

CellCalls = Sequence[tuple[Tick, Sequence[Decision]]]
_WORDS = {"compute": "computes", "reuse": "reuses", "hidden": "is hidden"}


@dataclass(slots=True)
class Reasons:
    """What the cells say, every text and every reason once: the page's script looks them up by number."""

    texts: dict[str, int] = field(default_factory=dict[str, int])
    reasons: dict[tuple[Any, ...], int] = field(default_factory=dict[tuple[Any, ...], int])
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _known: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict[tuple[int, tuple[int, ...]], int])

    def of(self, plan: Plan, site: int, tick: Tick, decision: Decision) -> int:
        """The number of the reason of a decision; sites of a group have the very same decision and rules."""
        key = id(decision), plan.rules_of(site)
        if key not in self._known:
            explanation = explain_decision(plan, plan.sites[site].name, tick.step, tick.branch, decision)
            rule = -1 if decision.rule is None else decision.rule
            asked = tuple(self._asked(each) for each in explanation.asked if decision.inputs is not None)
            reason = (_WORDS[decision.verdict], rule, self._text(decision.reason), asked)
            self._known[key] = self.reasons.setdefault(reason, len(self.reasons))
        return self._known[key]

    def _asked(self, asked: AskedRule) -> tuple[Any, ...]:
        clauses = tuple(
            (
                int(clause.holds),
                self._text(clause.text),
                self._text(", ".join(f"{name} = {_shown(value)}" for name, value in clause.values)),
            )
            for clause in asked.clauses
        )
        return asked.rule, self._text(asked.outcome), clauses

    def _text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def to_json(self) -> dict[str, Any]:
        """The same for the page's script."""
        return {"texts": list(self.texts), "reasons": list(self.reasons), "rows": self.rows}


def _shown(value: object) -> str:
    return number(value) if isinstance(value, float) else "not known" if value is None else str(value)


def html_grid(outcome: Outcome, branch: str, reasons: Reasons) -> Markup:
    """The table of one branch: a row for each set of sites that are decided alike, and below it one for each site."""
    plan = outcome.plan
    calls = [(tick, decisions) for tick, decisions in outcome if tick.branch == branch]
    label = "Decisions, sites by steps" + (f", branch {branch}" if branch else "")
    head = tag("tr", tag("th", "site", scope="col"), *(tag("th", tick.step, scope="col") for tick, _ in calls))
    bodies = [_body(plan, calls, name, members, reasons) for name, members in _alike(plan, calls)]
    table = tag("table", tag("thead", head), *bodies, role="grid", aria_label=label, aria_readonly="true")
    return tag("div", table, class_="scroll grid")


def _alike(plan: Plan, calls: CellCalls) -> Iterator[tuple[str, list[int]]]:
    """Sites with equal rows whose names differ in numbers alone, under the name that stands for all."""
    alike = dict[tuple[Any, ...], list[str]]()
    index = {site.name: site.index for site in plan.sites}
    for site in plan.sites:
        made = [decisions[site.index] for _, decisions in calls]
        key = tuple((each.verdict, each.rule, each.reason) for each in made)
        alike.setdefault(key, []).append(site.name)
    for names in alike.values():
        yield from ((name, [index[each] for each in members]) for name, members in folded(names).items())


def _body(plan: Plan, calls: CellCalls, name: str, members: Sequence[int], reasons: Reasons) -> Markup:
    numbers = {site: [reasons.of(plan, site, tick, made[site]) for tick, made in calls] for site in members}
    first = members[0]
    if len(members) == 1:
        return tag("tbody", _row(plan, calls, first, numbers[first], name, reasons))
    same = all(each == numbers[first] for each in numbers.values())
    rows = [_row(plan, calls, first, numbers[first], name, reasons, count=len(members), same=same)]
    rows += [_row(plan, calls, site, numbers[site], plan.sites[site].name, reasons, inner=True) for site in members]
    return tag("tbody", *rows)


def _row(
    plan: Plan,
    calls: CellCalls,
    site: int,
    numbers: Sequence[int],
    name: str,
    reasons: Reasons,
    *,
    count: int = 1,
    same: bool = True,
    inner: bool = False,
) -> Markup:
    reasons.rows.append({"site": name, "cells": numbers, "count": count, "same": same, "plan": plan.skeleton.name})
    cells = [tag("td", _letter(made[site]), class_=made[site].letter.replace(".", "H")) for _, made in calls]
    head = [name_of(name)]
    if count > 1:
        label = f"{count} sites decided alike: show each"
        head.insert(0, tag("button", f"{count}×", type="button", aria_expanded="false", aria_label=label))
    heading = tag("th", *head, scope="row", title=name)
    return tag("tr", heading, *cells, class_="inner" if inner else None, data_row=len(reasons.rows) - 1)


def _letter(decision: Decision) -> str:
    return decision.letter.replace(".", "·")


def name_of(name: str) -> Markup:
    """A name whose middle gives way where there is no room: its end tells sites apart."""
    cut = max(0, len(name) - 12)
    shown = tag(
        "span", tag("span", name[:cut], class_="start"), tag("span", name[cut:]), class_="name", aria_hidden="true"
    )
    return Markup(shown + tag("span", name, class_="unseen"))
