"""Storage formats of histories: another dtype, another device, and copies of small views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from cachepolicy.errors import PolicyError, suggestion


@dataclass(frozen=True, slots=True)
class Packed:
    """A stored tensor, with its original dtype and device, and its scale."""

    tensor: torch.Tensor
    dtype: torch.dtype
    device: torch.device
    scale: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All stored tensors."""
        return (self.tensor,) if self.scale is None else (self.tensor, self.scale)

    def opened(self) -> torch.Tensor:
        """Return the tensor in its original dtype and device, as a new tensor, rounded by the stored dtype."""
        moved = self.tensor.to(self.device)
        restored = moved.to(self.dtype)
        if self.scale is not None:
            return restored * self.scale.to(restored)
        return restored.clone() if restored is self.tensor else restored


@dataclass(frozen=True, slots=True)
class Packing:
    """The dtype in which floating-point tensors are stored, and the device. None leaves them unchanged."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def pack(self, tensor: torch.Tensor) -> Packed:
        """Return the stored form of a tensor, always a copy. Integer tensors keep their dtype."""
        original, scale = tensor.detach(), None
        stored = original
        if self.dtype is not None and original.is_floating_point() and original.dtype is not self.dtype:
            scale = _scale(original, self.dtype)
            stored = (original if scale is None else original / scale).to(self.dtype)
        if self.device is not None and stored.device != self.device:
            stored = _moved(stored, self.device)
        if stored.data_ptr() == original.data_ptr():
            stored = original.clone()
        return Packed(stored, original.dtype, original.device, scale)

    def size(self, tensor: torch.Tensor) -> int:
        """Return an upper bound of the bytes of a packed tensor."""
        changes = self.dtype is not None and tensor.is_floating_point() and tensor.dtype is not self.dtype
        width = self.dtype.itemsize if changes and self.dtype is not None else tensor.element_size()
        return tensor.numel() * width + (_SCALE if changes else 0)


_SCALE = 4  # bytes of the float32 scale


def _scale(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the divisor of a tensor for a dtype of smaller range, or None if the range is sufficient.

    8-bit formats always use their full range, because their small numbers are coarse. 16-bit formats are scaled only if
    a value would overflow.
    """
    most = torch.finfo(dtype).max
    if 2 * most >= torch.finfo(tensor.dtype).max or tensor.numel() == 0:
        return None
    largest = tensor.abs().amax().float()
    # Tensors with NaN or infinity are not scaled by them, so these values stay as they are.
    largest = torch.where(largest.isfinite() & (largest > 0), largest, torch.full_like(largest, most))
    ratio = (largest / most).clamp_min(torch.finfo(torch.float32).tiny)
    return ratio if dtype.itemsize == 1 else ratio.clamp_min(1.0)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on another device. Copies from CUDA to pinned CPU memory are asynchronous."""
    if device.type != "cpu" or tensor.device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


# --- what the caller says --------------------------------------------------------------------------------


def packing_of(dtype: Any, device: Any) -> Packing | None:
    """Return the packing of `history_dtype` and `history_device`, or None if both are None.

    Raises:
        PolicyError: The dtype or device does not exist, or the dtype is not a floating-point dtype (E309).
    """
    if dtype is None and device is None:
        return None
    return Packing(None if dtype is None else _dtype(dtype), None if device is None else _device(device))


def _dtype(setting: Any) -> torch.dtype:
    dtype = getattr(torch, setting.removeprefix("torch."), None) if isinstance(setting, str) else setting
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        help = suggestion(str(setting), _NAMES) or "a torch dtype with fractions, or its name, such as `bfloat16`"
        raise PolicyError.of("E309", f"`history_dtype` is `{setting}`", help=help)
    return dtype


def _device(setting: Any) -> torch.device:
    try:
        return torch.device(setting)
    except (RuntimeError, TypeError) as error:
        raise PolicyError.of("E309", f"`history_device` is `{setting}`", help="such as `cpu` or `cuda:1`") from error


_NAMES = tuple(
    sorted(name for name, value in vars(torch).items() if isinstance(value, torch.dtype) and value.is_floating_point)
)


# --- outputs ---------------------------------------------------------------------------------------------

_MUCH = 2  # a view is copied if its storage is larger than this multiple of its bytes


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy if it is a view that keeps a much larger storage alive."""
    return tensor if is_whole([tensor]) else tensor.clone()


def is_whole(tensors: Sequence[torch.Tensor]) -> bool:
    """Return True if the tensors together make up most of the bytes of their storages."""
    if len(tensors) == 1:
        return tensors[0].untyped_storage().nbytes() <= _MUCH * tensors[0].nbytes
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) <= _MUCH * sum(tensor.nbytes for tensor in tensors)


def opened(value: Any) -> Any:
    """Unpack the tensors in an output."""
    return map_once(Packed.opened, value, Packed)


def packed(packing: Packing, value: Any) -> Any:
    """Pack the tensors in an output."""
    return map_once(packing.pack, value, torch.Tensor)


# torch.utils._pytree treats output classes that are not registered with it as leaves, and its `tree_map` is two to five
# times slower than `map_leaves` for a tensor or a tuple of tensors.


def leaves(value: Any, leaf: type | tuple[type, ...] = torch.Tensor) -> list[Any]:
    """Return all instances of `leaf` in tuples, lists, dicts and output objects, in order."""
    if isinstance(value, leaf):
        return [value]
    if isinstance(value, dict):
        value = cast("Any", value).values()
    elif not isinstance(value, list | tuple):
        return []
    return [element for item in cast("Any", value) for element in leaves(item, leaf)]


def map_once(function: Callable[[Any], Any], value: Any, leaf: type | tuple[type, ...]) -> Any:
    """Apply `function` to each instance of `leaf`, as `map_leaves` does. One that occurs twice is mapped once."""
    # Pairs instead of a dict by `id`, which Dynamo does not trace.
    done: list[tuple[Any, Any]] = []

    def once(element: Any) -> Any:
        for known, result in done:
            if known is element:
                return result
        result = function(element)
        done.append((element, result))
        return result

    return map_leaves(once, value, leaf)


def map_leaves(function: Callable[[Any], Any], value: Any, leaf: type | tuple[type, ...]) -> Any:
    """Apply `function` to all instances of `leaf` in tuples, lists, dicts and output objects.

    Args:
        function: Called with each instance.
        value: The output of a module, of any nesting.
        leaf: The class or classes to look for.

    Returns:
        The output with the results in place of the instances. Values of other classes are kept.
    """
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        items = {key: map_leaves(function, item, leaf) for key, item in entries.items()}
        made: Any = type(entries)
        return items if made is dict else made(**items)
    if isinstance(value, list | tuple):
        sequence = cast("list[Any] | tuple[Any, ...]", value)
        mapped = [map_leaves(function, item, leaf) for item in sequence]
        kind: Any = type(sequence)
        return kind(*mapped) if hasattr(sequence, "_fields") else kind(mapped)
    return value
