"""The clock of a run: steps, trajectories and branches of the calls of a root model.

A step is a step of the scheduler, not a call of the model. The clock reads the first of these sources that is present:
the scheduler, the caller's `timestep=` function, the `cache_context`, the timestep argument of the root model. Without
any of them, a repeated call counts as the next step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachepolicy.engine.call_arguments import CallArguments, Root, number
from cachepolicy.engine.cfg_branches import FAR, Calls, Known, StateKey
from cachepolicy.engine.conditioning import SeenLatents
from cachepolicy.engine.contexts import CONTEXT, Context
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.engine.scheduler_steps import by_scheduler
from cachepolicy.errors import PolicyError
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import Tick

# --- the clock -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    """State of the clock of one session, which all root models of a pipeline share.

    Attributes:
        step: The step of the trajectory, or -1 before the first call.
        t: The timestep of the last call.
        direction: -1 if the timestep falls, 1 if it rises, 0 if unknown. Used if its unit is unknown.
        follower: The follower of the scheduler at the last call.
        generation: Its generation at the last call.
        index: The index in the scheduler's timesteps at the last call.
        begin: The index in the scheduler's timesteps at which the trajectory began, or this scheduler took over.
        before: The number of steps that another scheduler took in this trajectory.
        extra: Steps of the loop that the scheduler did not take (or -1 for each that it took too often).
        number: The number of steps of all trajectories.
        trajectories: The number of trajectories that have begun.
        ahead: What is known of the remaining steps.
        numbers: The timesteps list that `ahead` was made from.
        unused: How many of the last timesteps no model is called with.
    """

    step: int = -1
    t: float | None = None
    direction: int = 0
    follower: SchedulerFollower | None = None
    generation: int | None = None
    index: int = 0
    begin: int = 0
    before: int = 0
    extra: int = 0
    number: int = 0
    trajectories: int = 0
    ahead: Ahead = field(default_factory=Ahead)
    numbers: object = None
    unused: int = 0


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources that the clock reads.

    Attributes:
        scheduler: The scheduler, or None.
        follower: The follower of the scheduler, or None.
        timestep: The caller's `timestep=` function, or None.
        steps: The number of steps of a trajectory, or None if unknown.
        reads_t: Whether the policy uses the timestep, so that its unit matters.
        lengths: Lengths of schedules within which a trajectory keeps the step numbers of the schedule.
        pipeline: The class of the pipeline that runs, or None.
    """

    scheduler: Any = None
    follower: SchedulerFollower | None = None
    timestep: Callable[[], Any] | None = None
    steps: int | None = None
    reads_t: bool = True
    lengths: frozenset[int] = frozenset()
    pipeline: type | None = None


@dataclass(slots=True)
class Reading:
    """One reading of the clock.

    Attributes:
        tick: Step, timestep and branch of the call.
        starts: Whether a trajectory starts with this call.
        ahead: What is known of the remaining steps.
        known: The branch of the call.
    """

    tick: Tick
    starts: bool
    ahead: Ahead
    known: Known


@dataclass(slots=True)
class RootCall:
    """One call of a root model: what its time is read from, and the earlier calls of the same step."""

    calls: Calls
    sources: Sources
    root: Root
    arguments: CallArguments
    context: Context | None
    matching: Sequence[StateKey]
    latents: SeenLatents

    def same(self) -> bool:
        """Return True if a branch with this name or conditioning was called in this step."""
        return any(branch in self.calls.present for branch in self.matching)

    def stage(self) -> bool:
        """Return True if it repeats a call on nearby latents, as the second stage of a step does.

        The latents of different tiles are far apart.
        """
        return self.calls.stage(self.matching, self.latents)

    def elsewhere(self) -> bool:
        """Return True if it repeats a call on unrelated latents, such as the noise of another picture."""
        near = [self.latents.distance(self.calls.known[branch].latents) for branch in self.matching]
        return not self.latents.few and all(distance is not None and distance > FAR for distance in near)


def read(clock: Clock, calls: Calls, sources: Sources, root: Root, arguments: CallArguments) -> Reading:
    """Advance the clock by one call of a root model.

    Args:
        clock: The clock of the session. It is changed.
        calls: The calls of this root model in the session. They are changed.
        sources: Where to read the step and the timestep.
        root: The root model.
        arguments: The arguments of the call.

    Raises:
        PolicyError: The policy reads `t` and the timestep argument fits no known unit (E321), or the `timestep=`
            function returned None (E320).
    """
    context = CONTEXT.get()
    named = arguments.named
    latents = SeenLatents(arguments.latent_input)
    besides = (arguments.latents, arguments.timestep)
    conditioning = calls.conditioning({name: value for name, value in named.items() if name not in besides})
    name = context.name if context is not None else None
    calls.follow(clock.number)
    matching = calls.matching(name, conditioning)
    call = RootCall(calls, sources, root, arguments, context, matching, latents)
    stated = context is not None and context.own and (context.timestep is not None or context.step_index is not None)
    if sources.scheduler is not None and sources.follower is not None and not stated:
        starts, moved, tick = by_scheduler(clock, call)
    else:
        starts, moved, tick = _by_value(clock, call)
    if starts:
        clock.trajectories += 1
    if starts or moved:
        clock.number += 1
        calls.follow(clock.number)
    if not calls.present and sources.follower is not None:
        calls.raw = arguments.time
    calls.context = context
    starts = calls.trajectory != clock.trajectories
    if starts:
        calls.begin(clock.trajectories)
        matching = []
    known = calls.assign(name, conditioning, latents, arguments.signature(), matching)
    ahead, branch = clock.ahead, known.key.branch
    if context is not None and not (context.sigma is None and context.num_inference_steps is None):
        ahead = _UNKNOWN  # the caller describes each step separately
    if context is not None or branch:
        tick = _with_context(tick, branch, context)
    return Reading(tick, starts, ahead, known)


_UNKNOWN = Ahead()
_FALLING = Ahead(direction=-1, lowest=-1.0)
_IN_ONE_DIRECTION = {-1: Ahead(direction=-1), 0: _UNKNOWN, 1: Ahead(direction=1)}


def _with_context(tick: Tick, branch: str, context: Context | None) -> Tick:
    """Return the tick with its branch, and the values of the context in place of those of the source."""
    sigma, steps = tick.sigma, tick.steps
    if context is not None:
        sigma = float(context.sigma) if context.sigma is not None else sigma
        steps = context.num_inference_steps if context.num_inference_steps is not None else steps
    return Tick(tick.step, tick.t, steps, sigma, branch)


def _by_value(clock: Clock, call: RootCall) -> tuple[bool, bool, Tick]:
    """Advance the clock by the timestep, the context's step index, or repeated calls.

    Returns:
        Whether a trajectory starts, whether the step changed, and the tick.
    """
    calls, sources, context = call.calls, call.sources, call.context
    t, known = _timestep(call, begins=clock.step < 0)
    index = context.step_index if context is not None else None
    if clock.step < 0:
        starts, moved = True, True
    elif index is not None:
        starts, moved = index < clock.step, index != clock.step
    elif t is not None and clock.t is not None and t != clock.t:
        starts, moved = _turns(clock, t, known=known), True
    elif context is not None and calls.context is context and call.same():
        # Tiles enter the context anew. A call that repeats another inside one entry is the next step.
        starts, moved = False, True
    elif t is not None and clock.step == 0 and call.stage():
        # Second-order samplers repeat every timestep except the first, so a run that was aborted starts again.
        starts, moved = True, True
    else:
        moved = call.same() if t is None or (context is not None and context.own) else call.stage()
        unending = len(calls.present) >= _MOST_BRANCHES and (t is None or clock.step == 0)
        starts = unending or (t is None and moved and call.elsewhere())
    steps = sources.steps if context is None or context.num_inference_steps is None else context.num_inference_steps
    if not starts and moved and steps is not None and clock.step + 1 >= steps:
        starts = index is None
    if starts or moved:
        following = 0 if starts else clock.step + 1
        clock.step = index if index is not None else following
    clock.t = t
    if starts:
        clock.direction = 0
    clock.ahead = _UNKNOWN if index is not None else _FALLING if known else _IN_ONE_DIRECTION[clock.direction]
    return starts, moved, Tick(clock.step, t, sources.steps)


_MOST_BRANCHES = 16  # without a clock, calls with new conditioning look like an ever growing number of branches


def _turns(clock: Clock, t: float, *, known: bool) -> bool:
    """Return True if the timestep changed against its direction: a trajectory starts. In training units it falls."""
    assert clock.t is not None
    direction = 1 if t > clock.t else -1
    if known:
        return direction > 0
    if clock.direction == 0:
        clock.direction = direction
    return direction != clock.direction


def _timestep(call: RootCall, *, begins: bool) -> tuple[float | None, bool]:
    """Return the timestep or None, and whether it is in training units.

    Args:
        call: The call.
        begins: Whether this is the first call of a session. A class that is not listed is assumed to count in training
            units, unless this call could be the start of a trajectory in fractions of 1.
    """
    sources, context, root = call.sources, call.context, call.root
    if context is not None and context.own and context.timestep is not None:
        t = number(context.timestep)
        if sources.reads_t and not -_SLACK <= t <= _TOP + _SLACK:
            raise PolicyError.of(
                "E321",
                f"`run.step` was told the timestep {t:g}, which is not in 0..1000",
                help="convert it to training units: 1000 is noise, 0 is the clean sample",
            )
        return t, True
    if sources.timestep is not None:
        value = sources.timestep()
        if value is None:
            raise PolicyError.of(
                "E320",
                "the `timestep=` function returned None",
                help="it must return the current timestep, a number or a tensor",
            )
        # In the caller's own unit, which may even rise.
        return number(value), False
    if context is not None and context.timestep is not None:
        return number(context.timestep), True
    raw = call.arguments.time
    if raw is None:
        return None, False
    value = number(raw, lowest=root.scale is not None and root.scale.lowest)
    if sources.reads_t and begins and not root.listed:
        floating = raw.is_floating_point() if isinstance(raw, torch.Tensor) else not isinstance(raw, int)
        if value == 0 or (0 < value <= _LOW and floating):
            _doubt_unit(root, value)
    if sources.reads_t or (root.listed and root.scale is not None):
        return _training(root, value), True
    return value, False


def _doubt_unit(root: Root, value: float) -> None:
    """Object to a first timestep that may be a fraction of 1 or a noise level, or that begins at the clean sample.

    Raises:
        PolicyError: It is between 0 and 1 (E321).
    """
    doubt = "may rise from there" if value == 0 else "may be a fraction of 1" if value <= 1 else "may be a noise level"
    message = f"`{root.class_name}` was called with the timestep {value:g} at the start, which {doubt}"
    help = "pass `timestep=` (a function that returns the current timestep) or `scheduler=` to `apply`"
    if 0 < value < 1:
        raise PolicyError.of("E321", message, help=help)
    warnings.warn(f"{message}; it is taken for one of 0..1000: {help}", UserWarning, stacklevel=2)


def _training(root: Root, value: float) -> float:
    """Convert a timestep argument to training units."""
    if root.scale is None:
        raise PolicyError.of(
            "E321",
            f"`{root.class_name}` is called with a number that is no timestep",
            help="pass `timestep=` (a function that returns the current timestep) or `scheduler=` to `apply`",
        )
    t = root.scale.to_training(value)
    if not -_SLACK <= t <= _TOP + _SLACK:
        raise PolicyError.of(
            "E321",
            f"`{root.class_name}` was called with the timestep {value:g}, which is not in 0..1000",
            help="pass `timestep=` (a function that returns the current timestep) or `scheduler=` to `apply`",
        )
    return t


_SLACK, _TOP = 1.0, 1000.0
_LOW = 80.0  # the largest noise level of EDM schedules; trajectories in training units begin above, mostly near 1000
