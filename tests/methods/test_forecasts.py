"""Policies that forecast answer on the engine what the transcriptions of their methods do, step by step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from tests.methods import transcriptions as reference  # noqa: E402
from tests.methods.scripted import Scripted, letters, run  # noqa: E402
from tests.methods.test_policies import SEEDS  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:the policy can never"),
]


class FeedForward(nn.Sequential):
    """Gives the tensor of the present step."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.played: Tensor = torch.zeros(1)

    def forward(self, hidden_states: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return hidden_states * 0 + self.played


class Block(nn.Module):
    """Gives what its only module gives."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.ff(hidden_states)


class Played(nn.Module):
    """A root with one block whose output is given, step by step."""

    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.transformer_blocks = nn.ModuleList([block])
        self._played = [block.ff]  # a list, so that it is no second place of the module

    @property
    def feed_forward(self) -> FeedForward:
        """The module that gives what is played."""
        return self._played[0]

    def forward(self, hidden_states: Tensor, timestep: Any, height: int = 0, width: int = 0) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@torch.no_grad()
def play(policy: Any, stream: Sequence[Tensor], *, call: dict[str, Any] | None = None, **params: Any) -> Any:
    """Samples once. Returns the row of the only site that is no part of another, and the outputs."""
    model, steps = Played(), len(stream)
    outputs = list[Tensor]()
    with cachepolicy.apply(model, policy, steps=steps, **params) as applied:
        for step, tensor in enumerate(stream):
            model.feed_forward.played = tensor
            given = {"timestep": torch.tensor(999 - 999 * step / max(1, steps - 1)), **(call or {})}
            outputs.append(model(torch.zeros_like(tensor), **given))
        assert applied.trace is not None
        rows = applied.trace.rows()
    return next(iter(rows.values())), outputs


def walk(draw: random.Random, steps: int, *shape: int) -> list[Tensor]:
    """A smooth random stream."""
    made = torch.Generator().manual_seed(draw.randrange(2**31))
    value, slope = (torch.randn(shape, generator=made, dtype=torch.float64) for _ in range(2))
    stream = list[Tensor]()
    for _ in range(steps):
        slope = 0.7 * slope + 0.3 * torch.randn(shape, generator=made, dtype=torch.float64)
        value = value + 0.1 * slope
        stream.append(value)
    return stream


def elements(stream: Sequence[Tensor]) -> list[list[float]]:
    """For each number of the tensors, its values at all steps."""
    return [list(values) for values in zip(*(tensor.flatten().tolist() for tensor in stream), strict=True)]


@given(SEEDS)
def test_bdf2(seed: int) -> None:
    """FoCa's predictor, on TaylorSeer's schedule."""
    draw = random.Random(seed)
    steps, interval, first = draw.randint(4, 24), draw.randint(2, 6), draw.randint(0, 4)
    stream = walk(draw, steps, 1, 2, 2)
    computed = reference.taylorseer(steps, interval, max(first, 1))
    row, outputs = play("bdf2", stream, interval=interval, first=first)
    assert letters(computed) == row
    for true, found in zip(elements(stream), elements(outputs), strict=True):
        expected = [
            known if guess is None else guess
            for known, guess in zip(true, reference.bdf2_values(true, computed), strict=True)
        ]
        assert expected == pytest.approx(found, rel=1e-9, abs=1e-9)


@given(SEEDS)
def test_spectrum(seed: int) -> None:
    """Spectrum's growing window, and its forecast from the computed results so far."""
    draw = random.Random(seed)
    steps, order, first = draw.randint(8, 40), draw.randint(0, 4), draw.randint(2, 6)
    settings = {
        "window": draw.uniform(1, 4), "flex": draw.choice([0, 0.25, 0.5, 1]), "stop": draw.uniform(0.5, 1),
        "ridge": draw.uniform(0.05, 2), "mix": draw.uniform(0, 1), "results": max(order + 1, 6),
    }  # fmt: skip
    stream = walk(draw, steps, 1, 2, 2)
    computed = reference.spectrum_window(steps, settings["window"], settings["flex"], first, settings["stop"])
    row, outputs = play("spectrum", stream, order=order, first=first, **settings)
    assert letters(computed) == row
    for true, found in zip(elements(stream), elements(outputs), strict=True):
        history = list[tuple[float, float]]()
        for step, value in enumerate(true):
            place = 2 * step / steps - 1
            if computed[step]:
                history.append((place, value))
                expected = value
            else:
                kept = history[-settings["results"] :]
                expected = reference.chebyshev_value(kept, place, order, settings["ridge"], settings["mix"])
            assert expected == pytest.approx(found[step], rel=1e-6, abs=1e-6)


@given(SEEDS)
def test_freqca(seed: int) -> None:
    """FreqCa reuses the low frequencies of the tokens' grid, or of their sequence, and forecasts the high ones."""
    draw = random.Random(seed)
    steps, interval, first = draw.randint(4, 16), draw.randint(2, 6), draw.randint(1, 3)
    order, scale, cut = draw.randint(0, 2), draw.uniform(0.3, 1), draw.uniform(0, 0.9)
    transform, (height, width) = draw.choice(["dct", "fft"]), (draw.randint(1, 4), draw.randint(2, 4))
    stream = walk(draw, steps, 1, height * width, 1)
    computed = reference.taylorseer(steps, interval, first)
    row, outputs = play(
        "freqca", stream, call={"height": height, "width": width},
        interval=interval, first=first, order=order, scale=scale, cut=cut, transform=transform,
    )  # fmt: skip
    assert letters(computed) == row
    lows, highs = list[list[float]](), list[list[float]]()
    for tensor in stream:
        tokens = tensor.flatten().tolist()
        if transform == "dct":
            grid = [tokens[start : start + width] for start in range(0, len(tokens), width)]
            low, high = ([number for line in band for number in line] for band in reference.grid_bands(grid, cut))
        else:
            low, high = reference.fft_bands(tokens, cut)
        lows.append(low)
        highs.append(high)
    for low, high, true, found in zip(
        zip(*lows, strict=True), zip(*highs, strict=True), elements(stream), elements(outputs), strict=True
    ):
        forecasts, kept = reference.hermite_values(high, computed, order, scale), 0.0
        for step, forecast in enumerate(forecasts):
            kept = low[step] if computed[step] else kept
            expected = true[step] if forecast is None else kept + forecast
            assert expected == pytest.approx(found[step], rel=1e-6, abs=1e-6)


ALIGNED = """
param interval: int = 3
param low: float = 1
param high: float = 1.5
signal head = residual(blocks[0])
match blocks[1:] every interval -> predict align(probe: head, clip: [low, high]) of residual
"""


@given(SEEDS)
def test_align(seed: int) -> None:
    """DiCache moves the last residual along its last change, as far as the first block's residual has moved."""
    draw = random.Random(seed)
    steps, interval = draw.randint(4, 16), draw.randint(2, 5)
    low, high = sorted((draw.uniform(0, 2), draw.uniform(0, 2)))
    heads, tails = ([tensor.flatten().tolist() for tensor in walk(draw, steps, 1, 1, 4)] for _ in range(2))
    rows, outputs = run(
        Scripted([heads, tails]), cachepolicy.parse(ALIGNED), [[0.5] * 4] * steps, interval=interval, low=low, high=high
    )
    assert "".join("R" if step % interval else "C" for step in range(steps)) == next(iter(rows.values()))
    for step, output in enumerate(outputs):
        newest = step - step % interval
        before = max(0, newest - interval)
        tail = tails[newest]
        if step % interval and newest:
            scale = reference.align_scale(heads[step], heads[newest], heads[before], low, high)
            tail = [old + scale * (new - old) for new, old in zip(tails[newest], tails[before], strict=True)]
        expected = [0.5 + head + moved for head, moved in zip(heads[step], tail, strict=True)]
        assert expected == pytest.approx(output.flatten().tolist(), rel=1e-9, abs=1e-9)
