"""The benchmarks run and print their tables; what they measure is not judged here."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks import compile as compiling
from benchmarks import emoji, fbc, gpu, headline, overhead, pab, processes, tracing
from benchmarks._measure import Spread, spread, table


def test_overhead_prints_ratios(capsys):
    """A hit and a miss are compared with the bare call and with diffusers' hook, and putting on is timed."""
    overhead.main(["--sites", "2", "4", "--rounds", "2", "--calls", "2", "--blocks", "1", "1"])
    printed = capsys.readouterr().out
    for words in ("hit, above the bare call", "miss, above the bare call", "ours / diffusers", "ours apply"):
        assert words in printed


def test_pab_compares_equal_outputs(capsys):
    """The bare model, diffusers, ours and the ideal run the same trajectory, the last three to the same bits."""
    pab.main(["--double", "1", "--single", "1", "--heads", "1", "--edge", "2", "--text", "2", "--rounds", "2"])
    printed = capsys.readouterr().out
    assert "bitwise equal at every step: yes" in printed
    assert "time / the ideal's" in printed


def test_fbc_compares_equal_decisions(capsys):
    """Ours and diffusers' (and cache-dit's, where it is installed) hit and miss alike before they are timed."""
    fbc.main(["--heads", "1", "--blocks", "1", "--edge", "2", "--steps", "4", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert 2 == printed.count("decisions equal: CRRR at 0.999")
    assert 2 == printed.count("CCCC at 1e-09")
    assert "ours / its: hit" in printed


def test_fbc_leaves_out_what_is_not_installed(capsys, monkeypatch):
    """Without cache-dit its rows are missing, and a line says so."""
    monkeypatch.setattr(fbc.importlib.util, "find_spec", lambda _: None)
    fbc.main(["--heads", "1", "--blocks", "1", "--edge", "2", "--steps", "3", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("cache-dit is not installed")
    assert "\ncache-dit " not in printed


@pytest.mark.deep
def test_compile_counts_graphs_side_by_side(capsys):
    """Of the bare model, ours and the others: ours takes a graph a set of decisions and breaks none."""
    compiling.main(["--blocks", "1", "--heads", "1", "--edge", "2", "--steps", "6", "--rounds", "1"])
    whole, by_block, _ = capsys.readouterr().out.split("\n\n")
    for text, graphs in ((whole, "2"), (by_block, "4")):
        rows = {line[:16].strip(): line.split()[2:6] for line in text.splitlines() if line.startswith("PAB")}
        assert [graphs, "0", "0", "yes"] == rows["PAB, ours"]
        assert "no" == rows["PAB, diffusers"][3]


def test_emoji_tabulates_every_way(capsys, tmp_path):
    """Each way has a line of the table, and one of the contact sheet."""
    sheet = tmp_path / "sheet.png"
    emoji.main(["--number", "1", "--steps", "2", "--shown", "1", "--pictures", str(sheet)])
    printed = capsys.readouterr().out
    assert all(f"\n| {way} | " in printed for way in emoji.WAYS)
    assert "| uncached again | 1.000 |" in printed
    assert sheet.stat().st_size > 0


@pytest.mark.deep
def test_the_headline_writes_what_the_readme_shows(capsys, tmp_path):
    """The table has the policy and its baselines, and the picture, chart and numbers are written."""
    headline.main(["--samples", "1", "--results", str(tmp_path)])
    assert "| tuned |" in capsys.readouterr().out
    assert {"dit.json", "dit.md", "dit.svg", "dit.png"} == {path.name for path in tmp_path.iterdir()}


def test_fewer_steps_are_read_between_their_rows():
    """Halfway between the FLOPs of two rows the baseline is halfway between their numbers; outside there is none."""
    once = spread([1.0])
    rows = {name: emoji.Row(way.steps, once, 100 * way.steps, 10 * way.steps) for name, way in emoji.STEPS.items()}
    assert emoji.fewer_steps(rows, 0.6) == pytest.approx((60.0, 6.0))
    assert emoji.fewer_steps(rows, 0.9) is None


def test_processes_prints_percents_of_a_block(capsys):
    """What two processes take to decide as one stands beside what one takes alone."""
    processes.main(["--tokens", "8", "--width", "16", "--rounds", "2"])
    printed = capsys.readouterr().out
    for words in ("one block", "deciding alone", "deciding as one: the message", "deciding as one, in all"):
        assert words in printed


def test_a_loop_hits_or_misses_as_its_name_says():
    """Ways are named by what their sites do after the first call."""
    for what, letter in (("hit", "R"), ("miss", "C")):
        loop = overhead.ours(overhead.Stack(2), 3, overhead.HITS_AND_MISSES[what], tensors=True)
        loop.seconds()
        rows = loop.model.__dict__["_cachepolicy"].attachment.trace.rows()
        assert {"blocks.0": f"C{letter * 4}", "blocks.1": f"C{letter * 4}"} == rows


def test_spreads_are_medians_and_quartiles():
    """Of one number all three are that number."""
    assert Spread(2.0, 3.0, 4.0) == spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert "7.0 [7.0 7.0]" == f"{spread([7.0]):.1f}"


def test_tables_are_aligned():
    """Every line of a table is as long as the others."""
    lines = table("what", ["one", "another"], {"a": [1, 2], "a longer name": [spread([1.0]), "x"]}).splitlines()
    assert 1 == len({len(line) for line in lines})


def test_tracing_compares_three_ways(capsys):
    """Untraced, traced and profiled runs are timed on blocks that compute and on blocks that take no time."""
    tracing.main(["--blocks", "3", "--width", "4", "--tokens", "2", "--steps", "3", "--rounds", "2"])
    printed = capsys.readouterr().out
    assert 2 == printed.count("by the clock")
    assert 2 == printed.count("by a signal")
    assert "profiled, %" in printed


def test_gpu_runs_in_its_small_form(capsys, tmp_path):
    """On a CPU with tiny models: ours and diffusers' decide and answer alike, and the figures are written."""
    gpu.main(["--small", "--device", "cpu", "--eager", "--rounds", "1", "--json", str(tmp_path / "gpu.json")])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "gpu.json").read_text())["models"]
    assert {"flux", "wan"} == figures.keys()
    for name, figure in figures.items():
        found = {way["way"]: way for way in figure["ways"]}
        assert gpu.WAYS.keys() == found.keys(), name
        for method in ("PAB", "FBC", "TaylorSeer"):
            ours, theirs = found[f"{method}, ours"], found[f"{method}, diffusers"]
            assert (None, None, True) == (ours["error"], theirs["error"], theirs["equal"]), (name, method)
            assert ours["computed"] == theirs["computed"]
        assert "CCC" != found["FBC, ours"]["computed"][:3]
        assert found["PAB, ours"]["waits"] == 0
    assert 2 == printed.count("planned list, ours")


@pytest.mark.deep
def test_gpu_compiles_blocks(capsys):
    """The ways that are compiled have figures of their own."""
    gpu.main(["--small", "--device", "cpu", "--rounds", "1", "--models", "flux", "--budget", "3600"])
    compiled = capsys.readouterr().out.partition("blocks compiled")[2]
    assert all(f"\n{way} " in compiled for way in gpu.COMPILED)
    assert "Error" not in compiled
