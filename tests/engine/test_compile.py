"""Policies under torch.compile: how many graphs, no breaks, the same results."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.engine.compile import regions
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Block, Returns, Shared, Toy, inputs, redraw, sample

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
    "factors of values": Case(
        'match attention every 3 -> predict chebyshev(order: 1, ridge: 1, window: 2, along: "t")', 3, 3
    ),
    "bands": Case(
        'match attention every 3 -> predict band(transform: "fft", cut: 0.3, low: taylor(order: 0), high: bdf2())', 2, 2
    ),
    "bands of a span's residual": Case(
        "match blocks[1:] every 3 -> predict band("
        'transform: "dct", cut: 0.3, low: bdf2(), high: newton(order: 2)) of residual', 2, 1, shown=True
    ),
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


# --- what a graph hides from us --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_writers_in_place_spoil_nothing(way: str, backend: str) -> None:
    """A model that writes into what a site returned gets what it gets uncompiled, though no graph counts writes."""
    toy, text = Toy(blocks=2, in_place=True), "match attention every 3 -> reuse"
    bare = run(toy.build(), toy)
    model = toy.build()
    with counting(), cachepolicy.apply(model, parse(text)) as attached:
        compiled = WAYS[way](model, backend=backend, fullgraph=True)
        got = run(compiled, toy)
        rows = attached.trace.rows()["blocks.0.attn"]
        wanted = _kept_copies(toy, rows)
    assert "R" in rows
    assert all(map(torch.equal, wanted, got))
    assert not same(bare, got)


def _kept_copies(toy: Toy, row: str) -> list[Tensor]:
    """The trajectory where the attentions at `R` give copies of what they gave at the `C` before."""
    model, kept, letters = toy.build(), {}, iter(())
    now = [""]

    def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        if now[0] == "C":
            kept[module] = output.clone()
        return kept[module].clone()

    letters = iter(row)
    for block in model.blocks:
        block.attn.register_forward_hook(hook)
    model.register_forward_pre_hook(lambda *_: now.__setitem__(0, next(letters)))
    return run(model, toy)


@pytest.mark.parametrize("how", ["model", "function"])
def test_a_module_called_twice_in_a_graph_computes(how: str) -> None:
    """One slot cannot hold two answers: from the second step on it computes, and the trace says why."""
    expected = run(Shared(), Toy())
    model = Shared()
    with counting(), cachepolicy.apply(model, parse('match "^ff$" every 3 -> reuse')) as attached:
        way = in_place if how == "model" else as_function
        assert same(expected, run(way(model, backend="eager", fullgraph=True), Toy()))
        assert {"one forward calls it more than once"} == set(attached.trace.last.facts.values())


@pytest.mark.parametrize("returns", ["tensor", "list", "dict"])
@pytest.mark.parametrize("action", ["reuse", "reuse residual"])
def test_answers_keep_their_form(returns: Returns, action: str) -> None:
    """Blocks that return a tensor, a list or a dict, answered inside one graph."""
    toy, text = Toy(blocks=3, returns=returns), f"match blocks[1:] every 2 -> {action}"
    expected = eager(text, toy)
    model = toy.build()
    with counting() as counted, cachepolicy.apply(model, parse(text)):
        assert same(expected, run(in_place(model, backend="eager", fullgraph=True), toy))
    assert (2, 0) == (counted.graphs, counted.breaks)


class Conditional(Block):
    """A block around an operation that torch traces as a function of higher order."""

    def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
        x = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        x, context = super().forward(x, context, step)
        return torch.cond(x.sum() > 0, lambda x: 2 * x, lambda x: x / 2, (x,)), context


@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
@pytest.mark.parametrize("name", ["reuse", "residuals", "a span's residual", "predict"])
def test_no_store_is_lost_behind_a_function_of_higher_order(name: str, way: str) -> None:
    """Dynamo loses a second store to one object where such an operation stands between; we make none."""

    def build() -> nn.Module:
        model = TOY.build()
        model.blocks = nn.ModuleList(Conditional(TOY) for _ in range(3))
        redraw(model, 0)
        return model.eval()

    model = build()
    with cachepolicy.apply(model, parse(STATIC[name].text)) as attached:
        expected, rows = run(model), attached.trace.rows()
    model = build()
    with counting() as counted, cachepolicy.apply(model, parse(STATIC[name].text)) as attached:
        assert same(expected, run(WAYS[way](model, backend="eager", fullgraph=True)))
        assert rows == attached.trace.rows()
    assert 0 == counted.breaks


# --- signals ---------------------------------------------------------------------------------------------

FBC = """signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= 0.02 * step -> reuse residual"""
BY_INPUT = """signal head = input(blocks[0])
signal drift = relative_l1(head, kept(head))
match attention while drift <= 0.1 * (step % 3) -> reuse"""


@pytest.mark.parametrize(("text", "graphs"), [(FBC, 1), (BY_INPUT, 2)])
def test_signals_decide_between_compiled_blocks(text: str, graphs: int) -> None:
    """The decision is outside the blocks' graphs: no break, and of FBC no graph more than without a policy."""
    expected = eager(text)
    with counting() as counted:
        model = TOY.build()
        with cachepolicy.apply(model, parse(text)) as attached:
            assert same(expected, run(by_block(model, backend="eager", fullgraph=True)))
            assert {"C", "R"} == set(list(attached.trace.rows().values())[-1])
    assert (graphs, 0) == (counted.graphs, counted.breaks)


@pytest.mark.parametrize("text", [FBC, BY_INPUT])
def test_a_whole_graph_breaks_where_a_signal_decides(text: str) -> None:
    """Compiled as a whole the results are right, and the graph is open at the gate and nowhere else."""
    expected = eager(text)
    with counting() as counted:
        model = TOY.build()
        with cachepolicy.apply(model, parse(text)):
            compiled = in_place(model, backend="eager")
            assert same(expected, run(compiled))
            assert 0 < counted_breaks() <= 4
            with more() as again:
                assert same(expected, run(compiled))
            assert 0 == again.graphs
    del counted


BY_ITSELF = """signal mine = relative_l1(input(self), kept(input(self)))
match each blocks while mine < 0.3 -> reuse residual"""
OVER = """signal r = l1(prev(residual(self)))
match attention while mean(r over feedforward) < 3 -> predict linear(weight: 1 / gap)"""


@pytest.mark.parametrize("text", [BY_ITSELF, OVER])
@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
def test_signals_of_the_sites_themselves_decide_between_compiled_blocks(text: str, way: str) -> None:
    """Each site is decided as soon as what it reads is measured, and the results are those without a compiler."""
    expected = eager(text)
    with counting():
        model = TOY.build()
        with cachepolicy.apply(model, parse(text)) as attached:
            assert same(expected, run(WAYS[way](model, backend="eager")))
            assert any("R" in row for row in attached.trace.rows().values())


def counted_breaks() -> int:
    return sum(dynamo.utils.counters["graph_break"].values())


def test_a_whole_graph_that_may_not_break_says_why() -> None:
    """`fullgraph=True` and a signal exclude each other, and the error says what to do."""
    model = TOY.build()
    with counting(), cachepolicy.apply(model, parse(FBC)):
        compiled = in_place(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="compile block by block"):
            run(compiled)


# --- coming and going ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
@pytest.mark.parametrize("first", ["compiler", "policy"])
def test_policies_come_and_go(way: str, first: str) -> None:
    """Applied before or after compiling: the same; removed: the bare model, in as many graphs as ever."""
    text = "match attention every 2 -> reuse\nmatch blocks[1:] every 4 -> reuse residual"
    expected, bare = eager(text), run(TOY.build())
    with counting():
        model = TOY.build()
        if first == "compiler":
            WAYS[way](model, backend="eager", fullgraph=True)
            assert same(bare, run(model))
        attached = cachepolicy.apply(model, parse(text))
        if first == "policy":
            WAYS[way](model, backend="eager", fullgraph=True)
        assert same(expected, run(model))
        with attached.disabled():
            assert same(bare, run(model))
        attached.remove()
        assert same(bare, run(model))
        assert not any("_cachepolicy" in each.__dict__ for each in model.modules())


def test_a_block_whose_forward_is_compiled_is_found() -> None:
    """`block.forward = torch.compile(block.forward)` is a block that is compiled alone, too."""
    expected = eager("match attention every 2 -> reuse")
    with counting() as counted:
        model = TOY.build()
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
        with cachepolicy.apply(model, parse("match attention every 2 -> reuse")):
            assert same(expected, run(model))
    assert 0 == counted.breaks


def test_a_graph_that_nobody_saw_coming_is_left_once() -> None:
    """Compiled in the middle of a trajectory: one call leaves the graph at its sites, the next has found its place."""
    text = "match attention every 2 -> reuse"
    expected = eager(text)
    with counting():
        model = TOY.build()
        x, y = inputs(TOY)
        with torch.no_grad(), cachepolicy.apply(model, parse(text)):
            got = []
            for step, t in enumerate(TIMESTEPS):
                if step == 3:
                    by_block(model, backend="eager")
                got.append(model(x, torch.tensor(t), y))
                x = x - 0.1 * got[-1]
        assert same(expected, got)


# --- many at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiler_that_loses_what_is_kept_is_named_once(way: str, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.6, which has no stances, a compiled model computes every call: one warning says so."""
    if old:
        monkeypatch.delattr(torch.compiler, "set_stance")
    model = TOY.build()
    compiled = WAYS[way](model, backend="eager")
    with cachepolicy.apply(model, parse(STATIC["reuse"].text)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(compiled)
    assert int(old) == sum("W606" in str(warning.message) for warning in caught)
    dynamo.reset()


@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
def test_threads_and_sessions_share_graphs(way: str) -> None:
    """What one thread has compiled the others find, and each result is that of the run alone."""
    text = STATIC["two periods"].text
    expected = [eager(text, seed=seed) for seed in range(4)]
    with counting():
        model = TOY.build()
        with cachepolicy.apply(model, parse(text)) as attached:
            compiled = WAYS[way](model, backend="eager", fullgraph=True)
            run(compiled)
            with more() as counted, ThreadPoolExecutor(1) as pool:
                assert same(expected[1], pool.submit(lambda: run(compiled, seed=1)).result())
                with attached.session("other"):
                    assert same(expected[2], run(compiled, seed=2))
            assert 0 == counted.graphs
            with more() as counted, ThreadPoolExecutor(4) as pool:
                got = list(pool.map(lambda seed: run(compiled, seed=seed), range(4)))
            # Torch checks the guards of one code in several threads at once, and may find that none holds.
            assert counted.graphs <= 4
    assert all(itertools.starmap(same, zip(expected, got, strict=True)))


def test_branches_share_graphs() -> None:
    """Sequential guidance runs two histories through one set of graphs."""
    text = "match attention every 2 -> reuse"
    x, y = inputs(TOY)
    ys = [y, y.flip(0) + 1]

    def both(model: Any) -> list[Tensor]:
        with torch.no_grad():
            return list(sample(model, TIMESTEPS, x, ys))

    model = TOY.build()
    with cachepolicy.apply(model, parse(text)):
        expected = both(model)
    model = TOY.build()
    with counting() as counted, cachepolicy.apply(model, parse(text)):
        assert same(expected, both(in_place(model, backend="eager", fullgraph=True)))
    assert 2 == counted.graphs


def test_another_resolution() -> None:
    """A second size compiles its own graphs (or one for all sizes), with the right results, and the first keeps its."""
    text = STATIC["two periods"].text
    sizes = [1, 2, 3, 1]
    expected = [eager(text, batch=batch) for batch in sizes]
    for dynamic in (None, False, True):
        with counting():
            model = TOY.build()
            with cachepolicy.apply(model, parse(text)):
                compiled = in_place(model, backend="eager", fullgraph=True, dynamic=dynamic)
                for batch, wanted in zip(sizes, expected, strict=True):
                    assert all(map(torch.allclose, wanted, run(compiled, batch=batch)))
                with more() as counted:
                    run(compiled, batch=2)
                    run(compiled, batch=3)
                assert 0 == counted.graphs


# --- limits ----------------------------------------------------------------------------------------------

MANY = "\n".join(f"match '^blocks[.]{number}[.](attn|ff)$' every {number + 2} -> reuse" for number in range(3))


@pytest.fixture
def low_limit() -> Iterator[None]:
    """Torch gives up after three graphs of one code."""
    with dynamo.config.patch({regions._LIMIT: 3}):
        yield


@pytest.mark.usefixtures("low_limit")
def test_the_compiler_is_asked_for_as_many_graphs_as_there_are() -> None:
    """A policy with more sets of decisions than torch allows of one code raises that number."""
    expected = eager(MANY)
    model = TOY.build()
    with counting() as counted, cachepolicy.apply(model, parse(MANY)) as attached:
        assert same(expected, run(in_place(model, backend="eager", fullgraph=True)))
        columns = set(zip(*attached.trace.rows().values(), strict=True))
    assert len(columns) == counted.graphs > 3


@pytest.mark.usefixtures("low_limit")
def test_beyond_the_limit_the_rest_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the limit stands, a warning says so, and what is not compiled gives the same."""
    monkeypatch.setattr(regions, "MOST_GRAPHS", 3)
    for text in (MANY, "match attention every 2 -> reuse residual\nmatch feedforward every 3 -> reuse residual"):
        expected = eager(text)
        model = TOY.build()
        with counting(), cachepolicy.apply(model, parse(text)):
            compiled = in_place(model, backend="eager")
            with pytest.warns(UserWarning, match="sets of decisions"):
                assert same(expected, run(compiled))
            assert same(expected, run(compiled))


def test_twenty_steps_of_every_policy_in_turn() -> None:
    """One model, one policy after another: every one gives what it gives uncompiled."""
    timesteps = [1000.0 - 50 * step for step in range(20)]
    model = in_place(TOY.build(), backend="eager")
    with counting():
        for case in STATIC.values():
            with cachepolicy.apply(model, parse(case.text)):
                assert same(eager(case.text, timesteps=timesteps), run(model, timesteps=timesteps))


# --- a real compiler -------------------------------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
@pytest.mark.parametrize("name", ["two periods", "predict", "a span's residual"])
def test_inductor_agrees(name: str, way: str) -> None:
    """Compiled to machine code: as many graphs, and the same up to rounding."""
    case = STATIC[name]
    expected = eager(case.text)
    with counting() as counted:
        model = TOY.build()
        with cachepolicy.apply(model, parse(case.text)):
            got = run(WAYS[way](model, fullgraph=True))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(expected, got, strict=True))
    assert (case.blocks if way == "block.compile()" else case.whole, 0) == (counted.graphs, counted.breaks)


# --- models of diffusers ---------------------------------------------------------------------------------


def _blocks_of(model: nn.Module) -> set[str]:
    return set(type(model)._repeated_blocks)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("policy", ["pab", "fbc"])
def test_repeated_blocks_of_diffusers_models(name: str, policy: str) -> None:
    """`compile_repeated_blocks(fullgraph=True)`: a graph for each kind of block and set of decisions inside it."""
    pytest.importorskip("diffusers")
    from tests.support import zoo

    options = {"spatial_range": (0, 1000)} if policy == "pab" else {"threshold": 10.0}

    def trajectory(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return list(zoo.trajectory(name, model, TIMESTEPS[:6]))

    model = zoo.build(name)
    with cachepolicy.apply(model, policy, **options):
        expected = trajectory(model)
    with counting() as bare:
        model = zoo.build(name)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        trajectory(model)
        unhooked = dynamo.utils.counters["stats"]["unique_graphs"]
    del bare
    with counting() as counted:
        model = zoo.build(name)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        with cachepolicy.apply(model, policy, **options) as attached:
            assert same(expected, trajectory(model))
            assert any("R" in row for row in attached.trace.rows().values())
    assert 0 == counted.breaks
    assert counted.graphs <= unhooked * (2 if policy == "pab" else 1)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_whole_diffusers_models(name: str) -> None:
    """`model.compile(fullgraph=True)` under PAB: a graph for each set of decisions, to the bit."""
    pytest.importorskip("diffusers")
    from tests.support import zoo

    def trajectory(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return list(zoo.trajectory(name, model, TIMESTEPS[:6]))

    model = zoo.build(name)
    with cachepolicy.apply(model, "pab", spatial_range=(0, 1000)):
        expected = trajectory(model)
    with counting() as counted:
        model = zoo.build(name)
        with cachepolicy.apply(model, "pab", spatial_range=(0, 1000)) as attached:
            assert same(expected, trajectory(in_place(model, backend="eager", fullgraph=True)))
            columns = set(zip(*attached.trace.rows().values(), strict=True))
    assert (len(columns), 0) == (counted.graphs, counted.breaks)


@pytest.mark.parametrize("way", ["model.compile()", "block.compile()"])
def test_autocast_that_comes_and_goes_is_seen_in_graphs(way: str) -> None:
    """A span whose first block is called with another dtype than it was kept from computes, as it does uncompiled."""
    text = "match blocks[1:] every 3 -> reuse residual"

    def going(model: Any) -> list[Tensor]:
        (x, y), got = inputs(TOY), list[Tensor]()
        with torch.no_grad():
            for step, t in enumerate(TIMESTEPS):
                with torch.autocast("cpu", torch.bfloat16, enabled=step % 6 < 2):
                    got.append(model(x, torch.tensor(t), y).float())
                x = x - 0.1 * got[-1]
        return got

    model = TOY.build()
    with cachepolicy.apply(model, parse(text)) as attached:
        expected, rows = going(model), attached.trace.rows()
    assert "CRCCRRCRCCRR" == rows["blocks[1:3]"]
    model = TOY.build()
    with counting(), cachepolicy.apply(model, parse(text)) as attached:
        compiled = WAYS[way](model, backend="eager")
        going(compiled)  # shows how the blocks go on
        assert same(expected, going(compiled))
        assert rows == attached.trace.rows()
