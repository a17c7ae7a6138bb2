"""Reports warnings for valid policies."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from cachepolicy.language import ir
from cachepolicy.language.scope import Report, Scope, propagated
from cachepolicy.language.traversal import children, fold_constants, names_in, walk
from cachepolicy.language.validate import counts_of
from cachepolicy.language.vocabulary import ACCUMULATORS, NORMS, SUMS


def advise(policy: ir.Policy, scope: Scope, report: Report, *, partial: bool) -> None:
    """Reports `sum` over `kept`, distances from `prev` without an accumulator, and unused declarations.

    Unused declarations are not reported for a `partial` policy, which lacks statements.
    """
    drifts = _drifts_of_signals(policy, scope)
    whole, computed = _judge_lets(scope)
    for statement in policy.statements:
        if not isinstance(statement, ir.Rule):
            continue
        if statement.condition is not None:
            _judge_anchors(statement.condition, drifts, report)
        for count in counts_of(statement):
            if _is_computed(count.value, scope, computed) and not _is_whole(count.value, scope, whole):
                help = "it is rounded down: where it is 2.7, 2 is used"
                report.add("W505", f"the number of {count.name} can be a fraction", count.value, help=help)
    if not partial:
        if not any(isinstance(statement, ir.Rule | ir.Use) for statement in policy.statements):
            help = "a rule is `match SELECTOR every N -> reuse`"
            nowhere = policy.model_copy(update={"span": None})
            report.add("W506", "the policy has no rules, so every step is computed", nowhere, help=help)
        _judge_unread(policy, report)


# --- anchors ---------------------------------------------------------------------------------------------


def _drifts_of_signals(policy: ir.Policy, scope: Scope) -> dict[str, frozenset[str]]:
    """Returns for each let and signal the anchors (`prev`, `kept`) of the distances that it contains."""
    own = {
        statement.name: _drifts(statement.value)
        for statement in policy.statements
        if isinstance(statement, ir.Let | ir.Signal)
    }
    return propagated(scope.reads, own)


def _drifts(expression: ir.Node) -> frozenset[str]:
    return frozenset(anchor for node in walk(expression) for anchor in _anchors(node))


def _anchors(node: ir.Node) -> Iterator[str]:
    """Yields the anchor if `node` is the distance between a current value and a remembered one.

    `l1(kept(v), kept(v, 2))` is not such a distance, because both of its ends are remembered.
    """
    match node:
        case ir.Call(function=function, arguments=(one, other)) if function in NORMS:
            pass
        case ir.Arithmetic(operator="-", left=one, right=other):
            pass
        case _:
            return
    for anchor in ("prev", "kept"):
        remembered = [_remembers(operand, anchor) for operand in (one, other)]
        if remembered in ([True, False], [False, True]) and _alike(one, other):
            yield anchor


def _remembers(node: ir.Node, anchor: str) -> bool:
    return any(isinstance(part, ir.Call) and part.function == anchor for part in walk(node))


def _alike(one: ir.Node, other: ir.Node) -> bool:
    """Returns whether both operands read a common name. Otherwise one only scales the other."""
    return bool(names_in(one) & names_in(other))


def _judge_anchors(condition: ir.Expression, drifts: dict[str, frozenset[str]], report: Report) -> None:
    for node, summed in _with_sums(condition, summed=False):
        if isinstance(node, ir.Call) and node.function == "sum" and "kept" in _all_drifts(node, drifts):
            help = "`kept` already measures from the last compute: remove the `sum`, or use `prev`"
            report.add("W501", "the `sum` of distances from the last compute counts drift twice", node, help=help)
        anchors = frozenset(_anchors(node))
        if isinstance(node, ir.Name):
            anchors |= drifts.get(node.name, frozenset())
        if not summed and "prev" in anchors:
            help = "accumulate it: `sum(...) < threshold`, or use `kept`, the value at the last compute"
            report.add("W502", "a distance from the previous step does not detect slow drift", node, help=help)


def _all_drifts(node: ir.Node, drifts: dict[str, frozenset[str]]) -> frozenset[str]:
    return _drifts(node).union(*(drifts.get(name, frozenset()) for name in names_in(node)))


def _with_sums(node: ir.Node, *, summed: bool) -> Iterator[tuple[ir.Node, bool]]:
    """Yields the nodes below `node`, and whether each is inside an accumulator. Nested accumulators are left out."""
    yield node, summed
    within = summed or (isinstance(node, ir.Call) and node.function in SUMS)
    for child in children(node):
        if not (summed and isinstance(child, ir.Call) and child.function in ACCUMULATORS):
            yield from _with_sums(child, summed=within)


# --- fractions -------------------------------------------------------------------------------------------


def _judge_lets(scope: Scope) -> tuple[set[str], set[str]]:
    """Returns the lets that are whole numbers at every step, and the lets that are computed at each step."""
    whole, computed = set[str](), set[str]()
    # In dependency order, so that each let is judged once, however often others read it.
    for name in scope.reads:
        declared = scope.declared[name]
        if isinstance(declared, ir.Let):
            if _is_whole(declared.value, scope, whole):
                whole.add(name)
            if _is_computed(declared.value, scope, computed):
                computed.add(name)
    return whole, computed


def _is_computed(node: ir.Expression, scope: Scope, computed: Collection[str]) -> bool:
    """Returns whether `node` reads the clock, a table or one of the `computed` lets.

    Other numbers are constants after substitution of the parameters. A constant fraction is an error (E163).
    """
    return any(
        isinstance(part, ir.Lookup)
        or (isinstance(part, ir.Name) and (scope.sort(part.name) == "clock word" or part.name in computed))
        for part in walk(node)
    )


def _is_whole(node: ir.Expression, scope: Scope, whole: Collection[str]) -> bool:
    """Returns whether the value of `node` is a whole number at every step, as those of the lets `whole` are."""
    parts: tuple[ir.Expression, ...]
    match node:
        case ir.Number(value=value):
            return value == value // 1
        case ir.Name(name=name):
            declared = scope.declared.get(name)
            if isinstance(declared, ir.Param):
                return declared.type == "int"
            return name in whole or (declared is None and name in _WHOLE)
        case ir.Lookup(table=table):
            declared = scope.declared.get(table)
            return isinstance(declared, ir.Table) and all(value == value // 1 for value in declared.values)
        case ir.Arithmetic(operator=operator, left=left, right=right):
            if isinstance(folded := fold_constants(node), ir.Number):
                return _is_whole(folded, scope, whole)
            if operator == "/":
                return False
            parts = (left, right)
        case ir.Negative(operand=operand):
            parts = (operand,)
        case ir.Conditional(then=then, otherwise=otherwise):
            parts = (then, otherwise)
        case ir.Call(function="abs" | "min" | "max" | "clamp", arguments=arguments):
            parts = arguments
        case ir.Off() | ir.Call(function="floor"):
            return True
        case _:
            return False
    return all(_is_whole(part, scope, whole) for part in parts)


_WHOLE = frozenset({"step", "steps", "age", "gap", "computes"})
"""The clock words that are whole numbers."""


# --- unused declarations ---------------------------------------------------------------------------------


def _judge_unread(policy: ir.Policy, report: Report) -> None:
    read = frozenset[str]().union(*(_reads(statement) for statement in policy.statements))
    for statement in policy.statements:
        match statement:
            case ir.Param() if statement.name not in read:
                report.add("W503", f"the parameter `{statement.name}` is not used", statement, word=statement.name)
            case ir.Let() | ir.Table() | ir.Signal() | ir.External() if statement.name not in read:
                message = f"the {statement.kind} `{statement.name}` is not used"
                report.add("W504", message, statement, word=statement.name)
            case _:
                pass


def _reads(statement: ir.Statement) -> frozenset[str]:
    params = {part.name for part in walk(statement) if isinstance(part, ir.PatternParam)}
    return frozenset(names_in(statement) | params)
