# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false
"""The threshold of a policy with a signal, for a target."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.planning.check import check_text, run_expectations
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tuning.sampling import Sampler
from cachepolicy.tuning.threshold import MOST_RUNS, ThresholdTuning, tune_threshold

STEPS = 8
TWO = """\
param low: float = 0.1
param high: float = 0.2
let limit = low * 2
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= limit and drift < high -> reuse residual
"""


def calls(*seeds: int) -> list[dict[str, Any]]:
    return [
        {"class_labels": [seed], "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)}
        for seed in seeds
    ]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def tuned(pipe: Any, folder: Path | None, policy: Any = "fbc", **more: Any) -> ThresholdTuning:
    return tune_threshold(pipe, calls(0, 1), policy, held_out=calls(2, 3), run_dir=folder, **more)


def test_a_cost_is_met_by_the_smallest_measured_threshold(pipe, folder: Path) -> None:
    """The chosen threshold keeps the cost, the next smaller one does not; a run with the file has that cost."""
    found = tuned(pipe, folder, cost=0.5)
    assert found.chosen.cost is not None
    assert found.chosen.cost <= 0.5
    assert all(point.cost > 0.5 for point in found.measured if point.value < found.chosen.value)
    assert len(found.measured) <= MOST_RUNS
    with cachepolicy.apply(pipe, found.policy) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = []
        for call in calls(2, 3):
            pipe(**call)
            shares.append(next(iter(run.trace.rows().values())).count("C") / STEPS)
    assert sum(shares) / 2 == pytest.approx(found.chosen.cost)
    compared = found.report(folder / "report.html", converged=None, baselines=False)
    assert found.chosen.psnr == pytest.approx(compared["tuned"].uncached.mean, abs=1e-3)
    assert "param threshold" in (folder / "report.html").read_text("utf-8")


def test_a_quality_is_met_by_the_largest_measured_threshold(pipe, folder: Path) -> None:
    """The chosen threshold keeps the PSNR, the next larger one does not."""
    found = tuned(pipe, folder, psnr=30)
    assert found.chosen.psnr is not None
    assert found.chosen.psnr >= 30
    assert all(point.psnr < 30 for point in found.measured if point.value > found.chosen.value)


def test_the_file_is_the_policy_with_another_default(pipe, folder: Path) -> None:
    """Rules and comments stay, expectations keep their threshold, and the file says what it was tuned for."""
    found = tuned(pipe, folder, cost=0.5)
    assert not check_text(found.text.encode(), source="mine.cp")
    assert run_expectations(found.policy).hold
    assert found.text == cachepolicy.format(found.policy)
    assert "# The first block always runs." in found.text
    (said,) = [each for each in found.policy.statements if isinstance(each, ir.Tuned)]
    assert STEPS == said.steps
    assert {"threshold", "cost", "psnr", "held_out", "sigmas"} <= {each.name for each in said.settings}


def test_a_second_run_samples_nothing(pipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the folder has is not sampled again, and the result is the same."""
    first = tuned(pipe, folder, cost=0.5)

    def refused(*_: Any) -> None:
        raise AssertionError("a call was sampled")

    monkeypatch.setattr(Sampler, "__call__", refused)
    assert first.text == tuned(pipe, folder, cost=0.5).text


def test_a_target_out_of_reach_says_what_is_reachable(pipe, folder: Path) -> None:
    """E404 has the best measured threshold."""
    with pytest.raises(PolicyError, match="the best of the measured thresholds") as caught:
        tuned(pipe, folder, cost=0.01)
    assert "E404" == caught.value.diagnostics[0].code


@pytest.mark.parametrize(
    ("policy", "more", "said"),
    [
        ("pab", {}, "no param is a threshold"),
        (TWO, {}, "several params could be the threshold: `low`, `high`"),
        (TWO, {"param": "hihg"}, "did you mean `high`"),
    ],
)
def test_a_policy_needs_one_threshold(pipe, policy: str, more: dict[str, str], said: str) -> None:
    """E408 names the params that could be meant."""
    loaded = policy if policy == "pab" else cachepolicy.parse(policy)
    with pytest.raises(PolicyError, match=said) as caught:
        tuned(pipe, None, loaded, cost=0.5, **more)
    assert "E408" == caught.value.diagnostics[0].code


def test_one_target_is_needed(pipe) -> None:
    """E402 names those that were found."""
    with pytest.raises(PolicyError, match="`cost`, `psnr`"):
        tuned(pipe, None, cost=0.5, psnr=30)
