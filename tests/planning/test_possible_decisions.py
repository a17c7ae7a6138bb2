"""Every decision of `schedule` is among those that `possible_decisions` gives, once a history is kept."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.language import ir
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import Ahead, Event, Moment, Outlooks
from cachepolicy.planning.schedule import Decision, Tick, prepare
from cachepolicy.planning.simulation import plan, replay
from cachepolicy.testing import strategies

ACTIONS = (
    "reuse", "reuse residual", "skip", "compute", "predict linear(weight: 0.5)", "predict taylor(order: 2)",
    "predict linear(weight: 1, feedback: true)",
)  # fmt: skip


def kind_of(decision: Decision) -> str:
    """The `Event.what` of a concrete decision."""
    if decision.verdict != "reuse":
        return decision.verdict
    match decision.action:
        case ir.Skip():
            return "skip"
        case ir.ApproximateUncond():
            return "approximate"
        case _:
            return "read"


def is_possible(decision: Decision, events: frozenset[Event]) -> bool:
    return kind_of(decision) in {event.what for event in events}


def lacks_history(bound: Plan, site: int, decisions: Sequence[Decision]) -> bool:
    """The abstract form presupposes a history: a site, or one around it, that has none yet computes to get one."""
    return any(decisions[index].reason == "nothing is kept yet" for index in (site, *bound.sites[site].parents))


def aheads(timesteps: Sequence[float]) -> dict[str, Ahead]:
    return {
        "all": Ahead(tuple(timesteps)),
        "falling": Ahead(direction=-1, lowest=-1.0),
        "nothing": Ahead(),
    }


def check_all(bound: Plan, ticks: Sequence[Tick], ahead: Ahead, start: int) -> None:
    """Compare each decision from step `start` on with what is possible as seen at `start` on the same branch."""
    program = prepare(bound)
    outlooks = Outlooks(program, ahead)
    calls = list(replay(bound, ticks))
    present = {tick.branch: tick for tick, _ in calls if tick.step == start}
    for tick, decisions in calls:
        if tick.step < start:
            continue
        for site in bound.sites:
            if lacks_history(bound, site.index, decisions):
                continue
            group = program.alike.group_of[site.index]
            events = outlooks.of(group, Moment(present[tick.branch], tick.step, tick.branch), None)
            assert is_possible(decisions[site.index], events), (site.name, tick, decisions[site.index], events)


@pytest.mark.parametrize("clock", ["all", "falling", "nothing"])
@given(data=st.data())
def test_every_decision_is_possible(data: st.DataObject, clock: str) -> None:
    """Seen before the run (start 0) and part-way through it."""
    timesteps = data.draw(strategies.timesteps())
    names = data.draw(strategies.branches())
    follow = data.draw(st.sampled_from([None, "cond"]))
    policy = data.draw(strategies.policies(steps=len(timesteps), actions=ACTIONS, follow=follow))
    many = len(timesteps) if clock != "nothing" else None
    ordered = sorted(timesteps, reverse=True) if clock == "falling" else timesteps
    ticks = [Tick(step, t, many, None, branch) for step, t in enumerate(ordered) for branch in names]
    start = data.draw(st.sampled_from(range(len(timesteps))))
    bound = plan(policy, skeleton=builtin())
    for seen_from in {0, start}:
        check_all(bound, ticks, aheads(ordered)[clock], seen_from)
