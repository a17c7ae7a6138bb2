"""Regular expressions of policies. RE2 matches them, so that matching takes linear time for any pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


def search_all(regexes: Iterable[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Matches several patterns with several names, each name once with all patterns together.

    Returns:
        For each pattern the names that contain a match.

    Raises:
        ValueError: RE2 refuses a pattern; the message says why.
    """
    ordered = list(dict.fromkeys(regexes))
    matching_names: dict[str, set[str]] = {regex: set() for regex in ordered}
    together = re2.Set.SearchSet(_OPTIONS)
    # The empty pattern matches every name. A name without any match means that RE2 ran out of memory.
    for regex in ("", *ordered):
        try:
            together.Add(regex)
        except re2.error:
            searcher(regex)  # raises the reason, which a set does not give
            raise
    together.Compile()
    for name in names if ordered else ():
        numbers = together.Match(name)
        if not numbers:
            return {regex: frozenset(filter(searcher(regex), names)) for regex in ordered}
        for number in numbers:
            if number > 0:
                matching_names[ordered[number - 1]].add(name)
    return {regex: frozenset(matching) for regex, matching in matching_names.items()}
