"""Formats policies as canonical text, with minimal parentheses. The formatter keeps all comments."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import assert_never

from cachepolicy.language import ir
from cachepolicy.language.vocabulary import RESERVED

LINE_WIDTH = 100
"""Maximum number of columns of a line. Only a part that cannot be broken is longer."""

# Precedence of operators. A part whose precedence is lower than its position requires stands in parentheses.
_LOWEST, _OR, _AND, _NOT, _COMPARE, _SUM, _TERM, _UNARY, _ATOM = range(9)


def format(policy: ir.Policy | str) -> str:
    """Formats a policy as canonical text. Parsing the text gives an equal policy.

    Args:
        policy: A policy, or its text.

    Returns:
        The text, with all comments of the policy.

    Raises:
        PolicyError: The text has errors.
    """
    if isinstance(policy, str):
        from cachepolicy.language.parser import parse

        policy = parse(policy)
    lines = list(_lines(policy))
    return "\n".join(lines) + "\n"


def format_node(node: ir.Node) -> str:
    """Formats any node of a policy as canonical text on one line."""
    match node:
        case ir.Policy():
            return " ".join(" ".join(pieces) for _, pieces, _ in _statements(node))
        case ir.Every() | ir.OnSteps() | ir.Mask():
            return _schedule(node)
        case ir.Bound():
            return _bound(node)
        case ir.Argument():
            return f"{node.label}: {expression(node.value)}"
        case ir.Tokens():
            return _tokens(node)
        case ir.Setting():
            return f"{node.name} = {_value(node.value)}"
        case _ if isinstance(node, _STATEMENTS):
            return " ".join(_pieces(node))
        case _ if isinstance(node, _ACTIONS):
            return _action(node)
        case _ if isinstance(node, _SELECTORS):
            return selector(node)
        case _:
            return expression(node)  # pyright: ignore[reportArgumentType]


_STATEMENTS = (ir.Param, ir.Let, ir.Table, ir.Signal, ir.External, ir.Rule, ir.Use, ir.Expect, ir.Tuned, ir.Preset)
_ACTIONS = (ir.Compute, ir.Skip, ir.Reuse, ir.Predict, ir.ApproximateUncond)
_SELECTORS = (
    ir.Pattern,
    ir.PatternParam,
    ir.Itself,
    ir.OfKind,
    ir.OfClass,
    ir.Blocks,
    ir.AllOf,
    ir.AnyOf,
    ir.NoneOf,
    ir.Within,
)


# --- lines -----------------------------------------------------------------------------------------------


def _lines(policy: ir.Policy) -> Iterator[str]:
    before, after = defaultdict[int, list[str]](list), dict[int, str]()
    for comment in policy.comments:
        if comment.place == "before":
            before[comment.statement].append(comment.text)
        else:
            after[comment.statement] = comment.text
    last = ""
    previous = None
    for number, pieces, group in _statements(policy):
        notes = _blanks_trimmed(before[number], first=previous is None)
        if previous is not None and group != previous and "" not in notes[:1]:
            notes.insert(0, "")
        yield from notes
        *lines, last = _packed(pieces)
        yield from lines
        yield f"{last}  {after[number]}" if number in after else last
        previous = group
    tail = _blanks_trimmed(before[len(policy.statements)], first=False)
    while tail and not tail[-1]:
        tail.pop()
    yield from tail


def _blanks_trimmed(notes: Sequence[str], *, first: bool) -> list[str]:
    """Collapses blank lines between comments, and removes blank lines at the top of the file."""
    kept = list[str]()
    for note in notes:
        if note or (kept[-1:] != [""] if kept else not first):
            kept.append(note)
    return kept


def _statements(policy: ir.Policy) -> Iterator[tuple[int, list[str], str]]:
    """Yields the number, the pieces and the group of each statement. A blank line separates groups."""
    yield -3, [f"cachepolicy {policy.edition}"], "header"
    if policy.name is not None:
        yield -2, [f"policy {policy.name}", *_quoted_all(policy.title)], "header"
    if policy.source is not None:
        yield -1, [f"source {quote(policy.source)}"], "header"
    for number, statement in enumerate(policy.statements):
        yield number, list(_pieces(statement)), _GROUPS[statement.kind]


_GROUPS = {
    "param": "param",
    "let": "names",
    "table": "names",
    "signal": "names",
    "external": "names",
    "match": "rule",
    "use": "rule",
    "expect": "expect",
    "tuned": "tuned",
    "preset": "preset",
}


def _packed(pieces: Sequence[str]) -> list[str]:
    """Joins the pieces of a statement to as few lines as possible. A piece that is too long is broken at spaces.

    If a rule does not fit on one line, its selector stands on the first line and its clauses below.
    """
    whole = " ".join(pieces)
    if len(whole) <= LINE_WIDTH:
        return [whole]
    lines = list[str]()
    full = False
    for piece in pieces:
        if lines and not full and len(lines[-1]) + 1 + len(piece) <= LINE_WIDTH:
            lines[-1] += f" {piece}"
            continue
        first = "  " if lines else ""
        broken = _broken(first + piece, "    ") if len(first + piece) > LINE_WIDTH else [first + piece]
        full = len(broken) > 1 or (not lines and piece.startswith("match "))
        lines += broken
    return lines


_WORDS = re.compile(r"""\s*(?:"(?:[^"]|"")*"|'(?:[^']|'')*'|[^\s"'])+""")


def _broken(piece: str, indent: str) -> list[str]:
    """Breaks a piece into several lines, after an argument if possible, otherwise at a space."""
    lines = [""]
    for part in _parts(piece):
        if len(lines[-1]) + len(part) <= LINE_WIDTH:
            lines[-1] += part
        elif lines[-1].strip() and len(indent) + len(part.lstrip()) <= LINE_WIDTH:
            lines.append(indent + part.lstrip())
        else:
            _add_words(lines, part, indent)
    return lines


def _add_words(lines: list[str], part: str, indent: str) -> None:
    for word in _WORDS.findall(part):
        if not lines[-1].strip() or len(lines[-1]) + len(word) <= LINE_WIDTH:
            lines[-1] += word
        else:
            lines.append(indent + word.lstrip())


def _parts(piece: str) -> Iterator[str]:
    """Splits an action after each argument. Other pieces are not split."""
    labels = [label.start() for label in _LABEL.finditer(piece) if label[0][0] not in "\"'"]
    starts = [0, *labels[1:]] if piece.lstrip().startswith("-> ") else [0]
    for start, end in pairwise([*starts, len(piece)]):
        yield piece[start:end]


_LABEL = re.compile(r"""\s?[A-Za-z_][A-Za-z0-9_]*: |"(?:[^"]|"")*"|'(?:[^']|'')*'""")


# --- statements ------------------------------------------------------------------------------------------


def _pieces(statement: ir.Statement) -> Iterator[str]:
    match statement:
        case ir.Param():
            default = "" if statement.default is None else f" = {_value(statement.default)}"
            yield f"param {statement.name}: {statement.type}{'?' * statement.optional}{default}"
            if statement.domain is not None:
                yield f"in {expression(statement.domain)}"
            yield from _quoted_all(statement.doc)
        case ir.Let():
            yield f"let {statement.name} ="
            yield expression(statement.value)
        case ir.Signal():
            yield f"signal {statement.name} ="
            yield expression(statement.value)
        case ir.Table():
            yield f"table {statement.name} ="
            *first, last = map(repr, statement.values)
            yield from ("[" * (number == 0) + value + "," for number, value in enumerate(first))
            yield "[" * (not first) + last + "]"
        case ir.External():
            yield f"external {statement.name}: float"
        case ir.Rule():
            yield from _clauses(statement)
        case ir.Use():
            yield f"use {statement.policy if _is_name(statement.policy) else quote(statement.policy)}"
            yield from _settings(statement.settings)
            if statement.when is not None:
                yield f"when {expression(statement.when)}"
            if statement.bound is not None:
                yield _bound(statement.bound)
        case ir.Preset():
            yield f"preset {statement.name} for class {quote(statement.for_class)}"
            if statement.when is not None:
                yield f"when {expression(statement.when)}"
            yield from _settings(statement.settings)
            if statement.origin is not None:
                yield f"source {quote(statement.origin)}"
        case ir.Expect():
            yield f"expect {selector(statement.selector)} over {statement.steps} steps" + ":" * (not statement.settings)
            yield from _settings(statement.settings, end=":")
            yield " ".join(statement.row)
        case ir.Tuned():
            yield f"tuned over {statement.steps} steps"
            yield from _settings(statement.settings)
        case _:
            assert_never(statement)


def _settings(settings: Sequence[ir.Setting], end: str = "") -> Iterator[str]:
    for number, setting in enumerate(settings):
        opening = "" if number else "with "
        closing = end if number == len(settings) - 1 else ","
        yield f"{opening}{setting.name} = {_value(setting.value)}{closing}"


def _clauses(rule: ir.Rule) -> Iterator[str]:
    yield f"match {'optional ' * rule.optional}{selector(rule.selector)}"
    if rule.when is not None:
        yield f"when {expression(rule.when)}"
    if rule.schedule is not None:
        yield _schedule(rule.schedule)
    if rule.condition is not None:
        yield f"while {expression(rule.condition)}"
    for bound in rule.bounds:
        yield _bound(bound)
    yield f"-> {_action(rule.action)}"
    if rule.follow is not None:
        yield f"follow {rule.follow}"


def _schedule(schedule: ir.ScheduleClause) -> str:
    match schedule:
        case ir.Every():
            text = f"every {_expression(schedule.interval, _SUM)}"
            if schedule.offset is not None:
                text += f" offset {_expression(schedule.offset, _SUM)}"
            return text + {"start": "", "end": " from end", "compute": " since compute"}[schedule.anchor]
        case ir.OnSteps():
            return f"on {expression(schedule.steps)}"
        case ir.Mask():
            return f"mask {expression(schedule.mask)}{' by site' * schedule.by_site}"
        case _:
            assert_never(schedule)


def _bound(bound: ir.Bound) -> str:
    return f"at most {_expression(bound.count, _SUM)} in {'a row' if bound.scope == 'row' else 'all'}"


def _action(action: ir.Action) -> str:
    match action:
        case ir.Compute():
            return "compute"
        case ir.Skip():
            return "skip"
        case ir.Reuse():
            return "reuse residual" if action.residual else "reuse mean" if action.mean else "reuse"
        case ir.Predict():
            residual = " of residual" if action.residual else ""
            return f"predict {action.predictor}{_arguments(action.arguments)}{residual}"
        case ir.ApproximateUncond():
            return f"approximate uncond {action.method}{_arguments(action.arguments)}"
        case _:
            assert_never(action)


def _arguments(arguments: Sequence[ir.Argument]) -> str:
    if not arguments:
        return ""
    return "(" + ", ".join(f"{argument.label}: {expression(argument.value)}" for argument in arguments) + ")"


# --- selectors -------------------------------------------------------------------------------------------


def selector(node: ir.Selector) -> str:
    """Formats a selector."""
    return _selector(node, _LOWEST)


def _selector(node: ir.Selector, least: int) -> str:
    text, level = _selected(node)
    return text if level >= least else f"({text})"


def _selected(node: ir.Selector) -> tuple[str, int]:
    match node:
        case ir.Pattern():
            return quote(node.regex), _ATOM
        case ir.PatternParam():
            return node.name, _ATOM
        case ir.Itself():
            return "self", _ATOM
        case ir.OfKind():
            return node.of, _ATOM
        case ir.OfClass():
            return f"class {quote(node.regex)}", _ATOM
        case ir.Blocks():
            return _blocks(node), _ATOM
        case ir.AnyOf():
            return " or ".join(_selector(part, _AND) for part in node.selectors), _OR
        case ir.AllOf():
            return " and ".join(_selector(part, _NOT) for part in node.selectors), _AND
        case ir.NoneOf():
            return f"not {_selector(node.selector, _NOT)}", _NOT
        case ir.Within():
            return f"{_selector(node.selector, _COMPARE)} within {_selector(node.inside, _ATOM)}", _COMPARE
        case _:
            assert_never(node)


def _blocks(node: ir.Blocks) -> str:
    text = "each blocks" if node.each else "blocks"
    if node.index is not None:
        text += f"[{_expression(node.index, _SUM)}]"
    elif node.start is not None or node.stop is not None or node.stride is not None:
        stride = "" if node.stride is None else f":{_expression(node.stride, _SUM)}"
        text += f"[{_slice(node.start, node.stop)}{stride}]"
    return text if node.of is None else f"{text} of {quote(node.of)}"


# --- expressions -----------------------------------------------------------------------------------------


def expression(node: ir.Expression) -> str:
    """Formats an expression."""
    return _expression(node, _LOWEST)


def _value(node: ir.Expression) -> str:
    return expression(node) if isinstance(node, ir.Interval) else _expression(node, _SUM)


def _expression(node: ir.Expression, least: int) -> str:
    text, level = _expressed(node)
    return text if level >= least else f"({text})"


def _all(nodes: Iterable[ir.Expression]) -> str:
    return ", ".join(map(expression, nodes))


def _expressed(node: ir.Expression) -> tuple[str, int]:
    match node:
        case ir.Number():
            return repr(node.value), _UNARY if math.copysign(1, node.value) < 0 else _ATOM
        case ir.Boolean():
            return "true" if node.value else "false", _ATOM
        case ir.Text():
            return quote(node.value), _ATOM
        case ir.Off():
            return "off", _ATOM
        case ir.Name():
            return node.name, _ATOM
        case ir.Lookup():
            return f"{node.table}[{expression(node.index)}]", _ATOM
        case ir.ListOf():
            return f"[{_all(node.items)}]", _ATOM
        case ir.SetOf():
            return f"{{{_all(node.items)}}}", _ATOM
        case ir.Interval():
            opening, closing = "[" if node.low_closed else "(", "]" if node.high_closed else ")"
            return f"{opening}{_all([node.low, node.high])}{closing}", _ATOM
        case ir.Call():
            if node.function == "cross" and node.arguments and isinstance(branch := node.arguments[0], ir.Text):
                named = branch.value if _is_name(branch.value) else quote(branch.value)
                return f"cross({', '.join([named, *map(expression, node.arguments[1:])])})", _ATOM
            labelled = [format_node(argument) for argument in node.labelled]
            return f"{node.function}({', '.join([*map(expression, node.arguments), *labelled])})", _ATOM
        case ir.Probe():
            named = "" if node.argument is None else f", {quote(node.argument)}"
            tokens = "" if node.tokens is None else f", {_tokens(node.tokens)}"
            return f"{node.stream}({selector(node.selector)}{named}{tokens})", _ATOM
        case ir.Over():
            return f"{node.function}({expression(node.value)} over {selector(node.selector)})", _ATOM
        case ir.Negative():
            # `-5` is a number, `-(5)` its negation.
            positive = isinstance(node.operand, ir.Number) and _expressed(node.operand)[1] == _ATOM
            return f"-{_expression(node.operand, _ATOM + 1 if positive else _UNARY)}", _UNARY
        case ir.Arithmetic():
            level = _SUM if node.operator in "+-" else _TERM
            left, right = _expression(node.left, level), _expression(node.right, level + 1)
            return f"{left} {node.operator} {right}", level
        case ir.Comparison():
            first, *rest = [_expression(operand, _SUM) for operand in node.operands]
            pairs = zip(node.operators, rest, strict=False)
            return " ".join([first, *(f"{operator} {operand}" for operator, operand in pairs)]), _COMPARE
        case ir.Membership():
            return f"{_expression(node.value, _SUM)} in {expression(node.container)}", _COMPARE
        case ir.Negation():
            return f"not {_expression(node.operand, _NOT)}", _NOT
        case ir.Both():
            return " and ".join(_expression(operand, _NOT) for operand in node.operands), _AND
        case ir.Either():
            return " or ".join(_expression(operand, _AND) for operand in node.operands), _OR
        case ir.Conditional():
            then, condition = _expression(node.then, _OR), _expression(node.condition, _OR)
            return f"{then} if {condition} else {expression(node.otherwise)}", _LOWEST
        case _:
            assert_never(node)


def _tokens(node: ir.Tokens) -> str:
    return 'tokens: "latent"' if node.latent else f"tokens: {_slice(node.start, node.stop)}"


def _slice(start: ir.Expression | None, stop: ir.Expression | None) -> str:
    return ":".join("" if end is None else _expression(end, _SUM) for end in (start, stop))


# --- words -----------------------------------------------------------------------------------------------


def quote(text: str) -> str:
    """Quotes a string with double quotes, or with single quotes if it contains double quotes.

    If the string contains both kinds, the inner quotes are doubled.
    """
    if '"' not in text:
        return f'"{text}"'
    if "'" not in text:
        return f"'{text}'"
    return '"' + text.replace('"', '""') + '"'


def _quoted_all(text: str | None) -> list[str]:
    return [] if text is None else [quote(text)]


def _is_name(text: str) -> bool:
    return text not in RESERVED and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is not None
