"""The names that no parameter can have are the arguments of the functions that take parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import cachepolicy
from cachepolicy.language.vocabulary import APPLY_KEYWORDS, PLANNING_KEYWORDS


def arguments(function: Callable[..., Any]) -> set[str]:
    """The arguments of `function` without the one that collects parameters."""
    found = inspect.signature(function).parameters.values()
    return {each.name for each in found if each.kind is not inspect.Parameter.VAR_KEYWORD}


def test_the_arguments_of_apply_are_reserved() -> None:
    """The set in `vocabulary` equals the signature of `apply`."""
    assert arguments(cachepolicy.apply) == APPLY_KEYWORDS


def test_the_arguments_of_planning_are_reserved() -> None:
    """The set in `vocabulary` equals the signatures of `simulate`, `plan` and `explain`."""
    functions = (cachepolicy.simulate, cachepolicy.plan, cachepolicy.explain)
    assert set().union(*(arguments(each) for each in functions)) - {"where"} == PLANNING_KEYWORDS
