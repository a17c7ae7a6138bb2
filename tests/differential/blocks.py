"""Runs one sampling loop under diffusers' First Block Cache and under ours, and notes which blocks were computed.

What was computed is told by probes on the Linear layers inside each block, below either mechanism.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from harness import Clock, Run, Watch, flat
from torch import Tensor, nn

import cachepolicy
from tests.support import zoo
from tests.support.caching import set_cache_context

TIMESTEPS = (950.0, 880.0, 780.0, 720.0, 650.0, 520.0, 400.0, 300.0)


class Cast:
    """A model that is called with its inputs in a dtype of the caller's choice, but for the timestep."""

    def __init__(self, model: Any, dtype: torch.dtype, keep: str) -> None:
        self._model, self._dtype, self._keep = model, dtype, keep

    def __call__(self, **arguments: Any) -> Any:
        """The model's answer."""
        return self._model(**{k: v if k == self._keep else self._to(v) for k, v in arguments.items()})

    def _to(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        return type(value)(map(self._to, value)) if isinstance(value, (list, tuple)) else value


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the lists directly under the root."""
    return {
        f"{name}.{index}": block
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList)
        for index, block in enumerate(child)
    }


@torch.no_grad()
def sample(
    name: str,
    model: nn.Module,
    timesteps: Sequence[float] = TIMESTEPS,
    clock: Clock | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    watched: dict[str, nn.Module] | None = None,
    call: Any = None,
    **options: Any,
) -> Run:
    """Run the loop on a watched model; `call` stands for the model where it is called in a way of its own."""
    clock = clock or Clock()
    watch, run = Watch(blocks(model) if watched is None else watched), Run()
    called = call or model
    if dtype is not torch.float32:
        called = Cast(called, dtype, zoo.entry(name).feed.argument)
    for prediction in zoo.trajectory(name, called, clock.over(timesteps), **options):
        run.outputs.append(flat(prediction))
        run.computed.append(watch.take())
    return run


def run_bare(name: str, model: nn.Module, **options: Any) -> Run:
    """The loop without any cache."""
    return sample(name, copy.deepcopy(model), **options)


def run_diffusers(name: str, model: nn.Module, threshold: float, **options: Any) -> Run:
    """The loop under diffusers' `apply_first_block_cache`, on a copy."""
    twin = copy.deepcopy(model)
    apply_first_block_cache(twin, FirstBlockCacheConfig(threshold=threshold))
    set_cache_context(twin, "only")
    return sample(name, twin, **options)


def run_ours(name: str, model: nn.Module, threshold: float, **options: Any) -> Run:
    """The loop under `fbc.cp`, on a copy."""
    twin = copy.deepcopy(model)
    with applied(twin, threshold):
        return sample(name, twin, **options)


def applied(model: nn.Module, threshold: float) -> contextlib.AbstractContextManager[Any]:
    """`fbc.cp` on a model."""
    return cachepolicy.apply(model, "fbc.cp", threshold=threshold)


def drifts(name: str, model: nn.Module, threshold: float = 0.0, **options: Any) -> list[float]:
    """The change of the first block's residual that was measured at each step after the first."""
    twin = copy.deepcopy(model)
    with applied(twin, threshold) as run:
        sample(name, twin, **options)
        (trajectory,) = run.trace
    return [signals["drift"] for call in trajectory.calls[1:] for signals in _read(call)]


def _read(call: Any) -> Iterator[dict[str, float]]:
    yield from list(call.signals.values())[:1]
