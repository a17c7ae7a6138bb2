"""diffusers' cache API under its own names, and tables of facts about diffusers' models.

    from cachepolicy.diffusers import PyramidAttentionBroadcastConfig, enable_cache

The tables are modules of data, which other packages of `cachepolicy` read: `argument_names`, `call_forms`, `denoisers`,
`guidance`, `hook_names`, `module_names` and `timestep_scaling`. They need neither diffusers nor torch.
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
    # The API imports the engine, and the engine imports the tables of this package. So the API is imported on demand.
    if name not in __all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(import_module("cachepolicy.diffusers.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
