"""Counts the steps of a trajectory by the timesteps of its scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from cachepolicy.diffusers.timestep_scaling import unused_timesteps
from cachepolicy.engine.call_arguments import Root, RowTimesteps, number
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.errors import PolicyError, warn
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import Tick

if TYPE_CHECKING:
    from cachepolicy.engine.clock import Clock, RootCall


def by_scheduler(clock: Clock, call: RootCall) -> tuple[bool, bool, Tick]:
    """Advance the clock by the steps that the scheduler has taken.

    Returns:
        Whether a trajectory starts, whether the step changed, and the tick.
    """
    calls, sources, root = call.calls, call.sources, call.root
    scheduler, follower = sources.scheduler, sources.follower
    assert follower is not None
    own, sigmas = follower.numbers(scheduler)
    timesteps = follower.training(scheduler)
    if timesteps is None:
        if sources.reads_t:
            _refuse_unit(follower, own)
        timesteps = own
    raw = call.arguments.time
    if isinstance(raw, RowTimesteps) and raw.on_cpu:
        _ = raw.value
    turns, step = False, clock.step
    if clock.generation == follower.generation:
        turns, step = _followed(clock, call, timesteps)
    starts = clock.generation != follower.generation
    if starts:
        starts, step = _joined(clock, call, timesteps)
    elif not turns and raw is not None and step == clock.step and call.same() and not _equal(raw, calls.raw):
        # The loop continues with another timestep without stepping this scheduler, so steps are counted here.
        turns = _turned(timesteps, root, raw, calls.raw)
        step = 0 if turns else step + 1
        clock.extra = step - (clock.index - clock.begin + clock.before)
    starts = starts or turns
    moved = step != clock.step
    clock.step = step
    renewed = starts or clock.numbers is not timesteps
    if renewed:
        clock.unused = unused_timesteps(follower.kind, sources.pipeline, timesteps, sigmas)
    length = len(timesteps) - clock.unused
    # The steps of the schedule before the trajectory are counted where the policy was tuned on the whole schedule.
    skipped = clock.begin if not clock.before and length in sources.lengths else 0
    if renewed:
        clock.ahead, clock.numbers = _rest(clock, timesteps[:length], sigmas, skipped), timesteps
    index = min(clock.begin + step - clock.before, len(timesteps) - 1)
    sigma = sigmas[index] if sigmas is not None and index < len(sigmas) else None
    clock.t = timesteps[index]
    steps = length - clock.begin + clock.before + skipped
    return starts, moved, Tick(step + skipped, timesteps[index], steps, sigma)


def _refuse_unit(follower: SchedulerFollower, timesteps: Sequence[float]) -> NoReturn:
    """Reject a scheduler in no known unit, for a policy that reads `t` (E321)."""
    raise PolicyError.of(
        "E321",
        f"the timesteps of `{follower.kind.__name__}` go from {timesteps[0]:g} to {timesteps[-1]:g}, which is"
        " no known unit",
        help="pass `timestep=` (a function that returns the current timestep, 1000 to 0) to `apply`, or let the policy"
        " read `step` or `sigma`",
    )


def _followed(clock: Clock, call: RootCall, timesteps: Sequence[float]) -> tuple[bool, int]:
    """Follow the scheduler within its trajectory. The follower restarts if it is at the end.

    Returns:
        Whether a trajectory starts because the scheduler was set back, and the step.
    """
    scheduler, follower = call.sources.scheduler, call.sources.follower
    assert follower is not None
    first = follower.first(scheduler)
    if first is not None and first != clock.begin and not clock.before:
        # The beginning was guessed from the timestep argument.
        clock.begin = follower.begin = first
        clock.numbers = None
    index, known = follower.index(scheduler)
    reached = index - clock.begin + clock.before
    step, back = reached + clock.extra, False
    if known and index != clock.index:
        back = reached < clock.step and index < clock.index
        if back and index < clock.begin:
            clock.begin = follower.begin = index
            reached, clock.numbers = clock.before, None
        step = reached if back else max(reached, clock.step + 1)
    if not back and _tiled(clock, max(step, reached) if known else step, call, timesteps):
        # The loop steps the scheduler once per tile of a timestep.
        step = clock.step
    elif index + (0 if known else min(clock.extra, 0)) >= len(timesteps):
        follower.restart()
    clock.index, clock.extra = index, step - reached
    return back, step


def _joined(clock: Clock, call: RootCall, timesteps: Sequence[float]) -> tuple[bool, int]:
    """Begin to follow a scheduler: in a new trajectory, or in the present one where the scheduler was replaced.

    Returns:
        Whether a trajectory starts, and the step.
    """
    scheduler, follower, raw = call.sources.scheduler, call.sources.follower, call.arguments.time
    assert follower is not None
    replaced = clock.follower is not None and clock.follower is not follower
    clock.follower, clock.extra = follower, 0
    if replaced:
        following = clock.begin + clock.step + 1 - clock.before
        index = following if timesteps == clock.numbers else _nearest(timesteps, call.root, raw)
        if index is not None and index < len(timesteps):
            follower.restart()
            follower.begin = clock.begin = clock.index = index
            clock.before, clock.generation = clock.step + 1, follower.generation
            return False, clock.before
        warn(
            "W603",
            "the scheduler was replaced during a call, and the new one has not the timestep of the present step",
            help="give the new scheduler the same timesteps, or replace it between two calls",
        )
    clock.before, clock.generation = 0, follower.generation
    if follower.begin is None:
        first = follower.first(scheduler)
        if first is None:
            # The timestep argument gives the index of this step; the steps taken so far lead back to the first one.
            element = follower.element(raw)
            nearest = _nearest(timesteps, call.root, raw) if element is None else element
            first = 0 if nearest is None else max(0, nearest - follower.step)
        follower.begin = first
    clock.begin = follower.begin
    clock.index, _ = follower.index(scheduler)
    return True, clock.index - clock.begin


def _rest(clock: Clock, timesteps: Sequence[float], sigmas: Sequence[float] | None, skipped: int) -> Ahead:
    """Return what is known of the trajectory: the steps that another scheduler took, and those of this one.

    `skipped` steps of the schedule before the trajectory are counted as its own.
    """
    ahead, done, first = clock.ahead, clock.before, clock.begin - skipped
    ahead_sigmas = None if sigmas is None else (*_first(ahead.sigmas, done), *sigmas[first:])
    return Ahead((*_first(ahead.timesteps, done), *timesteps[first:]), ahead_sigmas)


def _first(values: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """Return the first values; unknown ones are infinite."""
    known = tuple(values or ())[:number]
    return (*known, *[math.inf] * (number - len(known)))


def _equal(raw: Any, other: Any) -> bool:
    """Return True if two timestep arguments are equal, with one value or one per frame or sample."""
    if isinstance(raw, torch.Tensor) and isinstance(other, torch.Tensor) and max(raw.numel(), other.numel()) > 1:
        return raw.shape == other.shape and torch.equal(raw, other)
    return other is not None and number(raw) == number(other)


def _turned(timesteps: Sequence[float], root: Root, raw: Any, other: Any) -> bool:
    """Return True if the timestep changed against the scheduler's direction: the next chunk of a video begins."""
    now, before = number(raw), number(other)
    if root.scale is not None:
        now, before = root.scale.to_training(now), root.scale.to_training(before)
    return (now - before) * (timesteps[-1] - timesteps[0]) < 0


def _tiled(clock: Clock, step: int, call: RootCall, timesteps: Sequence[float]) -> bool:
    """Return True if the scheduler was stepped, but the call has the same timestep on other latents (a tile)."""
    raw, before_raw = call.arguments.time, call.calls.raw
    if step <= clock.step or raw is None or before_raw is None:
        return False
    origin, last = clock.begin - clock.before, len(timesteps) - 1
    now, before = min(origin + step, last), min(origin + clock.step, last)
    if timesteps[now] == timesteps[before] and now != before:
        return False
    return _equal(raw, before_raw) and not call.stage()


def _nearest(timesteps: Sequence[float], root: Root, raw: Any) -> int | None:
    """Return the index of the timestep that the root model is called with, or None if it cannot be told."""
    if raw is None or not timesteps or root.scale is None:
        return None
    value = root.scale.to_training(number(raw, lowest=root.scale.lowest))
    if not root.listed and value <= 1.0:
        return None  # may be a fraction or the last timestep
    nearest = min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - value))
    return nearest if abs(timesteps[nearest] - value) <= _NEAR * max(1.0, abs(value)) else None


_NEAR = 5e-3  # relative; a timestep that was converted to bfloat16 is off by up to 1 in 256
