"""Follows schedulers: at which timestep each is, from one `set_timesteps` to the next."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import torch

from cachepolicy.diffusers.timestep_scaling import training_units
from cachepolicy.engine.class_swap import ATTRIBUTE, Handle, Method, is_swapped, restore, swap


class SchedulerFollower(Handle):
    """Follows the present timestep of one scheduler. Several runs can use it.

    Attributes:
        kind: The class of the scheduler.
        step: How often `step` was called since the last restart.
        begin: The index of the first timestep of the trajectory, or None before the first call of a model.
        generation: The number of the last restart. No two followers have the same.
        rows: The number of samples of the last call of `step`, or None before it.
        users: The runs that use it.
    """

    __slots__ = (
        "_after", "_at", "_first", "_numbers", "_source", "_training", "begin", "generation", "kind", "rows", "step",
        "users",
    )  # fmt: skip

    def __init__(self, kind: type = object) -> None:
        self.kind = kind
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._source: Any = None
        self._numbers: tuple[list[float], list[float] | None] = ([], None)
        self._training: list[float] | None = []
        self.restart()

    def __deepcopy__(self, memo: object) -> SchedulerFollower:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the follower itself.

        Tiled pipelines copy the `__dict__` of a scheduler and restore it. The restored copy has to keep counting here.
        """
        return self

    def restart(self) -> None:
        """Begin a new trajectory: the next call is step 0."""
        self.step = 0
        self.begin: int | None = None
        self.generation = next(_generations)
        self._first: Any = None
        self._at: Any = None
        self._after: int | None = None
        self.rows: int | None = None

    def stepped(self, scheduler: Any, timestep: Any) -> None:
        """Record a call of `scheduler.step` with this timestep."""
        self._at, self._after = timestep, _step_index(scheduler)
        if not self.step:
            self._first = (self._at, self._after)
        self.step += 1

    def numbers(self, scheduler: Any) -> tuple[list[float], list[float] | None]:
        """Return timesteps and sigmas as floats. They are read from the device once per trajectory."""
        # Compare by identity: comparing values would read them from the device.
        if scheduler.timesteps is not self._source:
            self._source = scheduler.timesteps
            sigmas = getattr(scheduler, "sigmas", None)
            timesteps = _floats(scheduler.timesteps)
            self._numbers = (timesteps, None if sigmas is None else _floats(sigmas))
            inverted = bool(getattr(getattr(scheduler, "config", None), "invert_sigmas", False))
            training = training_units(self.kind, *self._numbers, inverted=inverted)
            self._training = timesteps if training == timesteps else training
        return self._numbers

    def training(self, scheduler: Any) -> list[float] | None:
        """Return the timesteps in training units, or None if they cannot be converted."""
        self.numbers(scheduler)
        return self._training

    def first(self, scheduler: Any) -> int | None:
        """Return the index of the first timestep of the trajectory, or None if the scheduler does not tell it."""
        begin = getattr(scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        if not self.step:
            return self._within(_step_index(scheduler))
        timestep, after = self._first
        return after - 1 if after is not None else self._index_of(timestep, 0)

    def index(self, scheduler: Any) -> tuple[int, bool]:
        """Return the index of the present timestep, from the number of timesteps on where all were done.

        A loop may call `step` more than once for a timestep: once for each row of a batch, or again after it has set
        the scheduler back. So the sources are, best first, the scheduler's own `step_index`, the timestep of the last
        call of `step`, and the number of these calls. `begin` must be set.

        Returns:
            The index, and False if it was counted.
        """
        assert self.begin is not None
        if not self.step:
            index = self._within(_step_index(scheduler))
            return (self.begin if index is None else index), True
        if self._after is not None:
            index = _step_index(scheduler)
            # Loops over tiles put back the state that the scheduler had before its first step.
            return (self.begin, True) if index is None else (index, True)
        index = self._index_of(self._at, self.begin + self.step - 1)
        return (self.begin + self.step, False) if index is None else (index + 1, True)

    def _within(self, index: int | None) -> int | None:
        """Return an index that lies within the timesteps, else None: it is left over from another schedule."""
        return index if index is not None and 0 <= index < len(self._numbers[0]) else None

    def element(self, timestep: Any) -> int | None:
        """Return the index of a tensor that is an element of the scheduler's timesteps, else None.

        It is known by its place in memory: nothing is read from a device.
        """
        every = self._source
        if not isinstance(timestep, torch.Tensor) or not isinstance(every, torch.Tensor) or timestep.numel() != 1:
            return None
        if every.ndim != 1 or not every.stride(0) or not _shares(timestep, every):
            return None
        return self._within((int(timestep.storage_offset()) - int(every.storage_offset())) // every.stride(0))

    def _index_of(self, timestep: Any, near: int) -> int | None:
        """Return the index of a timestep, the nearest to `near` if it occurs more than once, or None.

        Nothing is read from a device.
        """
        index = self.element(timestep)
        if index is not None:
            return index
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1 or timestep.device.type != "cpu":
                return None
        elif isinstance(timestep, bool) or not isinstance(timestep, int | float):
            return None
        value = float(timestep)
        indices = [index for index, number in enumerate(self._numbers[0]) if number == value]
        return min(indices, key=lambda index: abs(index - near), default=None)


_generations = itertools.count()


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _step_index(scheduler: Any) -> int | None:
    """Return the scheduler's own index of the present timestep, or None if it has none or has not begun."""
    index = getattr(scheduler, "step_index", None)
    return index if isinstance(index, int) else None


def _floats(values: Any) -> list[float]:
    return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def _rows(sample: Any) -> int | None:
    return sample.shape[0] if isinstance(sample, torch.Tensor) and sample.ndim else None


def _stepped_samples(result: Any) -> Any:
    """Return the samples in the result of `scheduler.step`, which is a tensor, a tuple or an output object."""
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, tuple):
        return next(iter(cast("tuple[Any, ...]", result)), None)
    return getattr(result, "prev_sample", None)


def follow(scheduler: Any, user: object) -> SchedulerFollower | None:
    """Return the follower of a scheduler for a run.

    Args:
        scheduler: The scheduler. Its class is swapped the first time.
        user: The run.

    Returns:
        The follower, or None if the object is no scheduler.
    """
    follower: Any = getattr(scheduler, "__dict__", {}).get(ATTRIBUTE)
    # Fast path without the lock for schedulers that this run follows already.
    if isinstance(follower, SchedulerFollower) and user in follower.users:
        return follower
    with _lock:
        follower = getattr(scheduler, "__dict__", {}).get(ATTRIBUTE)
        if follower is None:
            if not hasattr(scheduler, "timesteps") or not hasattr(scheduler, "step") or is_swapped(scheduler):
                return None
            follower = SchedulerFollower(cast("Any", type(scheduler)))
            methods = {name: override for name, override in _METHODS.items() if hasattr(scheduler, name)}
            swap(scheduler, methods, follower)
        if isinstance(follower, SchedulerFollower):
            follower.users.add(user)
            return follower
        return None


def unfollow(scheduler: Any, user: object) -> None:
    """Release the follower for a run. The last run restores the class of the scheduler."""
    with _lock:
        follower = scheduler.__dict__.get(ATTRIBUTE)
        if isinstance(follower, SchedulerFollower):
            follower.users.discard(user)
            if not follower.users:
                restore(scheduler)


_lock = threading.Lock()


def _step_override(original: Method) -> Method:
    """Override of `scheduler.step` that records the call."""
    parameters = list(inspect.signature(original).parameters)[1:]
    position = parameters.index("timestep") if "timestep" in parameters else len(parameters)
    sample = parameters.index("sample") if "sample" in parameters else None

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        follower = self.__dict__.get(ATTRIBUTE)
        if follower is not None:
            follower.stepped(self, args[position] if position < len(args) else kwargs.get("timestep"))
            if sample is None:  # the samples have another name, or are an argument of another method
                follower.rows = _rows(_stepped_samples(result))
            else:
                follower.rows = _rows(args[sample] if sample < len(args) else kwargs.get("sample"))
        return result

    return step


def _set_timesteps_override(original: Method) -> Method:
    """Override of `scheduler.set_timesteps` that restarts the follower."""

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        follower = self.__dict__.get(ATTRIBUTE)
        if follower is not None:
            follower.restart()
        return result

    return set_timesteps


_METHODS = {"step": _step_override, "set_timesteps": _set_timesteps_override}

T = TypeVar("T")


class Weakly(Generic[T]):
    """A collection of distinct objects by weak reference."""

    def __init__(self) -> None:
        self._references: list[Callable[[], T | None]] = []
        self._lock = threading.RLock()

    def add(self, item: T) -> None:
        """Add an object, and remove dead references."""
        with self._lock:
            alive = [reference for reference in self._references if reference() is not None]
            if not any(reference() is item for reference in alive):
                alive.append(_reference(item))
            self._references = alive

    def clear(self) -> None:
        """Remove all objects."""
        self._references = []

    def __iter__(self) -> Iterator[T]:
        for reference in self._references:
            item = reference()
            if item is not None:
                yield item


def _reference(item: T) -> Callable[[], T | None]:
    try:
        return cast("Callable[[], T | None]", weakref.ref(item))
    except TypeError:  # objects with slots may not support weak references
        return lambda: item
