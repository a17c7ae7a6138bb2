"""A predictor of another package: a trend that is damped at each step (Gardner and McKenzie, 1985)."""

from collections.abc import Sequence


def damped(places: Sequence[float], place: float, *, damping: float, trend: float = 1) -> Sequence[float]:
    """Return the weights of the results.

    Args:
        places: The steps of the results, newest first.
        place: The step of the answer.
        damping: What is left of the trend after each step, 0 to 1.
        trend: The share of the trend that counts.

    Returns:
        One number for each result.
    """
    if len(places) < 2:
        return [1.0]
    ahead, gap = place - places[0], places[0] - places[1]
    travelled = ahead if damping == 1 else damping * (1 - damping**ahead) / (1 - damping)
    slope = trend * travelled / gap
    return [1 + slope, -slope]


damped.results = 2  # pyright: ignore[reportFunctionMemberAccess] (an attribute of the function is how it says so)
