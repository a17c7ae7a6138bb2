"""Predictors as numbers: the factors of the computed values in a prediction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.planning.predictors import coefficients, extrapolate, weights

histories = st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(lambda steps: sorted(steps)[::-1])
predictors = st.sampled_from(
    [("linear", {"weight": 0.5}), *(("taylor", {"order": order}) for order in range(4))]
    + [("hermite", {"order": order, "scale": 0.7}) for order in range(3)]
)


@given(predictors, histories, st.integers(1, 9), st.data())
def test_coefficients_are_the_prediction(predictor: tuple, steps: list[int], ahead: int, data: st.DataObject) -> None:
    """The prediction is the sum of the values times their coefficients."""
    name, arguments = predictor
    values = data.draw(st.lists(st.floats(-10, 10), min_size=len(steps), max_size=len(steps)))
    step = steps[0] + ahead
    factors = coefficients(name, steps, step, arguments)
    expected = extrapolate(values, weights(name, steps, step, arguments))
    assert expected == pytest.approx(sum(f * v for f, v in zip(factors, values, strict=True)), rel=1e-9, abs=1e-6)


@given(histories, st.integers(1, 9), st.integers(0, 3))
def test_taylor_factors_add_up_to_one(steps: list[int], ahead: int, order: int) -> None:
    """A constant trajectory is predicted as that constant."""
    assert sum(coefficients("taylor", steps, steps[0] + ahead, {"order": order})) == pytest.approx(1)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_taylor_of_order_one_is_exact_on_a_line(first: int, between: int, ahead: int) -> None:
    """A trajectory that changes linearly with the step is predicted exactly."""
    steps = [first + between, first]
    factors = coefficients("taylor", steps, steps[0] + ahead, {"order": 1})
    assert 3.0 * (steps[0] + ahead) - 7.0 == pytest.approx(
        sum(factor * (3.0 * step - 7.0) for factor, step in zip(factors, steps, strict=True))
    )


def test_the_scale_multiplies_all_but_the_newest_value() -> None:
    """Scale 0 is reuse, and scale 1 is the prediction without a scale."""
    assert (1.0, 0.0) == coefficients("taylor", [4, 2], 6, {"order": 1, "scale": 0})
    assert coefficients("taylor", [4, 2], 6, {"order": 1}) == coefficients(
        "taylor", [4, 2], 6, {"order": 1, "scale": 1}
    )
    assert (1.5, -0.5) == coefficients("taylor", [4, 2], 6, {"order": 1, "scale": 0.5})


def test_a_short_history_lowers_the_order() -> None:
    """One computed value is answered as it is, whatever the order."""
    assert (1.0,) == coefficients("taylor", [4], 6, {"order": 2})
