"""What a policy costs where it saves nothing, counted instead of timed: reads, Python calls and allocations."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cachepolicy
from cachepolicy.engine.introspection import describe
from cachepolicy.language.linker import resolve
from cachepolicy.planning.bind import bind

STATIC = 'match "^blocks.[0-9]+$" every 1000 -> reuse'
FIRST_BLOCK = """
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= 1e9 -> reuse residual
"""


class Block(nn.Module):
    """A block that adds a little."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 1.01


class Stack(nn.Module):
    """Blocks in a row."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
        del timestep
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Reads(TorchDispatchMode):
    """Counts the operations that wait for the device of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "equal.default", "is_nonzero", "_to_copy", "copy_")
        self.count += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


def calls_of(work: Callable[[], object]) -> int:
    """The number of Python functions that are called."""
    count = 0

    def count_call(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    gc.collect()
    gc.disable()
    sys.setprofile(count_call)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def steps(policy: str, blocks: int, **options: Any) -> tuple[cachepolicy.Run, Callable[[int], object]]:
    """A model under a policy, and a function that runs a step of it. The first step has run."""
    model, latents = Stack(blocks), torch.ones(1, 8, 4)
    run = cachepolicy.apply(model, cachepolicy.parse(policy), **options)

    def step(number: int) -> object:
        with torch.no_grad():
            return model(latents, 1000.0 - number)

    step(0)
    return run, step


def calls_per_step(policy: str, blocks: int) -> int:
    """The number of Python functions that one step calls, after trajectories that have filled all caches."""
    run, step = steps(policy, blocks)
    with run:
        for number in [*range(1, 5), *range(5), *range(4)]:
            step(number)
        return calls_of(lambda: step(4))


def bare_calls(blocks: int) -> int:
    """The number of Python functions that one step of the bare model calls."""
    model = Stack(blocks)
    with torch.no_grad():
        return calls_of(lambda: model(torch.ones(1, 8, 4), 1000.0))


def test_a_policy_of_the_clock_reads_no_tensor() -> None:
    """Neither hits nor misses of a policy that depends on the clock only wait for a device."""
    for policy in (STATIC, STATIC.replace("1000", "2")):
        run, step = steps(policy, 4)
        with run, Reads() as reads:
            for number in range(1, 6):
                step(number)
        assert 0 == reads.count


def test_a_decision_on_a_signal_reads_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision waits for the device once. The check that answers are finite reads tensors of the CPU only."""
    monkeypatch.setattr("cachepolicy.engine.span_run.is_finite", lambda _: True)
    run, step = steps(FIRST_BLOCK, 6)
    with run, Reads() as reads:
        for number in range(1, 6):
            step(number)
    assert 5 == reads.count


def test_sites_that_read_one_number_share_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is equal for several sites is read from the device once in a forward pass."""
    monkeypatch.setattr("cachepolicy.engine.span_run.is_finite", lambda _: True)
    run, step = steps(FIRST_BLOCK.replace("blocks[1:] while", "each blocks[1:] while"), 6)
    with run, Reads() as reads:
        for number in range(1, 6):
            step(number)
    assert 5 == reads.count


def test_a_hit_costs_less_than_the_call_it_saves() -> None:
    """A hit calls the hook and one function of torch, and a root call has a bound of its own."""
    few, many = calls_per_step(STATIC, 10), calls_per_step(STATIC, 30)
    assert 2 * 20 >= many - few
    assert 95 >= few - 2 * 10


def test_a_block_inside_an_answering_span_passes_its_inputs_through() -> None:
    """An inner block calls the hook, one function of torch and the passage. A decision has a bound of its own."""
    few, many = calls_per_step(FIRST_BLOCK, 10), calls_per_step(FIRST_BLOCK, 30)
    assert 4 * 20 >= many - few
    assert 250 >= few - 4 * 10


def test_a_miss_of_a_span_has_a_bound_for_each_block() -> None:
    """A block of a span that computes again costs a few calls above the bare block."""
    miss = FIRST_BLOCK.replace("1e9", "-1")
    few, many = calls_per_step(miss, 10), calls_per_step(miss, 30)
    assert 13 * 20 >= many - few - (bare_calls(30) - bare_calls(10))


@pytest.mark.parametrize("policy", [STATIC, FIRST_BLOCK])
def test_steps_leave_no_objects(policy: str) -> None:
    """Without a trace, a step that hits keeps nothing of the step before."""
    model, latents = Stack(6), torch.ones(1, 8, 4)
    with torch.no_grad(), cachepolicy.apply(model, cachepolicy.parse(policy), trace=False, timestep=lambda: 500.0):
        for _ in range(50):
            model(latents, 500.0)
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(100):
            model(latents, 500.0)
        gc.collect()
        assert 100 > sys.getallocatedblocks() - before


def grown(work: Callable[[int], Callable[[], object]], sizes: Sequence[int]) -> float:
    """How many times more functions are called for twice the size."""
    small, large = (calls_of(work(size)) for size in sizes)
    return large / small


def many_rules(rules: int) -> str:
    """Rules that take a tenth of the blocks each, and a last one that takes all."""
    lines = [f'match "blocks.[0-9]*{number % 10}$" when step == {number} -> reuse' for number in range(rules - 1)]
    return "\n".join([*lines, STATIC.replace("1000", "2")])


def _bound(sites: int, rules: int = 20) -> Callable[[], object]:
    policy, skeleton = resolve(cachepolicy.parse(many_rules(rules)), {}), describe(Stack(sites))
    return lambda: bind(policy, skeleton)


def _attached(sites: int, rules: int = 20) -> Callable[[], object]:
    model, policy = Stack(sites), cachepolicy.parse(many_rules(rules))

    def attach() -> None:
        cachepolicy.apply(model, policy, memory_limit=10**9).remove()

    return attach


def _traced(sites: int) -> Callable[[], object]:
    run, step = steps(STATIC.replace("1000", "2"), sites)
    for number in range(1, 6):
        step(number)

    def read() -> object:
        assert run.trace is not None
        return run.trace.to_json(), str(run.trace)

    return read


def _stepped(count: int) -> Callable[[], object]:
    run, step = steps(STATIC.replace("1000", "3"), 3)

    def work() -> None:
        for number in range(1, count):
            step(number)
        run.report()

    return work


@pytest.mark.parametrize(
    ("work", "sizes"),
    [(_bound, (200, 400)), (_attached, (200, 400)), (_traced, (200, 400)), (_stepped, (60, 120))],
)
def test_costs_grow_linearly(work: Callable[[int], Callable[[], object]], sizes: Sequence[int]) -> None:
    """Binding, attaching, reading a trace and running steps call twice the functions for twice the size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work(10)()  # imports and caches
        assert 2.3 > grown(work, sizes)


EACH = "match each blocks[1:] while drift <= {limit} -> reuse"
GROWING = {
    "facts": 'match "^blocks.[0-9]+$" every 2 -> reuse\nmatch "inner" every 3 -> reuse',
    "one signal": FIRST_BLOCK.split("match", maxsplit=1)[0] + EACH.format(limit="1e9"),
    "own signals": "signal drift = relative_l1(input(self), prev(input(self)))\n" + EACH.format(limit="0.5"),
    "accumulators": FIRST_BLOCK.split("match", maxsplit=1)[0] + EACH.format(limit="1e9").replace("drift", "sum(drift)"),
    "predictions": "match each blocks every 3 -> predict taylor(order: 2)",
    "spans": FIRST_BLOCK.replace("1e9", "-1"),
}


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("limit", [None, 1000])
def test_a_call_of_the_root_model_grows_linearly(name: str, limit: int | None) -> None:
    """Twice the blocks take twice the functions, also where sites have facts and where the memory does not suffice."""

    def work(blocks: int) -> Callable[[], object]:
        _, step = steps(GROWING[name], blocks, memory_limit=limit)

        def several() -> None:
            for number in range(1, 8):
                step(number)

        return several

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work(10)()
        assert 2.3 > grown(work, (60, 120))


@pytest.mark.deep
@pytest.mark.parametrize("work", [_bound, _attached, _traced, _stepped])
def test_costs_grow_linearly_up_to_ten_thousand(work: Callable[..., Callable[[], object]]) -> None:
    """The same for 10,000 sites, with 100 rules where the rules matter, and for 1,000 steps."""
    sizes = (500, 1000) if work is _stepped else (5000, 10_000)
    scaled = (lambda size: work(size, 100)) if work in (_bound, _attached) else work
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work(10)()
        assert 2.3 > grown(scaled, sizes)
