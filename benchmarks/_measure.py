"""Interleaved timing: what is compared runs in turn, many times over, so that a busy machine slows all of it alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of a number over all rounds, and its quartiles."""

    low: float
    median: float
    high: float

    def __format__(self, places: str) -> str:
        places = places or ".2f"
        return f"{self.median:{places}} [{self.low:{places}} {self.high:{places}}]"


def spread(numbers: Sequence[float]) -> Spread:
    """Median and quartiles; of a single number, that number; of none, nan."""
    if not numbers:
        return Spread(math.nan, math.nan, math.nan)
    if len(numbers) == 1:
        return Spread(numbers[0], numbers[0], numbers[0])
    return Spread(*statistics.quantiles(numbers, n=4, method="inclusive"))


@dataclass(frozen=True, slots=True)
class Taken:
    """What one piece of work took: seconds on the wall, and seconds of this process."""

    wall: float
    cpu: float

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.wall + other.wall, self.cpu + other.cpu)


NOTHING = Taken(0.0, 0.0)


def timed(work: Callable[[], T]) -> tuple[Taken, T]:
    """Run the work once; what it took, and what it gave."""
    wall, cpu = time.perf_counter(), time.process_time()
    given = work()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu), given


def rounds(ways: Mapping[str, Callable[[], float]], number: int, *, seed: int = 0) -> list[dict[str, float]]:
    """What each way measured, round by round; every round has an order of its own."""
    order, shuffle = list(ways), random.Random(seed).shuffle
    measured = list[dict[str, float]]()
    for _ in range(number):
        shuffle(order)
        measured.append({way: ways[way]() for way in order})
    return measured


def over(measured: Sequence[Mapping[str, float]], number: Callable[[Mapping[str, float]], float]) -> Spread:
    """A number that is made within each round, over all rounds."""
    return spread([number(each) for each in measured])


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """Rows under a title and column heads, the numbers aligned."""
    texts = {name: [f"{cell}" for cell in cells] for name, cells in rows.items()}
    widths = [max(len(head), *(len(cells[i]) for cells in texts.values())) for i, head in enumerate(columns)]
    first = max(len(name) for name in (title, *texts))
    lines = [title.ljust(first) + "".join(f"  {head:>{width}}" for head, width in zip(columns, widths, strict=True))]
    for name, cells in texts.items():
        lines.append(
            name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        )
    return "\n".join(lines)


def one_thread() -> None:
    """One thread and one seed: what is compared is overhead, not how well a machine is shared."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
