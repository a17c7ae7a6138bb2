"""Plans the computed calls of a trajectory from recorded outputs, by an exact dynamic program."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from cachepolicy.planning.predictors import coefficients

Matrix = Sequence[Sequence[float]]
History = tuple[int, ...]
"""The latest computed calls, newest first."""


@dataclass(frozen=True, slots=True)
class PlannedSteps:
    """The calls that a schedule computes, and the error that is forecast for it.

    `error` is the sum over the predicted calls of the squared error of each, weighted by its effect on the result. It
    is 0 where every call is computed.
    """

    steps: tuple[int, ...]
    error: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded output of all calls of a trajectory.

    Args:
        gram: Mean inner products of the outputs of calls s and r, `(N, N)`, over all recorded samples.
        weights: Effect of an error in the output of each call on the result, `(N,)`.
        scale: Standard deviation of the sample after each call, `(N,)`; empty where it is not known.
    """

    gram: Matrix
    weights: Sequence[float]
    scale: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class PlanningProblem:
    """What is planned.

    Args:
        outputs: The recorded outputs, such as a picture and a sound. Their errors add up.
        order: Order of the extrapolation, 0 (reuse) or more. A history that is shorter lowers it.
        gap: Most calls between two computed ones, plus 1; at least 1.
        starts: Calls at which another model takes over. They are computed, and no history crosses them.
        places: Where each call lies on the axis of the extrapolation, `(N,)`, all different; None for the step.
    """

    outputs: Sequence[Recorded]
    order: int = 1
    gap: int = 9
    starts: Collection[int] = field(default_factory=frozenset[int])
    places: Sequence[float] | None = None

    @property
    def calls(self) -> int:
        """The number of calls, N."""
        return len(self.outputs[0].weights)


def plan_steps(problem: PlanningProblem, most: int | None = None) -> Mapping[int, PlannedSteps]:
    """Find the best schedule for each number of computed calls.

    The state of the program is the latest `order + 1` computed calls, since nothing else enters a prediction. The cost
    of a gap between two computed calls is the sum over its calls s of |w_s (prediction_s - v_s)|^2, which the inner
    products give without the outputs.

    Args:
        problem: What is planned.
        most: The most computed calls, None for all.

    Returns:
        The best schedule by its number of computed calls. Numbers that no schedule reaches within the gap limit are
        absent. The first call is always computed.
    """
    calls, starts = problem.calls, sorted({*problem.starts} - {0})
    errors = _GapErrors(problem)
    best = dict[int, PlannedSteps]()
    layer: dict[History, tuple[float, _Path]] = {(0,): (0.0, (0, None))}
    for computed in range(1, (calls if most is None else min(most, calls)) + 1):
        following = dict[History, tuple[float, _Path]]()
        for history, (error, path) in layer.items():
            newest = history[0]
            horizon = next((start for start in starts if start > newest), calls)
            for until in range(newest + 1, min(newest + problem.gap, horizon) + 1):
                total = error + errors.before(history, until)
                if until == calls:
                    if computed not in best or total < best[computed].error:
                        best[computed] = PlannedSteps(_steps(path), total)
                    continue
                kept = (until,) if until in starts else (until, *history[: problem.order])
                if kept not in following or total < following[kept][0]:
                    following[kept] = (total, (until, path))
        layer = following
    return best


def schedule_error(problem: PlanningProblem, steps: Sequence[int]) -> float:
    """Return the error of a given schedule.

    Args:
        problem: What was recorded.
        steps: The computed calls in order, beginning with 0. Gaps may be larger than the limit of the problem.

    Raises:
        ValueError: The first call or a call at which another model takes over is not computed.
    """
    if not steps or steps[0] != 0 or not {*problem.starts} <= {*steps}:
        raise ValueError("the first call of each model has to be computed")
    errors, total, history = _GapErrors(problem), 0.0, History()
    for step, until in zip(steps, [*steps[1:], problem.calls], strict=True):
        history = (step,) if step in problem.starts else (step, *history[: problem.order])
        total += errors.before(history, until)
    return total


_Path = tuple[int, "_Path | None"]
"""The newest computed call and those before it, as a linked list that schedules share."""


def _steps(path: _Path | None) -> tuple[int, ...]:
    steps = list[int]()
    while path is not None:
        step, path = path
        steps.append(step)
    return tuple(reversed(steps))


class _GapErrors:
    """Errors of predicted calls, computed once for each history."""

    def __init__(self, problem: PlanningProblem) -> None:
        self._problem = problem
        self._sums = dict[History, list[float]]()

    def before(self, history: History, until: int) -> float:
        """Return the error of the calls after the newest computed one and before `until`."""
        # By the number of calls after the newest computed one.
        sums = self._sums.setdefault(history, [0.0])
        while len(sums) < until - history[0]:
            sums.append(sums[-1] + self._error(history, history[0] + len(sums)))
        return sums[until - history[0] - 1]

    def _error(self, history: History, step: int) -> float:
        """Return the weighted squared error of a call that is predicted from a history."""
        problem = self._problem
        if problem.places is None:
            ages = tuple(history[0] - call for call in history)
            weights = _factors(ages, step - history[0], problem.order)
        else:
            places = [problem.places[call] for call in history]
            weights = coefficients("taylor", places, problem.places[step], {"order": problem.order})
        factors = [*zip(history, weights, strict=True), (step, -1.0)]
        error = 0.0
        for output in problem.outputs:
            weight = output.weights[step]
            error += weight * weight * _square(factors, output.gram)
        return error


def _square(factors: Sequence[tuple[int, float]], gram: Matrix) -> float:
    """Return the square of the norm of a combination of outputs."""
    total = math.fsum(factor * other * gram[call][another] for call, factor in factors for another, other in factors)
    # Rounding can make the square of a small difference negative.
    return max(total, 0.0)


@lru_cache(maxsize=1 << 16)
def _factors(ages: tuple[int, ...], ahead: int, order: int) -> tuple[float, ...]:
    """Return the factors of a Taylor prediction. They depend on the distances between the calls alone."""
    return coefficients("taylor", [-age for age in ages], ahead, {"order": order})
