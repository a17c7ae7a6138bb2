"""What a decision costs that several processes make as one, next to a block of the model and to deciding alone."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks._measure import one_thread, over, rounds, table, timed
from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.groups import peers_of
from cachepolicy.engine.distributed.norms import numbers_of, share
from cachepolicy.testing.models import Block, Toy


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the processes, measure in each, print what the first one measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of each process")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=30)
    told = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_work, (told, folder), told.processes, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]
        print(Path(folder, "table").read_text(), end="")


def _work(rank: int, told: Any, folder: str) -> None:
    one_thread()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=told.processes)
    with torch.no_grad():
        ways = _ways(told)
        for way in ways.values():
            way()
        measured = rounds({name: _together(way) for name, way in ways.items()}, told.rounds)
    if rank == 0:
        block = "one block"
        rows = {
            name: [
                over(measured, lambda each, name=name: 1000 * each[name]),
                f"{over(measured, lambda each, name=name: 100 * each[name] / each[block]):.2f}",
            ]
            for name in ways
        }
        title = f"{told.processes} processes, {told.tokens} tokens of width {told.width} each"
        Path(folder, "table").write_text(table(title, ["ms", "% of a block"], rows) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def _together(way: Callable[[], object]) -> Callable[[], float]:
    """Seconds of the work, begun by all processes at once: waiting for a late one is no part of a decision."""

    def seconds() -> float:
        dist.barrier()
        return timed(way)[0].wall

    return seconds


def _ways(told: Any) -> dict[str, Callable[[], object]]:
    toy = Toy(width=told.width)
    block = Block(toy)
    x, before = (torch.randn(1, told.tokens, told.width) for _ in range(2))
    context, step = torch.randn(1, 1, told.width), torch.randn(1, told.width)
    peers = peers_of(dist.group.WORLD, block)
    assert peers is not None
    agreement = Agreement(peers, "")

    def alone() -> float:
        return ((x - before).abs().mean() / before.abs().mean()).item()

    def mine() -> Any:
        return share("relative_l1", x, before, by_sample=False)

    return {
        "one block": lambda: block(x, context, step),
        "deciding alone: the norm of one process": alone,
        "deciding as one: this process' share": lambda: numbers_of([mine()]),
        "deciding as one: the message": lambda: agreement.settle("", [], refuses=False),
        "deciding as one, in all": lambda: agreement.settle("", [("relative_l1", mine())], refuses=False),
    }


if __name__ == "__main__":
    main()
