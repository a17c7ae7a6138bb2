"""Signals lowered to closures: they give what `Measuring.value` gives, without walking the expression.

Numbers, norms, `prev` and `kept` are composed from closures, which read remembered values by slot. Other expressions
over tensors are left to the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from cachepolicy.engine.streams import SignalValue, Stream
from cachepolicy.language import ir
from cachepolicy.language.closures import Closure, Compiler
from cachepolicy.language.evaluate import Undefined, evaluate, finite
from cachepolicy.language.traversal import is_stream, walk
from cachepolicy.language.vocabulary import MEMORIES, NORMS
from cachepolicy.planning.lowered import named

if TYPE_CHECKING:
    from cachepolicy.engine.signals import Measuring, Signals

Measure = Callable[["Measuring", int], SignalValue]
"""Gives the value of an expression at a site in one forward pass."""


def lowered(signals: Signals, expression: ir.Expression) -> Measure:
    """Return the closure of an expression.

    Args:
        signals: The signals of the plan.
        expression: An expression without names of signals.
    """
    match expression:
        case ir.Probe() if not isinstance(expression.selector, ir.Itself):
            return _probed(expression)
        case ir.Call(function=function) if function in NORMS:
            return _norm(signals, expression)
        case ir.Call(function="prev"):
            return _previous(signals, expression)
        case ir.Call(function="kept") if len(expression.arguments) == 1 or _is_constant(expression.arguments[1]):
            return _kept(signals, expression)
        case _ if _is_interpreted(expression):
            return lambda measuring, site: measuring.value(expression, site)
        case _:
            return Compiler(lambda node: _leaf(signals, node), signals.tables).closure(expression)


def is_stateful(node: ir.Node) -> TypeGuard[ir.Call | ir.Over]:
    """Return True for a norm, a memory, `cross` and `over`, which a run measures or remembers."""
    return isinstance(node, ir.Over) or (isinstance(node, ir.Call) and node.function in _STATEFUL)


_STATEFUL = NORMS | MEMORIES | {"cross"}


def _is_constant(expression: ir.Expression) -> bool:
    return isinstance(expression, ir.Number)


def _is_interpreted(expression: ir.Expression) -> bool:
    """Return True for tensors, and for numbers of which one side is read only: the interpreter reads all norms."""
    if isinstance(expression, ir.Over | ir.Probe) or is_stream(expression):
        return True
    if isinstance(expression, ir.Call) and expression.function == "cross":
        return True
    return any(isinstance(node, ir.Conditional) for node in walk(expression))


def _leaf(signals: Signals, node: ir.Expression) -> Closure | None:
    """Return the closure of a number that a run measures or remembers, of a clock word, or of an external."""
    if is_stateful(node):
        measure, label = signals.measure(node), f"`{node.function}(...)`"

        def number(measuring: Measuring, site: int) -> float:
            value = measure(measuring, site)
            if isinstance(value, Stream):
                raise Undefined("a tensor stands where a number is read")
            return finite(value, label)

        return number
    if not isinstance(node, ir.Name):
        return None
    read, differs = named(node.name), signals.by_site(node)
    return lambda measuring, site: read(measuring.at(site if differs else -1), ())


def _probed(probe: ir.Probe) -> Measure:
    unseen = f"`{probe.stream}(...)` was not seen in this step"

    def probed(measuring: Measuring, site: int) -> SignalValue:
        stream = measuring.seen.get(probe)
        if stream is None:
            raise Undefined(unseen)
        measuring.require_one(probe, site)
        return stream

    return probed


def _norm(signals: Signals, call: ir.Call) -> Measure:
    arguments = [signals.measure(argument) for argument in call.arguments]

    def norm(measuring: Measuring, site: int) -> float:
        if measuring.agreement is not None:
            return measuring.agreed(call, site)
        return measuring.norm(call, [argument(measuring, site) for argument in arguments])

    return norm


def _previous(signals: Signals, call: ir.Call) -> Measure:
    slot, by_site = signals.slots[call.arguments[0]], signals.by_site(call.arguments[0])

    def previous(measuring: Measuring, site: int) -> SignalValue:
        measuring.require_one(call, site)
        return measuring.last(slot, site if by_site else -1)

    return previous


def _kept(signals: Signals, call: ir.Call) -> Measure:
    slot = signals.slots[call.arguments[0]]
    depth = 1 if len(call.arguments) == 1 else int(evaluate(call.arguments[1]))

    def kept(measuring: Measuring, site: int) -> SignalValue:
        measuring.require_one(call, site)
        values: Mapping[tuple[int, int], Sequence[SignalValue]] = measuring.past.kept
        found = values.get((slot, site), ())
        if not 0 < depth <= len(found):
            raise Undefined("`kept(...)` has no value yet")
        return found[depth - 1]

    return kept
