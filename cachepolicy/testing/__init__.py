"""Tools for testing policies: generated policies and clocks, reference checks, and a zoo of tiny models.

Nothing is imported until it is asked for: `strategies` and `checks` need hypothesis, `models` and a built model of the
`zoo` need torch, the zoo diffusers too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from cachepolicy.testing import checks, models, strategies, zoo

__all__ = ["checks", "models", "strategies", "zoo"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
