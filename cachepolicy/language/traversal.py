"""Visits, rewrites, folds and orders the nodes of a policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from typing import Any, TypeVar, cast

from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined, constant
from cachepolicy.language.vocabulary import PURE_FUNCTIONS

N = TypeVar("N", bound=ir.Node)

Rewrite = Callable[[ir.Node], Any]
"""Maps a node to its replacement."""


def walk(node: ir.Node) -> Iterator[ir.Node]:
    """Yields `node` and all its descendants, parents before children."""
    yield node
    for child in children(node):
        yield from walk(child)


def children(node: ir.Node) -> Iterator[ir.Node]:
    """Yields the direct children of `node`, in field order."""
    for name in type(node).model_fields:
        value = getattr(node, name)
        for part in cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,):
            if isinstance(part, ir.Node):
                yield part


def transform(node: ir.Node, rewrite: Rewrite) -> Any:
    """Rewrites a tree from the leaves up.

    Args:
        node: The root of the tree. It is not modified.
        rewrite: Maps a node, whose descendants are rewritten already, to its replacement.

    Returns:
        The replacement of `node`. Subtrees that do not change are shared with the argument.
    """
    return rewrite(_with_children(node, transform, rewrite))


def replace_outermost(node: ir.Node, replacement: Rewrite) -> Any:
    """Replaces the outermost nodes that `replacement` does not map to None. What it gives is not searched."""
    other = replacement(node)
    return _with_children(node, replace_outermost, replacement) if other is None else other


def _with_children(node: ir.Node, change: Callable[[ir.Node, Rewrite], Any], rewrite: Rewrite) -> ir.Node:
    """Returns `node` with its direct children changed by `change(child, rewrite)`; `node` itself if none changes."""
    changed = dict[str, object]()
    for name in type(node).model_fields:
        old: object = getattr(node, name)
        if isinstance(old, ir.Node):
            new = change(old, rewrite)
            if new is not old:
                changed[name] = new
        elif isinstance(old, tuple):
            items = cast("tuple[object, ...]", old)
            others = tuple([change(item, rewrite) if isinstance(item, ir.Node) else item for item in items])
            if any(a is not b for a, b in zip(items, others, strict=True)):
                changed[name] = others
    return node.model_copy(update=changed) if changed else node


def substitute(node: N, names: Mapping[str, ir.Expression]) -> N:
    """Replaces names in `node` by the expressions that `names` maps them to. `node` is not modified."""
    return transform(node, lambda part: names.get(part.name, part) if isinstance(part, ir.Name) else part)


def close_signals(signals: Iterable[ir.Signal], given: Collection[str] = ()) -> dict[str, ir.Expression]:
    """Returns the expressions of signals by name, in which the expressions of other signals replace their names.

    Args:
        signals: The signals in dependency order.
        given: Names of signals that are left out and stay names in the expressions of others.
    """
    closed = dict[str, ir.Expression]()
    for signal in signals:
        if signal.name not in given:
            closed[signal.name] = substitute(signal.value, closed)
    return closed


def names_in(node: ir.Node) -> set[str]:
    """Returns the names of clock words, parameters, lets, signals, externals and tables that `node` reads."""
    return {
        part.name if isinstance(part, ir.Name) else part.table
        for part in walk(node)
        if isinstance(part, ir.Name | ir.Lookup)
    }


def is_stream(node: ir.Node) -> bool:
    """Returns whether an expression without names of signals is a tensor."""
    match node:
        case ir.Probe():
            return True
        case ir.Call(function="prev" | "kept" | "wiener"):
            return is_stream(node.arguments[0])
        case ir.Call(function="cross"):
            return is_stream(node.arguments[1])
        case ir.Arithmetic():
            return is_stream(node.left) or is_stream(node.right)
        case _:
            return False


def inner_predictor(value: ir.Expression) -> ir.Predict | None:
    """Returns the predictor that an argument names, as `low: taylor(order: 0)` does, or None."""
    if isinstance(value, ir.Call) and not value.arguments:
        return ir.Predict(predictor=value.function, arguments=value.labelled, span=value.span)
    return None


def stateful_calls(expression: ir.Expression, functions: frozenset[str]) -> tuple[ir.Call, ...]:
    """Returns the distinct calls of `functions` in `expression`, inner calls before the calls that contain them."""
    calls = dict[ir.Call, None]()

    def visit(node: ir.Node) -> None:
        for child in children(node):
            visit(child)
        if isinstance(node, ir.Call) and node.function in functions:
            calls[node] = None

    visit(expression)
    return tuple(calls)


def dependency_order(reads: Mapping[str, Iterable[str]]) -> list[str]:
    """Sorts declared names so that each name stands after the names that it reads.

    Args:
        reads: The names that each declared name reads. Names that are no keys are ignored.

    Returns:
        The keys of `reads`, sorted.

    Raises:
        graphlib.CycleError: A name depends on itself. `args[1]` is the cycle. Each name in it is read by the next.
    """
    # Sorted, because the order of a set of strings differs between processes.
    known = {name: sorted(reads.keys() & read) for name, read in reads.items()}
    return list(TopologicalSorter(known).static_order())


def measure_size(node: ir.Node, known: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Returns the node count and depth of `node` after substitution.

    `known` maps each substituted name to its own node count and depth.
    """
    if isinstance(node, ir.Name):
        return known.get(node.name, (1, 1))
    nodes, depth = 1, 0
    for child in children(node):
        size = measure_size(child, known)
        nodes, depth = nodes + size[0], max(depth, size[1])
    return nodes, depth + 1


def fold_constants(node: ir.Node) -> ir.Node:
    """Replaces a node whose operands are all constants by its value. Other nodes are returned unchanged.

    `false and x` is not folded, because an undefined `x` makes the whole clause false, also under `not`.
    """
    match node:
        case ir.Membership(container=ir.Off()):
            return ir.Boolean(value=False, span=node.span)
        case ir.Conditional(condition=ir.Boolean(value=chosen)):
            return node.then if chosen else node.otherwise
        case (
            ir.Negative()
            | ir.Arithmetic()
            | ir.Comparison()
            | ir.Membership()
            | ir.Both()
            | ir.Either()
            | ir.Negation()
        ):
            return _constant(node) if all(map(_is_constant, children(node))) else node
        case ir.Call(function=function) if function in PURE_FUNCTIONS:
            return _constant(node) if all(map(_is_constant, node.arguments)) else node
        case _:
            return node


_LOWEST = {"step": 0, "progress": 0, "computes": 0, "age": 1}
_HIGHEST = {"progress": 1}


def without_truisms(guard: ir.Expression | None) -> ir.Expression | None:
    """Removes what holds at every step from a conjunction: `step >= 0`, `progress in [0, 1]`.

    So a policy with a warm-up or a window that is not set means what it means without one, and reads no clock word
    for it that a run would have to supply.
    """
    parts = guard.operands if isinstance(guard, ir.Both) else () if guard is None else (guard,)
    kept = tuple(part for part in parts if not _holds_always(part))
    if len(kept) == len(parts):
        return guard
    return ir.Both(operands=kept, span=guard.span) if guard and len(kept) > 1 else next(iter(kept), None)


def _holds_always(node: ir.Expression) -> bool:
    match node:
        case ir.Comparison(operators=operators, operands=operands):
            return all(map(_pair_holds_always, operands, operators, operands[1:]))
        case ir.Membership(value=ir.Name() as name, container=ir.Interval() as interval):
            return _pair_holds_always(name, ">=" if interval.low_closed else ">", interval.low) and _pair_holds_always(
                name, "<=" if interval.high_closed else "<", interval.high
            )
        case _:
            return False


def _pair_holds_always(left: ir.Expression, operator: str, right: ir.Expression) -> bool:
    """Returns whether a clock word is at its bound by what it is."""
    if isinstance(left, ir.Number):
        left, operator, right = right, {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(operator, operator), left
    if not (isinstance(left, ir.Name) and isinstance(right, ir.Number)):
        return False
    low, high = _LOWEST.get(left.name, -math.inf), _HIGHEST.get(left.name, math.inf)
    match operator:
        case ">=":
            return right.value <= low
        case ">":
            return right.value < low
        case "<=":
            return right.value >= high
        case "<":
            return right.value > high
        case _:
            return False


def _is_constant(node: ir.Node) -> bool:
    if isinstance(node, ir.ListOf | ir.SetOf):
        return all(map(_is_constant, node.items))
    if isinstance(node, ir.Interval):
        return _is_constant(node.low) and _is_constant(node.high)
    return isinstance(node, ir.Number | ir.Boolean | ir.Text)


def _constant(node: Any) -> ir.Node:
    try:
        value = constant(node)
    except (Undefined, TypeError):
        # An undefined or ill-typed node is kept. It makes its clause false where it is read.
        return node
    if isinstance(value, bool):
        return ir.Boolean(value=value, span=node.span)
    return ir.Number(value=value, span=node.span) if isinstance(value, int | float) else node
