"""Models whose weights are spread over processes, by FSDP2, DDP and tensor parallelism, under a policy."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, inputs, sample

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0)
TOY = Toy(blocks=4)
TEXTS = {
    "attention": "match attention every 2 -> reuse",
    "some blocks": 'match "^blocks.[02]$" every 2 -> reuse',
    "span": "match blocks[1:] every 2 -> reuse residual",
    "model": "match model every 3 -> reuse",
    "decided inside": (
        'signal inner = input("^blocks.0.attn$")\nsignal change = relative_l1(inner, prev(inner))\n'
        "match blocks while sum(change) < 0.3 -> reuse residual"
    ),
}
SECONDS = 240
"""After so long a test fails rather than waits."""


@torch.no_grad()
def run(model: nn.Module) -> list[Tensor]:
    x, y = inputs(TOY)
    return list(sample(model, TIMESTEPS, x, y))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def wanted(text: str) -> list[Tensor]:
    model = TOY.build()
    with cachepolicy.apply(model, parse(text)):
        return run(model)


def test_sharded_models_run_under_a_policy(tmp_path: Path) -> None:
    """Two processes: with the policy put on before or after, taken off and put on again, outputs are the same bits."""
    context = multiprocessing.spawn(_work, args=(2, str(tmp_path)), nprocs=2, join=False)
    try:
        finished = context.join(timeout=SECONDS)
        while not finished and any(process.is_alive() for process in context.processes):
            finished = context.join(timeout=SECONDS)
            assert finished, "the processes did not come to an end"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {} == {name: result for name, result in found.items() if result is not True}
        assert 2 * len(TEXTS) + 6 == len(found)


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        found = dict[str, Any]()
        for name, text in TEXTS.items():
            for first in ("put", "apply"):
                found[f"fsdp, {name}, {first}"] = _fsdp(text, first)
        found["gathered only where it computes"] = _gathers()
        found["ddp"] = _ddp()
        for first, leaf in itertools.product(("put", "apply"), (False, True)):
            found[f"tensor parallel, {first}, {leaf}"] = _tensor_parallel(first, leaf=leaf)
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _sharded(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return all(isinstance(each, DTensor) for block in model.blocks for each in block.parameters())


def _fsdp(text: str, first: str) -> bool | str:
    model = TOY.build()
    bare, expected = run(model), wanted(text)
    if first == "put":
        _shard(model)
        attached = cachepolicy.apply(model, parse(text))
    else:
        attached = cachepolicy.apply(model, parse(text))
        _shard(model)
    for number in range(2):
        if not same(expected, run(model)):
            return f"run {number} differs"
        if not _sharded(model):
            return "weights stayed gathered"
    attached.remove()
    if not same(bare, run(model)):
        return "the bare model differs"
    with cachepolicy.apply(model, parse(text)):
        if not same(expected, run(model)):
            return "after it was put on again it differs"
    return same(bare, run(model)) or "at last the bare model differs"


def _gathers() -> bool | str:
    """Of four blocks two are answered at every second step, and not gathered then; the root stays gathered."""
    model, gathers = _shard(TOY.build()), _Gathers()
    with cachepolicy.apply(model, parse(TEXTS["some blocks"])), gathers:
        run(model)
    return gathers.count == 1 + 3 * 4 + 3 * 2 or f"{gathers.count} gathers"


class _Gathers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def _ddp() -> bool | str:
    from torch.nn.parallel import DistributedDataParallel

    expected = wanted(TEXTS["attention"])
    model = DistributedDataParallel(TOY.build())
    with cachepolicy.apply(model.module, parse(TEXTS["attention"])):
        if not same(expected, run(model)):
            return "applied to the wrapped module it differs"
    inner = TOY.build()
    with cachepolicy.apply(inner, parse(TEXTS["attention"])):
        return same(expected, run(DistributedDataParallel(inner))) or "wrapped later it differs"


def _tensor_parallel(first: str, *, leaf: bool) -> bool | str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    text = 'match "ff.up$" every 2 -> reuse' if leaf else "match feedforward every 2 -> reuse"
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def split(model: nn.Module) -> None:
        for block in model.blocks:
            parallelize_module(block.ff, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    model = TOY.build()
    if first == "put":
        split(model)
    with cachepolicy.apply(model, parse(text)) as attached:
        if first == "apply":
            split(model)
        got = run(model)
        if not same(got, run(model)):
            return "the second run differs"
        row = attached.trace.rows()["blocks.0.ff.up" if leaf else "blocks.0.ff"]
    if row != "CRCRCR":
        return row
    twin = TOY.build()
    split(twin)
    if not same(run(twin), run(model)):
        return "the bare model differs"
    return all(map(torch.allclose, wanted(text), got)) or "it differs from the model in one piece"
