# ruff: noqa: E402 - the imports below need diffusers, and the tests are skipped without it
"""Policies, numbers of steps and solvers are measured on the same calls, and the figures are those of the samples."""

from __future__ import annotations

import csv
import io
import json
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

import cachepolicy
from cachepolicy._resources import shipped_policies
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tools.flops import count
from cachepolicy.tools.quality import each_psnr
from cachepolicy.tuning.compare import Comparison, Variant, compare
from cachepolicy.tuning.schedulers import SOLVERS, adapted, with_solver

PLANNED = "match model on {0, 2, 4, 7} -> predict taylor(order: 1)"
CALLS = [{"class_labels": [label], "num_inference_steps": 8} for label in (3, 20)]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def compared(pipe) -> Comparison:
    variants = {"planned": cachepolicy.parse(PLANNED)}
    return compare(pipe, CALLS, variants, converged=12, metrics={"largest": lambda a, b: (a - b).abs().max()})


def test_baselines_are_always_in(compared):
    """A planned list is compared with fewer steps, two solvers, and all three on its steps, at its own cost."""
    names = ["uncached", "planned", "4 steps", "UniPC, 4 steps", "DPM++ 2M, 4 steps"]
    names += [f"{solver} on the steps of planned" for solver in ("same solver", *SOLVERS)]
    assert [*names, "converged"] == [row.name for row in compared.rows]
    assert [0.5] * 7 == [row.cost for row in compared.rows[1:8]]
    assert [4] * 7 == [row.evaluations for row in compared.rows[1:8]]
    assert {"planned"} == {row.at_cost_of for row in compared.rows[2:8]}
    assert [] == compared.notes
    # 1 + 7/2 to count the first call, and for each of two calls the same and 16 UniPC steps.
    assert 3 * (1 + 7 / 2) + 2 * 2 == compared.evaluations


def test_distances_are_those_of_the_samples(compared, pipe):
    """PSNR, percentile, metric and pictures are what sampling by hand gives."""

    def draw(**options):
        pictures = [
            pipe(**call, generator=torch.Generator().manual_seed(number), output_type="np", **options).images
            for number, call in enumerate(CALLS)
        ]
        return torch.tensor([picture.tolist() for batch in pictures for picture in batch]).permute(0, 3, 1, 2) * 2 - 1

    bare = draw()
    with cachepolicy.apply(pipe, cachepolicy.parse(PLANNED)):
        planned = draw()
    expected = each_psnr(bare, planned)
    row = compared["planned"]
    assert pytest.approx(expected, abs=1e-3) == row.uncached.each
    assert pytest.approx((sum(expected) / 2, min(expected)), abs=1e-3) == (row.uncached.mean, row.uncached.p10)
    largest = (bare - planned).abs().flatten(1).amax(1).mean().item()
    assert pytest.approx(largest, abs=1e-4) == row.metrics["largest"]
    assert torch.allclose(planned, compared.pictures["planned"], atol=1e-5)


def test_the_target_is_as_before(compared, pipe):
    """The scheduler is the pipeline's own again, and no policy is left."""
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert 9 == len(compared.rows)
    assert type(pipe.transformer) is diffusers.DiTTransformer2DModel


def test_the_forms_agree(compared):
    """Text, CSV and data have the rows of the comparison, and the data is JSON without infinite numbers."""
    data = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    lines = list(csv.DictReader(io.StringIO(compared.to_csv())))
    assert [row.name for row in compared.rows] == [row["name"] for row in data["rows"]]
    assert [row["psnr_uncached"]["mean"] for row in data["rows"][1:]] == [
        float(line["psnr_uncached_mean"]) for line in lines[1:]
    ]
    assert "match model on {0, 2, 4, 7}" in data["policies"]["planned"]
    for row in compared.rows:
        assert row.name in str(compared)


def test_a_sheet_has_a_row_for_each_way(compared):
    """Rows below the reference have their differences, so the sheet of two rows has three lines of pictures."""
    sheet = compared.sheet(["uncached", "planned"], scale=1)
    assert sheet.width >= 2 * 32
    assert 3 * 32 < sheet.height < 4 * 32 + 40


def test_what_a_signal_decides_is_counted_in_every_call(pipe):
    """The cost of a policy that measures is the mean over the calls; its baseline has the steps of the first."""
    calls = [{**call, "num_inference_steps": 4} for call in CALLS]
    heard = []
    compared = compare(
        pipe,
        calls,
        {"fbc": Variant("fbc", {"threshold": 0.9})},
        converged=None,
        progress=lambda done, total, _: heard.append((done, total)),
    )
    rows = {row.kind: row for row in compared.rows}
    assert 0 < rows["policy"].cost < 1
    assert None is rows["policy"].converged
    assert not [row for row in compared.rows if " on the steps of " in row.name]
    assert [*range(1, len(heard) + 1)] == [done for done, _ in heard]
    assert heard[-1][0] == heard[-1][1]


def test_without_baselines_only_the_variants_are_sampled(pipe):
    """A policy that computes everything equals the uncached run, beside a number of steps and a solver."""
    every = cachepolicy.parse("policy all\nmatch model -> compute")
    calls = [{**CALLS[0], "num_inference_steps": 4}]
    compared = compare(pipe, calls, [every, 2, "UniPC"], converged=None, baselines=False)
    assert ["uncached", "all", "2 steps", "UniPC"] == [row.name for row in compared.rows]
    assert (math.inf, math.inf) == (compared["all"].uncached.mean, compared["all"].uncached.p10)
    assert {"mean": None, "p10": None, "each": [None]} == compared.to_dict()["rows"][1]["psnr_uncached"]
    assert ["2 steps", "all"] == [row.name for row in compared.front()]


def shares(pipe, policy, steps, pictures=2):
    """The row of a policy alone."""
    calls = [{"class_labels": [*range(pictures)], "num_inference_steps": steps}]
    return compare(pipe, calls, {"policy": policy}, converged=None, baselines=False)["policy"]


def test_the_cost_is_that_of_what_ran(pipe):
    """It agrees with the FLOPs of the modules that the policy answers."""
    one = count(
        pipe.transformer,
        hidden_states=torch.zeros(4, 3, 32, 32),
        timestep=torch.zeros(4),
        class_labels=torch.zeros(4, dtype=torch.long),
    )
    attention = sum(one.modules[f"transformer_blocks.{block}.attn1"] for block in range(8))
    row = shares(pipe, cachepolicy.parse('match "attn1$" on {0} -> reuse'), 5)
    assert pytest.approx(1 - 4 / 5 * attention / one.total) == row.cost


def test_half_a_guidance_batch_is_half_the_cost(pipe):
    """A step that rebuilds the unconditional half counts the conditional half alone."""
    policy = 'match model every 2 -> approximate uncond spectral(low: 1, high: 1, layout: "uncond first")'
    assert pytest.approx(3 / 4) == shares(pipe, cachepolicy.parse(policy), 6).cost


SHALLOW = {
    "dbcache": {"first": 2},
    "dbprune": {"first": 2},
    "delta_dit": {"split": 4},
    "smoothcache": {"feedforward_mask": "10110101"},
    "teacache_inline": {"coefficients": [1, 0], "threshold": 0.2},
    "freqca": {"interval": 2},
}
"""Settings of policies whose defaults are made for more blocks or steps, or that need a schedule or a polynomial."""

OTHERS = {"double_dbcache", "double_fbc", "deepcache", "l2c", "textkv", "tgate"}
"""Policies for models with two lists of blocks, a U-Net's blocks or cross-attention, or with a mask for each module."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*shipped_policies()} - OTHERS))
def test_every_shipped_policy_runs_on_the_emoji_model(pipe, name):
    """Whatever ships can be tried, with its default settings."""
    row = shares(pipe, Variant(name, SHALLOW.get(name, {})), 8, pictures=1)
    assert 0 < row.cost <= 1
    assert 15 < row.uncached.mean


def test_a_function_that_samples_says_what_it_cannot_do(pipe):
    """Without arguments for steps and scheduler, the policy alone is measured and the notes have the reason."""
    scheduler = FlowMatchEulerDiscreteScheduler()

    def sample(generator, labels):
        scheduler.set_timesteps(6)
        x = torch.randn(len(labels), 3, 32, 32, generator=generator)
        for t in scheduler.timesteps:
            v = pipe.transformer(hidden_states=x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = scheduler.step(v, t, x).prev_sample
        return x.clamp(-1, 1)

    variants = {"two": cachepolicy.parse("match model every 2 -> reuse")}
    calls = [{"labels": torch.tensor([5])}]
    compared = compare(pipe.transformer, calls, variants, sample=sample, scheduler=scheduler)
    assert ["uncached", "two"] == [row.name for row in compared.rows]
    assert 0.5 == compared["two"].cost
    assert any("num_inference_steps" in note for note in compared.notes)


@pytest.mark.parametrize("variants", [{"uncached": 4}, [4, 4]])
def test_two_rows_have_two_names(pipe, variants):
    """A name that is taken is refused before anything runs."""
    with pytest.raises(ValueError, match="same name"):
        compare(pipe, CALLS, variants)


def walk(scheduler, steps=8):
    """The end of a trajectory whose model output is half the sample."""
    scheduler.set_timesteps(steps)
    x = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(x / 2, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_all_steps_of_a_scheduler_are_that_scheduler(solver):
    """Leaving out no step gives the same bits, and leaving out some goes from each step to the next one directly."""
    euler = FlowMatchEulerDiscreteScheduler()
    scheduler = euler if solver is None else with_solver(euler, solver)
    assert torch.equal(walk(scheduler), walk(adapted(scheduler, range(8))))
    half = adapted(scheduler, (0, 2, 4, 6))
    assert not torch.equal(walk(scheduler), walk(half))
    assert 4 == len(half.timesteps) == len(half.sigmas) - 1
    if solver is None:
        x = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
        for here, there in zip(half.sigmas[:-1], half.sigmas[1:], strict=True):
            x = x + (there - here) * x / 2
        assert torch.allclose(x, walk(half))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_take_what_flow_pipelines_give(solver):
    """Sigmas and a shift of FLUX are no error, and the sigmas go down from noise to nothing."""
    for dynamic in (False, True):
        made = with_solver(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic), solver)
        made.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], device="cpu", mu=0.7)
        assert 4 == len(made.timesteps)
        assert 0 == made.sigmas[-1] < made.sigmas[0] <= 1
        assert (made.sigmas[:-1] > made.sigmas[1:]).all()


def test_schedulers_without_a_relative_are_left_alone():
    """A scheduler of epsilon models gets its relatives; one that draws noise by itself gets none."""
    assert [True, True] == [with_solver(DDIMScheduler(), solver) is not None for solver in SOLVERS]
    assert [None, None] == [with_solver(FlowMatchLCMScheduler(), solver) for solver in SOLVERS]
    assert adapted(DDIMScheduler(), (0, 1)) is None


def test_a_tuning_reports_its_evidence(pipe, tmp_path):
    """The page has the figures, the schedule and the baselines, measured on the held-out calls."""
    calls = [
        {"class_labels": [label], "num_inference_steps": 6, "generator": torch.Generator().manual_seed(label)}
        for label in range(3)
    ]
    result = cachepolicy.tune(pipe, calls, cost=0.5, keep_scheduler=True)
    compared = result.report(tmp_path / "tune.html", converged=None)
    page = (tmp_path / "tune.html").read_text("utf-8")
    assert 1 == compared.samples
    assert pytest.approx(result.chosen.psnr, abs=1e-3) == compared["tuned"].uncached.mean
    assert pytest.approx(result.chosen.cost) == compared["tuned"].cost
    for words in ("The schedule", "The frontier", "of 6 calls computed", "UniPC, 3 steps", "match model on {0, "):
        assert words in page


def test_a_tuning_is_compared_on_its_own_solver(pipe):
    """A result with a scheduler and steps of its own is sampled with them; its cost is a share of the user's run."""
    planned = cachepolicy.parse("match model on {0, 2} -> predict taylor(order: 1)")
    solver = with_solver(pipe.scheduler, "UniPC")
    tuned = SimpleNamespace(policy=planned, base=SimpleNamespace(scheduler=solver, steps=4))
    calls = [{**CALLS[0], "num_inference_steps": 2}]
    compared = compare(pipe, calls, {"tuned": tuned}, converged=None)
    assert ("UniPCMultistepScheduler", 4, 1.0) == (
        compared["tuned"].solver,
        compared["tuned"].steps,
        compared["tuned"].cost,
    )
    names = [row.name for row in compared.rows[2:]]
    assert ["UniPC, 2 steps", "DPM++ 2M, 2 steps", *(f"{name} on the steps of tuned" for name in SOLVERS)] == names
