"""The arguments of a module's forward, where diffusers' context parallelism splits them first."""

from __future__ import annotations

import sys
from typing import Any


def split_arguments(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as the module's forward receives them.

    The diffusers hook runs inside the intercepted call and splits the arguments. Residuals have to be computed from the
    split tensors. The hook returns views and changes nothing, so it can be called twice.
    """
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return args, kwargs
    # A module with a hook implies that diffusers' hooks are imported, but not necessarily this file.
    parallel: Any = sys.modules.get("diffusers.hooks.context_parallel")
    if parallel is None:
        return args, kwargs
    for hook in reversed(list(registry.hooks.values())):
        if isinstance(hook, parallel.ContextParallelSplitHook):
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs
