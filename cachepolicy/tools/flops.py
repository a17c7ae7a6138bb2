"""Count the floating-point operations of a model that runs, in total and by module.

The counts come from `torch.utils.flop_counter`: matrix products, convolutions and attention, with two operations for a
multiply-add and without element-wise operations. A module that a policy answers does not run and counts nothing.
"""

from __future__ import annotations

import math
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
    """The counts of one or more forward passes. Modules are keyed by their names in the model.

    Attributes:
        total: All FLOPs.
        modules: The FLOPs inside each module, children included.
        calls: The number of times that each module ran.
        outputs: The bytes of each tensor that a module returned when it first ran.
    """

    total: int = 0
    modules: Counter[str] = field(default_factory=Counter[str])
    calls: Counter[str] = field(default_factory=Counter[str])
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


def count(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Flops:
    """Count the FLOPs of one forward pass.

    Args:
        model: The model. On the meta device nothing is computed.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The counts.
    """
    with torch.no_grad(), counting(model) as flops:
        model(*args, **kwargs)
    return flops


@contextmanager
def counting(model: torch.nn.Module) -> Generator[Flops]:
    """Count all operations inside the `with` block. Each operation takes one more Python call.

    Args:
        model: The model whose modules are counted.

    Yields:
        The counts. `total` is set at the end of the block.
    """
    flops = Flops()
    with FlopCounterMode(display=False, custom_mapping=dict(_MISSING)) as counter, _by_module(model, flops, counter):
        yield flops
    flops.total = counter.get_total_flops()


@contextmanager
def _by_module(model: torch.nn.Module, flops: Flops, counter: FlopCounterMode) -> Generator[None]:
    """Read the counter before and after each module.

    The hooks are global. Hooks of a single module would not run for a site whose class was swapped by a policy.
    """
    names: dict[torch.nn.Module, str] = {module: name for name, module in model.named_modules()}  # pyright: ignore[reportUnknownVariableType]
    started = list[int]()

    def enter(module: torch.nn.Module, _args: object) -> None:
        if module in names:
            started.append(counter.get_total_flops())

    def leave(module: torch.nn.Module, _args: object, output: object) -> None:
        if module in names:
            sizes = tuple(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
            flops.outputs.setdefault(names[module], sizes)
            flops.modules[names[module]] += counter.get_total_flops() - started.pop()
            flops.calls[names[module]] += 1

    with ExitStack() as stack:
        stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
        stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
        yield


def _attention(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    """Return the FLOPs of two matrix products for each head, from the shapes of the arguments."""
    *heads, queries, width = query
    return 2 * math.prod(heads) * queries * key[-2] * (width + value[-1])


# torch has no formula for the attention kernel of CPUs, so attention would count as 0 there.
_MISSING: Mapping[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # noqa: SLF001
