"""Checks the clauses of a rule after its constants are known: intervals, masks and regular expressions."""

from __future__ import annotations

from collections.abc import Iterator

from cachepolicy.errors import Diagnostic
from cachepolicy.language import ir
from cachepolicy.language.patterns import searcher
from cachepolicy.language.traversal import walk


def clause_faults(rule: ir.Rule) -> Iterator[Diagnostic]:
    """Yields the faults of a rule with substituted parameters and lets: E163 for constants, E164 for regexes."""
    if rule.schedule is not None:
        yield from _schedule(rule.schedule)
    for bound in rule.bounds:
        yield from _whole(bound.count, f"`at most` in {'a row' if bound.scope == 'row' else 'all'}", 0)
    yield from selector_faults(rule.selector)


def _schedule(schedule: ir.ScheduleClause) -> Iterator[Diagnostic]:
    match schedule:
        case ir.Every():
            yield from _whole(schedule.interval, "`every`", 1)
            if schedule.offset is not None:
                yield from _whole(schedule.offset, "`offset`", None)
        case ir.OnSteps(steps=ir.SetOf() | ir.ListOf() as steps):
            for item in steps.items:
                yield from _whole(item, "a step of `on`", 0)
        case ir.OnSteps(steps=ir.Name() as name):
            yield _fault(f"`on` takes steps, and `{name.name}` is no list parameter", schedule)
        case ir.Mask(mask=ir.Text() as mask):
            if set(mask.value) - {"0", "1"}:
                yield _fault(f"a mask holds the letters 0 and 1 only, not `{mask.value[:60]}`", schedule)
        case ir.Mask(mask=ir.Name() as name):
            yield _fault(f"`mask` takes a string, and `{name.name}` is no string parameter", schedule)
        case _:
            pass


def _whole(value: ir.Expression, what: str, least: int | None) -> Iterator[Diagnostic]:
    """Checks that a constant is an integer of at least `least`. Expressions of the clock are not known here."""
    if not isinstance(value, ir.Number | ir.Boolean | ir.Text):
        return
    number = value.value
    if isinstance(number, bool | str) or number != number // 1:
        yield _fault(f"{what} takes a whole number, not `{number}`", value)
    elif least is not None and number < least:
        yield _fault(f"{what} takes at least {least}, not `{number}`", value)


def _fault(message: str, node: ir.Node) -> Diagnostic:
    return Diagnostic("E163", message, span=node.span)


def selector_faults(selector: ir.Selector) -> Iterator[Diagnostic]:
    """Yields faults for regexes that RE2 rejects and for block positions that are not integer constants."""
    for node in walk(selector):
        match node:
            case ir.Pattern(regex=regex) | ir.OfClass(regex=regex):
                yield from _regex(regex, node)
            case ir.Blocks():
                if node.of is not None:
                    yield from _regex(node.of, node)
                for position in (node.index, node.start, node.stop):
                    if position is None:
                        continue
                    if not isinstance(position, ir.Number):
                        yield _fault("the position of a block is a constant whole number", position)
                    yield from _whole(position, "the position of a block", None)
            case _:
                pass


def _regex(regex: str, node: ir.Node) -> Iterator[Diagnostic]:
    try:
        searcher(regex)
    except ValueError as error:
        help = "RE2 has no lookaround and no backreferences; `and not` excludes names"
        yield Diagnostic("E164", f"the regex `{regex[:60]}` is refused: {error}", span=node.span, help=help)
