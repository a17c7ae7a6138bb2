"""An answer that would not be finite, from a history that is: the site computes instead, and the trace says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.predictors import Weights, amplification, extrapolate
from cachepolicy.testing.checks import engine_agrees
from cachepolicy.testing.models import Toy, inputs, sample

TIMESTEPS = tuple(range(900, 0, -100))

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")


def outputs(model: nn.Module, toy: Toy, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = inputs(toy)
    return torch.stack(list(sample(model, TIMESTEPS, x.to(dtype), y.to(dtype))))


@pytest.mark.parametrize("form", ["attention", "feedforward", "blocks", "each blocks", "model"])
@pytest.mark.parametrize("of", ["", " of residual"])
@pytest.mark.parametrize(
    "predictor",
    [
        "hermite(order: 1, scale: 1e30)",
        "hermite(order: 4, scale: 1e200)",
        "linear(weight: 1e39)",
        "linear(weight: 1e33, feedback: true)",
        "weights(of: [1e39, -1e39])",
        'band(transform: "fft", cut: 0.3, low: taylor(order: 0), high: linear(weight: 1e39))',
    ],
)
def test_weights_that_overflow_compute(form: str, of: str, predictor: str) -> None:
    """Whatever the site and the predictor, outputs are finite, and the simulator decides the same."""
    toy = Toy(returns="tuple")
    policy = cachepolicy.parse(f"match {form} on {{0, 1, 5}} -> predict {predictor}{of}")
    with cachepolicy.apply(toy.build(), policy) as run:
        found = outputs(run.target, toy)
        facts = set(run.trace.last.facts.values())
    assert found.isfinite().all()
    assert facts & {Fact.TOO_LARGE, Fact.NOT_FINITE}
    engine_agrees(toy.build(), policy, lambda model: outputs(model, toy))


def test_an_external_is_still_called_once_for_each_answer() -> None:
    """What it supplies is checked before the answer, and no answer can be made of it."""
    toy, calls = Toy(), list[float]()

    def supply() -> float:
        calls.append(1e38)
        return calls[-1]

    text = "external weight: float\nmatch feedforward on {0, 1, 5} -> predict linear(weight: weight)"
    model = toy.build()
    bare = outputs(model, toy)
    with cachepolicy.apply(model, cachepolicy.parse(text), weight=supply) as run:
        found = outputs(model, toy)
    assert torch.equal(bare, found)
    assert {Fact.TOO_LARGE} == set(run.trace.last.facts.values())
    assert 2 * 6 == len(calls)


class Constant(nn.Module):
    """A block whose output and residual are chosen for each step."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        value = self.values[min(self.calls, len(self.values) - 1)]
        self.calls += 1
        return torch.full_like(x, value)


class Chain(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Constant(values)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks[0](x)


def chain_run(values: list[float], given: list[float], dtype: torch.dtype, text: str) -> tuple[list[Tensor], Any]:
    model, found = Chain(values), list[Tensor]()
    with cachepolicy.apply(model, cachepolicy.parse(text), steps=len(given)) as run:
        for step, x in enumerate(given):
            found.append(model(torch.full((1, 2, 3), x, dtype=dtype), torch.tensor(900.0 - step)))
    return found, run.trace.last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "action", ["reuse residual", "predict taylor(order: 1)", "predict taylor(order: 1) of residual"]
)
def test_values_at_the_end_of_the_range(dtype: torch.dtype, action: str) -> None:
    """A sum or an extrapolation of large finite values computes where it would overflow, and only there."""
    top, text = torch.finfo(dtype).max, f'match "^blocks.0$" on {{0, 1}} -> {action}'
    found, trajectory = chain_run([0.1 * top, 0.9 * top, 0.5 * top, 0.25 * top], [0, 0, 0.75 * top, 0], dtype, text)
    assert all(output.isfinite().all() for output in found)
    assert Fact.NOT_FINITE == trajectory.facts[trajectory.plan.sites[0].name, 2, ""]
    assert "CCC" == next(iter(trajectory.rows().values()))[:3]
    if action == "reuse residual":
        assert "CCCR" == next(iter(trajectory.rows().values()))


def test_a_span_that_is_decided_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first block goes on where the sum with the input is not finite, and is left where it is."""
    toy = Toy()
    text = """
signal drift = l1(output("^blocks.0.norm$"), kept(output("^blocks.0.norm$")))
match blocks when step > 0 while drift <= 1e9 -> reuse residual
"""
    model = toy.build()
    x, y = inputs(toy)
    bare = model(x, torch.tensor(100.0), y)
    with cachepolicy.apply(model, cachepolicy.parse(text), steps=4) as run:
        for t in (900.0, 600.0, 300.0):
            model(x, torch.tensor(t), y)
        monkeypatch.setattr("cachepolicy.engine.span_run.is_finite", lambda sums: not isinstance(sums[0], Tensor))
        assert torch.equal(bare, model(x, torch.tensor(100.0), y))
    assert "CRRC" == run.trace.rows()["blocks[0:2]"]
    assert {Fact.NOT_FINITE} == set(run.trace.last.facts.values())


@given(
    st.lists(st.floats(-2, 2), min_size=2, max_size=5),
    st.lists(st.floats(-1, 1), min_size=5, max_size=5),
    st.booleans(),
)
def test_the_bound_of_the_weights_holds(factors: list[float], history: list[float], divided: bool) -> None:
    """No prediction from values up to 1 is larger than the bound that is taken from the weights."""
    numbers = (
        Weights(tuple(range(1, len(factors) + 1)), tuple(factors)) if divided else Weights(None, tuple(factors[:1]))
    )
    values = history[: len(factors) + 1]
    if len(values) <= len(factors) and divided:
        numbers = Weights(numbers.divisors, numbers.factors[: len(values) - 1])
    assert abs(extrapolate(values, numbers)) <= amplification(numbers) * (1 + 1e-9)
