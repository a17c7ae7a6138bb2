"""Evaluates expressions. Evaluation is pure and does not use `eval`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from cachepolicy.errors import counted
from cachepolicy.language import ir
from cachepolicy.language.vocabulary import ACCUMULATORS, MEMORIES

Value = int | float | bool | str | tuple["Value", ...] | ir.Interval | None


class Undefined(Exception):
    """Raised when a number that an expression reads is missing or not finite. `args[0]` names the number."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The values that an expression reads.

    Attributes:
        names: Values of clock words, signals and externals by name. `None` means that the value is not known.
        tables: Values of tables by name.
        stateful: Current values of calls that are computed elsewhere: accumulators, `prev`, `kept`, norms, `x over S`.
    """

    names: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tables: Mapping[str, Sequence[int | float]] = field(default_factory=dict[str, Sequence[int | float]])
    stateful: Mapping[ir.Expression, float | bool] = field(default_factory=dict[ir.Expression, "float | bool"])


EMPTY = Environment()


def evaluate(expression: ir.Expression, environment: Environment = EMPTY) -> Any:
    """Evaluates an expression.

    All operands are read, so that one undefined number makes the whole expression undefined. Of `a if c else b`, only
    the selected side is read.

    Args:
        expression: The expression.
        environment: The values of its names.

    Returns:
        A number, a boolean, a string, a tuple for a list or set, an `ir.Interval`, or `None` for `off`.

    Raises:
        Undefined: A number that the expression reads is missing, NaN or infinite, or an operation has no finite result.
    """
    # The cases are tried in order, so the most frequent ones stand first.
    match expression:
        case ir.Name():
            return _named(expression.name, environment)
        case ir.Number() | ir.Boolean() | ir.Text():
            return expression.value
        case ir.Comparison():
            return _compared(expression, environment)
        case ir.Arithmetic():
            return _arithmetic(expression, environment)
        case ir.Call():
            return _called(expression, environment)
        case ir.Off():
            return None
        case ir.Lookup():
            return _looked_up(expression, environment)
        case ir.ListOf() | ir.SetOf():
            return tuple(evaluate(item, environment) for item in expression.items)
        case ir.Negative():
            return -evaluate(expression.operand, environment)
        case ir.Both():
            return all([evaluate(operand, environment) for operand in expression.operands])
        case ir.Either():
            return any([evaluate(operand, environment) for operand in expression.operands])
        case ir.Negation():
            return not evaluate(expression.operand, environment)
        case ir.Conditional():
            chosen = evaluate(expression.condition, environment)
            return evaluate(expression.then if chosen else expression.otherwise, environment)
        case ir.Interval():
            return expression
        case ir.Membership():
            return _contained(expression, environment)
        case ir.Over():
            if expression not in environment.stateful:
                raise Undefined(f"`{expression.function}(... over ...)` reads what a run measures")
            return finite(environment.stateful[expression], f"`{expression.function}(... over ...)`")
        case ir.Probe():
            raise Undefined(f"`{expression.stream}(...)` is a tensor, not a number")
        case _:
            assert_never(expression)


def constant(expression: ir.Expression) -> Value:
    """Evaluates an expression without names, such as the default of a parameter.

    Raises:
        Undefined: The expression reads a name.
    """
    return evaluate(expression)


def finite(value: float, name: str) -> float:
    """Returns a number.

    Raises:
        Undefined: The number is not finite. `name` says what it is.
    """
    if not math.isfinite(value):
        raise Undefined(f"{name} is {value}")
    return value


def _named(name: str, environment: Environment) -> Any:
    value = environment.names.get(name)
    if value is None:
        raise Undefined(f"`{name}` is not known here")
    if isinstance(value, float):
        return finite(value, f"`{name}`")
    return value


def reads_steps(node: ir.Node) -> bool:
    """Returns True for a lookup whose index is `step`, which is scaled to the number of steps."""
    return isinstance(node, ir.Lookup) and node.index == _STEP


_STEP = ir.Name(name="step")


def _looked_up(expression: ir.Lookup, environment: Environment) -> float:
    """Looks up a value of a table.

    The index `step` reads the entry at round(step * (len - 1) / (steps - 1)), so that a table fits a run with another
    number of steps. Other indices count from the start of the table.
    """
    values = environment.tables.get(expression.table)
    if values is None:
        raise Undefined(f"table `{expression.table}` is not known here")
    index = evaluate(expression.index, environment)
    steps = environment.names.get("steps") if reads_steps(expression) else None
    return entry_of(expression.table, values, index, steps)


def entry_of(table: str, values: Sequence[float], index: float, steps: int | None) -> float:
    """Returns an entry of a table.

    Args:
        table: The name of the table.
        values: Its values.
        index: The index of the entry.
        steps: The number of steps of the run if `index` is its step and the table is stretched over it, else None.

    Raises:
        Undefined: The table has no such entry.
    """
    if steps is not None:
        # Half goes up: Python's round() would send it to the even neighbour.
        index = math.floor(index * (len(values) - 1) / (steps - 1) + 0.5) if steps > 1 else 0
    if index != int(index) or not 0 <= index < len(values):
        raise Undefined(f"`{table}[{index}]` is outside its {counted(len(values), 'value')}")
    return values[int(index)]


def _arithmetic(expression: ir.Arithmetic, environment: Environment) -> float:
    left, right = evaluate(expression.left, environment), evaluate(expression.right, environment)
    function, name = ARITHMETIC[expression.operator]
    try:
        return finite(function(left, right), name)
    except (ZeroDivisionError, OverflowError) as error:
        raise Undefined(f"`{expression.operator}` has no finite result") from error


ARITHMETIC: Mapping[str, tuple[Callable[[Any, Any], Any], str]] = {
    "+": (operator.add, "a sum"),
    "-": (operator.sub, "a difference"),
    "*": (operator.mul, "a product"),
    "/": (lambda left, right: left / right, "a quotient"),
    "%": (operator.mod, "a remainder"),
}
COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def _compared(expression: ir.Comparison, environment: Environment) -> bool:
    values = [evaluate(operand, environment) for operand in expression.operands]
    if None in values:
        raise Undefined("a value that is compared is off")
    # A list, because a generator takes longer than the comparison, and this runs in each decision on a signal.
    return all([COMPARE[sign](*values[index : index + 2]) for index, sign in enumerate(expression.operators)])


def _contained(expression: ir.Membership, environment: Environment) -> bool:
    value = evaluate(expression.value, environment)
    container = evaluate(expression.container, environment)
    if container is None:
        return False
    if isinstance(container, ir.Interval):
        low, high = evaluate(container.low, environment), evaluate(container.high, environment)
        above = low <= value if container.low_closed else low < value
        below = value <= high if container.high_closed else value < high
        return above and below
    return value in container


def _called(expression: ir.Call, environment: Environment) -> float:
    name = expression.function
    if environment.stateful and expression in environment.stateful:
        return finite(environment.stateful[expression], f"`{name}(...)`")
    if name in ACCUMULATORS or name in MEMORIES or name == "cross":
        raise Undefined(f"`{name}(...)` has no value yet")
    arguments = [evaluate(argument, environment) for argument in expression.arguments]
    try:
        return finite(FUNCTIONS[name](*arguments), f"`{name}(...)`")
    except KeyError as error:
        raise Undefined(f"`{name}(...)` reads tensors") from error
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise Undefined(f"`{name}(...)` has no finite result") from error


def _poly(coefficients: Sequence[float], x: float) -> float:
    """Evaluates a polynomial by Horner's rule. The first coefficient belongs to the highest power."""
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


def _clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


FUNCTIONS: Mapping[str, Any] = {
    "abs": abs,
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "clamp": _clamp,
    "floor": math.floor,
    "poly": _poly,
}
