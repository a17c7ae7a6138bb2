"""What a module's own forward is given, where a hook of diffusers' context parallelism splits its inputs first."""

from __future__ import annotations

import sys
from typing import Any


def entered(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as the module's forward sees them.

    The hook stands inside the call that is intercepted, and splits anew whatever it is given: residuals and streams
    have to be formed from what came out of it. It gives views and changes nothing, so that it can be asked twice.
    """
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return args, kwargs
    # Where a module carries a hook of diffusers, the hook's own file has been imported; not so this one.
    parallel: Any = sys.modules.get("diffusers.hooks.context_parallel")
    if parallel is None:
        return args, kwargs
    for hook in reversed(list(registry.hooks.values())):
        if isinstance(hook, parallel.ContextParallelSplitHook):
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs
