"""Regular expressions of policies. RE2 matches them, so that matching takes linear time for any pattern."""

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
    """Compiles a regular expression.

    Args:
        regex: The expression, in the syntax of RE2.

    Returns:
        A function that returns whether a name contains a match.

    Raises:
        ValueError: RE2 refuses the expression, for instance because of lookaround or backreferences.
    """
    try:
        compiled = re2.compile(regex, _OPTIONS)
    except re2.error as error:
        reason = error.args[0]
        raise ValueError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from error
    return lambda name: compiled.search(name) is not None
