# pyright: reportOptionalMemberAccess=false
"""Predictors that extrapolate along the timestep or the noise level."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing import checks, strategies
from cachepolicy.testing.models import Toy, inputs
from tests.support.plain_engine import PlainEngine

TOY = Toy(blocks=3)
SITES = ("attention", "block", "blocks[1:]")
FORMS = (
    "taylor(order: {0}, along: {1})",
    "hermite(order: {0}, scale: 0.01, along: {1})",
    "newton(order: {0}, along: {1})",
    "chebyshev(order: {0}, ridge: 0.1, mix: 0.6, window: 3, along: {1})",
    "bdf2(along: {1})",
    "weights(of: [2, 0.25 * {0} - 1, -1], along: {1})",
)


@torch.no_grad()
def sampled(model: nn.Module, run: cachepolicy.Run, timesteps: Sequence[float]) -> list[Tensor]:
    """The predictions of one loop that tells its timesteps and noise levels."""
    x, y = inputs(TOY)
    found = list[Tensor]()
    for step, t in enumerate(timesteps):
        with run.step(t=t, step=step, steps=len(timesteps), sigma=(t / 1000) ** 2):
            found.append(model(x, torch.tensor(t), y))
        x = x - 0.1 * found[-1]
    return found


@torch.no_grad()
def expected(run: cachepolicy.Run, timesteps: Sequence[float]) -> list[Tensor]:
    """The same by an engine that shares nothing with ours but the predictor."""
    plain = PlainEngine(TOY.build(), run.plan)
    x, y = inputs(TOY)
    found = list[Tensor]()
    for call, t in zip(run.trace.last.calls, timesteps, strict=True):
        found.append(plain.call(call.tick, call.decisions, call.facts, (x, torch.tensor(t), y)))
        x = x - 0.1 * found[-1]
    return found


@pytest.mark.filterwarnings("ignore:the policy reused nothing")
@given(
    strategies.timesteps(),
    st.sampled_from(SITES),
    st.sampled_from(FORMS),
    st.integers(0, 3),
    st.sampled_from(["", " of residual"]),
    st.sampled_from(["step", "t", "sigma"]),
)
def test_the_engine_extrapolates_along_the_axis_as_the_plain_one_does(
    timesteps: list[float], site: str, form: str, order: int, of: str, axis: str
) -> None:
    """Modules and spans give the plain engine's tensors to the last bit."""
    text = f"match {site} every 3 -> predict {form.format(order, json.dumps(axis))}{of}"
    with cachepolicy.apply(TOY.build(), parse(text)) as run:
        found = sampled(run.target, run, timesteps)
        assert all(map(torch.equal, expected(run, timesteps), found))


def test_a_line_in_t_is_predicted_exactly_from_uneven_steps() -> None:
    """Order 1 along `t` continues an output that is linear in the timestep, which order 1 along the step does not."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return (3 * timestep + 1) * self.scale * torch.ones_like(hidden_states)

    timesteps, errors = [1000.0, 990.0, 900.0, 500.0, 100.0], dict[str, float]()
    for axis in ("t", "step"):
        model, x = Line(), torch.zeros(1, 3)
        policy = parse(f'match model on {{0, 1}} -> predict taylor(order: 1, along: "{axis}")')
        with torch.no_grad(), cachepolicy.apply(model, policy):
            found = [model(x, torch.tensor(t)) for t in timesteps]
        errors[axis] = max(float((got - (3 * t + 1)).abs().max()) for got, t in zip(found, timesteps, strict=True))
    assert errors["t"] < 1e-2 < errors["step"]


@pytest.mark.filterwarnings("ignore:the policy reused nothing")
def test_two_results_at_one_place_compute() -> None:
    """Where two steps share their timestep, no slope exists between them, and the site computes."""
    model = TOY.build()
    timesteps = [900.0, 500.0, 500.0, 100.0]
    policy = parse('match model on {0, 1, 2} -> predict taylor(order: 1, along: "t")')
    with torch.no_grad(), cachepolicy.apply(model, policy) as run:
        x, y = inputs(TOY)
        found = [model(x, torch.tensor(t), y) for t in timesteps]
    assert all(value.isfinite().all() for value in found)
    assert 1 == len(run.trace.last.facts)


def test_an_unknown_sigma_is_refused() -> None:
    """E250 asks for the scheduler, as for the word `sigma` in a condition."""
    model, (x, y) = TOY.build(), inputs(TOY)
    with (
        cachepolicy.apply(model, parse('match model every 2 -> predict taylor(order: 1, along: "sigma")')),
        pytest.raises(PolicyError, match="sigma") as caught,
    ):
        model(x, torch.tensor(500.0), y)
    assert "E250" == caught.value.diagnostics[0].code


@pytest.mark.parametrize(("axis", "code"), [('"time"', "E124"), ("1", "E111")])
def test_another_axis_is_refused(axis: str, code: str) -> None:
    """Only the step, the timestep and sigma are axes."""
    with pytest.raises(PolicyError) as caught:
        parse(f"match model every 2 -> predict taylor(order: 1, along: {axis})")
    assert code == caught.value.diagnostics[0].code


def test_the_schedule_does_not_depend_on_the_axis() -> None:
    """The simulator decides as the engine does."""
    policy = parse('match attention every 3 -> predict taylor(order: 2, along: "t")')
    checks.engine_agrees(TOY.build(), policy, _run)


@torch.no_grad()
def _run(model: nn.Module) -> None:
    x, y = inputs(TOY)
    for t in (900.0, 800.0, 500.0, 450.0, 100.0):
        x = x - 0.1 * model(x, torch.tensor(t), y)
