"""What is said to be read no more is read no more, whatever the run does; what the clock alone decides is exact."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.language import ir
from cachepolicy.planning.history_spec import feedback, history_depth
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import NOTHING, Ahead, Reads
from cachepolicy.planning.schedule import Decision, Tick, prepare
from cachepolicy.planning.simulation import plan, replay
from cachepolicy.testing import strategies
from tests.support.drawn_runs import draw_facts, draw_policy, ticks_of

ACTIONS = (
    "reuse", "reuse residual", "skip", "compute", "predict linear(weight: 0.5)", "predict taylor(order: 2)",
    "predict taylor(order: 1) of residual",
    "predict weights(of: [2, -1, 0.5])", "predict chebyshev(order: 1, ridge: 1)",
    "predict linear(weight: 1, feedback: true)",
)  # fmt: skip
GUIDED = 'match model when t < 700 every 3 -> approximate uncond spectral(low: 1, high: 1, layout: "uncond first")\n'


class Histories:
    """What sites keep while a schedule runs: the step of each result, the newest first, by site and branch."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], list[int]] = {}
        self.last: dict[tuple[int, str], int] = {}

    def of(self, site: int, branch: str) -> list[int]:
        return self.kept.setdefault((site, branch), [])

    def follow(self, site: int, tick: Tick, decision: Decision) -> None:
        """A compute makes a newer result, and so does an answer that is fed back."""
        if decision.verdict == "compute":
            self.last[site, tick.branch] = tick.step
        if decision.verdict == "compute" or (decision.verdict == "reuse" and feedback(decision.action)):
            self.of(site, tick.branch).insert(0, tick.step)


def read_by(decision: Decision) -> int:
    """How many results a decision reads."""
    match decision.action if decision.verdict == "reuse" else None:
        case ir.Reuse():
            return 1
        case ir.Predict() as action:
            return history_depth(action)
        case _:
            return 0


def form(decision: Decision, reads: Reads) -> int:
    residual = isinstance(decision.action, ir.Reuse | ir.Predict) and decision.action.residual
    return reads.residuals if residual else reads.outputs


def sound(bound: Plan, ticks: Sequence[Tick], ahead: Ahead, facts: Mapping[tuple[str, int, str], str]) -> None:
    """No answer misses a result that was let go after some step."""
    liveness = Liveness(prepare(bound), ahead, loose=bool(facts))
    full, short = Histories(), Histories()
    directions = dict[str, list[float]]()
    for tick, decisions in replay(bound, ticks, facts=facts):
        directions.setdefault(tick.branch, []).append(tick.t or 0.0)
        for site in bound.sites:
            decision = decisions[site.index]
            if count := read_by(decision):
                reads = full.of(site.index, tick.branch)[:count]
                assert reads == short.of(site.index, tick.branch)[:count], (site.name, tick)
            group = liveness.outlooks.program.alike.group_of[site.index]
            for each in (full, short):
                each.follow(site.index, tick, decision)
            wanted = liveness.wanted(group, tick, full.last.get((site.index, tick.branch)))
            del short.of(site.index, tick.branch)[wanted.depth :]


def clocks(timesteps: Sequence[float]) -> dict[str, tuple[Ahead, bool]]:
    """What may be known of the clock, and whether the number of steps is."""
    return {
        "all": (Ahead(tuple(timesteps)), True),
        "falling": (Ahead(direction=-1, lowest=-1.0), True),
        "falling without end": (Ahead(direction=-1, lowest=-1.0), False),
        "nothing": (Ahead(), False),
    }


def bound_to_toy(policy: cachepolicy.Policy) -> Plan:
    return plan(policy, skeleton=builtin())


@given(st.data(), st.sampled_from(["all", "falling", "falling without end", "nothing"]))
def test_what_is_let_go_is_never_read(data: st.DataObject, clock: str) -> None:
    """Whatever the policy, the clock, the branches and the facts of the run."""
    timesteps = data.draw(strategies.timesteps())
    names = data.draw(strategies.branches())
    policy = draw_policy(data, steps=len(timesteps), actions=ACTIONS, guided=GUIDED)
    bound = bound_to_toy(policy)
    ahead, steps = clocks(timesteps)[clock]
    facts = draw_facts(data, bound, steps=len(timesteps), branches=names, fact="a fact")
    sound(bound, ticks_of(timesteps, names, steps=steps), ahead, facts)


@given(st.data())
def test_what_the_clock_decides_is_exact(data: st.DataObject) -> None:
    """A result is kept only while a later step reads it, where neither counts nor signals decide."""
    timesteps = data.draw(strategies.timesteps())
    uncounted = [action for action in ACTIONS if "weights" not in action]  # which needs as many results as weights
    rules = strategies.rules(steps=len(timesteps), actions=uncounted, stateful=False).map(_by_the_clock)
    exact(bound_to_toy(cachepolicy.parse("\n".join(data.draw(st.lists(rules, min_size=1, max_size=4))))), timesteps)


def _by_the_clock(rule: str) -> str:
    """The rule without what counts steps since a compute, or reuses."""
    rule = re.sub(r"at most .*? in (a row|all)", "", rule)
    return re.sub(r"\b(age|gap|computes)\b", "step", rule.replace("since compute", ""))


def exact(bound: Plan, timesteps: Sequence[float]) -> None:
    ticks = ticks_of(timesteps, [""], steps=True)
    liveness = Liveness(prepare(bound), Ahead(tuple(timesteps)))
    schedule = list(replay(bound, ticks))
    for site in bound.sites:
        group, histories = liveness.outlooks.program.alike.group_of[site.index], Histories()
        for number, (tick, decisions) in enumerate(schedule):
            histories.follow(site.index, tick, decisions[site.index])
            wanted = liveness.wanted(group, tick, histories.last.get((site.index, "")))
            later = [decided[site.index] for _, decided in schedule[number + 1 :]]
            if histories.of(site.index, ""):
                assert wanted == read_later(later), (site.name, tick)


def read_later(decisions: Sequence[Decision]) -> Reads:
    """How many of the newest results of now these decisions read."""
    wanted, pushed = NOTHING, 0
    for decision in decisions:
        count = max(0, read_by(decision) - pushed)
        residual = isinstance(decision.action, ir.Reuse | ir.Predict) and decision.action.residual
        wanted |= Reads(residuals=count) if residual else Reads(outputs=count)
        pushed += decision.verdict == "compute" or (decision.verdict == "reuse" and feedback(decision.action))
    return wanted


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("every 2 -> reuse", "1010101010"),
        ("when t > 500 every 3 -> reuse", "1100000000"),
        ("on {0, 1, 2, 3, 4, 5, 6, 7, 8, 9} -> reuse", "0000000000"),
        ("when step > 7 -> reuse", "0000000110"),
        ("when step < 3 -> reuse", "1100000000"),
        ("every 3 since compute -> reuse", "1101101100"),
        ("at most 2 in a row -> reuse", "1101101100"),
        ("every 5 -> predict linear(weight: 1)", "2222122220"),
        ("while step < 4 -> reuse", "1110000000"),
        ("when step in {1, 8} -> skip", "0000000000"),
    ],
)
def test_how_many_results_are_kept_after_each_step(rule: str, expected: str) -> None:
    """Windows that have closed, ticks before a first read, last steps: nothing is kept for them."""
    bound = bound_to_toy(cachepolicy.parse(f"match attention {rule}"))
    timesteps = [900.0 - 100 * step for step in range(10)]
    liveness = Liveness(prepare(bound), Ahead(tuple(timesteps)))
    found, last = "", None
    for tick, decisions in replay(bound, ticks_of(timesteps, [""], steps=True)):
        last = tick.step if decisions[0].verdict == "compute" else last
        found += str(liveness.wanted(0, tick, last).depth)
    assert expected == found
