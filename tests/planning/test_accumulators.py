"""Accumulators, one by one, with numbers that are worked out by hand."""

from __future__ import annotations

import pytest

from cachepolicy.language.parser import parse
from cachepolicy.planning.simulation import Schedule, simulate
from cachepolicy.reports.explanation import explain

SITE = "transformer_blocks.0.attn1"


def run(clause: str, x: list[float], *, action: str = "reuse", before: str = "") -> Schedule:
    text = f"signal x = l1(input(model))\n{before}\nmatch attention {clause} -> {action}\n"
    return simulate(parse(text), steps=len(x), signals={"x": x})


NAN = float("nan")


@pytest.mark.parametrize(
    ("clause", "x", "row"),
    [
        # 1, then 1 * 0.5 + 1 = 1.5, 1.75, and 1.875 is not below 1.8: computes, and starts from 0.
        ("while sum(x, decay: 0.5) < 1.8", [1, 1, 1, 1, 1, 1], "CRRRCR"),
        ("while sum(x, decay: 0) < 1.5", [1, 1, 2, 1, 1], "CRCRR"),
        # The total counts the first step too, and no compute resets it.
        ("while total(x) < 3.5", [1, 1, 1, 1, 1, 1], "CRRCCC"),
        # A step without a number computes and adds nothing.
        ("while total(x) < 3.5", [NAN, 1, NAN, 1, 1, 1], "CRCRRC"),
        ("while sum(x) < 2.5", [NAN, 1, NAN, 1, 1, 1], "CRCRRC"),
        # 8, 4, 2, 5, 6.5: half of each.
        ("while ema(x, 0.5) < 6", [8, 0, 0, 8, 8, 0], "CRRRCR"),
        ("while ema(x, 0.5) < 6", [NAN, 8, NAN, 0, 8], "CCCRC"),
        ("while latch(x > 2)", [1, 3, 1, 1, 1], "CRRRR"),
        ("while not latch(x > 2)", [1, 1, 3, NAN, 1], "CRCCC"),
        ("while latch(x > 2)", [1, NAN, 3, NAN, 1], "CCRRR"),
        ("while x < 2 * at_step(1, x)", [9, 3, 5, 7, 5, 6], "CRRCRC"),
        ("while x < at_step(1, x)", [9, NAN, 5, 7], "CCCC"),
        ("while at_step(steps / 2, x) > 1", [0, 0, 5, 0, 0], "CCRRR"),
        ("while latch(sum(x) > 3)", [1, 1, 2, 2, 0], "CCCCC"),
        ("while latch(total(x) > 3)", [1, 1, 2, 2, 0], "CCRRR"),
    ],
)
def test_accumulators(clause: str, x: list[float], row: str) -> None:
    """What each accumulator makes of the same kind of numbers."""
    assert row == run(clause, x).rows[SITE]


def test_accumulators_advance_only_while_their_rule_owns_the_site() -> None:
    """Steps that another rule owns add nothing."""
    before = "match attention when step in {1, 2} -> compute"
    assert "CCCRRC" == run("while total(x) < 3.5", [1, 1, 1, 1, 1, 1], before=before).rows[SITE]


def test_accumulators_are_kept_apart_by_branch() -> None:
    """Each branch has its own."""
    text = "signal x = l1(input(model))\nmatch attention while not latch(x > 2) -> reuse\n"
    signals = {"x": {"cond": [1.0, 1, 3, 1], "uncond": [1.0, 1, 1, 1]}}
    schedule = simulate(parse(text), steps=4, branches=("cond", "uncond"), signals=signals)
    assert ("CRCC", "CRRR") == (schedule.rows_of("cond")[SITE], schedule.rows_of("uncond")[SITE])


def test_gap_and_computes() -> None:
    """`gap` has no value before the second compute; both count all computes of the site."""
    schedule = simulate(
        parse("match attention when gap == 2 -> reuse\nmatch attention on {0, 3, 5} -> reuse\n"), steps=9
    )
    assert "CRRCRCRRR" == schedule.rows[SITE]
    schedule = simulate(parse("match attention every computes since compute -> reuse\n"), steps=12)
    assert "CCRCRRCRRRCR" == schedule.rows[SITE]


def test_an_argument_without_a_value_makes_the_site_compute() -> None:
    """`predict linear(weight: 1 / gap)` has no weight before the second compute."""
    policy = parse("match attention every 4 -> predict linear(weight: 1 / gap)\n")
    schedule = simulate(policy, steps=8)
    assert "CCRRCRRR" == schedule.rows[SITE]
    assert "an argument of its action has no value" == schedule.decision(SITE, 1).reason
    assert "no   `weight: 1 / gap` has a value" in str(explain(policy, f"{SITE}@1", steps=8))
    assert "yes  `weight: 1 / gap` has a value   (gap = 1)" in str(explain(policy, f"{SITE}@2", steps=8))
