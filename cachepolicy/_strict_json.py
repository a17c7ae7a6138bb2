"""Reads JSON strictly: an object that has the same key twice is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

T = TypeVar("T")


class DuplicateKeyError(ValueError):
    """An object has the same key twice."""


class InvalidDocumentError(ValueError):
    """A JSON text does not have the form of a document. The message names the first place that is wrong."""


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


def validate_json(text: str | bytes, validate: Callable[[str | bytes], T]) -> T:
    """Reads a JSON document by a parser of pydantic.

    Args:
        text: The JSON text.
        validate: The parser, such as `Model.model_validate_json`.

    Returns:
        The document.

    Raises:
        InvalidDocumentError: An object has the same key twice, or the parser refuses the text.
    """
    try:
        _refuse_duplicate_keys(text)
        return validate(text)
    except DuplicateKeyError as error:
        raise InvalidDocumentError(str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        raise InvalidDocumentError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _refuse_duplicate_keys(text: str | bytes) -> None:
    """Raises `DuplicateKeyError`. Errors of other kinds are left to the parser that reads the text next."""
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
