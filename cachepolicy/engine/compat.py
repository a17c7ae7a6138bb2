"""What else may sit on a model: which of it a policy cannot share the model with, and what the rest needs.

Nothing here imports a neighbour: where its module is not loaded, none of it can be on the model. docs/neighbours.md has
the whole table.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Models are called with anything and return anything: what comes out of it has no type to know.

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from cachepolicy.engine.class_swap import Method, Override, is_swapped, plain
from cachepolicy.engine.compile.graph_ops import exporting
from cachepolicy.engine.hooks import site_override
from cachepolicy.errors import PolicyError

# --- other caches ----------------------------------------------------------------------------------------

_CACHES = {
    "pyramid_attention_broadcast": "Pyramid Attention Broadcast",
    "faster_cache_denoiser": "FasterCache",
    "faster_cache_block": "FasterCache",
    "fbc_leader_block_hook": "First Block Cache",
    "fbc_block_hook": "First Block Cache",
    "mag_cache_leader_block_hook": "MagCache",
    "mag_cache_block_hook": "MagCache",
    "taylorseer_cache": "TaylorSeer",
    "sea_cache_root": "SeaCache",
    "sea_cache_leader_block": "SeaCache",
    "sea_cache_block": "SeaCache",
}
"""The hooks of diffusers' caches that answer for a module, by the names that diffusers registers them under."""


def refuse(root: nn.Module, pipeline: Any = None) -> None:
    """Refuse a model on which somebody else caches: two caches would decide over the same calls, unknown to each other.

    Raises:
        PolicyError: diffusers' or cache-dit's cache is on (E340).
    """
    if "diffusers.hooks" in sys.modules:
        for module in root.modules():
            if "_diffusers_hook" in module.__dict__:
                for name in _CACHES.keys() & hooks_of(module).keys():
                    _refuse(f"diffusers' {_CACHES[name]}", "`model.disable_cache()` takes it off; a policy can do both")
    if "cache_dit" in sys.modules and any(
        "_context_manager" in getattr(each, "__dict__", ()) for each in (root, pipeline)
    ):
        _refuse("cache-dit's cache", "`cache_dit.disable_cache(...)` takes it off; a policy can do both")


def _refuse(cache: str, help: str) -> NoReturn:
    raise PolicyError.of("E340", f"{cache} is on this model, and a policy cannot run beside it", help=help)


def enable_cache_override(original: Method) -> Method:
    """`model.enable_cache(config)` of diffusers, on a model that has a policy."""

    def enable_cache(self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if is_swapped(self) and original.__module__.startswith("diffusers."):
            raise PolicyError.of(
                "E340",
                f"the model has a policy, and diffusers' `{type(config).__name__}` cannot run beside it",
                help="`cachepolicy.remove(model)` first, or say both in one policy",
            )
        return original(self, config, *args, **kwargs)

    return enable_cache


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The hooks of diffusers on a module, by name."""
    registry = module.__dict__.get("_diffusers_hook")
    return {} if registry is None else registry.hooks


def split_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as the module's forward receives them under diffusers' context parallelism.

    The diffusers hook runs inside the intercepted call and splits the arguments. Residuals have to be computed from the
    split tensors. The hook returns views and changes nothing, so it can be called twice.
    """
    if "_diffusers_hook" not in module.__dict__:
        return args, kwargs
    # A module with a hook implies that diffusers' hooks are imported, but not necessarily this file.
    parallel: Any = sys.modules.get("diffusers.hooks.context_parallel")
    if parallel is None:
        return args, kwargs
    for hook in reversed(list(hooks_of(module).values())):
        if isinstance(hook, parallel.ContextParallelSplitHook):
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs


def introduce(module: nn.Module) -> None:
    """Make the class of an intercepted block known where diffusers looks blocks up by their exact class."""
    helpers = sys.modules.get("diffusers.hooks._helpers")
    if helpers is None:
        return
    registry = helpers.TransformerBlockRegistry
    registry._register()  # fills it, once
    known = registry._registry
    own = plain(type(module))
    if own in known:
        known.setdefault(type(module), known[own])


# --- offloading in groups --------------------------------------------------------------------------------


def override_of(module: nn.Module) -> Override:
    """How a site is intercepted: by itself, or with care for the others whose weights come and go with its own."""
    hook = hooks_of(module).get("group_offloading")
    shared = hook is not None and (len(hook.group.modules) > 1 or hook.group.stream is not None)
    return grouped_override if shared else site_override


class _Ran(threading.local):
    def __init__(self) -> None:
        self.modules = set[int]()


_RAN = _Ran()
_LOADED: weakref.WeakSet[Any] = weakref.WeakSet()
"""The groups whose weights a member has brought in, and the last one has not put away yet."""


def grouped_override(original: Method) -> Method:
    """`__call__` of a site in a group that diffusers offloads together.

    There the first block of a group loads for all and the last puts away; either may be answered while others compute.
    """
    inner = site_override(_loading(original))

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        _RAN.modules.discard(id(self))
        output = inner(self, *args, **kwargs)
        if id(self) in _RAN.modules:
            _RAN.modules.discard(id(self))
        else:
            _answered(self)
        return output

    return __call__


def _loading(original: Method) -> Method:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        _RAN.modules.add(id(self))
        hook = hooks_of(self).get("group_offloading")
        if hook is None or not _ours(hook.group):
            return original(self, *args, **kwargs)
        if hook.group.onload_leader not in (None, self) and hook.group not in _LOADED:
            hook.group.onload_()
        _LOADED.add(hook.group)
        output = original(self, *args, **kwargs)
        if hook.group.offload_leader is self:
            _LOADED.discard(hook.group)
        return output

    return __call__


def _answered(module: nn.Module) -> None:
    """A member of a group did not run: what the others rely on it for is done all the same."""
    hook = hooks_of(module).get("group_offloading")
    if hook is None:
        return
    if not _ours(hook.group):
        hook.pre_forward(module)
        hook.post_forward(module, None)
    elif hook.group.offload_leader is module and hook.group in _LOADED:
        hook.group.offload_()
        _LOADED.discard(hook.group)


def _ours(group: Any) -> bool:
    """True where we see every member's call, so that weights are loaded only when one computes.

    With a stream each group is loaded ahead by the one before it; there the chain is kept as it is.
    """
    return group.stream is None and all(map(is_swapped, group.modules))


def left(module: nn.Module) -> None:
    """A module's forward was broken off: those who had prepared it put away what they brought in."""
    align = module.__dict__.get("_hf_hook")
    if align is not None:
        align.post_forward(module, None)
    group = hooks_of(module).get("group_offloading")
    if group is not None:
        group.post_forward(module, None)
        _LOADED.discard(group.group)
    state = getattr(module, "_get_fsdp_state", None)
    if state is not None:
        state()._post_forward(module, (), None)


# --- calls that cannot be followed -----------------------------------------------------------------------


def _said(owner: Any, path: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """What torch has no public name for; a version that lacks it has nothing to say."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner if callable(owner) else otherwise


def _nothing(*_: Any) -> None: ...


_TORCH: Any = vars(torch)["_C"]
_FX: Any = vars(torch.fx).get("_symbolic_trace")
_PROXY: Any = getattr(getattr(_TORCH, "_TorchDispatchModeKey", None), "PROXY", None)
_jit_traces = _said(_TORCH, "_is_tracing", lambda: False)
_dispatch_mode = _said(_TORCH, "_get_dispatch_mode", _nothing)
_transformation = _said(_TORCH, "_functorch.peek_interpreter_stack", _nothing)
_graph_task = _said(_TORCH, "_current_graph_task_id", lambda: -1)


def traced() -> bool:
    """True where the call is recorded, not made: by `torch.export`, `torch.jit.trace`, `torch.fx` or `make_fx`."""
    return (
        exporting()
        or getattr(_FX, "_is_fx_tracing_flag", False)
        or _jit_traces()
        or (_PROXY is not None and _dispatch_mode(_PROXY) is not None)
    )


def checkpointing(root: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that have a switch for gradient checkpointing, as those of diffusers and transformers have."""
    return tuple(module for module in root.modules() if hasattr(module, "gradient_checkpointing"))


def refuse_call(switches: Iterable[nn.Module]) -> None:
    """Refuse a call that a policy cannot follow; `switches` are what `checkpointing` gave.

    Raises:
        PolicyError: the call is inside a transformation of `torch.func`, or would run again in the backward (E342).
    """
    if _transformation() is not None:
        raise _unfollowed("a transformation of `torch.func` calls the model", "transform the bare model")
    if recomputes():
        raise _unfollowed("the backward pass calls the model again", _SWITCH_OFF)
    if torch.is_grad_enabled() and any(each.gradient_checkpointing for each in switches):
        raise _unfollowed("gradient checkpointing would run blocks again in the backward pass", _SWITCH_OFF)


def recomputes() -> bool:
    """True inside a backward pass, where gradient checkpointing runs forwards again."""
    return _graph_task() != -1


def refuse_recompute(name: str) -> NoReturn:
    """Refuse a site that is run again in the backward pass, where nothing tells what it answered.

    Raises:
        PolicyError: always (E342).
    """
    raise _unfollowed(f"gradient checkpointing runs `{name}` again in the backward pass", _SWITCH_OFF)


_SWITCH_OFF = "disable gradient checkpointing, or call the model under `torch.no_grad()`"


def _unfollowed(what: str, help: str) -> PolicyError:
    help = f"{help}; or call it in `with run.disabled():`"
    return PolicyError.of("E342", f"{what}, and a policy cannot follow that", help=help)
