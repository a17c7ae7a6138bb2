"""Predictors: extrapolation of computed values to a later step. Their weights are computed without any tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, Self, TypeVar

from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, evaluate
from cachepolicy.language.installed_predictors import how_to_get, installed
from cachepolicy.language.traversal import inner_predictor
from cachepolicy.language.vocabulary import COMMON_LABELS
from cachepolicy.planning.history_spec import chebyshev_window, history_depth

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
    """Coefficients of a prediction: a factor of the newest value, and one of each difference.

    They are numbers, or 0-d tensors in compiled graphs, where constants would cause a recompile at each step.

    Attributes:
        divisors: The divisors of the differences of each order. None for the first differences of neighbours, newest
            first, undivided.
        factors: The factors of the differences.
        newest: The factor of the newest value. None is 1.
    """

    divisors: tuple[Any, ...] | None
    factors: tuple[Any, ...]
    newest: Any = None


TOO_LARGE = Weights(None, (math.inf,))
"""Stands for weights that do not exist, such as those of a slope between two values at the same place."""


def weights(predictor: str, steps: Sequence[float], step: float, arguments: PredictorArguments) -> Weights:
    """Returns the coefficients of a prediction at `step` from values at `steps`, newest first.

    The steps may be places on any axis, such as timesteps or sigmas. A factor that is too large for a float is
    infinite, as is one from two values at the same place.
    """
    known = _PREDICTORS.get(predictor)
    try:
        return known(steps, step, arguments) if known is not None else _of_package(predictor, steps, step, arguments)
    except (OverflowError, ZeroDivisionError):
        return TOO_LARGE


@dataclass(frozen=True, slots=True)
class Inner:
    """A predictor of one band: its name, its arguments at this step, and how many results it reads."""

    predictor: str
    arguments: PredictorArguments
    depth: int

    def weights(self, steps: Sequence[float], step: float) -> Weights:
        """Returns the coefficients of the band at `step` from values at `steps`, newest first."""
        return weights(self.predictor, steps[: self.depth], step, self.arguments)


def evaluated(value: ir.Expression, environment: Environment) -> Any:
    """Returns the value of an argument: that of an expression, or the predictor of a band.

    Raises:
        Undefined: It has no value.
    """
    inner = inner_predictor(value)
    if inner is None:
        return evaluate(value, environment)
    arguments = {argument.label: evaluate(argument.value, environment) for argument in inner.arguments}
    return Inner(inner.predictor, arguments, history_depth(inner))


def amplification(numbers: Weights) -> float:
    """Returns an upper bound of the magnitude of a prediction and its terms, for values of magnitude 1.

    Infinite if a factor is not finite.
    """
    # A difference of order i is the sum of 2^i values, divided i times: by steps, or by less along another axis.
    least = min(1.0, *map(abs, numbers.divisors)) if numbers.divisors else 1.0
    orders = range(1, len(numbers.factors) + 1) if numbers.divisors is not None else [1] * len(numbers.factors)
    terms = [(2.0 / least) ** order * abs(factor) for order, factor in zip(orders, numbers.factors, strict=True)]
    bound = (1.0 if numbers.newest is None else abs(numbers.newest)) + sum(terms)
    return bound if math.isfinite(bound) else math.inf


def extrapolate(history: Sequence[V], numbers: Weights) -> V:
    """Returns the newest value, with its factor, plus the weighted differences.

    Args:
        history: Computed values, newest first.
        numbers: The weights for the steps of these values.

    Returns:
        The prediction. Without differences this is the newest value itself.
    """
    answer = history[0] if numbers.newest is None else history[0] * numbers.newest
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
    """Returns the newest difference of each order, or the differences of neighbours."""
    divisors = numbers.divisors
    if divisors is None:
        return [history[i] - history[i + 1] for i in range(len(numbers.factors))]
    level: list[V] = list(history[: len(numbers.factors) + 1])
    differences: list[V] = []  # `list[V]()` cannot be traced by Dynamo, which runs this function in graphs
    while len(level) > 1:
        level = [(level[i] - level[i + 1]) / divisors[i] for i in range(len(level) - 1)]
        differences.append(level[0])
    return differences


# --- the predictors --------------------------------------------------------------------------------------


def _linear(steps: Sequence[float], _step: float, arguments: PredictorArguments) -> Weights:
    """FasterCache's extrapolation, newest + (newest - older) * weight (arXiv:2410.19355, equation 5)."""
    return Weights(None, (arguments["weight"],)[: len(steps) - 1])


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


def _newton(steps: Sequence[float], step: float, arguments: PredictorArguments) -> Weights:
    """The polynomial through the newest order + 1 values, with divided differences. It is exact on its degree."""
    places = steps[: int(arguments["order"]) + 1]
    factors = [
        math.prod((step - other) / (place - other) for number, other in enumerate(places) if number != own)
        for own, place in enumerate(places)
    ]
    return _of_values(factors, whole=True)


def _bdf2(steps: Sequence[float], step: float, _arguments: PredictorArguments) -> Weights:
    """One step of BDF2 with the slope of the last two values, the predictor of FoCa (arXiv:2508.16211).

    With r = k / gap, the scheme for steps of different lengths gives the value y ahead:
    (1 + 2r) / (1 + r) y = (1 + r) newest - r^2 / (1 + r) older + k slope. As the slope is (newest - older) / gap, y is
    newest + r (newest - older). FoCa's corrector, the mean of the slopes at both ends, then changes nothing.
    """
    return Weights(None, tuple((step - steps[0]) / gap for gap in _divisors(steps, 1)))


def _chebyshev(steps: Sequence[float], step: float, arguments: PredictorArguments) -> Weights:
    """Spectrum's forecast (arXiv:2603.01623): ridge regression on Chebyshev polynomials, mixed with a fixed slope.

    The places are between -1 and 1. The prediction is mix times the fitted polynomial, plus the rest times newest +
    (newest - older) / 2.
    """
    order, ridge, mix = int(arguments["order"]), arguments["ridge"], arguments.get("mix", 1)
    places = steps[: int(arguments.get("window", chebyshev_window(order)))]
    if len(places) < 2:
        return Weights(None, ())
    if ridge == 0:
        order = min(order, len(places) - 1)
    rows = [_chebyshev_polynomials(place, order) for place in places]
    normal = [
        [sum(row[i] * row[j] for row in rows) + (ridge if i == j else 0) for j in range(order + 1)]
        for i in range(order + 1)
    ]
    solution = _solved(normal, _chebyshev_polynomials(step, order))
    factors = [mix * sum(x * y for x, y in zip(row, solution, strict=True)) for row in rows]
    factors[0] += 1.5 * (1 - mix)
    factors[1] -= 0.5 * (1 - mix)
    return _of_values(factors)


def _chebyshev_polynomials(x: float, order: int) -> list[float]:
    """Returns the values of the Chebyshev polynomials of the first kind up to an order."""
    values = [1.0, x]
    while len(values) <= order:
        values.append(2 * x * values[-1] - values[-2])
    return values[: order + 1]


def _solved(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Solves a small symmetric system by Gaussian elimination with pivots.

    Raises:
        ZeroDivisionError: The matrix is singular.
    """
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(rows[row][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for row in range(i + 1, size):
            factor = rows[row][i] / rows[i][i]
            rows[row] = [a - factor * b for a, b in zip(rows[row], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - rest) / rows[i][i]
    return solution


def _given(steps: Sequence[float], _step: float, arguments: PredictorArguments) -> Weights:
    """The factors that the policy states. They need as many values."""
    factors = arguments["of"]
    return _of_values(factors) if len(factors) <= len(steps) else TOO_LARGE


def _of_package(name: str, steps: Sequence[float], step: float, arguments: PredictorArguments) -> Weights:
    """Returns the weights of a predictor of another package.

    Raises:
        PolicyError: E170, there are not as many numbers as values.
    """
    found = installed(name)
    if found is None:
        raise PolicyError.of("E107", f"there is no predictor `{name}`", help=how_to_get(name, None))
    given = {label: value for label, value in arguments.items() if label not in COMMON_LABELS}
    subject = f"the predictor `{name}` of `{found.package}`"
    try:
        factors: tuple[Any, ...] = tuple(found.function(tuple(steps), step, **given))
    except ArithmeticError:
        return TOO_LARGE
    except Exception as error:
        raise PolicyError.of("E170", f"{subject} failed: {error!r}") from error
    if len(factors) != len(steps) or not all(isinstance(factor, int | float) for factor in factors):
        message = f"{subject} returned {factors!r} for {counted(len(steps), 'result')}"
        raise PolicyError.of("E170", message, help="it returns one number for each result, the newest first")
    return _of_values(factors) if all(map(math.isfinite, factors)) else TOO_LARGE


def _of_values(factors: Sequence[float], *, whole: bool = False) -> Weights:
    """Converts factors of values, newest first, to factors of the newest value and of the differences of neighbours.

    In low precision, the differences of neighbours are exact where large factors of the values would cancel.

    Args:
        factors: The factors of the values.
        whole: Whether they add up to 1 but for rounding.
    """
    tails = list(accumulate(reversed(factors)))[::-1]
    return Weights(None, tuple(-tail for tail in tails[1:]), None if whole else tails[0])


def _divisors(steps: Sequence[float], order: int) -> tuple[float, ...]:
    divisors = tuple(newer - older for newer, older in pairwise(steps[: order + 1]))
    if 0 in divisors:
        raise ZeroDivisionError("two computed values lie at the same place of the axis")
    return divisors


_PREDICTORS: Mapping[str, Callable[[Sequence[float], float, PredictorArguments], Weights]] = {
    "linear": _linear,
    "taylor": _taylor,
    "hermite": _hermite,
    "newton": _newton,
    "bdf2": _bdf2,
    "chebyshev": _chebyshev,
    "weights": _given,
    "align": _linear,
}
