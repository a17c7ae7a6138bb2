"""From the parser's trees to the nodes of a policy.

The trees are read by shape (`data`, `children`, `meta`), so that the parser's library stays behind `parser`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.errors import Diagnostic, Span
from cachepolicy.language import ir
from cachepolicy.language.source import Source
from cachepolicy.language.vocabulary import NUMBER_LIMIT

_GROUPS = frozenset({"group", "selector_group"})


def is_tree(node: Any) -> bool:
    """Whether `node` is a tree and no token."""
    return hasattr(node, "children")


def depth(tree: Any) -> int:
    """How many nodes lie below each other, parentheses not counted; without recursion, as any text comes here."""
    deepest, waiting = 0, [(tree, 1)]
    while waiting:
        node, level = waiting.pop()
        deepest = max(deepest, level)
        below = level if node.data in _GROUPS else level + 1
        waiting += [(child, below) for child in node.children if is_tree(child)]
    return deepest


def quoted(token: str) -> str:
    """Returns the value of a string token."""
    quote = token[0]
    return str(token[1:-1]).replace(quote * 2, quote)


@dataclass
class Lowering:
    """Turns trees of one source into nodes; `findings` collects numbers that are too large."""

    source: Source
    findings: list[Diagnostic] = field(default_factory=list[Diagnostic])

    # --- statements

    def statement(self, tree: Any) -> ir.Statement:
        """The statement of a tree; the header's are read by `header`."""
        return _STATEMENTS[tree.data](self, tree)

    def header(self, tree: Any) -> dict[str, Any]:
        """The policy's fields that an `edition`, `policy` or `source` line gives."""
        first, *rest = tree.children
        match tree.data:
            case "edition":
                return {"edition": self._whole(first)}
            case "policy":
                return {"name": str(first), "title": quoted(rest[0]) if rest else None}
            case _:
                return {"source": quoted(first)}

    def _param(self, tree: Any) -> ir.Param:
        name, type_, *rest = tree.children
        parts = {child.data if is_tree(child) else "OFFABLE": child for child in rest}
        value = next(child for child in rest if is_tree(child))
        domain, doc = parts.get("domain"), parts.get("doc")
        default = self.expression(value)
        if type_ == "range" and isinstance(default, ir.ListOf) and len(default.items) == 2:
            low, high = default.items
            default = ir.Interval(low=low, high=high, low_closed=True, high_closed=True, span=default.span)
        return ir.Param(
            name=str(name),
            type=str(type_),  # pyright: ignore[reportArgumentType]
            optional="OFFABLE" in parts,
            default=default,
            domain=self.expression(domain.children[0]) if domain else None,  # pyright: ignore[reportArgumentType]
            doc=quoted(doc.children[0]) if doc else None,
            span=self._span(tree),
        )

    def _let(self, tree: Any) -> ir.Let:
        name, value = tree.children
        return ir.Let(name=str(name), value=self.expression(value), span=self._span(tree))

    def _table(self, tree: Any) -> ir.Table:
        name, *constants = tree.children
        return ir.Table(name=str(name), values=tuple(map(self._constant, constants)), span=self._span(tree))

    def _constant(self, tree: Any) -> int | float:
        value = self._amount(tree.children[-1])
        return -value if len(tree.children) > 1 else value

    def _signal(self, tree: Any) -> ir.Signal:
        name, value = tree.children
        return ir.Signal(name=str(name), value=self.expression(value), span=self._span(tree))

    def _external(self, tree: Any) -> ir.External:
        name, type_ = tree.children
        if type_ != "float":
            message = f"an external is a `float`, not `{type_}`"
            self.findings.append(self.source.finding("E001", message, type_.start_pos, type_.end_pos))
        return ir.External(name=str(name), span=self._span(tree))

    def _use(self, tree: Any) -> ir.Use:
        policy, *settings = tree.children
        name = quoted(policy) if policy[0] in "\"'" else str(policy)
        return ir.Use(policy=name, settings=self._settings(settings), span=self._span(tree))

    def _settings(self, trees: list[Any]) -> tuple[ir.Setting, ...]:
        return tuple(
            ir.Setting(name=str(each.children[0]), value=self.expression(each.children[1]), span=self._span(each))
            for each in trees
        )

    def _expect(self, tree: Any) -> ir.Expect:
        selector, steps, *settings, row = tree.children
        return ir.Expect(
            selector=self.selector(selector),
            steps=self._whole(steps),
            settings=self._settings(settings),
            row="".join(row.children),
            span=self._span(tree),
        )

    def _rule(self, tree: Any) -> ir.Rule:
        optional = not is_tree(tree.children[0])
        selector, *rest = tree.children[optional:]
        clauses: dict[str, Any] = {"bounds": ()}
        for clause in rest:
            match clause.data:
                case "when" | "condition":
                    clauses[clause.data] = self.expression(clause.children[0])
                case "bound":
                    clauses["bounds"] += (self._bound(clause),)
                case "follow":
                    clauses["follow"] = str(clause.children[0])
                case data if data in _SCHEDULES:
                    clauses["schedule"] = self._schedule(clause)
                case _:
                    clauses["action"] = self._action(clause)
        return ir.Rule(selector=self.selector(selector), optional=optional, **clauses, span=self._span(tree))

    # --- clauses

    def _schedule(self, tree: Any) -> ir.Every | ir.OnSteps | ir.Mask:
        span, first = self._span(tree), self.expression(tree.children[0])
        match tree.data:
            case "on":
                return ir.OnSteps(steps=first, span=span)  # pyright: ignore[reportArgumentType]
            case "mask":
                return ir.Mask(mask=first, span=span)  # pyright: ignore[reportArgumentType]
            case "every_from_end":
                return ir.Every(interval=first, anchor="end", span=span)
            case "every_since_compute":
                return ir.Every(interval=first, anchor="compute", span=span)
            case _:
                offset = self.expression(tree.children[1]) if len(tree.children) > 1 else None
                return ir.Every(interval=first, offset=offset, span=span)

    def _bound(self, tree: Any) -> ir.Bound:
        count, scope = tree.children
        in_all = scope.data == "in_all"
        return ir.Bound(count=self.expression(count), scope="all" if in_all else "row", span=self._span(tree))

    def _action(self, tree: Any) -> ir.Action:
        span, children = self._span(tree), tree.children
        residual = bool(children) and children[-1] == "residual"
        match tree.data:
            case "compute":
                return ir.Compute(span=span)
            case "skip":
                return ir.Skip(span=span)
            case "reuse":
                return ir.Reuse(residual=residual, span=span)
            case "predict":
                residual = residual and len(children) > 1
                return ir.Predict(
                    predictor=str(children[0]), arguments=self._arguments(children), residual=residual, span=span
                )
            case _:
                return ir.ApproximateUncond(method=str(children[0]), arguments=self._arguments(children), span=span)

    def _arguments(self, children: list[Any]) -> tuple[ir.Argument, ...]:
        return tuple(
            ir.Argument(label=str(each.children[0]), value=self.expression(each.children[1]), span=self._span(each))
            for group in children[1:2]
            if is_tree(group)
            for each in group.children
        )

    # --- selectors

    def selector(self, tree: Any) -> ir.Selector:
        """Converts a tree to a selector."""
        while tree.data in _GROUPS:
            tree = tree.children[0]
        span, children = self._span(tree), tree.children
        match tree.data:
            case "pattern":
                return ir.Pattern(regex=quoted(children[0]), span=span)
            case "pattern_param":
                return ir.PatternParam(name=str(children[0]), span=span)
            case "of_kind":
                return ir.OfKind(of=str(children[0]), span=span)  # pyright: ignore[reportArgumentType]
            case "of_class":
                return ir.OfClass(regex=quoted(children[0]), span=span)
            case "any_of":
                return ir.AnyOf(selectors=tuple(map(self.selector, children)), span=span)
            case "all_of":
                return ir.AllOf(selectors=tuple(map(self.selector, children)), span=span)
            case "none_of":
                return ir.NoneOf(selector=self.selector(children[0]), span=span)
            case _:
                return self._blocks(tree)

    def _blocks(self, tree: Any) -> ir.Blocks:
        fields: dict[str, Any] = {}
        for child in tree.children:
            if child == "each":
                fields["each"] = True
            elif not is_tree(child):
                fields["of"] = quoted(child)
            elif child.data == "index":
                fields["index"] = self.expression(child.children[0])
            else:
                for end in child.children:
                    fields[end.data.removeprefix("slice_")] = self.expression(end.children[0])
        return ir.Blocks(**fields, span=self._span(tree))

    # --- expressions

    def expression(self, tree: Any) -> ir.Expression:
        """Converts a tree to an expression."""
        while tree.data in _GROUPS:
            tree = tree.children[0]
        return _EXPRESSIONS[tree.data](self, tree)

    def _all(self, trees: list[Any]) -> tuple[ir.Expression, ...]:
        return tuple(map(self.expression, trees))

    def _number(self, tree: Any) -> ir.Expression:
        return ir.Number(value=self._amount(tree.children[0]), span=self._span(tree))

    def _negative(self, tree: Any) -> ir.Expression:
        operand, span = tree.children[1], self._span(tree)
        if operand.data == "number":
            return ir.Number(value=-self._amount(operand.children[0]), span=span)
        return ir.Negative(operand=self.expression(operand), span=span)

    def _arithmetic(self, tree: Any) -> ir.Expression:
        left, operator, right = tree.children
        return ir.Arithmetic(
            operator=str(operator),  # pyright: ignore[reportArgumentType]
            left=self.expression(left),
            right=self.expression(right),
            span=self._span(tree),
        )

    def _compared(self, tree: Any) -> ir.Expression:
        operators = tuple(map(str, tree.children[1::2]))
        return ir.Comparison(
            operators=operators,  # pyright: ignore[reportArgumentType]
            operands=self._all(tree.children[::2]),
            span=self._span(tree),
        )

    def _member(self, tree: Any) -> ir.Expression:
        value, container = self._all(tree.children)
        return ir.Membership(value=value, container=container, span=self._span(tree))  # pyright: ignore[reportArgumentType]

    def _conditional(self, tree: Any) -> ir.Expression:
        then, condition, otherwise = self._all(tree.children)
        return ir.Conditional(then=then, condition=condition, otherwise=otherwise, span=self._span(tree))

    def _interval(self, tree: Any) -> ir.Expression:
        opening, low, high, closing = tree.children
        return ir.Interval(
            low=self.expression(low),
            high=self.expression(high),
            low_closed=opening == "[",
            high_closed=closing == "]",
            span=self._span(tree),
        )

    def _call(self, tree: Any) -> ir.Expression:
        function, *arguments = tree.children
        return ir.Call(function=str(function), arguments=self._all(arguments), span=self._span(tree))

    def _lookup(self, tree: Any) -> ir.Expression:
        table, index = tree.children
        return ir.Lookup(table=str(table), index=self.expression(index), span=self._span(tree))

    def _probe(self, tree: Any) -> ir.Expression:
        stream, selector, *argument = tree.children
        return ir.Probe(
            stream=str(stream),  # pyright: ignore[reportArgumentType]
            selector=self.selector(selector),
            argument=quoted(argument[0]) if argument else None,
            span=self._span(tree),
        )

    # --- tokens

    def _whole(self, token: Any) -> int:
        return int(self._amount(token))

    def _amount(self, token: Any) -> int | float:
        """The number of a token; one that is too large is reported and read as 0."""
        if token == "inf":
            return math.inf
        if token.isdecimal():
            if len(token) <= 16 and int(token) <= NUMBER_LIMIT:
                return int(token)
        elif math.isfinite(value := float(token)):
            return value
        message = f"the number `{_shortened(token)}` is too large"
        help = f"whole numbers go up to {NUMBER_LIMIT}, others to 1e308"
        self.findings.append(self.source.finding("E016", message, token.start_pos, token.end_pos, help=help))
        return 0

    def _span(self, tree: Any) -> Span | None:
        return self.source.span(tree.meta.start_pos, tree.meta.end_pos)


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}..."


_SCHEDULES = frozenset({"every", "every_offset", "every_from_end", "every_since_compute", "on", "mask"})

# Private methods by the name of the grammar's rule: a table, so that a rule without one is a KeyError in the tests.
# pyright: reportPrivateUsage=false
_STATEMENTS: dict[str, Callable[[Lowering, Any], ir.Statement]] = {
    "param": Lowering._param,
    "let": Lowering._let,
    "table": Lowering._table,
    "signal": Lowering._signal,
    "external": Lowering._external,
    "rule": Lowering._rule,
    "use": Lowering._use,
    "expect": Lowering._expect,
}
_EXPRESSIONS: dict[str, Callable[[Lowering, Any], ir.Expression]] = {
    "number": Lowering._number,
    "yes": lambda self, tree: ir.Boolean(value=True, span=self._span(tree)),
    "no": lambda self, tree: ir.Boolean(value=False, span=self._span(tree)),
    "off": lambda self, tree: ir.Off(span=self._span(tree)),
    "text": lambda self, tree: ir.Text(value=quoted(tree.children[0]), span=self._span(tree)),
    "name": lambda self, tree: ir.Name(name=str(tree.children[0]), span=self._span(tree)),
    "list": lambda self, tree: ir.ListOf(items=self._all(tree.children), span=self._span(tree)),
    "set": lambda self, tree: ir.SetOf(items=self._all(tree.children), span=self._span(tree)),
    "negative": Lowering._negative,
    "arithmetic": Lowering._arithmetic,
    "compared": Lowering._compared,
    "and_of": lambda self, tree: ir.Both(operands=self._all(tree.children), span=self._span(tree)),
    "or_of": lambda self, tree: ir.Either(operands=self._all(tree.children), span=self._span(tree)),
    "negated": lambda self, tree: ir.Negation(operand=self.expression(tree.children[0]), span=self._span(tree)),
    "conditional": Lowering._conditional,
    "interval": Lowering._interval,
    "member": Lowering._member,
    "call": Lowering._call,
    "lookup": Lowering._lookup,
    "probe": Lowering._probe,
}
