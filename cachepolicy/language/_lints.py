"""Reports warnings for valid policies."""

from __future__ import annotations

from collections.abc import Iterator

from cachepolicy.language import ir
from cachepolicy.language.scope import Report, Scope, propagated
from cachepolicy.language.traversal import children, names_in, walk
from cachepolicy.language.vocabulary import ACCUMULATORS, NORMS


def advise(policy: ir.Policy, scope: Scope, report: Report, *, partial: bool) -> None:
    """Reports accumulators over the wrong anchor, anchors without one, and (of a whole policy) what nothing reads."""
    drifts = _drifts_of_signals(policy, scope)
    for statement in policy.statements:
        if isinstance(statement, ir.Rule) and statement.condition is not None:
            _judge_anchors(statement.condition, drifts, report)
    if not partial:
        _judge_unread(policy, report)


# --- anchors ---------------------------------------------------------------------------------------------


def _drifts_of_signals(policy: ir.Policy, scope: Scope) -> dict[str, frozenset[str]]:
    """For each let and signal, the anchors (`prev`, `kept`) that distances in it are taken from."""
    own = {each.name: _drifts(each.value) for each in policy.statements if isinstance(each, ir.Let | ir.Signal)}
    return propagated(scope.reads, own)


def _drifts(expression: ir.Node) -> frozenset[str]:
    return frozenset(anchor for node in walk(expression) for anchor in _anchors(node))


def _anchors(node: ir.Node) -> Iterator[str]:
    """The anchor of a distance between something present and something remembered, if `node` is one.

    `l1(kept(v), kept(v, 2))` is none: both ends are remembered.
    """
    match node:
        case ir.Call(function=function, arguments=(one, other)) if function in NORMS:
            pass
        case ir.Arithmetic(operator="-", left=one, right=other):
            pass
        case _:
            return
    for anchor in ("prev", "kept"):
        remembered = [_remembers(each, anchor) for each in (one, other)]
        if remembered in ([True, False], [False, True]) and _alike(one, other):
            yield anchor


def _remembers(node: ir.Node, anchor: str) -> bool:
    return any(isinstance(each, ir.Call) and each.function == anchor for each in walk(node))


def _alike(one: ir.Node, other: ir.Node) -> bool:
    """Whether both read the same thing; else one only weighs the other."""
    return bool(names_in(one) & names_in(other))


def _judge_anchors(condition: ir.Expression, drifts: dict[str, frozenset[str]], report: Report) -> None:
    for node, summed in _with_sums(condition, summed=False):
        if isinstance(node, ir.Call) and node.function == "sum" and "kept" in _all_drifts(node, drifts):
            help = "`kept` already measures from the last compute: drop the `sum`, or take `prev`"
            report.add("W501", "the `sum` of distances from the last compute counts drift twice", node, help=help)
        anchors = frozenset(_anchors(node))
        if isinstance(node, ir.Name):
            anchors |= drifts.get(node.name, frozenset())
        if not summed and "prev" in anchors:
            help = "sum it up: `sum(...) < threshold`, or take `kept`, the step of the last compute"
            report.add("W502", "a distance from the step before is blind to slow drift", node, help=help)


def _all_drifts(node: ir.Node, drifts: dict[str, frozenset[str]]) -> frozenset[str]:
    return _drifts(node).union(*(drifts.get(name, frozenset()) for name in names_in(node)))


def _with_sums(node: ir.Node, *, summed: bool) -> Iterator[tuple[ir.Node, bool]]:
    """Every node below, with whether an accumulator stands above it; of nested sums the outermost alone."""
    yield node, summed
    within = summed or (isinstance(node, ir.Call) and node.function in ACCUMULATORS)
    for child in children(node):
        if not (summed and isinstance(child, ir.Call) and child.function in ACCUMULATORS):
            yield from _with_sums(child, summed=within)


# --- what nothing reads ----------------------------------------------------------------------------------


def _judge_unread(policy: ir.Policy, report: Report) -> None:
    read = frozenset[str]().union(*(_reads(statement) for statement in policy.statements))
    for statement in policy.statements:
        match statement:
            case ir.Param() if statement.name not in read:
                report.add("W503", f"nothing reads the parameter `{statement.name}`", statement, word=statement.name)
            case ir.Let() | ir.Table() | ir.Signal() | ir.External() if statement.name not in read:
                message = f"nothing reads the {statement.kind} `{statement.name}`"
                report.add("W504", message, statement, word=statement.name)
            case _:
                pass


def _reads(statement: ir.Statement) -> frozenset[str]:
    params = {each.name for each in walk(statement) if isinstance(each, ir.PatternParam)}
    return frozenset(names_in(statement) | params)
