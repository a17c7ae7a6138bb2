"""Two policies on one model and clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.cli.commands import main
from cachepolicy.language.parser import parse
from cachepolicy.planning.plan import Plan
from cachepolicy.reports.diff import PARTLY, Difference, compare, draw_diff
from cachepolicy.testing.strategies import policies

ATTENTION = "transformer_blocks.0.attn1"


def planned(text: str) -> Plan:
    return cachepolicy.plan(parse(text))


def differ(first: str, second: str, steps: int = 6, **clock: Any) -> Difference:
    return compare(planned(first), planned(second), steps=steps, **clock)


@given(policies(), policies())
def test_it_is_symmetric_and_nothing_for_a_policy_and_itself(first: Any, second: Any) -> None:
    """Turned round, each pair of rows is turned round; a policy does not differ from itself."""
    one, other = cachepolicy.plan(first), cachepolicy.plan(second)
    found, turned = compare(one, other, steps=12), compare(other, one, steps=12)
    assert {name: pair[::-1] for name, pair in found.rows[""].items()} == turned.rows[""]
    assert 0 == compare(one, one, steps=12).differing


@given(policies())
def test_its_rows_are_those_of_the_schedule(policy: Any) -> None:
    """Each site of a policy has in the difference the row that its schedule has."""
    plan = cachepolicy.plan(policy)
    single = {site.name: site for site in plan.sites if len(site.modules) == 1}
    found = compare(plan, plan, steps=12)
    for name in single:
        assert found.first.rows[name] == found.rows[""][name][0]


def test_what_one_takes_and_the_other_does_not_computes_there() -> None:
    """A module without a rule computes at every step."""
    found = differ("match attention every 2 -> reuse", "match feedforward every 2 -> reuse")
    assert ("CRCRCR", "CCCCCC") == found.rows[""][ATTENTION]


def test_a_module_in_a_block_that_answers_does_not_run() -> None:
    """Where the other policy reuses the block, its attention is hidden."""
    found = differ("match attention every 2 -> reuse", "match block every 2 -> reuse")
    assert ("CRCRCR", "C.C.C.") == found.rows[""][ATTENTION]


def test_a_span_of_which_some_blocks_run() -> None:
    """It is marked where the other policy answers only some of its blocks."""
    found = differ(
        "match blocks[1:3] every 2 -> reuse residual", 'match block and "^transformer_blocks.1$" every 2 -> reuse'
    )
    row = found.rows[""]["transformer_blocks[1:3]"]
    assert "CRCRCR" == row[0]
    assert f"C{PARTLY}C{PARTLY}C{PARTLY}" == row[1]


def test_branches_are_compared_each() -> None:
    """A rule that asks for the branch differs on that one only."""
    found = differ(
        "match attention every 2 -> reuse",
        'match attention when branch == "cond" every 2 -> reuse',
        branches=("cond", "uncond"),
    )
    assert found.rows["cond"][ATTENTION][0] == found.rows["cond"][ATTENTION][1]
    assert ("CRCRCR", "CCCCCC") == found.rows["uncond"][ATTENTION]


def test_the_same_meaning_is_said_to_be_the_same() -> None:
    """Two texts of one policy have one hash."""
    found = differ("match attention every 2 -> reuse", "match   attention every 2 -> reuse # twice")
    assert found.same_policy
    assert "The two mean the same, on any model." in draw_diff(found, ("a", "b"))


def test_signals_go_to_whom_they_belong() -> None:
    """A signal that only one of the two has is not an error of the other; one that neither has is."""
    fbc, pab = cachepolicy.plan("fbc"), cachepolicy.plan("pab")
    assert compare(fbc, pab, steps=5, signals={"drift": 0.0}).differing > 0
    with pytest.raises(cachepolicy.PolicyError, match="E256"):
        compare(fbc, pab, steps=5, signals={"drift": 0.0, "nothing": 1.0})


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments, env={"NO_COLOR": "1"})


def test_the_command_shows_both_where_they_differ() -> None:
    """The rows of both, what each skips, and how many calls differ."""
    result = run("diff", "pab", "pab", "--set-second", "spatial_every=3", "--steps", "10")
    assert 0 == result.exit_code
    assert "pab (first):" in result.stdout
    assert "pab (second):" in result.stdout
    assert "module calls differently" in result.stdout


def test_the_command_as_json() -> None:
    """Rows in pairs, by branch and site."""
    data = json.loads(run("diff", "pab", "fora", "--steps", "4", "--json").stdout)
    assert ["CCCC", "CRRC"] == data["rows"][""][ATTENTION] or 2 == len(data["rows"][""][ATTENTION])
    assert data["differing"] <= data["calls"]
    assert data["digests"][0] != data["digests"][1]


@given(st.sampled_from(["pab", "fora", "fastercache"]), st.integers(1, 12))
def test_the_count_is_that_of_the_letters(name: str, steps: int) -> None:
    """Every letter that differs counts once."""
    found = compare(cachepolicy.plan(name), cachepolicy.plan("pab", spatial_every=3), steps=steps)
    letters = [(a, b) for one, other in found.rows[""].values() for a, b in zip(one, other, strict=True)]
    assert len(letters) == found.calls
    assert sum(a != b for a, b in letters) == found.differing
