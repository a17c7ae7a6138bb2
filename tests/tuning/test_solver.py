# pyright: reportPrivateImportUsage=false
"""The effect of each model output on the result, measured on schedulers."""

from __future__ import annotations

import diffusers
import pytest
import torch

from cachepolicy.tuning.solver import SolverTrace, solver_weights

STEPS = 12
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "euler_flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun_flow": diffusers.FlowMatchHeunDiscreteScheduler,
    "unipc_flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "dpm_flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpm_sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
}


def trace_of(name: str, elements: int = 8) -> SolverTrace:
    """A trajectory of random outputs."""
    torch.manual_seed(3)
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    calls = len(scheduler.timesteps)
    start = torch.randn(elements) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    return SolverTrace(scheduler, list(scheduler.timesteps), [{}] * calls, start, torch.randn(calls, elements))


def end_of(trace: SolverTrace, outputs: torch.Tensor) -> torch.Tensor:
    """The result of a trajectory with other outputs and the same noise."""
    import copy

    scheduler, sample = copy.deepcopy(trace.scheduler), trace.start.double()[None, None, None]
    torch.manual_seed(0)
    for timestep, output in zip(trace.timesteps, outputs, strict=True):
        sample = scheduler.step(output.double()[None, None, None], timestep, sample).prev_sample.double()
    return sample.flatten()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_effects_forecast_the_result_of_other_outputs(name: str) -> None:
    """For a linear scheduler, changed outputs change the result by the sum of effects times changes."""
    trace = trace_of(name)
    weights = solver_weights(trace)
    changes = torch.randn(trace.outputs.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    found = end_of(trace, trace.outputs + changes) - end_of(trace, trace.outputs)
    expected = torch.tensor(weights.effect, dtype=torch.float64) @ changes.double()
    assert weights.linear
    assert float((expected - found).abs().max() / found.abs().max()) < 1e-3


def test_an_euler_step_of_a_flow_has_its_length_as_weight() -> None:
    """The effect of an output is the difference of two sigmas, and a shift of the sample reaches the end unchanged."""
    trace = trace_of("euler_flow")
    weights = solver_weights(trace)
    assert weights.effect == pytest.approx(
        (trace.scheduler.sigmas[1:] - trace.scheduler.sigmas[:-1]).tolist(), abs=1e-5
    )
    assert weights.propagation == pytest.approx([1.0] * STEPS, rel=1e-4)
    assert weights.direct == pytest.approx(weights.effect, abs=1e-5)


def test_a_scheduler_that_clips_is_linearised_and_says_so() -> None:
    """Where the prediction of the picture is clipped, the effect depends on the element."""
    torch.manual_seed(3)
    scheduler = diffusers.DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(STEPS)
    trace = SolverTrace(scheduler, list(scheduler.timesteps), [{}] * STEPS, torch.randn(8), torch.randn(STEPS, 8))
    assert not solver_weights(trace).linear


def test_a_scheduler_that_forgets_the_sample_weighs_by_the_direct_effect() -> None:
    """Where no shift of the sample reaches the end, the weight of an output is its effect on the next sample."""
    torch.manual_seed(3)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(STEPS)
    trace = SolverTrace(scheduler, list(scheduler.timesteps), [{}] * STEPS, torch.randn(8), torch.randn(STEPS, 8))
    weights = solver_weights(trace)
    assert all(weight > 0 for weight in weights.error_weights([1.0] * STEPS))
    assert all(weight < 10 for weight in weights.error_weights([1.0] * STEPS))
