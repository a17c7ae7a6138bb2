"""Infers the types of expressions and checks that expressions fit their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from cachepolicy.errors import PolicyError, nearest, suggestion
from cachepolicy.language import ir
from cachepolicy.language.installed_predictors import how_to_get, labels_of
from cachepolicy.language.scope import ARGUMENT, CONSTANT, LET, PROBED, SIGNAL, ExpressionPlace, Report, Scope, Sort
from cachepolicy.language.traversal import inner_predictor
from cachepolicy.language.validate import WholeNumber, label_fault, positions_of
from cachepolicy.language.vocabulary import (
    ACCUMULATORS,
    CLOCK,
    COMMON_LABELS,
    FUNCTIONS,
    KEPT_LIMIT,
    MEMORIES,
    NOT_LINEAR,
    OVERS,
    PROBES,
    Label,
    Signature,
    Type,
)

_PARAM_TYPES: dict[ir.ParamType, Type] = {
    "int": "number",
    "float": "number",
    "bool": "boolean",
    "string": "text",
    "range": "range",
    "list": "list",
}
_EXAMPLES: dict[ir.ParamType, str] = {
    "int": "int = 2",
    "float": "float = 0.5",
    "bool": "bool = true",
    "string": 'string = "..."',
    "range": "range = (100, 800)",
    "list": "list = [0, 1, 2]",
}
_NAMED: dict[Type, str] = {
    "number": "a number",
    "boolean": "true or false",
    "text": "a string",
    "tensor": "a tensor",
    "list": "a list",
    "range": "a range",
    "any": "a value",
}


@dataclass
class Checker:
    """Type checker for the expressions of one policy.

    An expression with an error has the type `any`, which fits everywhere, so that one mistake gives one diagnostic.
    """

    scope: Scope
    report: Report
    source: str | None = None
    """The `source` of the policy."""
    types: dict[str, Type] = field(default_factory=dict[str, Type])
    """Types of the lets and signals that have been checked."""

    def declare(self) -> None:
        """Checks the lets and signals in dependency order."""
        for name in self.scope.clock:
            statement = self.scope.declared[name]
            if isinstance(statement, ir.Let):
                self._scalar(statement)
            elif isinstance(statement, ir.Signal):
                self._stream(statement)

    def _scalar(self, let: ir.Let) -> None:
        inferred = self.infer(let.value, LET)
        if inferred in ("list", "range"):
            help = f"`param {let.name}: {inferred} = ...` names one"
            self.report.add("E111", f"a `let` is a single value, not {_NAMED[inferred]}", let.value, help=help)
            inferred = "any"
        self.types[let.name] = inferred

    def _stream(self, signal: ir.Signal) -> None:
        inferred = self.infer(signal.value, SIGNAL)
        if inferred not in ("tensor", "number", "any"):
            self.report.add("E111", f"a signal is a tensor or a number, not {_NAMED[inferred]}", signal.value)
            inferred = "any"
        self.types[signal.name] = inferred

    def expect(self, node: ir.Expression, wanted: Type, context: ExpressionPlace, subject: str | None = None) -> None:
        """Checks that `node` has the type `wanted`. `subject` names the value in the message."""
        self._fits(node, self.infer(node, context), wanted, subject or context.called)

    def _fits(self, node: ir.Expression, inferred: Type, wanted: Type, subject: str) -> None:
        """Reports an expression whose type is not `wanted`."""
        if "any" in (inferred, wanted) or inferred == wanted:
            return
        help = None
        if inferred == "tensor":
            help = "take a norm of it: `l1(x)`, `relative_l1(x, y)`"
        elif inferred == "number" and wanted == "tensor":
            help = "norms compare tensors; for numbers write `abs(x - y)`"
        elif inferred == "number" and wanted == "boolean":
            help = "compare it with something: `x > 0`"
        message = f"{subject} takes {_NAMED[wanted]}, not {_NAMED[inferred]}"
        self.report.add("E111", message, node, help=help)

    def count(self, count: WholeNumber) -> None:
        """Checks a whole number, or `off` where that is allowed."""
        node = count.value
        if count.off and isinstance(node, ir.Off):
            return
        if isinstance(node, ir.Name) and self.scope.sort(node.name) is None:
            self.unknown(node, node.name, count.context.knows, type_="int")
            return
        param = self.scope.param(node.name) if isinstance(node, ir.Name) else None
        if param is None or not (count.off and param.optional):
            self.expect(node, "number", count.context, count.name)
        if param is not None and param.type != "int" and (param.type == "float" or param.optional):
            message = f"{count.name} takes a whole number, and `{param.name}` is a `{param.type}`"
            self.report.add("E111", message, node)
        message = count.fault() if isinstance(node, ir.Number) else None
        if message is not None:
            self.report.add("E124", message, node)

    def infer(self, node: ir.Expression, context: ExpressionPlace) -> Type:
        """Infers the type of `node` and reports errors in it. The type of an invalid node is `any`."""
        match node:
            case ir.Number():
                return "number"
            case ir.Boolean():
                return "boolean"
            case ir.Text():
                return "text"
            case ir.Off():
                self.off(node, "`off`")
                return "any"
            case ir.Name():
                return self._named(node, context)
            case ir.Lookup():
                return self._looked_up(node, context)
            case ir.ListOf():
                self._alike(node.items, context, "a list")
                return "list"
            case ir.Negative():
                self.expect(node.operand, "number", context, "`-`")
                return "number"
            case ir.Arithmetic():
                return self._calculated(node, context)
            case ir.Comparison():
                return self._compared(node, context)
            case ir.Both() | ir.Either():
                for operand in node.operands:
                    self.expect(operand, "boolean", context, f"`{node.kind}`")
                return "boolean"
            case ir.Negation():
                self.expect(node.operand, "boolean", context, "`not`")
                return "boolean"
            case ir.Conditional():
                self.expect(node.condition, "boolean", context, "`if`")
                return self._alike((node.then, node.otherwise), context, "`if ... else`")
            case ir.Interval():
                self.interval(node, context)
                return "range"
            case ir.SetOf():
                self._alike(node.items, context, "a set")
                return "any"
            case ir.Membership():
                return self._contained(node, context)
            case ir.Call():
                return self._called(node, context)
            case ir.Probe():
                return self._probed(node, context)
            case ir.Over():
                return self._taken_over(node, context)
            case _:
                assert_never(node)

    # --- names

    def off(self, node: ir.Node, subject: str) -> None:
        """Reports a value that is or may be `off`."""
        help = "`off` is valid only by itself after `every`, `on`, `mask`, `at most` and `in`"
        self.report.add("E120", f"{subject} has no meaning here", node, help=help)

    def _named(self, node: ir.Name, context: ExpressionPlace) -> Type:
        name, sort = node.name, self.scope.sort(node.name)
        if sort is None:
            self.unknown(node, name, context.knows)
            return "any"
        if sort == "unknown" or self.forbidden(node, name, sort, context):
            return "any"
        if sort == "table":
            self.report.add("E110", f"`{name}` is a table", node, help=f"write `{name}[step]`")
            return "any"
        if sort == "function":
            self.report.add("E110", f"`{name}` is a function", node, help=f"write `{name}(...)`")
            return "any"
        if sort == "clock word":
            return CLOCK[name]
        if sort == "external":
            return "number"
        param = self.scope.param(name)
        if param is None:
            return self.types.get(name, "any")
        if param.optional:
            self.off(node, f"`{name}`, which may be off,")
            return "any"
        return _PARAM_TYPES[param.type]

    def unknown(
        self,
        node: ir.Node,
        name: str,
        sorts: frozenset[Sort],
        *words: str,
        help: str | None = None,
        type_: ir.ParamType = "float",
    ) -> None:
        """Reports an undeclared name once. `type_` is the type of a parameter that would fit."""
        help = help or self.scope.near(name, sorts, *words, "true", "false", "off", "inf")
        if help is None and "parameter" in sorts:
            help = f"declare it: `param {name}: {_EXAMPLES[type_]}`"
        self.report.add("E101", f"the name `{name}` is not declared", node, help=help, word=name, once=name)

    def forbidden(self, node: ir.Node, name: str, sort: Sort, context: ExpressionPlace) -> bool:
        """Returns whether a name of this sort is forbidden in this position, and reports it."""
        if sort == "function":
            return False
        if sort in context.knows:
            late = sorted(self.scope.clock.get(name, ())) if "clock word" not in context.knows else []
            if not late:
                return False
            message = f"{context.called} {context.refusal}, and `{name}` reads the clock (`{late[0]}`)"
            self.report.add("E113", message, node, word=name)
        elif sort == "external" and context.called != "an action's constant":
            message = f"`{name}` is an external, which {context.called} cannot read"
            help = "read it after `while` or in the arguments of an action"
            self.report.add("E116", message, node, help=help, word=name)
        elif context.called.startswith("an action's"):
            message = f"{context.called} {context.refusal}, and `{name}` is a {sort}"
            self.report.add("E121", message, node, word=name)
        else:
            help = (
                "conditions on signals stand after `while`" if sort == "signal" and context.called == "`when`" else None
            )
            message = f"{context.called} {context.refusal}, and `{name}` is a {sort}"
            self.report.add("E113", message, node, help=help, word=name)
        return True

    def _looked_up(self, node: ir.Lookup, context: ExpressionPlace) -> Type:
        param = self.scope.param(node.table)
        sort = "table" if param is not None and param.type == "list" else self.scope.sort(node.table)
        if sort is None:
            self.unknown(node, node.table, frozenset({"table"}))
        elif sort not in ("table", "unknown"):
            help = "a `table` or a `list` parameter of numbers can be looked up"
            self.report.add("E110", f"`{node.table}` is a {sort}, not a table", node, help=help, word=node.table)
        elif sort == "table":
            self.forbidden(node, node.table, sort, context)
        self.expect(node.index, "number", context, f"`{node.table}[...]`")
        return "number"

    # --- operators

    def _calculated(self, node: ir.Arithmetic, context: ExpressionPlace) -> Type:
        """Checks arithmetic of numbers, the sum and difference of tensors, and a number times a tensor."""
        sides = (node.left, node.right)
        inferred: list[Type] = [self.infer(side, context) for side in sides]
        sign = f"`{node.operator}`"
        if "tensor" not in inferred or node.operator in "/%":
            for side, type_ in zip(sides, inferred, strict=True):
                self._fits(side, type_, "number", sign)
            return "number"
        found = len(self.report.findings)
        if node.operator == "*":
            other = 0 if inferred[1] == "tensor" else 1
            self._fits(sides[other], inferred[other], "number", f"{sign} with a tensor")
        else:
            for side, type_ in zip(sides, inferred, strict=True):
                self._fits(side, type_, "tensor", f"{sign} with a tensor")
        return "tensor" if len(self.report.findings) == found else "any"

    def _taken_over(self, node: ir.Over, context: ExpressionPlace) -> Type:
        wanted = OVERS.get(node.function)
        if wanted is None:
            message = f"there is no `{node.function}(x over S)`"
            help = suggestion(node.function, list(OVERS))
            self.report.add("E105", message, node, help=help, word=node.function)
            return "any"
        if not context.memory:
            message = f"`over` is valid in `signal` and `while` only, and {context.called} {context.refusal}"
            self.report.add("E115", message, node, word="over")
            return "any"
        self.expect(node.value, wanted, replace(context, called="memory", accumulators=False), f"`{node.function}`")
        return wanted

    def _compared(self, node: ir.Comparison, context: ExpressionPlace) -> Type:
        self._one_way(node)
        if "==" in node.operators or "!=" in node.operators:
            self._alike(node.operands, context, f"`{node.operators[0]}`")
        else:
            for operand in node.operands:
                self.expect(operand, "number", context, f"`{node.operators[0]}`")
        return "boolean"

    def _one_way(self, node: ir.Comparison) -> None:
        operators = set(node.operators)
        if len(node.operators) > 1 and not (operators <= {"<", "<="} or operators <= {">", ">="}):
            help = "a chain runs one way: `100 < t < 800`; join others with `and`"
            shown = " and ".join(f"`{operator}`" for operator in dict.fromkeys(node.operators))
            message = f"{shown} cannot stand in one chain" if len(operators) > 1 else f"{shown} cannot be chained"
            self.report.add("E112", message, node, help=help)

    def _alike(self, nodes: Sequence[ir.Expression], context: ExpressionPlace, subject: str) -> Type:
        """Checks that the values have one common type: number, boolean or string."""
        if any(isinstance(node, ir.Name) and node.name == "branch" for node in nodes):
            self._branch_names(nodes)
        inferred: list[Type] = [self.infer(node, context) for node in nodes]
        known: list[Type] = [type_ for type_ in inferred if type_ != "any"]
        first: Type = known[0] if known else "any"
        for node, type_ in zip(nodes, inferred, strict=True):
            if type_ not in ("any", "number", "boolean", "text"):
                help = "take a norm of it: `l1(x)`, `relative_l1(x, y)`" if type_ == "tensor" else None
                self.report.add("E111", f"{subject} takes single values, not {_NAMED[type_]}", node, help=help)
                return "any"
            if "any" not in (type_, first) and type_ != first:
                self.report.add("E111", f"{subject} takes {_NAMED[first]} here, not {_NAMED[type_]}", node)
                return "any"
        return first

    def _branch_names(self, nodes: Sequence[ir.Expression]) -> None:
        for node in nodes:
            if isinstance(node, ir.Name) and self.scope.sort(node.name) is None:
                help = f'the name of a branch is a string: `"{node.name}"`'
                self.unknown(node, node.name, frozenset(), help=help)

    def interval(self, node: ir.Interval, context: ExpressionPlace) -> None:
        """Checks the ends of an interval."""
        self.expect(node.low, "number", context, "an interval")
        self.expect(node.high, "number", context, "an interval")
        if isinstance(node.low, ir.Number) and isinstance(node.high, ir.Number):
            low, high = node.low.value, node.high.value
            if low > high or (low == high and not (node.low_closed and node.high_closed)):
                self.report.add(
                    "E124", f"nothing lies between {low} and {high}", node, help="the lower end stands first"
                )

    def _contained(self, node: ir.Membership, context: ExpressionPlace) -> Type:
        container = node.container
        match container:
            case ir.Name():
                self._container(container, context)
                if self.infer(node.value, context) not in ("number", "text", "any"):
                    self.report.add("E111", "`in` takes a number or a string", node.value)
            case ir.Interval():
                self.expect(node.value, "number", context, "`in` an interval")
                self.interval(container, context)
            case ir.SetOf():
                self._alike((node.value, *container.items), context, "`in` a set")
            case ir.ListOf() | ir.Off():
                # Only parameters in place put these here; no text says them.
                self.infer(node.value, context)
            case _:
                assert_never(container)
        return "boolean"

    def _container(self, node: ir.Name, context: ExpressionPlace) -> None:
        sort = self.scope.sort(node.name)
        param = self.scope.param(node.name)
        if sort is None:
            self.unknown(node, node.name, frozenset({"parameter"}), type_="range")
        elif sort == "unknown" or self.forbidden(node, node.name, sort, context):
            pass
        elif param is None or param.type not in ("range", "list"):
            actual = f"`{param.type}` parameter" if param else sort
            message = f"`in` takes an interval, a set, or a `range` or `list` parameter; `{node.name}` is a {actual}"
            self.report.add("E110", message, node)

    # --- calls

    def _called(self, node: ir.Call, context: ExpressionPlace) -> Type:
        signature = FUNCTIONS.get(node.function)
        if signature is None:
            self._no_function(node)
            return "any"
        if node.function in (*MEMORIES, "cross") and not context.memory:
            message = f"`{node.function}` is valid in `signal` and `while` only, and {context.called} {context.refusal}"
            self.report.add("E115", message, node, word=node.function)
            return "any"
        if node.function in ACCUMULATORS and not context.accumulators:
            help = "accumulators belong to a rule: write them after `while`" if context.probes else None
            message = (
                f"`{node.function}` is valid in `while` only"
                if context.called != "memory"
                else (f"`{node.function}` belongs to the rule, so that `prev` and `kept` cannot read it")
            )
            self.report.add("E115", message, node, word=node.function, help=help)
            return "any"
        if not self._counted(node, signature):
            return "any" if node.function in MEMORIES else signature.gives
        self.check_labels(node, node.function, node.labelled, signature.labels, context)
        if node.function in MEMORIES:
            return self._remembered(node, context)
        if node.function == "cross":
            return self._crossed(node, context)
        takes = signature.takes + signature.takes[-1:] * (len(node.arguments) - len(signature.takes))
        for argument, wanted in zip(node.arguments, takes, strict=False):
            if isinstance(argument, ir.ListOf) and wanted == "list":
                for item in argument.items:
                    self.expect(item, "number", context, f"the list of `{node.function}`")
            else:
                self.expect(argument, wanted, context, f"`{node.function}`")
        return signature.gives

    def _no_function(self, node: ir.Call) -> None:
        name, sort = node.function, self.scope.sort(node.function)
        near = nearest(name, [*FUNCTIONS, *PROBES])
        help = f"did you mean `{near}`?" if near else None
        help = f"write `{name}(x over S)`" if name in OVERS else help
        if sort is not None and sort != "unknown":
            message = f"`{name}` is a {sort}, not a function"
            help = f"write `{name}[step]`" if sort == "table" else help
        else:
            message = f"there is no function `{name}`"
        self.report.add("E105", message, node, help=help, word=name, once=name)

    def _counted(self, node: ir.Call, signature: Signature) -> bool:
        least, most = signature.least, len(signature.takes)
        count = len(node.arguments)
        if least <= count and (count <= most or signature.more):
            return True
        wanted = f"at least {least}" if signature.more else f"{least}" if least == most else f"{least} to {most}"
        plural = "" if wanted == "1" else "s"
        self.report.add("E106", f"`{node.function}` takes {wanted} argument{plural}, not {count}", node)
        return False

    def check_predictor(self, node: ir.Node, name: str, arguments: Sequence[ir.Argument]) -> None:
        """Checks the name and the arguments of a predictor."""
        try:
            labels = labels_of(name)
        except PolicyError as error:
            for finding in error.diagnostics:
                self.report.adopt(finding, node)
            return
        if labels is None:
            help = how_to_get(name, self.source)
            self.report.add("E107", f"there is no predictor `{name}`", node, help=help, word=name)
        else:
            self.check_labels(node, name, arguments, labels, ARGUMENT)

    def check_labels(
        self,
        node: ir.Node,
        name: str,
        arguments: Sequence[ir.Argument],
        labels: Mapping[str, Label],
        context: ExpressionPlace,
    ) -> None:
        """Checks the labelled arguments of a function or of the method of an action.

        Args:
            node: The call or the action.
            name: The name of the function or method.
            arguments: Its labelled arguments.
            labels: The arguments that it has.
            context: The position of those that may depend on the clock.
        """
        given = set[str]()
        for argument in arguments:
            label = labels.get(argument.label)
            if label is None:
                help = suggestion(argument.label, list(labels))
                message = f"`{name}` has no argument `{argument.label}`"
                self.report.add("E108", message, argument, help=help, word=argument.label)
            elif argument.label in given:
                self.report.add("E108", f"`{argument.label}` is given twice", argument, word=argument.label)
            else:
                self._labelled(argument, label, CONSTANT if label.constant else context)
            given.add(argument.label)
        required = [word for word, label in labels.items() if label.required]
        missing = [word for word in required if word not in given]
        if missing and given <= set(labels):
            shown = ", ".join([*["..."] * isinstance(node, ir.Call), *(f"{word}: ..." for word in required)])
            message = f"`{name}` needs " + " and ".join(f"`{word}`" for word in missing)
            self.report.add("E108", message, node, help=f"write `{name}({shown})`")

    def _labelled(self, argument: ir.Argument, label: Label, context: ExpressionPlace) -> None:
        value = argument.value
        if label.type == "predictor":
            self._inner(argument)
            return
        self.expect(value, label.type, PROBED if label.type == "tensor" else context, f"`{argument.label}`")
        for item in value.items if label.items is not None and isinstance(value, ir.ListOf) else ():
            if isinstance(item, ir.Text | ir.Boolean):  # the items are of one type, or that is reported already
                self._fits(item, self.infer(item, context), "number", f"`{argument.label}`")
                break
        if label.choices and isinstance(value, ir.Text) and value.value not in label.choices:
            help = "one of " + ", ".join(f'`"{choice}"`' for choice in label.choices)
            self.report.add("E124", f"`{argument.label}` cannot be `{value.value}`", value, help=help)
        message = label_fault(argument, label)
        if message is not None:
            self.report.add("E124", message, value)

    def _inner(self, argument: ir.Argument) -> None:
        """Checks a predictor of one band."""
        value = argument.value
        inner = inner_predictor(value)
        if inner is None or inner.predictor in NOT_LINEAR or inner.predictor == "chebyshev":
            message = f"`{argument.label}` takes a linear predictor other than `chebyshev`"
            help = f"write `{argument.label}: taylor(order: 1)`, or another one"
            self.report.add("E111", message, value, help=help)
            return
        self.check_predictor(value, inner.predictor, inner.arguments)
        for given in inner.arguments:
            if given.label in COMMON_LABELS:
                message = f"`{given.label}` is an argument of `band`, for both bands"
                self.report.add("E108", message, given, word=given.label)

    def _remembered(self, node: ir.Call, context: ExpressionPlace) -> Type:
        inner = ExpressionPlace("memory", context.knows, memory=True, probes=context.probes)
        inferred: Type = self.infer(node.arguments[0], inner)
        if inferred not in ("number", "tensor", "any"):
            message = f"`{node.function}` takes a tensor or a number, not {_NAMED[inferred]}"
            self.report.add("E111", message, node.arguments[0])
            inferred = "any"
        for back in node.arguments[1:]:
            whole = isinstance(back, ir.Number) and isinstance(back.value, int) and 1 <= back.value <= KEPT_LIMIT
            if not whole:
                message = f"the second argument of `kept` is a whole number from 1 to {KEPT_LIMIT}"
                self.report.add("E124", message, back, help="`kept(x, 2)` is the compute before the last")
        return inferred

    def _crossed(self, node: ir.Call, context: ExpressionPlace) -> Type:
        branch, value = node.arguments
        if not isinstance(branch, ir.Text):
            help = "`cross(cond, x)` is x on the branch `cond`"
            self.report.add("E111", "the first argument of `cross` is the name of a branch", branch, help=help)
        inferred = self.infer(value, replace(context, called="memory", accumulators=False))
        if inferred not in ("number", "tensor", "any"):
            self.report.add("E111", f"`cross` takes a tensor or a number, not {_NAMED[inferred]}", value)
            return "any"
        return inferred

    def _probed(self, node: ir.Probe, context: ExpressionPlace) -> Type:
        if not context.probes:
            help = f"write `signal NAME = {node.stream}(...)` and read NAME after `while`"
            self.report.add("E114", f"`{node.stream}(...)` is valid in `signal` only", node, help=help)
        if node.stream == "argument" and node.argument is None:
            help = '`argument(model, "temb")` is the argument `temb` of the model\'s forward'
            self.report.add("E106", "`argument` takes a selector and the name of the argument", node, help=help)
        elif node.stream != "argument" and node.argument is not None:
            help = "`argument(S, NAME)` reads an argument by its name"
            self.report.add("E106", f"`{node.stream}` takes a selector alone", node, help=help)
        if node.tokens is not None:
            for end in positions_of(node.tokens):
                self.count(end)
        return "tensor" if context.probes else "any"
