# diffusers comes without complete types: what a scheduler returns is not known in the strict sense.
# pyright: basic
"""The effect of each model output on the result of a trajectory, measured by running the scheduler itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PERTURBATION = 0.05
"""Size of the perturbation, relative to the root mean square of what is perturbed."""
LINEAR = 1e-3
"""Largest relative deviation between elements of a scheduler that counts as linear."""


@dataclass(frozen=True, slots=True)
class SolverWeights:
    """What an error in each model output does to the result, with all other outputs and the noise held.

    Args:
        effect: W_s = d x_end / d v_s.
        propagation: P_s = d x_end / d x_(s+1) of a shift that the scheduler does not notice, that is, of the
            homogeneous solution. 0 where the scheduler forgets the sample.
        direct: d x_(s+1) / d v_s, the effect of an output on the next sample.
        deviation: Largest relative deviation of the effects between elements, 0 for a linear scheduler.
    """

    effect: tuple[float, ...]
    propagation: tuple[float, ...]
    direct: tuple[float, ...]
    deviation: float

    @property
    def linear(self) -> bool:
        """True where the effects do not depend on the values, so that they hold for every trajectory."""
        return self.deviation <= LINEAR

    def error_weights(self, scale: Sequence[float]) -> tuple[float, ...]:
        """Return the weight of an error in each output, at the sample that it reaches first.

        Args:
            scale: Standard deviation of each sample x_(s+1).

        Returns:
            |W_s / (P_s max(scale_s, 1))|. Where P_s is 0, the direct effect replaces the quotient of the first two.
            Schedulers whose samples begin with a large scale, such as `EulerDiscreteScheduler`, thereby weigh an error
            relative to the noise. Below 1 the scale is that of the data: dividing by it there, too, gave lists that
            were 0.1 to 4 dB worse on a trained flow model.
        """
        pairs = zip(self.effect, self.propagation, self.direct, scale, strict=True)
        return tuple(
            abs((effect / propagation if propagation else direct) / max(size, 1.0))
            for effect, propagation, direct, size in pairs
        )


@dataclass(frozen=True, slots=True)
class SolverTrace:
    """What a trajectory gave its scheduler, for a few elements of the sample.

    Args:
        scheduler: A copy of the scheduler as it was before the first step.
        timesteps: The timestep of each step.
        arguments: Further arguments of each step, without generators.
        start: The elements of the first sample, `(M,)`.
        outputs: The elements of each model output, `(N, M)`.
    """

    scheduler: Any
    timesteps: Sequence[Any]
    arguments: Sequence[Mapping[str, Any]]
    start: torch.Tensor
    outputs: torch.Tensor


def solver_weights(trace: SolverTrace) -> SolverWeights:
    """Measure the weights by finite differences along a recorded trajectory.

    The scheduler runs on one small tensor that holds, for each recorded element, a copy for each output that is
    perturbed and one whose start is perturbed. A second run without perturbations, with the same noise, is subtracted.
    Schedulers act on elements alone, so one run of N steps gives all N effects. A scheduler that clips or thresholds is
    thereby linearised along the trajectory.

    Args:
        trace: The trajectory.
    """
    calls, elements = trace.outputs.shape
    size = PERTURBATION * _rms(trace.outputs), PERTURBATION * _rms(trace.start)
    still, moved = _run(trace, None), _run(trace, size)
    change = (moved - still).reshape(calls, elements, calls + 1)
    by_output, by_start = change[..., :calls] / size[0], change[..., calls].mean(1) / size[1]
    end = by_output[-1]
    effect = end.mean(0)
    deviation = (end - effect).abs().max() / effect.abs().max().clamp(min=1e-12)
    homogeneous = torch.where(by_start.abs() > 1e-9, by_start, 0.0)
    propagation = torch.where(homogeneous != 0, homogeneous[-1] / homogeneous, 0.0)
    direct = by_output.mean(1).diagonal()
    return SolverWeights(tuple(effect.tolist()), tuple(propagation.tolist()), tuple(direct.tolist()), float(deviation))


def sample_scale(trace: SolverTrace) -> tuple[float, ...]:
    """Return the standard deviation of the sample after each step of a trajectory, `(N,)`."""
    return tuple(_run(trace, None)[:, :, 0].std(1).tolist())


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) or 1.0


def _run(trace: SolverTrace, size: tuple[float, float] | None) -> torch.Tensor:
    """Return all samples x_1 .. x_N, `(N, M, N + 1)`, with each output and the start perturbed or not."""
    calls = len(trace.outputs)
    scheduler = copy.deepcopy(trace.scheduler)
    sample = trace.start.double()[:, None].repeat(1, calls + 1)
    if size is not None:
        sample[:, calls] += size[1]
    sample, samples = sample[None, None], list[torch.Tensor]()
    # Schedulers draw noise from the generator that they get, or from the global one.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for call, (timestep, arguments) in enumerate(zip(trace.timesteps, trace.arguments, strict=True)):
            output = trace.outputs[call].double()[:, None].repeat(1, calls + 1)
            if size is not None:
                output[:, call] += size[0]
            result = scheduler.step(output[None, None], timestep, sample, **arguments)
            sample = (result[0] if isinstance(result, tuple) else result.prev_sample).double()
            samples.append(sample[0, 0])
    return torch.stack(samples)
