"""A run that reused nothing is told what was measured beside what its rules asked for."""

from __future__ import annotations

import pytest

import cachepolicy
from cachepolicy.planning.simulation import simulate
from cachepolicy.reports.nothing_reused import why_nothing_was_reused
from tests.support import report_data as reports

DRIFTS = [0.63, 0.11, 0.15, 0.17, 0.185, 0.188, 0.19, 0.195, 0.199, *[0.3 + 0.01 * step for step in range(19)]]


def told(text: str, *, steps: int = 10, distilled: bool = False, **options) -> str:
    schedule = simulate(cachepolicy.parse(text), steps=steps, **options)
    return why_nothing_was_reused(reports.as_trace(schedule).last, distilled=distilled)


def test_a_signal_is_shown_beside_its_limit():
    """The range of the signal, the limit, and a limit that a third of the steps would have met."""
    policy = cachepolicy.parse(reports.DRIFTING.replace("use fora\n", ""))
    schedule = simulate(policy, steps=28, signals={"drift": DRIFTS}, threshold=0.05)
    trajectory = reports.as_trace(schedule).last
    trajectory.plan = cachepolicy.plan(policy, threshold=0.05)
    said = "`drift` was 0.11 to 0.63, the limit is 0.05; at 10 of 28 steps it was at most 0.31"
    assert said == why_nothing_was_reused(trajectory)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("match attention when t in (100, 800) every 2 -> reuse", "`t` was never in (100, 800), it was -1.55 to 1.1"),
        ("match attention when 5 < t -> reuse", "`t` never met `5 < t`, it was -1.55 to 1.1"),
        ('match attention when branch == "b" and t > -9 -> reuse', '`branch == "b"` never held'),
        ("match attention every 1 -> reuse", "its schedule says so"),
        ("match attention while t - kept(t) > 3 -> reuse", "`t - kept(t)` was -0.2944, the limit is 3"),
        ("match attention -> compute", ""),
        (
            "match attention when t > 9 -> reuse\nmatch feedforward every 1 -> reuse",
            "rule 1: `t` never met `t > 9`, it was -1.55 to 1.1; rule 2: its schedule says so",
        ),
    ],
)
def test_each_clause_that_kept_a_rule_from_reusing_is_named(text, said):
    """A window with the values that it was asked of, a schedule, a part of a `when`, a difference."""
    timesteps = [1.1 - (1.1 + 1.55) * step / 9 for step in range(10)]
    assert told(text + "\n", timesteps=timesteps).startswith(said)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("not drift > 0.05", "the limit is 0.05; at 10 of 28 steps it was at most 0.31"),
        ("not (drift > 0.05 or step < 0)", "the limit is 0.05; at 10 of 28 steps it was at most 0.31"),
        ("not not drift < 0.05", "the limit is 0.05; at 10 of 28 steps it was at most 0.31"),
        ("not drift <= 0.9", "the limit is 0.9; at 10 of 28 steps it was at least 0.4"),
        ("drift > 0.9", "the limit is 0.9; at 10 of 28 steps it was at least 0.4"),
    ],
)
def test_a_limit_that_is_denied_is_met_from_the_other_side(condition, said):
    """`not drift > 0.05` is advised as `drift <= 0.05` is."""
    text = f"signal drift = l1(input(model))\nmatch attention while {condition} -> reuse\n"
    policy = cachepolicy.parse(text)
    trajectory = reports.as_trace(simulate(policy, steps=28, signals={"drift": DRIFTS})).last
    trajectory.plan = cachepolicy.plan(policy)
    assert f"`drift` was 0.11 to 0.63, {said}" == why_nothing_was_reused(trajectory)


def test_many_rules_are_cut_short():
    """The first three rules are explained, the others counted."""
    text = "".join(f"match attention when t > {1001 + step} -> reuse\n" for step in range(5))
    assert told(text).endswith("; and 2 more rules")


def test_a_distilled_model_is_named():
    """FasterCache on it is told that there is no unconditional half, with the way out."""
    schedule = simulate("fastercache", steps=4, timesteps=[999.0, 998.0, 997.0, 996.0])
    trajectory = reports.as_trace(schedule).last
    trajectory.plan = schedule.plan
    assert "`t` was never in (-1, 641)" in why_nothing_was_reused(trajectory)
    facts = {("model", step, ""): "there is no guidance" for step in range(10)}
    without = reports.as_trace(simulate("fastercache", steps=10, facts=facts)).last
    text = why_nothing_was_reused(without, distilled=True)
    assert text.startswith("rule 1: this model has no unconditional half, try `distilled=True`")
    assert "rule 1: there is no guidance" in why_nothing_was_reused(without)


def test_what_hindered_a_reuse_is_named_before_the_schedule_that_computes_as_often():
    """At every second step the schedule computes in any run; the other steps have the cause."""
    facts = {("model", step, ""): "there is no guidance" for step in range(6)}
    text = "match model every 2 -> approximate uncond spectral(low: 1, high: 1)\n"
    assert "there is no guidance" == told(text, steps=6, facts=facts)
    # Nothing is kept at the first step of any run.
    text = "match attention on {1, 2, 3} -> reuse\n"
    assert "its schedule says so" == told(text, steps=4)
