"""Regular expressions of policies: RE2, so that matching takes linear time whatever the pattern."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import re2 as _re2  # pyright: ignore[reportMissingTypeStubs]

re2 = cast("Any", _re2)
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


@lru_cache(maxsize=1024)
def searcher(regex: str) -> Callable[[str], bool]:
    """A function that tells whether a name contains a match of `regex`.

    Raises:
        ValueError: RE2 refuses it, as it does lookaround and backreferences; the message says why.
    """
    try:
        compiled = re2.compile(regex, _OPTIONS)
    except re2.error as error:
        reason = error.args[0]
        raise ValueError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from error
    return lambda name: compiled.search(name) is not None
