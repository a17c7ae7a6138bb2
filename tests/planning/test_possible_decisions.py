"""Every decision of `schedule` is among those that `possible_decisions` gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.language import ir
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import Ahead, Moment, Outlooks
from cachepolicy.planning.schedule import Decision, Tick, prepare
from cachepolicy.planning.simulation import Facts, plan, replay
from cachepolicy.testing import strategies
from tests.support.drawn_runs import draw_facts, draw_policy, ticks_of

ACTIONS = (
    "reuse", "reuse residual", "skip", "compute", "predict linear(weight: 0.5)", "predict taylor(order: 2)",
    "predict linear(weight: 1, feedback: true)", "predict weights(of: [2, -1, 0.5])",
)  # fmt: skip


GUIDED = """\
match model when t < 600 every 2 at most 2 in a row
  -> approximate uncond spectral(low: 1.1, high: 1, layout: "uncond first")
"""
FACT = "a fact of the run"


def kind_of(decision: Decision) -> str:
    """The `Event.what` of a concrete decision; of a reuse that the run prevents, that of the reuse."""
    prevented = decision.reason in {"nothing is kept yet", FACT}
    if decision.verdict != "reuse" and not prevented:
        return decision.verdict
    match decision.action:
        case ir.Skip():
            return "skip"
        case ir.ApproximateUncond():
            return "approximate"
        case _:
            return "read"


def aheads(timesteps: Sequence[float]) -> dict[str, Ahead]:
    return {
        "all": Ahead(tuple(timesteps)),
        "falling": Ahead(direction=-1, lowest=-1.0),
        "nothing": Ahead(),
    }


def check_all(bound: Plan, ticks: Sequence[Tick], ahead: Ahead, facts: Facts, start: int) -> None:
    """Compare each decision from step `start` on with what is possible as seen at `start` on the same branch."""
    program = prepare(bound)
    calls = list(replay(bound, ticks, facts=facts))
    present = {tick.branch: tick for tick, _ in calls if tick.step == start}
    for loose in (False, True):
        outlooks = Outlooks(program, ahead, loose=loose)
        for tick, decisions in calls:
            for site in bound.sites if tick.step >= start else ():
                decision = decisions[site.index]
                around = [decisions[parent] for parent in site.parents]
                if not loose and any(kind_of(each) != each.verdict for each in around if each.computes):
                    continue  # a site around it computes though its rule says reuse: that is what `loose` is for
                moment = Moment(present[tick.branch], tick.step, tick.branch)
                group = program.alike.group_of[site.index]
                lasts = {None} if decision.inputs is None else {None, decision.inputs.memory.last}
                for last in lasts:
                    events = {event.what for event in outlooks.of(group, moment, last)}
                    assert kind_of(decision) in events, (site.name, tick, decision, events)


@pytest.mark.parametrize("clock", ["all", "falling", "nothing"])
@given(data=st.data())
def test_every_decision_is_possible(data: st.DataObject, clock: str) -> None:
    """Seen before the run (start 0) and part-way through it."""
    timesteps = data.draw(strategies.timesteps())
    names = data.draw(strategies.branches())
    policy = draw_policy(data, steps=len(timesteps), actions=ACTIONS, guided=GUIDED)
    ordered = sorted(timesteps, reverse=True) if clock == "falling" else timesteps
    ticks = ticks_of(ordered, names, steps=clock != "nothing")
    start = data.draw(st.sampled_from(range(len(timesteps))))
    bound = plan(policy, skeleton=builtin())
    facts = draw_facts(data, bound, steps=len(timesteps), branches=names, fact=FACT)
    for seen_from in {0, start}:
        check_all(bound, ticks, aheads(ordered)[clock], facts, seen_from)
