"""What happened: for the last few trajectories, every call of the root with the decision for each site."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cachepolicy.plan import Plan
from cachepolicy.schedule import Decision, Partition, Tick


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the root: the clock, a decision per group, what only the run knew by site, and its wall seconds.

    `held` are the bytes of history that the session held after it.
    """

    tick: Tick
    partition: Partition
    decided: Sequence[Decision]
    facts: Mapping[int, str]
    seconds: float
    signals: Mapping[int, Mapping[str, float]] = field(default_factory=dict[int, Mapping[str, float]])
    held: int = 0

    @property
    def decisions(self) -> list[Decision]:
        """The decisions by site number."""
        return self.partition.spread(self.decided)


@dataclass(slots=True)
class Trajectory:
    """The calls of one trajectory, in order."""

    session: object
    plan: Plan
    calls: list[Call] = field(default_factory=list[Call])

    def rows(self, branch: str | None = None) -> dict[str, str]:
        """One letter a call for each site, of one branch (default: the first that ran): `C`, `R`, `.` hidden."""
        name = self.branches[0] if branch is None and self.calls else branch
        calls = [call for call in self.calls if call.tick.branch == name]
        columns = [[decision.letter for decision in call.decisions] for call in calls]
        return {site.name: "".join(column[site.index] for column in columns) for site in self.plan.sites}

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that ran, in order of appearance."""
        return tuple(dict.fromkeys(call.tick.branch for call in self.calls))

    @property
    def facts(self) -> dict[tuple[str, int, str], str]:
        """What only the run could know, by (site, step, branch): the simulator takes it under this form."""
        return {
            (self.plan.sites[site].name, call.tick.step, call.tick.branch): fact
            for call in self.calls
            for site, fact in call.facts.items()
        }

    @property
    def signals(self) -> dict[tuple[int, str], Mapping[int, Mapping[str, float]]]:
        """What was measured, by (step, branch) and site number: `replay` takes it under this form."""
        return {(call.tick.step, call.tick.branch): call.signals for call in self.calls}

    def __iter__(self) -> Iterator[tuple[Tick, Sequence[Decision]]]:
        """The calls in the order they ran, each with its decisions by site number."""
        for call in self.calls:
            yield call.tick, call.decisions

    def counts(self) -> Counter[str]:
        """How many site calls were computed, reused and hidden."""
        return Counter(decision.verdict for call in self.calls for decision in call.decisions)

    @property
    def seconds(self) -> float:
        """Wall seconds spent in the root."""
        return sum(call.seconds for call in self.calls)


class Trace:
    """The last few trajectories of a run, the newest last; `str` tells the newest in a few lines."""

    def __init__(self, most: int = 8) -> None:
        self._trajectories: deque[Trajectory] = deque(maxlen=most)
        self._lock = threading.Lock()

    def begin(self, session: object, plan: Plan) -> Trajectory:
        """Start the record of a trajectory; the oldest is dropped once there are too many."""
        trajectory = Trajectory(session, plan)
        with self._lock:
            self._trajectories.append(trajectory)
        return trajectory

    def drop(self, trajectory: Trajectory) -> None:
        """Forget a trajectory that failed."""
        with self._lock:
            kept = [each for each in self._trajectories if each is not trajectory]
            self._trajectories = deque(kept, maxlen=self._trajectories.maxlen)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The recorded trajectories, oldest first."""
        with self._lock:
            return tuple(self._trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __len__(self) -> int:
        return len(self._trajectories)

    @property
    def last(self) -> Trajectory | None:
        """The newest trajectory, None before the first call."""
        recorded = self.trajectories
        return recorded[-1] if recorded else None

    def rows(self, branch: str | None = None) -> dict[str, str]:
        """`Trajectory.rows` of the newest trajectory."""
        return self.last.rows(branch) if self.last is not None else {}

    def __str__(self) -> str:
        newest = self.last
        if newest is None:
            return "nothing has run yet"
        counts = newest.counts()
        reached = counts["compute"] + counts["reuse"]
        share = f"{100 * counts['reuse'] / reached:.0f} %" if reached else "none"
        steps = len({call.tick.step for call in newest.calls})
        calls = f"{counts['compute']} site calls computed, {counts['reuse']} reused ({share})"
        lines = [f"{steps} steps, {len(newest.plan.sites)} sites: {calls}, {newest.seconds:.2f} s in the model"]
        for branch in newest.branches:
            if len(newest.branches) > 1:
                lines.append(f"branch {branch or 'first'}")
            lines += _grouped(newest.rows(branch))
        return "\n".join(lines)


def _grouped(rows: Mapping[str, str]) -> list[str]:
    """Rows that read the same, on one line under their first site's name."""
    sites = dict[str, list[str]]()
    for site, row in rows.items():
        sites.setdefault(row, []).append(site)
    more = {row: f" and {len(names) - 1} more" if len(names) > 1 else "" for row, names in sites.items()}
    return [f"  {row}  {names[0]}{more[row]}" for row, names in sites.items()]
