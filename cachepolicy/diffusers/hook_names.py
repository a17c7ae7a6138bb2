"""Where diffusers and accelerate keep their hooks on a module, and how those are called.

From `diffusers.hooks` (0.42.1) and `accelerate.hooks`. None of these names is public, so a test compares them with the
installed packages.
"""

from __future__ import annotations

REGISTRY = "_diffusers_hook"
"""The attribute of a module that holds its `diffusers.hooks.hooks.HookRegistry`."""

ACCELERATE_HOOK = "_hf_hook"
"""The attribute of a module that holds accelerate's hook (CPU and disk offload)."""

GROUP_OFFLOADING = "group_offloading"
"""The hook of `diffusers.hooks.group_offloading`."""

CACHES = {
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
"""The hooks of diffusers' caches that answer for a module, and the names of the caches."""

CACHE_DIT_CONTEXT = "_context_manager"
"""The attribute that cache-dit sets on the models and pipelines that it caches."""

HOOKS_MODULE = "diffusers.hooks"
BLOCK_REGISTRY_MODULE = "diffusers.hooks._helpers"
"""The module of `TransformerBlockRegistry`, which looks blocks up by their exact class."""
CONTEXT_PARALLEL_MODULE = "diffusers.hooks.context_parallel"
"""The module of `ContextParallelSplitHook`, which splits the arguments of a module among processes."""
