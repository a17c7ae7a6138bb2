# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOperatorIssue=false
"""`tune` on models, guidance and schedulers of many kinds: each result beats uniform schedules at equal cost."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch

import cachepolicy
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tools.quality import each_psnr
from cachepolicy.tuning.bases import Predictor, own_base
from cachepolicy.tuning.sampling import Sampler
from cachepolicy.tuning.tuner import WAYS, Tuning, _Bench, _even, _planned, tune
from tests.support.emoji_models import EpsilonModel, Renormalised, TwoExperts, TwoOutputs, epsilon_sampler
from tests.support.tiny_pipelines import unet_sd

STEPS = 12
UNIFORM = ("match model every 2 -> reuse\n", "match model every 2 -> predict taylor(order: 1)\n")


@dataclass
class Kind:
    """What is tuned: a target, further arguments of its calls and of `tune`."""

    target: Any
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    labelled: bool = True
    uncached: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])

    def call(self, seed: int) -> dict[str, Any]:
        """One call."""
        labels = {"class_labels": [(7 * seed) % 36]} if self.labelled else {}
        generator = torch.Generator().manual_seed(seed)
        return {**labels, "num_inference_steps": STEPS, "generator": generator, **self.arguments}

    def tuned(self, **more: Any) -> Tuning:
        """The result at half the cost."""
        return tune(self.target, [self.call(seed) for seed in range(8)], cost=0.5, **self.options, **more)

    def quality(self, policy: Any, seeds: range) -> float:
        """The mean PSNR against the uncached calls."""
        sampler = Sampler(self.target, self.options.get("sample"), self.options.get("scheduler"))
        ratios = list[float]()
        for seed in seeds:
            if seed not in self.uncached:
                self.uncached[seed] = sampler(self.call(seed)).pictures
            with cachepolicy.apply(self.target, policy):
                ratios += each_psnr(self.uncached[seed], sampler(self.call(seed)).pictures)
        return statistics.fmean(ratios)


def emoji(cls: Any = None, **arguments: Any) -> Kind:
    """The shipped model in a pipeline."""
    pipe = load_pipeline()
    if cls is not None:
        second = {"transformer_2": copy.deepcopy(pipe.transformer)} if cls is TwoExperts else {}
        pipe = cls(pipe.transformer, pipe.scheduler, **second)
    pipe.set_progress_bar_config(disable=True)
    return Kind(pipe, arguments)


def epsilon(cls: Any, **config: Any) -> Kind:
    """A bare model that predicts noise, and a function that samples it."""
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **config)
    model = EpsilonModel(load_pipeline().transformer, scheduler.alphas_cumprod)
    return Kind(model, {}, {"sample": epsilon_sampler(model, scheduler), "scheduler": scheduler})


def unet() -> Kind:
    """A UNet of random weights."""
    tiny = unet_sd(diffusers.DDIMScheduler(clip_sample=False, steps_offset=1))
    tiny.pipe.set_progress_bar_config(disable=True)
    return Kind(tiny.pipe, tiny.arguments, {}, labelled=False)


KINDS: dict[str, Callable[[], Kind]] = {
    "batched guidance": emoji,
    "sequential guidance": lambda: emoji(sequential_guidance=True),
    "renormalised guidance": lambda: emoji(Renormalised),
    "no guidance": lambda: emoji(guidance_scale=1.0),
    "two experts": lambda: emoji(TwoExperts),
    "two outputs": lambda: emoji(TwoOutputs),
    "ddim": lambda: epsilon(diffusers.DDIMScheduler, clip_sample=False),
    "unipc": lambda: epsilon(diffusers.UniPCMultistepScheduler),
    "dpm++ 2m": lambda: epsilon(diffusers.DPMSolverMultistepScheduler),
    "heun": lambda: epsilon(diffusers.HeunDiscreteScheduler),
    "euler": lambda: epsilon(diffusers.EulerDiscreteScheduler),
    "ancestral": lambda: epsilon(diffusers.EulerAncestralDiscreteScheduler),
    "unet": unet,
}
FAST = ("no guidance", "unet")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.deep) for name in KINDS])
def test_the_tuned_policy_beats_uniform_ones_on_other_seeds(name: str) -> None:
    """Within the budget, and at the same number of computed calls, on calls that were not tuned on."""
    kind = KINDS[name]()
    found = kind.tuned(keep_scheduler=True)
    assert found.evaluations <= 64
    assert found.chosen.cost <= 0.5 + 1e-9
    seeds = range(20, 38)  # single pictures differ by many dB in their ratio
    best = kind.quality(found.policy, seeds)
    for uniform in UNIFORM:
        assert best > kind.quality(cachepolicy.parse(uniform), seeds)


@pytest.mark.deep
@pytest.mark.parametrize("name", ["batched guidance", "ddim", "unipc", "dpm++ 2m"])
def test_the_chosen_base_beats_the_kept_one_against_the_converged_run(name: str) -> None:
    """Where the solver is free, the result is at least as near to the converged run as with the scheduler kept."""
    kind = KINDS[name]()
    chosen, kept = kind.tuned(), kind.tuned(keep_scheduler=True, reference="converged")
    assert chosen.evaluations <= 64
    assert "converged" == chosen.reference == kept.reference
    assert chosen.chosen.psnr >= kept.chosen.psnr


@pytest.mark.deep
@pytest.mark.parametrize("name", ["batched guidance", "ddim", "euler"])
def test_forecast_and_measured_quality_rank_alike(name: str) -> None:
    """On a model that predicts velocity and on one that predicts noise."""
    kind = KINDS[name]()
    sampler = Sampler(kind.target, kind.options.get("sample"), kind.options.get("scheduler"))
    from cachepolicy.tuning.run_directory import RunDirectory

    bench = _Bench(sampler, RunDirectory(None, {}), None, 0, None, 1e9)
    evidence = bench.recorded([kind.call(seed) for seed in range(4)], own_base(sampler))
    points = [
        frontier[count]
        for count in (4, 6, 8)
        for frontier in (_planned(evidence, Predictor(1), 9, WAYS[0]), _even(evidence, Predictor(1), 9))
    ]
    points.sort(key=lambda point: point.forecast)
    base = evidence.base
    measured = [bench.score(bench.tried(point, base, bench.training)) for point in points]
    ordered = sum(one < two for index, one in enumerate(measured) for two in measured[index + 1 :])
    assert ordered >= 13  # of 15 pairs
