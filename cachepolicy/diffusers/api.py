"""diffusers' cache API over policies: the names of diffusers 0.42.1, for any model.

    cachepolicy.enable_cache(pipe.transformer, PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))

Every config stands for a shipped policy: `cachepolicy.format(config.policy())` shows it. `apply_*` and `enable_cache`
give the `Run`, which diffusers does not. diffusers itself is not needed, and torch only when a cache is attached.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from cachepolicy.diffusers.configs import (
    CacheConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    config_of,
)
from cachepolicy.errors import PolicyError

if TYPE_CHECKING:
    from cachepolicy.engine.run import Run

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


# --- one function for each cache -------------------------------------------------------------------------


def apply_pyramid_attention_broadcast(module: Any, config: PyramidAttentionBroadcastConfig) -> Run:
    """Attach Pyramid Attention Broadcast to a model; diffusers' own config is taken too.

    Raises:
        PolicyError: the config is for another cache, the model has a policy already, or nothing is selected in it.
    """
    return _apply(module, config, PyramidAttentionBroadcastConfig)


def apply_faster_cache(module: Any, config: FasterCacheConfig) -> Run:
    """Attach FasterCache, in diffusers' variant, to a model whose batches hold both halves of guidance.

    Raises:
        PolicyError: as for `apply_pyramid_attention_broadcast`.
    """
    return _apply(module, config, FasterCacheConfig)


def apply_first_block_cache(module: Any, config: FirstBlockCacheConfig) -> Run:
    """Attach First Block Cache to a model with a chain of blocks.

    Raises:
        PolicyError: as for `apply_pyramid_attention_broadcast`.
    """
    return _apply(module, config, FirstBlockCacheConfig)


def _apply(module: Any, given: object, kind: type) -> Run:
    config = config_of(given)
    if config is None or not isinstance(config, kind):
        raise PolicyError.of("E150", f"`{type(given).__name__}` stands where a `{kind.__name__}` is asked for")
    return _attach(module, config)


def _attach(model: Any, config: CacheConfig) -> Run:
    """Attach a config, and tell of identifiers that name no attention: the shipped policies let them be optional."""
    from cachepolicy.engine.run import apply

    run = apply(model, config)
    if isinstance(config, FasterCacheConfig):
        _require_attention(run, config)
    return run


def _require_attention(run: Run, config: FasterCacheConfig) -> None:
    asked = config.spatial_attention_block_skip_range or config.temporal_attention_block_skip_range
    if not asked or any(site.modules != ("",) for plan in run.plans.values() for site in plan.sites):
        return
    message = f"the identifiers of `FasterCacheConfig` name no attention in `{type(run.target).__name__}`"
    if config.is_guidance_distilled:
        run.remove()
        raise PolicyError.of("E308", message, help="`cachepolicy plan` shows a model's modules")
    warnings.warn(f"{message}; only the unconditional half is skipped", UserWarning, stacklevel=4)


# --- for an instance of any class ------------------------------------------------------------------------


def enable_cache(model: Any, config: Any) -> Run:
    """Attach what a config says to a model or pipeline of any class.

    Raises:
        PolicyError: there is a cache already, the config is none that is known, or it does not fit the model.
    """
    known = config_of(config)
    if known is None:
        message = f"`{type(config).__name__}` is no cache config"
        raise PolicyError.of("E150", message, help="`cachepolicy.apply` takes policies of any kind")
    return _attach(model, known)


def disable_cache(model: Any) -> None:
    """Take the cache off; where there is none, that is a warning as in diffusers.

    Raises:
        PolicyError: a forward is running through it.
    """
    from cachepolicy.engine.run import run_of

    run = run_of(model)
    if run is None:
        warnings.warn("no cache has been enabled, so there is nothing to disable", UserWarning, stacklevel=2)
        return
    run.remove()


def is_cache_enabled(model: Any) -> bool:
    """True while a policy is attached, by whatever name it was."""
    from cachepolicy.engine.run import run_of

    return run_of(model) is not None


@contextlib.contextmanager
def cache_context(model: Any, name: str, **kwargs: Any) -> Generator[None]:
    """Calls inside are of the branch `name` (`"cond"`, `"uncond"`, ...); contexts nest.

    `step_index`, `num_inference_steps`, `timestep` and `sigma` may be told too. `model` says whose calls are meant.
    """
    from cachepolicy.engine.clock import CONTEXT, Context

    del model
    token = CONTEXT.set(Context(name, **kwargs))
    try:
        yield
    finally:
        CONTEXT.reset(token)


def reset_stateful_cache(model: Any) -> None:
    """Forget what is kept for the present trajectory: the next call starts a new one."""
    from cachepolicy.engine.class_swap import ATTRIBUTE
    from cachepolicy.engine.root_model import RootModel
    from cachepolicy.engine.run import Run

    handle = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    if isinstance(handle, RootModel):
        handle.drop_current()
    elif isinstance(handle, Run):
        handle.reset()


class CacheMixin:
    """Caches that can be switched on and off, for an `nn.Module` of your own: `class Net(nn.Module, CacheMixin)`."""

    @property
    def is_cache_enabled(self) -> bool:
        """True while a policy is attached."""
        return is_cache_enabled(self)

    def enable_cache(self, config: Any) -> Run:
        """Attach what a config says.

        Raises:
            PolicyError: as for the function `enable_cache`.
        """
        return enable_cache(self, config)

    def disable_cache(self) -> None:
        """Take the cache off."""
        disable_cache(self)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:  # pyright: ignore[reportUnusedFunction]
        """Forget what is kept; diffusers' pipelines call this at their end."""
        del recurse  # all of a model's state is in one place
        reset_stateful_cache(self)

    def cache_context(self, name: str, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """Calls inside are of the branch `name`, as for the function `cache_context`."""
        return cache_context(self, name, **kwargs)
