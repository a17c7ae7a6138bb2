"""Draw a schedule, simulated or traced, for a terminal, and count what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cachepolicy.errors import counted
from cachepolicy.planning.grid import grid
from cachepolicy.planning.plan import Plan, label
from cachepolicy.planning.schedule import Decision, Tick
from cachepolicy.planning.simulation import Schedule
from cachepolicy.tracing.trace import Trajectory

Outcome = Schedule | Trajectory

_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def draw(outcome: Outcome, *, width: int = 80, colour: bool = False) -> str:
    """The grid of sites by steps, one a branch where branches differ, the rules' shares and a summary line."""
    parts = list[str]()
    for branches, rows in _by_branch(outcome):
        if len(outcome.branches) > 1:
            parts.append(f"branch {' and '.join(f'`{name}`' for name in branches)}")
        parts.append(grid(rows, width=width, colour=colour))
    legend = f"C computes  R reuses{'  . hidden in a site that reuses' if tally(outcome).calls['hidden'] else ''}"
    if not outcome.branches or not plan_of_outcome(outcome).sites:
        parts, legend = [], "no site: every module computes at every step"
    told = [*_shares(outcome, width), summary(outcome)]
    if isinstance(outcome, Trajectory):
        told.append(_spent(outcome))
    return "\n".join([*parts, f"{_DIM}{legend}{_RESET}" if colour else legend, "", *told])


def _spent(trajectory: Trajectory) -> str:
    held = max((call.held for call in trajectory.calls), default=0)
    memory = f", at most {held / 2**20:.1f} MiB held" if held else ""
    return f"{trajectory.seconds:.2f} s in {counted(len(trajectory.calls), 'call')} of the model{memory}"


def summary(outcome: Outcome) -> str:
    """One line: sites, steps, the share of their calls that is skipped, and the semantic hash of the policy."""
    plan, calls = plan_of_outcome(outcome), tally(outcome).calls
    total = sum(calls.values())
    skipped = total - calls["compute"]
    hidden = f", {calls['hidden']} of them hidden" if calls["hidden"] else ""
    share = f"{100 * skipped / total:.1f} %" if total else "0 %"
    steps = len({tick.step for tick, _ in _calls(outcome)})
    size = f"{counted(steps, 'step')}, {counted(len(plan.sites), 'site')}"
    calls_skipped = f"{skipped} of {counted(total, 'site call')} skipped ({share}{hidden})"
    return f"{size}: {calls_skipped}; policy {plan.resolved.digest[:12]}"


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """The same as plain data: sites, a row of letters for each by branch, the rules' shares, the counts."""
    plan, counted = plan_of_outcome(outcome), tally(outcome)
    rules = [
        {
            "rule": bound.index + 1,
            "text": label(bound.rule, width=1000),
            "sites": [plan.sites[index].name for index in bound.sites],
            "owned": counted.owned[bound.index],
            "reused": counted.reused[bound.index],
        }
        for bound in plan.rules
    ]
    first = outcome.branches[0] if outcome.branches else ""
    return {
        "policy": plan.policy.name,
        "digest": plan.resolved.digest,
        "model": plan.skeleton.name,
        "timesteps": [tick.t for tick, _ in _calls(outcome) if tick.branch == first],
        "sites": [{"name": site.name, "modules": list(site.modules)} for site in plan.sites],
        "rows": {branch: rows_of(outcome, branch) for branch in outcome.branches},
        "rules": rules,
        "calls": {verdict: counted.calls[verdict] for verdict in ("compute", "reuse", "hidden")},
    }


# --- counts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tally:
    """Site calls by verdict, and by rule how many it owned and how many of those it answered."""

    calls: Counter[str]
    owned: Counter[int]
    reused: Counter[int]


def tally(outcome: Outcome) -> Tally:
    """Count the decisions of all calls."""
    counted = Tally(Counter(), Counter(), Counter())
    for _, decisions in _calls(outcome):
        for decision in decisions:
            counted.calls[decision.verdict] += 1
            if decision.rule is not None:
                counted.owned[decision.rule] += 1
                counted.reused[decision.rule] += decision.verdict == "reuse"
    return counted


def plan_of_outcome(outcome: Outcome) -> Plan:
    """The plan that the decisions belong to."""
    return outcome.plan


def rows_of(outcome: Outcome, branch: str) -> dict[str, str]:
    """One letter a step for each site."""
    return outcome.rows_of(branch) if isinstance(outcome, Schedule) else outcome.rows(branch)


def _calls(outcome: Outcome) -> Iterator[tuple[Tick, Sequence[Decision]]]:
    if isinstance(outcome, Schedule):
        yield from outcome
    else:
        yield from ((call.tick, call.decisions) for call in outcome.calls)


def _by_branch(outcome: Outcome) -> list[tuple[list[str], dict[str, str]]]:
    """The rows of each branch; branches with the same rows stand together."""
    found = list[tuple[list[str], dict[str, str]]]()
    for branch in outcome.branches:
        rows = rows_of(outcome, branch)
        for names, known in found:
            if known == rows:
                names.append(branch)
                break
        else:
            found.append(([branch], rows))
    return found


def _shares(outcome: Outcome, width: int) -> Iterator[str]:
    totals = tally(outcome)
    for bound in plan_of_outcome(outcome).rules:
        head = f"rule {bound.index + 1}"
        if not bound.sites:
            yield f"{head}: takes nothing here   {label(bound.rule, width=max(20, width - len(head) - 24))}"
            continue
        owned, reused = totals.owned[bound.index], totals.reused[bound.index]
        share = f"{head}: owns {counted(owned, 'call')}, answers {reused}   "
        yield share + label(bound.rule, width=max(20, width - len(share)))
