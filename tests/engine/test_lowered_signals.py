"""Lowered signals against the interpreter: the same numbers and the same remembered values at every step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.engine.lowered_signals import Measure
from cachepolicy.engine.signals import Measuring, Remembered, Signals, signals_of
from cachepolicy.engine.streams import Stream
from cachepolicy.language import ir
from cachepolicy.planning.schedule import Memory, Tick
from cachepolicy.planning.simulation import plan

EXPRESSIONS = (
    "l1(x, prev(x))", "relative_l1(x, kept(x))", "l2(prev(y), kept(y))", "kept(step) / (1 + l1(prev(y)))",
    "1 - cosine(x, kept(x, 2))", "l1(x - prev(x))", "l2(2 * prev(y) - kept(y), x)", "l1(cross(cond, x), x)",
    "cross(cond, l1(x, prev(x)))", "l1(x) / gap", "poly([1, -2, 0.5], l1(x, prev(x)))", "abs(l1(x) - kept(l1(y)))",
    "l1(x) if t < 500 else prev(l1(y))", "prev(l1(x)) + age * l2(y)", "clamp(l1(x, y), 0, 1) * sigma",
    "relative_l1(input(self), kept(input(self)))",
    "max(l1(x), t / 1000) if l1(y) > 1 else computes", "prev(prev(step)) + l1(x)",
)  # fmt: skip


class Interpreted(Signals):
    """Signals whose values are interpreted."""

    def measure(self, expression: ir.Expression) -> Measure:
        """Return a closure that interprets the expression."""
        return lambda measuring, site: measuring.value(expression, site)


@functools.cache
def both(first: str, second: str) -> tuple[Signals, Signals, int]:
    text = (
        f"signal x = input(model)\nsignal y = residual(blocks[0])\nsignal a = {first}\nsignal b = {second}\n"
        "signal c = a + prev(b)\nmatch each blocks[1:4] while a + b + c < 1 -> reuse"
    )
    bound = plan(cachepolicy.parse(text))
    signals = signals_of(bound)
    values = {field.name: getattr(signals, field.name) for field in dataclasses.fields(signals) if field.init}
    return signals, Interpreted(**values), len(bound.sites)


def told(value: Any) -> Any:
    """A value as something that can be compared; tensors by their numbers."""
    if isinstance(value, Stream):
        return repr(value.held.tolist())
    if isinstance(value, Mapping):
        return {key: told(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [told(each) for each in value]
    return repr(value)


_entries = st.floats(-2, 2, width=32) | st.sampled_from([math.nan, math.inf])
_tensors = st.lists(_entries, min_size=2, max_size=3).map(torch.tensor)
_ticks = st.builds(
    Tick,
    step=st.just(0),
    t=st.none() | st.floats(0, 1000),
    sigma=st.none() | st.floats(0, 1),
    branch=st.sampled_from(["", "cond", "uncond"]),
)


@given(st.sampled_from(EXPRESSIONS), st.sampled_from(EXPRESSIONS), st.lists(_ticks, min_size=2, max_size=5), st.data())
def test_lowered_signals_measure_as_the_interpreter(
    first: str, second: str, ticks: Sequence[Tick], data: st.DataObject
) -> None:
    """Tensors that are missing, of another shape, overwritten or not finite give the same numbers, defined or not."""
    *ways, sites = both(first, second)
    pasts = [{branch: Remembered() for branch in ("", "cond", "uncond")} for _ in ways]
    step = 0
    for drawn in ticks:
        step += data.draw(st.sampled_from([0, 1, 1, 1, 2]))
        tick = dataclasses.replace(drawn, step=step)
        memory = Memory(
            last=data.draw(st.none() | st.integers(0, step)), computes=step, gap=data.draw(st.none() | st.just(2))
        )
        tensors = {probe: data.draw(st.none() | _tensors) for probe in sorted(ways[0].probes, key=repr)}
        halves = data.draw(st.booleans()) and tick.branch == ""
        spoilt = data.draw(st.sampled_from([False, False, True]))
        computed = data.draw(st.lists(st.integers(0, sites - 1), unique=True))
        outcomes = list[Any]()
        for signals, past in zip(ways, pasts, strict=True):
            measuring = Measuring(
                signals, past[tick.branch], tick, memory_of=lambda _site, memory=memory: memory,
                others=past.get, undefined=frozenset(),
            )  # fmt: skip
            if halves:
                measuring.rows = 2
            mine = {probe: None if tensor is None else tensor.clone() for probe, tensor in tensors.items()}
            for probe, tensor in mine.items():
                if tensor is not None:
                    measuring.see(probe, tensor)
            if spoilt:
                for tensor in mine.values():
                    if tensor is not None:
                        tensor.add_(1)
                        break
            numbers = [measuring.numbers(site) for site in range(sites)]
            changed = measuring.finish(list(range(sites)), computed)
            now = past[tick.branch]
            outcomes.append([told(numbers), changed, told(now.previous), told(now.kept), told(now.crossed)])
        assert outcomes[0] == outcomes[1]
