# diffusers comes without complete types.
# pyright: basic
"""Runs the same calls of a pipeline or sampling function again and again, with the same noise."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cachepolicy.engine.introspection import denoisers, is_pipeline
from cachepolicy.errors import PolicyError
from cachepolicy.tools.sampling import Sample, call_pipeline, timed_calls

ModelCall = Mapping[str, Any]
SampleFunction = Callable[..., Any]
STEPS = "num_inference_steps"
"""The argument of a call that sets the number of steps."""


class Sampler:
    """Samples calls of a target, each with the same noise every time.

    Args:
        target: A diffusers pipeline, or a denoiser.
        sample: Samples once from the keyword arguments of a call and returns a tensor `(n, ...)` of numbers in [-1, 1].
            Required for a denoiser; for a pipeline, replaces its call.
        scheduler: The scheduler that `sample` steps. Required for a denoiser.
    """

    def __init__(self, target: Any, sample: SampleFunction | None = None, scheduler: Any = None) -> None:
        self.target = target
        self._sample = sample
        self.models: list[nn.Module] = list(denoisers(target).values())
        if sample is None and not is_pipeline(target):
            raise PolicyError.of(
                "E401",
                f"nothing samples the `{type(target).__name__}`",
                help="pass a pipeline, or a function that samples once: `sample=`",
            )
        self._scheduler = scheduler

    @property
    def schedulers(self) -> list[Any]:
        """The schedulers that a call steps."""
        if self._scheduler is not None:
            return [self._scheduler]
        components: Mapping[str, Any] = getattr(self.target, "components", {})
        return [part for part in components.values() if hasattr(part, "step") and hasattr(part, "set_timesteps")]

    @property
    def scheduler(self) -> Any:
        """The scheduler that can be replaced by another one, None where there is not exactly one."""
        schedulers = self.schedulers
        replaceable = len(schedulers) == 1 and (self._sample is None or self.takes("scheduler"))
        return schedulers[0] if replaceable else None

    def takes(self, argument: str) -> bool:
        """Return whether a call takes an argument."""
        return argument in self._parameters

    def steps(self, call: ModelCall) -> int | None:
        """Return the number of steps of a call, None where its arguments do not set it."""
        default = self._parameters[STEPS].default if self.takes(STEPS) else None
        steps = call.get(STEPS, default)
        return steps if isinstance(steps, int) else None

    @property
    def function(self) -> Callable[..., Any]:
        """What is called."""
        return self._sample or self.target.__call__

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @contextlib.contextmanager
    def _stepping(self, scheduler: Any) -> Generator[dict[str, Any]]:
        """Replace the scheduler inside the `with` block.

        Args:
            scheduler: The scheduler to step instead.

        Yields:
            Further arguments of the calls.
        """
        if self._sample is not None:
            yield {"scheduler": scheduler}
            return
        original = self.scheduler
        (name,) = (name for name, part in self.target.components.items() if part is original)
        setattr(self.target, name, scheduler)
        try:
            yield {}
        finally:
            setattr(self.target, name, original)

    @contextlib.contextmanager
    def on(self, scheduler: Any, steps: int | None, call: ModelCall) -> Generator[ModelCall]:
        """Give a call another scheduler and number of steps inside the `with` block.

        Args:
            scheduler: The scheduler to step instead, None for the one that is there.
            steps: The number of steps, None for that of the call.
            call: The call.

        Yields:
            The arguments of the call.
        """
        arguments = dict(call) if steps is None else {**call, STEPS: steps}
        if scheduler is None:
            yield arguments
            return
        with self._stepping(scheduler) as more:
            yield {**arguments, **more}

    def __call__(self, call: ModelCall) -> Sample:
        """Sample one call. Generators among its arguments are restored afterwards, so that the call can be repeated."""
        with _restored(call):
            if self._sample is None:
                return call_pipeline(self.target, call)
            started = time.perf_counter()
            with torch.no_grad(), timed_calls(self.models) as model_seconds:
                samples = self._sample(**call)
            seconds = time.perf_counter() - started
        pictures = torch.as_tensor(samples).detach().float().cpu()
        return Sample(pictures, frames=False, seconds=seconds, model_seconds=sum(model_seconds))


@contextlib.contextmanager
def _restored(call: ModelCall) -> Generator[None]:
    """Set the generators of a call back to where they were."""
    values = [item for value in call.values() for item in (value if isinstance(value, Sequence) else [value])]
    generators = [value for value in values if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
