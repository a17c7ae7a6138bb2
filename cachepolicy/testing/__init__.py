"""Tools for testing policies: hypothesis strategies, checks of schedules and runs, toy models and a pytest plugin.

Each module is imported on first access. `strategies` needs hypothesis, `models` needs torch, `plugin` needs pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from cachepolicy.testing import checks, models, strategies

__all__ = ["checks", "models", "strategies"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
