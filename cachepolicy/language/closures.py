"""Compiles expressions to closures: Python functions that give what `evaluate` gives, without walking the expression.

`evaluate` is the reference. The closures are composed from functions of this module. No text is generated or executed.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachepolicy.language import ir
from cachepolicy.language.evaluate import ARITHMETIC, COMPARE, FUNCTIONS, Undefined, entry_of, finite, reads_steps
from cachepolicy.language.vocabulary import ACCUMULATORS, MEMORIES

Closure = Callable[[Any, Any], Any]
"""Gives the value of an expression from two arguments. What they are is up to the `Leaf`.

A closure raises `Undefined` where `evaluate` does.
"""

Leaf = Callable[[ir.Expression], Closure | None]
"""Gives the closure of a name, or of a call or `over` whose value is computed elsewhere, or None."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The value of an expression that reads nothing."""

    value: Any


Form = Constant | Closure
Compare = Callable[[Any, Any], bool]


@dataclass(frozen=True, slots=True)
class Compiler:
    """Compiles expressions.

    Attributes:
        leaf: Gives the closures of what an expression reads.
        tables: The values of tables by name.
    """

    leaf: Leaf
    tables: Mapping[str, Sequence[int | float]]

    def closure(self, expression: ir.Expression) -> Closure:
        """Returns the closure of an expression."""
        return as_closure(self.form(expression))

    def form(self, expression: ir.Expression) -> Form:
        """Returns the value of an expression that reads nothing, else its closure."""
        forms = list[Form]()
        match expression:
            case ir.Number() | ir.Boolean() | ir.Text():
                return Constant(expression.value)
            case ir.Off():
                return Constant(None)
            case ir.Interval():
                return Constant(expression)
            case ir.Name():
                return self.leaf(expression) or _undefined(f"`{expression.name}` is not known here")
            case ir.Comparison():
                forms = [self.form(operand) for operand in expression.operands]
                made = _comparison(expression.operators, forms)
            case ir.Arithmetic():
                forms = [self.form(expression.left), self.form(expression.right)]
                made = _arithmetic(expression.operator, *forms)
            case ir.Call():
                return self._call(expression)
            case ir.Lookup():
                return self._lookup(expression)
            case ir.ListOf() | ir.SetOf():
                forms = [self.form(item) for item in expression.items]
                made = _tuple(list(map(as_closure, forms)))
            case ir.Negative():
                forms = [self.form(expression.operand)]
                made = _one(operator.neg, as_closure(forms[0]))
            case ir.Negation():
                forms = [self.form(expression.operand)]
                made = _one(operator.not_, as_closure(forms[0]))
            case ir.Both() | ir.Either():
                forms = [self.form(operand) for operand in expression.operands]
                made = _several(all if isinstance(expression, ir.Both) else any, list(map(as_closure, forms)))
            case ir.Conditional():
                return _conditional(*map(self.closure, (expression.condition, expression.then, expression.otherwise)))
            case ir.Membership():
                forms, made = self._membership(expression)
            case ir.Over() | ir.Probe():
                return self.leaf(expression) or _undefined("an expression reads what a run measures")
        return _folded(forms, made)

    def _call(self, call: ir.Call) -> Form:
        leaf = self.leaf(call)
        if leaf is not None:
            return leaf
        name = call.function
        if name in ACCUMULATORS or name in MEMORIES or name == "cross":
            return _undefined(f"`{name}(...)` has no value yet")
        if name not in FUNCTIONS:
            return _undefined(f"`{name}(...)` reads tensors")
        forms = [self.form(argument) for argument in call.arguments]
        return _folded(forms, _function(name, list(map(as_closure, forms))))

    def _lookup(self, lookup: ir.Lookup) -> Closure:
        values = self.tables.get(lookup.table)
        if values is None:
            return _undefined(f"table `{lookup.table}` is not known here")
        index, name = self.closure(lookup.index), lookup.table
        steps = self.leaf(_STEPS) if reads_steps(lookup) else None

        def entry(x: Any, y: Any) -> float:
            at = index(x, y)
            length = None
            if steps is not None:
                with contextlib.suppress(Undefined):  # without it, the index counts from the start of the table
                    length = steps(x, y)
            return entry_of(name, values, at, length)

        return entry

    def _membership(self, expression: ir.Membership) -> tuple[list[Form], Closure]:
        value, container = self.form(expression.value), expression.container
        if isinstance(container, ir.Interval):
            low, high = self.form(container.low), self.form(container.high)
            above: Compare = operator.le if container.low_closed else operator.lt
            below: Compare = operator.le if container.high_closed else operator.lt
            return [value, low, high], _between(as_closure(value), as_closure(low), as_closure(high), above, below)
        form = self.form(container)
        return [value, form], _contained(as_closure(value), as_closure(form))


_STEPS = ir.Name(name="steps")


def as_closure(form: Form) -> Closure:
    """Returns the closure of a form."""
    if not isinstance(form, Constant):
        return form
    value = form.value
    return lambda _x, _y: value


def _folded(forms: Sequence[Form], made: Closure) -> Form:
    """Returns the value of a closure over constants, unless it has none."""
    if not all(isinstance(form, Constant) for form in forms):
        return made
    try:
        return Constant(made(None, None))
    except Undefined:
        return made


def _undefined(message: str) -> Closure:
    def undefined(_x: Any, _y: Any) -> Any:
        raise Undefined(message)

    return undefined


def _comparison(signs: Sequence[str], forms: Sequence[Form]) -> Closure:
    if len(forms) == 2:
        compare, left, last = COMPARE[signs[0]], as_closure(forms[0]), forms[1]
        if isinstance(last, Constant) and last.value is not None:
            right = last.value

            def with_constant(x: Any, y: Any) -> bool:
                value = left(x, y)
                if value is None:
                    raise Undefined("a value that is compared is off")
                return compare(value, right)

            return with_constant
    compares, operands = [COMPARE[sign] for sign in signs], list(map(as_closure, forms))

    def compared(x: Any, y: Any) -> bool:
        values = [operand(x, y) for operand in operands]
        if None in values:
            raise Undefined("a value that is compared is off")
        return all([compare(*values[index : index + 2]) for index, compare in enumerate(compares)])

    return compared


def _arithmetic(sign: str, one: Form, other: Form) -> Closure:
    (function, name), left, right = ARITHMETIC[sign], as_closure(one), as_closure(other)

    def computed(x: Any, y: Any) -> float:
        first, second = left(x, y), right(x, y)
        try:
            return finite(function(first, second), name)
        except (ZeroDivisionError, OverflowError) as error:
            raise Undefined(f"`{sign}` has no finite result") from error

    return computed


def _function(name: str, arguments: Sequence[Closure]) -> Closure:
    function, label = FUNCTIONS[name], f"`{name}(...)`"

    def called(x: Any, y: Any) -> float:
        values = [argument(x, y) for argument in arguments]
        try:
            return finite(function(*values), label)
        except (ValueError, OverflowError, ZeroDivisionError) as error:
            raise Undefined(f"{label} has no finite result") from error

    return called


def _one(function: Callable[[Any], Any], operand: Closure) -> Closure:
    return lambda x, y: function(operand(x, y))


def _several(function: Callable[[Sequence[Any]], bool], operands: Sequence[Closure]) -> Closure:
    # All operands are read, so that one undefined number makes the whole expression undefined.
    return lambda x, y: function([operand(x, y) for operand in operands])


def _tuple(items: Sequence[Closure]) -> Closure:
    return lambda x, y: tuple([item(x, y) for item in items])


def _conditional(condition: Closure, then: Closure, otherwise: Closure) -> Closure:
    return lambda x, y: then(x, y) if condition(x, y) else otherwise(x, y)


def _between(value: Closure, low: Closure, high: Closure, above: Compare, below: Compare) -> Closure:
    def between(x: Any, y: Any) -> bool:
        number, least, most = value(x, y), low(x, y), high(x, y)
        return above(least, number) and below(number, most)

    return between


def _contained(value: Closure, container: Closure) -> Closure:
    def contained(x: Any, y: Any) -> bool:
        number, values = value(x, y), container(x, y)
        return values is not None and number in values

    return contained
