"""What identifies a root call on its guidance branch: its conditioning, and its latents.

Conditioning tensors are compared by identity first, then by value. Numbers that change at each step on a branch are
times and do not identify it.
"""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# Arguments of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cachepolicy.diffusers.argument_names import NEW_AT_EACH_STEP

Path = tuple[Any, ...]
_KEPT_BYTES = 64 * 2**20  # larger tensors are compared by identity only


class _Part:
    """One tensor or plain value of a conditioning."""

    __slots__ = ("_float", "_kept", "_reference", "_value", "_version", "form")

    def __init__(self, value: Any) -> None:
        self._kept: torch.Tensor | None = None
        self._reference: weakref.ref[torch.Tensor] | None = None
        self._version = 0
        self._value: Any = None
        self._float = isinstance(value, float)
        self.form: tuple[Any, ...] | None = None
        if isinstance(value, torch.Tensor):
            self._reference = weakref.ref(value)
            self._version = _version(value)
            self.form = (value.shape, value.dtype, value.device)
            if type(value) is torch.Tensor and value.numel() * value.element_size() <= _KEPT_BYTES:
                # `detach` shares the storage and `_version`, but not the autograd graph.
                self._kept = value.detach()
        elif value is None or isinstance(value, _PLAIN):
            self._value = (type(value), value)
        else:
            self._value = _Same(value)

    @property
    def overwritten(self) -> bool:
        """True if the tensor was modified in place since the call."""
        tensor = None if self._reference is None else self._reference()
        return tensor is not None and _version(tensor) != self._version

    def is_of(self, value: Any) -> bool:
        """Return True if the part was made from this value, and the value has not changed since."""
        if isinstance(value, torch.Tensor):
            alive = self._reference is not None and self._reference() is value
            return alive and self._version == _version(value) and self.form == (value.shape, value.dtype, value.device)
        plain = value is None or isinstance(value, _PLAIN)
        return plain and self._reference is None and self._value == (type(value), value)

    def same(self, other: _Part) -> bool:
        """Return True for the same live, unmodified tensor, or equal plain values."""
        if self._reference is None or other._reference is None:
            return self._reference is other._reference and self._value == other._value
        mine = self._reference()
        return mine is not None and mine is other._reference() and self._version == other._version

    def equal(self, other: _Part) -> bool:
        """Return True for the same part or equal tensors. Comparing values synchronizes with their device."""
        if self.same(other):
            return True
        one, two = self._intact(), other._intact()
        if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype or one.device != two.device:
            return False
        return one.device.type != "meta" and torch.equal(one, two)

    def counts(self) -> bool:
        """Return True for a float, or a float tensor of one repeated value. If it changes, it is a time."""
        if self._reference is None:
            return self._float
        kept = self._intact()
        if kept is None or not kept.is_floating_point() or kept.device.type == "meta" or not kept.numel():
            return False
        return kept.numel() == 1 or bool((kept == kept.flatten()[0]).all())

    def _intact(self) -> torch.Tensor | None:
        kept = self._kept
        return kept if kept is not None and _version(kept) == self._version else None


_PLAIN = (str, bytes, int, float, complex, torch.dtype, torch.device, torch.layout)


class _Same:
    """Stands for an object, and is equal only to what stands for the same live object.

    Its `id` is not used, because Python reuses ids of dead objects.
    """

    __slots__ = ("_of",)

    def __init__(self, value: object) -> None:
        try:
            self._of: Callable[[], object] = weakref.ref(value)
        except TypeError:
            self._of = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._of() is not None and self._of() is other._of()

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Conditioning:
    """All arguments of a call except latents and timestep, flattened to parts."""

    __slots__ = ("_flat", "parts")

    def __init__(self, named: Mapping[str, Any]) -> None:
        self.parts: dict[Path, _Part] = {}
        self._flat: dict[str, _Part | None] = {}
        """The parts of arguments that are no containers, and None for arguments that are left out."""
        for name, value in named.items():
            if NEW_AT_EACH_STEP.search(name):
                self._flat[name] = None
                continue
            self._note((name,), value)
            if (name,) in self.parts:
                self._flat[name] = self.parts[name,]

    def is_of(self, named: Mapping[str, Any]) -> bool:
        """Return True if it was made from these arguments, none is a container, and none has changed since."""
        flat = self._flat
        if flat.keys() != named.keys():
            return False
        for name, value in named.items():
            part = flat[name]
            if part is not None and not part.is_of(value):
                return False
        return True

    def _note(self, path: Path, value: Any) -> None:
        if isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self._note((*path, index), item)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._note((*path, key), item)
        else:
            self.parts[path] = _Part(value)

    @property
    def overwritten(self) -> bool:
        """True if a tensor was modified in place since the call."""
        return any(part.overwritten for part in self.parts.values())

    def same(self, other: Conditioning, besides: frozenset[Path] = frozenset()) -> bool:
        """Return True if all parts are identical."""
        return self._matches(other, besides, _Part.same)

    def equal(self, other: Conditioning, besides: frozenset[Path] = frozenset()) -> bool:
        """Return True if all parts are identical or equal."""
        return self._matches(other, besides, _Part.equal)

    def _matches(self, other: Conditioning, besides: frozenset[Path], alike: Any) -> bool:
        if self is other:
            return True
        if (self.parts.keys() ^ other.parts.keys()) - besides:
            return False
        both = [path for path in self.parts if path in other.parts and path not in besides]
        return all(alike(self.parts[path], other.parts[path]) for path in both)

    def differing(self, other: Conditioning) -> frozenset[Path]:
        """Return the paths of the parts that differ."""
        both = self.parts.keys() & other.parts.keys()
        unequal = {path for path in both if not self.parts[path].equal(other.parts[path])}
        return frozenset(unequal | (self.parts.keys() ^ other.parts.keys()))

    def counting(self, other: Conditioning, paths: frozenset[Path]) -> frozenset[Path]:
        """Return those of the given paths that are numbers in both."""
        both = paths & self.parts.keys() & other.parts.keys()
        return frozenset(path for path in both if self.parts[path].counts() and other.parts[path].counts())

    def reshaped(self, other: Conditioning) -> bool:
        """Return True if the shape, dtype or device of a part differs, so that no history can fit."""
        both = self.parts.keys() & other.parts.keys()
        return any(self.parts[path].form != other.parts[path].form for path in both)


class SeenLatents:
    """The latents of a call, for comparison with those of later calls."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, value: Any) -> None:
        tensor = value[0] if isinstance(value, list | tuple) and value else value
        self._tensor: torch.Tensor | None = None
        self._version = 0
        if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.device.type != "meta":
            # Inference tensors have no `_version`, so in-place writes cannot be detected. Keep a clone.
            self._tensor = tensor.clone() if tensor.is_inference() else tensor.detach()
            self._version = _version(self._tensor)

    @property
    def few(self) -> bool:
        """True if the latents are missing, or too small for a reliable distance."""
        return self._tensor is None or self._tensor.numel() < _FEW

    def distance(self, other: SeenLatents) -> float | None:
        """Return the distance of two latents in units of the spread of this one.

        Unrelated noise has a distance of about 1.4.

        Returns:
            The distance, None if it is unknown, or infinity if the shapes or devices differ.
        """
        one, two = self._intact(), other._intact()
        if one is None or two is None:
            return None
        if one.shape != two.shape or one.device != two.device:
            return float("inf")
        one, two = one.float(), two.float()
        apart = float(((one - one.mean()) - (two - two.mean())).abs().mean())
        return 0.0 if apart == 0 else apart / max(float((one - one.mean()).abs().mean()), 1e-12)

    @property
    def overwritten(self) -> bool:
        """True if the latents were modified in place since the call."""
        return self._tensor is not None and self._intact() is None

    def _intact(self) -> torch.Tensor | None:
        return self._tensor if self._tensor is not None and _version(self._tensor) == self._version else None


_FEW = 32
"""The smallest number of elements for a reliable distance."""
