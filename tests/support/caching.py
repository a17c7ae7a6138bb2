"""What tests need of the hooks of diffusers' own caches, in each version of diffusers."""

from __future__ import annotations

from torch import nn


def set_cache_context(model: nn.Module, name: str) -> None:
    """Name the context of all later calls, also of a model without `CacheMixin`, which has no `cache_context`."""
    from diffusers.hooks import hooks

    if hasattr(hooks, "CacheContext"):
        hooks._set_cache_context(model, hooks.CacheContext(name))
    else:  # before diffusers 0.42
        hooks.HookRegistry.check_if_exists_or_initialize(model)._set_context(name)
