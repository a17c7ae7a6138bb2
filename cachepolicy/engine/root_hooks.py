"""Overrides of the calls of a root model: they decide in eager mode, publish the forward pass and commit it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch._dynamo

from cachepolicy.engine import compat
from cachepolicy.engine.class_swap import ATTRIBUTE, Method
from cachepolicy.engine.compile.graph_ops import UNCOMPILED, exporting
from cachepolicy.engine.contexts import CONTEXT, Context, setting
from cachepolicy.engine.hooks import LOCAL, Decorator, eager
from cachepolicy.engine.refusals import refuse_again, refuse_step
from cachepolicy.errors import PolicyError

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass
    from cachepolicy.engine.root_model import RootModel

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

_eager_itself = cast("Decorator", torch.compiler.disable(recursive=False))  # pyright: ignore[reportUnknownMemberType]


def _begin_bare(handle: RootModel, args: tuple[Any, ...], kwargs: dict[str, Any], compiler: bool) -> ForwardPass | None:
    return handle.begin(args, kwargs, compiler=compiler)


def _end_bare(handle: RootModel, forward_pass: ForwardPass, output: Any) -> Any:
    return handle.end(forward_pass, output)


_begin, _end = eager(_begin_bare), eager(_end_bare)


@eager
def _again(
    call: Any, module: Any, handle: RootModel, forward_pass: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the forward pass again, outside any graph, and return its output."""
    forward_pass = handle.again(forward_pass, args, kwargs)
    LOCAL.frame, LOCAL.stage = forward_pass, None
    with UNCOMPILED:
        return handle.end(forward_pass, call(module, *forward_pass.args, **forward_pass.kwargs))


@eager
def _learn(call: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a forward pass outside any graph."""
    with UNCOMPILED:
        return call(module, *args, **kwargs)


@eager
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


@eager
def _fail(handle: RootModel, forward_pass: ForwardPass, error: BaseException) -> None:
    handle.fail(forward_pass, error)


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


# --- forward passes of code that calls the blocks itself ----------------------------------------------------


def denoiser_of(roots: Mapping[str, RootModel], model: str | torch.nn.Module | None) -> RootModel | None:
    """Return the root model of a `run.step`, or None if the run was removed."""
    every = dict(roots)
    matching = [root for name, root in every.items() if model is None or model == name or model is root.module]
    if len(matching) > 1 or (every and not matching):
        names = " and ".join(f"`{name or type(root.module).__name__}`" for name, root in every.items())
        raise PolicyError.of(
            "E324",
            f"`run.step` is for one denoiser, and the run has {names}",
            help="pass the denoiser or its name first, as in `run.step(pipe.transformer_2, t=t)`",
        )
    return matching[0] if matching else None


@contextlib.contextmanager
def stepped(root: RootModel, context: Context) -> Generator[None]:
    """Return a context manager: the modules that run inside are one forward pass of the root model."""
    refuse_step(root)
    with setting(CONTEXT, context):
        call = root.begin((), {})
    if call is None:
        yield
        return
    outer, thread = (LOCAL.frame, LOCAL.stage), threading.get_ident()
    call.spans_calls = True
    LOCAL.frame, LOCAL.stage = call, None
    try:
        with UNCOMPILED if call.learns else contextlib.nullcontext():
            yield
        if root.end(call, None) is AGAIN:
            refuse_again(root, "it is a `run.step` of the caller")
    except BaseException as error:
        root.fail(call, error)
        raise
    finally:
        call.spans_calls = False
        # A generator that was given up inside may be closed in another thread, which may be in a call of its own.
        if threading.get_ident() == thread:
            LOCAL.frame, LOCAL.stage = outer


# --- the other methods of a root model ----------------------------------------------------------------------


def _cache_context_override(original: Method) -> Method:
    """Override of diffusers' `model.cache_context(name, ...)`: names the guidance branch of the calls inside."""

    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Generator[Any]:
        clock = {key: value for key, value in kwargs.items() if key in Context.__slots__}
        with setting(CONTEXT, Context(name, **clock)), original(self, name, *args, **kwargs) as inner:
            yield inner

    return cache_context


def _reset_override(original: Method) -> Method:
    """Override of `_reset_stateful_cache`, which diffusers pipelines call at their end: ends the session."""

    def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        root = self.__dict__.get(ATTRIBUTE)
        if root is not None:
            root.attachment.sessions.end_current()
        return original(self, *args, **kwargs)

    return _reset_stateful_cache


ROOT_METHODS = {
    "cache_context": _cache_context_override,
    "_reset_stateful_cache": _reset_override,
    "enable_cache": compat.enable_cache_override,
}
"""Overrides by the name of the method. Classes without the method get none."""
