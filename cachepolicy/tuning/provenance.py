# diffusers comes without complete types.
# pyright: basic
"""What a policy was tuned for, as the `tuned` statement that is written into it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachepolicy.engine.call_arguments import arguments_of, inspect_root
from cachepolicy.engine.introspection import unwrapped
from cachepolicy.engine.tuned_for import active_adapters, config_hash, guidance_numbers, numbers_of
from cachepolicy.language import ir
from cachepolicy.tuning.recording import OutputRecord
from cachepolicy.tuning.sampling import ModelCall, Sampler


@dataclass(slots=True)
class Circumstances:
    """What a recorded run shows beside its records.

    Attributes:
        latents: Shape of the latents that the first denoiser is called with, without the batch.
        guided: The numbers by which the call guides, such as `true_cfg_scale`; the guidance scale is `guidance`.
    """

    latents: list[int] | None = None
    guided: dict[str, float] = field(default_factory=dict[str, float])


@contextlib.contextmanager
def observed(sampler: Sampler, call: ModelCall) -> Generator[Circumstances]:
    """Observe the circumstances of a call inside the `with` block.

    Args:
        sampler: What samples it.
        call: The call.
    """
    seen = Circumstances()
    inner = unwrapped(sampler.models[0])
    root = inspect_root(inner)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if seen.latents is None:
            arguments = arguments_of(root, args, kwargs)
            latents = arguments.latent_input
            seen.latents = [*latents.shape[1:]] if isinstance(latents, torch.Tensor) else None

    handle = inner.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
    seen.guided = guidance_numbers(sampler.target, sampler.function, (), call)


def tuned_statement(
    record: OutputRecord, models: Sequence[nn.Module], seen: Circumstances, found: Mapping[str, str | float]
) -> ir.Tuned:
    """Return the statement for a schedule.

    Args:
        record: A recorded run.
        models: The denoisers.
        seen: The circumstances of the run.
        found: Further values, such as the forecast and the measured quality.
    """
    scheduler = record.solver.scheduler
    timesteps, sigmas = numbers_of(scheduler.timesteps, getattr(scheduler, "sigmas", None), len(record.models))
    return statement(type(scheduler).__name__, timesteps, sigmas, models, seen, found)


def statement(
    scheduler: str,
    timesteps: Sequence[float],
    sigmas: Sequence[float] | None,
    models: Sequence[nn.Module],
    seen: Circumstances,
    found: Mapping[str, str | float],
) -> ir.Tuned:
    """Return the statement for a schedule.

    Args:
        scheduler: The class of the scheduler.
        timesteps: The timesteps of the trajectory.
        sigmas: Its sigmas, of which one more may follow; None if the scheduler has none.
        models: The denoisers.
        seen: The circumstances of a run.
        found: Further values, such as the forecast and the measured quality.
    """
    from cachepolicy import __version__

    inner = [unwrapped(model) for model in models]
    values: dict[str, Any] = {
        "denoiser": _joined([type(model).__name__ for model in inner]),
        "config": _joined([config_hash(model) for model in inner]),
        "adapters": sorted({name for model in inner for name in active_adapters(model)}),
        "scheduler": scheduler,
        **({"timesteps": timesteps} if sigmas is None else {"sigmas": sigmas[: len(timesteps)]}),
        **seen.guided,
        "latents": seen.latents,
        **found,
        "version": __version__,
    }
    settings = [ir.Setting(name=name, value=_node(value)) for name, value in values.items() if value is not None]
    return ir.Tuned(steps=len(timesteps), settings=tuple(settings))


def _joined(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _node(value: Any) -> ir.Expression:
    if isinstance(value, str):
        return ir.Text(value=value)
    if isinstance(value, list | tuple):
        return ir.ListOf(items=tuple(_node(item) for item in value))
    # Five digits are enough to recognise a noise level.
    return ir.Number(value=value if isinstance(value, int) else float(f"{value:.5g}"))
