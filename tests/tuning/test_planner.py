"""The dynamic program that chooses the computed calls of a trajectory."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.planning.predictors import coefficients
from cachepolicy.tuning.planner import PlanningProblem, Recorded, plan_steps, schedule_error

numbers = st.floats(-3, 3).map(lambda number: round(number, 3))


Outputs = list[list[list[float]]]


@st.composite
def problems(draw: st.DrawFn, *, most: int = 9) -> tuple[PlanningProblem, Outputs]:
    """A problem, and the outputs of each call that it was recorded from."""
    calls = draw(st.integers(1, most))
    vectors = st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=calls, max_size=calls)
    outputs = draw(st.lists(vectors, min_size=1, max_size=2))
    factors = st.lists(st.floats(0.1, 2), min_size=calls, max_size=calls)
    problem = PlanningProblem(
        outputs=[Recorded(gram_of(output), draw(factors)) for output in outputs],
        order=draw(st.integers(0, 2)),
        gap=draw(st.integers(1, calls + 1)),
        places=draw(st.none() | st.lists(st.integers(1, 5), min_size=calls, max_size=calls).map(falling)),
        starts=draw(st.frozensets(st.integers(1, calls - 1), max_size=2)) if calls > 1 else frozenset(),
    )
    return problem, outputs


def falling(gaps: list[int]) -> list[float]:
    """Unevenly spaced timesteps."""
    return [1000.0 - sum(gaps[: call + 1]) for call in range(len(gaps))]


def gram_of(output: list[list[float]]) -> list[list[float]]:
    """The inner products of all vectors."""
    return [[sum(a * b for a, b in zip(left, right, strict=True)) for right in output] for left in output]


def simulated_error(problem: PlanningProblem, outputs: Outputs, steps: tuple[int, ...]) -> float:
    """The weighted squared error of a schedule, by predicting each output of the trajectory."""
    total, history = 0.0, list[int]()
    for step in range(problem.calls + 1):
        if step == problem.calls or step in steps:
            history = [step, *([] if step in problem.starts else history)]
            continue
        reach = history[: problem.order + 1]
        places = problem.places or range(problem.calls)
        factors = coefficients("taylor", [places[call] for call in reach], places[step], {"order": problem.order})
        for output, recorded in zip(outputs, problem.outputs, strict=True):
            for axis, value in enumerate(output[step]):
                predicted = sum(factor * output[call][axis] for factor, call in zip(factors, reach, strict=True))
                total += (recorded.weights[step] * (predicted - value)) ** 2
    return total


@given(problems())
def test_the_program_finds_the_best_of_all_schedules(drawn: tuple[PlanningProblem, Outputs]) -> None:
    """No schedule within the gap limit has a lower error than the one that is found for its number of calls."""
    problem, outputs = drawn
    plans = plan_steps(problem)
    for count in range(1, problem.calls + 1):
        possible = [
            simulated_error(problem, outputs, (0, *rest))
            for rest in combinations(range(1, problem.calls), count - 1)
            if {*problem.starts} <= {0, *rest}
            and all(b - a <= problem.gap for a, b in zip((0, *rest), (*rest, problem.calls), strict=True))
        ]
        assert bool(possible) == (count in plans)
        if possible:
            assert min(possible) == pytest.approx(plans[count].error, rel=1e-6, abs=1e-6)
            assert count == len(plans[count].steps)


@given(problems())
def test_the_forecast_of_a_schedule_is_its_error(drawn: tuple[PlanningProblem, Outputs]) -> None:
    """What the program says of a schedule is what predicting its outputs gives."""
    problem, outputs = drawn
    for plan in plan_steps(problem).values():
        assert simulated_error(problem, outputs, plan.steps) == pytest.approx(plan.error, rel=1e-6, abs=1e-6)
        assert plan.error == pytest.approx(schedule_error(problem, plan.steps), rel=1e-9, abs=1e-12)


def test_all_calls_computed_has_no_error() -> None:
    """The schedule that computes everything is among the results and is exact."""
    problem = PlanningProblem([Recorded([[1.0, 0.5], [0.5, 2.0]], [1.0, 1.0])])
    assert (0, 1) == plan_steps(problem)[2].steps
    assert 0.0 == plan_steps(problem)[2].error


@pytest.mark.parametrize("steps", [(), (1, 2), (0, 1)])
def test_a_schedule_without_the_first_call_of_a_model_is_refused(steps: tuple[int, ...]) -> None:
    """A model has no history at its first call, so a schedule cannot skip it."""
    problem = PlanningProblem([Recorded([[1.0] * 4] * 4, [1.0] * 4)], starts={3})
    with pytest.raises(ValueError, match="first call of each model"):
        schedule_error(problem, steps)
