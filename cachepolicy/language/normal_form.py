"""The normal form of a policy's rules and its hash: what a policy means, however it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import cast

from cachepolicy.language import ir
from cachepolicy.language.evaluate import names_in

Tables = Mapping[str, Sequence[int | float]]


def digest(edition: int, rules: Sequence[ir.Rule], signals: Sequence[ir.Signal], tables: Tables) -> str:
    """The sha256 of what the rules mean, in hexadecimal.

    Equal for policies that differ in the names of parameters, lets, signals and tables, in comments, titles and layout,
    in the order of declarations, in what no rule reads, or in whether rules are written out or come by `use`. Externals
    count by their names, since the caller gives them so.
    """
    values = {name: _hash(["table", *(_number(value) for value in table)]) for name, table in tables.items()}
    reads = {signal.name: signal.value for signal in signals}
    waiting = list(reads)
    while waiting:
        name = waiting[-1]
        missing = [each for each in sorted(names_in(reads[name])) if each in reads and each not in values]
        if missing:
            waiting += missing
            continue
        values[name] = _hash(["signal", _normal(reads[name], values)])
        waiting.pop()
    return _hash([edition, *(_normal(rule, values) for rule in rules)])


def _hash(form: object) -> str:
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _number(value: float) -> object:
    """`1` and `1.0` are one number; `inf` has no JSON of its own."""
    if isinstance(value, bool):
        return value
    return int(value) if value == value // 1 else repr(float(value))


def _normal(node: object, values: Mapping[str, str]) -> object:
    """A node as nested lists, with the hashes of signals and tables for their names."""
    match node:
        case ir.Number():
            return _number(node.value)
        case ir.Name():
            return ["name", values.get(node.name, node.name)]
        case ir.Lookup():
            return ["lookup", values.get(node.table, node.table), _normal(node.index, values)]
        case ir.Comparison(operands=(_, _, _)):
            return _normal(_as_interval(node) or (node.operators, node.operands), values)
        case ir.Node():
            return [type(node).__name__, *(_normal(getattr(node, name), values) for name in _fields(node))]
        case tuple():
            return [_normal(item, values) for item in cast("tuple[object, ...]", node)]
        case _:
            return node


def _fields(node: ir.Node) -> list[str]:
    return [name for name in type(node).model_fields if name not in {"span", "kind"}]


def _as_interval(chain: ir.Comparison) -> ir.Membership | None:
    """`100 < t < 800` as the `t in (100, 800)` that it means."""
    operators = set(chain.operators)
    low, value, high = chain.operands
    closed = tuple(operator in {"<=", ">="} for operator in chain.operators)
    if operators <= {">", ">="}:
        low, high, closed = high, low, closed[::-1]
    elif not operators <= {"<", "<="}:
        return None
    interval = ir.Interval(low=low, high=high, low_closed=closed[0], high_closed=closed[1])
    return ir.Membership(value=value, container=interval)
