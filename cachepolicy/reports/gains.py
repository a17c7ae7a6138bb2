"""What a run gained: calls and FLOPs skipped, and the speed-up that was measured beside the one that they bound."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cachepolicy.planning.forecast import Forecast, Work, forecast
from cachepolicy.reports.text import Outcome, Tally, tally
from cachepolicy.tracing.trace import Trajectory


@dataclass(frozen=True, slots=True)
class Gains:
    """The numbers at the head of a report.

    `seconds` were spent in the model and `uncached` would have been without the policy: as the caller measured, or,
    where `estimated`, as many calls as there were at the median of those that computed everything. Both are None where
    there is nothing to tell them from. `held` are the most bytes that the session held.
    """

    calls: int
    tally: Tally
    flops: Forecast | None
    seconds: float | None
    uncached: float | None
    estimated: bool
    held: int | None

    @property
    def skipped(self) -> int:
        """Site calls that did not compute, hidden ones included."""
        return self.tally.calls["reuse"] + self.tally.calls["hidden"]

    @property
    def site_calls(self) -> int:
        """Site calls in all."""
        return sum(self.tally.calls.values())

    @property
    def speed_up(self) -> float | None:
        """How many times faster the calls of the model were than without the policy."""
        return self.uncached / self.seconds if self.seconds and self.uncached else None


def gains(outcome: Outcome, *, work: Work | None = None, uncached: float | None = None) -> Gains:
    """Add up a schedule or a trajectory; `uncached` are the seconds that the model takes without the policy."""
    run = outcome.calls if isinstance(outcome, Trajectory) else []
    seconds = sum(call.seconds for call in run) if run else None
    estimate = None if uncached is not None or not isinstance(outcome, Trajectory) else _estimated(outcome)
    return Gains(
        calls=len(list(outcome)),
        tally=tally(outcome),
        flops=None if work is None else forecast(outcome.plan, outcome, work),
        seconds=seconds,
        uncached=uncached if estimate is None else estimate,
        estimated=estimate is not None,
        held=max((call.held for call in run), default=None),
    )


def _estimated(trajectory: Trajectory) -> float | None:
    """What all calls would have taken at the speed of those that computed everything, without the very first one.

    The first call of a model warms up what later ones find warm.
    """
    full = [call.seconds for call in trajectory.calls[1:] if all(decision.computes for decision in call.decided)]
    return statistics.median(full) * len(trajectory.calls) if full else None


# --- for a person ----------------------------------------------------------------------------------------


def percent(part: float, whole: float) -> str:
    """A share: `30.0 %`."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def size(count: float) -> str:
    """Bytes with the unit that fits: `12.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
