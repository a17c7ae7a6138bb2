"""Count the floating-point operations of a model, in all and by module, while it really runs.

The counts are torch's own (`torch.utils.flop_counter`): matrix products, convolutions and attention, two operations a
multiply-add; element-wise work is left out. A module that a policy answered has not run and counts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(slots=True)
class Flops:
    """FLOPs in `total`, by module (`modules`: what ran inside it, children included), and how often each ran.

    `outputs` are the bytes of each tensor that a module gave when it first ran.
    """

    total: int = 0
    modules: Counter[str] = field(default_factory=Counter[str])
    calls: Counter[str] = field(default_factory=Counter[str])
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


def count(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Flops:
    """The FLOPs of one forward of the model with these arguments; on the meta device nothing is computed."""
    with torch.no_grad(), counting(model) as flops:
        model(*args, **kwargs)
    return flops


@contextmanager
def counting(model: torch.nn.Module) -> Generator[Flops]:
    """Count everything that runs inside the `with`; `total` is complete when it ends.

    Modules are told by their names in `model`. Slower than a plain run by the cost of a Python call an operation.
    """
    flops = Flops()
    with FlopCounterMode(display=False, custom_mapping=dict(_MISSING)) as counter, _by_module(model, flops, counter):
        yield flops
    flops.total = counter.get_total_flops()


@contextmanager
def _by_module(model: torch.nn.Module, flops: Flops, counter: FlopCounterMode) -> Generator[None]:
    """Read the counter before and after each module; hooks on all modules see those that swapped their class too."""
    names: dict[torch.nn.Module, str] = {module: name for name, module in model.named_modules()}  # pyright: ignore[reportUnknownVariableType]
    started = list[int]()

    def enter(module: torch.nn.Module, _args: object) -> None:
        if module in names:
            started.append(counter.get_total_flops())

    def leave(module: torch.nn.Module, _args: object, output: object) -> None:
        if module in names:
            given = tuple(each.nbytes for each in tree_leaves(output) if isinstance(each, torch.Tensor))
            flops.outputs.setdefault(names[module], given)
            flops.modules[names[module]] += counter.get_total_flops() - started.pop()
            flops.calls[names[module]] += 1

    with ExitStack() as stack:
        stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
        stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
        yield


def _attention(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    """Two products a head: queries with keys, weights with values. The arguments arrive as shapes."""
    *batch, queries, width = query
    heads = 1
    for size in batch:
        heads *= size
    return 2 * heads * queries * key[-2] * (width + value[-1])


# The attention kernel that CPUs run has no formula in torch, so that attention would count as nothing there.
_MISSING: Mapping[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # noqa: SLF001
