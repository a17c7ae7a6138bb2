# pyright: reportPrivateImportUsage=false
"""What a recording tells of other solvers and numbers of steps."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch

from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tuning.bases import Base, Evidence, candidate_bases, interpolation, own_base, prepared, why_fixed
from cachepolicy.tuning.recording import record
from cachepolicy.tuning.sampling import Sampler


def test_a_cubic_is_interpolated_exactly() -> None:
    """Four points determine it, inside the known places and a little outside."""
    known = [1000.0, 900.0, 810.0, 650.0, 400.0, 390.0, 100.0]
    wanted = [1010.0, 955.0, 650.0, 395.0, 250.0, 60.0]

    def cubic(place: float) -> float:
        x = place / 1000
        return 2 * x**3 - x**2 + 0.5 * x - 1

    values = interpolation(known, wanted) @ torch.tensor([cubic(place) for place in known], dtype=torch.float64)
    assert [cubic(place) for place in wanted] == pytest.approx(values.tolist(), abs=1e-9)


class Smooth(torch.nn.Module):
    """A denoiser whose output is a smooth function of the timestep alone."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The output."""
        wave = torch.linspace(1, 2, hidden_states.numel()).view_as(hidden_states)
        return torch.cos(wave * float(timestep.flatten()[0]) / 500)


def sampler_of(scheduler: Any) -> Sampler:
    """A bare model, sampled with this scheduler or with another one."""
    model = Smooth()

    def sample(num_inference_steps: int, scheduler: Any = scheduler) -> torch.Tensor:
        scheduler.set_timesteps(num_inference_steps)
        x = torch.ones(1, 1, 4, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(model(hidden_states=x, timestep=t), t, x, return_dict=False)[0]
        return x

    return Sampler(model, sample, scheduler)


def recorded(sampler: Sampler, base: Base, steps: int) -> Evidence:
    """The evidence of one run."""
    call = {"num_inference_steps": steps}
    schedulers = sampler.schedulers if base.scheduler is None else [base.scheduler]
    with sampler.on(base.scheduler, base.steps, call) as arguments:
        (one,) = record(lambda: sampler(arguments), schedulers, sampler.models)
    return Evidence(base, [[one]], sum(one.rows))


def test_a_recording_tells_the_inner_products_of_another_solver() -> None:
    """They agree with those that are recorded with that solver and its steps."""
    sampler = sampler_of(diffusers.FlowMatchEulerDiscreteScheduler())
    bases = candidate_bases(sampler, 12)
    reference = recorded(sampler, bases[-1], 12)
    for base in bases[:-1]:
        carried = reference.carried_to(base, prepared(sampler, base, {"num_inference_steps": 12}))
        own = recorded(sampler, base, 12)
        assert own.outputs[0][0].timesteps == pytest.approx(carried.outputs[0][0].timesteps)
        torch.testing.assert_close(own.outputs[0][0].gram, carried.outputs[0][0].gram, atol=0.02, rtol=0.02)
        assert math.isclose(own.cost(range(12)) * len(own.rows), 12, rel_tol=1e-9)


def test_the_bases_of_a_flow_model_are_its_scheduler_and_two_solvers() -> None:
    """Each with twice the steps, the most accurate one last."""
    sampler = Sampler(load_pipeline())
    found = [(base.solver, base.steps) for base in candidate_bases(sampler, 10)]
    euler = "FlowMatchEulerDiscreteScheduler"
    assert [
        (euler, None), (euler, 20), ("DPMSolverMultistepScheduler", 20), ("UniPCMultistepScheduler", 20)
    ] == found  # fmt: skip
    assert (euler, None) == (own_base(sampler).solver, own_base(sampler).steps)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (diffusers.EulerAncestralDiscreteScheduler(), "adds noise"),
        (diffusers.HeunDiscreteScheduler(), "more than once"),
        (diffusers.DDIMScheduler(), None),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise"),
    ],
)
def test_schedulers_that_cannot_be_exchanged_are_kept(scheduler: Any, reason: str | None) -> None:
    """What adds noise has no converged run, and what calls the model twice has no smooth trajectory."""
    found = why_fixed(sampler_of(scheduler), [{"num_inference_steps": 12}])
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


def test_calls_that_differ_in_their_steps_keep_them() -> None:
    """One number of steps is needed to choose another one."""
    calls = [{"num_inference_steps": steps} for steps in (12, 13)]
    assert "num_inference_steps" in (why_fixed(sampler_of(diffusers.DDIMScheduler()), calls) or "")
