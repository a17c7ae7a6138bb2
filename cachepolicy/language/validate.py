"""Checks the structure of a policy, and the constants and regular expressions of its rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cachepolicy.errors import Diagnostic
from cachepolicy.language import ir
from cachepolicy.language.installed_predictors import labels_of
from cachepolicy.language.patterns import searcher
from cachepolicy.language.scope import BOUND, POSITION, SCHEDULE, ExpressionPlace, Report
from cachepolicy.language.source import is_writable
from cachepolicy.language.traversal import children, inner_predictor, walk
from cachepolicy.language.vocabulary import (
    DEPTH_LIMIT,
    NUMBER_LIMIT,
    REGEX_LIMIT,
    RESERVED,
    TEXT_LIMIT,
    TOKEN_LIMIT,
    Label,
)

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
        letters += sum(len(value) for name, value in node.__dict__.items() if isinstance(value, str) and name != "text")
        nodes += len(node.values) if isinstance(node, ir.Table) else 0
        if level > DEPTH_LIMIT:
            report.add("E015", f"the statement is nested deeper than {DEPTH_LIMIT}", statement, help=_SPLIT)
            return False
        if nodes > TOKEN_LIMIT or letters > TEXT_LIMIT:
            code, problem = ("E014", f"more than {TOKEN_LIMIT} parts") if nodes > TOKEN_LIMIT else ("E013", "too long")
            report.add(code, f"the policy is too large: {problem}", policy, help="split it and `use` its parts")
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
    yield from _statement(node)
    match node:
        case ir.Policy(edition=edition) if edition != ir.EDITION:
            yield "E010", f"edition {edition} of the language is not known here"
        case ir.Policy(name=None, title=str()):
            yield "E021", "a title needs a policy name"
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
            yield "E021", "a list or `off` is valid here only as a parameter's value"
        case ir.Every(offset=offset, anchor=anchor) if offset is not None and anchor != "start":
            yield "E021", "`offset` counts from the start"
        case ir.Blocks() if node.index is not None and (
            node.start is not None or node.stop is not None or node.stride is not None
        ):
            yield "E021", "blocks have an index or a slice, not both"
        case ir.Call(function="cross", arguments=(ir.Name(), *_)):
            yield "E021", "the branch of `cross` is a text here, not a name"
        case ir.Itself():
            yield "E021", "`self` is written as the parameter `self` before the policy is resolved"
        case ir.Tokens(latent=True) if node.start is not None or node.stop is not None:
            yield "E021", "tokens are `a:b` or `latent`, not both"
        case ir.Setting(value=ir.Interval(low_closed=True, high_closed=True)):
            yield "E021", "in a setting, the closed interval is written as the list `[low, high]`"
        case _:
            pass
    yield from _places(node)


def _statement(node: ir.Node) -> Iterator[Fault]:
    match node:
        case ir.Use(bound=ir.Bound(scope="all")):
            yield "E021", "`use` takes `at most N in a row`"
        case ir.Mask(mask=ir.ListOf()):
            yield "E021", "a list is valid here only as a parameter's value"
        case ir.Mask(mask=ir.Text(), by_site=True):
            yield "E021", "`by site` takes a list parameter"
        case ir.Mask(mask=ir.Off()):
            yield "E021", "`off` is valid here only as a parameter's value"
        case ir.Reuse(residual=True, mean=True):
            yield "E021", "`reuse` takes `residual` or `mean`, not both"
        case ir.Preset(settings=()):
            yield "E021", "a preset sets at least one parameter"
        case _:
            pass


def _number(value: float) -> Iterator[Fault]:
    if math.isnan(value):
        yield "E021", "`nan` is not a number of the language"
    elif isinstance(value, int) and abs(value) > NUMBER_LIMIT:
        yield "E016", f"the number is too large: whole numbers go up to {NUMBER_LIMIT}"


# --- constants and regular expressions of a rule ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WholeNumber:
    """A part of a rule that must be a whole number.

    Attributes:
        value: The expression.
        name: Its name in messages.
        context: The context of the expression, which tells what it may read.
        least: The smallest valid number.
        off: Whether the expression may be `off`.
    """

    value: ir.Expression
    name: str
    context: ExpressionPlace
    least: float = -math.inf
    off: bool = False

    def fault(self) -> str | None:
        """Returns the message for a constant that is no whole number or is too small. Other values are not checked."""
        if not isinstance(self.value, ir.Number | ir.Boolean | ir.Text):
            return None
        number = self.value.value
        if not isinstance(number, bool | str) and number == number // 1 and number >= self.least:
            return None
        lower = f" from {self.least}" if math.isfinite(self.least) else ""
        return f"{self.name} takes a whole number{lower}, not `{number}`"


def label_fault(argument: ir.Argument, label: Label) -> str | None:
    """Returns the message for a constant argument that is out of its range. Other values are not checked."""
    name, value = f"`{argument.label}`", argument.value
    if label.items is not None and isinstance(value, ir.ListOf):
        least, most = label.items
        count = len(value.items)
        wanted = f"{least}" if least == most else f"{least} to {most}"
        return None if least <= count <= most else f"{name} has {wanted} items, not {count}"
    if label.between is None or not isinstance(value, ir.Number):
        return None
    low, high = label.between
    number = value.value
    if low <= number <= high and not (label.whole and number != number // 1):
        return None
    kind = "a whole number" if label.whole else "a number"
    upper = f"from {low} to {high}" if math.isfinite(high) else f"from {low} on"
    return f"{name} is {kind} {upper}, not {number}"


def counts_of(rule: ir.Rule) -> Iterator[WholeNumber]:
    """Yields the counts of the bounds and of the schedule of a rule."""
    for bound in rule.bounds:
        yield WholeNumber(bound.count, "`at most`", BOUND, 0, off=True)
    match rule.schedule:
        case ir.Every(interval=interval, offset=offset):
            yield WholeNumber(interval, "`every`", SCHEDULE, 1, off=True)
            if offset is not None:
                yield WholeNumber(offset, "`offset`", SCHEDULE)
        case ir.OnSteps(steps=ir.SetOf() | ir.ListOf() as steps):
            for item in steps.items:
                yield WholeNumber(item, "`on`", SCHEDULE, 0)
        case _:
            pass


def positions_of(node: ir.Blocks | ir.Tokens) -> Iterator[WholeNumber]:
    """Yields the index, the start and the end of blocks or tokens, as far as they are given."""
    name = "the position of a block" if isinstance(node, ir.Blocks) else "the position of a token"
    for position in (node.index if isinstance(node, ir.Blocks) else None, node.start, node.stop):
        if position is not None:
            yield WholeNumber(position, name, POSITION)
    if isinstance(node, ir.Blocks) and node.stride is not None:
        yield WholeNumber(node.stride, "the stride of blocks", POSITION, 1)


def is_mask(text: str) -> bool:
    """Returns whether `text` consists of the letters of a mask. Commas and blanks between them are ignored."""
    return set(bare_mask(text)) <= {"0", "1"}


def bare_mask(text: str) -> str:
    """Returns the letters of a mask without commas and blanks."""
    return text.translate(_BETWEEN)


_BETWEEN = str.maketrans("", "", ", \t")


def resolved_faults(rule: ir.Rule) -> Iterator[Diagnostic]:
    """Yields the faults of a rule whose parameters and lets are substituted: E163 for constants, E164 for regexes."""
    counts = list(counts_of(rule))
    for node in walk(rule.selector):
        match node:
            case ir.Blocks():
                counts += positions_of(node)
                regex = node.of
            case ir.Pattern() | ir.OfClass():
                regex = node.regex
            case _:
                regex = None
        if regex is not None and (fault := regex_fault(regex)) is not None:
            message = f"the regex `{regex[:60]}` is refused: {fault.message}"
            yield replace(fault, code="E164", message=message, span=node.span)
    for count in counts:
        message = count.fault()
        if message is None and count.context is POSITION and not isinstance(count.value, ir.Number):
            message = f"{count.name} is a constant whole number"
        if message is not None:
            yield Diagnostic("E163", message, span=count.value.span)
    yield from _argument_faults(rule.action)
    match rule.schedule:
        case ir.OnSteps(steps=ir.Name() as name):
            message = f"`on` takes steps, and `{name.name}` is no list parameter"
        case ir.Mask(mask=ir.Text() as mask) if not is_mask(mask.value):
            message = f"a mask has no letters but 0 and 1, unlike `{mask.value[:60]}`"
        case ir.Mask(mask=ir.ListOf(items=rows), by_site=True):
            letters = [row.value for row in rows if isinstance(row, ir.Text) and is_mask(row.value)]
            if len(letters) == len(rows) and len({len(row) for row in letters}) <= 1:
                return
            message = "`mask ... by site` takes a list of masks of one length"
        case ir.Mask(mask=ir.Name() as name):
            message = f"`mask` takes a string, and `{name.name}` is no string parameter"
        case _:
            return
    yield Diagnostic("E163", message, span=rule.schedule.span)


def _argument_faults(action: ir.Action) -> Iterator[Diagnostic]:
    """Yields the arguments of a predictor that are out of range."""
    if not isinstance(action, ir.Predict):
        return
    labels = labels_of(action.predictor) or {}
    for argument in action.arguments:
        inner = inner_predictor(argument.value)
        if inner is not None:
            yield from _argument_faults(inner)
        message = label_fault(argument, labels[argument.label]) if argument.label in labels else None
        if message is not None:
            yield Diagnostic("E163", message, span=argument.value.span)


_RE2_SYNTAX = "the syntax is https://github.com/google/re2/wiki/Syntax"
_BEYOND_RE2 = (
    (r"\(\?<?[=!]", "lookaround", 'say it with `and not`: `attention and not "^single_"`'),
    (r"\\[1-9]|\\k|\(\?P=", "backreferences", "write out what repeats"),
    (r"\(\?>|[*+?}]\+", "atomic groups and possessive repeats", "plain repeats are safe: matching takes linear time"),
    (r"\(\?\(|\(\?R\)|\(\?#", "conditionals, recursion and comments", _RE2_SYNTAX),
)


def regex_fault(regex: str) -> Diagnostic | None:
    """Returns the diagnostic for a regular expression that is too long (E019) or that RE2 refuses (E017, E018)."""
    if len(regex) > REGEX_LIMIT:
        message = f"the regular expression has {len(regex)} characters, the limit is {REGEX_LIMIT}"
        return Diagnostic("E019", message, help="take a list parameter, or kinds such as `attention`")
    try:
        searcher(regex)
    except ValueError as error:
        # An escaped backslash opens no escape, nor does a bracket in a character class open a group.
        bare = re.sub(r"\\\\|\\[^1-9k]|\[[^]]*\]", "_", regex)
        for pattern, construct, help in _BEYOND_RE2:
            if re.search(pattern, bare):
                return Diagnostic("E018", f"RE2, which matches names here, has no {construct}", help=help)
        return Diagnostic("E017", f"RE2 cannot read this regular expression: {error}", help=_RE2_SYNTAX)
    return None


# --- words -----------------------------------------------------------------------------------------------

_NAMES = frozenset(
    {"name", "table", "predictor", "method", "label", "follow", "function"}
)  # fmt: skip
_TEXTS = frozenset({"for_class", "origin", "title", "source", "doc", "regex", "of", "policy", "argument"})


def _words(node: ir.Node) -> Iterator[Fault]:
    for key, value in node.__dict__.items():
        if not isinstance(value, str):
            continue
        if key in _NAMES and value in RESERVED and (key, value) != ("label", "of"):
            yield "E008", f"`{value}` is a reserved word and cannot be a name"
        elif key in _NAMES and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            yield "E021", f"a name is made of ASCII letters, digits and `_`, unlike {value[:60]!r}"
        elif (key in _TEXTS or isinstance(node, ir.Text)) and not is_writable(value):
            yield "E021", f"a string is one line without control characters, unlike {value[:60]!r}"


# --- positions -------------------------------------------------------------------------------------------


def _places(node: ir.Node) -> Iterator[Fault]:
    """Yields intervals and sets in positions that the grammar does not allow."""
    for child in children(node):
        if isinstance(child, ir.Interval) and not isinstance(node, ir.Param | ir.Membership | ir.Setting):
            yield "E021", "an interval is valid after `in`, as a default and as a setting only"
        if isinstance(child, ir.SetOf) and not _takes_set(node, child):
            yield "E021", "a set is valid after `in` and `on` only"


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
