"""Reads JSON strictly: an object that has the same key twice is an error."""

from __future__ import annotations

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has the same key twice."""


def load_json(text: str | bytes) -> Any:
    """Parses JSON as `json.loads` does.

    Args:
        text: The JSON text.

    Returns:
        The value.

    Raises:
        DuplicateKeyError: An object has the same key twice. `json.loads` keeps the last value without a word.
        ValueError: The text is not JSON.
        RecursionError: The text is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def refuse_duplicate_keys(text: str | bytes) -> None:
    """Checks a JSON text that another parser reads. Errors of other kinds are left to that parser.

    Args:
        text: The JSON text.

    Raises:
        DuplicateKeyError: An object has the same key twice.
    """
    try:
        load_json(text)
    except DuplicateKeyError:
        raise
    except (ValueError, RecursionError):
        return


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(f"the key `{key}` stands twice in one object")
            seen.add(key)
    return members
