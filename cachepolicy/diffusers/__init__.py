"""What is known of diffusers, and diffusers' cache API under its own names.

from cachepolicy.diffusers import PyramidAttentionBroadcastConfig, enable_cache
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachepolicy.diffusers.api import (
        CacheMixin,
        apply_faster_cache,
        apply_first_block_cache,
        apply_pyramid_attention_broadcast,
        cache_context,
        disable_cache,
        enable_cache,
        is_cache_enabled,
        reset_stateful_cache,
    )
    from cachepolicy.diffusers.configs import (
        FasterCacheConfig,
        FirstBlockCacheConfig,
        PyramidAttentionBroadcastConfig,
    )

__all__ = [
    "CacheMixin",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "apply_faster_cache",
    "apply_first_block_cache",
    "apply_pyramid_attention_broadcast",
    "cache_context",
    "disable_cache",
    "enable_cache",
    "is_cache_enabled",
    "reset_stateful_cache",
]


def __getattr__(name: str) -> Any:
    # The API needs the engine, and the engine needs the tables of this package: nothing is imported before it is used.
    if name not in __all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(import_module("cachepolicy.diffusers.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
