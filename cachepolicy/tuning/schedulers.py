# diffusers comes without complete types.
# pyright: basic
"""Other solvers for a pipeline's scheduler, and schedulers that run some of their steps alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

SOLVERS = {"UniPC": "UniPCMultistepScheduler", "DPM++ 2M": "DPMSolverMultistepScheduler"}
"""The multi-step solvers of diffusers, by the names under which they are known."""

_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def with_solver(scheduler: Any, solver: str) -> Any:
    """Return a scheduler with another solver for the same model.

    The noise schedule and the type of the prediction are those of the given scheduler. The spacing of the steps is the
    solver's own.

    Args:
        scheduler: The scheduler of a pipeline.
        solver: A name of `SOLVERS`.

    Returns:
        The scheduler, None where diffusers has no such solver for the model, as for a scheduler that adds noise by an
        algorithm of its own.
    """
    import diffusers

    name = type(scheduler).__name__
    if name == SOLVERS[solver]:
        return adapted(scheduler)
    cls = getattr(diffusers, SOLVERS[solver])
    if name in _FLOW:
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        if config.get("invert_sigmas") or config.get("stochastic_sampling"):
            return None
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config.get("shift", 1)}
        known = inspect.signature(cls.__init__).parameters
        return _adapted_class(cls)(**{key: value for key, value in config.items() if key in known})
    compatible = {other.__name__ for other in getattr(scheduler, "compatibles", ())}
    return _adapted_class(cls).from_config(scheduler.config) if SOLVERS[solver] in compatible else None


def adapted(scheduler: Any, only: Sequence[int] | None = None) -> Any:
    """Return a new scheduler of the same class and configuration.

    Args:
        scheduler: The scheduler.
        only: Indices of the steps that it runs, None for all of them. The sample goes from each of these timesteps to
            the next one directly.

    Returns:
        The scheduler, None where it cannot leave out steps.
    """
    base: type = type(scheduler)
    if not getattr(base, "adapted_from", None):
        base = _adapted_class(base)
    made: Any = base.from_config(scheduler.config)  # pyright: ignore[reportAttributeAccessIssue]
    made.only = None if only is None else tuple(only)
    # Schedulers with one sigma for each step and a last one take any decreasing list of them.
    if only is not None and not (hasattr(made, "sigmas") and getattr(made, "order", 1) == 1):
        return None
    return made


@cache
def _adapted_class(base: type) -> Any:
    """Return a subclass that can leave out steps, and that takes the arguments of pipelines of flow models."""
    parameters = inspect.signature(base.set_timesteps).parameters  # pyright: ignore[reportAttributeAccessIssue]

    class Adapted(base):
        adapted_from = base
        only: tuple[int, ...] | None = None

        def set_timesteps(
            self, num_inference_steps: int | None = None, device: Any = None, *, sigmas: Any = None, **more: Any
        ) -> None:
            # Pipelines of flow models give the sigmas for Euler steps and a `mu`, which some solvers refuse.
            flow = self.config.get("use_flow_sigmas", False)
            if sigmas is not None and not flow:
                more["sigmas"] = sigmas
                if num_inference_steps is not None and len(sigmas) != num_inference_steps:
                    num_inference_steps = len(sigmas)
            elif sigmas is not None:
                num_inference_steps = len(sigmas)
            if "mu" in more and (
                "mu" not in parameters or (flow and not self.config.get("use_dynamic_shifting", False))
            ):
                del more["mu"]
            super().set_timesteps(num_inference_steps, device=device, **more)
            if self.only is not None:
                index = torch.tensor([*self.only, len(self.timesteps)])
                self.sigmas = self.sigmas[index.to(self.sigmas.device)]
                self.timesteps = self.timesteps[index[:-1].to(self.timesteps.device)]
                self.num_inference_steps = len(self.only)

    # diffusers writes these names when it saves a pipeline.
    Adapted.__name__, Adapted.__qualname__, Adapted.__module__ = base.__name__, base.__qualname__, base.__module__
    return Adapted
