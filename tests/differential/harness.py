"""Runs one sampling loop under diffusers' PAB and under ours, and says at which step and module they part.

What was computed is told by probes on the Linear layers inside each attention module, below either mechanism.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_pyramid_attention_broadcast
from diffusers.hooks._common import (
    _ATTENTION_CLASSES,
    _CROSS_TRANSFORMER_BLOCK_IDENTIFIERS,
    _SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS,
    _TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS,
)
from torch import Tensor, nn

import cachepolicy
from tests.support import zoo

Window = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Knobs:
    """A setting of PAB, for either implementation. `None` switches a kind of attention off."""

    spatial: int | None = 2
    temporal: int | None = None
    cross: int | None = None
    spatial_window: Window = (100, 800)
    temporal_window: Window = (100, 800)
    cross_window: Window = (100, 800)
    spatial_names: tuple[str, ...] = _SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS
    temporal_names: tuple[str, ...] = _TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS
    cross_names: tuple[str, ...] = _CROSS_TRANSFORMER_BLOCK_IDENTIFIERS

    def config(self, timestep: Callable[[], float]) -> PyramidAttentionBroadcastConfig:
        """The setting in diffusers' words."""
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.spatial,
            temporal_attention_block_skip_range=self.temporal,
            cross_attention_block_skip_range=self.cross,
            spatial_attention_timestep_skip_range=self.spatial_window,
            temporal_attention_timestep_skip_range=self.temporal_window,
            cross_attention_timestep_skip_range=self.cross_window,
            spatial_attention_block_identifiers=self.spatial_names,
            temporal_attention_block_identifiers=self.temporal_names,
            cross_attention_block_identifiers=self.cross_names,
            current_timestep_callback=timestep,
        )

    def params(self) -> dict[str, Any]:
        """The setting as parameters of `pab.cp`."""
        return {
            "spatial_every": self.spatial,
            "temporal_every": self.temporal,
            "cross_every": self.cross,
            "spatial_range": self.spatial_window,
            "temporal_range": self.temporal_window,
            "cross_range": self.cross_window,
            "spatial_names": list(self.spatial_names),
            "temporal_names": list(self.temporal_names),
            "cross_names": list(self.cross_names),
        }


@dataclass(frozen=True, slots=True)
class Run:
    """What a sampling loop gave: the prediction and the names of the computed attention modules, step by step."""

    outputs: list[Tensor] = field(default_factory=list[Tensor])
    computed: list[frozenset[str]] = field(default_factory=list[frozenset[str]])

    @property
    def executions(self) -> int:
        """Executions of attention modules in all steps, one a step and module at most."""
        return sum(len(step) for step in self.computed)


class Clock:
    """The timestep that a pipeline would show as `current_timestep`: set by the loop, read by the callback."""

    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        """The current timestep."""
        return self.t

    def over(self, timesteps: Sequence[float]) -> Iterator[float]:
        """The timesteps, each current while the loop holds it."""
        for self.t in timesteps:
            yield self.t


class Watch:
    """Notes the modules inside which a Linear layer ran."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.seen = set[str]()
        for name, module in modules.items():
            for child in module.modules():
                if isinstance(child, nn.Linear):
                    child.register_forward_pre_hook(self._note(name))

    def _note(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            self.seen.add(name)

        return note

    def take(self) -> frozenset[str]:
        """The names noted since the last call."""
        taken = frozenset(self.seen)
        self.seen.clear()
        return taken


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that diffusers takes for attention."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _ATTENTION_CLASSES)}


@torch.no_grad()
def sample(name: str, model: nn.Module, timesteps: Sequence[float], clock: Clock, **options: Any) -> Run:
    """Run the loop on a probed model; `options` are those of `zoo.trajectory`."""
    probes, run = Watch(attentions(model)), Run()
    for prediction in zoo.trajectory(name, model, clock.over(timesteps), **options):
        run.outputs.append(flat(prediction))
        run.computed.append(probes.take())
    return run


def run_bare(name: str, model: nn.Module, timesteps: Sequence[float], **options: Any) -> Run:
    """The loop without any cache."""
    return sample(name, copy.deepcopy(model), timesteps, Clock(), **options)


def run_diffusers_pab(name: str, model: nn.Module, knobs: Knobs, timesteps: Sequence[float], **options: Any) -> Run:
    """The loop under diffusers' `apply_pyramid_attention_broadcast`, on a copy."""
    twin, clock = copy.deepcopy(model), Clock()
    apply_pyramid_attention_broadcast(twin, knobs.config(clock))
    return sample(name, twin, timesteps, clock, **options)


def run_ours(name: str, model: nn.Module, knobs: Knobs, timesteps: Sequence[float], **options: Any) -> Run:
    """The loop under `pab.cp`, on a copy."""
    twin, clock = copy.deepcopy(model), Clock()
    with cachepolicy.apply(twin, "pab.cp", timestep=clock, **knobs.params()):
        return sample(name, twin, timesteps, clock, **options)


def difference(expected: Run, got: Run) -> str | None:
    """Where two runs part first, in words; None where they agree to the last bit at each step."""
    if len(expected.outputs) != len(got.outputs):
        return f"{len(expected.outputs)} steps expected, {len(got.outputs)} run"
    for step, (a, b) in enumerate(zip(expected.computed, got.computed, strict=True)):
        if a != b:
            return f"step {step}: not computed {sorted(a - b)}, computed in excess {sorted(b - a)}"
        if not torch.equal(expected.outputs[step], got.outputs[step]):
            worst = (expected.outputs[step] - got.outputs[step]).abs().max()
            return f"step {step}: same modules computed, outputs differ by {worst:.3g}"
    return None


def flat(prediction: Any) -> Tensor:
    """A prediction as one row of numbers."""
    parts = prediction if isinstance(prediction, (list, tuple)) else [prediction]
    return torch.cat([part.flatten() for part in parts])
