# diffusers comes without complete types: what a scheduler holds is not known in the strict sense.
# pyright: basic
"""What a policy is planned on: a solver and its number of steps, and what is known of them without a recording."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from cachepolicy.tuning.planner import PlanningProblem, Recorded
from cachepolicy.tuning.recording import OutputRecord
from cachepolicy.tuning.sampling import STEPS, ModelCall, Sampler
from cachepolicy.tuning.schedulers import SOLVERS, adapted, with_solver
from cachepolicy.tuning.solver import SolverTrace, SolverWeights, sample_scale, solver_weights

POINTS = 4
"""Recorded outputs from which one at another timestep is interpolated."""


@dataclass(frozen=True)
class Base:
    """A solver and its number of steps.

    Attributes:
        scheduler: The scheduler to set, None for the one that is there.
        steps: The number of steps to ask for, None for that of the calls.
        solver: The class of the scheduler.
    """

    scheduler: Any
    steps: int | None
    solver: str

    def __str__(self) -> str:
        return self.solver if self.steps is None else f"{self.solver}, {self.steps} steps"


def own_base(sampler: Sampler) -> Base:
    """Return the base that the calls have."""
    return Base(None, None, ", ".join(type(scheduler).__name__ for scheduler in sampler.schedulers))


def why_fixed(sampler: Sampler, calls: Sequence[ModelCall]) -> str | None:
    """Return why the solver and the number of steps of calls cannot be chosen, None if they can."""
    scheduler, steps = sampler.scheduler, sampler.steps(calls[0])
    if scheduler is None:
        return "there is not exactly one scheduler that can be replaced"
    if steps is None or not all(sampler.steps(call) == steps for call in calls):
        return f"the calls do not have one `{STEPS}`"
    stated = [name for name in ("sigmas", "timesteps", "strength") if any(call.get(name) is not None for call in calls)]
    if stated:
        return f"the calls state `{stated[0]}`"
    if 2 * steps > getattr(scheduler.config, "num_train_timesteps", 1000):
        return "the model knows no more timesteps"
    if getattr(scheduler, "order", 1) != 1:
        return f"a step of `{type(scheduler).__name__}` calls the model more than once"
    return f"`{type(scheduler).__name__}` adds noise" if _adds_noise(scheduler, steps) else None


def candidate_bases(sampler: Sampler, steps: int) -> list[Base]:
    """Return the bases to choose from: the pipeline's scheduler and other solvers, also with twice as many steps.

    The last one is the most accurate.

    Args:
        sampler: What samples.
        steps: The number of steps of the calls.
    """
    own = sampler.scheduler
    kept = [own_base(sampler), Base(None, 2 * steps, type(own).__name__)]
    solvers = [with_solver(own, name) for name in reversed(SOLVERS)]
    made = [made for made in solvers if made is not None and type(made).__name__ != type(own).__name__]
    return [*kept, *(Base(scheduler, 2 * steps, type(scheduler).__name__) for scheduler in made)]


def runs_alone(sampler: Sampler, base: Base, steps: Sequence[int]) -> Base | None:
    """Return a base whose scheduler runs some steps of another base alone, None where that is not possible.

    Args:
        sampler: What samples.
        base: The base.
        steps: The steps.
    """
    scheduler = adapted(sampler.scheduler if base.scheduler is None else base.scheduler, steps)
    return None if scheduler is None else replace(base, scheduler=scheduler)


def _adds_noise(scheduler: Any, steps: int) -> bool:
    """Return whether steps with other random numbers give another result."""
    results = list[torch.Tensor]()
    with torch.random.fork_rng(devices=[]):
        for seed in range(2):
            torch.manual_seed(seed)
            stepped, sample = copy.deepcopy(scheduler), torch.ones(1, 1, 1, 4)
            shifted = "mu" in inspect.signature(stepped.set_timesteps).parameters
            dynamic = getattr(stepped.config, "use_dynamic_shifting", False)
            stepped.set_timesteps(steps, **({"mu": 1.0} if shifted and dynamic else {}))
            for timestep in stepped.timesteps[:2]:
                sample = stepped.step(torch.ones(1, 1, 1, 4), timestep, sample, return_dict=False)[0]
            results.append(sample)
    return not torch.equal(results[0], results[1])


# --- what the pipeline gives the scheduler -----------------------------------------------------------------


class _FirstCall(BaseException):
    """Ends a run at its first call of the model. Pipelines and `call_pipeline` handle `Exception` alone."""


def prepared(sampler: Sampler, base: Base, call: ModelCall) -> Any:
    """Return the scheduler of a base as a call prepares it: with its timesteps, before the first step.

    Args:
        sampler: What samples.
        base: The base.
        call: A call. It is ended before the model runs.
    """

    def end(*_: Any) -> None:
        raise _FirstCall

    handles = [model.register_forward_pre_hook(end) for model in sampler.models]
    try:
        with sampler.on(base.scheduler, base.steps, call) as arguments:
            scheduler = sampler.scheduler if base.scheduler is None else base.scheduler
            sampler(arguments)
    except _FirstCall:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return copy.deepcopy(scheduler)


# --- what is planned ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Predictor:
    """How skipped calls are extrapolated.

    Attributes:
        order: The order of the Taylor series, 0 for reuse.
        along: The axis, `"step"` or `"t"`.
        residual: Whether the outputs minus the latents are extrapolated, to which the latents of the skipped call are
            added.
        alone: Whether nothing is extrapolated, because the scheduler runs the computed steps alone, without a policy.
    """

    order: int
    along: str = "step"
    residual: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Evidence:
    """The recorded runs of a base, or what they tell of another base.

    Attributes:
        base: The base.
        outputs: For each output, the records of all runs.
        work: Rows of the batches that the denoisers run in an uncached call of the user.
    """

    base: Base
    outputs: Sequence[Sequence[OutputRecord]]
    work: float

    @cached_property
    def weights(self) -> list[SolverWeights]:
        """The weights of the solvers."""
        return [solver_weights(records[0].solver) for records in self.outputs]

    @property
    def rows(self) -> tuple[float, ...]:
        """Rows of the batches that the denoisers run for each call, `(N,)`."""
        return self.outputs[0][0].rows

    def cost(self, steps: Sequence[int]) -> float:
        """Return the cost of computing these calls, as a share of an uncached call of the user."""
        return sum(self.rows[step] for step in steps) / self.work

    @cached_property
    def uneven(self) -> bool:
        """Whether the timesteps are unevenly spaced, and all different."""
        times = self.outputs[0][0].timesteps
        steps = [one - other for one, other in pairwise(times)]
        return bool(steps) and min(steps) > 0 and max(steps) > 1.05 * min(steps)

    def problem(self, predictor: Predictor, gap: int) -> PlanningProblem:
        """Return what is planned: the means over the runs."""
        outputs = list[Recorded]()
        for records, weights in zip(self.outputs, self.weights, strict=True):
            gram = torch.stack([_gram(one, predictor) for one in records]).mean(0)
            scale = torch.tensor([one.scale for one in records], dtype=torch.float64).mean(0).tolist()
            outputs.append(Recorded(gram.tolist(), weights.error_weights(scale), tuple(scale)))
        first = self.outputs[0][0]
        places = first.timesteps if predictor.along == "t" else None
        return PlanningProblem(outputs, predictor.order, gap, first.starts, places)

    @property
    def has_residuals(self) -> bool:
        """Whether residuals were recorded."""
        return all(one.residual is not None for records in self.outputs for one in records)

    def carried_to(self, base: Base, scheduler: Any) -> Evidence:
        """Return what the runs tell of another base.

        Near the exact solution, the output of the model is a smooth function of the timestep, whatever solver steps
        through them. So the outputs at other timesteps are interpolated, which acts on the inner products.

        Args:
            base: The base.
            scheduler: Its scheduler, as the calls prepare it.
        """
        timesteps = [float(timestep) for timestep in scheduler.timesteps]
        (records,) = self.outputs
        trace = records[0].solver
        known = records[0].timesteps
        matrix = interpolation(known, timesteps)
        nearest = [min(range(len(known)), key=lambda call: abs(known[call] - timestep)) for timestep in timesteps]
        start = trace.start * (_start_size(scheduler) / _start_size(trace.scheduler))
        moved = SolverTrace(
            scheduler, list(scheduler.timesteps), [{}] * len(timesteps), start, matrix @ trace.outputs.double()
        )
        scale = sample_scale(moved)
        carried = [
            replace(
                one,
                gram=matrix @ one.gram @ matrix.T,
                residual=None if one.residual is None else matrix @ one.residual @ matrix.T,
                scale=scale,
                solver=moved,
                models=tuple(one.models[call] for call in nearest),
                rows=tuple(one.rows[call] for call in nearest),
                timesteps=tuple(timesteps),
            )
            for one in records
        ]
        return Evidence(base, [carried], self.work)


def _gram(record: OutputRecord, predictor: Predictor) -> torch.Tensor:
    """Return the inner products of what is extrapolated."""
    if not predictor.residual:
        return record.gram
    assert record.residual is not None
    return record.residual


def _start_size(scheduler: Any) -> float:
    """Return the standard deviation of the first sample."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def interpolation(known: Sequence[float], wanted: Sequence[float]) -> torch.Tensor:
    """Return the matrix that gives values at wanted places from those at known ones, `(wanted, known)`, float64.

    Args:
        known: Places in strictly decreasing or increasing order.
        wanted: Other places. Each value is that of the polynomial through the nearest `POINTS` known ones.
    """
    count = min(POINTS, len(known))
    matrix = torch.zeros(len(wanted), len(known), dtype=torch.float64)
    for row, place in enumerate(wanted):
        begin = min(
            range(len(known) - count + 1), key=lambda first: max(abs(at - place) for at in known[first : first + count])
        )
        window = range(begin, begin + count)
        for one in window:
            factors = [(place - known[other]) / (known[one] - known[other]) for other in window if other != one]
            matrix[row, one] = torch.tensor(factors, dtype=torch.float64).prod()
    return matrix
