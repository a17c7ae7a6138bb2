"""Identifies the guidance branch of a root call, by `cache_context` name or by its conditioning tensors.

A history answers only calls of its own branch. Calls that cannot be identified compute. Conditioning tensors are
compared by identity first, then by value. Numbers that change at each step on a branch are times and do not identify
it. If several branches have the same conditioning (tiles of one image), the nearest latents decide, if one branch is
clearly the nearest.
"""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# Arguments of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cachepolicy.diffusers.argument_names import NEW_AT_EACH_STEP

_Path = tuple[Any, ...]
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
            self._value = _reference(value)

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


def _reference(value: object) -> object:
    """Return a stand-in for an object. Its `id` is not used, because Python reuses ids of dead objects."""
    try:
        return _Alive(weakref.ref(value))
    except TypeError:
        return _Held(value)


class _Alive:
    """A weakly referenced object, equal only to the same live object."""

    __slots__ = ("_of",)

    def __init__(self, of: weakref.ref[Any]) -> None:
        self._of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alive) and self._of() is not None and self._of() is other._of()

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class _Held:
    """An object without support for weak references, equal only to the same object."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self._value is other._value

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Conditioning:
    """All arguments of a call except latents and timestep, flattened to parts."""

    __slots__ = ("_flat", "parts")

    def __init__(self, named: Mapping[str, Any]) -> None:
        self.parts: dict[_Path, _Part] = {}
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

    def _note(self, path: _Path, value: Any) -> None:
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

    def same(self, other: Conditioning, besides: frozenset[_Path] = frozenset()) -> bool:
        """Return True if all parts are identical."""
        return self._matches(other, besides, _Part.same)

    def equal(self, other: Conditioning, besides: frozenset[_Path] = frozenset()) -> bool:
        """Return True if all parts are identical or equal."""
        return self._matches(other, besides, _Part.equal)

    def _matches(self, other: Conditioning, besides: frozenset[_Path], alike: Any) -> bool:
        if self is other:
            return True
        if (self.parts.keys() ^ other.parts.keys()) - besides:
            return False
        both = [path for path in self.parts if path in other.parts and path not in besides]
        return all(alike(self.parts[path], other.parts[path]) for path in both)

    def differing(self, other: Conditioning) -> frozenset[_Path]:
        """Return the paths of the parts that differ."""
        both = self.parts.keys() & other.parts.keys()
        unequal = {path for path in both if not self.parts[path].equal(other.parts[path])}
        return frozenset(unequal | (self.parts.keys() ^ other.parts.keys()))

    def counting(self, other: Conditioning, paths: frozenset[_Path]) -> frozenset[_Path]:
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


FAR = 1.0
"""Largest distance of two stages of one step. Different tiles, or the noise of different images, are farther apart."""
_FEW = 32
"""The smallest number of elements for a reliable distance."""
_CLEARLY = 0.5
"""The nearest tile must be nearer than this multiple of the second distance."""
_IN_TURN = 0.95
"""The same for the tile that is next in order."""


@dataclass(slots=True)
class Known:
    """State of a known branch: its last call, the parts that change, and when it was called.

    `restless` is True if the last call was assigned to the branch although its conditioning differs.
    """

    name: str | None
    conditioning: Conditioning
    latents: SeenLatents
    changing: frozenset[_Path] = frozenset()
    count: int = 1
    number: int = 0
    restless: bool = False

    @property
    def lasts(self) -> bool:
        """False if every part is a number that changes, so that none identifies the branch."""
        return not self.changing or bool(self.conditioning.parts.keys() - self.changing)


@dataclass(slots=True)
class BranchMatch:
    """The branch of a call. If `doubtful`, its history is not used.

    `revives` names a branch: its history from before a doubtful call of this step belongs to this branch.
    """

    branch: str
    doubtful: bool = False
    revives: str | None = None


@dataclass(slots=True)
class Calls:
    """The calls of one root model in a session: the branches of the current step, and all known branches.

    Attributes:
        number: The number of the current step.
        trajectory: The number of the trajectory.
        raw: The timestep argument of the first call of the current step.
        context: The entry of a `cache_context` that the last call was in, or None.
        present: Branches that were called in the current step.
        known: All known branches.
        doubted: Branches as they were before a doubtful call of the current step.
    """

    number: int = -1
    trajectory: int = -1
    raw: Any = None
    context: object = None
    present: list[str] = field(default_factory=list[str])
    known: dict[str, Known] = field(default_factory=dict[str, Known])
    doubted: dict[str, Known] = field(default_factory=dict[str, Known])
    signatures: dict[str, Any] = field(default_factory=dict[str, Any])

    def copy(self) -> Calls:
        """Return a copy that later calls do not change."""
        return replace(
            self,
            present=[*self.present],
            known={**self.known},
            doubted={**self.doubted},
            signatures={**self.signatures},
        )

    def follow(self, number: int) -> None:
        """Set the number of the current step. A new number clears the state of the step."""
        if self.number != number:
            self.present.clear()
            self.doubted.clear()
            self.number = number

    def begin(self, trajectory: int) -> None:
        """Begin a trajectory without known branches."""
        self.trajectory = trajectory
        self.known.clear()
        self.signatures.clear()

    def conditioning(self, named: Mapping[str, Any]) -> Conditioning:
        """Return the conditioning of a call: that of the last call of a branch, if the arguments are the same."""
        for known in self.known.values():
            if known.conditioning.is_of(named):
                return known.conditioning
        return Conditioning(named)

    def matching(self, name: str | None, conditioning: Conditioning) -> list[str]:
        """Return the known branches that fit this call: by name, else by conditioning."""
        if name is not None:
            return [branch for branch, known in self.known.items() if known.name == name]
        if len(self.known) == 1:
            # One branch is the usual case, and this runs at each call.
            ((branch, known),) = self.known.items()
            if known.conditioning is conditioning and known.name is None and known.lasts:
                return [branch]
        unnamed = {branch: known for branch, known in self.known.items() if known.name is None and known.lasts}
        same = [branch for branch, known in unnamed.items() if conditioning.same(known.conditioning, known.changing)]
        return same or [
            branch for branch, known in unnamed.items() if conditioning.equal(known.conditioning, known.changing)
        ]

    def stage(self, matching: Sequence[str], latents: SeenLatents) -> bool:
        """Return True if this call is another stage of the current step, as in second-order samplers.

        A stage repeats a call on nearby latents.
        """
        if any(branch not in self.present for branch in matching):
            return False
        distances = [latents.distance(self.known[branch].latents) for branch in matching]
        return any(distance is not None and (latents.few or distance <= FAR) for distance in distances)

    def assign(
        self, name: str | None, conditioning: Conditioning, latents: SeenLatents, matching: list[str]
    ) -> BranchMatch:
        """Assign the next call of the current step to a branch, and record it."""
        matching = [branch for branch in matching if branch in self.known]
        match = self._found(name, conditioning, latents, matching)
        branch = match.branch
        before = self.known.get(branch)
        changing, restless = frozenset[_Path](), False
        if match.revives is not None:
            before = self.doubted.pop(match.revives)
            # The doubtful call was the start of another branch, so neither branch has changed.
            other = self.known[match.revives]
            other.changing, other.count, other.restless = frozenset(), 1, False
        if before is not None:
            changing = before.changing if match.revives is None else frozenset()
            if match.doubtful and branch not in matching:
                self.doubted[branch] = before
                if not conditioning.reshaped(before.conditioning):
                    differing = conditioning.differing(before.conditioning)
                    changing |= conditioning.counting(before.conditioning, differing)
                    restless = bool(differing - changing)
        count = 1 if before is None else before.count + 1
        self.known[branch] = Known(name, conditioning, latents, changing, count, self.number, restless)
        self.present.append(branch)
        return match

    def _found(
        self, name: str | None, conditioning: Conditioning, latents: SeenLatents, matching: list[str]
    ) -> BranchMatch:
        if name is None:
            for branch, known in self.doubted.items():
                if conditioning.equal(known.conditioning):
                    return BranchMatch(self._new(name), revives=branch)
        if len(matching) == 1 and matching[0] not in self.present:
            return BranchMatch(matching[0])
        if len(matching) > 1:
            return self._sibling(name, conditioning, latents, matching)
        if name is None and not matching:
            waiting = [branch for branch in self.known if self._may_continue(branch, conditioning)]
            if waiting:
                return BranchMatch(waiting[0], doubtful=not self._alone(waiting[0], conditioning))
        return BranchMatch(self._new(name))

    def _may_continue(self, branch: str, conditioning: Conditioning) -> bool:
        """Return True if a branch of the previous step may continue with this call despite other conditioning.

        After one call any part may be changing, later only parts that changed before. A batch may also lose a half. The
        history is not used in these cases, because the change may indicate another branch.
        """
        known = self.known[branch]
        if known.name is not None or known.number != self.number - 1 or branch in self.present:
            return False
        return known.count == 1 or known.restless or not known.lasts or conditioning.reshaped(known.conditioning)

    def _alone(self, branch: str, conditioning: Conditioning) -> bool:
        """Return True if the conditioning is only a changing number, and there is only one branch."""
        known = self.known[branch]
        return len(self.known) == 1 and not known.lasts and conditioning.equal(known.conditioning, known.changing)

    def _sibling(
        self, name: str | None, conditioning: Conditioning, latents: SeenLatents, matching: list[str]
    ) -> BranchMatch:
        """Choose between branches with the same name or conditioning."""
        exact = [branch for branch in matching if conditioning.equal(self.known[branch].conditioning)]
        if name is None and len(exact) == 1:
            return BranchMatch(exact[0] if exact[0] not in self.present else self._new(name))
        distances = {branch: latents.distance(self.known[branch].latents) for branch in matching}
        near = sorted((distance, branch) for branch, distance in distances.items() if distance is not None)
        waiting = [branch for branch in matching if branch not in self.present]
        if len(near) == len(matching):
            (closest, branch), (second, _) = near[:2]
            clear = closest < _CLEARLY * second
            # The branch that is next in order needs a smaller margin.
            if branch in waiting and (clear or (branch == waiting[0] and closest < min(FAR, _IN_TURN * second))):
                return BranchMatch(branch)
            if clear:
                return BranchMatch(self._new(name))
        return BranchMatch(waiting[0], doubtful=True) if waiting else BranchMatch(self._new(name))

    def _new(self, name: str | None) -> str:
        """Return an unused branch name. The first unnamed branch is "", others are numbered."""
        if name is not None:
            taken = sum(known.name == name for known in self.known.values())
            return f"{name} {taken + 1}" if taken else name
        number = len(self.known)
        while (branch := str(number) if number else "") in self.known:
            number += 1
        return branch
