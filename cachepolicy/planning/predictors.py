"""Predictors: extrapolation of computed values to a later step. Their weights are computed without any tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Self, TypeVar

PredictorArguments = Mapping[str, Any]


class Extrapolated(Protocol):
    """Something that is extrapolated: a tensor in the engine, a number in the planner of schedules."""

    def __add__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def __truediv__(self, other: Any, /) -> Self: ...


V = TypeVar("V", bound=Extrapolated)


@dataclass(frozen=True, slots=True)
class Weights:
    """Coefficients of a prediction: the divisors of neighbouring differences, and a factor per order.

    They are numbers, or 0-d tensors in compiled graphs, where constants would cause a recompile at each step.
    `divisors` is None if differences are not divided.
    """

    divisors: tuple[Any, ...] | None
    factors: tuple[Any, ...]


def weights(predictor: str, steps: Sequence[float], step: float, arguments: PredictorArguments) -> Weights:
    """Returns the coefficients of a prediction at `step` from values at `steps`, newest first.

    The steps may be places on any axis, such as timesteps or sigmas. A factor that is too large for a float is
    infinite, as is one from two values at the same place.
    """
    try:
        return _PREDICTORS[predictor](steps, step, arguments)
    except (OverflowError, ZeroDivisionError):
        return Weights(None, (math.inf,))


def amplification(numbers: Weights) -> float:
    """Returns an upper bound of the magnitude of a prediction and its terms, for values of magnitude 1.

    Infinite if a factor is not finite.
    """
    # A difference of order i is the sum of 2^i values, divided i times: by steps, or by less along another axis.
    least = min(1.0, *map(abs, numbers.divisors)) if numbers.divisors else 1.0
    terms = [(2.0 / least) ** (order + 1) * abs(factor) for order, factor in enumerate(numbers.factors)]
    bound = 1.0 + sum(terms)
    return bound if math.isfinite(bound) else math.inf


def extrapolate(history: Sequence[V], numbers: Weights) -> V:
    """Returns the newest value plus the weighted differences of increasing order.

    Args:
        history: Computed values, newest first.
        numbers: The weights for the steps of these values.

    Returns:
        The prediction. Without differences this is the newest value itself.
    """
    answer = history[0]
    for difference, factor in zip(_differences(history, numbers), numbers.factors, strict=True):
        answer = answer + difference * factor
    return answer


def coefficients(
    predictor: str, steps: Sequence[float], step: float, arguments: PredictorArguments
) -> tuple[float, ...]:
    """Returns the factor of each value at `steps`, newest first, in the prediction at `step`.

    All predictors are linear: the prediction is the sum of the values times these factors.
    """
    numbers = weights(predictor, steps, step, arguments)
    count = len(steps)
    return tuple(
        float(extrapolate([1.0 if other == position else 0.0 for other in range(count)], numbers))
        for position in range(count)
    )


def _differences(history: Sequence[V], numbers: Weights) -> list[V]:
    """Returns the newest difference of each order."""
    divisors = numbers.divisors
    if divisors is None:
        return [history[0] - history[min(1, len(history) - 1)]]
    level: list[V] = list(history[: len(numbers.factors) + 1])
    differences: list[V] = []  # `list[V]()` cannot be traced by Dynamo, which runs this function in graphs
    while len(level) > 1:
        level = [(level[i] - level[i + 1]) / divisors[i] for i in range(len(level) - 1)]
        differences.append(level[0])
    return differences


def _linear(_steps: Sequence[float], _step: float, arguments: PredictorArguments) -> Weights:
    """FasterCache's extrapolation, newest + (newest - older) * weight (arXiv:2410.19355, equation 5)."""
    return Weights(None, (arguments["weight"],))


def _taylor(steps: Sequence[float], step: float, arguments: PredictorArguments) -> Weights:
    """TaylorSeer's series of recursive differences (arXiv:2503.06923): sum of scale * difference_i * k^i / i!."""
    divisors, scale = _divisors(steps, arguments["order"]), arguments.get("scale", 1)
    k = step - steps[0]
    return Weights(divisors, tuple(scale * (k**order / math.factorial(order)) for order in range(1, len(divisors) + 1)))


def _hermite(steps: Sequence[float], step: float, arguments: PredictorArguments) -> Weights:
    """HiCache's series in scaled Hermite polynomials (arXiv:2508.16984)."""
    divisors, scale = _divisors(steps, arguments["order"]), arguments["scale"]
    x = scale * (step - steps[0])
    before, polynomial, factors = 1.0, 2.0 * x, list[float]()
    for order in range(1, len(divisors) + 1):
        factors.append(scale**order * polynomial / math.factorial(order))
        before, polynomial = polynomial, 2.0 * x * polynomial - 2.0 * order * before
    return Weights(divisors, tuple(factors))


def _divisors(steps: Sequence[float], order: int) -> tuple[float, ...]:
    divisors = tuple(newer - older for newer, older in pairwise(steps[: order + 1]))
    if 0 in divisors:
        raise ZeroDivisionError("two computed values lie at the same place of the axis")
    return divisors


_PREDICTORS = {"linear": _linear, "taylor": _taylor, "hermite": _hermite}
