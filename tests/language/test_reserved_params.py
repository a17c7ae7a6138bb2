"""The names that no parameter can have are the arguments of the functions that take parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.vocabulary import KEYWORDS

NO_PARAMS = {"cache_context", "share", "tune_levels"}  # their keyword arguments are not params of a policy


def _taking_keywords() -> dict[str, Callable[..., Any]]:
    functions = vars(cachepolicy.Run) | {name: getattr(cachepolicy, name) for name in cachepolicy.__all__}
    return {
        name: function
        for name, function in functions.items()
        if inspect.isfunction(function) and name not in NO_PARAMS
        if any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())
    }


def test_the_arguments_of_every_function_that_takes_params_are_reserved() -> None:
    """The table in `vocabulary` equals the signatures of all public functions with `**` keyword arguments."""
    signatures = {
        name: tuple(
            each.name
            for each in inspect.signature(function).parameters.values()
            if each.kind not in {each.VAR_KEYWORD, each.POSITIONAL_ONLY}
        )
        for name, function in _taking_keywords().items()
    }
    assert signatures == KEYWORDS


@pytest.mark.parametrize("declaration", ["param {}: int = 2", "external {}: float"])
@pytest.mark.parametrize("name", ["where", "key", "self", "samples", "memory_limit"])
def test_no_param_and_no_external_has_a_reserved_name(declaration: str, name: str) -> None:
    """A declaration that could not be given to one of the functions is refused, and the message names the function."""
    with pytest.raises(PolicyError) as caught:
        cachepolicy.parse(f"{declaration.format(name)}\nmatch attention -> compute\n")
    [found] = [each for each in caught.value.diagnostics if each.code == "E104"]
    assert any(f"`{function}`" in found.message for function, names in KEYWORDS.items() if name in names)
