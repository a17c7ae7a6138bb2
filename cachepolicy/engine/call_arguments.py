"""The arguments of a root call: its latents, its timestep, and the shapes of all tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from cachepolicy.diffusers.argument_names import POSITIONS_OR_MASKS, TIMESTEP_NAMES
from cachepolicy.diffusers.timestep_scaling import Scale, listed_class, scale_of
from cachepolicy.engine.history_packing import leaves
from cachepolicy.errors import PolicyError


@dataclass(slots=True)
class CallArguments:
    """The arguments of a root call.

    Attributes:
        named: The arguments by name.
        latents: The name of the latents argument, or None.
        timestep: The name of the timestep argument, or None if the call has none.
        time: The timestep: None, a number, a tensor, or `RowTimesteps` where each row of the batch has its own.
    """

    named: dict[str, Any]
    latents: str | None
    timestep: str | None
    time: Any = field(init=False)

    def __post_init__(self) -> None:
        value = self.named.get(self.timestep or "")
        if isinstance(value, list | tuple) and value and all(_is_number(item) for item in value):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            value = torch.tensor([float(item) for item in value])  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if isinstance(value, torch.Tensor) and value.ndim and value.numel() > 1:
            latents = self.latent_input
            rows = len(latents) if isinstance(latents, torch.Tensor | list | tuple) else 0  # pyright: ignore[reportUnknownArgumentType]
            if value.shape[0] == value.numel() == rows:
                value = value.flatten()[0] if value.stride(0) == 0 else RowTimesteps(value)
        self.time = value

    @property
    def latent_input(self) -> Any:
        """The latents, or None."""
        return self.named.get(self.latents or "")

    def signature(self) -> tuple[Any, ...]:
        """Return shapes, dtypes and devices of all tensors. Histories apply only to calls with the same signature."""
        return tuple([
            (name, tensor.shape, tensor.dtype, tensor.device)
            for name, value in self.named.items()
            if name != self.timestep
            for tensor in ((value,) if isinstance(value, torch.Tensor) else leaves(value))
        ])  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)


@dataclass(frozen=True, slots=True)
class Root:
    """Static information about the forward of a root model.

    Attributes:
        parameters: The parameter names of its forward.
        timestep: The name of the timestep parameter, or None.
        scale: The scale of the timestep, or None if it cannot be converted.
        class_name: The name of the class, for messages.
        listed: Whether the scale comes from the table of diffusers' classes.
    """

    parameters: tuple[str, ...]
    timestep: str | None
    scale: Scale | None
    class_name: str
    listed: bool


def inspect_root(module: torch.nn.Module) -> Root:
    """Return the parameter names and the timestep scale of a root model."""
    parameters = tuple(inspect.signature(module.forward).parameters)
    timestep = next((name for name in TIMESTEP_NAMES if name in parameters), None)
    kind = type(module)
    return Root(parameters, timestep, scale_of(kind), kind.__name__, listed_class(kind) is not None)


def arguments_of(root: Root, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallArguments:
    """Bind the arguments of a call of `root` to names.

    The latents are the first argument with a tensor, except the timestep, positions and masks.
    """
    named: dict[str, Any] = dict(zip(root.parameters, args, strict=False))
    named.update(kwargs)
    latents = None
    for name, value in named.items():
        if name != root.timestep and not POSITIONS_OR_MASKS.search(name) and leaves(value):
            latents = name
            break
    return CallArguments(named, latents, root.timestep if root.timestep in named else None)


class RowTimesteps:
    """The timesteps of the rows of a batch, in a tensor with one element for each. It is read once, when needed."""

    __slots__ = ("_tensor", "_value")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._value: float | None = None

    @property
    def on_cpu(self) -> bool:
        """True if reading waits for no device."""
        return self._tensor.device.type == "cpu"

    @property
    def value(self) -> float:
        """The one timestep of all rows.

        Raises:
            PolicyError: The rows differ (E323).
        """
        if self._value is None:
            timesteps: list[float] = self._tensor.flatten().tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            distinct = list(dict.fromkeys(f"{timestep:g}" for timestep in timesteps))
            if len(distinct) > 1:
                shown = ", ".join(distinct[:_MOST_SHOWN]) + (", ..." if len(distinct) > _MOST_SHOWN else "")
                raise PolicyError.of(
                    "E323",
                    f"the {len(timesteps)} rows of one call are at different timesteps ({shown}), and a policy decides"
                    " for all of them at once",
                    help="call the model once for each timestep, each in its own session; or pass `timestep=` if one"
                    " stands for all",
                )
            self._value = float(timesteps[0])
        return self._value


_MOST_SHOWN = 4


def number(value: Any, *, lowest: bool = False) -> float:
    """Return a timestep as a number: the largest (or lowest) one of several samples, frames or tokens."""
    if isinstance(value, RowTimesteps):
        return value.value
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.ndim == 0:
        return _element(value)
    if value.numel() == 1:
        return float(value)
    return float(value.min() if lowest else value.max())


def _element(value: torch.Tensor) -> float:
    """Return the value of a scalar tensor.

    An element of a scheduler's `timesteps` is a view. The whole tensor is read from the device once, not once a step.
    """
    base = value._base
    if base is None or base.ndim != 1 or value.device.type == "cpu":
        return float(value)
    numbers: list[float] | None = _read_once.get(base)
    if numbers is None:
        numbers = _read_once[base] = base.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return float(numbers[(value.storage_offset() - base.storage_offset()) // max(1, base.stride(0))])


_read_once: Any = WeakIdKeyDictionary()
