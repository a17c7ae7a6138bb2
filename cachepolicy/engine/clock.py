"""The clock of a run: steps, branches and trajectories, from a scheduler, a caller's function or the root's argument.

A step is a step of the scheduler, not a call of the model. Nothing is required of the caller; what is there is used.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from cachepolicy.diffusers.timestep_scaling import RAW_SCALE, SCALES, TIMESTEP_NAMES, Scale, listed_class
from cachepolicy.engine.cfg_branches import FAR, Calls, Conditioning, SeenLatents
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.errors import PolicyError
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import Tick

# --- what the caller says --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Context:
    """What `cache_context(name, ...)` says about the calls inside it; None where it says nothing."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None
    timestep: Any = None
    sigma: float | None = None


CONTEXT: ContextVar[Context | None] = ContextVar("cachepolicy_context", default=None)


# --- one call of the root --------------------------------------------------------------------------------


@dataclass(slots=True)
class CallArguments:
    """The arguments of a root call by name, and which of them are the latents and the timestep."""

    named: dict[str, Any]
    latents: str | None
    timestep: str | None

    def signature(self) -> tuple[Any, ...]:
        """Shapes, dtypes and devices of everything that goes in: histories fit only calls with the same."""
        return tuple(
            [
                (name, tensor.shape, tensor.dtype, tensor.device)
                for name, value in self.named.items()
                if name != self.timestep
                for tensor in _tensors(value)
            ]
        )


@dataclass(frozen=True, slots=True)
class Root:
    """What is known of a root's forward before it runs: parameter names and the scale of its timestep."""

    parameters: tuple[str, ...]
    timestep: str | None
    scale: Scale | None
    class_name: str
    listed: bool


def inspect_root(module: torch.nn.Module) -> Root:
    """Read the forward's parameters once."""
    parameters = tuple(inspect.signature(module.forward).parameters)
    timestep = next((name for name in TIMESTEP_NAMES if name in parameters), None)
    listed = listed_class(type(module))
    scale = RAW_SCALE if listed is None else SCALES[listed]
    return Root(parameters, timestep, scale, type(module).__name__, listed is not None)


def arguments_of(root: Root, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallArguments:
    """Bind a call's arguments to names; the latents are the first that holds a tensor of more than places."""
    named: dict[str, Any] = dict(zip(root.parameters, args, strict=False))
    named.update(kwargs)
    latents = None
    for name, value in named.items():
        if name != root.timestep and not _PLACES.search(name) and _tensors(value):
            latents = name
            break
    return CallArguments(named, latents, root.timestep if root.timestep in named else None)


_PLACES = re.compile(r"(^|_)(ids|indices|indexes|masks?)$")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]  # pyright: ignore[reportUnknownVariableType]
    return []


# --- the clock -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    """The steps of one session: one trajectory, whichever of its roots is called.

    `number` counts the steps over all trajectories, `trajectories` those begun.
    """

    step: int = -1
    t: float | None = None
    direction: int = 0
    generation: int | None = None
    begin: int = 0
    extra: int = 0
    number: int = 0
    trajectories: int = 0
    ahead: Ahead = field(default_factory=Ahead)
    numbers: object = None


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the clock reads from, best first: the scheduler with its follower, the caller's function, the argument."""

    scheduler: Any = None
    follower: SchedulerFollower | None = None
    timestep: Callable[[], Any] | None = None
    steps: int | None = None
    reads_t: bool = True


@dataclass(slots=True)
class Reading:
    """One reading of the clock: the tick, whether a trajectory starts or histories no longer fit, what lies ahead.

    `doubtful` and `revives` are those of `BranchMatch`.
    """

    tick: Tick
    starts: bool
    stale: bool
    ahead: Ahead
    doubtful: bool = False
    revives: str | None = None


@dataclass(frozen=True, slots=True)
class _Repeats:
    """How a call is like those of the present step: whether it is one again, and on latents near to it."""

    calls: Calls
    matching: Sequence[str]
    latents: SeenLatents

    def same(self) -> bool:
        """True where a branch of this name or conditioning has been called in this step."""
        return any(branch in self.calls.present for branch in self.matching)

    def stage(self) -> bool:
        """True where it is that on near latents, as the second stage of a step is; tiles are far from one another."""
        return self.calls.stage(self.matching, self.latents)

    def elsewhere(self) -> bool:
        """True where it is that on latents that have nothing to do with those, as another picture's noise."""
        near = [self.latents.distance(self.calls.known[branch].latents) for branch in self.matching]
        return not self.latents.few and all(distance is not None and distance > FAR for distance in near)


def read(clock: Clock, calls: Calls, sources: Sources, root: Root, arguments: CallArguments) -> Reading:
    """Advance the clock by one call of the root.

    Raises:
        PolicyError: the timestep argument fits no known unit and the policy reads `t`.
    """
    context = CONTEXT.get()
    named = arguments.named
    latents = SeenLatents(named.get(arguments.latents or ""))
    besides = (arguments.latents, arguments.timestep)
    conditioning = Conditioning({name: value for name, value in named.items() if name not in besides})
    name = context.name if context is not None else None
    calls.follow(clock.number)
    repeats = _Repeats(calls, calls.matching(name, conditioning), latents)
    if sources.scheduler is not None and sources.follower is not None:
        starts, moved, tick = _by_scheduler(clock, calls, sources.scheduler, sources.follower, root, arguments, repeats)
    else:
        starts, moved, tick = _by_value(clock, calls, sources, context, root, arguments, repeats)
    if starts:
        clock.trajectories += 1
    if starts or moved:
        clock.number += 1
        calls.follow(clock.number)
    if not calls.present and sources.follower is not None:
        calls.raw = named.get(arguments.timestep or "")
    starts = calls.trajectory != clock.trajectories
    if starts:
        calls.begin(clock.trajectories)
    belonging = calls.place(name, conditioning, latents, list(repeats.matching))
    branch = belonging.branch
    signature = arguments.signature()
    stale = not starts and calls.signatures.get(branch, signature) != signature
    calls.signatures[branch] = signature
    tick, ahead = _with_context(tick, branch, context), _ahead(clock, context)
    return Reading(tick, starts, stale, ahead, belonging.doubtful, belonging.revives)


_UNKNOWN = Ahead()
_FALLING = Ahead(direction=-1, lowest=-1.0)
_IN_ONE_DIRECTION = {-1: Ahead(direction=-1), 0: _UNKNOWN, 1: Ahead(direction=1)}


def _ahead(clock: Clock, context: Context | None) -> Ahead:
    """What is known of the steps to come; where the caller says each step by itself, nothing is."""
    if context is None or (context.sigma is None and context.num_inference_steps is None):
        return clock.ahead
    return _UNKNOWN


def _with_context(tick: Tick, branch: str, context: Context | None) -> Tick:
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
    scheduler: Any,
    follower: SchedulerFollower,
    root: Root,
    arguments: CallArguments,
    repeats: _Repeats,
) -> tuple[bool, bool, Tick]:
    timesteps, sigmas = follower.numbers(scheduler)
    raw = arguments.named.get(arguments.timestep or "")
    if clock.generation == follower.generation and _tiled(clock, follower, calls, timesteps, raw, repeats):
        # The loop steps the scheduler for each tile of a timestep.
        clock.extra = clock.step - follower.step
    elif follower.begin is not None and follower.begin + follower.step + min(clock.extra, 0) >= len(timesteps):
        follower.restart()
    starts = clock.generation != follower.generation
    if starts:
        clock.generation, clock.extra = follower.generation, 0
        if follower.begin is None:
            # Found at the present step: what the scheduler has stepped so far lies between it and the beginning.
            follower.begin = max(0, _begin(scheduler, timesteps, root, arguments, follower.step))
        clock.begin = follower.begin
    step = follower.step + clock.extra
    if not starts and raw is not None and step == clock.step and repeats.same() and not _equal(raw, calls.raw):
        # The loop goes on to another timestep without stepping this scheduler: count the steps ourselves.
        starts = _turned(timesteps, root, raw, calls.raw)
        step = 0 if starts else step + 1
        clock.extra = step - follower.step
    moved = step != clock.step
    clock.step = step
    if starts or clock.numbers is not timesteps:
        rest = None if sigmas is None else tuple(sigmas[clock.begin :])
        clock.ahead, clock.numbers = Ahead(tuple(timesteps[clock.begin :]), rest), timesteps
    index = min(clock.begin + step, len(timesteps) - 1)
    sigma = sigmas[index] if sigmas is not None and index < len(sigmas) else None
    clock.t = timesteps[index]
    return starts, moved, Tick(step, timesteps[index], len(timesteps) - clock.begin, sigma)


def _equal(raw: Any, other: Any) -> bool:
    """True where two timestep arguments are equal, also where each frame or sample has its own."""
    if isinstance(raw, torch.Tensor) and isinstance(other, torch.Tensor) and max(raw.numel(), other.numel()) > 1:
        return raw.shape == other.shape and torch.equal(raw, other)
    return other is not None and _number(raw) == _number(other)


def _turned(timesteps: Sequence[float], root: Root, raw: Any, other: Any) -> bool:
    """True where the timestep runs against the scheduler's direction: a chunk is done, the next one begins."""
    now, before = _number(raw), _number(other)
    if root.scale is not None:
        now, before = root.scale.to_training(now), root.scale.to_training(before)
    return (now - before) * (timesteps[-1] - timesteps[0]) < 0


def _tiled(
    clock: Clock, follower: SchedulerFollower, calls: Calls, timesteps: Sequence[float], raw: Any, repeats: _Repeats
) -> bool:
    """True where the scheduler has gone on, but the call is of the same timestep on latents of another place."""
    step, last = follower.step + clock.extra, len(timesteps) - 1
    if step <= clock.step or raw is None or calls.raw is None:
        return False
    now, before = min(clock.begin + step, last), min(clock.begin + clock.step, last)
    if timesteps[now] == timesteps[before] and now != before:
        return False
    return _equal(raw, calls.raw) and not repeats.stage()


def _begin(scheduler: Any, timesteps: Sequence[float], root: Root, arguments: CallArguments, stepped: int) -> int:
    """Where in the scheduler's timesteps this trajectory starts: image-to-image runs start late."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    raw = arguments.named.get(arguments.timestep or "")
    if raw is None or not timesteps:
        return 0
    if root.scale is None:
        return 0
    value = root.scale.to_training(_number(raw, lowest=root.scale.lowest))
    if not root.listed and value <= 1.0:
        return 0  # as likely a fraction as the last timestep
    nearest = min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - value))
    return nearest - stepped if abs(timesteps[nearest] - value) <= _NEAR * max(1.0, abs(value)) else 0


_NEAR = 5e-3  # a timestep that went through bfloat16 is off by up to 1 in 256


def _by_value(
    clock: Clock,
    calls: Calls,
    sources: Sources,
    context: Context | None,
    root: Root,
    arguments: CallArguments,
    repeats: _Repeats,
) -> tuple[bool, bool, Tick]:
    t, known = _timestep(sources, context, root, arguments)
    index = context.step_index if context is not None else None
    if clock.step < 0:
        starts, moved = True, True
    elif index is not None:
        starts, moved = index < clock.step, index != clock.step
    elif t is not None and clock.t is not None and t != clock.t:
        starts, moved = _turns(clock, t, known=known), True
    elif t is not None and clock.step == 0 and repeats.stage():
        # Second-order samplers repeat every timestep but the first: this is a run again, after one that was given up.
        starts, moved = True, True
    else:
        moved = repeats.same() if t is None else repeats.stage()
        unending = len(calls.present) >= _MOST_BRANCHES and (t is None or clock.step == 0)
        starts = unending or (t is None and moved and repeats.elsewhere())
    if not starts and moved and sources.steps is not None and clock.step + 1 >= sources.steps:
        starts = index is None
    if starts or moved:
        following = 0 if starts else clock.step + 1
        clock.step = index if index is not None else following
    clock.t = t
    if starts:
        clock.direction = 0
    clock.ahead = _UNKNOWN if index is not None else _FALLING if known else _IN_ONE_DIRECTION[clock.direction]
    return starts, moved, Tick(clock.step, t, sources.steps)


_MOST_BRANCHES = 16  # a run without a clock looks like ever more branches of one step


def _turns(clock: Clock, t: float, *, known: bool) -> bool:
    """True where the timestep runs against its direction: a new trajectory. In training units it falls."""
    assert clock.t is not None
    direction = 1 if t > clock.t else -1
    if known:
        return direction > 0
    if clock.direction == 0:
        clock.direction = direction
    return direction != clock.direction


def _timestep(
    sources: Sources, context: Context | None, root: Root, arguments: CallArguments
) -> tuple[float | None, bool]:
    """The timestep, and whether it is in training units."""
    if sources.timestep is not None:
        value = sources.timestep()
        if value is None:
            raise PolicyError.of(
                "E320",
                "the `timestep=` function returned None",
                help="it must return the current timestep, a number or a tensor",
            )
        # Whatever the caller counts in: a pipeline's own timestep may even rise.
        return _number(value), False
    if context is not None and context.timestep is not None:
        return _number(context.timestep), True
    raw = arguments.named.get(arguments.timestep or "")
    if raw is None:
        return None, False
    value = _number(raw, lowest=root.scale is not None and root.scale.lowest)
    if sources.reads_t or (root.listed and root.scale is not None):
        return _training(root, value), True
    return value, False


def _training(root: Root, value: float) -> float:
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


def _number(value: Any, *, lowest: bool = False) -> float:
    """A timestep as a number: the largest (or lowest) where each sample, frame or token has its own."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.ndim == 0:
        return _element(value)
    if value.numel() == 1:
        return float(value)
    return float(value.min() if lowest else value.max())


def _element(value: torch.Tensor) -> float:
    """A scalar tensor's number; for an element of `timesteps` the whole tensor is read once, not once a step."""
    base = value._base
    if base is None or base.ndim != 1 or value.device.type == "cpu":
        return float(value)
    numbers: list[float] | None = _read_once.get(base)
    if numbers is None:
        numbers = _read_once[base] = base.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return float(numbers[(value.storage_offset() - base.storage_offset()) // max(1, base.stride(0))])


_read_once: Any = WeakIdKeyDictionary()
