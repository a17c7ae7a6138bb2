"""One site that is a single module in one root call: whether its history can answer, and the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachepolicy.engine.actions import (
    ANSWER,
    COMPUTE,
    Op,
    hidden_states,
    keep,
    push,
    reused,
    unfit,
)
from cachepolicy.engine.answers import output_of, outputs_read
from cachepolicy.engine.block_chain import Names
from cachepolicy.engine.distributed.groups import is_initialized
from cachepolicy.engine.finite import is_finite
from cachepolicy.engine.hooks import SiteHandle
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import feedback, is_mean

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass


def operation(call: ForwardPass, site: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
    """Return what a single-module site does: `ANSWER`, or how it computes."""
    index = site.index
    if index < 0 or call.context.execution.keepings[index].streams:
        return COMPUTE  # the history of a site with streams is its chain in `members`
    store = call.store if call.context.wanted(index).outputs else COMPUTE
    if call.ledger.resolve(index, problem(call, site, {}, args, kwargs)).verdict != "reuse":
        return store
    reason = unfit(call.slots[index], hidden_states(args, kwargs), call.context.rows) or _unsound(call, index)
    if reason is None:
        return ANSWER
    call.ledger.refuse(index, reason)
    return store


def problem(
    call: ForwardPass, site: SiteHandle, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Return why a site cannot reuse, where other processes need this before the decision."""
    if not call.ledger.shared(site.index):
        return None
    action = call.ledger.action(site.index)
    if isinstance(action, ir.ApproximateUncond):
        return None
    if call.context.execution.keepings[site.index].streams:
        return call.span(site.index).problem(names, action)
    reason = unfit(call.slots[site.index], hidden_states(args, kwargs), call.context.rows)
    return reason or call.context.excess(site.index, action)


def _unsound(call: ForwardPass, site: int) -> str | None:
    """Return why the prediction of a site is not finite, or None. A checked prediction is kept for the answer."""
    action = call.ledger.resolve(site).action
    excess = call.context.excess(site, action)
    if not isinstance(action, ir.Predict):
        return excess
    if excess is not None or is_initialized():
        # With several processes, one might refuse what the others give, so values are not checked.
        return excess
    output = call.foreseen[site] = output_of(*outputs_read(call.context, site, action))
    return None if is_finite(output) else Fact.NOT_FINITE


def answered(call: ForwardPass, site: int) -> Any:
    """Return the answer of a site from its stored outputs."""
    slot, action, rows = call.slots[site], call.ledger.of(site).action, call.context.rows
    if not (isinstance(action, ir.Predict) or is_mean(action)):
        return reused(slot, rows, inference=call.inference)
    output = call.foreseen.pop(site, None)
    if output is None:
        output = output_of(*outputs_read(call.context, site, action))
    if feedback(action):
        if slot.shape is not None:
            slot.shape = rows.shape(slot.shape, slot.rows)
        push(slot, call.context.execution.keepings[site], call.store, output, call.step, rows)
    return output


def store(call: ForwardPass, site: int, code: Op, states: Any, output: Any) -> None:
    """Store a computed output. Arguments as for `actions.keep`."""
    keeping = call.context.execution.keepings[site]
    keep(call.slots[site], keeping, code, states, output, call.step, call.context.rows)
