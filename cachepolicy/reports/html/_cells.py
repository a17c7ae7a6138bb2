"""The decision grids of a report: one row for each set of sites with equal decisions, one reason for each cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.planning.grid import folded
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import Decision, Tick
from cachepolicy.reports.explanation import AskedRule, explain_decision
from cachepolicy.reports.html._charts import number
from cachepolicy.reports.text import Outcome

_Calls = Sequence[tuple[Tick, Sequence[Decision]]]


@dataclass(slots=True)
class CellReasons:
    """The reasons of all cells. Equal texts and reasons are stored once; the page's script looks them up by number."""

    texts: dict[str, int] = field(default_factory=dict[str, int])
    reasons: dict[tuple[Any, ...], int] = field(default_factory=dict[tuple[Any, ...], int])
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _known: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])

    def number_of(self, plan: Plan, site: int, tick: Tick, decision: Decision) -> int:
        """Returns the number of a decision's reason. The sites of a group share the decision object and the rules."""
        key = id(decision), plan.groups.group_of[site]
        if key not in self._known:
            explanation = explain_decision(plan, plan.sites[site].name, tick.step, tick.branch, decision)
            rule = -1 if decision.rule is None else decision.rule
            asked = tuple(self._asked(rule) for rule in explanation.asked if decision.inputs is not None)
            reason = (decision.verb, rule, self._text(decision.reason), asked)
            self._known[key] = self.reasons.setdefault(reason, len(self.reasons))
        return self._known[key]

    def _asked(self, rule: AskedRule) -> tuple[Any, ...]:
        clauses = tuple(
            (
                int(clause.holds),
                self._text(clause.text),
                self._text(", ".join(f"{name} = {_shown(value)}" for name, value in clause.values)),
            )
            for clause in rule.clauses
        )
        return rule.rule, self._text(rule.outcome), clauses

    def _text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def to_json(self) -> dict[str, Any]:
        """Returns the tables for the page's script."""
        return {"texts": list(self.texts), "reasons": list(self.reasons), "rows": self.rows}


def _shown(value: object) -> str:
    return number(value) if isinstance(value, float) else "not known" if value is None else str(value)


def decision_grid(outcome: Outcome, branch: str, reasons: CellReasons) -> dict[str, Any]:
    """Returns the grid of one branch for the template, and adds its rows and reasons to `reasons`.

    A table body holds the row of a set of sites with equal decisions and, where there are several, a row for each.
    """
    plan = outcome.plan
    calls = [(tick, decisions) for tick, decisions in outcome if tick.branch == branch]
    bodies = list[list[dict[str, Any]]]()
    for name, sites in _equal_sites(plan, calls):
        numbers = {site: [reasons.number_of(plan, site, tick, made[site]) for tick, made in calls] for site in sites}
        same = all(row == numbers[sites[0]] for row in numbers.values())
        rows = [(name, sites[0], len(sites), same)]
        rows += [(plan.sites[site].name, site, 1, True) for site in sites if len(sites) > 1]
        body = list[dict[str, Any]]()
        for shown, site, count, alike in rows:
            letters = "".join(decisions[site].letter for _, decisions in calls)
            body.append(
                {"name": shown, "letters": letters, "count": count, "inner": bool(body), "number": len(reasons.rows)}
            )
            reasons.rows.append(
                {"site": shown, "cells": numbers[site], "count": count, "same": alike, "plan": plan.skeleton.name}
            )
        bodies.append(body)
    return {"branch": branch, "steps": [tick.step for tick, _ in calls], "bodies": bodies}


def _equal_sites(plan: Plan, calls: _Calls) -> Iterator[tuple[str, list[int]]]:
    """Yields sites with equal decisions whose names differ in numbers only, under one name for all."""
    equal = dict[tuple[Any, ...], list[str]]()
    index = {site.name: site.index for site in plan.sites}
    for site in plan.sites:
        made = [decisions[site.index] for _, decisions in calls]
        key = tuple((decision.verdict, decision.rule, decision.reason) for decision in made)
        equal.setdefault(key, []).append(site.name)
    for names in equal.values():
        yield from ((name, [index[member] for member in members]) for name, members in folded(names).items())
