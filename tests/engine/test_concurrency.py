"""Many trajectories at once through one attached model: each is what it is alone, in threads, tasks and turns."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from benchmarks import concurrency
from benchmarks.concurrency import KINDS, Count, Setting, Way, tasks, threads, trajectory
from cachepolicy.engine.apply import run_of

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

SMALL = Setting(callers=4, trajectories=2, rounds=1)
PARTS = [SMALL.jobs(caller) for caller in range(SMALL.callers)]
OURS = [(kind, cache) for kind in sorted(KINDS) for cache in ("PAB", "FBC")]


def way(kind: str, cache: str) -> Way:
    found = next(each for each in concurrency.ways(KINDS[kind]) if each.name == f"ours, {cache}")
    found.run_alone(range(SMALL.total))
    return found


def count(found: Way, results: dict[int, list[Tensor] | None]) -> Count:
    counted = Count()
    concurrency.counted(found, results, counted)
    return counted


@pytest.mark.parametrize("at_once", [threads, tasks])
@pytest.mark.parametrize(("kind", "cache"), OURS)
def test_many_at_once_are_each_as_alone(kind: str, cache: str, at_once: Callable[..., Any]) -> None:
    """Callers with trajectories of several lengths, one after another, each to the last bit as alone."""
    found = way(kind, cache)
    bare = Way("bare", KINDS[kind], lambda _: None)
    bare.run_alone(range(SMALL.total))
    assert any(not torch.equal(bare.expected[number], got) for number, got in found.expected.items())
    assert Count(0, 0, SMALL.total) == count(found, at_once(found, PARTS))


@pytest.mark.parametrize(("kind", "cache"), OURS)
def test_steps_in_any_order_are_each_as_alone(kind: str, cache: str) -> None:
    """Steps of all trajectories in turn on one thread, each under its own key."""
    found = way(kind, cache)
    run = run_of(found.model)
    assert run is not None
    loops = {number: trajectory(found.model, found.kind, number) for number in range(SMALL.total)}
    got: dict[int, list[Tensor]] = {number: [] for number in loops}
    dice = random.Random(0)
    with torch.no_grad():
        while loops:
            number = dice.choice(sorted(loops))
            with run.session(number):
                done = list(itertools.islice(loops[number], 1))
            got[number] += done
            if not done:
                del loops[number]
    assert Count(0, 0, SMALL.total) == count(found, got)


def test_a_cancelled_task_leaves_the_others_alone() -> None:
    """Tasks that are cancelled between two steps change nothing for the rest."""
    found = way("toy", "FBC")

    async def one(number: int) -> list[Tensor]:
        got = []
        for prediction in trajectory(found.model, found.kind, number):
            got.append(prediction)
            await asyncio.sleep(0)
        return got

    async def most() -> list[object]:
        started = [asyncio.create_task(one(number)) for number in range(SMALL.total)]
        for _ in range(3):
            await asyncio.sleep(0)
        for each in started[::3]:
            each.cancel()
        return await asyncio.gather(*started, return_exceptions=True)

    with torch.no_grad():
        results = asyncio.run(most())
    for number, got in enumerate(results):
        if number % 3:
            assert torch.equal(found.expected[number], torch.stack(got))
        else:
            assert isinstance(got, asyncio.CancelledError)


def test_what_is_wrong_is_counted() -> None:
    """The benchmark tells a wrong result, one that raised, and a right one apart."""
    counted = Count()
    right = torch.ones(2, 3)
    for got in ([right[0], right[1]], [right[0], right[1] + 1], None):
        counted.add(right, got)
    assert Count(wrong=1, raised=1, total=3) == counted


def test_the_benchmark_prints_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """None of ours is wrong, and diffusers' are counted beside them."""
    concurrency.main(["--callers", "2", "--trajectories", "2", "--rounds", "1"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("ours")]
    assert 4 == len(rows)
    assert all(row.count("0 of 4") >= 2 for row in rows)
    assert 2 == sum(line.startswith("diffusers") for line in printed.splitlines())
