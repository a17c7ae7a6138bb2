"""Scenes of several processes: each runs a list of checks, one after another, and says what failed where.

A scene is killed when it has not ended in time, so that a hang is a failure and no more.
"""

from __future__ import annotations

import importlib
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

HANG = 240.0
"""Seconds after which a scene is killed; on an idle machine none takes a fifth of it."""


def play(
    size: int, module: str, names: Sequence[str], *, timeout: float = 60.0, leaves: Sequence[int] = ()
) -> dict[str, str]:
    """Run the checks of a module on `size` processes that are joined by gloo; gives what failed, by check and rank.

    The ranks that the last check ends are in `leaves`.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Torch is imported once, by the server that all processes are forked from before they do anything.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        actors = [
            context.Process(target=_act, args=(rank, size, folder, module, tuple(names), timeout))
            for rank in range(size)
        ]
        for actor in actors:
            actor.start()
        end = time.monotonic() + HANG
        for actor in actors:
            actor.join(max(0.0, end - time.monotonic()))
        hung = [rank for rank, actor in enumerate(actors) if actor.is_alive()]
        for actor in actors:
            actor.kill()
            actor.join()
        failed = {f"rank {rank} hangs": _last(folder, rank) for rank in hung}
        for path in sorted(Path(folder).glob("failed-*")):
            failed |= pickle.loads(path.read_bytes())
        for rank in range(size):
            if not failed and _last(folder, rank) != (names[-1] if rank in leaves else "the end"):
                failed[f"rank {rank} ended"] = f"at {_last(folder, rank)}, exit code {actors[rank].exitcode}"
        return failed


def _last(folder: str, rank: int) -> str:
    path = Path(folder) / f"at-{rank}"
    return path.read_text() if path.exists() else "the start"


def _act(rank: int, size: int, folder: str, module: str, names: Sequence[str], timeout: float) -> None:
    torch.set_num_threads(1)
    checks = importlib.import_module(module)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    for name in names:
        (Path(folder) / f"at-{rank}").write_text(name)
        try:
            getattr(checks, name)(rank)
        except BaseException:  # noqa: BLE001 (whatever it is, it is told)
            (Path(folder) / f"failed-{rank}").write_bytes(pickle.dumps({f"{name} on {rank}": traceback.format_exc()}))
            os._exit(1)
    (Path(folder) / f"at-{rank}").write_text("the end")
    dist.destroy_process_group()


def gathered(value: Any, group: Any = None) -> list[Any]:
    """The values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
