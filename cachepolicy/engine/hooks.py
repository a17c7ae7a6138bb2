"""Overrides of `__call__`: the root model publishes a frame, the sites read it and act."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch._dynamo

from cachepolicy.diffusers.argument_names import HIDDEN_STATES
from cachepolicy.diffusers.hook_names import REGISTRY
from cachepolicy.engine.actions import (
    ANSWERED,
    COMPUTE,
    COMPUTED,
    RAN,
    REUSE,
    STORE,
    STORE_CLONE,
    counters,
    hidden_states,
    keep,
    reused,
    unfit,
)
from cachepolicy.engine.class_swap import ATTRIBUTE, Handle, Method
from cachepolicy.engine.compile.graph_ops import UNCOMPILED, Stage, call_in_graph, exporting, tracing, waits
from cachepolicy.engine.introspection import unwrapped
from cachepolicy.language import ir
from cachepolicy.planning.history_spec import Keeping

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass
    from cachepolicy.engine.root_model import RootModel
    from cachepolicy.engine.span_run import SpanRun


class _Local(threading.local):
    frame: ForwardPass | None = None
    stage: Stage | None = None
    root: object = None


LOCAL = _Local()
"""The forward pass of this thread's root call, the stage of its current compiled block, and the innermost root model.

A `threading.local` is used because Dynamo can trace it. Dynamo cannot trace a ContextVar.
"""


class SiteHandle(Handle):
    """State of one intercepted module.

    Attributes:
        index: The site number of the module, or -1.
        members: The spans that contain the module, outermost first, with its position in each.
        inputs: Probes that read the inputs of the module.
        outputs: Probes that read the outputs of the module.
        starts: Probes of spans that begin with the module.
        special: Whether a call needs more than the frame.
        block: The number of a block that is compiled alone, or -1.
        within: The site number inside such a block. Equal blocks have equal numbers, so that they share graphs.
        inside: `members` with the numbers inside such a block.
        alone: Whether exactly one span, and no probe, sees the calls.
    """

    __slots__ = (
        "alone", "block", "index", "inputs", "inside", "keeping", "members", "name", "outputs", "owner", "parameters",
        "plain", "special", "starts", "within",
    )  # fmt: skip

    def __init__(self, owner: RootModel, name: str, parameters: Sequence[str]) -> None:
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
        """True if spans or probes observe the calls."""
        return bool(self.members or self.inputs or self.outputs or self.starts)


def parameters_of(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the parameter names of the module's forward. For `torch.compile(module)`, the module inside is read."""
    return tuple(inspect.signature(unwrapped(module).forward).parameters)


class Leave(Exception):
    """Raised to leave the first block of a span that was decided to reuse while the block ran."""

    def __init__(self, span: SpanRun) -> None:
        super().__init__(span)
        self.span = span


_CALL = torch.nn.Module.__call__


def site_override(original: Method) -> Method:  # noqa: PLR0915 (the paths of a hit are written out)
    """Build the `__call__` of a site: answer from the slot, or compute and store, as the frame decides."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 (the paths of a hit are written out)
        frame = LOCAL.frame
        try:
            site: SiteHandle | None = self.__dict__[ATTRIBUTE]
        except KeyError:  # a copy of a site
            return original(self, *args, **kwargs)
        if site is None:  # a copy of a parametrised site, whose class is copied with it
            return original(self, *args, **kwargs)
        if frame is None or frame.owner is not site.owner:
            if not torch.compiler.is_compiling():
                if site.owner.keeps_graphs or site.owner.expects_calls:
                    site.owner.runs_outside(site, self)
                if original is _CALL:
                    # torch.fx patches `Module.__call__` while it traces, so it is looked up at call time.
                    return torch.nn.Module.__call__(self, *args, **kwargs)
            return original(self, *args, **kwargs)
        if tracing():
            return _traced(__call__, original, self, site, frame, args, kwargs)
        if site.special:
            # Fast path for the inner blocks of a span that has answered. Hooks of diffusers may split the inputs.
            if site in frame.passages and REGISTRY not in self.__dict__:
                return frame.passages.pop(site)(args, kwargs)
            if site.block >= 0:
                return _block(original, self, site, frame, args, kwargs)
            return frame.special(original, self, site, args, kwargs)
        index = site.index
        codes = frame.codes
        code = codes[index]
        slot = frame.slots[index]
        # Codes are module constants, so they are compared by identity.
        if code is REUSE:
            states = args[0] if args else kwargs.get(HIDDEN_STATES)
            kept, version, versions = slot.output, slot.version, slot.versions
            # Fast path for the common hits, inlined because it runs on every site call: stored tensors whose hidden
            # states match and whose `_version` shows no in-place write.
            if (
                type(states) is torch.Tensor
                and (version is not None or (versions is not None and not frame.inference))
                and states.shape == slot.shape
                and states.dtype is slot.dtype
                and states.device == slot.device
                and (kept._version == version if version is not None else counters(kept) == versions)
            ):
                codes[index] = ANSWERED
                return kept
            rows = frame.context.rows
            reason = unfit(slot, hidden_states(args, kwargs), rows)
            if reason is None:
                codes[index] = ANSWERED
                return reused(slot, rows, inference=frame.inference)
            frame.unfit.append((index, reason))
            code = frame.store
        elif code is not STORE and code is not COMPUTE and code is not RAN and code is not STORE_CLONE:
            if code is not ANSWERED and code is not COMPUTED:
                return frame.special(original, self, site, args, kwargs)
            # A slot has the result of one call. The second call of a forward pass computes, and so do later passes.
            frame.repeats(index, answered=code is ANSWERED)
            return original(self, *args, **kwargs)
        if code is COMPUTE or code is RAN:
            codes[index] = RAN
            return original(self, *args, **kwargs)
        codes[index] = COMPUTED
        output = original(self, *args, **kwargs)
        if code is STORE and site.plain and slot.whole and not slot.clones:
            # Fast path for the common misses.
            states = args[0] if args else kwargs.get(HIDDEN_STATES)
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
        keep(slot, site.keeping, code, states, output, frame.step, frame.context.rows)
        return output

    return __call__


def _block(
    original: Any, module: Any, site: SiteHandle, frame: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a block that is compiled alone. Its graph reads its own stage, without a block number to guard on."""
    outer = LOCAL.stage
    LOCAL.stage = frame.blocks[site.block] if frame.blocks else None
    try:
        if site.index < 0 and not site.watched:
            frame.release()
            return original(module, *args, **kwargs)
        return frame.special(original, module, site, args, kwargs)
    finally:
        LOCAL.stage = outer


def _traced(
    call: Any,
    original: Any,
    module: Any,
    site: SiteHandle,
    frame: ForwardPass,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a site inside a graph. Pending decisions and unprepared sites break the graph."""
    alone = LOCAL.stage
    stage = frame.stage if alone is None else alone
    if stage is None:
        return _outside(call, module, site, args, kwargs)
    number, members = (site.index, site.members) if alone is None else (site.within, site.inside)
    if members and REGISTRY in module.__dict__:
        # A diffusers hook may split the inputs (context parallelism), so the call is handled outside the graph.
        return _outside(call, module, site, args, kwargs)
    probed = bool(site.inputs or site.outputs or site.starts)
    if probed or waits(stage, number, members):
        _gate(frame, site, module, args, kwargs)
        if waits(stage, number, members):
            return _outside(call, module, site, args, kwargs)
    output = call_in_graph(original, module, stage, number, members, site.parameters, args, kwargs)
    if site.outputs:
        _look_after(frame, site, module, args, kwargs, output)
    return output


AGAIN = object()
"""What `end` returns instead of an output if the forward pass has to run again."""


def _smallest_graph(empty: torch.Tensor) -> torch.Tensor:
    """Compiled to give torch a graph: a `fullgraph=True` call that runs none is reported as an error."""
    return empty.view(-1)


_EMPTY = torch.empty(0)

# torch has no public API for these: skip one frame but not its callees; ask whether a compiler is active in this
# thread; count the graphs that a `fullgraph=True` call has run (-1: not counted). The last two are builtins, callable
# from frames that Dynamo skips. Where torch lacks the first, the compiler is assumed active; without the second,
# nothing is counted.
_skip_code: Callable[[Any], None] = getattr(torch._dynamo.eval_frame, "skip_code", lambda _: None)  # noqa: SLF001
_native: Any = getattr(getattr(cast("Any", torch)._C, "_dynamo", None), "eval_frame", None)  # noqa: SLF001
_callback: Callable[[], Any] = getattr(_native, "get_eval_frame_callback", lambda: True)
_count: Callable[[int], int] = getattr(_native, "set_fullgraph_compiled_frame_count", lambda _: -1)

F = TypeVar("F")


class _Decorator(Protocol):
    def __call__(self, function: F, /) -> F: ...


# `torch.compiler.disable` has no type annotations.
_eager = cast("_Decorator", torch.compiler.disable)  # pyright: ignore[reportUnknownMemberType]
_eager_itself = cast("_Decorator", torch.compiler.disable(recursive=False))  # pyright: ignore[reportUnknownMemberType]


def _with_reason(reason: str) -> _Decorator:
    """Return `_eager` with a reason, which torch reports where a graph must not break."""
    try:
        return cast("_Decorator", torch.compiler.disable(reason=reason))  # pyright: ignore[reportUnknownMemberType]
    except TypeError:  # before torch 2.7
        return _eager


_outside_graphs = _with_reason(
    "a cache policy decides here by what it measures, or learns how blocks go on; compile block by block, or without "
    "`fullgraph=True`"
)


@_outside_graphs
def _gate(
    forward_pass: ForwardPass, site: SiteHandle, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Let probes read the inputs between two graphs, and decide what can be decided."""
    forward_pass.gate(site, module, args, kwargs)


@_outside_graphs
def _look_after(
    forward_pass: ForwardPass, site: SiteHandle, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Let probes read the outputs between two graphs."""
    forward_pass.look_after(site, module, args, kwargs, output)


@_outside_graphs
def _outside(call: Any, module: Any, site: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a site call outside the graph, which breaks the graph."""
    site.owner.graphs.surprised = True
    return call(module, *args, **kwargs)


def _begin_bare(handle: RootModel, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: bool) -> ForwardPass | None:
    return handle.begin(args, kwargs, compiler=compiler)


def _end_bare(handle: RootModel, forward_pass: ForwardPass, output: Any) -> Any:
    return handle.end(forward_pass, output)


_begin, _end = _eager(_begin_bare), _eager(_end_bare)


@_eager
def _again(
    call: Any, module: Any, handle: RootModel, forward_pass: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the forward pass again, outside any graph, and return its output."""
    forward_pass = handle.again(forward_pass, args, kwargs)
    LOCAL.frame, LOCAL.stage = forward_pass, None
    with UNCOMPILED:
        return handle.end(forward_pass, call(module, *forward_pass.args, **forward_pass.kwargs))


@_eager
def _learn(call: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a forward pass outside any graph."""
    with UNCOMPILED:
        return call(module, *args, **kwargs)


@_eager
def _audited(call: Any, module: Any, forward_pass: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the bare model outside any graph, and return the output that the policy would have given."""
    with UNCOMPILED if forward_pass.learns else contextlib.nullcontext():
        LOCAL.frame = None
        forward_pass.computed = call(module, *args, **kwargs)
        LOCAL.frame = forward_pass
        if forward_pass.answered:
            return forward_pass.output
        # The second run must not change the random numbers that the caller draws afterwards.
        devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):  # pyright: ignore[reportUnknownMemberType]
            return call(module, *forward_pass.args, **forward_pass.kwargs)


@_eager
def _fail(handle: RootModel, forward_pass: ForwardPass, error: BaseException) -> None:
    handle.fail(forward_pass, error)


def runs(handle: object) -> bool:
    """Return True inside a forward pass of this root model."""
    return LOCAL.frame is not None and LOCAL.frame.owner is handle


def root_override(original: Method) -> Method:
    """Build the `__call__` of a root model: decide in eager mode, publish the frame, run, restore the frame."""
    decided = _decided(original)

    # `torch.export` rejects disabled frames. It exports the bare model and enters only this frame.
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return original(self, *args, **kwargs) if exporting() else decided(self, *args, **kwargs)

    _skip_code(__call__.__code__)
    return __call__


def root_entry_override(original: Method) -> Method:
    """Build the `_call_impl` of a root model, which `Module.__call__` calls.

    `torch.compile(model)` keeps the `__call__` that the model had at that time. If that was before the policy was
    attached, its calls enter here. Calls that have come through `root_override` pass.
    """
    decided = _decided(original)

    def _call_impl(self: Any, *args: Any, **kwargs: Any) -> Any:
        if exporting() or LOCAL.root is self.__dict__.get(ATTRIBUTE):
            return original(self, *args, **kwargs)
        return decided(self, *args, **kwargs)

    _skip_code(_call_impl.__code__)
    return _call_impl


def _decided(original: Method) -> Method:
    # Dynamo skips this frame and traces its callees, so the decision is never part of a graph.
    @_eager_itself
    def decided(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle: RootModel | None = self.__dict__.get(ATTRIBUTE)
        if handle is None or handle.module is not self:
            # `nn.DataParallel` replicas copy `__dict__`, so they carry the handle of the original; they run bare.
            return original(self, *args, **kwargs)
        frame = LOCAL.frame
        if frame is not None and frame.spans_calls and frame.owner is handle:
            return original(self, *args, **kwargs)
        at_work = _callback() is not None
        compiler = at_work or self.__dict__.get("_compiled_call_impl") is not None
        # Without an active compiler, the `torch.compiler.disable` wrappers are not needed.
        begin, end = (_begin, _end) if at_work else (_begin_bare, _end_bare)
        # Root calls can be nested, so the outer state is restored afterwards.
        outer = LOCAL.frame, LOCAL.stage, LOCAL.root
        forward_pass = begin(handle, args, kwargs, compiler)
        LOCAL.root = handle
        if forward_pass is None:
            try:
                return original(self, *args, **kwargs)
            finally:
                LOCAL.root = outer[2]
        LOCAL.frame, LOCAL.stage = forward_pass, None
        try:
            if forward_pass.compares:
                output = _audited(original, self, forward_pass, args, kwargs)
            elif forward_pass.answered:
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
            output = end(handle, forward_pass, output)
            return output if output is not AGAIN else _again(original, self, handle, forward_pass, args, kwargs)
        except BaseException as error:
            _fail(handle, forward_pass, error)
            raise
        finally:
            LOCAL.frame, LOCAL.stage, LOCAL.root = outer

    return decided
