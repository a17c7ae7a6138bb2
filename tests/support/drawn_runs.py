"""Policies and facts of a run for property tests of the planner, drawn in the middle of a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from cachepolicy.language.ir import Policy
from cachepolicy.language.parser import parse
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import Tick
from cachepolicy.testing import strategies


def draw_policy(data: st.DataObject, *, steps: int, actions: Sequence[str], guided: str) -> Policy:
    """A policy, half of the time one that starts with the rule `guided` and asks for `uncond_skipped`."""
    follow = data.draw(st.sampled_from([None, "cond"]))
    policy = data.draw(strategies.policies(steps=steps, actions=actions, follow=follow))
    if data.draw(st.booleans()):
        others = strategies.rules(steps=steps, selectors=strategies.EVERYWHERE[:3], actions=actions)
        rules = [rule.replace("when ", "when uncond_skipped and ") for rule in data.draw(st.lists(others, max_size=3))]
        policy = parse(guided + "\n".join(rules) + "\n")
    return policy


def draw_facts(
    data: st.DataObject, bound: Plan, *, steps: int, branches: Sequence[str], fact: str
) -> Mapping[tuple[str, int, str], str]:
    """Up to eight calls of sites at which the run makes the site compute because of `fact`."""
    sites = st.sampled_from([site.name for site in bound.sites])
    calls = st.tuples(sites, st.sampled_from(range(steps)), st.sampled_from(branches))
    return dict.fromkeys(data.draw(st.lists(calls, max_size=8)), fact)


def ticks_of(timesteps: Sequence[float], branches: Sequence[str], *, steps: bool) -> list[Tick]:
    """The clock of each call, branch by branch at each step; with `steps`, the number of steps is known."""
    many = len(timesteps) if steps else None
    return [Tick(step, t, many, None, branch) for step, t in enumerate(timesteps) for branch in branches]
