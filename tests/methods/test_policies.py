"""Policy files of published methods decide and answer on the engine what their transcriptions do."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import cachepolicy  # noqa: E402
from tests.methods import transcriptions as reference  # noqa: E402
from tests.methods.scripted import Scripted, letters, run  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:the policy can never"),
]

Stream = list[list[float]]
SEEDS = st.integers(0, 2**32 - 1)


class Draw:
    """Random streams of one trajectory: smooth with a jump now and then, so that both verdicts occur."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.steps = self.random.randint(4, 24)

    def stream(self, rate: float = 0.15) -> Stream:
        value = [self.random.uniform(0.5, 2) * self.random.choice([-1, 1]) for _ in range(4)]
        vectors = list[list[float]]()
        for _ in range(self.steps):
            factor = self.random.choice([rate, rate, rate / 10, 3 * rate])
            value = [number * (1 + self.random.uniform(-factor, factor)) for number in value]
            vectors.append(value)
        return vectors


def row(model: Scripted, policy: str, inputs: Stream, **params: Any) -> str:
    rows, _ = run(model, policy, inputs, **params)
    (only,) = set(rows.values())
    return only


def zeros(steps: int) -> Stream:
    return [[1.0, 1.0, 1.0, 1.0]] * steps


@given(SEEDS)
def test_fbc(seed: int) -> None:
    """First Block Cache compares the first block's residual with that of the last computed step."""
    draw = Draw(seed)
    heads, threshold = draw.stream(), draw.random.uniform(0.01, 0.4)
    model = Scripted([heads, draw.stream()])
    assert letters(reference.first_block_cache(heads, threshold)) == row(
        model, "fbc", zeros(draw.steps), threshold=threshold
    )


@given(SEEDS)
def test_fbc_within_bounds(seed: int) -> None:
    """The warm-up, the limit in a row and the window of First Block Cache's ports."""
    draw = Draw(seed)
    heads, threshold = draw.stream(), draw.random.uniform(0.1, 0.6)
    ends = sorted((draw.random.uniform(0, 1), draw.random.uniform(0, 1)))
    warmup, streak, window = draw.random.randint(0, 5), draw.random.randint(1, 4), (ends[0], ends[1])
    expected = reference.first_block_cache(heads, threshold, warmup=warmup, streak=streak, window=window)
    params = {"threshold": threshold, "warmup": warmup, "streak": streak, "window": window}
    assert letters(expected) == row(Scripted([heads, draw.stream()]), "fbc", zeros(draw.steps), **params)


@given(SEEDS)
def test_seacache(seed: int) -> None:
    """SeaCache adds up the changes of its filtered probe since the previous step, within its bounds."""
    draw = Draw(seed)
    probes, threshold = draw.stream(), draw.random.uniform(0.02, 0.6)
    first, last, streak = draw.random.randint(1, 3), draw.random.randint(0, 3), draw.random.choice([None, 1, 2])
    changes = [0.0, *(reference.relative_l1(new, old) for old, new in pairwise(probes))]
    expected = reference.seacache(probes, threshold, retention=first, end=last, streak=streak)
    assert letters(expected) == schedule(
        "seacache",
        "blocks",
        draw.steps,
        signals={"change": changes},
        threshold=threshold,
        first=first,
        last=last,
        streak=streak,
    )


@given(SEEDS)
def test_dbprune(seed: int) -> None:
    """DBPrune decides for a block by its own input."""
    draw = Draw(seed)
    streams, inputs = [draw.stream() for _ in range(4)], draw.stream()
    warmup, threshold = draw.random.randint(0, 6), draw.random.uniform(0.01, 0.4)
    (expected,) = reference.dbprune([totals(inputs, *streams[:2])], threshold, warmup)
    params = {"first": 2, "end": 3, "warmup": warmup, "threshold": threshold}
    assert letters(expected) == row(Scripted(streams), "dbprune", inputs, **params)


@given(SEEDS)
def test_foresight(seed: int) -> None:
    """Foresight compares the change of a block's output with that at the end of the warm-up."""
    draw = Draw(seed)
    streams, inputs = [draw.stream(), draw.stream()], draw.stream()
    gamma, warmup, interval = draw.random.uniform(0.2, 3), draw.random.randint(2, 6), draw.random.randint(2, 4)
    expected = reference.foresight([totals(inputs, streams[0])], gamma, warmup, interval)[0]
    rows, _ = run(Scripted(streams), "foresight", inputs, gamma=gamma, warmup=warmup, interval=interval)
    assert letters(expected) == rows["transformer_blocks.0"]


@given(SEEDS)
def test_bwcache(seed: int) -> None:
    """BWCache compares the outputs of all blocks at the last two computed steps."""
    draw = Draw(seed)
    streams, inputs = [draw.stream(), draw.stream()], draw.stream()
    threshold, first, interval = draw.random.uniform(0.02, 0.4), draw.random.randint(2, 5), draw.random.randint(2, 5)
    outputs = [totals(inputs, streams[0]), totals(inputs, *streams)]
    params = {"threshold": threshold, "first": first, "interval": interval}
    # Each block decides, all by the same number.
    assert letters(reference.bwcache(outputs, threshold, first, interval)) == row(
        Scripted(streams), "bwcache", inputs, **params
    )


@given(SEEDS)
def test_teacache(seed: int) -> None:
    """TeaCache adds up the rescaled changes of the modulated input since the previous step."""
    draw = Draw(seed)
    probes, threshold = draw.stream(), draw.random.uniform(0.02, 0.6)
    coefficients = [draw.random.uniform(-2, 2), draw.random.uniform(-1, 2), draw.random.uniform(-0.01, 0.03)]
    model = Scripted([draw.stream(), draw.stream()], probes)
    assert letters(reference.teacache(probes, coefficients, threshold)) == row(
        model, "teacache", zeros(draw.steps), threshold=threshold, coefficients=coefficients
    )


@given(SEEDS)
def test_magcache(seed: int) -> None:
    """MagCache bounds the sum of the distances of the ratios' product from 1, and the reuses in a row."""
    draw = Draw(seed)
    ratios = [draw.random.uniform(0.93, 1.02) for _ in range(draw.steps)]
    threshold, skips, retention = draw.random.uniform(0, 0.3), draw.random.randint(1, 5), draw.random.uniform(0, 0.5)
    model = Scripted([draw.stream(), draw.stream()])
    assert letters(reference.magcache(ratios, threshold, skips, retention)) == row(
        model, "magcache", zeros(draw.steps), threshold=threshold, skips=skips, retention=retention, ratios=ratios
    )


@given(SEEDS)
def test_dbcache(seed: int) -> None:
    """DBCache compares the residual of the first blocks, within its warm-up, mask and bounds."""
    draw = Draw(seed)
    streams = [draw.stream() for _ in range(4)]
    heads = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(*streams[:2], strict=True)]
    warmup, threshold = draw.random.randint(0, 6), draw.random.uniform(0.01, 0.4)
    streak, most = draw.random.choice([None, 1, 3]), draw.random.choice([None, 2, 5])
    mask = draw.random.choice([None, "".join(draw.random.choice("01") for _ in range(draw.steps))])
    expected = reference.dbcache(
        heads,
        threshold,
        warmup=warmup,
        streak=-1 if streak is None else streak,
        most=-1 if most is None else most,
        mask=mask,
    )
    settings = {"warmup": warmup, "threshold": threshold, "streak": streak, "most": most, "steps_mask": mask}
    assert letters(expected) == row(Scripted(streams), "dbcache", zeros(draw.steps), first=2, end=-1, **settings)


def totals(inputs: Stream, *residuals: Stream) -> Stream:
    return [
        [sum(numbers) for numbers in zip(*vectors, strict=True)] for vectors in zip(inputs, *residuals, strict=True)
    ]


@given(SEEDS)
def test_easycache(seed: int) -> None:
    """EasyCache adds up the input's changes since the previous step, times the rate between the last two computes."""
    draw = Draw(seed)
    inputs, streams = draw.stream(), [draw.stream(), draw.stream()]
    threshold, first = draw.random.uniform(0.02, 1), draw.random.randint(0, 5)
    assert letters(reference.easycache(inputs, totals(inputs, *streams), threshold, first)) == row(
        Scripted(streams), "easycache", inputs, threshold=threshold, first=first
    )


def schedule(policy: str, sites: str, steps: int, **params: Any) -> str:
    """The row of the sites of a kind in a simulation without a model."""
    rows = cachepolicy.simulate(policy, steps=steps, **params).rows
    (only,) = {row for name, row in rows.items() if sites in name}
    return only


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 6), st.integers(0, 4))
def test_taylorseer(steps: int, interval: int, first: int, order: int) -> None:
    """TaylorSeer, its lite form and HiCache count from the last computed step; diffusers counts from the warm-up."""
    expected = letters(reference.taylorseer(steps, interval, max(first, 1)))
    params = {"interval": interval, "first": first, "order": order}
    assert expected == schedule("taylorseer", "attn", steps, **params)
    assert expected == schedule("taylorseer_lite", "blocks", steps, **params)
    assert expected == schedule("hicache", "attn", steps, **params)
    theirs = reference.taylorseer_diffusers(steps, interval, max(first, 1))
    if first:
        assert letters(theirs) == schedule("taylorseer", "attn", steps, diffusers=True, **params)


@given(st.integers(2, 40), st.integers(1, 6), st.floats(0, 1))
def test_schedules_by_stage(steps: int, interval: int, share: float) -> None:
    """Delta-DiT and BlockDance cache some blocks in one stage of the trajectory."""
    front, rear = reference.delta_dit(steps, interval, share)
    params = {"split": 1, "boundary": share, "interval": interval}
    assert letters(front) == schedule("delta_dit", "blocks.0", steps, **params)
    assert letters(rear) == schedule("delta_dit", "[1:8]", steps, **params)
    danced = reference.blockdance(steps, interval, share)
    assert letters(danced) == schedule("blockdance", "blocks.0", steps, depth=1, begin=share, interval=interval)


@given(SEEDS)
def test_adacache(seed: int) -> None:
    """AdaCache sets the distance to the next computed step by the change per step since the one before."""
    draw = Draw(seed)
    streams = [draw.stream(), draw.stream()]
    limits = sorted(draw.random.uniform(0.001, 0.3) for _ in range(5))
    rates = sorted((draw.random.randint(1, 8) for _ in range(6)), reverse=True)
    codebook = [*zip(limits, rates, strict=False), (float("inf"), rates[-1])]
    expected = letters(reference.adacache(streams[1], codebook))
    settings = {"limits": limits, "rates": rates, "probe": 1}
    assert expected == row(Scripted(streams), "adacache", zeros(draw.steps), **settings)
