"""What the caller says about the calls inside a `with` block: the step, the time and the guidance branch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.errors import PolicyError


@contextlib.contextmanager
def setting(variable: ContextVar[Any], value: Any) -> Generator[None]:
    """Return a context manager: the variable has the value inside."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass(frozen=True, slots=True)
class Context:
    """The arguments of `cache_context(name, ...)` or `run.step(...)`, which apply to the calls inside.

    None means not given.

    Attributes:
        name: The guidance branch, such as `"cond"`.
        step_index: The step of the trajectory, from 0.
        num_inference_steps: The number of steps of the trajectory.
        timestep: The timestep in training units (0..1000), a number or a tensor.
        sigma: The noise level of the step.
        own: Whether it is a `run.step(...)`, which comes before all other sources.
    """

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None
    timestep: Any = None
    sigma: float | None = None
    own: bool = False


CONTEXT: ContextVar[Context | None] = ContextVar("cachepolicy_context", default=None)


def step_context(*, t: Any, step: Any, steps: Any, sigma: Any, branch: Any) -> Context:
    """Return the context of a `run.step(...)`, whose arguments these are.

    Raises:
        PolicyError: A value does not fit (E324).
    """

    def whole(value: Any, least: int) -> bool:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)

    def real(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() == 1
        return value is None or (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    problem = None
    if not real(t):
        problem = f"`t` is `{t!r}`", "the timestep in training units (0..1000), a number or a tensor of one element"
    elif not whole(step, 0):
        problem = f"`step` is `{step!r}`", "the number of the step, from 0"
    elif not whole(steps, 1):
        problem = f"`steps` is `{steps!r}`", "the number of steps of a trajectory, at least 1"
    elif step is not None and steps is not None and step >= steps:
        problem = f"`step` is {step} of {steps} `steps`", f"steps count from 0 to {steps - 1}"
    elif not real(sigma):
        problem = f"`sigma` is `{sigma!r}`", "the noise level, a number"
    elif branch is not None and not isinstance(branch, str):
        problem = f"`branch` is `{branch!r}`", "the name of the guidance branch, such as `cond`"
    if problem is not None:
        raise PolicyError.of("E324", problem[0], help=problem[1])
    return Context(branch or "", step, steps, t, sigma, own=True)
