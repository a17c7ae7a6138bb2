"""The clock of a run: steps, trajectories and branches of the calls of a root model.

A step is a step of the scheduler, not a call of the model. The clock reads the first of these sources that is present:
the scheduler, the caller's `timestep=` function, the `cache_context`, the timestep argument of the root model. Without
any of them, a repeated call counts as the next step.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.utils.weak import WeakIdKeyDictionary

from cachepolicy.diffusers.argument_names import POSITIONS_OR_MASKS, TIMESTEP_NAMES
from cachepolicy.diffusers.timestep_scaling import Scale, listed_class, scale_of, unused_timesteps
from cachepolicy.engine.cfg_branches import FAR, Calls, Known, StateKey
from cachepolicy.engine.conditioning import SeenLatents
from cachepolicy.engine.history_packing import leaves
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.errors import PolicyError, warn
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import Tick

# --- the caller's context --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Context:
    """The arguments of `cache_context(name, ...)` or `run.step(...)`, which apply to the calls inside.

    None means not given.

    Attributes:
        name: The guidance branch, such as `"cond"`.
        step_index: The step of the trajectory, from 0.
        num_inference_steps: The number of steps of the trajectory.
        timestep: The timestep in training units (0..1000), a number or a tensor.
        sigma: The noise level of the step.
        own: Whether it is a `run.step(...)`, which comes before all other sources.
    """

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None
    timestep: Any = None
    sigma: float | None = None
    own: bool = False


CONTEXT: ContextVar[Context | None] = ContextVar("cachepolicy_context", default=None)


def step_context(*, t: Any, step: Any, steps: Any, sigma: Any, branch: Any) -> Context:
    """Return the context of a `run.step(...)`, whose arguments these are.

    Raises:
        PolicyError: A value does not fit (E324).
    """

    def whole(value: Any, least: int) -> bool:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)

    def real(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() == 1
        return value is None or (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    problem = None
    if not real(t):
        problem = f"`t` is `{t!r}`", "the timestep in training units (0..1000), a number or a tensor of one element"
    elif not whole(step, 0):
        problem = f"`step` is `{step!r}`", "the number of the step, from 0"
    elif not whole(steps, 1):
        problem = f"`steps` is `{steps!r}`", "the number of steps of a trajectory, at least 1"
    elif step is not None and steps is not None and step >= steps:
        problem = f"`step` is {step} of {steps} `steps`", f"steps count from 0 to {steps - 1}"
    elif not real(sigma):
        problem = f"`sigma` is `{sigma!r}`", "the noise level, a number"
    elif branch is not None and not isinstance(branch, str):
        problem = f"`branch` is `{branch!r}`", "the name of the guidance branch, such as `cond`"
    if problem is not None:
        raise PolicyError.of("E324", problem[0], help=problem[1])
    return Context(branch or "", step, steps, t, sigma, own=True)


# --- one call of the root --------------------------------------------------------------------------------


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
            latents = self.named.get(self.latents or "")
            rows = len(latents) if isinstance(latents, torch.Tensor | list | tuple) else 0  # pyright: ignore[reportUnknownArgumentType]
            if value.shape[0] == value.numel() == rows:
                value = value.flatten()[0] if value.stride(0) == 0 else RowTimesteps(value)
        self.time = value

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
class _Repeats:
    """Compares a call with the earlier calls of the same step."""

    calls: Calls
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
    latents = SeenLatents(named.get(arguments.latents or ""))
    besides = (arguments.latents, arguments.timestep)
    conditioning = calls.conditioning({name: value for name, value in named.items() if name not in besides})
    name = context.name if context is not None else None
    calls.follow(clock.number)
    repeats = _Repeats(calls, calls.matching(name, conditioning), latents)
    stated = context is not None and context.own and (context.timestep is not None or context.step_index is not None)
    if sources.scheduler is not None and sources.follower is not None and not stated:
        starts, moved, tick = _by_scheduler(clock, calls, sources, root, arguments, repeats)
    else:
        starts, moved, tick = _by_value(clock, calls, sources, context, root, arguments, repeats)
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
    known = calls.assign(name, conditioning, latents, arguments.signature(), repeats.matching)
    return Reading(_with_context(tick, known.key.branch, context), starts, _ahead(clock, context), known)


_UNKNOWN = Ahead()
_FALLING = Ahead(direction=-1, lowest=-1.0)
_IN_ONE_DIRECTION = {-1: Ahead(direction=-1), 0: _UNKNOWN, 1: Ahead(direction=1)}


def _ahead(clock: Clock, context: Context | None) -> Ahead:
    """Return what is known of the remaining steps: nothing if the caller describes each step separately."""
    if context is None or (context.sigma is None and context.num_inference_steps is None):
        return clock.ahead
    return _UNKNOWN


def _with_context(tick: Tick, branch: str, context: Context | None) -> Tick:
    """Return the tick with its branch, and the values of the context in place of those of the source."""
    if context is None and not branch:
        return tick
    sigma, steps = tick.sigma, tick.steps
    if context is not None:
        sigma = float(context.sigma) if context.sigma is not None else sigma
        steps = context.num_inference_steps if context.num_inference_steps is not None else steps
    return Tick(tick.step, tick.t, steps, sigma, branch)


def _by_scheduler(
    clock: Clock,
    calls: Calls,
    sources: Sources,
    root: Root,
    arguments: CallArguments,
    repeats: _Repeats,
) -> tuple[bool, bool, Tick]:
    """Advance the clock by the steps that the scheduler has taken.

    Returns:
        Whether a trajectory starts, whether the step changed, and the tick.
    """
    scheduler, follower = sources.scheduler, sources.follower
    assert follower is not None
    own, sigmas = follower.numbers(scheduler)
    timesteps = follower.training(scheduler)
    if timesteps is None:
        if sources.reads_t:
            _refuse_unit(follower, own)
        timesteps = own
    raw = arguments.time
    if isinstance(raw, RowTimesteps) and raw.on_cpu:
        _ = raw.value
    turns, step = False, clock.step
    if clock.generation == follower.generation:
        turns, step = _followed(clock, calls, scheduler, follower, timesteps, raw, repeats)
    starts = clock.generation != follower.generation
    if starts:
        starts, step = _joined(clock, scheduler, follower, timesteps, root, raw)
    elif not turns and raw is not None and step == clock.step and repeats.same() and not _equal(raw, calls.raw):
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


def _followed(
    clock: Clock,
    calls: Calls,
    scheduler: Any,
    follower: SchedulerFollower,
    timesteps: Sequence[float],
    raw: Any,
    repeats: _Repeats,
) -> tuple[bool, int]:
    """Follow the scheduler within its trajectory. The follower restarts if it is at the end.

    Returns:
        Whether a trajectory starts because the scheduler was set back, and the step.
    """
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
    if not back and _tiled(clock, max(step, reached) if known else step, calls, timesteps, raw, repeats):
        # The loop steps the scheduler once per tile of a timestep.
        step = clock.step
    elif index + (0 if known else min(clock.extra, 0)) >= len(timesteps):
        follower.restart()
    clock.index, clock.extra = index, step - reached
    return back, step


def _joined(
    clock: Clock, scheduler: Any, follower: SchedulerFollower, timesteps: Sequence[float], root: Root, raw: Any
) -> tuple[bool, int]:
    """Begin to follow a scheduler: in a new trajectory, or in the present one where the scheduler was replaced.

    Returns:
        Whether a trajectory starts, and the step.
    """
    replaced = clock.follower is not None and clock.follower is not follower
    clock.follower, clock.extra = follower, 0
    if replaced:
        following = clock.begin + clock.step + 1 - clock.before
        index = following if timesteps == clock.numbers else _nearest(timesteps, root, raw)
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
            nearest = _nearest(timesteps, root, raw) if element is None else element
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
    return other is not None and _number(raw) == _number(other)


def _turned(timesteps: Sequence[float], root: Root, raw: Any, other: Any) -> bool:
    """Return True if the timestep changed against the scheduler's direction: the next chunk of a video begins."""
    now, before = _number(raw), _number(other)
    if root.scale is not None:
        now, before = root.scale.to_training(now), root.scale.to_training(before)
    return (now - before) * (timesteps[-1] - timesteps[0]) < 0


def _tiled(clock: Clock, step: int, calls: Calls, timesteps: Sequence[float], raw: Any, repeats: _Repeats) -> bool:
    """Return True if the scheduler was stepped, but the call has the same timestep on other latents (a tile)."""
    if step <= clock.step or raw is None or calls.raw is None:
        return False
    origin, last = clock.begin - clock.before, len(timesteps) - 1
    now, before = min(origin + step, last), min(origin + clock.step, last)
    if timesteps[now] == timesteps[before] and now != before:
        return False
    return _equal(raw, calls.raw) and not repeats.stage()


def _nearest(timesteps: Sequence[float], root: Root, raw: Any) -> int | None:
    """Return the index of the timestep that the root model is called with, or None if it cannot be told."""
    if raw is None or not timesteps or root.scale is None:
        return None
    value = root.scale.to_training(_number(raw, lowest=root.scale.lowest))
    if not root.listed and value <= 1.0:
        return None  # may be a fraction or the last timestep
    nearest = min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - value))
    return nearest if abs(timesteps[nearest] - value) <= _NEAR * max(1.0, abs(value)) else None


_NEAR = 5e-3  # relative; a timestep that was converted to bfloat16 is off by up to 1 in 256


def _by_value(
    clock: Clock,
    calls: Calls,
    sources: Sources,
    context: Context | None,
    root: Root,
    arguments: CallArguments,
    repeats: _Repeats,
) -> tuple[bool, bool, Tick]:
    """Advance the clock by the timestep, the context's step index, or repeated calls.

    Returns:
        Whether a trajectory starts, whether the step changed, and the tick.
    """
    t, known = _timestep(sources, context, root, arguments, begins=clock.step < 0)
    index = context.step_index if context is not None else None
    if clock.step < 0:
        starts, moved = True, True
    elif index is not None:
        starts, moved = index < clock.step, index != clock.step
    elif t is not None and clock.t is not None and t != clock.t:
        starts, moved = _turns(clock, t, known=known), True
    elif context is not None and calls.context is context and repeats.same():
        # Tiles enter the context anew. A call that repeats another inside one entry is the next step.
        starts, moved = False, True
    elif t is not None and clock.step == 0 and repeats.stage():
        # Second-order samplers repeat every timestep except the first, so a run that was aborted starts again.
        starts, moved = True, True
    else:
        moved = repeats.same() if t is None or (context is not None and context.own) else repeats.stage()
        unending = len(calls.present) >= _MOST_BRANCHES and (t is None or clock.step == 0)
        starts = unending or (t is None and moved and repeats.elsewhere())
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


def _timestep(
    sources: Sources, context: Context | None, root: Root, arguments: CallArguments, *, begins: bool
) -> tuple[float | None, bool]:
    """Return the timestep or None, and whether it is in training units.

    Args:
        sources: Where to read the timestep.
        context: The context of the call, or None.
        root: The root model.
        arguments: The arguments of the call.
        begins: Whether this is the first call of a session. A class that is not listed is assumed to count in training
            units, unless this call could be the start of a trajectory in fractions of 1.
    """
    if context is not None and context.own and context.timestep is not None:
        t = _number(context.timestep)
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
        return _number(value), False
    if context is not None and context.timestep is not None:
        return _number(context.timestep), True
    raw = arguments.time
    if raw is None:
        return None, False
    value = _number(raw, lowest=root.scale is not None and root.scale.lowest)
    if sources.reads_t and begins and not root.listed and (value == 0 or (0 < value <= _LOW and _floating(raw))):
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


def _floating(raw: Any) -> bool:
    return raw.is_floating_point() if isinstance(raw, torch.Tensor) else not isinstance(raw, int)


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


def _number(value: Any, *, lowest: bool = False) -> float:
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
