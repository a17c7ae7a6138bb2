"""The override of a site's `__call__`: it reads the forward pass that the root model has published, and acts."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

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
from cachepolicy.engine.compile.graph_ops import Stage, call_in_graph, tracing, waits
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


@dataclass(slots=True, eq=False, repr=False)
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

    owner: RootModel
    name: str
    parameters: tuple[str, ...]
    index: int = -1
    keeping: Keeping = field(default_factory=lambda: Keeping(0, 0, streams=False, halves=False))
    plain: bool = False
    members: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    inputs: list[ir.Probe] = field(default_factory=list[ir.Probe])
    outputs: list[ir.Probe] = field(default_factory=list[ir.Probe])
    starts: list[ir.Probe] = field(default_factory=list[ir.Probe])
    special: bool = False
    alone: bool = False
    block: int = -1
    within: int = -1
    inside: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

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
                and (
                    kept._version == version
                    if version is not None
                    else slot.flat and tuple([tensor._version for tensor in kept]) == versions
                )
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
                slot.output, slot.version, slot.versions, slot.flat = output, version, versions, versions is not None
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


F = TypeVar("F")


class Decorator(Protocol):
    """A decorator that keeps the type of a function."""

    def __call__(self, function: F, /) -> F:
        """Return the decorated function."""
        ...


# `torch.compiler.disable` has no type annotations.
eager = cast("Decorator", torch.compiler.disable)  # pyright: ignore[reportUnknownMemberType]


def _with_reason(reason: str) -> Decorator:
    """Return `eager` with a reason, which torch reports where a graph must not break."""
    try:
        return cast("Decorator", torch.compiler.disable(reason=reason))  # pyright: ignore[reportUnknownMemberType]
    except TypeError:  # before torch 2.7
        return eager


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


def runs(handle: object) -> bool:
    """Return True inside a forward pass of this root model."""
    return LOCAL.frame is not None and LOCAL.frame.owner is handle
