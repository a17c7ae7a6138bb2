"""What runs inside an intercepted call: the root publishes a frame, the sites look up and act."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, cast

import torch

from cachepolicy import ir
from cachepolicy.actions import (
    ANSWER,
    COMPUTE,
    PENDING,
    REUSE,
    STORE,
    Slot,
    counters,
    hidden_states,
    keep,
    reused,
    unfit,
)
from cachepolicy.keeping import Keeping
from cachepolicy.swap import ATTRIBUTE, Handle, Method


class Frame:
    """What the root decided for one call: for each site number a code and a slot. Sites read it and nothing else.

    `unfit` collects the sites whose history did not fit their call after all, so that they computed. `turn` is asked by
    sites whose action is more than a store or a reuse. `profile` collects times where the run is profiled.
    """

    __slots__ = (
        "codes",
        "half",
        "halved",
        "inference",
        "owner",
        "profile",
        "serial",
        "shares",
        "slots",
        "step",
        "store",
        "turn",
        "unfit",
    )

    def __init__(
        self, owner: object, codes: Sequence[str], slots: Sequence[Slot], turn: SpecialTurn, step: int
    ) -> None:
        self.owner = owner
        self.codes = codes
        self.slots = slots
        self.store = turn.store
        self.turn = turn
        self.step = step
        self.halved = turn.halved
        self.half = turn.half
        self.inference = turn.inference
        self.shares = not turn.halved and not turn.inference
        self.serial = next(_serials)
        self.unfit: list[tuple[int, str]] = []
        self.profile: list[Any] = []


_serials = itertools.count()


class _Local(threading.local):
    frame: Frame | None = None


LOCAL = _Local()
"""The frame of the root call that this thread is in. Dynamo traces a `threading.local`, not a ContextVar."""


class Site(Handle):
    """What an intercepted module knows of itself.

    `index` is its own site number, or -1; `members` are the spans (or the chain of its own) that it stands in, with its
    position there, the outermost first; `inputs` and `outputs` are the probes that look at it, `starts` those of spans
    that begin with it. `special` is set where
    any
    of these needs more than the frame.
    """

    __slots__ = (
        "index", "inputs", "keeping", "members", "name", "outputs", "owner", "parameters", "plain", "special", "starts",
    )  # fmt: skip

    def __init__(self, owner: Owner, name: str, parameters: Sequence[str]) -> None:
        self.owner = owner
        self.name = name
        self.parameters = tuple(parameters)
        self.index = -1
        self.keeping = Keeping(0, 0, streams=False, halves=False)
        self.plain = False
        self.members: list[tuple[int, int]] = []
        self.inputs: list[ir.Probe] = []
        self.outputs: list[ir.Probe] = []
        self.starts: list[ir.Probe] = []
        self.special = False


def parameters_of(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes."""
    return tuple(inspect.signature(module.forward).parameters)


class Owner(Protocol):
    """What a site asks of the root that it belongs to, where it is called outside the root's calls."""

    keeps_graphs: bool

    def refuse_recompute(self, name: str) -> None:
        """Raise where the call is a second run of what the root has answered."""
        ...


class Leave(Exception):
    """A span was decided while its first block ran, and reuses: the block is left."""

    def __init__(self, span: int) -> None:
        super().__init__(span)
        self.span = span


class SpecialTurn(Protocol):
    """What a frame's sites ask of the turn."""

    halved: bool
    half: int
    inference: bool
    store: str

    def special(self, original: Any, module: Any, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that the frame's codes do not settle."""
        ...

    def repeats(self, site: int) -> None:
        """The site was called a second time in one forward."""
        ...


_CALL = torch.nn.Module.__call__


def site_override(original: Method) -> Method:
    """`__call__` of a site: answer from the slot, or compute and keep, as the frame says."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        frame = LOCAL.frame
        site: Site | None = self.__dict__.get(ATTRIBUTE)
        if frame is None or site is None or frame.owner is not site.owner:
            if site is not None and not torch.compiler.is_compiling():
                if site.owner.keeps_graphs:
                    site.owner.refuse_recompute(site.name)
                if original is _CALL:
                    # torch.fx exchanges this method while it records modules by their calls.
                    return torch.nn.Module.__call__(self, *args, **kwargs)
            return original(self, *args, **kwargs)
        if site.special:
            return frame.turn.special(original, self, site, args, kwargs)
        index = site.index
        code = frame.codes[index]
        slot = frame.slots[index]
        if code is REUSE:
            states = args[0] if args else kwargs.get("hidden_states")
            kept, version, versions = slot.output, slot.version, slot.versions
            # The usual hits, written out: a tensor or some, kept from hidden states like these, that nobody wrote into.
            if (
                type(states) is torch.Tensor
                and (version is not None or (versions is not None and frame.shares))
                and states.shape == slot.shape
                and states.dtype is slot.dtype
                and states.device == slot.device
                and (kept._version == version if version is not None else counters(kept) == versions)
            ):
                return kept
            reason = unfit(slot, hidden_states(args, kwargs), halved=frame.halved)
            if reason is None:
                return reused(slot, halved=frame.halved, half=frame.half, inference=frame.inference)
            frame.unfit.append((index, reason))
            code = frame.store
        elif code is ANSWER or code is PENDING:
            return frame.turn.special(original, self, site, args, kwargs)
        output = original(self, *args, **kwargs)
        if code is COMPUTE:
            return output
        if not torch.compiler.is_compiling():
            if slot.call == frame.serial:
                frame.turn.repeats(index)
            slot.call = frame.serial
            if code is STORE and site.plain and not slot.clones:
                # The usual misses, likewise.
                states = args[0] if args else kwargs.get("hidden_states")
                version, versions = None, None
                if type(output) is not torch.Tensor:
                    versions = counters(output)
                elif not output.requires_grad and not output.is_inference():
                    version = output._version
                if type(states) is torch.Tensor and (version is not None or versions is not None):
                    slot.output, slot.version, slot.versions = output, version, versions
                    slot.shape = states.shape
                    slot.dtype = states.dtype
                    slot.device = states.device
                    return output
        # Reading the step would make a compiled graph a step; only predictors and halved batches ask for it.
        step, full = (-1, True) if site.plain else (frame.step, not frame.halved)
        keep(slot, site.keeping, code, hidden_states(args, kwargs), output, step=step, full=full)
        return output

    return __call__


class RootTurn(Protocol):
    """One call of a root, between its decision and its end; `args` and `kwargs` are what the root is run with."""

    frame: Frame
    answered: bool
    output: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class RootHandle(Protocol):
    """What the root's override asks: `begin` decides (None: run bare), then `end` or `fail`."""

    module: torch.nn.Module

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RootTurn | None:
        """The call's decisions, or None."""
        ...

    def end(self, turn: Any, output: Any) -> Any:
        """Commit the call; gives its output."""
        ...

    def fail(self, turn: Any, error: BaseException) -> None:
        """Undo the call."""
        ...


F = TypeVar("F")


class _Decorator(Protocol):
    def __call__(self, function: F, /) -> F: ...


# What torch gives here has no types.
_eager = cast("_Decorator", torch.compiler.disable)  # pyright: ignore[reportUnknownMemberType]
_eager_itself = cast("_Decorator", torch.compiler.disable(recursive=False))  # pyright: ignore[reportUnknownMemberType]


@_eager
def _begin(handle: RootHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RootTurn | None:
    return handle.begin(args, kwargs)


@_eager
def _end(handle: RootHandle, turn: RootTurn, output: Any) -> Any:
    return handle.end(turn, output)


@_eager
def _fail(handle: RootHandle, turn: RootTurn, error: BaseException) -> None:
    handle.fail(turn, error)


def root_override(original: Method) -> Method:
    """`__call__` of a root: decide in eager, publish the frame, run, take the frame back."""

    # Dynamo skips this frame and traces what it calls, so that the decision is never part of a graph.
    @_eager_itself
    def decided(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle: RootHandle | None = self.__dict__.get(ATTRIBUTE)
        # A replica of `nn.DataParallel` shares the handle, and lives for one call.
        turn = None if handle is None or handle.module is not self else _begin(handle, args, kwargs)
        if handle is None or turn is None:
            return original(self, *args, **kwargs)
        outer = LOCAL.frame
        LOCAL.frame = turn.frame
        try:
            output = turn.output if turn.answered else original(self, *turn.args, **turn.kwargs)
            return _end(handle, turn, output)
        except BaseException as error:
            _fail(handle, turn, error)
            raise
        finally:
            LOCAL.frame = outer

    # torch puts a check in front that refuses an export; here an export is of the bare model.
    unchecked = getattr(decided, "__wrapped__", decided)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if torch.compiler.is_exporting():
            return original(self, *args, **kwargs)
        return unchecked(self, *args, **kwargs)

    return __call__
