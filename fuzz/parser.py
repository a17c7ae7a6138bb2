"""The parser on any bytes: a policy or a `PolicyError`, and what it gives is what the printer reads back."""

from __future__ import annotations

from pathlib import Path

import cachepolicy
from cachepolicy.errors import PolicyError, render, to_json
from cachepolicy.language.formatter import format_node
from cachepolicy.language.parser import parse_selector, parse_value, recover
from cachepolicy.planning.check import check_text
from fuzz.policies import sound, told

SUFFIX = "cp"
SMALL = Path(__file__).parents[1] / "tests" / "fuzz" / "parser"
"""Inputs that once went wrong, made small; seeds too."""


def hold(data: bytes) -> None:
    """Nothing but `PolicyError` comes out of any bytes, and every accepted policy is sound.

    Raises:
        AssertionError: what must hold does not.
    """
    policy, findings = recover(data)
    render(findings)
    to_json(findings)
    errors = [each for each in findings if each.severity == "error"]
    assert errors == [each for each in check_text(data) if each in errors]
    cachepolicy.format(policy)
    try:
        assert policy == cachepolicy.parse(data)
        assert not errors
    except PolicyError as error:
        told(error)
        assert errors
    else:
        sound(policy)
    _parts(data)


def _parts(data: bytes) -> None:
    """A value of the command line and a selector, read alone."""
    text = data.decode("utf-8", "replace")
    for read in (parse_value, parse_selector):
        try:
            part = read(text)
        except PolicyError as error:
            told(error)
        else:
            assert part == read(format_node(part)), text
