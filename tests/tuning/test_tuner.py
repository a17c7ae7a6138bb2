# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false
"""`tune`: from a target to a policy, on the shipped model."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.evaluate import constant
from cachepolicy.language.ir import Tuned
from cachepolicy.planning.check import check_text
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tools.quality import each_psnr
from cachepolicy.tuning.bases import Base
from cachepolicy.tuning.tuner import SchedulePoint, Tuning, _Bench, tune

STEPS = 12


def call(seed: int, **more: object) -> dict:
    """One call of the pipeline, for one picture."""
    generator = torch.Generator().manual_seed(seed)
    return {"class_labels": [(7 * seed) % 36], "num_inference_steps": STEPS, "generator": generator, **more}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tuned(pipe) -> Tuning:
    return tune(pipe, [call(seed) for seed in range(8)], cost=0.5, keep_scheduler=True)


def pictures(pipe, seed: int) -> torch.Tensor:
    return pipe(**call(seed), output_type="pt").images


def test_a_cost_is_kept_and_used(tuned: Tuning) -> None:
    """The schedule computes the share of the calls that was asked for."""
    assert STEPS // 2 == len(tuned.chosen.steps)
    assert 0.5 == tuned.chosen.cost


def test_the_tuned_schedule_beats_uniform_ones_on_other_seeds(pipe, tuned: Tuning) -> None:
    """At equal cost, other pictures are as near to the uncached ones as with every second call, or nearer."""

    def quality(policy) -> float:
        ratios = list[float]()
        for seed in range(20, 26):
            expected = pictures(pipe, seed)
            with cachepolicy.apply(pipe, policy):
                ratios += each_psnr(expected, pictures(pipe, seed))
        return statistics.fmean(ratios)

    best = quality(tuned.policy)
    assert best > quality(cachepolicy.parse("match model every 2 -> reuse\n"))
    assert best >= quality(cachepolicy.parse("match model every 2 -> predict taylor(order: 1)\n"))


def test_the_file_is_a_checked_formatted_and_tested_policy(pipe, tuned: Tuning, tmp_path) -> None:
    """The text has no finding, is in canonical form, and its expectation is the schedule that runs."""
    tuned.save(str(tmp_path / "mine.cp"))
    text = (tmp_path / "mine.cp").read_text(encoding="utf-8")
    assert not check_text(text.encode(), source="mine.cp")
    assert text == cachepolicy.format(cachepolicy.parse(text))
    with cachepolicy.apply(pipe, tmp_path / "mine.cp") as run:
        pictures(pipe, 3)
    row = "".join("C" if step in tuned.chosen.steps else "R" for step in range(STEPS))
    assert [row] == list(run.trace.rows().values())


def test_the_file_says_what_it_was_tuned_for(pipe, tuned: Tuning) -> None:
    """The circumstances, the target and the quality; a run like the tuned ones gives no warning, another one does."""
    (said,) = [each for each in tuned.policy.statements if isinstance(each, Tuned)]
    values = {each.name: constant(each.value) for each in said.settings}
    assert STEPS == said.steps
    told = ("denoiser", "scheduler", "guidance", "latents", "adapters", "target", "cost", "samples", "held_out")
    expected = ["DiTTransformer2DModel", "FlowMatchEulerDiscreteScheduler", 2, (3, 32, 32), (), "cost 0.5", 0.5, 6, 2]
    assert expected == [values[name] for name in told]
    assert isinstance(values["sigmas"], tuple)
    assert STEPS == len(values["sigmas"])
    assert tuned.chosen.psnr == pytest.approx(values["psnr"], rel=1e-4)
    with cachepolicy.apply(pipe, tuned.policy), warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures(pipe, 3)
    with cachepolicy.apply(pipe, tuned.policy), pytest.warns(UserWarning, match="W612"):
        pipe(**call(3, guidance_scale=4.0))


def test_the_result_counts_what_was_spent(tuned: Tuning) -> None:
    """Eight uncached runs, the result on two calls at half the cost, and what the choices took."""
    assert 8 + 2 * 0.5 < tuned.evaluations <= 64
    assert tuned.linear
    assert 0.5 < tuned.model_share <= 1


def test_the_forecast_of_each_schedule_rises_with_its_cost(tuned: Tuning) -> None:
    """The frontier goes from the fewest computed calls to all of them, which is exact."""
    forecasts = [point.forecast for point in tuned.frontier]
    assert forecasts == sorted(forecasts)
    assert tuple(range(STEPS)) == tuned.frontier[-1].steps
    assert float("inf") == forecasts[-1]


def test_a_quality_is_met_at_a_cost_below_one(pipe) -> None:
    """The cheapest measured schedule that meets the PSNR is chosen."""
    found = tune(pipe, [call(seed) for seed in range(5)], psnr=42, keep_scheduler=True)
    assert found.chosen.psnr is not None
    assert found.chosen.psnr >= 42
    assert found.chosen.cost < 1


def test_sequential_guidance_is_planned_as_one(pipe) -> None:
    """With a call for each branch, the list of steps is the same for both."""
    calls = [call(seed, sequential_guidance=True, num_inference_steps=8) for seed in range(3)]
    found = tune(pipe, calls, cost=0.5, keep_scheduler=True)
    with cachepolicy.apply(pipe, found.policy) as run:
        pipe(**calls[0])
    rows = [row for branch in run.trace.last.branches for row in run.trace.rows(branch).values()]
    assert 2 == len(rows)
    assert rows[0] == rows[1]
    assert 4 == rows[0].count("C")


def test_a_speed_out_of_reach_says_what_is_reachable(pipe) -> None:
    """E404 has the best measured schedule and the denoiser's share."""
    calls = [call(seed, num_inference_steps=4) for seed in range(2)]
    with pytest.raises(PolicyError, match="speedup") as caught:
        tune(pipe, calls, speedup=1000)
    assert "E404" == caught.value.diagnostics[0].code


@pytest.mark.parametrize("targets", [{}, {"cost": 0.5, "psnr": 40}])
def test_exactly_one_target_is_needed(pipe, targets: dict) -> None:
    """E402 names the targets that were found."""
    with pytest.raises(PolicyError, match="exactly one target") as caught:
        tune(pipe, [call(0), call(1)], **targets)
    assert "E402" == caught.value.diagnostics[0].code


def test_calls_of_different_lengths_are_refused(pipe) -> None:
    """E403: one list of steps cannot serve several numbers of steps."""
    with pytest.raises(PolicyError, match="number of steps") as caught:
        tune(pipe, [call(0, num_inference_steps=4), call(1, num_inference_steps=5), call(2)], cost=0.5)
    assert "E403" == caught.value.diagnostics[0].code


def test_a_denoiser_needs_a_function_that_samples(pipe) -> None:
    """E401 asks for it."""
    with pytest.raises(PolicyError, match="nothing samples") as caught:
        tune(pipe.transformer, [call(0), call(1)], cost=0.5)
    assert "E401" == caught.value.diagnostics[0].code


def test_a_denoiser_is_tuned_by_its_sampling_function(pipe) -> None:
    """A bare model, its sampling function and its scheduler are enough."""

    def sample(**arguments: object) -> torch.Tensor:
        return pipe(**arguments, output_type="pt").images

    calls = [call(seed, num_inference_steps=8) for seed in range(3)]
    found = tune(pipe.transformer, calls, cost=0.5, sample=sample, scheduler=pipe.scheduler)
    assert 4 == len(found.chosen.steps)
    assert found.chosen.psnr is not None


def test_the_denoisers_share_is_measured_in_a_sampling_function_too(pipe) -> None:
    """What a sampling function does beside the model, such as decoding, does not count as the model's time."""

    def sample(**arguments: object) -> torch.Tensor:
        time.sleep(0.05)
        return pipe(**arguments, output_type="pt").images

    calls = [call(seed, num_inference_steps=2) for seed in range(2)]
    found = tune(pipe.transformer, calls, cost=1, sample=sample, scheduler=pipe.scheduler)
    assert 0 < found.model_share < 1


@pytest.fixture(scope="module")
def free(pipe) -> Tuning:
    return tune(pipe, [call(seed) for seed in range(8)], cost=0.5)


def test_the_chosen_solver_and_steps_are_set_by_apply(pipe, free: Tuning) -> None:
    """The result sets its scheduler, and its calls compute the share of the user's calls that was asked for."""
    own = pipe.scheduler
    assert "converged" == free.reference
    assert STEPS // 2 == len(free.chosen.steps)
    try:
        with free.apply(pipe) as run:
            pipe(**{**call(3), **free.arguments})
        assert free.base.solver == type(pipe.scheduler).__name__
        (row,) = run.trace.rows().values()
        assert STEPS // 2 == row.count("C")
        assert free.arguments.get("num_inference_steps", STEPS) == len(row)
    finally:
        pipe.scheduler = own


def test_the_chosen_policy_beats_the_same_solvers_with_as_many_calls(pipe, free: Tuning) -> None:
    """Against a converged run, other pictures are nearer than those of UniPC with as many calls of the model."""
    comparison = cachepolicy.compare(pipe, [call(seed) for seed in range(30, 34)], {"tuned": free})
    rows = {row.name: row for row in comparison.rows}
    assert rows["tuned"].converged.mean > rows["UniPC, 6 steps"].converged.mean


def test_no_cache_is_the_result_where_a_solver_alone_is_best(
    pipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The policy computes every call, the scheduler runs the planned steps alone, and the result says so."""
    considered = list[bool]()

    def last(_: _Bench, points: Sequence[tuple[SchedulePoint, Base]], *__: object, **___: object) -> int:
        considered.extend(point.predictor.alone for point, _ in points)
        return len(points) - 1

    monkeypatch.setattr(_Bench, "best", last)
    found, own = tune(pipe, [call(seed, num_inference_steps=8) for seed in range(3)], cost=0.5), pipe.scheduler
    assert {True, False} == {*considered}
    assert "match model -> compute" in found.text
    assert any("no cache is best" in note for note in found.notes)
    found.save(str(tmp_path / "mine.cp"))
    assert not check_text((tmp_path / "mine.cp").read_bytes(), source="mine.cp")
    (other,) = found.compared({"tuned": found}, converged=None, baselines=False).rows[1:]
    assert 0.5 == found.chosen.cost == other.cost
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with found.apply(pipe) as run:
                pipe(**{**call(3), **found.arguments})
        assert ["CCCC"] == list(run.trace.rows().values())
    finally:
        pipe.scheduler = own


def test_the_scheduler_is_kept_where_a_call_states_sigmas(pipe) -> None:
    """A note says why."""
    from cachepolicy.tuning.bases import why_fixed
    from cachepolicy.tuning.sampling import Sampler

    assert why_fixed(Sampler(pipe), [call(0)]) is None
    assert "`sigmas`" in (why_fixed(Sampler(pipe), [call(0, sigmas=[1.0, 0.5])]) or "")


def test_a_metric_and_its_target_go_together(pipe) -> None:
    """E402 asks for the metric of a quality."""
    with pytest.raises(PolicyError, match="without a `metric`"):
        tune(pipe, [call(0), call(1)], quality=0.5)


def test_a_metric_replaces_the_psnr(pipe) -> None:
    """Its mean over the held-out calls is what the target bounds."""

    def metric(reference: torch.Tensor, pictures: torch.Tensor) -> float:
        return -float((reference - pictures).abs().mean())

    calls = [call(seed, num_inference_steps=6) for seed in range(4)]
    found = tune(pipe, calls, quality=-0.2, metric=metric, keep_scheduler=True)
    assert found.chosen.metric is not None
    assert found.chosen.metric >= -0.2
    assert found.chosen.cost < 1
    assert any("6 calls" in note for note in found.notes)
