# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false, reportOptionalIterable=false
"""What is recorded of an uncached run."""

from __future__ import annotations

import copy
import threading

import diffusers
import pytest
import torch
from torch import nn

from cachepolicy.errors import PolicyError
from cachepolicy.tuning.recording import _Outputs, record

STEPS = 6


class Model(nn.Module):
    """A denoiser of one layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.layer(sample)


def sampled(scheduler, models, *, noise: int = 0, inputs: list | None = None):
    """One run: the second of two models takes over half-way."""
    scheduler.set_timesteps(STEPS)
    sample = torch.randn(3, 4, generator=torch.Generator().manual_seed(noise))
    for step, timestep in enumerate(scheduler.timesteps):
        model = models[step * len(models) // STEPS]
        output = model(sample)
        if inputs is not None:
            inputs.append(output.detach().clone())
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


def test_the_inner_products_are_those_of_what_reaches_the_scheduler() -> None:
    """The matrix holds the inner products of the outputs per element."""
    model, scheduler, seen = Model(), diffusers.FlowMatchEulerDiscreteScheduler(), []
    (found,) = record(lambda: sampled(scheduler, [model], inputs=seen), [scheduler], [model])
    rows = torch.stack(seen).double().flatten(1)
    torch.testing.assert_close(rows @ rows.T / 12, found.gram)
    assert (12, STEPS) == (found.elements, len(found.models))
    assert found.timesteps == pytest.approx([float(timestep) for timestep in scheduler.timesteps])


@pytest.mark.parametrize(
    "scheduler", [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EulerAncestralDiscreteScheduler()]
)
@pytest.mark.parametrize("halves", [1, 2])
def test_the_residuals_are_the_outputs_minus_the_latents_of_the_model(scheduler, halves: int) -> None:
    """Also where the scheduler scales the latents, and where guidance has them twice in a batch."""
    model, residuals = Model(), []
    scheduler.set_timesteps(STEPS)

    def run() -> None:
        sample = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            given = sample
            if hasattr(scheduler, "scale_model_input"):
                given = scheduler.scale_model_input(sample, timestep)
            output = model(torch.cat([given] * halves)).chunk(halves)[0]
            residuals.append((output - given).detach().clone())
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]

    (found,) = record(run, [scheduler], [model])
    rows = torch.stack(residuals).double().flatten(1)
    torch.testing.assert_close(rows @ rows.T / 12, found.residual, rtol=1e-5, atol=1e-5)


def test_a_model_of_other_latents_has_no_residuals() -> None:
    """Further input channels, or an output that is no tensor of their shape, leave nothing to add."""
    model, scheduler = nn.Linear(8, 4), diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)

    def run() -> None:
        sample = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            output = model(torch.cat([sample, sample], 1))
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]

    (found,) = record(run, [scheduler], [model])
    assert found.residual is None


def test_recording_changes_nothing_and_leaves_nothing() -> None:
    """The recorded run gives the bare run's result, and the class of the scheduler is as before."""
    model, scheduler = Model(), diffusers.UniPCMultistepScheduler()
    expected = sampled(scheduler, [model])
    original, found = type(scheduler).step, []
    record(lambda: found.append(sampled(scheduler, [model])), [scheduler], [model])
    assert torch.equal(expected, found[0])
    assert type(scheduler).step is original
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_failing_run_leaves_nothing() -> None:
    """An exception of the run passes through, and the class of the scheduler is as before."""
    scheduler, original = diffusers.DDIMScheduler(), diffusers.DDIMScheduler.step
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 // 0, [scheduler], [])
    assert diffusers.DDIMScheduler.step is original


def test_the_second_expert_starts_where_it_takes_over() -> None:
    """A change of the denoiser is a call that no history crosses."""
    models, scheduler = [Model(0), Model(1)], diffusers.FlowMatchEulerDiscreteScheduler()
    (found,) = record(lambda: sampled(scheduler, models), [scheduler], models)
    assert frozenset({STEPS // 2}) == found.starts


def test_copies_of_a_scheduler_are_recorded_as_further_outputs() -> None:
    """A pipeline that copies its scheduler for the sound gives two records."""
    model, scheduler = Model(), diffusers.FlowMatchEulerDiscreteScheduler()

    def run() -> None:
        second = copy.deepcopy(scheduler)
        sampled(scheduler, [model])
        sampled(second, [model], noise=1)

    found = record(run, [scheduler], [model])
    assert [STEPS, STEPS] == [len(one.models) for one in found]
    assert not torch.equal(found[0].gram, found[1].gram)


def test_other_threads_are_not_recorded() -> None:
    """A run of another thread on the same class of scheduler leaves no trace."""
    model, scheduler, other = Model(), diffusers.DDIMScheduler(), diffusers.DDIMScheduler()

    def run() -> None:
        thread = threading.Thread(target=sampled, args=(other, [model]))
        thread.start()
        thread.join()
        sampled(scheduler, [model])

    assert 1 == len(record(run, [scheduler], [model]))


def test_a_run_without_a_scheduler_is_refused() -> None:
    """E400 names the schedulers that were not stepped."""
    with pytest.raises(PolicyError, match="DDIMScheduler") as caught:
        record(lambda: None, [diffusers.DDIMScheduler()], [])
    assert "E400" == caught.value.diagnostics[0].code


def test_outputs_above_the_limit_go_to_a_file() -> None:
    """The inner products of spilled outputs agree within the precision of float16, and the files are removed."""
    rows = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    spilled, kept = _Outputs(limit=1000), _Outputs()
    for row in rows:
        spilled.append(row)
        kept.append(row)
    assert spilled._files
    torch.testing.assert_close(kept.gram(), spilled.gram(), rtol=2e-3, atol=2e-3)
    spilled.close()
    assert not spilled._files
