"""Predictors as numbers: the factors of the computed values in a prediction."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.linker import resolve
from cachepolicy.language.parser import parse
from cachepolicy.planning.history_spec import history_depth
from cachepolicy.planning.predictors import amplification, coefficients, extrapolate, weights
from tests.methods import transcriptions as reference

histories = st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(lambda steps: sorted(steps)[::-1])
predictors = st.sampled_from(
    [("linear", {"weight": 0.5}), ("bdf2", {}), *(("taylor", {"order": order}) for order in range(4))]
    + [("hermite", {"order": order, "scale": 0.7}) for order in range(3)]
    + [("newton", {"order": order}) for order in range(4)]
    + [("chebyshev", {"order": order, "ridge": 0.1, "mix": 0.6}) for order in range(3)]
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


@given(histories, st.integers(1, 9), st.lists(st.integers(-3, 3), min_size=1, max_size=4))
def test_newton_is_exact_on_polynomials(steps: list[int], ahead: int, polynomial: list[int]) -> None:
    """A polynomial is continued exactly from as many values as it has coefficients, whatever the gaps."""

    def value(step: int) -> float:
        return sum(factor * step**power for power, factor in enumerate(polynomial))

    known = steps[: len(polynomial)]
    step = steps[0] + ahead
    if len(known) < len(polynomial):
        return
    factors = coefficients("newton", steps, step, {"order": len(polynomial) - 1})
    found = sum(factor * value(place) for factor, place in zip(factors, known, strict=False))
    assert value(step) == pytest.approx(found, rel=1e-6, abs=1e-4)


def test_newton_gives_the_squares_that_recursive_differences_miss() -> None:
    """Order 2 on the squares of the steps 0 to 3, and the values that TaylorSeer's recursion gives instead."""
    values = [9.0, 4.0, 1.0, 0.0]
    for name, expected in (("newton", [16.0, 25.0, 36.0, 49.0]), ("taylor", [15.0, 23.0, 33.0, 45.0])):
        found = [extrapolate(values, weights(name, [3, 2, 1, 0], step, {"order": 2})) for step in range(4, 8)]
        assert expected == pytest.approx(found)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.floats(-9, 9), st.floats(-9, 9))
def test_bdf2_is_the_scheme_of_its_transcription(first: int, gap: int, ahead: int, older: float, newest: float) -> None:
    """The factors of both values are those of the implicit scheme solved for the value ahead."""
    size = first + gap + ahead + 1
    values = [older if step == first else newest for step in range(size)]
    computed = [step in (first, first + gap) for step in range(size)]
    expected = reference.bdf2_values(values[first:], computed[first:])[-1]
    factors = coefficients("bdf2", [first + gap, first], size - 1, {})
    assert expected == pytest.approx(factors[0] * newest + factors[1] * older, rel=1e-9, abs=1e-9)


@given(
    st.lists(st.integers(0, 20), min_size=2, max_size=7, unique=True),
    st.integers(0, 4),
    st.floats(0.01, 2),
    st.floats(0, 1),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_chebyshev_is_the_ridge_regression_of_its_transcription(
    steps: list[int], order: int, ridge: float, mix: float, ahead: int, random: Random
) -> None:
    """The weights on values give the regression on the polynomials, over the window of the authors' code."""
    steps = sorted(steps)
    places = [2 * step / 30 - 1 for step in steps]
    values, at = [random.uniform(-5, 5) for _ in steps], places[-1] + 2 * ahead / 30
    kept = max(order + 1, 6)
    history = list(zip(places, values, strict=True))[-kept:]
    expected = reference.chebyshev_value(history, at, order, ridge, mix)
    numbers = weights("chebyshev", places[::-1], at, {"order": order, "ridge": ridge, "mix": mix})
    assert expected == pytest.approx(extrapolate(values[::-1], numbers), rel=1e-6, abs=1e-6)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5, unique=True), st.integers(0, 4))
def test_chebyshev_without_a_ridge_interpolates(steps: list[int], order: int) -> None:
    """At the place of a result it gives the result, if the order and the number of results fit."""
    places = [2 * step / 20 - 1 for step in steps]
    order = max(order, len(places) - 1)
    factors = coefficients("chebyshev", places, places[-1], {"order": order, "ridge": 0})
    assert [0.0] * (len(places) - 1) + [1.0] == pytest.approx(list(factors), abs=1e-6)


def test_stated_weights_are_the_factors_of_the_values() -> None:
    """Newest first. With fewer values than factors there is no prediction."""
    assert (2.0, -1.5, 0.25) == pytest.approx(coefficients("weights", [9, 5, 4], 11, {"of": [2, -1.5, 0.25]}))
    assert math.inf == amplification(weights("weights", [9, 5], 11, {"of": [2, -1.5, 0.25]}))


@given(predictors, histories, st.integers(1, 9))
def test_the_amplification_bounds_the_factors(predictor: tuple, steps: list[int], ahead: int) -> None:
    """No prediction of values up to 1 is larger than the bound that the engine compares with the dtype."""
    name, arguments = predictor
    factors = coefficients(name, steps, steps[0] + ahead, arguments)
    assert sum(map(abs, factors)) <= amplification(weights(name, steps, steps[0] + ahead, arguments)) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["taylor", "newton", "bdf2"])
def test_two_values_at_one_place_have_no_prediction(name: str) -> None:
    """The bound is infinite, so that the site computes."""
    assert math.inf == amplification(weights(name, [3, 3], 5, {"order": 1}))


@pytest.mark.parametrize(
    ("predictor", "code"),
    [
        ("weights()", "E108"),
        ("weights(of: [])", "E124"),
        ("weights(of: 1)", "E111"),
        ('weights(of: ["1"])', "E111"),
        ("newton(order: 9)", "E124"),
        ("newton(order: age)", "E121"),
        ("chebyshev(order: 1, ridge: -1)", "E124"),
        ("chebyshev(order: 1, ridge: 1, window: 17)", "E124"),
        ("bdf2(order: 1)", "E108"),
        ("align(probe: step, clip: [1, 2])", "E111"),
        ("align(probe: x, clip: [1, 2, 3])", "E124"),
        ("align(probe: x, clip: [1, step])", "E121"),
        ('band(transform: "dst", cut: 0.5, low: bdf2(), high: bdf2())', "E124"),
        ('band(transform: "dct", cut: 2, low: bdf2(), high: bdf2())', "E124"),
        ('band(transform: "dct", cut: 0.5, low: 1, high: bdf2())', "E111"),
        ('band(transform: "dct", cut: 0.5, low: chebyshev(order: 1, ridge: 1), high: bdf2())', "E111"),
        ('band(transform: "dct", cut: 0.5, low: bdf2(along: "t"), high: bdf2())', "E108"),
        ('band(transform: "dct", cut: 0.5, low: taylr(order: 1), high: bdf2())', "E107"),
        ('band(transform: "dct", cut: 0.5, low: taylor(order: 9), high: bdf2())', "E124"),
        ("linear(weight: bdf2())", "E105"),
    ],
)
def test_faulty_arguments_are_found_when_the_policy_is_read(predictor: str, code: str) -> None:
    """One finding each."""
    with pytest.raises(PolicyError) as caught:
        parse(f"signal x = input(model)\nmatch attention every 2 while l1(x) > 0 -> predict {predictor}")
    assert [code] == [finding.code for finding in caught.value.diagnostics]


@pytest.mark.parametrize(
    "predictor",
    [
        "newton(order: many)",
        "chebyshev(order: 1, ridge: 0 - many)",
        'band(transform: "fft", cut: many, low: bdf2(), high: bdf2())',
        'band(transform: "fft", cut: 0.1, low: bdf2(), high: newton(order: many))',
        "weights(of: none)",
    ],
)
def test_params_out_of_the_range_of_an_argument_are_refused(predictor: str) -> None:
    """Where they are set, since a param may have other values."""
    policy = parse(f"param many: int = 9\nparam none: list = []\nmatch attention every 2 -> predict {predictor}")
    with pytest.raises(PolicyError) as caught:
        resolve(policy)
    assert ["E163"] == [finding.code for finding in caught.value.diagnostics]


@pytest.mark.parametrize(
    ("predictor", "reads"),
    [
        ("linear(weight: 1)", 2),
        ("taylor(order: 3)", 4),
        ("newton(order: 0)", 1),
        ("chebyshev(order: 2, ridge: 1)", 6),
        ("chebyshev(order: 7, ridge: 1)", 8),
        ("chebyshev(order: 7, ridge: 1, window: 3)", 3),
        ("bdf2()", 2),
        ("weights(of: [1, 2, 3, 4, 5])", 5),
        ("align(probe: x, clip: [1, 2])", 2),
        ('band(transform: "fft", cut: 0.1, low: bdf2(), high: newton(order: 4))', 5),
    ],
)
def test_how_many_results_are_kept(predictor: str, reads: int) -> None:
    """As many as the predictor reads at most."""
    rule = parse(f"signal x = input(model)\nmatch attention every 2 -> predict {predictor}").statements[1]
    assert isinstance(rule, ir.Rule)
    assert isinstance(rule.action, ir.Predict)
    assert reads == history_depth(rule.action)
