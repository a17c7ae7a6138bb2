"""Compatibility with other tools on the same model: offloading, other caches, tracing, gradient checkpointing.

No other tool is imported here: a tool whose module is not loaded cannot be on the model. docs/neighbours.md has the
complete table.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Attributes of models and hooks have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from cachepolicy.diffusers.hook_names import (
    ACCELERATE_HOOK,
    BLOCK_REGISTRY_MODULE,
    CACHE_DIT_CONTEXT,
    CACHES,
    CONTEXT_PARALLEL_MODULE,
    GROUP_OFFLOADING,
    HOOKS_MODULE,
    REGISTRY,
)
from cachepolicy.engine.class_swap import Method, Override, is_swapped, plain
from cachepolicy.engine.compile.graph_ops import exporting
from cachepolicy.engine.hooks import site_override
from cachepolicy.engine.introspection import walk
from cachepolicy.errors import PolicyError

# --- other caches ----------------------------------------------------------------------------------------


def refuse(root: nn.Module, pipeline: Any = None, modules: Iterable[nn.Module] | None = None) -> None:
    """Refuse a model that has another cache. Two caches would decide over the same calls without knowing each other.

    Args:
        root: The root model.
        pipeline: The pipeline that holds it, if any.
        modules: All modules of the root model, if they are known.

    Raises:
        PolicyError: A cache of diffusers or cache-dit is attached (E340).
    """
    if HOOKS_MODULE in sys.modules:
        for module in [module for _, module in walk(root)] if modules is None else modules:
            if REGISTRY in vars(module):
                for name in CACHES.keys() & hooks_of(module).keys():
                    _refuse(f"diffusers' {CACHES[name]}", "`model.disable_cache()` takes it off; a policy can do both")
    if "cache_dit" in sys.modules and any(
        CACHE_DIT_CONTEXT in getattr(holder, "__dict__", ()) for holder in (root, pipeline)
    ):
        _refuse("cache-dit's cache", "`cache_dit.disable_cache(...)` takes it off; a policy can do both")


def _refuse(cache: str, help: str) -> NoReturn:
    raise PolicyError.of("E340", f"{cache} is on this model, and a policy cannot run beside it", help=help)


def enable_cache_override(original: Method) -> Method:
    """Override of diffusers' `model.enable_cache(config)`. It raises E340 while a policy is attached to the model."""

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
    """Return diffusers' hooks on a module by name."""
    registry = module.__dict__.get(REGISTRY)
    return {} if registry is None else registry.hooks


def split_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as the module's forward receives them under diffusers' context parallelism.

    The diffusers hook runs inside the intercepted call and splits the arguments. Residuals have to be computed from the
    split tensors. The hook returns views and changes nothing, so it can be called twice.
    """
    if REGISTRY not in module.__dict__:
        return args, kwargs
    # A module with a hook implies that diffusers' hooks are imported, but not necessarily this file.
    parallel: Any = sys.modules.get(CONTEXT_PARALLEL_MODULE)
    if parallel is None:
        return args, kwargs
    for hook in reversed(list(hooks_of(module).values())):
        if isinstance(hook, parallel.ContextParallelSplitHook):
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs


def introduce(module: nn.Module) -> None:
    """Register the swapped class of a block with diffusers, which looks blocks up by their exact class."""
    helpers = sys.modules.get(BLOCK_REGISTRY_MODULE)
    if helpers is None:
        return
    registry = helpers.TransformerBlockRegistry
    registry._register()  # diffusers fills its registry at the first lookup
    known = registry._registry
    own = plain(type(module))
    if own in known:
        known.setdefault(type(module), known[own])


# --- offloading in groups --------------------------------------------------------------------------------


def override_of(module: nn.Module) -> Override:
    """Return the override of a site's `__call__`: the plain one, or one for modules that are offloaded as a group."""
    hook = hooks_of(module).get(GROUP_OFFLOADING)
    shared = hook is not None and (len(hook.group.modules) > 1 or hook.group.stream is not None)
    return grouped_override if shared else site_override


class _Ran(threading.local):
    """Ids of the modules whose original `__call__` ran in the current call of this thread."""

    def __init__(self) -> None:
        self.modules = set[int]()


_RAN = _Ran()
_LOADED: weakref.WeakSet[Any] = weakref.WeakSet()
"""Groups whose weights were loaded by a member and not yet offloaded by the last one."""


def grouped_override(original: Method) -> Method:
    """Override of `__call__` for a site in a group that diffusers offloads together.

    The first block of a group loads the weights of all, and the last one offloads them. A policy may answer either of
    them while others compute, so loading and offloading are done here where they would be missed.
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
    """Wrap the original `__call__`: load the weights of the group if the leader did not run."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        _RAN.modules.add(id(self))
        hook = hooks_of(self).get(GROUP_OFFLOADING)
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
    """Do the loading or offloading that other members expect of a member that did not run."""
    hook = hooks_of(module).get(GROUP_OFFLOADING)
    if hook is None:
        return
    if not _ours(hook.group):
        hook.pre_forward(module)
        hook.post_forward(module, None)
    elif hook.group.offload_leader is module and hook.group in _LOADED:
        hook.group.offload_()
        _LOADED.discard(hook.group)


def _ours(group: Any) -> bool:
    """Return True if every member is a site, so that weights need to be loaded only if one of them computes.

    With a stream, each group is loaded ahead by the one before it. That order is kept unchanged.
    """
    return group.stream is None and all(map(is_swapped, group.modules))


def left(module: nn.Module) -> None:
    """Undo the preparations of other tools after the forward of a module failed."""
    align = module.__dict__.get(ACCELERATE_HOOK)
    if align is not None:
        align.post_forward(module, None)
    group = hooks_of(module).get(GROUP_OFFLOADING)
    if group is not None:
        group.post_forward(module, None)
        _LOADED.discard(group.group)
    state = getattr(module, "_get_fsdp_state", None)
    if state is not None:
        state()._post_forward(module, (), None)


# --- calls that cannot be followed -----------------------------------------------------------------------


def _private(owner: Any, path: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that has no public name, or `otherwise` in versions without it."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner if callable(owner) else otherwise


def _nothing(*_: Any) -> None: ...


_TORCH: Any = vars(torch)["_C"]
_FX: Any = vars(torch.fx).get("_symbolic_trace")
_PROXY: Any = getattr(getattr(_TORCH, "_TorchDispatchModeKey", None), "PROXY", None)
_jit_traces = _private(_TORCH, "_is_tracing", lambda: False)
_dispatch_mode = _private(_TORCH, "_get_dispatch_mode", _nothing)
_transformation = _private(_TORCH, "_functorch.peek_interpreter_stack", _nothing)
_graph_task = _private(_TORCH, "_current_graph_task_id", lambda: -1)


def traced() -> bool:
    """Return True while the call is traced by `torch.export`, `torch.jit.trace`, `torch.fx` or `make_fx`."""
    return (
        exporting()
        or getattr(_FX, "_is_fx_tracing_flag", False)
        or _jit_traces()
        or (_PROXY is not None and _dispatch_mode(_PROXY) is not None)
    )


def checkpointing(root: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules with a switch for gradient checkpointing, as in diffusers and transformers."""
    # `hasattr` takes long where there is no such attribute, so it is asked once for each class.
    modules = [module for _, module in walk(root)]
    types = list(map(type, modules))
    classes = {kind for kind in set(types) if hasattr(kind, "gradient_checkpointing")}
    return tuple([
        module
        for module, kind in zip(modules, types, strict=True)
        if "gradient_checkpointing" in vars(module) or kind in classes
    ])  # fmt: skip


def refuse_call(switches: Iterable[nn.Module]) -> None:
    """Refuse a call that a policy cannot follow.

    Args:
        switches: The modules that `checkpointing` returned.

    Raises:
        PolicyError: The call is inside a transformation of `torch.func`, or the backward pass would repeat it (E342).
    """
    if _transformation() is not None:
        raise _unfollowed("a transformation of `torch.func` calls the model", "transform the bare model")
    if recomputes():
        raise _unfollowed("the backward pass calls the model again", _SWITCH_OFF)
    if torch.is_grad_enabled() and any(switch.gradient_checkpointing for switch in switches):
        raise _unfollowed("gradient checkpointing would run blocks again in the backward pass", _SWITCH_OFF)


def recomputes() -> bool:
    """Return True inside a backward pass, where gradient checkpointing repeats forwards."""
    return _graph_task() != -1


def refuse_recompute(name: str) -> NoReturn:
    """Refuse a site that the backward pass runs again, because its first answer is not known there.

    Raises:
        PolicyError: Always (E342).
    """
    raise _unfollowed(f"gradient checkpointing runs `{name}` again in the backward pass", _SWITCH_OFF)


_SWITCH_OFF = "disable gradient checkpointing, or call the model under `torch.no_grad()`"


def _unfollowed(subject: str, help: str) -> PolicyError:
    help = f"{help}; or call it in `with run.disabled():`"
    return PolicyError.of("E342", f"{subject}, and a policy cannot follow that", help=help)
