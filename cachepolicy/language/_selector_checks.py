"""Checks selectors without a model: regexes, parameters and positions of spans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from cachepolicy.language import ir
from cachepolicy.language.scope import Report
from cachepolicy.language.typecheck import Checker
from cachepolicy.language.validate import positions_of, regex_fault
from cachepolicy.language.vocabulary import KINDS


def judge_selector(selector: ir.Selector, checker: Checker) -> None:
    """Reports the faults of `selector` that can be found without a model."""
    for node, alone in _parts(selector, alone=True):
        match node:
            case ir.Pattern() | ir.OfClass():
                _judge_regex(node.regex, node, checker.report)
            case ir.PatternParam():
                _judge_param(node, checker)
            case ir.Blocks():
                _judge_blocks(node, checker, alone=alone)
            case _:
                pass


def is_itself(selector: ir.Selector, checker: Checker) -> bool:
    """Returns whether a probe's selector is `self`, which a policy may also declare as its own name."""
    return selector == ir.PatternParam(name="self") and checker.scope.sort("self") is None


def takes_model(selector: ir.Selector) -> bool:
    """Returns whether `selector` selects the root of the model."""
    match selector:
        case ir.OfKind(of="model"):
            return True
        case ir.AnyOf():
            return any(map(takes_model, selector.selectors))
        case ir.AllOf():
            return all(map(takes_model, selector.selectors))
        case _:
            return False


def _parts(selector: ir.Selector, *, alone: bool) -> Iterator[tuple[ir.Selector, bool]]:
    match selector:
        case ir.AnyOf() | ir.AllOf():
            for part in selector.selectors:
                yield from _parts(part, alone=False)
        case ir.NoneOf():
            yield from _parts(selector.selector, alone=False)
        case ir.Within():
            yield from _parts(selector.selector, alone=False)
            # The blocks of a span are looked into one by one.
            whole = isinstance(selector.inside, ir.Blocks)
            inside = selector.inside.model_copy(update={"each": True}) if whole else selector.inside
            yield from _parts(inside, alone=False)
        case ir.Pattern() | ir.PatternParam() | ir.Itself() | ir.OfKind() | ir.OfClass() | ir.Blocks():
            yield selector, alone
        case _:
            assert_never(selector)


def _judge_blocks(blocks: ir.Blocks, checker: Checker, *, alone: bool) -> None:
    if not alone and not blocks.each:
        help = "a span is one site; `each blocks[...]` takes the blocks one by one and combines with others"
        checker.report.add("E119", "a span of blocks stands alone in its selector", blocks, help=help)
    if blocks.stride is not None and not blocks.each:
        help = "`each blocks[a:b:c]` takes the blocks one by one"
        checker.report.add("E119", "a span is of consecutive blocks, so that it has no stride", blocks, help=help)
    if blocks.of is not None:
        _judge_regex(blocks.of, blocks, checker.report)
    for position in positions_of(blocks):
        checker.count(position)


# --- parameters for regexes ------------------------------------------------------------------------------


def _judge_param(node: ir.PatternParam, checker: Checker) -> None:
    name, sort = node.name, checker.scope.sort(node.name)
    param = checker.scope.param(name)
    if sort is None:
        help = checker.scope.near(name, frozenset({"parameter"}), *KINDS, "blocks")
        help = help or f'write a regex in quotes, `"{name}"`, or declare `param {name}: string = "..."`'
        checker.unknown(node, name, frozenset({"parameter"}), help=help)
    elif sort == "unknown":
        pass
    elif param is None or param.type not in ("string", "list"):
        actual = f"`{param.type}` parameter" if param else sort
        message = f"a selector takes a regex, or a `string` or `list` parameter; `{name}` is a {actual}"
        checker.report.add("E110", message, node, help=f'modules are named in quotes: `"{name}"`')
    elif param.optional:
        checker.off(node, f"`{name}`, which may be off,")
    elif ("regex", name) not in checker.report.reported:
        checker.report.reported.add(("regex", name))
        _judge_default(param, checker.report)


def _judge_default(param: ir.Param, report: Report) -> None:
    if param.default is None:
        return
    items = param.default.items if isinstance(param.default, ir.ListOf) else (param.default,)
    for item in items:
        if isinstance(item, ir.Text):
            _judge_regex(item.value, item, report)
        elif param.type == "list" and isinstance(item, ir.Number | ir.Boolean):
            message = f"`{param.name}` stands for regexes in a selector, so its items are strings"
            report.add("E111", message, item)


def _judge_regex(regex: str, node: ir.Node, report: Report) -> None:
    fault = regex_fault(regex)
    if fault is not None:
        report.adopt(fault, node)
