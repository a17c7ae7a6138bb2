"""Rewrites nodes bottom-up, folds constants and measures node sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined, children, constant

Rewrite = Callable[[ir.Node], ir.Node]


def transform(node: Any, rewrite: Rewrite) -> Any:
    """Applies `rewrite` to all descendants of `node`, then to the result. `node` is not modified."""
    changed = dict[str, object]()
    for name in type(node).model_fields:  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        old: object = getattr(node, name)  # pyright: ignore[reportUnknownArgumentType]
        new = _transform_in(old, rewrite)
        if new is not old:
            changed[name] = new
    return rewrite(node.model_copy(update=changed) if changed else node)


def _transform_in(value: object, rewrite: Rewrite) -> object:
    if isinstance(value, ir.Node):
        return transform(value, rewrite)
    if isinstance(value, tuple):
        old = cast("tuple[object, ...]", value)
        new = tuple([_transform_in(item, rewrite) for item in old])
        return new if any(a is not b for a, b in zip(old, new, strict=True)) else old
    return value


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
    """A node over constants as the constant that it is worth; any other node as it is.

    Only whole constants are folded: `false and x` stays, since an undefined `x` makes a clause false, `not` included.
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
        case ir.Call(function="sum" | "product" | "prev" | "kept"):
            return node
        case ir.Call():
            return _constant(node) if all(map(_is_constant, node.arguments)) else node
        case _:
            return node


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
        # It stays, undefined or ill-typed, and makes its clause false where it is read.
        return node
    if isinstance(value, bool):
        return ir.Boolean(value=value, span=node.span)
    return ir.Number(value=value, span=node.span) if isinstance(value, int | float) else node
