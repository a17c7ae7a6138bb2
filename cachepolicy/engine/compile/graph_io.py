"""Inputs and outputs of compiled graphs: what a graph reads before a root call, and what it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine.actions import ANSWER, COMPUTE, PENDING, REUSE, STORE, TensorForm, chain_of, keep, push
from cachepolicy.engine.answers import is_weighted, lacking, of_residual, operation, outputs_read, segment_read
from cachepolicy.engine.block_chain import Chain, ChainEntry
from cachepolicy.engine.compile.graph_ops import Answer, OutputPlace, Part
from cachepolicy.engine.history_packing import leaves
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import Keeping, feedback
from cachepolicy.planning.predictors import Weights

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass


def problem(call: ForwardPass, site: int, action: ir.Action | None) -> str | None:
    """Return why a graph could not answer for a site by an action, or None."""
    chain, reason = call.slots[site].chain, lacking(call.context, site, action)
    if reason is None and chain is not None and not isinstance(action, ir.Skip | ir.ApproximateUncond):
        reason = None if chain.autocast in {None, autocast()} else Fact.MISFIT
    return reason or call.context.excess(site, action)


def autocast() -> tuple[Any, ...]:
    """Return the autocast dtypes. They change the dtypes of block inputs while root inputs stay the same."""
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _AUTOCAST
    )


_AUTOCAST = ("cpu", "cuda")


def staged(call: ForwardPass, site: int) -> Part:
    """Build what a graph reads about one site at this call."""
    keeping, part = call.context.execution.keepings[site], Part()
    part.residuals, part.outputs = keeping.residuals > 0, keeping.outputs > 0
    part.form = call.owner.continuations.forms.get(site) if keeping.streams else None
    part.calls = [OutputPlace() for _ in range(len(part.form.links) if part.form is not None else 1)]
    segments = part.form.segments if part.form is not None else 1
    part.places, part.bases = [OutputPlace() for _ in range(segments)], [OutputPlace() for _ in range(segments)]
    fill(call, site, part)
    return part


def fill(call: ForwardPass, site: int, part: Part) -> None:
    """Set the code of a site, and its history if the site answers. `part` is changed."""
    keeping, action = call.context.execution.keepings[site], call.ledger.of(site).action
    store = STORE if keeping.outputs or keeping.streams else COMPUTE
    part.code = PENDING if keeping.streams and part.form is None else operation(call.ledger.of(site), store)
    if site in call.ledger.facts and part.code in {REUSE, ANSWER}:
        part.code = store
    if part.code is not REUSE and part.code is not ANSWER:
        return
    skips = isinstance(action, ir.Skip)
    part.answer = Answer(skips, of_residual(action), is_weighted(action), feedback(action))
    slot = call.slots[site]
    if not keeping.streams:
        outputs, weights = outputs_read(call.context, site, action)
        first, rows = next(iter(leaves(outputs[0])), None), call.context.rows
        part.history, part.weights = tuple(outputs), _as_tensors(weights, first)
        part.clones = slot.clones or call.inference
        part.square = first is not None and first.shape == rows.shape(slot.shape, slot.rows)
    elif slot.chain is not None and not skips:
        read = [segment_read(call.context, site, entries, action) for entries in slot.chain.history]
        part.history = tuple([tuple(columns) for columns, _ in read])
        part.weights = tuple(
            [
                _as_tensors(weights, next((column[0] for column in columns if column is not None), None))
                for columns, weights in read
            ]
        )


def _as_tensors(numbers: Weights | None, like: Any) -> Weights | None:
    """Return the weights as 0-d tensors, because constants would recompile the graph at each step."""
    if numbers is None:
        return None
    device = torch.device("cpu") if like is None else like.device
    # MPS has no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    newest = None if numbers.newest is None else torch.tensor(numbers.newest, dtype=dtype, device=device)
    divisors, factors = (
        tuple([torch.tensor(number, dtype=dtype, device=device) for number in row])
        for row in (numbers.divisors or (), numbers.factors)
    )
    return Weights(None if numbers.divisors is None else divisors, factors, newest)


# --- afterwards ------------------------------------------------------------------------------------------


def commit(call: ForwardPass, site: int, part: Part) -> None:
    """Store what a graph left in the history of the site."""
    slot, keeping = call.slots[site], call.context.execution.keepings[site]
    if keeping.streams:
        _commit_chain(call, chain_of(slot), keeping, part)
        return
    left = part.places[0]
    if left.value is None:
        return
    if left.states is None and part.code is not STORE:
        push(slot, keeping, STORE, left.value, call.step, call.context.rows)
    else:
        states = None if left.states is None else TensorForm(torch.Size(left.states[0]), *left.states[1:])
        keep(slot, keeping, STORE, states, left.value, call.step, call.context.rows)


def _commit_chain(call: ForwardPass, chain: Chain, keeping: Keeping, part: Part) -> None:
    form, left = part.form, [place.value for place in part.places]
    if part.unfit:
        # The span computed inside the graph without storing its result.
        chain.links, chain.history = {}, []
    elif form is not None and all(value is not None for value in left):
        chain.put([ChainEntry(value[0], value[1], call.step, call.context.rows) for value in left], keeping.depth)
        chain.learn(form)
        chain.signature, chain.autocast = None, autocast()
