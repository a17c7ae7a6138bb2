"""Follows schedulers: counts each `step`, and restarts at each `set_timesteps`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

from cachepolicy.engine.class_swap import ATTRIBUTE, Handle, Method, is_swapped, restore, swap


class SchedulerFollower(Handle):
    """Counts the steps of one scheduler. Several runs can use it."""

    __slots__ = ("_numbers", "_source", "begin", "generation", "step", "users")

    def __init__(self) -> None:
        self.step = 0
        self.begin: int | None = None
        self.generation = 0
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._source: Any = None
        self._numbers: tuple[list[float], list[float] | None] = ([], None)

    def __deepcopy__(self, memo: object) -> SchedulerFollower:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the follower itself.

        Tiled pipelines copy the `__dict__` of a scheduler and restore it. The restored copy has to keep counting here.
        """
        return self

    def restart(self) -> None:
        """Begin a new trajectory: the next call is step 0."""
        self.step = 0
        self.begin = None
        self.generation += 1

    def numbers(self, scheduler: Any) -> tuple[list[float], list[float] | None]:
        """Return timesteps and sigmas as floats. They are read from the device once per trajectory."""
        # Compare by identity: comparing values would read them from the device.
        if scheduler.timesteps is not self._source:
            self._source = scheduler.timesteps
            sigmas = getattr(scheduler, "sigmas", None)
            self._numbers = (_floats(scheduler.timesteps), None if sigmas is None else _floats(sigmas))
        return self._numbers


def _floats(values: Any) -> list[float]:
    return [float(each) for each in (values.tolist() if hasattr(values, "tolist") else values)]


def follow(scheduler: Any, user: object) -> SchedulerFollower | None:
    """Return the follower of a scheduler for a run, or None if the object is no scheduler."""
    follower: Any = getattr(scheduler, "__dict__", {}).get(ATTRIBUTE)
    # Fast path without the lock for schedulers that this run follows already.
    if isinstance(follower, SchedulerFollower) and user in follower.users:
        return follower
    with _lock:
        follower = getattr(scheduler, "__dict__", {}).get(ATTRIBUTE)
        if follower is None:
            if not hasattr(scheduler, "timesteps") or not hasattr(scheduler, "step") or is_swapped(scheduler):
                return None
            follower = SchedulerFollower()
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
    """Override of `scheduler.step` that counts."""

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        follower = self.__dict__.get(ATTRIBUTE)
        if follower is not None:
            follower.step += 1
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
            alive = [each for each in self._references if each() is not None]
            if not any(each() is item for each in alive):
                alive.append(_reference(item))
            self._references = alive

    def clear(self) -> None:
        """Remove all objects."""
        self._references = []

    def __iter__(self) -> Iterator[T]:
        for each in self._references:
            item = each()
            if item is not None:
                yield item


def _reference(item: T) -> Callable[[], T | None]:
    try:
        return cast("Callable[[], T | None]", weakref.ref(item))
    except TypeError:  # objects with slots may not support weak references
        return lambda: item
