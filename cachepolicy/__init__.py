"""Caching policies for diffusion models, written in a small rule language.

    import cachepolicy
    with cachepolicy.apply(pipe, "pab.cp", spatial_every=3) as run:
        image = pipe(...)
    print(run.trace)

Importing this package, parsing, checking and simulating need no torch; `apply` imports it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cachepolicy.diagnostics import Diagnostic, PolicyError, Span
from cachepolicy.explanation import explain
from cachepolicy.ir import Policy
from cachepolicy.loading import load
from cachepolicy.printer import format
from cachepolicy.simulation import plan, simulate
from cachepolicy.syntax import parse
from cachepolicy.version import __version__

if TYPE_CHECKING:
    from cachepolicy.runtime import Run, apply, remove

__all__ = [
    "Diagnostic",
    "Policy",
    "PolicyError",
    "Run",
    "Span",
    "__version__",
    "apply",
    "explain",
    "format",
    "load",
    "parse",
    "plan",
    "remove",
    "simulate",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in {"Run", "apply", "remove"}:
        from cachepolicy import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
