"""Processes played by threads: messages are added up in the order in which each sends them, as a process group does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cachepolicy.errors import PolicyError

PATIENCE = 5.0


class Exchange:
    """What goes between `size` threads: the n-th message of each is added to the n-th of the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.arrived: list[dict[int, list[float]]] = []
        self.changed = threading.Condition()

    def put(self, rank: int, place: int, numbers: Sequence[float]) -> None:
        with self.changed:
            while len(self.arrived) <= place:
                self.arrived.append({})
            self.arrived[place][rank] = list(numbers)
            self.changed.notify_all()

    def total(self, place: int) -> list[float]:
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.arrived[place]) == self.size, PATIENCE):
                raise PolicyError.of("E352", "a thread did not answer")
            messages = [message for _, message in sorted(self.arrived[place].items())]
        assert len({len(message) for message in messages}) == 1, "messages of different lengths"
        return torch.tensor(messages, dtype=torch.float64).sum(0).tolist()


class Thread:
    """One of the threads, with the face of `cachepolicy.engine.distributed.groups.Peers`."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.exchange = exchange
        self.rank = rank
        self.ranks = tuple(range(exchange.size))
        self.number = 0
        self.gone: set[int] = set()
        self.sent = 0

    def add(self, numbers: Sequence[float], subject: str) -> list[float]:
        place, self.sent = self.sent, self.sent + 1
        self.exchange.put(self.rank, place, numbers)
        return self.exchange.total(place)

    def post(self, numbers: Sequence[float]) -> None:
        place, self.sent = self.sent, self.sent + 1
        self.exchange.put(self.rank, place, numbers)


def together(size: int, work: Callable[[Thread], Any]) -> list[Any]:
    """What `work` gives or raises on each of `size` threads that share one exchange."""
    exchange = Exchange(size)
    peers = [Thread(exchange, rank) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, each) for each in peers]
        errors = [future.exception() for future in futures]
        return [error if error is not None else future.result() for error, future in zip(errors, futures, strict=True)]
