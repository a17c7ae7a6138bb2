"""Inputs and outputs of compiled graphs: what a graph reads before a root call, and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from cachepolicy.engine.actions import (
    ANSWER,
    COMPUTE,
    PENDING,
    REUSE,
    STORE,
    Slot,
    map_tensors,
    overwritten,
    push,
    slot_history,
    spoil,
)
from cachepolicy.engine.block_chain import Chain, ChainEntry, ChainForm
from cachepolicy.engine.compile.graph_ops import Answer, OutputPlace, Part
from cachepolicy.engine.history_packing import leaves
from cachepolicy.language import ir
from cachepolicy.planning.history_spec import Keeping, feedback, reach
from cachepolicy.planning.predictors import Weights
from cachepolicy.planning.schedule import UNKNOWN_FORM, WAITING, Decision


class Staged(Protocol):
    """The interface of `ForwardPass` for this module."""

    half: int
    halved: bool
    inference: bool

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots, by site number."""
        ...

    @property
    def keepings(self) -> Sequence[Keeping]:
        """The stored results of each site, by site number."""
        ...

    @property
    def forms(self) -> Mapping[int, ChainForm]:
        """The known structure of the spans, by site number."""
        ...

    @property
    def step(self) -> int:
        """The step of the call."""
        ...

    def decided(self, site: int) -> Decision:
        """Return the current decision of the site, `WAITING` if its signals are missing."""
        ...

    def weights(self, action: ir.Predict, site: int, steps: Sequence[int]) -> Weights:
        """Return the coefficients of a prediction from results of other steps."""
        ...

    def excess(self, site: int, action: ir.Action | None) -> str | None:
        """Return the reason if the weights of a predictor are too large, or None."""
        ...


def problem(forward_pass: Staged, site: int) -> str | None:
    """Return why a graph cannot answer for a site that is decided to reuse, or None."""
    decision = forward_pass.decided(site)
    return lacking(forward_pass, site, decision.action) if decision.verdict == "reuse" else None


def lacking(forward_pass: Staged, site: int, action: ir.Action | None) -> str | None:
    """Return why a graph could not answer for the site if it reused, or None."""
    if isinstance(action, ir.ApproximateUncond):
        return None
    slot, keeping = forward_pass.slots[site], forward_pass.keepings[site]
    if keeping.streams:
        chain = slot.chain
        if isinstance(action, ir.Skip):
            # What a skipped block returns does not depend on the trajectory or the branch.
            return None if (chain is not None and chain.links) or site in forward_pass.forms else UNKNOWN_FORM
        if chain is not None and chain.history and chain.autocast not in {None, autocast()}:
            return "the history does not fit this call"
        residual = isinstance(action, ir.Reuse | ir.Predict) and action.residual
        if chain is None or not chain.holds(residual=residual):
            return slot.storing.lacking
        return forward_pass.excess(site, action)
    if slot.output is None:
        return slot.storing.lacking
    if not slot.clones and overwritten(slot):
        spoil(slot)
        return "the history was overwritten in place"
    return forward_pass.excess(site, action)


def autocast() -> tuple[Any, ...]:
    """Return the autocast dtypes. They change the dtypes of block inputs while root inputs stay the same."""
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _AUTOCAST
    )


_AUTOCAST = ("cpu", "cuda")


def staged(forward_pass: Staged, site: int) -> Part:
    """Build what a graph reads about one site at this call."""
    keeping, part = forward_pass.keepings[site], Part()
    part.residuals, part.outputs = keeping.residuals > 0, keeping.outputs > 0
    part.form = forward_pass.forms.get(site) if keeping.streams else None
    part.calls = [OutputPlace() for _ in range(len(part.form.links) if part.form is not None else 1)]
    segments = part.form.segments if part.form is not None else 1
    part.places, part.bases = [OutputPlace() for _ in range(segments)], [OutputPlace() for _ in range(segments)]
    fill(forward_pass, site, part, refused=False)
    return part


def fill(forward_pass: Staged, site: int, part: Part, *, refused: bool) -> None:
    """Set the code of a site, and its history if the site answers.

    Args:
        forward_pass: The call.
        site: The site number.
        part: What the graph reads. It is changed.
        refused: Whether the site has to compute although it is decided to reuse.
    """
    decision, keeping, slot = forward_pass.decided(site), forward_pass.keepings[site], forward_pass.slots[site]
    action = decision.action
    if decision is WAITING or (keeping.streams and part.form is None):
        part.code = PENDING
    elif refused or decision.verdict != "reuse" or action is None or isinstance(action, ir.ApproximateUncond):
        part.code = STORE if keeping.outputs or keeping.streams else COMPUTE
    else:
        part.answer = _answer(action)
        part.code = ANSWER if keeping.streams or part.answer.predicts else REUSE
        if keeping.streams:
            _give_chain(forward_pass, site, part, slot.chain, action)
        else:
            _give(forward_pass, site, part, slot, action)


def _answer(action: ir.Action) -> Answer:
    match action:
        case ir.Reuse():
            return Answer(residual=action.residual)
        case ir.Predict():
            return Answer(residual=action.residual, predicts=True, feedback=feedback(action))
        case _:
            return Answer(skips=isinstance(action, ir.Skip))


def _give(forward_pass: Staged, site: int, part: Part, slot: Slot, action: ir.Action) -> None:
    kept = slot_history(slot, reach(action))
    first = _first(kept[0].output)
    if isinstance(action, ir.Predict):
        # Entries of half a batch cannot serve a full batch.
        kept = [entry for entry in kept if forward_pass.halved or entry.full]
        part.weights = _weights(forward_pass, site, action, [entry.step for entry in kept], first)
    part.history = tuple(_half(forward_pass, entry.output, full=entry.full) for entry in kept)
    part.clones = slot.clones or forward_pass.inference
    part.square = first is not None and first.shape == slot.shape


def _first(value: Any) -> Any:
    tensors = leaves(value)
    return tensors[0] if tensors else None


def _half(forward_pass: Staged, value: Any, *, full: bool) -> Any:
    """Return the conditional half of a stored full batch if this call is halved."""
    if not (forward_pass.halved and full):
        return value
    return map_tensors(lambda tensor: tensor.chunk(2, dim=0)[forward_pass.half], value)


def _give_chain(forward_pass: Staged, site: int, part: Part, chain: Chain | None, action: ir.Action) -> None:
    if chain is None or isinstance(action, ir.Skip):
        return
    histories, numbers = list[Any](), list[Any]()
    for segment in chain.history:
        entries = [entry for entry in segment[: reach(action)] if forward_pass.halved or entry.full]
        columns = [
            [_half(forward_pass, entry.at(index, residual=part.answer.residual), full=entry.full) for entry in entries]
            for index in range(len(entries[0].residuals))
        ]
        histories.append(
            tuple(None if any(tensor is None for tensor in column) else tuple(column) for column in columns)
        )
        if isinstance(action, ir.Predict):
            kept = next((column[0] for column in histories[-1] if column is not None), None)
            numbers.append(_weights(forward_pass, site, action, [entry.step for entry in entries], kept))
    part.history, part.weights = tuple(histories), tuple(numbers)


def _weights(
    forward_pass: Staged, site: int, action: ir.Predict, steps: Sequence[int], like: torch.Tensor | None
) -> Weights:
    """Return the coefficients as 0-d tensors, because constants would recompile the graph at each step."""
    numbers = forward_pass.weights(action, site, steps)

    def tensor(number: float) -> torch.Tensor:
        device = torch.device("cpu") if like is None else like.device
        # MPS has no float64.
        return torch.tensor(number, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    divisors = None if numbers.divisors is None else tuple(tensor(number) for number in numbers.divisors)
    return Weights(divisors, tuple(tensor(number) for number in numbers.factors))


# --- afterwards ------------------------------------------------------------------------------------------


def commit(forward_pass: Staged, site: int, part: Part) -> None:
    """Store what a graph left in the history of the site."""
    slot, keeping = forward_pass.slots[site], forward_pass.keepings[site]
    if keeping.streams:
        _commit_chain(forward_pass, slot, keeping, part)
        return
    output_place = part.places[0]
    if output_place.value is None:
        return
    if output_place.states is not None:
        slot.shape, slot.dtype, slot.device = torch.Size(output_place.states[0]), *output_place.states[1:]
    elif part.code is STORE:
        slot.shape = slot.dtype = slot.device = None
    push(slot, keeping, STORE, output_place.value, step=forward_pass.step, full=not forward_pass.halved)


def _commit_chain(forward_pass: Staged, slot: Slot, keeping: Keeping, part: Part) -> None:
    if part.unfit and slot.chain is not None:
        # The span computed inside the graph without storing its result.
        slot.chain.links, slot.chain.history = {}, []
    form, left = part.form, [output_place.value for output_place in part.places]
    if form is None or part.unfit or any(value is None for value in left):
        return
    chain = slot.chain = slot.chain or Chain(slot.storing)
    fresh = [ChainEntry(residuals, outputs, forward_pass.step, not forward_pass.halved) for residuals, outputs in left]
    old: list[list[ChainEntry]] = chain.history if len(chain.history) == len(fresh) else [[] for _ in fresh]
    chain.put(fresh, old, keeping.depth)
    chain.links = dict(enumerate(form.links))
    chain.endings = {position: ending for position, ending in enumerate(form.endings) if ending is not None}
    chain.signature, chain.autocast = None, autocast()
