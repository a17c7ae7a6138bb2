"""Counts of a schedule or a run: site calls by verdict, and how many of them are skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cachepolicy.diffusers.guidance import UNCOND_BRANCHES
from cachepolicy.errors import counted
from cachepolicy.language import ir
from cachepolicy.planning.schedule import UNCALLED, Decision, Tick


@dataclass(frozen=True, slots=True)
class Tally:
    """Site calls in numbers.

    Attributes:
        calls: Site calls by verdict.
        owned: Site calls that a rule owned, by rule number.
        reused: Those that it reused, by rule number.
        halved: Guidance batches of which it approximated the unconditional half, by rule number. The conditional half
            runs, so each skips half a call.
    """

    calls: Counter[str] = field(default_factory=Counter[str])
    owned: Counter[int] = field(default_factory=Counter[int])
    reused: Counter[int] = field(default_factory=Counter[int])
    halved: Counter[int] = field(default_factory=Counter[int])

    @property
    def total(self) -> int:
        """Number of site calls."""
        return self.calls.total()

    @property
    def skipped(self) -> float:
        """Number of site calls that were not computed; half of an approximated guidance batch counts as a half."""
        return self.calls["reuse"] + self.calls["hidden"] - self.halved.total() / 2

    def __str__(self) -> str:
        hidden = f", {self.calls['hidden']} of them hidden" if self.calls["hidden"] else ""
        share = percent(self.skipped, self.total)
        return f"{self.skipped:g} of {counted(self.total, 'site call')} skipped ({share}{hidden})"


def tally(calls: Iterable[tuple[Tick, Sequence[Decision]]]) -> Tally:
    """Counts the decisions of a schedule or a trajectory."""
    counts = Tally()
    for tick, decisions in calls:
        for decision in decisions:
            if decision is UNCALLED:
                continue
            counts.calls[decision.verdict] += 1
            if decision.rule is not None:
                reuses = decision.verdict == "reuse"
                counts.owned[decision.rule] += 1
                counts.reused[decision.rule] += reuses
                halves = isinstance(decision.action, ir.ApproximateUncond) and tick.branch not in UNCOND_BRANCHES
                counts.halved[decision.rule] += reuses and halves
    return counts


def percent(part: float, whole: float) -> str:
    """Returns a share as text: `30.0 %`."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
