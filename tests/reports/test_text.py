"""The grid of sites by steps, its names, its width and its counts."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.planning.grid import folded, grid
from cachepolicy.planning.simulation import simulate
from cachepolicy.planning.tally import tally
from cachepolicy.reports.text import draw, outcome_to_json, summary

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"transformer_blocks.{i}.attn1" for i in range(8)], ["transformer_blocks.0-7.attn1"]),
        (["a.0.x", "a.2.x", "a.3.x"], ["a.0,2-3.x"]),
        (["a.0.x", "a.0.y", "a.1.x"], ["a.0-1.x", "a.0.y"]),
        ([f"a.{i}.b.{j}" for i in range(2) for j in range(3)], ["a.0-1.b.0-2"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.0-1", "a.1.b.0"]),
        (["model"], ["model"]),
        (["blocks[1:8]", "blocks.0"], ["blocks[1:8]", "blocks.0"]),
        ([], []),
    ],
)
def test_names_that_differ_in_a_number_are_folded(names, expected):
    """Runs of numbers become ranges; different names stay apart."""
    assert expected == list(folded(names))
    assert names == [] or sorted(names) == sorted(name for members in folded(names).values() for name in members)


ROWS = st.dictionaries(
    st.from_regex(r"[ab]\.[0-9]{1,2}\.(attn|ff)", fullmatch=True), st.text("CR.", min_size=73, max_size=73), min_size=1
)


@given(rows=ROWS, width=st.integers(30, 200))
def test_a_grid_fits_and_loses_no_letter(rows, width):
    """No line is wider than asked, and each row can be read back from the panels."""
    lines = grid(rows, width=width).splitlines()
    assert all(len(line) <= width for line in lines)
    starts = [number for number, line in enumerate(lines) if line.startswith(" ")]
    panels = [lines[start + 1 : end] for start, end in pairwise([*starts, len(lines)])]
    read_back = ["".join(line.split()[-1] for line in parts) for parts in zip(*panels, strict=True)]
    assert set(rows.values()) == set(read_back)


@given(rows=ROWS)
def test_colour_changes_no_letter(rows):
    """Without the escapes the coloured grid is the plain one."""
    assert grid(rows) == ESCAPE.sub("", grid(rows, colour=True))


def test_the_ruler_stands_over_its_steps():
    """The number 10 begins at the column of step 10."""
    ruler, row = grid({"a": "C" * 10 + "R" * 13}, width=60).splitlines()
    assert row.index("R") == ruler.index("10")
    assert row.index("R") + 10 == ruler.index("20")


def test_a_schedule_is_drawn_with_shares_and_hash():
    """The drawing names folded sites, each rule's share, the skipped share and the semantic hash."""
    schedule = simulate("pab", steps=10)
    text = draw(schedule, width=100)
    assert re.search(r"transformer_blocks\.0-7\.attn1 +CCCRCRCRCC\n", text)
    assert "rule 1: owns 84 calls, answers 36" in text
    assert (
        f"10 steps, 12 sites: 36 of 120 site calls skipped (30.0 %); policy {schedule.plan.resolved.digest[:12]}"
        in text
    )
    assert "\x1b" not in text


def test_hidden_calls_are_counted_as_skipped():
    """A site inside one that reuses does not run either, and the legend says what the dot means."""
    policy = cachepolicy.parse(
        'match "^transformer_blocks.0$" every 2 -> reuse\nmatch "blocks.0.attn1" every 4 -> reuse'
    )
    schedule = simulate(policy, steps=4, sites=["transformer_blocks.0", "transformer_blocks.0.attn1"])
    assert {"compute": 4 - 1, "reuse": 3, "hidden": 2} == dict(tally(schedule).calls)
    assert "5 of 8 site calls skipped (62.5 %, 2 of them hidden)" in summary(schedule)
    assert ". hidden" in draw(schedule)


def test_branches_that_differ_are_drawn_apart():
    """Each branch has its grid; equal branches share one."""
    policy = cachepolicy.parse('match self_attention when branch == "cond" every 2 -> reuse')
    text = draw(simulate(policy, steps=4, branches=("uncond", "cond")))
    assert re.search(r"branch `uncond`\n.*\n.* CCCC\n", text)
    assert re.search(r"branch `cond`\n.*\n.* CRCR\n", text)
    both = cachepolicy.parse("match self_attention every 2 -> reuse")
    assert "branch `uncond` and `cond`" in draw(simulate(both, steps=4, branches=("uncond", "cond")))


def test_nothing_to_draw_is_said():
    """A policy that takes no site says that every module computes."""
    policy = cachepolicy.parse('match optional "nowhere" every 2 -> reuse')
    assert "no site: every module computes" in draw(simulate(policy, steps=4))


def test_the_json_form_is_plain():
    """The same numbers as data that JSON can hold."""
    data = json.loads(json.dumps(outcome_to_json(simulate("pab", steps=10))))
    assert "CCCRCRCRCC" == data["rows"][""]["transformer_blocks.0.attn1"]
    assert {"compute": 84, "reuse": 36, "hidden": 0} == data["calls"]
    assert [84, 36] == [data["rules"][0]["owned"], data["rules"][0]["reused"]]
    assert 10 == len(data["timesteps"])
