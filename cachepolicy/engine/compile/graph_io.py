"""Inputs and outputs of compiled graphs: what a graph reads before a root call, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine import module_run
from cachepolicy.engine.actions import (
    ANSWER,
    COMPUTE,
    PENDING,
    REUSE,
    STORE,
    Slot,
    mean_of_halves,
    overwritten,
    push,
    slot_history,
    spoil,
)
from cachepolicy.engine.block_chain import Chain, ChainEntry
from cachepolicy.engine.compile.graph_ops import Answer, OutputPlace, Part
from cachepolicy.engine.history_packing import leaves
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import Keeping, feedback, is_mean, reach
from cachepolicy.planning.predictors import Weights
from cachepolicy.planning.schedule import WAITING

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass


def problem(call: ForwardPass, site: int) -> str | None:
    """Return why a graph cannot answer for a site that is decided to reuse, or None."""
    decision = call.ledger.of(site)
    return lacking(call, site, decision.action) if decision.verdict == "reuse" else None


def lacking(call: ForwardPass, site: int, action: ir.Action | None) -> str | None:
    """Return why a graph could not answer for the site if it reused, or None."""
    if isinstance(action, ir.ApproximateUncond):
        return None
    slot, keeping = call.slots[site], call.context.execution.keepings[site]
    if keeping.streams:
        chain = slot.chain
        if isinstance(action, ir.Skip):
            # What a skipped block returns does not depend on the trajectory or the branch.
            return None if (chain is not None and chain.links) or site in call.owner.graphs.forms else Fact.UNKNOWN_FORM
        if chain is not None and chain.history and chain.autocast not in {None, autocast()}:
            return Fact.MISFIT
        residual = isinstance(action, ir.Reuse | ir.Predict) and action.residual
        if chain is None or not chain.holds(residual=residual):
            return slot.storing.lacking
        return call.context.excess(site, action)
    if slot.output is None:
        return slot.storing.lacking
    if not slot.clones and overwritten(slot):
        spoil(slot)
        return Fact.OVERWRITTEN
    return call.context.excess(site, action)


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
    part.form = call.owner.graphs.forms.get(site) if keeping.streams else None
    part.calls = [OutputPlace() for _ in range(len(part.form.links) if part.form is not None else 1)]
    segments = part.form.segments if part.form is not None else 1
    part.places, part.bases = [OutputPlace() for _ in range(segments)], [OutputPlace() for _ in range(segments)]
    fill(call, site, part, refused=False)
    return part


def fill(call: ForwardPass, site: int, part: Part, *, refused: bool) -> None:
    """Set the code of a site, and its history if the site answers.

    Args:
        call: The call.
        site: The site number.
        part: What the graph reads. It is changed.
        refused: Whether the site has to compute although it is decided to reuse.
    """
    decision, keeping, slot = call.ledger.of(site), call.context.execution.keepings[site], call.slots[site]
    action = decision.action
    if decision is WAITING or (keeping.streams and part.form is None):
        part.code = PENDING
    elif refused or decision.verdict != "reuse" or action is None or isinstance(action, ir.ApproximateUncond):
        part.code = STORE if keeping.outputs or keeping.streams else COMPUTE
    else:
        part.answer = _answer(action)
        part.code = ANSWER if keeping.streams or part.answer.predicts else REUSE
        if keeping.streams:
            _give_chain(call, site, part, slot.chain, action)
        else:
            _give(call, site, part, slot, action)


def _answer(action: ir.Action) -> Answer:
    match action:
        case ir.Reuse():
            return Answer(residual=action.residual)
        case ir.Predict(predictor="band"):
            # A graph is given the prediction itself.
            return Answer(residual=action.residual, feedback=feedback(action))
        case ir.Predict():
            return Answer(residual=action.residual, predicts=True, feedback=feedback(action))
        case _:
            return Answer(skips=isinstance(action, ir.Skip))


def _give(call: ForwardPass, site: int, part: Part, slot: Slot, action: ir.Action) -> None:
    kept = slot_history(slot, reach(action))
    first = _first(kept[0].output)
    if isinstance(action, ir.Predict) and part.answer.predicts:
        # Entries of half a batch cannot serve a full batch.
        kept = [entry for entry in kept if entry.rows.serves(call.context.rows)]
        part.weights = _weights(call, site, action, [entry.step for entry in kept], first)
    part.history = tuple(call.context.rows.cut(entry.output, entry.rows) for entry in kept)
    if isinstance(action, ir.Predict) and not part.answer.predicts:
        part.history = (module_run.prediction(call, site, action),)
    if is_mean(action):
        part.history = (mean_of_halves(slot, call.context.rows),)
    part.clones = slot.clones or call.inference
    part.square = first is not None and first.shape == slot.shape


def _first(value: Any) -> Any:
    tensors = leaves(value)
    return tensors[0] if tensors else None


def _give_chain(call: ForwardPass, site: int, part: Part, chain: Chain | None, action: ir.Action) -> None:
    if chain is None or isinstance(action, ir.Skip):
        return
    histories, numbers = list[Any](), list[Any]()
    for segment in chain.history:
        rows = call.context.rows
        entries = [entry for entry in segment[: reach(action)] if entry.rows.serves(rows)]
        columns = [
            [rows.cut(entry.at(index, residual=part.answer.residual), entry.rows) for entry in entries]
            for index in range(len(entries[0].residuals))
        ]
        if isinstance(action, ir.Predict) and not part.answer.predicts:
            steps = [entry.step for entry in entries]
            columns = [
                column
                if any(tensor is None for tensor in column)
                else [call.context.predicted(action, site, column, steps)]
                for column in columns
            ]
        histories.append(
            tuple(None if any(tensor is None for tensor in column) else tuple(column) for column in columns)
        )
        if isinstance(action, ir.Predict) and part.answer.predicts:
            kept = next((column[0] for column in histories[-1] if column is not None), None)
            numbers.append(_weights(call, site, action, [entry.step for entry in entries], kept))
    part.history, part.weights = tuple(histories), tuple(numbers)


def _weights(
    call: ForwardPass, site: int, action: ir.Predict, steps: Sequence[int], like: torch.Tensor | None
) -> Weights:
    """Return the coefficients as 0-d tensors, because constants would recompile the graph at each step."""
    numbers = call.context.weights(action, site, steps)

    def tensor(number: float) -> torch.Tensor:
        device = torch.device("cpu") if like is None else like.device
        # MPS has no float64.
        return torch.tensor(number, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    divisors = None if numbers.divisors is None else tuple(tensor(number) for number in numbers.divisors)
    newest = None if numbers.newest is None else tensor(numbers.newest)
    return Weights(divisors, tuple(tensor(number) for number in numbers.factors), newest)


# --- afterwards ------------------------------------------------------------------------------------------


def commit(call: ForwardPass, site: int, part: Part) -> None:
    """Store what a graph left in the history of the site."""
    slot, keeping = call.slots[site], call.context.execution.keepings[site]
    if keeping.streams:
        _commit_chain(call, slot, keeping, part)
        return
    output_place = part.places[0]
    if output_place.value is None:
        return
    if output_place.states is not None:
        slot.shape, slot.dtype, slot.device = torch.Size(output_place.states[0]), *output_place.states[1:]
    elif part.code is STORE:
        slot.shape = slot.dtype = slot.device = None
    push(slot, keeping, STORE, output_place.value, call.step, call.context.rows)


def _commit_chain(call: ForwardPass, slot: Slot, keeping: Keeping, part: Part) -> None:
    if part.unfit and slot.chain is not None:
        # The span computed inside the graph without storing its result.
        slot.chain.links, slot.chain.history = {}, []
    form, left = part.form, [output_place.value for output_place in part.places]
    if form is None or part.unfit or any(value is None for value in left):
        return
    chain = slot.chain = slot.chain or Chain(slot.storing)
    fresh = [ChainEntry(residuals, outputs, call.step, call.context.rows) for residuals, outputs in left]
    old: list[list[ChainEntry]] = chain.history if len(chain.history) == len(fresh) else [[] for _ in fresh]
    chain.put(fresh, old, keeping.depth)
    chain.links = dict(enumerate(form.links))
    chain.endings = {position: ending for position, ending in enumerate(form.endings) if ending is not None}
    chain.signature, chain.autocast = None, autocast()
