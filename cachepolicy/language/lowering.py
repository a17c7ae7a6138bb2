"""Converts the parser's trees to the nodes of a policy.

The trees are read by shape (`data`, `children`, `meta`), so that only `parser` imports the parser's library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.errors import Diagnostic, Span
from cachepolicy.language import ir
from cachepolicy.language.source import Source
from cachepolicy.language.vocabulary import NUMBER_LIMIT

_GROUPS = frozenset({"group", "selector_group"})
"""Names of the trees that stand for parentheses."""


def is_tree(node: Any) -> bool:
    """Returns whether `node` is a tree, not a token."""
    return hasattr(node, "children")


def depth(tree: Any) -> int:
    """Returns the depth of a tree without parentheses. The traversal is iterative, because a text is untrusted."""
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
    """Converts the trees of one source to nodes.

    Attributes:
        source: The prepared text.
        findings: Collects the diagnostics of numbers that are too large and of externals that are no `float`.
    """

    source: Source
    findings: list[Diagnostic] = field(default_factory=list[Diagnostic])

    def lower(self, part: Any) -> Any:
        """Converts a tree to its node, a string token to its value and another token to a string."""
        if not is_tree(part):
            return quoted(part) if part.type == "STRING" else str(part)
        while part.data in _GROUPS:
            part = part.children[0]
        if part.data in _CONVERTERS:
            return _CONVERTERS[part.data](self, part)
        node, *fields = _NODES[part.data]
        values = [self.lower(child) for child in part.children]
        if fields and fields[-1].startswith("*"):
            first = len(fields) - 1
            values = [*values[:first], tuple(values[first:])]
            fields[-1] = fields[-1][1:]
        return node(**dict(zip(fields, values, strict=False)), span=self._span(part))

    def header(self, tree: Any) -> dict[str, Any]:
        """Returns the fields of the policy that an `edition`, `policy` or `source` line sets."""
        first, *rest = tree.children
        match tree.data:
            case "edition":
                return {"edition": int(self._amount(first))}
            case "policy":
                return {"name": str(first), "title": quoted(rest[0]) if rest else None}
            case _:
                return {"source": quoted(first)}

    # --- statements

    def _param(self, tree: Any) -> ir.Param:
        name, type_, *rest = tree.children
        parts = {child.data if is_tree(child) else "OFFABLE": child for child in rest}
        domain, doc = parts.get("domain"), parts.get("doc")
        default = self.lower(parts["default"].children[0]) if "default" in parts else None
        if type_ == "range" and isinstance(default, ir.ListOf) and len(default.items) == 2:
            low, high = default.items
            default = ir.Interval(low=low, high=high, low_closed=True, high_closed=True, span=default.span)
        return ir.Param(
            name=str(name),
            type=str(type_),  # pyright: ignore[reportArgumentType]
            optional="OFFABLE" in parts,
            default=default,
            domain=self.lower(domain.children[0]) if domain else None,
            doc=quoted(doc.children[0]) if doc else None,
            span=self._span(tree),
        )

    def _constant(self, tree: Any) -> int | float:
        value = self._amount(tree.children[-1])
        return -value if len(tree.children) > 1 else value

    def _external(self, tree: Any) -> ir.External:
        name, type_ = tree.children
        if type_ != "float":
            message = f"an external is a `float`, not `{type_}`"
            self.findings.append(self.source.finding("E001", message, type_.start_pos, type_.end_pos))
        return ir.External(name=str(name), span=self._span(tree))

    def _use(self, tree: Any) -> ir.Use:
        policy, *rest = tree.children
        return ir.Use(policy=self.lower(policy), **self._clauses(rest), span=self._span(tree))

    def _preset(self, tree: Any) -> ir.Preset:
        name, regex, *rest = tree.children
        return ir.Preset(name=str(name), for_class=quoted(regex), **self._clauses(rest), span=self._span(tree))

    def _clauses(self, trees: Iterable[Any]) -> dict[str, Any]:
        """Returns the fields of a `use` or `preset` that its clauses set, with its settings together."""
        clauses: dict[str, Any] = {"settings": ()}
        for child in trees:
            match child.data:
                case "when":
                    clauses["when"] = self.lower(child.children[0])
                case "use_bound":
                    clauses["bound"] = self._bound(child)
                case "preset_source":
                    clauses["origin"] = quoted(child.children[0])
                case _:
                    clauses["settings"] += (self.lower(child),)
        return clauses

    def _expect(self, tree: Any) -> ir.Expect:
        selector, steps, *settings, row = tree.children
        return ir.Expect(
            selector=self.lower(selector),
            steps=int(self._amount(steps)),
            settings=tuple(map(self.lower, settings)),
            row="".join(row.children),
            span=self._span(tree),
        )

    def _tuned(self, tree: Any) -> ir.Tuned:
        steps, *settings = tree.children
        return ir.Tuned(
            steps=int(self._amount(steps)), settings=tuple(map(self.lower, settings)), span=self._span(tree)
        )

    def _rule(self, tree: Any) -> ir.Rule:
        optional = not is_tree(tree.children[0])
        selector, *rest = tree.children[optional:]
        clauses: dict[str, Any] = {"bounds": ()}
        for clause in rest:
            match clause.data:
                case "when" | "condition" | "follow":
                    clauses[clause.data] = self.lower(clause.children[0])
                case "bound":
                    clauses["bounds"] += (self._bound(clause),)
                case data if data in _SCHEDULES:
                    clauses["schedule"] = self.lower(clause)
                case _:
                    clauses["action"] = self.lower(clause)
        return ir.Rule(selector=self.lower(selector), optional=optional, **clauses, span=self._span(tree))

    # --- clauses and actions

    def _anchored(self, tree: Any) -> ir.Every:
        anchor = "end" if tree.data == "every_from_end" else "compute"
        return ir.Every(interval=self.lower(tree.children[0]), anchor=anchor, span=self._span(tree))

    def _mask_by_site(self, tree: Any) -> ir.Mask:
        return ir.Mask(mask=self.lower(tree.children[0]), by_site=True, span=self._span(tree))

    def _bound(self, tree: Any) -> ir.Bound:
        count, scope = tree.children
        return ir.Bound(
            count=self.lower(count), scope="all" if scope.data == "in_all" else "row", span=self._span(tree)
        )

    def _reuse(self, tree: Any) -> ir.Reuse:
        form = str(tree.children[0]) if tree.children else ""
        return ir.Reuse(residual=form == "residual", mean=form == "mean", span=self._span(tree))

    def _method(self, tree: Any) -> ir.Predict | ir.ApproximateUncond:
        name, *rest = tree.children
        arguments = tuple(self.lower(child) for group in rest if is_tree(group) for child in group.children)
        if tree.data == "approximate_uncond":
            return ir.ApproximateUncond(method=str(name), arguments=arguments, span=self._span(tree))
        residual = any(not is_tree(child) for child in rest)
        return ir.Predict(predictor=str(name), arguments=arguments, residual=residual, span=self._span(tree))

    def _argument_of(self, tree: Any) -> ir.Argument:
        return ir.Argument(label="of", value=self.lower(tree.children[0]), span=self._span(tree))

    # --- selectors and expressions

    def _blocks(self, tree: Any) -> ir.Blocks:
        fields: dict[str, Any] = {}
        for child in tree.children:
            if child == "each":
                fields["each"] = True
            elif not is_tree(child):
                fields["of"] = quoted(child)
            elif child.data == "index":
                fields["index"] = self.lower(child.children[0])
            else:
                for end in child.children:
                    fields[end.data.removeprefix("slice_")] = self.lower(end.children[0])
        return ir.Blocks(**fields, span=self._span(tree))

    def _number(self, tree: Any) -> ir.Number:
        return ir.Number(value=self._amount(tree.children[0]), span=self._span(tree))

    def _boolean(self, tree: Any) -> ir.Boolean:
        return ir.Boolean(value=tree.data == "yes", span=self._span(tree))

    def _negative(self, tree: Any) -> ir.Expression:
        operand, span = tree.children[1], self._span(tree)
        if operand.data == "number":
            return ir.Number(value=-self._amount(operand.children[0]), span=span)
        return ir.Negative(operand=self.lower(operand), span=span)

    def _call(self, tree: Any) -> ir.Call:
        name, *rest = tree.children
        parts = [self.lower(child) for child in rest]
        plain = tuple(part for part in parts if not isinstance(part, ir.Argument))
        labelled = tuple(part for part in parts if isinstance(part, ir.Argument))
        if name == "cross" and plain and isinstance(plain[0], ir.Name):
            plain = (ir.Text(value=plain[0].name, span=plain[0].span), *plain[1:])
        return ir.Call(function=str(name), arguments=plain, labelled=labelled, span=self._span(tree))

    def _probe(self, tree: Any) -> ir.Probe:
        stream, selector, *rest = tree.children
        argument = next((quoted(child) for child in rest if not is_tree(child)), None)
        tokens = next((self._tokens(child) for child in rest if is_tree(child)), None)
        return ir.Probe(
            stream=str(stream),  # pyright: ignore[reportArgumentType]
            selector=self.lower(selector),
            argument=argument,
            tokens=tokens,
            span=self._span(tree),
        )

    def _tokens(self, tree: Any) -> ir.Tokens:
        ends = dict[str, Any]()
        for child in tree.children:
            if is_tree(child):
                ends[child.data.removeprefix("slice_")] = self.lower(child.children[0])
            elif quoted(child) == "latent":
                ends["latent"] = True
            else:
                message = f'the tokens of a probe are `a:b` or `"latent"`, not `{child}`'
                self.findings.append(self.source.finding("E001", message, child.start_pos, child.end_pos))
        return ir.Tokens(**ends, span=self._span(tree))

    def _compared(self, tree: Any) -> ir.Comparison:
        values = [self.lower(child) for child in tree.children]
        return ir.Comparison(operators=tuple(values[1::2]), operands=tuple(values[::2]), span=self._span(tree))

    def _interval(self, tree: Any) -> ir.Interval:
        opening, low, high, closing = map(self.lower, tree.children)
        closed = {"low_closed": opening == "[", "high_closed": closing == "]"}
        return ir.Interval(low=low, high=high, **closed, span=self._span(tree))

    # --- tokens

    def _amount(self, token: Any) -> int | float:
        """Returns the number of a token. A number that is too large is reported, and 0 is returned."""
        if token == "inf":
            return math.inf
        if token.isdecimal():
            if len(token) <= 16 and int(token) <= NUMBER_LIMIT:
                return int(token)
        elif math.isfinite(value := float(token)):
            return value
        shown = token if len(token) <= 24 else f"{token[:20]}..."
        help = f"whole numbers go up to {NUMBER_LIMIT}, others to 1e308"
        message = f"the number `{shown}` is too large"
        self.findings.append(self.source.finding("E016", message, token.start_pos, token.end_pos, help=help))
        return 0

    def _span(self, tree: Any) -> Span | None:
        return self.source.span(tree.meta.start_pos, tree.meta.end_pos)


_SCHEDULES = frozenset({"every", "every_offset", "every_from_end", "every_since_compute", "on", "mask", "mask_by_site"})

_NODES: Mapping[str, tuple[Any, ...]] = {
    "let": (ir.Let, "name", "value"),
    "table": (ir.Table, "name", "*values"),
    "signal": (ir.Signal, "name", "value"),
    "setting": (ir.Setting, "name", "value"),
    "every": (ir.Every, "interval"),
    "every_offset": (ir.Every, "interval", "offset"),
    "on": (ir.OnSteps, "steps"),
    "mask": (ir.Mask, "mask"),
    "within": (ir.Within, "selector", "inside"),
    "compute": (ir.Compute,),
    "skip": (ir.Skip,),
    "argument": (ir.Argument, "label", "value"),
    "pattern": (ir.Pattern, "regex"),
    "pattern_param": (ir.PatternParam, "name"),
    "of_kind": (ir.OfKind, "of"),
    "of_class": (ir.OfClass, "regex"),
    "any_of": (ir.AnyOf, "*selectors"),
    "all_of": (ir.AllOf, "*selectors"),
    "none_of": (ir.NoneOf, "selector"),
    "off": (ir.Off,),
    "text": (ir.Text, "value"),
    "name": (ir.Name, "name"),
    "list": (ir.ListOf, "*items"),
    "set": (ir.SetOf, "*items"),
    "arithmetic": (ir.Arithmetic, "left", "operator", "right"),
    "and_of": (ir.Both, "*operands"),
    "or_of": (ir.Either, "*operands"),
    "negated": (ir.Negation, "operand"),
    "conditional": (ir.Conditional, "then", "condition", "otherwise"),
    "member": (ir.Membership, "value", "container"),
    "lookup": (ir.Lookup, "table", "index"),
    "over": (ir.Over, "function", "value", "selector"),
}
"""Maps a rule of the grammar to the class of its node and the fields that its children set, `*` for the rest."""

# Private methods by the name of the grammar's rule: a table, so that a rule without one is a KeyError in the tests.
# pyright: reportPrivateUsage=false
_CONVERTERS: Mapping[str, Callable[[Lowering, Any], Any]] = {
    "param": Lowering._param,
    "constant": Lowering._constant,
    "external": Lowering._external,
    "rule": Lowering._rule,
    "expect": Lowering._expect,
    "use": Lowering._use,
    "preset": Lowering._preset,
    "tuned": Lowering._tuned,
    "every_from_end": Lowering._anchored,
    "every_since_compute": Lowering._anchored,
    "mask_by_site": Lowering._mask_by_site,
    "reuse": Lowering._reuse,
    "argument_of": Lowering._argument_of,
    "predict": Lowering._method,
    "approximate_uncond": Lowering._method,
    "blocks": Lowering._blocks,
    "number": Lowering._number,
    "yes": Lowering._boolean,
    "no": Lowering._boolean,
    "negative": Lowering._negative,
    "call": Lowering._call,
    "probe": Lowering._probe,
    "compared": Lowering._compared,
    "interval": Lowering._interval,
}
"""Methods for the rules of the grammar whose nodes are not a plain sequence of fields."""
