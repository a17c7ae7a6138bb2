"""Policies under torch.compile: how many graphs, no breaks, the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.syntax import parse
from cachepolicy.testing.models import Toy, inputs, sample

dynamo = pytest.importorskip("torch._dynamo")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore:Dynamo does not know how to trace"),
    pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="counts are those of newer compilers"),
]

TIMESTEPS = tuple(1000.0 - 50.0 * step for step in range(12))
TOY = Toy(blocks=3, returns="tuple")


@dataclass
class Counted:
    """What a compiler did."""

    graphs: int = 0
    breaks: int = 0


@contextmanager
def counting() -> Iterator[Counted]:
    """Count graphs and breaks, from a fresh compiler."""
    dynamo.reset()
    with more() as counted:
        yield counted
    dynamo.reset()


@contextmanager
def more() -> Iterator[Counted]:
    """Count what is compiled on top of what is there."""
    counters, counted = dynamo.utils.counters, Counted()
    counters.clear()
    yield counted
    counted.graphs = counters["stats"]["unique_graphs"]
    counted.breaks = sum(counters["graph_break"].values())


@torch.no_grad()
def run(model: Any, toy: Toy = TOY, timesteps: Sequence[float] = TIMESTEPS, **options: Any) -> list[Tensor]:
    x, y = inputs(toy, **options)
    return list(sample(model, timesteps, x, y))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def eager(text: str, toy: Toy = TOY, **options: Any) -> list[Tensor]:
    model = toy.build()
    with cachepolicy.apply(model, parse(text)):
        return run(model, toy, **options)


# --- ways to compile -------------------------------------------------------------------------------------

Way = Callable[..., Any]


def as_function(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, **options)


def in_place(model: nn.Module, **options: Any) -> Any:
    model.compile(**options)
    return model


def by_block(model: nn.Module, **options: Any) -> Any:
    for block in model.blocks:
        block.compile(**options)
    return model


WHOLE: dict[str, Way] = {"torch.compile(model)": as_function, "model.compile()": in_place}
WAYS: dict[str, Way] = {**WHOLE, "block.compile()": by_block}


@dataclass(frozen=True)
class Case:
    """A policy, and how many graphs it takes: of the whole model, and of its blocks."""

    text: str
    whole: int
    blocks: int
    shown: bool = False
    """Whether the model has to run once outside graphs to show how its blocks go on."""


STATIC = {
    "reuse": Case("match attention every 2 -> reuse", 2, 2),
    "two periods": Case("match attention every 2 -> reuse\nmatch feedforward every 3 -> reuse", 4, 4),
    "residuals": Case("match attention every 2 -> reuse residual", 2, 2, shown=True),
    "predict": Case("match attention every 3 -> predict taylor(order: 1)", 3, 3),
    "feedback": Case("match attention every 4 -> predict linear(weight: 0.5, feedback: true)", 3, 3),
    "predicted residuals": Case("match attention every 3 -> predict hermite(order: 1, scale: 0.5) of residual", 3, 3,
                                shown=True),
    "whole blocks": Case("match block every 2 -> reuse", 2, 1),
    "a span's residual": Case("match blocks[1:] every 2 -> reuse residual", 2, 1, shown=True),
    "a span's output": Case("match blocks[1:] every 2 -> reuse", 2, 1, shown=True),
    "a span's prediction": Case("match blocks[1:] every 3 -> predict taylor(order: 1)", 3, 1, shown=True),
    "a span left out": Case("match blocks[1:2] every 2 -> skip", 2, 1, shown=True),
    "sites inside a span": Case(
        "match blocks[1:] every 4 -> reuse residual\nmatch attention every 2 -> reuse", 3, 2, shown=True
    ),
    "the model itself": Case("match model every 2 -> reuse", 1, 1),
}  # fmt: skip


BOTH = [(name, way) for name in STATIC for way in ("model.compile()", "block.compile()")]
BOTH += [(name, "torch.compile(model)") for name in ("reuse", "a span's residual", "the model itself")]


@pytest.mark.parametrize(("name", "way"), BOTH)
def test_a_static_policy_takes_a_graph_for_each_set_of_decisions(name: str, way: str) -> None:
    """No break, as many graphs as there are different sets of decisions, and to the bit what it gives uncompiled."""
    case = STATIC[name]
    wanted, whole = case.blocks if way == "block.compile()" else case.whole, way == "torch.compile(model)"
    if whole and (case.shown or name == "the model itself"):
        wanted += 1  # under `fullgraph=True` torch wants a graph at calls that need none
    expected = eager(case.text)
    with counting() as counted:
        model = TOY.build()
        with cachepolicy.apply(model, parse(case.text)) as attached:
            assert same(expected, run(WAYS[way](model, backend="eager", fullgraph=True)))
            rows = attached.trace.rows()
    assert (wanted, 0) == (counted.graphs, counted.breaks)
    assert any("R" in row for row in rows.values())


@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
@pytest.mark.parametrize("name", ["two periods", "a span's residual"])
def test_a_second_run_compiles_nothing(name: str, way: str) -> None:
    """Another trajectory, with other inputs, other steps and another session, finds all its graphs."""
    with counting():
        model = TOY.build()
        attached = cachepolicy.apply(model, parse(STATIC[name].text))
        compiled = WAYS[way](model, backend="eager", fullgraph=True)
        run(compiled)
        expected = [eager(STATIC[name].text, seed=1), eager(STATIC[name].text, timesteps=TIMESTEPS[:7])]
        run(compiled, seed=3)  # the first step of a trajectory that nobody watches
        with more() as counted:
            with attached.session("other"):
                assert same(expected[0], run(compiled, seed=1))
            attached.reset()
            assert same(expected[1], run(compiled, timesteps=TIMESTEPS[:7]))
        assert 0 == counted.graphs
