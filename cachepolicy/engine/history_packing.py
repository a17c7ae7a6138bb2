"""How histories are stored: in another dtype, on another device, and never as a small view of something large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from cachepolicy.errors import PolicyError, suggestion


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as it is stored, the dtype and device that it came in, and what it was divided by to fit."""

    tensor: torch.Tensor
    dtype: torch.dtype
    device: torch.device
    scale: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is stored."""
        return (self.tensor,) if self.scale is None else (self.tensor, self.scale)

    def opened(self) -> torch.Tensor:
        """The tensor as it was, but for what the stored dtype cannot tell apart; nobody else has it."""
        moved = self.tensor.to(self.device)
        restored = moved.to(self.dtype)
        if self.scale is not None:
            return restored * self.scale.to(restored)
        return restored.clone() if restored is self.tensor else restored


@dataclass(frozen=True, slots=True)
class Packing:
    """The dtype in which numbers with a fraction are stored, and the device; None leaves them as they are."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def pack(self, tensor: torch.Tensor) -> Packed:
        """The tensor as it is stored; always a copy. Whole numbers keep their dtype."""
        given, scale = tensor.detach(), None
        stored = given
        if self.dtype is not None and given.is_floating_point() and given.dtype is not self.dtype:
            scale = _scale(given, self.dtype)
            stored = (given if scale is None else given / scale).to(self.dtype)
        if self.device is not None and stored.device != self.device:
            stored = _moved(stored, self.device)
        if stored.data_ptr() == given.data_ptr():
            stored = given.clone()
        return Packed(stored, given.dtype, given.device, scale)

    def size(self, tensor: torch.Tensor) -> int:
        """The bytes that a tensor takes once it is packed, at most."""
        changes = self.dtype is not None and tensor.is_floating_point() and tensor.dtype is not self.dtype
        width = self.dtype.itemsize if changes and self.dtype is not None else tensor.element_size()
        return tensor.numel() * width + (_SCALE if changes else 0)


_SCALE = 4  # bytes of what a tensor was divided by


def _scale(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What a tensor is divided by before it is stored in a dtype of smaller range; None where the range is enough.

    Formats of 8 bits are filled to the end of their range, as their small numbers are coarse; 16 bits are left as they
    are unless a number would not fit.
    """
    most = torch.finfo(dtype).max
    if 2 * most >= torch.finfo(tensor.dtype).max or tensor.numel() == 0:
        return None
    largest = tensor.abs().amax().float()
    # Where something is not a number or infinite, it stays so.
    largest = torch.where(largest.isfinite() & (largest > 0), largest, torch.full_like(largest, most))
    ratio = (largest / most).clamp_min(torch.finfo(torch.float32).tiny)
    return ratio if dtype.itemsize == 1 else ratio.clamp_min(1.0)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy elsewhere; from a GPU to pinned memory nobody has to wait for it."""
    if device.type != "cpu" or tensor.device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


# --- what the caller says --------------------------------------------------------------------------------


def packing_of(dtype: Any, device: Any) -> Packing | None:
    """How to store what `history_dtype` and `history_device` say; None where they say nothing.

    Raises:
        PolicyError: there is no such dtype or device, or the dtype holds no fractions (E309).
    """
    if dtype is None and device is None:
        return None
    return Packing(None if dtype is None else _dtype(dtype), None if device is None else _device(device))


def _dtype(said: Any) -> torch.dtype:
    found = getattr(torch, said.removeprefix("torch."), None) if isinstance(said, str) else said
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        help = suggestion(str(said), _NAMES) or "a torch dtype with fractions, or its name, such as `bfloat16`"
        raise PolicyError.of("E309", f"`history_dtype` is `{said}`", help=help)
    return found


def _device(said: Any) -> torch.device:
    try:
        return torch.device(said)
    except (RuntimeError, TypeError) as error:
        raise PolicyError.of("E309", f"`history_device` is `{said}`", help="such as `cpu` or `cuda:1`") from error


_NAMES = tuple(
    sorted(name for name, value in vars(torch).items() if isinstance(value, torch.dtype) and value.is_floating_point)
)


# --- outputs ---------------------------------------------------------------------------------------------

_MUCH = 2  # times its own bytes: a view of so large a storage is copied


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it is a view that would keep a much larger storage alive."""
    return tensor if whole([tensor]) else tensor.clone()


def whole(tensors: Sequence[torch.Tensor]) -> bool:
    """True where the tensors are, together, most of what their storages hold."""
    if len(tensors) == 1:
        return tensors[0].untyped_storage().nbytes() <= _MUCH * tensors[0].nbytes
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values()) <= _MUCH * sum(each.nbytes for each in tensors)


def opened(value: Any) -> Any:
    """An output with its packed tensors opened; one that stands twice in it stays one."""
    done: dict[int, torch.Tensor] = {}

    def once(packed: Packed) -> torch.Tensor:
        if id(packed) not in done:
            done[id(packed)] = packed.opened()
        return done[id(packed)]

    return map_leaves(once, value, Packed)


def packed(packing: Packing, value: Any) -> Any:
    """An output with its tensors packed; one that stands twice in it stays one."""
    done: dict[int, Packed] = {}

    def once(tensor: torch.Tensor) -> Packed:
        if id(tensor) not in done:
            done[id(tensor)] = packing.pack(tensor)
        return done[id(tensor)]

    return map_leaves(once, value, torch.Tensor)


def map_leaves(function: Callable[[Any], Any], value: Any, leaf: type | tuple[type, ...]) -> Any:
    """`value` with `function` applied to each `leaf` in its tuples, lists, dicts and output objects."""
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        items = {key: map_leaves(function, each, leaf) for key, each in entries.items()}
        made: Any = type(entries)
        return items if made is dict else made(**items)
    if isinstance(value, list | tuple):
        sequence = cast("list[Any] | tuple[Any, ...]", value)
        each = [map_leaves(function, item, leaf) for item in sequence]
        kind: Any = type(sequence)
        return kind(*each) if hasattr(sequence, "_fields") else kind(each)
    return value
