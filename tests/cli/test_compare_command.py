"""`cachepolicy compare`: from a folder and policies to a table, data and a page."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

from click.testing import CliRunner

from cachepolicy.cli.commands import main
from cachepolicy.tools.emoji_flux import shipped_folder


def compare(*options):
    size = ["--argument", "height=32", "--argument", "width=32", "--steps", "3", "--samples", "1", "--converged", "0"]
    return CliRunner().invoke(main, ["compare", str(shipped_folder()), *map(str, options), *size])


def test_a_folder_is_compared(tmp_path):
    """The policy, a number of steps and the baselines are rows of the printed data, and the files are written."""
    policy, prompts = tmp_path / "mine.cp", tmp_path / "prompts.txt"
    policy.write_text("match model on {0, 2} -> reuse\n")
    prompts.write_text("panda\n")
    folder = tmp_path / "out"
    done = compare(policy, "--prompts", prompts, "--try-steps", 1, "--output", folder, "--json")
    assert 0 == done.exit_code, done.output
    data = json.loads(done.stdout)
    assert ["uncached", "mine", "1 step", "2 steps"] == [row["name"] for row in data["rows"][:4]]
    assert pytest.approx(2 / 3) == data["rows"][1]["cost"]
    assert {"compare.json", "compare.csv", "compare.svg", "compare.html", "compare.png"} == {
        path.name for path in folder.iterdir()
    }
    assert {*data["files"]} == {*map(str, folder.iterdir())}


def test_a_wrong_policy_is_told_before_anything_is_loaded(tmp_path):
    """An unknown param ends the command with its code."""
    done = compare("fora", "--set", "evry=2", "--output", tmp_path)
    assert 2 == done.exit_code
    assert "evry" in done.stderr
