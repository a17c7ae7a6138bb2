"""`simulate` and `plan`: their arguments, what they give, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import Tick
from cachepolicy.planning.simulation import Schedule, evenly, replay, simulate
from cachepolicy.testing import strategies

SITE, LATER = "transformer_blocks.0.attn1", "transformer_blocks.1.attn1"


def schedule(text: str, steps: int = 6, **options: Any) -> Schedule:
    return simulate(parse(text), steps=steps, **options)


def row(text: str, steps: int = 6, **options: Any) -> str:
    return schedule(text, steps, **options).rows[LATER]


def code(text: str, steps: int = 6, **options: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        schedule(text, steps, **options)
    return caught.value.diagnostics[0].code


# --- the clock -------------------------------------------------------------------------------------------


@given(st.integers(1, 200))
def test_timesteps_fall_evenly_where_nobody_gives_them(steps: int) -> None:
    """From 999 to 0, one a step, the first 999."""
    timesteps = evenly(steps)
    assert (steps, 999.0) == (len(timesteps), timesteps[0])
    assert steps == 1 or timesteps[-1] == 0.0
    assert sorted(timesteps, reverse=True) == timesteps


def test_given_timesteps_and_sigmas_are_read() -> None:
    """In training units; as many as there are steps."""
    text = "match attention when t > 500 and sigma < 2 -> reuse"
    assert "CRRCCC" == row(text, timesteps=[900, 800, 700, 400, 300, 100], sigmas=[1, 1, 1, 1, 1, 1])
    assert "CRCCCC" == row(text, timesteps=[900, 800, 700, 400, 300, 100], sigmas=[1, 1, 3, 1, 1, 1])


@pytest.mark.parametrize(
    ("steps", "options"),
    [(0, {}), (-1, {}), (True, {}), (3, {"timesteps": [900.0]}), (3, {"sigmas": [1.0] * 4})],
)
def test_a_clock_that_does_not_fit_is_refused(steps: int, options: Any) -> None:
    """No steps, or another number of timesteps."""
    assert "E254" == code("match attention -> reuse", steps, **options)


def test_what_the_clock_does_not_tell_is_an_error() -> None:
    """`sigma` without sigmas: E250, and the help says where they come from in a run."""
    assert "E250" == code("match attention when sigma < 1 -> reuse")


def test_a_mask_of_another_length_is_an_error() -> None:
    """One letter a step where the steps are known."""
    assert "E251" == code('match attention mask "110" -> reuse')
    assert "CCRRRC" == row('match attention mask "110001" -> reuse')


# --- sites -----------------------------------------------------------------------------------------------


def test_sites_may_be_plain_names() -> None:
    """Kinds are guessed from the names, and parents hide what is inside."""
    text = "match block every 2 -> reuse\nmatch attention -> reuse"
    got = schedule(text, 4, sites=["blocks.0.attn", "blocks.1.attn", "blocks.1.ff"]).rows
    assert {"blocks.0": "CRCR", "blocks.0.attn": "C.R.", "blocks.1": "CRCR", "blocks.1.attn": "C.R."} == got


def test_settings_are_keywords() -> None:
    """Params are set by name; a wrong one is an error."""
    assert "CRRCRR" == row("param n: int = 2\nmatch attention every n -> reuse", n=3)
    assert "CRCRCR" == row("param n: int = 2\nmatch attention every n -> reuse")
    assert "E160" == code("match attention -> reuse", m=3)


def test_shipped_policies_are_known_by_name() -> None:
    """A bare name, with its settings."""
    got = simulate("pab", steps=10, spatial_every=4)
    assert "CCRRCRRRCC" == got.rows[SITE]
    assert simulate("pab.cp", steps=10, spatial_every=4).rows == got.rows


# --- signals ---------------------------------------------------------------------------------------------

SIGNAL = (
    "signal head = residual(blocks[0])\nsignal drift = relative_l1(head, kept(head))\n"
    'match "transformer_blocks.[1-9].attn" while drift < 0.5 -> reuse'
)


def test_signals_are_numbers_given_by_name() -> None:
    """One number for all steps, one a step, or one a step and branch."""
    assert "CRRRRR" == row(SIGNAL, signals={"drift": 0.1})
    assert "CRRCRC" == row(SIGNAL, signals={"drift": [0, 0, 0, 0.5, 0.4, 1]})
    both = schedule(SIGNAL, 3, branches=("cond", "uncond"), signals={"drift": {"cond": [0, 1, 0], "uncond": [0, 0, 1]}})
    assert ("CCR", "CRC") == (both.rows_of("cond")[LATER], both.rows_of("uncond")[LATER])


def test_nan_computes() -> None:
    """A number that is not finite answers nothing."""
    assert "CCRCRR" == row(SIGNAL, signals={"drift": [0, float("nan"), 0, float("inf"), 0, 0]})


def test_a_signal_that_nobody_gives_is_an_error() -> None:
    """What only a run can measure has to be given; unknown names and wrong lengths too are told."""
    assert "E257" == code(SIGNAL)
    assert "E256" == code(SIGNAL, signals={"drif": 0.1, "drift": 0.1})
    assert "E255" == code(SIGNAL, signals={"drift": [0.1]})


def test_a_norm_in_a_while_is_given_as_it_is_written() -> None:
    """The numbers of the tensor that it reads are no numbers of it."""
    text = 'signal x = residual(blocks[0])\nmatch "transformer_blocks.[1-9].attn" while l1(x,kept(x))<1 -> reuse'
    assert "E257" == code(text)
    assert "E257" == code(text, signals={"x": 0.1})
    assert "CRRCRR" == row(text, signals={"l1(x, kept(x))": [0, 0, 0, 1, 0, 0]})


def test_a_number_that_follows_from_others_need_not_be_given() -> None:
    """`signal change = drift * 2` is computed from `drift`."""
    text = SIGNAL.replace("while drift", "while change").replace("match", "signal change = drift * 2\nmatch")
    assert "CRRCRC" == row(text, signals={"drift": [0, 0, 0, 0.25, 0.2, 1]})


# --- what comes back -------------------------------------------------------------------------------------


def test_a_decision_says_why() -> None:
    """The rule that decided, and the reason."""
    decision = schedule("match attention every 2 -> reuse").decision(SITE, 1)
    assert ("reuse", 0, "the rule reuses") == (decision.verdict, decision.rule, decision.reason)


def test_a_decision_of_no_site_or_step_is_refused() -> None:
    """E252 with the nearest name, E253 with the number of steps."""
    made = schedule("match attention -> reuse")
    with pytest.raises(PolicyError, match="E252") as caught:
        made.decision("transformer_blocks.0.attn", 1)
    assert "transformer_blocks.0.attn" in str(caught.value.diagnostics[0].help)
    with pytest.raises(PolicyError, match="E253"):
        made.decision(SITE, 6)


def test_facts_are_inputs() -> None:
    """What only a run can know, by site, step and branch, changes that decision and what follows from it."""
    facts = {(SITE, 2, ""): "the history does not fit this call"}
    got = schedule("match attention every 3 since compute -> reuse", facts=facts)
    assert ("CRCRRC", "CRRCRR") == (got.rows[SITE], got.rows["transformer_blocks.1.attn1"])
    assert facts[SITE, 2, ""] == got.decision(SITE, 2).reason


@given(strategies.policies(follow="cond"), strategies.branches())
def test_a_replay_of_the_clock_is_the_schedule(policy: Any, branches: tuple[str, ...]) -> None:
    """Given the ticks of a schedule, `replay` decides the same."""
    made = simulate(policy, steps=12, branches=branches)
    again = replay(made.plan, made.ticks)
    assert [made.rows_of(branch) for branch in branches] == [again.rows_of(branch) for branch in branches]


def test_a_replay_may_miss_steps_of_a_branch() -> None:
    """Guidance that ends part-way has fewer calls on one branch."""
    plan: Plan = schedule("match attention every 3 -> reuse", branches=("cond", "uncond")).plan
    ticks = [
        Tick(step, 0.0, 4, branch=branch) for step in range(4) for branch in ("cond", "uncond")[: 2 if step < 2 else 1]
    ]
    letters = [(tick.step, tick.branch, decisions[0].letter) for tick, decisions in replay(plan, ticks)]
    assert [
        (0, "cond", "C"),
        (0, "uncond", "C"),
        (1, "cond", "R"),
        (1, "uncond", "R"),
        (2, "cond", "R"),
        (3, "cond", "C"),
    ] == letters


def test_simulating_needs_no_torch() -> None:
    """Parsing, binding, simulating and explaining never import it."""
    script = (
        "import sys, cachepolicy\n"
        "cachepolicy.simulate('pab', steps=10); cachepolicy.plan('pab')\n"
        f"cachepolicy.explain('pab', '{SITE}@3', steps=10)\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_verbs_of_the_package_are_these() -> None:
    """`cachepolicy.simulate` and `cachepolicy.plan` are the functions, whatever was imported before."""
    assert simulate is cachepolicy.simulate
    assert callable(cachepolicy.plan)


# --- rules and numbers that do not act as they look ------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 11))
def test_a_fraction_is_rounded_down(steps: int, divisor: int) -> None:
    """A schedule or bound with a fraction decides as with the whole number below it, at every step."""
    table = ", ".join(str(1 + step // (divisor + 1)) for step in range(steps))
    for clause in (
        "every {}",
        "every 3 offset {}",
        "every {} since compute",
        "at most {} in a row",
        "at most {} in all",
    ):
        fraction = f"match attention {clause.format(f'1 + step / {divisor + 1}')} -> reuse"
        whole = f"table n = [{table}]\nmatch attention {clause.format('n[step]')} -> reuse"
        rows = [simulate(parse(text), steps=steps).rows for text in (whole, fraction)]
        assert rows[0] == rows[1], clause


def test_an_infinite_number_decides() -> None:
    """Infinite intervals, offsets and bounds are never reached: the rule reuses as often as the rest of it allows."""
    for clause, row in [
        ("every (2 if step < 3 else inf)", "CRCRRRR"),
        ("every 2 offset (0 if step < 3 else inf)", "CRCRRRR"),
        ("every (2 if step < 3 else inf) since compute", "CRCRRRR"),
        ("at most (1 if step < 3 else inf) in a row", "CRCRRRR"),
        ("at most (1 if step < 3 else inf) in all", "CRCRRRR"),
    ]:
        schedule = simulate(parse(f"match feedforward {clause} -> reuse"), steps=7)
        assert {row} == set(schedule.rows.values()), clause


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("match attention when t > 2000 every 2 -> reuse", ["W515"]),
        ("match attention every 2 -> reuse", []),
        ("match attention every 2 -> reuse\nmatch attention every 3 -> reuse", ["W510"]),
        ("match blocks when step > 0 -> reuse\nmatch self_attention when step > 0 every 2 -> reuse", ["W515"]),
        ('match optional "nothing" every 2 -> reuse\nmatch feedforward when step == 9 -> reuse', ["W515"]),
    ],
)
def test_a_rule_that_decides_no_call_is_named(rules: str, expected: list[str]) -> None:
    """The schedule warns of each rule with sites that owns no call of it, once, and shows its line."""
    schedule = simulate(parse(rules), steps=8)
    assert expected == [warning.code for warning in schedule.warnings]
    assert all(warning.severity == "warning" for warning in schedule.warnings)


def test_a_site_is_found_by_a_selector() -> None:
    """A span may be named as its rule writes it. A block of it and a selector of several sites say what to ask for."""
    schedule = simulate(parse("match blocks[1:] every 2 -> reuse\nmatch feedforward every 2 -> reuse"), steps=4)
    (span,) = (site.name for site in schedule.plan.sites if len(site.modules) > 1)
    assert schedule.decision(span, 1) == schedule.decision("blocks[1:]", 1)
    assert cachepolicy.explain(schedule.plan, "blocks[1:]@1", steps=4) == cachepolicy.explain(
        schedule.plan, f"{span}@1", steps=4
    )
    for name, message in [
        ("transformer_blocks.3", f"`transformer_blocks.3` is no site by itself, it belongs to the site `{span}`"),
        ("feedforward", "`feedforward` selects 12 sites, not one"),
        ("blocks[2:]", "`blocks[2:]` is no site, and 10 sites are in it"),
        ("attention", "no rule selects a site `attention`"),
    ]:
        with pytest.raises(PolicyError) as raised:
            schedule.decision(name, 1)
        assert ("E252", message) == (raised.value.diagnostics[0].code, raised.value.diagnostics[0].message)
