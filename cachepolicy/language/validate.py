"""Checks the structure of a policy: size limits, and nodes that the text form cannot represent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from cachepolicy.language import ir
from cachepolicy.language.scope import Report
from cachepolicy.language.source import is_writable
from cachepolicy.language.traversal import children
from cachepolicy.language.vocabulary import DEPTH_LIMIT, NUMBER_LIMIT, RESERVED, TEXT_LIMIT, TOKEN_LIMIT

Fault = tuple[str, str]
"""A code and a message."""


def within_bounds(policy: ir.Policy, report: Report) -> bool:
    """Returns whether the policy is within the size and nesting limits.

    The traversal is not recursive, because an untrusted policy may be nested deeper than the recursion limit.
    """
    nodes, letters = 0, 0
    waiting: list[tuple[ir.Node, int, ir.Node]] = [(policy, 0, policy)]
    while waiting:
        node, level, statement = waiting.pop()
        nodes += 1
        letters += sum(len(each) for each in node.__dict__.values() if isinstance(each, str))
        nodes += len(node.values) if isinstance(node, ir.Table) else 0
        if level > DEPTH_LIMIT:
            report.add("E015", f"the statement is nested deeper than {DEPTH_LIMIT}", statement, help=_SPLIT)
            return False
        if nodes > TOKEN_LIMIT or letters > TEXT_LIMIT:
            code, what = ("E014", f"more than {TOKEN_LIMIT} parts") if nodes > TOKEN_LIMIT else ("E013", "too long")
            report.add(code, f"the policy is too large: {what}", policy, help="split it and `use` its parts")
            return False
        waiting += [(child, level + 1, child if level == 0 else statement) for child in children(node)]
    return True


_SPLIT = "name a part with `let`"


def judge_shapes(policy: ir.Policy, report: Report) -> None:
    """Reports nodes that the text form cannot represent. Such nodes come from JSON or Python."""
    for comment in policy.comments:
        opened = comment.text.startswith("#") or (not comment.text and comment.place == "before")
        if not opened or not is_writable(comment.text):
            report.add("E021", "a comment is one line that starts with `#`", policy)
    waiting: list[ir.Node] = [policy]
    while waiting:
        node = waiting.pop()
        for code, message in faults(node):
            report.add(code, message, node)
        waiting += reversed(list(children(node)))


def faults(node: ir.Node) -> Iterator[Fault]:
    """Yields the structural faults of one node, without its children."""
    yield from _words(node)
    match node:
        case ir.Policy(edition=edition) if edition != ir.EDITION:
            yield "E010", f"edition {edition} of the language is not known here"
        case ir.Policy(name=None, title=str()):
            yield "E021", "a title stands behind the policy's name"
        case ir.Param(type="range", default=ir.ListOf(items=(_, _))):
            yield "E021", "the closed interval `[low, high]` is an interval here, not a list"
        case ir.Param(type=type_, default=ir.Interval(low_closed=True, high_closed=True)) if type_ != "range":
            yield "E021", f"a `{type_}` has no interval for a default"
        case ir.Number(value=value):
            yield from _number(value)
        case ir.Table(values=values):
            if not values:
                yield "E021", f"the table `{node.name}` is empty"
            for value in values:
                yield from _number(value)
                if math.isinf(value):
                    yield "E021", "a table holds finite numbers"
        case ir.Comparison(operators=operators, operands=operands):
            if len(operators) + 1 != len(operands) or not operators:
                yield "E021", "a comparison has one operator between any two operands"
        case ir.Both() | ir.Either() if len(node.operands) < 2:
            yield "E021", f"`{node.kind}` joins at least two"
        case ir.AllOf() | ir.AnyOf() if len(node.selectors) < 2:
            yield "E021", f"`{node.kind}` joins at least two"
        case ir.SetOf(items=()):
            yield "E021", "a set has at least one item"
        case ir.Membership(container=ir.ListOf() | ir.Off()) | ir.OnSteps(steps=ir.ListOf() | ir.Off()):
            yield "E021", "a list or `off` stands here by a parameter's name only"
        case ir.Mask(mask=ir.Off()):
            yield "E021", "`off` stands here by a parameter's name only"
        case ir.Every(offset=offset, anchor=anchor) if offset is not None and anchor != "start":
            yield "E021", "`offset` counts from the start"
        case ir.Blocks() if node.index is not None and (node.start is not None or node.stop is not None):
            yield "E021", "blocks have an index or a slice, not both"
        case ir.Setting(value=ir.Interval(low_closed=True, high_closed=True)):
            yield "E021", "in a setting, the closed interval is written as the list `[low, high]`"
        case _:
            pass
    yield from _places(node)


def _number(value: float) -> Iterator[Fault]:
    if math.isnan(value):
        yield "E021", "`nan` is no number of the language"
    elif isinstance(value, int) and abs(value) > NUMBER_LIMIT:
        yield "E016", f"the number is too large: whole numbers go up to {NUMBER_LIMIT}"


# --- words -----------------------------------------------------------------------------------------------

_NAMES = frozenset(
    {"name", "table", "predictor", "method", "label", "follow", "function"}
)  # fmt: skip
_TEXTS = frozenset({"title", "source", "doc", "regex", "of", "policy", "argument"})


def _words(node: ir.Node) -> Iterator[Fault]:
    for key, value in node.__dict__.items():
        if not isinstance(value, str):
            continue
        if key in _NAMES and value in RESERVED:
            yield "E008", f"`{value}` is a word of the language and cannot be a name"
        elif key in _NAMES and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            yield "E021", f"a name is made of ASCII letters, digits and `_`, unlike {value[:60]!r}"
        elif (key in _TEXTS or isinstance(node, ir.Text)) and not is_writable(value):
            yield "E021", f"a string is one line without control characters, unlike {value[:60]!r}"


# --- places ----------------------------------------------------------------------------------------------


def _places(node: ir.Node) -> Iterator[Fault]:
    """Yields intervals and sets in positions that the grammar does not allow."""
    for child in children(node):
        if isinstance(child, ir.Interval) and not isinstance(node, ir.Param | ir.Membership | ir.Setting):
            yield "E021", "an interval stands after `in`, as a default or as a setting"
        if isinstance(child, ir.SetOf) and not _takes_set(node, child):
            yield "E021", "a set stands after `in` or `on`"


def _takes_set(node: ir.Node, child: ir.SetOf) -> bool:
    match node:
        case ir.Membership():
            return node.container is child
        case ir.OnSteps():
            return node.steps is child
        case ir.Param():
            return node.domain is child
        case _:
            return False
