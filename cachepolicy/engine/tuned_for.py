"""Compares a run with what its policy was tuned for, as the `tuned` statements say."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from cachepolicy.engine.clock import Sources
from cachepolicy.errors import warn
from cachepolicy.language.evaluate import Undefined, constant
from cachepolicy.language.linker import Resolved

TOLERANCE = 0.01
"""Largest difference between two noise levels or guidance scales that count as equal, as a share of the largest."""
GUIDANCE = "guidance"
"""The name of the pipeline's guidance scale in a `tuned` statement; further numbers have the names of arguments."""
_AGAIN = "tune again for it, or measure what the policy does there: `cachepolicy run`"


_GUIDANCE = re.compile("guidance|cfg|pag_")
"""Arguments of a pipeline's call that say how it guides."""


Guidance = Callable[[], Mapping[str, float]]
"""Returns the numbers by which a call guides."""


def guidance_numbers(
    pipeline: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, float]:
    """Return the numbers by which a call guides, such as `true_cfg_scale`, defaults included.

    Args:
        pipeline: The pipeline during or after the call. Its property `guidance_scale` replaces the argument.
        function: What is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    values = {name: value for name, value in bound.arguments.items() if _GUIDANCE.search(name)}
    scale = getattr(pipeline, "guidance_scale", None)
    given = values.pop("guidance_scale", None)
    values = {GUIDANCE: given if scale is None else scale, **values}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def config_hash(model: torch.nn.Module) -> str:
    """Return a hash of the config of a model of diffusers, or of the shapes of the parameters of another."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        # Names with an underscore say where a config came from and who wrote it.
        named = {name: value for name, value in cast("Mapping[str, Any]", config).items() if not name.startswith("_")}
    else:
        named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return hashlib.sha256(json.dumps(named, default=repr, sort_keys=True).encode()).hexdigest()[:12]


def active_adapters(model: torch.nn.Module) -> list[str]:
    """Return the names of the adapters of PEFT that change what a model computes, sorted."""
    names = set[str]()
    for module in model.modules():
        active: Any = getattr(module, "active_adapters", None)
        if hasattr(module, "base_layer") and isinstance(active, list | tuple):
            merged: Sequence[str] = getattr(module, "merged_adapters", ())
            if not getattr(module, "disable_adapters", False):
                names.update(cast("Sequence[str]", active))
            names.update(merged)
    return sorted(names)


def numbers_of(timesteps: Any, sigmas: Any, steps: int) -> tuple[list[float], list[float] | None]:
    """Return the timesteps and sigmas of the steps of a trajectory, the last ones of its schedule.

    Args:
        timesteps: All timesteps of the schedule.
        sigmas: Its sigmas, of which one more may follow; None if it has none.
        steps: The number of steps of the trajectory.
    """
    first = max(len(timesteps) - steps, 0)
    listed = None if sigmas is None else [float(sigma) for sigma in sigmas[first : first + steps]]
    return [float(timestep) for timestep in timesteps[first:]], listed


class TunedFor:
    """What a policy was tuned for. Each difference is told once.

    Args:
        resolved: The policy.
        model: The denoiser.
    """

    def __init__(self, resolved: Resolved, model: torch.nn.Module) -> None:
        self._resolved = resolved
        self._model = model
        self._told = set[str]()
        params = resolved.settings
        self._known = dict[int, dict[str, Any]]()
        for statement in resolved.tuned:
            values = {setting.name: _value(setting.value) for setting in statement.settings}
            # A statement for other values of the params is not meant.
            if all(values[name] == params[name] for name in values.keys() & params.keys()):
                self._known[statement.steps] = values

    def compare_model(self) -> None:
        """Warn where the model or its adapters differ (W610, W613)."""
        every = [*self._known.values()]
        found = {"denoiser": type(self._model).__name__, "config": config_hash(self._model)}
        stated = {name: values[name] for values in every for name in found if name in values}
        # A policy for two experts names both.
        if any(found[name] not in str(value).split(" and ") for name, value in stated.items()):
            self._warn(
                "W610",
                f"the policy was tuned for a `{stated.get('denoiser', '?')}` with another config than this "
                f"`{found['denoiser']}`",
            )
        adapters = next((values["adapters"] for values in every if "adapters" in values), None)
        if adapters is not None and sorted(adapters) != (active := active_adapters(self._model)):
            self._warn(
                "W613", f"the policy was tuned with {_adapters(adapters)}, and the model has {_adapters(active)}"
            )

    def compare_run(
        self, sources: Sources, steps: int | None, begin: int, latents: Any, guidance: Guidance | None
    ) -> None:
        """Warn where a trajectory differs, at its first call (W611, W612, W614, W615).

        Args:
            sources: The sources of its clock.
            steps: Its number of steps, counted with those of its schedule before it begins; None if unknown.
            begin: The step of the schedule at which it begins.
            latents: The latents that the model is called with.
            guidance: Returns the numbers by which the running pipeline guides, by their names; None if unknown.
        """
        self.compare_model()
        if steps is None or not self._known:
            return
        values = self._known.get(steps)
        if values is None:
            known = " and ".join(map(str, sorted(self._known)))
            self._warn("W611", f"the policy was tuned over {known} steps, and this trajectory has {steps}")
            return
        if begin:
            self._warn(
                "W615",
                f"the trajectory begins at step {begin} of {steps}, where the list of steps is cut",
                help="a list for the part that is run may be better: tune with the same `strength`",
            )
        follower = sources.follower
        numbers = (None, None) if follower is None else numbers_of(*follower.numbers(sources.scheduler), steps)
        for name, present in zip(("timesteps", "sigmas"), numbers, strict=True):
            if name in values and present is not None and not _near(values[name], present):
                self._warn("W611", f"the `{name}` of the scheduler are not those that the policy was tuned on")
        stated = {name: value for name, value in values.items() if _GUIDANCE.search(name)}
        here: Mapping[str, float] = guidance() if stated and guidance is not None else {}
        for name, scale in stated.items():
            if name in here and abs(scale - here[name]) > TOLERANCE * abs(scale):
                called = "a guidance scale" if name == GUIDANCE else f"a `{name}`"
                self._warn("W612", f"the policy was tuned at {called} of {scale:g}, and this one is {here[name]:g}")
        shape = values.get("latents")
        if shape is not None and isinstance(latents, torch.Tensor) and [*shape] != [*latents.shape[1:]]:
            sizes = " x ".join(map(str, shape)), " x ".join(map(str, latents.shape[1:]))
            self._warn("W614", f"the policy was tuned on latents of {sizes[0]}, and these are {sizes[1]}")

    def _warn(self, code: str, message: str, *, help: str = _AGAIN) -> None:
        if code not in self._told:
            self._told.add(code)
            warn(code, message, help=help)


def _value(node: Any) -> Any:
    try:
        value: Any = constant(node)
    except (Undefined, TypeError):
        return None
    return value


def _near(stated: Any, present: Sequence[float]) -> bool:
    if not isinstance(stated, list | tuple) or len(cast("Sequence[Any]", stated)) != len(present):
        return False
    numbers = cast("Sequence[float]", stated)
    largest = max((abs(number) for number in numbers), default=0.0)
    return all(abs(one - other) <= TOLERANCE * largest for one, other in zip(numbers, present, strict=True))


def _adapters(names: Sequence[str]) -> str:
    return "the adapters " + ", ".join(f"`{name}`" for name in names) if names else "no adapter"
