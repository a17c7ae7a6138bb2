"""What runs inside an intercepted call: the root publishes a frame, the sites look up and act."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
import torch._dynamo

from cachepolicy.engine.actions import (
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
from cachepolicy.engine.class_swap import ATTRIBUTE, Handle, Method
from cachepolicy.engine.compile.graph_ops import UNCOMPILED, Stage, exporting, traced, tracing, waits
from cachepolicy.language import ir
from cachepolicy.planning.history_spec import Keeping


class Frame:
    """What the root decided for one call: for each site number a code and a slot. Sites read it and nothing else.

    `unfit` collects the sites whose history did not fit their call after all, so that they computed. `forward_pass`
    handles the sites whose action is more than a store or a reuse. `profile` collects times where the run is profiled.
    Compiled graphs read `stage`, or their block's in `blocks`.
    """

    __slots__ = (
        "blocks",
        "codes",
        "forward_pass",
        "half",
        "halved",
        "inference",
        "owner",
        "profile",
        "serial",
        "shares",
        "slots",
        "stage",
        "step",
        "store",
        "unfit",
    )

    def __init__(
        self, owner: object, codes: Sequence[str], slots: Sequence[Slot], forward_pass: SignalPass, step: int
    ) -> None:
        self.owner = owner
        self.codes = codes
        self.slots = slots
        self.store = forward_pass.store
        self.forward_pass = forward_pass
        self.step = step
        self.halved = forward_pass.halved
        self.half = forward_pass.half
        self.inference = forward_pass.inference
        self.shares = not forward_pass.halved and not forward_pass.inference
        self.serial = next(_serials)
        self.unfit: list[tuple[int, str]] = []
        self.profile: list[Any] = []
        self.stage: Stage | None = None
        self.blocks: Sequence[Stage] = ()


_serials = itertools.count()


class _Local(threading.local):
    frame: Frame | None = None
    stage: Stage | None = None


LOCAL = _Local()
"""The frame of the root call that this thread is in, and the stage of the compiled block that it is in.

Dynamo traces a `threading.local`, not a ContextVar.
"""


class Site(Handle):
    """What an intercepted module knows of itself.

    `index` is its own site number, or -1; `members` are the spans (or the chain of its own) that it stands in, with its
    position there, the outermost first; `inputs` and `outputs` are the probes that look at it, `starts` those of spans
    that begin with it. `special` is set where any of these needs more than the frame, or where it is a block that is
    compiled alone: the number `block` of that, -1 elsewhere. Inside such a block a site has the number `within` and
    the members `inside`, so that equal blocks share their graphs. `alone`: one span and nothing else sees its calls.
    """

    __slots__ = (
        "alone", "block", "index", "inputs", "inside", "keeping", "members", "name", "outputs", "owner", "parameters",
        "plain", "special", "starts", "within",
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
        self.alone = False
        self.block = -1
        self.within = -1
        self.inside: list[tuple[int, int]] = []

    @property
    def watched(self) -> bool:
        """True where spans or probes have to see its calls."""
        return bool(self.members or self.inputs or self.outputs or self.starts)


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


class SignalPass(Protocol):
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

    def gate(self, site: Site, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A probed or waiting module is about to run in a graph."""
        ...

    def look_after(self, site: Site, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A probed module has run in a graph."""
        ...

    def release(self) -> None:
        """Decide what graphs wait for, where all signals are there."""
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
        if tracing():
            return _traced(__call__, original, self, site, frame, args, kwargs)
        if site.special:
            if site.block >= 0:
                return _block(original, self, site, frame, args, kwargs)
            return frame.forward_pass.special(original, self, site, args, kwargs)
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
            return frame.forward_pass.special(original, self, site, args, kwargs)
        output = original(self, *args, **kwargs)
        if code is COMPUTE:
            return output
        if slot.call == frame.serial:
            frame.forward_pass.repeats(index)
        slot.call = frame.serial
        if code is STORE and site.plain and slot.whole and not slot.clones:
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
        states = hidden_states(args, kwargs)
        keep(slot, site.keeping, code, states, output, step=frame.step, full=not frame.halved)
        return output

    return __call__


def _block(original: Any, module: Any, site: Site, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A block that is compiled alone: its graph is to find its own stage, and no number of its own."""
    outer = LOCAL.stage
    LOCAL.stage = frame.blocks[site.block] if frame.blocks else None
    try:
        if site.index < 0 and not site.watched:
            frame.forward_pass.release()
            return original(module, *args, **kwargs)
        return frame.forward_pass.special(original, module, site, args, kwargs)
    finally:
        LOCAL.stage = outer


def _traced(
    call: Any, original: Any, module: Any, site: Site, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A call inside a graph; what needs a decision on the way, or was never seen outside, leaves it."""
    alone = LOCAL.stage
    stage = frame.stage if alone is None else alone
    if stage is None:
        return _outside(call, module, site, args, kwargs)
    number, members = (site.index, site.members) if alone is None else (site.within, site.inside)
    if members and "_diffusers_hook" in module.__dict__:
        # A hook may split what the module is called with, and is asked outside.
        return _outside(call, module, site, args, kwargs)
    probed = bool(site.inputs or site.outputs or site.starts)
    if probed or waits(stage, number, members):
        _gate(frame.forward_pass, site, module, args, kwargs)
        if waits(stage, number, members):
            return _outside(call, module, site, args, kwargs)
    output = traced(original, module, stage, number, members, site.parameters, args, kwargs)
    if site.outputs:
        _look_after(frame.forward_pass, site, module, args, kwargs, output)
    return output


class RootPass(Protocol):
    """One call of a root, between its decision and its end; `args` and `kwargs` are what the root is run with."""

    frame: Frame
    answered: bool
    output: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    learns: bool


class RootHandle(Protocol):
    """What the root's override asks: `begin` decides (None: run bare), then `end` or `fail`."""

    module: torch.nn.Module

    def surprised(self) -> None:
        """A site found itself in a graph that was not prepared for it."""
        ...

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool) -> RootPass | None:
        """The call's decisions, or None; `compiler` says whether the root is compiled as a whole."""
        ...

    def end(self, forward_pass: Any, output: Any) -> Any:
        """Commit the call; gives its output."""
        ...

    def fail(self, forward_pass: Any, error: BaseException) -> None:
        """Undo the call."""
        ...


def _smallest_graph(empty: torch.Tensor) -> torch.Tensor:
    """Something to compile: torch takes a `fullgraph=True` call that needed no graph for a mistake."""
    return empty.view(-1)


_EMPTY = torch.empty(0)

# What torch has no public name for: to skip a frame and not what it calls; whether a compiler is at work in the thread;
# how many graphs a `fullgraph=True` call has run, -1 where nobody counts. The last two are builtins, for frames that
# Dynamo skips; an older torch that lacks the first is taken to be at work, one without the second does not count.
_skip_code: Callable[[Any], None] = getattr(torch._dynamo.eval_frame, "skip_code", lambda _: None)  # noqa: SLF001
_native: Any = getattr(getattr(cast("Any", torch)._C, "_dynamo", None), "eval_frame", None)  # noqa: SLF001
_callback: Callable[[], Any] = getattr(_native, "get_eval_frame_callback", lambda: True)
_count: Callable[[int], int] = getattr(_native, "set_fullgraph_compiled_frame_count", lambda _: -1)

F = TypeVar("F")


class _Decorator(Protocol):
    def __call__(self, function: F, /) -> F: ...


# What torch gives here has no types.
_eager = cast("_Decorator", torch.compiler.disable)  # pyright: ignore[reportUnknownMemberType]
_eager_itself = cast("_Decorator", torch.compiler.disable(recursive=False))  # pyright: ignore[reportUnknownMemberType]


def _with_reason(reason: str) -> _Decorator:
    """`_eager` with a reason, which torch shows where a graph may not break."""
    try:
        return cast("_Decorator", torch.compiler.disable(reason=reason))  # pyright: ignore[reportUnknownMemberType]
    except TypeError:  # before torch 2.7
        return _eager


_outside_graphs = _with_reason(
    "a cache policy decides here by what it measures, or learns how blocks go on; compile block by block, or without "
    "`fullgraph=True`"
)


@_outside_graphs
def _gate(forward_pass: SignalPass, site: Site, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Between two graphs: probes see what goes in, and what can be decided now is."""
    forward_pass.gate(site, module, args, kwargs)


@_outside_graphs
def _look_after(
    forward_pass: SignalPass, site: Site, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Between two graphs: probes see what comes out."""
    forward_pass.look_after(site, module, args, kwargs, output)


@_outside_graphs
def _outside(call: Any, module: Any, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call of a site as it is without a compiler: a break of the graph."""
    cast("RootHandle", site.owner).surprised()
    return call(module, *args, **kwargs)


def _begin_bare(handle: RootHandle, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: bool) -> RootPass | None:
    return handle.begin(args, kwargs, compiler=compiler)


def _end_bare(handle: RootHandle, forward_pass: RootPass, output: Any) -> Any:
    return handle.end(forward_pass, output)


_begin, _end = _eager(_begin_bare), _eager(_end_bare)


@_eager
def _learn(call: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward outside any graph."""
    with UNCOMPILED:
        return call(module, *args, **kwargs)


@_eager
def _fail(handle: RootHandle, forward_pass: RootPass, error: BaseException) -> None:
    handle.fail(forward_pass, error)


def root_override(original: Method) -> Method:
    """`__call__` of a root: decide in eager, publish the frame, run, take the frame back."""

    # Dynamo skips this frame and traces what it calls, so that the decision is never part of a graph.
    @_eager_itself
    def decided(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle: RootHandle | None = self.__dict__.get(ATTRIBUTE)
        if handle is None or handle.module is not self:
            # A replica of `nn.DataParallel` shares the handle, and lives for one call.
            return original(self, *args, **kwargs)
        at_work = _callback() is not None
        compiler = at_work or self.__dict__.get("_compiled_call_impl") is not None
        # Where no compiler is at work, nothing has to be kept from it.
        begin, end = (_begin, _end) if at_work else (_begin_bare, _end_bare)
        forward_pass = begin(handle, args, kwargs, compiler)
        if forward_pass is None:
            return original(self, *args, **kwargs)
        outer = LOCAL.frame, LOCAL.stage
        LOCAL.frame, LOCAL.stage = forward_pass.frame, None
        try:
            if forward_pass.answered:
                output = forward_pass.output
            elif forward_pass.learns:
                output = _learn(original, self, forward_pass.args, forward_pass.kwargs)
            else:
                output = original(self, *forward_pass.args, **forward_pass.kwargs)
            if compiler and (forward_pass.answered or forward_pass.learns):
                counted = _count(0)
                if counted < 0:
                    _count(counted)
                else:
                    _smallest_graph(_EMPTY)
            return end(handle, forward_pass, output)
        except BaseException as error:
            _fail(handle, forward_pass, error)
            raise
        finally:
            LOCAL.frame, LOCAL.stage = outer

    # torch refuses to export what it may not enter; an export is of the bare model, and enters this frame alone.
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return original(self, *args, **kwargs) if exporting() else decided(self, *args, **kwargs)

    _skip_code(__call__.__code__)
    return __call__
