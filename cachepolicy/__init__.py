"""Caching policies for diffusion models: a policy language, a simulator, and an engine that runs policies on modules.

    with cachepolicy.apply(pipe, "pab.cp", spatial_every=3) as run:
        image = pipe("a lighthouse at dusk").images[0]
    print(run.trace)

Names are imported on first use. Those that run a model (`apply`, `remove`, `compare`, `calibrate`, `tune`,
`tune_levels`, `tune_threshold`) and the cache API of diffusers import torch.
"""

from __future__ import annotations

import importlib
import logging
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
    from cachepolicy.diffusers.configs import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
    from cachepolicy.engine.apply import apply, remove
    from cachepolicy.engine.options import RunOptions
    from cachepolicy.engine.run import Run
    from cachepolicy.errors import PolicyError
    from cachepolicy.language.formatter import format
    from cachepolicy.language.ir import Policy
    from cachepolicy.language.loader import load
    from cachepolicy.language.parser import parse
    from cachepolicy.methods.convert import convert
    from cachepolicy.planning.simulation import plan, simulate
    from cachepolicy.reports.explanation import explain
    from cachepolicy.tracing.trace import load_trace
    from cachepolicy.tuning.calibration import calibrate
    from cachepolicy.tuning.compare import compare
    from cachepolicy.tuning.levels import tune_levels
    from cachepolicy.tuning.threshold import tune_threshold
    from cachepolicy.tuning.tuner import tune

    __version__: str

__all__ = [
    "CacheMixin",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "Policy",
    "PolicyError",
    "PyramidAttentionBroadcastConfig",
    "Run",
    "RunOptions",
    "__version__",
    "apply",
    "apply_faster_cache",
    "apply_first_block_cache",
    "apply_pyramid_attention_broadcast",
    "cache_context",
    "calibrate",
    "compare",
    "convert",
    "disable_cache",
    "enable_cache",
    "explain",
    "format",
    "is_cache_enabled",
    "load",
    "load_trace",
    "parse",
    "plan",
    "remove",
    "reset_stateful_cache",
    "simulate",
    "tune",
    "tune_levels",
    "tune_threshold",
]

_MODULES = {
    "CacheMixin": "diffusers.api",
    "FasterCacheConfig": "diffusers.configs",
    "FirstBlockCacheConfig": "diffusers.configs",
    "Policy": "language.ir",
    "PolicyError": "errors",
    "PyramidAttentionBroadcastConfig": "diffusers.configs",
    "Run": "engine.run",
    "RunOptions": "engine.options",
    "apply": "engine.apply",
    "apply_faster_cache": "diffusers.api",
    "apply_first_block_cache": "diffusers.api",
    "apply_pyramid_attention_broadcast": "diffusers.api",
    "cache_context": "diffusers.api",
    "calibrate": "tuning.calibration",
    "compare": "tuning.compare",
    "convert": "methods.convert",
    "disable_cache": "diffusers.api",
    "enable_cache": "diffusers.api",
    "explain": "reports.explanation",
    "format": "language.formatter",
    "is_cache_enabled": "diffusers.api",
    "load": "language.loader",
    "load_trace": "tracing.trace",
    "parse": "language.parser",
    "plan": "planning.simulation",
    "remove": "engine.apply",
    "reset_stateful_cache": "diffusers.api",
    "simulate": "planning.simulation",
    "tune": "tuning.tuner",
    "tune_levels": "tuning.levels",
    "tune_threshold": "tuning.threshold",
}

logging.getLogger("cachepolicy").addHandler(logging.NullHandler())


def _version() -> str:
    """Returns the installed version, or in a checkout that is not installed the version in pyproject.toml."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cachepolicy")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        return str(project["project"]["version"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"cachepolicy.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module `cachepolicy` has no attribute `{name}`")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
