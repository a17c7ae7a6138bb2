"""Draws a schedule or a recorded trajectory for a terminal, and gives it as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cachepolicy.errors import counted
from cachepolicy.planning.cost_model import format_bytes
from cachepolicy.planning.grid import grid
from cachepolicy.planning.plan import label
from cachepolicy.planning.simulation import Schedule
from cachepolicy.planning.tally import Tally, percent, tally
from cachepolicy.tracing.trace import Trajectory

Outcome = Schedule | Trajectory

_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def draw(outcome: Outcome, *, width: int = 80, colour: bool = False) -> str:
    """Returns the grid of sites by steps, the shares of the rules and a summary.

    Args:
        outcome: A schedule or a trajectory. Branches with equal rows share a grid.
        width: Width of the terminal in columns.
        colour: Whether to use ANSI colours.
    """
    counts, lines = tally(outcome), list[str]()
    most = most_cost(outcome)
    other = counts if most is None else tally(most)
    for branches, rows in _by_branch(outcome):
        if len(outcome.branches) > 1:
            lines.append(f"branch {' and '.join(f'`{name}`' for name in branches)}")
        lines.append(grid(rows, width=width, colour=colour))
    legend = f"C computes  R reuses{'  . hidden in a site that reuses' if counts.calls['hidden'] else ''}"
    if most is not None:
        legend += f"  S decided by {signals_text(outcome)}"
    if not outcome.branches or not outcome.plan.sites:
        lines, legend = [], "no site: every module computes at every step"
    lines += [f"{_DIM}{legend}{_RESET}" if colour else legend, ""]
    lines += [*_shares(outcome, counts, other, width), summary(outcome)]
    if isinstance(outcome, Trajectory):
        held = max((call.held for call in outcome.calls), default=0)
        memory = f", at most {format_bytes(held, digits=1)} held" if held else ""
        lines.append(f"{outcome.seconds:.2f} s in {counted(len(outcome.calls), 'call')} of the model{memory}")
        if outcome.audited:
            worst = outcome.worst
            most = "" if worst is None else f"; the largest error of an answer is {worst[2]:.2%}, {worst[0]}@{worst[1]}"
            lines.append(f"audited: every module computed{most}")
    return "\n".join(lines)


def summary(outcome: Outcome) -> str:
    """Returns one line: steps, sites, the share of site calls that is skipped, and the semantic hash of the policy."""
    size = f"{counted(_steps(outcome), 'step')}, {counted(len(outcome.plan.sites), 'site')}"
    most, skipped = most_cost(outcome), str(tally(outcome))
    if most is not None:
        low, high = tally(most), tally(outcome)
        shares = f"{percent(low.skipped, low.total)} to {percent(high.skipped, high.total)}"
        calls = f"{low.skipped:g} to {high.skipped:g} of {counted(high.total, 'site call')}"
        skipped = f"{calls} skipped ({shares}), as {signals_text(outcome)} decides"
    resolved = outcome.plan.resolved
    preset = f", preset `{resolved.preset}`" if resolved.preset is not None else ""
    return f"{size}: {skipped}; policy {resolved.digest[:12]}{preset}"


def most_cost(outcome: Outcome) -> Schedule | None:
    """Returns the schedule of the most cost, if signals that are not known decide, or None."""
    return outcome.most if isinstance(outcome, Schedule) else None


def signals_text(outcome: Outcome) -> str:
    """Returns the names of the signals that decide: `` `drift` and `change` ``."""
    return " and ".join(f"`{name}`" for name in outcome.signals) if isinstance(outcome, Schedule) else ""


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Returns plain data: sites, rows by branch, the shares of the rules and the counts. Rules are numbered from 1.

    Where `signals` that are not known decide, the counts are those of the least cost, and `most_cost` has the others.
    """
    plan, counts = outcome.plan, tally(outcome)
    rules = [
        {
            "rule": bound.index + 1,
            "text": label(bound.rule, width=1000),
            "sites": [plan.sites[index].name for index in bound.sites],
            "owned": counts.owned[bound.index],
            "reused": counts.reused[bound.index],
        }
        for bound in plan.rules
    ]
    first = outcome.branches[0] if outcome.branches else ""
    most, signals = most_cost(outcome), outcome.signals if isinstance(outcome, Schedule) else ()
    return {
        "policy": plan.policy.name,
        "digest": plan.resolved.digest,
        "model": plan.skeleton.name,
        "timesteps": [tick.t for tick, _ in outcome if tick.branch == first],
        "sites": [{"name": site.name, "modules": list(site.modules)} for site in plan.sites],
        "rows": {branch: _rows_of(outcome, branch) for branch in outcome.branches},
        "rules": rules,
        "calls": {verdict: counts.calls[verdict] for verdict in ("compute", "reuse", "hidden")},
        "skipped": counts.skipped,
        "signals": list(signals),
        "most_cost": None if most is None else outcome_to_json(most),
    }


def _rows_of(outcome: Outcome, branch: str) -> dict[str, str]:
    """Returns one letter a step for each site."""
    return outcome.rows_of(branch) if isinstance(outcome, Schedule) else outcome.rows(branch)


def _steps(outcome: Outcome) -> int:
    return len({tick.step for tick, _ in outcome})


def _by_branch(outcome: Outcome) -> list[tuple[list[str], dict[str, str]]]:
    """Returns the rows of each branch, with the names of all branches that have the same rows."""
    groups = list[tuple[list[str], dict[str, str]]]()
    for branch in outcome.branches:
        rows = _rows_of(outcome, branch)
        names = next((names for names, known in groups if known == rows), None)
        if names is None:
            groups.append(([branch], rows))
        else:
            names.append(branch)
    return groups


def _shares(outcome: Outcome, counts: Tally, most: Tally, width: int) -> Iterator[str]:
    for bound in outcome.plan.rules:
        share = f"rule {bound.index + 1}: takes nothing here   "
        if bound.sites:
            owned, reused = counted(counts.owned[bound.index], "call"), str(counts.reused[bound.index])
            if most.owned[bound.index] != counts.owned[bound.index]:
                owned = f"{most.owned[bound.index]} to {owned}"
            if most.reused[bound.index] != counts.reused[bound.index]:
                reused = f"{most.reused[bound.index]} to {reused}"
            halves = f", {counts.halved[bound.index]} of them by half" if counts.halved[bound.index] else ""
            share = f"rule {bound.index + 1}: owns {owned}, answers {reused}{halves}   "
        yield share + label(bound.rule, width=max(20, width - len(share)))
