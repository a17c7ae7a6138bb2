# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false
"""One policy for several numbers of steps and levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.planning.check import check_text, run_expectations
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tuning.levels import LevelTuning, _gated, _renamed, tune_levels

STEPS = (6, 8)
LEVELS = (0.5, 0.75)


def calls(count: int = 3) -> list[dict[str, Any]]:
    return [{"class_labels": [seed], "generator": torch.Generator().manual_seed(seed)} for seed in range(count)]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def passes() -> list[int]:
    return []


@pytest.fixture(scope="module")
def tuned(pipe, passes: list[int]) -> LevelTuning:
    handle = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        return tune_levels(pipe, calls(), LEVELS, steps=STEPS, goal="cost")
    finally:
        handle.remove()


@pytest.mark.filterwarnings("error")
def test_each_number_of_steps_and_level_has_its_schedule(pipe, tuned: LevelTuning) -> None:
    """A run computes the steps that were found for its number of steps and level."""
    for (steps, level), result in tuned.results.items():
        row = "".join("C" if step in result.chosen.steps else "R" for step in range(steps or 0))
        with cachepolicy.apply(pipe, tuned.policy, level=level) as run:
            pipe(**calls()[0], num_inference_steps=steps)
        assert [row] == list(run.trace.rows().values())
        assert result.chosen.cost == int((steps or 0) * level) / (steps or 0)


def test_the_file_is_a_checked_formatted_and_tested_policy(tuned: LevelTuning, tmp_path: Path) -> None:
    """It has a `level` param, an expectation and a `tuned` statement for each."""
    tuned.save(str(tmp_path / "mine.cp"))
    text = (tmp_path / "mine.cp").read_text(encoding="utf-8")
    assert not check_text(text.encode(), source="mine.cp")
    assert text == cachepolicy.format(cachepolicy.parse(text))
    expectations = run_expectations(tmp_path / "mine.cp")
    assert expectations.hold
    assert not expectations.uncovered
    assert (4, 4) == (text.count("\nexpect "), text.count("\ntuned over"))
    assert "param level: float = 0.75 in {0.5, 0.75}" in text


def test_the_recordings_of_a_number_of_steps_are_shared(passes: list[int], tuned: LevelTuning) -> None:
    """Each call is sampled uncached once for each number of steps, whatever the number of levels."""
    spent = sum(result.evaluations * (steps or 0) for (steps, _), result in tuned.results.items())
    assert sum(passes) <= spent - len(calls()) * sum(STEPS) + 1e-9


def test_the_report_compares_the_levels_of_each_number_of_steps(tuned: LevelTuning, tmp_path: Path) -> None:
    """One page for each number of steps, whose rows were measured on the held-out calls."""
    found = tuned.report(tmp_path / "tune.html", converged=None, baselines=False)
    assert [*STEPS] == [*found]
    for steps, comparison in found.items():
        assert f"at {steps} steps" in (tmp_path / f"tune-{steps}.html").read_text("utf-8")
        for level in LEVELS:
            chosen, row = tuned.results[steps, level].chosen, comparison[f"level {level:g}"]
            assert chosen.cost == pytest.approx(row.cost)
            assert chosen.psnr == pytest.approx(row.uncached.mean, abs=1e-3)


def test_a_session_may_have_another_level(pipe, tuned: LevelTuning) -> None:
    """The level needs no other hooks, so a session sets it for itself."""
    with cachepolicy.apply(pipe, tuned.policy) as run:
        with run.session("fast", level=0.5):
            pipe(**calls()[0], num_inference_steps=8)
        (row,) = run.trace.rows().values()
    assert 4 == row.count("C")


def test_another_number_of_steps_computes_and_is_told(pipe, tuned: LevelTuning) -> None:
    """No rule holds, and W611 says why."""
    with cachepolicy.apply(pipe, tuned.policy) as run, pytest.warns(UserWarning, match="W611"):
        pipe(**calls()[0], num_inference_steps=5)
    assert ["CCCCC"] == list(run.trace.rows().values())


def test_errors_name_the_level(pipe) -> None:
    """What one level cannot reach is told with its place."""
    with pytest.raises(PolicyError, match=r"at 4 steps, level 0\.01: a cost of 0\.01 is out of reach") as caught:
        tune_levels(pipe, calls(2), [0.01], steps=[4], goal="cost")
    assert "E404" == caught.value.diagnostics[0].code
    with pytest.raises(PolicyError, match="no level is given"):
        tune_levels(pipe, calls(2), [])


def test_names_of_several_policies_do_not_meet() -> None:
    """Lets and tables get names of their own, also where rules read them."""
    policy = parse(
        "table scales = [1, 2]\nlet half = steps / 2\nmatch model when step > half every 1 + scales[step] -> reuse\n"
    )
    first, second = [
        cachepolicy.format(policy.model_copy(update={"statements": tuple(_renamed(policy, name))})) for name in "ab"
    ]
    assert "match model when step > half_a every 1 + scales_a[step] -> reuse" in first
    assert first == second.replace("_b", "_a")
    rule = _gated(policy.statements[-1], 20, 1.5)
    text = cachepolicy.format(policy.model_copy(update={"statements": (rule,), "comments": ()}))
    assert "match model when steps == 20 and level == 1.5 and step > half" in text
