"""diffusers' cache API on top of policies, for any model, under the names of diffusers 0.42.1.

    cachepolicy.enable_cache(pipe.transformer, PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))

Each config corresponds to a shipped policy, which `cachepolicy.format(config.policy())` shows. Unlike in diffusers,
`apply_*` and `enable_cache` return the `Run`. diffusers is not imported, and torch only when a cache is attached.
"""

from __future__ import annotations

import contextlib
import warnings
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

# --- one function for each cache -------------------------------------------------------------------------


def apply_pyramid_attention_broadcast(module: Any, config: PyramidAttentionBroadcastConfig) -> Run:
    """Attach Pyramid Attention Broadcast to a model.

    Args:
        module: The model.
        config: The config, of this package or of diffusers.

    Returns:
        The attached run.

    Raises:
        PolicyError: The config is for another cache (E150), the model has a policy already (E301), or the policy
            selects nothing in it (E308).
    """
    return _apply(module, config, PyramidAttentionBroadcastConfig)


def apply_faster_cache(module: Any, config: FasterCacheConfig) -> Run:
    """Attach FasterCache, in diffusers' variant, to a model whose batches contain both halves of guidance.

    Args:
        module: The model.
        config: The config, of this package or of diffusers.

    Returns:
        The attached run.

    Raises:
        PolicyError: As for `apply_pyramid_attention_broadcast`.
    """
    return _apply(module, config, FasterCacheConfig)


def apply_first_block_cache(module: Any, config: FirstBlockCacheConfig) -> Run:
    """Attach First Block Cache to a model with a chain of blocks.

    Args:
        module: The model.
        config: The config, of this package or of diffusers.

    Returns:
        The attached run.

    Raises:
        PolicyError: As for `apply_pyramid_attention_broadcast`.
    """
    return _apply(module, config, FirstBlockCacheConfig)


def _apply(module: Any, candidate: object, kind: type) -> Run:
    config = config_of(candidate)
    if config is None or not isinstance(config, kind):
        raise PolicyError.of("E150", f"`{type(candidate).__name__}` stands where a `{kind.__name__}` is asked for")
    return _attach(module, config)


def _attach(model: Any, config: CacheConfig) -> Run:
    """Attach a config, and report identifiers that match no attention, which are optional in the shipped policies."""
    from cachepolicy.engine.apply import apply

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


# --- functions in place of methods of CacheMixin ---------------------------------------------------------


def enable_cache(model: Any, config: Any) -> Run:
    """Attach the cache of a config to a model or pipeline of any class.

    Args:
        model: The model or pipeline.
        config: A cache config, of this package or of diffusers.

    Returns:
        The attached run.

    Raises:
        PolicyError: A policy is attached already (E301), the config is unknown (E150), or it does not fit the model.
    """
    known = config_of(config)
    if known is None:
        message = f"`{type(config).__name__}` is no cache config"
        raise PolicyError.of("E150", message, help="`cachepolicy.apply` takes policies of any kind")
    return _attach(model, known)


def disable_cache(model: Any) -> None:
    """Remove the cache from a model. Without a cache, warn as diffusers does, unless `CACHEPOLICY_DISABLE` is set.

    Raises:
        PolicyError: A forward pass of the model is running (E305).
    """
    from cachepolicy.engine.apply import run_of
    from cachepolicy.engine.options import is_disabled

    run = run_of(model)
    if run is None:
        if is_disabled():
            return
        warnings.warn("no cache has been enabled, so there is nothing to disable", UserWarning, stacklevel=2)
        return
    run.remove()


def is_cache_enabled(model: Any) -> bool:
    """Return True if a policy is attached to the model, by any function of this package."""
    from cachepolicy.engine.apply import run_of

    return run_of(model) is not None


def cache_context(model: Any, name: str, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context manager: calls inside belong to the guidance branch `name`. Contexts can be nested.

    Args:
        model: The model that is called.
        name: The name of the branch, such as `"cond"` or `"uncond"`.
        **kwargs: `step_index`, `num_inference_steps`, `timestep` (training units, 0..1000) and `sigma` of the calls.
    """
    from cachepolicy.engine.contexts import CONTEXT, Context, setting

    del model
    return setting(CONTEXT, Context(name, **kwargs))


def reset_stateful_cache(model: Any) -> None:
    """End the current trajectory of a model. The next call starts a new one without history."""
    from cachepolicy.engine.attachment import PipelineHandle
    from cachepolicy.engine.class_swap import ATTRIBUTE
    from cachepolicy.engine.root_model import RootModel

    handle = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    if isinstance(handle, RootModel):
        handle.attachment.sessions.end_current()
    elif isinstance(handle, PipelineHandle):
        handle.attachment.sessions.clear()


class CacheMixin:
    """Adds the cache methods of diffusers' models to a module class: `class Net(nn.Module, CacheMixin)`."""

    @property
    def is_cache_enabled(self) -> bool:
        """Whether a policy is attached."""
        return is_cache_enabled(self)

    def enable_cache(self, config: Any) -> Run:
        """Attach the cache of a config. See the function `enable_cache`.

        Raises:
            PolicyError: As for the function `enable_cache`.
        """
        return enable_cache(self, config)

    def disable_cache(self) -> None:
        """Remove the cache. See the function `disable_cache`."""
        disable_cache(self)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:  # pyright: ignore[reportUnusedFunction]
        """End the current trajectory. diffusers' pipelines call this at their end."""
        del recurse  # the state of all submodules is at the root
        reset_stateful_cache(self)

    def cache_context(self, name: str, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """Return a context manager: calls inside belong to the branch `name`. See the function `cache_context`."""
        return cache_context(self, name, **kwargs)
