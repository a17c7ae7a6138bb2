"""Predictors of other packages: functions from places to weights, found by the entry point `cachepolicy.predictors`.

A package is imported where a policy names its predictor, never before. `docs/extending.md` says what the functions take
and give.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from cachepolicy.errors import PolicyError, nearest
from cachepolicy.language.vocabulary import (
    COMMON_LABELS,
    ORDER_LABEL,
    PREDICTORS,
    WINDOW_LABEL,
    WINDOW_LIMIT,
    Label,
    Type,
)

GROUP = "cachepolicy.predictors"
"""The group of the entry points."""

_TYPES: Mapping[Any, Type] = MappingProxyType(
    {
        inspect.Parameter.empty: "number", float: "number", int: "number", bool: "boolean", str: "text",
        "float": "number", "int": "number", "bool": "boolean", "str": "text",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class InstalledPredictor:
    """A predictor of another package.

    Attributes:
        name: The name of the entry point, by which policies call it.
        package: The package and its version.
        function: Returns the weights of the results, newest first, from their places, the place of the answer and the
            arguments.
        labels: The arguments that a policy may give.
        results: How many results it reads if no argument says so.
    """

    name: str
    package: str
    function: Callable[..., Sequence[float]]
    labels: Mapping[str, Label]
    results: int


def installed_names() -> tuple[str, ...]:
    """Returns the names of the installed predictors, without importing their packages."""
    return tuple(sorted(_entries(tuple(sys.path))))


@lru_cache(maxsize=4)
def _entries(_path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Returns the entry points by name. The first on the path counts, and names of the language are not replaced."""
    found = dict[str, EntryPoint]()
    for entry in entry_points(group=GROUP):
        if entry.name not in PREDICTORS:
            found.setdefault(entry.name, entry)
    return found


def installed(name: str) -> InstalledPredictor | None:
    """Returns an installed predictor, and imports its package. None if there is none of this name.

    Raises:
        PolicyError: E170, the package cannot be imported, or its function is none of a predictor.
    """
    entry = _entries(tuple(sys.path)).get(name)
    return None if entry is None else _loaded(entry)


@cache
def _loaded(entry: EntryPoint) -> InstalledPredictor:
    package = entry.dist.name if entry.dist is not None else entry.module
    shown = f"{package} {entry.dist.version}" if entry.dist is not None else package
    try:
        function = entry.load()
        labels, results = _labels(function), _results(function)
    except Exception as error:
        message = f"the predictor `{entry.name}` of `{shown}` cannot be used: {error}"
        raise PolicyError.of("E170", message, help=f"it is `{entry.value}`; see docs/extending.md") from error
    return InstalledPredictor(entry.name, shown, function, labels, results)


def _results(function: Any) -> int:
    results = getattr(function, "results", 2)
    if not isinstance(results, int) or not 1 <= results <= WINDOW_LIMIT:
        raise TypeError(f"its `results` is a whole number from 1 to {WINDOW_LIMIT}, not {results!r}")
    return results


def _labels(function: Any) -> dict[str, Label]:
    """Returns the arguments of a function as labels: its parameters that are given by name.

    Raises:
        TypeError: The function does not take places and a place, or a parameter has another type.
    """
    parameters = list(inspect.signature(function).parameters.values())
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 2 or any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters):
        raise TypeError("it takes the places of the results and that of the answer, and arguments by name only")
    labels = dict[str, Label]()
    for one in parameters[2:]:
        required = one.default is one.empty
        known = {"order": ORDER_LABEL, "window": WINDOW_LABEL}.get(one.name)
        type_ = _TYPES.get(one.annotation)
        if type_ is None or one.name in COMMON_LABELS:
            raise TypeError(f"its argument `{one.name}` is not a `float`, `int`, `bool` or `str` of its own name")
        labels[one.name] = Label(
            type_,
            required=required,
            constant=known is not None or type_ != "number",
            between=known.between if known else None,
            whole=known is not None,
        )
    return {**labels, **COMMON_LABELS}


def labels_of(name: str) -> Mapping[str, Label] | None:
    """Returns the arguments of a predictor of the language or of another package, or None if there is none."""
    known = PREDICTORS.get(name)
    if known is not None:
        return known
    found = installed(name)
    return None if found is None else found.labels


def how_to_get(name: str, source: str | None) -> str:
    """Returns the help for an unknown name: the name that was meant, or what has to be installed.

    Args:
        name: The unknown name.
        source: The `source` of the policy, which may name the package.
    """
    near = nearest(name, [*PREDICTORS, *installed_names()])
    if near is not None:
        return f"did you mean `{near}`?"
    whence = f"; the policy's source is {source}" if source else ""
    return f"install the package that has it (its entry point is `{name}` in the group `{GROUP}`){whence}"
