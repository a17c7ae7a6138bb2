"""Schedules before a run: where a signal decides, both outcomes are possible, and the cost lies in the range."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cachepolicy import parse, plan, simulate
from cachepolicy.cli.commands import main
from cachepolicy.planning.open_signals import simulate_open
from cachepolicy.planning.simulation import Schedule
from cachepolicy.planning.tally import tally
from cachepolicy.reports.html.page import page

SIGNAL = "signal drift = l1(input(model), prev(input(model)))\n"
SITES = ["blocks.0.attn", "blocks.1.attn", "blocks.0.ff"]


def opened(text: str, steps: int = 8, **options: Any) -> Schedule:
    return simulate_open(plan(parse(text), sites=SITES), steps=steps, **options)


def row(text: str, **options: Any) -> str:
    return opened(text, **options).rows["blocks.0.attn"]


# --- the letters -------------------------------------------------------------------------------------------

clauses = st.builds(
    "{}while {} {}".format,
    st.sampled_from(["", "every 3 ", "every 4 since compute ", "on {0, 4} ", 'mask "10010010" ']),
    st.sampled_from([
        "drift <= 0.5", "not drift > 0.5", "drift <= 0.5 and step < 5", "drift <= 0.5 or step in {2, 5}",
        "sum(drift) <= 1", "drift - prev(drift) < 0.2",
    ]),
    st.sampled_from(["", "at most 1 in a row ", "at most 2 in a row ", "at most 2 in all "]),
)  # fmt: skip


@given(
    st.sampled_from([SIGNAL, "external drift: float\n"]),
    clauses,
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
    st.booleans(),
)
def test_every_run_lies_in_the_range(declared: str, clause: str, values: list[float], twice: bool) -> None:
    """Whatever the number is, a cell with `C` or `R` comes out so, and as many calls are skipped as the range says."""
    text = f"{declared}match attention {clause}-> reuse\n" + ("match feedforward every 2 -> reuse\n" if twice else "")
    schedule, run = opened(text), simulate(parse(text), steps=8, sites=SITES, signals={"drift": values})
    for site, letters in schedule.rows.items():
        assert all(letter in {"S", other} for letter, other in zip(letters, run.rows[site], strict=True))
    assert schedule.most is not None
    assert tally(schedule.most).skipped <= tally(run).skipped <= tally(schedule).skipped


@given(clauses)
@settings(max_examples=12)
def test_every_marked_cell_may_come_out_either_way(clause: str) -> None:
    """For each `S` there is a run that computes there and one that reuses, and for no other cell."""
    text = f"{SIGNAL}match attention {clause}-> reuse\n".replace("drift - prev(drift) < 0.2", "drift < 0.2")
    text = text.replace("sum(drift) <= 1", "drift <= 1").replace("10010010", "100100")
    letters, found = row(text, steps=6), [set[str]() for _ in range(6)]
    for values in itertools.product([0.0, 2.0], repeat=5):
        run = simulate(parse(text), steps=6, sites=SITES, signals={"drift": [0.0, *values]})
        for step, letter in enumerate(run.rows["blocks.0.attn"]):
            found[step].add(letter)
    assert ["S" if len(possible) == 2 else possible.pop() for possible in found] == list(letters)


@pytest.mark.parametrize(("rules", "letters"), [
    ("match attention while drift <= 0.1 -> reuse", "CSSSSSSS"),
    ("match attention when step < 4 while drift <= 0.1 -> reuse", "CSSSCCCC"),
    ("match attention while drift <= 0.1 and step < 4 -> reuse", "CSSSCCCC"),
    ("match attention while drift <= 0.1 or step in {2, 3} -> reuse", "CSRRSSSS"),
    ("match attention when step < 2 every 9 -> reuse\nmatch attention while drift <= 1 -> reuse", "CRSSSSSS"),
    ("match attention every 2 -> reuse\nmatch feedforward while drift <= 1 -> reuse", "CRCRCRCR"),
])  # fmt: skip
def test_only_what_a_signal_decides_is_marked(rules: str, letters: str) -> None:
    """What the clock decides, alone or first, keeps its letter."""
    assert letters == row(SIGNAL + rules)


@pytest.mark.parametrize(
    "condition",
    ["cross(cond, t) > 3", "mean(age over each blocks) > 1", "any(step > 3 over each blocks)"],
)
def test_numbers_of_other_branches_and_sites_are_left_open(condition: str) -> None:
    """What reads another branch or other sites is not known before a run, even where it reads the clock alone."""
    schedule = simulate_open(plan(parse(f"match each blocks while {condition} -> reuse\n")), steps=4)
    assert {"CSSS"} == set(schedule.rows.values())


def test_what_lies_in_a_site_that_a_signal_decides_is_marked_too() -> None:
    """Such a site runs or is hidden; in the count of the least cost it is hidden."""
    text = SIGNAL + "match block while drift <= 0.1 -> reuse residual\nmatch attention every 2 -> reuse\n"
    schedule = simulate_open(plan(parse(text)), steps=4)
    assert {"CSSS"} == set(schedule.rows.values())
    assert tally(schedule).calls["hidden"] > 0


def test_given_numbers_leave_nothing_open() -> None:
    """Then the schedule is that of `simulate`; of two signals, the other one stays open."""
    text = SIGNAL + "match attention while drift <= 0.1 at most 2 in a row -> reuse\n"
    given_all = opened(text, signals={"drift": 0.05})
    assert given_all.most is None
    assert simulate(parse(text), steps=8, sites=SITES, signals={"drift": 0.05}).rows == given_all.rows
    text = text.replace("while", "while size < 1 and") + "signal size = l1(input(model))\n"
    assert ("size",) == opened(text, signals={"drift": 0.05}).signals
    closed = opened(text, signals={"drift": 0.5})
    assert {"C" * 8} == {closed.rows["blocks.0.attn"]}


# --- the command -------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_draws_the_range() -> None:
    """The letter, the legend, the calls of the rule and the range of what is skipped."""
    text = invoke("fbc", "--steps", "8")
    assert "CSSSSSSS" in text
    assert "S decided by `drift`" in text
    assert "answers 0 to 7" in text
    assert "0 to 7 of 8 site calls skipped (0.0 % to 87.5 %), as `drift` decides" in text
    assert "CCCCCCCC" in invoke("fbc", "--steps", "8", "--signal", "drift=1")


def test_the_range_of_the_flops(tmp_path: Any) -> None:
    """On a diffusers model the FLOPs are a range too, in text and as JSON."""
    pytest.importorskip("diffusers")
    config = {
        "_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6],
        "in_channels": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = invoke(str(tmp_path), "fbc", "--steps", "8")
    assert "faster" in text
    assert "0.0 % to" in text
    data = json.loads(invoke(str(tmp_path), "fbc", "--steps", "8", "--json"))
    assert ["drift"] == data["signals"]
    assert 0 == data["most_cost"]["skipped"] == data["most_cost"]["flops"]["skipped"]
    assert 7 == data["skipped"]
    assert {"CCCCCCCC"} == set(data["most_cost"]["rows"][""].values())
    assert data["flops"]["skipped"] > 0


def test_the_page_shows_the_range(tmp_path: Any) -> None:
    """The page marks the cells, explains the letter and gives ranges at its head."""
    invoke("fbc", "--steps", "8", "--html", str(tmp_path / "plan.html"))
    text = (tmp_path / "plan.html").read_text()
    assert 7 == text.count('<td class="S">S</td>')
    assert "decided by `drift`" in text
    assert "0.0 % to 87.5 %" in text
    assert "it reuses if `drift \\u003c= 0.05`" in text
    assert page([simulate("fora", steps=4)]).count('class="S"') == 0


def test_a_recorded_run_fills_the_signals_in(tmp_path: Any) -> None:
    """The policy of the run comes out as it ran; with another threshold, the recorded numbers decide."""
    torch = pytest.importorskip("torch")
    import cachepolicy
    from cachepolicy.testing.models import Toy, inputs, sample

    text = (
        "param most: float = 0.3\n"
        + SIGNAL.replace("l1(", "relative_l1(")
        + "match attention while drift <= most -> reuse\n"
    )
    file, trace = tmp_path / "p.cp", tmp_path / "trace.json"
    file.write_text(f"cachepolicy 1\npolicy p\n{text}")
    toy = Toy(blocks=2)
    model = toy.build()
    with torch.no_grad(), cachepolicy.apply(model, str(file)) as run:
        list(sample(model, (950.0, 700.0, 600.0, 300.0, 250.0), *inputs(toy)))
        run.trace.save(trace)
        rows, drift = run.trace.rows(), [call.signals[0]["drift"] for call in run.trace.last.calls if call.signals]
    skeleton = [option for name in rows for option in ("--site", name)]
    data = json.loads(invoke(str(file), "--trace", str(trace), *skeleton, "--json"))
    assert rows == data["rows"][""]
    assert [950.0, 700.0, 600.0, 300.0, 250.0] == data["timesteps"]
    assert [] == data["signals"]
    assert len(drift) > 0
    every = json.loads(invoke(str(file), "--trace", str(trace), *skeleton, "--set", "most=1000.0", "--json"))
    assert {"CRRRR"} == set(every["rows"][""].values())
    none = json.loads(invoke(str(file), "--trace", str(trace), *skeleton, "--signal", "drift=2000", "--json"))
    assert {"CCCCC"} == set(none["rows"][""].values())
    for wrong, code in (("drfit=1", "E256"), ("drift=[1, 2]", "E255")):
        result = CliRunner().invoke(main, ["plan", str(file), "--trace", str(trace), *skeleton, "--signal", wrong])
        assert code in result.output
        assert result.exit_code == 2
