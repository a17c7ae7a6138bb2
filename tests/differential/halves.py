"""Runs one sampling loop under diffusers' FasterCache and under ours, with the settings in either's words."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import FasterCacheConfig
from diffusers.hooks import apply_faster_cache
from harness import Clock, Run, Watch, attentions, flat
from torch import Tensor, nn

import cachepolicy
from tests.support import zoo

TIMESTEPS = (999.0, 900.0, 780.0, 650.0, 600.0, 520.0, 400.0, 300.0, 180.0, 90.0, 20.0, 10.0)

UNMARKED = ("motif_video", "anyflow")
"""Models whose cross attention carries no `is_cross_attention`: diffusers extrapolates it, too."""

FIVE = FasterCacheConfig()._unconditional_conditional_input_kwargs_identifiers
"""The names of batched inputs that diffusers knows."""

Window = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Knobs:
    """A setting of FasterCache, for either implementation."""

    spatial: int | None = 2
    temporal: int | None = None
    uncond: int = 5
    spatial_window: Window = (-1, 681)
    temporal_window: Window = (-1, 681)
    uncond_window: Window = (-1, 641)
    low: float = 1.1
    high: float = 1.1
    low_window: Window = (99, 901)
    high_window: Window = (-1, 301)
    weight: float = 0.5
    distilled: bool = False

    def config(self, timestep: Callable[[], float], layout: str, batched: Sequence[str]) -> FasterCacheConfig:
        """The setting in diffusers' words."""
        return FasterCacheConfig(
            spatial_attention_block_skip_range=self.spatial,
            temporal_attention_block_skip_range=self.temporal,
            spatial_attention_timestep_skip_range=self.spatial_window,
            temporal_attention_timestep_skip_range=self.temporal_window,
            low_frequency_weight_update_timestep_range=self.low_window,
            high_frequency_weight_update_timestep_range=self.high_window,
            alpha_low_frequency=self.low,
            alpha_high_frequency=self.high,
            unconditional_batch_skip_range=self.uncond,
            unconditional_batch_timestep_skip_range=self.uncond_window,
            attention_weight_callback=lambda _: self.weight,
            tensor_format=layout,
            is_guidance_distilled=self.distilled,
            current_timestep_callback=timestep,
            _unconditional_conditional_input_kwargs_identifiers=list(batched),
        )

    def params(self) -> dict[str, Any]:
        """The setting as parameters of `fastercache.cp`."""
        return {
            "spatial_every": self.spatial,
            "temporal_every": self.temporal,
            "uncond_every": self.uncond,
            "spatial_range": self.spatial_window,
            "temporal_range": self.temporal_window,
            "uncond_range": self.uncond_window,
            "low": self.low,
            "high": self.high,
            "low_range": self.low_window,
            "high_range": self.high_window,
            "weight": self.weight,
            "distilled": self.distilled,
        }


@cache
def layout_of(name: str) -> str:
    """How diffusers has to be told that this model's prediction is laid out."""
    model, one = zoo.build(name), zoo.entry(name)
    with torch.no_grad():
        prediction = zoo.output(model(**one.inputs()))
    if prediction.ndim == 4:
        return "BCHW"
    return "BFCHW" if name in {"cogvideox", "cogvideox15", "consisid", "anyflow", "unet_spatiotemporal"} else "BCFHW"


@cache
def batched(name: str) -> list[str]:
    """The names of the inputs that hold a row for each sample."""
    inputs = {size: zoo.entry(name).inputs(batch=size) for size in (2, 3)}
    return [
        key
        for key, value in inputs[2].items()
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == 2 and len(inputs[3][key]) == 3
    ]


class Called:
    """A model behind the loop of the zoo, called in a way of its own."""

    def __init__(
        self,
        name: str,
        model: Any,
        dtype: torch.dtype | None,
        latents: Callable[[Tensor], Tensor] | None,
        more: dict[str, Any],
    ) -> None:
        self._one, self._model, self._dtype, self._latents, self._more = zoo.entry(name), model, dtype, latents, more
        self._x: Tensor | None = None

    def __call__(self, **arguments: Any) -> Any:
        """The prediction; `latents` says what the first step starts from, later ones go on from there."""
        if self._latents is not None:
            arguments[self._one.latent] = self._latents(arguments[self._one.latent])
        if self._dtype is not None:
            arguments = {key: self._cast(key, value) for key, value in arguments.items()}
        output = zoo.output(self._model(**arguments, **self._more))
        return (output[..., ::2] if self._latents is not None else output,)

    def _cast(self, key: str, value: Any) -> Any:
        if key == self._one.feed.argument or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(self._dtype)


@torch.no_grad()
def sample(
    name: str,
    model: nn.Module,
    timesteps: Sequence[float],
    clock: Clock,
    *,
    call_of: Callable[[nn.Module], Any] | None = None,
    dtype: torch.dtype | None = None,
    latents: Callable[[Tensor], Tensor] | None = None,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Run the loop on a probed model; `call_of` gives what stands for the model where it is called otherwise."""
    probes, run = Watch(attentions(model)), Run()
    call: Any = model if call_of is None else call_of(model)
    if dtype is not None or latents is not None or more:
        call = Called(name, call, dtype, latents, more or {})
    options = {"guidance": "batched"} | options
    for prediction in zoo.trajectory(name, call, clock.over(timesteps), **options):
        run.outputs.append(flat(prediction))
        run.computed.append(probes.take())
    return run


def run_diffusers(
    name: str, model: nn.Module, knobs: Knobs, timesteps: Sequence[float] = TIMESTEPS, **options: Any
) -> Run:
    """The loop under diffusers' `apply_faster_cache`, on a copy."""
    twin, clock = copy.deepcopy(model), Clock()
    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)
    apply_faster_cache(twin, knobs.config(clock, layout_of(name), batched(name)))
    return sample(name, twin, timesteps, clock, **options)


def run_ours(
    name: str,
    model: nn.Module,
    knobs: Knobs,
    timesteps: Sequence[float] = TIMESTEPS,
    *,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """The loop under `fastercache.cp` in diffusers' variant, on a copy."""
    twin, clock = copy.deepcopy(model), Clock()
    with ours_on(twin, clock, knobs, **(extra or {})):
        return sample(name, twin, timesteps, clock, **options)


def ours_on(model: nn.Module, clock: Clock, knobs: Knobs, **extra: Any) -> Any:
    """`fastercache.cp` in diffusers' variant on a model whose batches are guidance batches."""
    params = {"feedback": True} | knobs.params() | extra
    return cachepolicy.apply(model, "fastercache", guidance=not knobs.distilled, timestep=clock, **params)
