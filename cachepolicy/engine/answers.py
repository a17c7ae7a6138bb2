"""What a site does in one root call and what it answers from, in eager mode and in graphs.

Eager mode keeps the outputs themselves with their write counters, and reads this when a site is called. A graph keeps
clones, and what it reads is prepared before the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine.actions import (
    ANSWER,
    PENDING,
    REUSE,
    Kept,
    Op,
    chain_of,
    combine,
    filled,
    lacks,
    mean_of_halves,
)
from cachepolicy.engine.batch_view import WHOLE
from cachepolicy.engine.block_chain import ChainEntry, Names
from cachepolicy.engine.history_packing import leaves, opened
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import is_mean, reach
from cachepolicy.planning.predictors import Weights
from cachepolicy.planning.schedule import WAITING, Decision

if TYPE_CHECKING:
    from cachepolicy.engine.step_context import StepContext


def operation(decision: Decision, store: Op) -> Op:
    """Return what a site does by its decision. `store` is how it computes."""
    if decision is WAITING:
        return PENDING
    action = decision.action
    if decision.verdict != "reuse" or isinstance(action, ir.ApproximateUncond):
        return store
    return REUSE if isinstance(action, ir.Reuse) and not action.mean else ANSWER


def of_residual(action: ir.Action | None) -> bool:
    """Return True if answers by the action are residuals, which are added to the inputs."""
    return isinstance(action, ir.Reuse | ir.Predict) and action.residual


def is_weighted(action: ir.Action | None) -> bool:
    """Return True if the answer is one weighted sum of stored results, which a graph can form."""
    return isinstance(action, ir.Predict) and action.predictor != "band"


def lacking(context: StepContext, site: int, action: ir.Action | None, names: Names | None = None) -> str | None:
    """Return why a site has nothing to answer with, or None.

    Args:
        context: What the call is decided from.
        site: The site number.
        action: The action of the site if it reuses.
        names: The inputs of the first block of a span, by name. None if they are not known yet.
    """
    if isinstance(action, ir.ApproximateUncond):
        return None
    slot = context.branch.slots[site]
    if not context.execution.keepings[site].streams:
        return lacks(slot)
    chain, skips = slot.chain or chain_of(slot), isinstance(action, ir.Skip)
    if skips and not chain.links:
        # What a skipped block returns does not depend on the trajectory or the branch.
        form = context.root.continuations.form_of(site, names)
        if form is not None:
            chain.learn(form)
    if not chain.links:
        return Fact.UNKNOWN_FORM if skips else slot.storing.lacking
    if not skips and not chain.holds(residual=of_residual(action)):
        return slot.storing.lacking
    return None if len(chain.links) == len(context.execution.names[site]) else Fact.INCOMPLETE


def outputs_read(context: StepContext, site: int, action: ir.Action | None) -> tuple[list[Any], Weights | None]:
    """Return the stored outputs of a module that an answer reads, newest first, and the weights of a prediction.

    A prediction that is no weighted sum is made here, and returned in place of the stored outputs.

    Args:
        context: What the call is answered from.
        site: The site number.
        action: The action of the site.
    """
    slot, rows = context.branch.slots[site], context.rows
    if is_mean(action):
        return [mean_of_halves(slot, rows)], None
    kept = [Kept(slot.output, slot.step, slot.rows), *slot.older][: reach(action)]
    if isinstance(action, ir.Predict):
        # Entries of half a batch cannot serve a whole batch.
        kept = [entry for entry in kept if entry.rows.serves(rows)]
    outputs = [rows.cut(entry.output if slot.packing is None else opened(entry.output), entry.rows) for entry in kept]
    if not isinstance(action, ir.Predict):
        return outputs, None
    steps = [entry.step for entry in kept]
    if is_weighted(action):
        return outputs, context.weights(action, site, steps)
    columns = zip(*[leaves(output) for output in outputs], strict=True)
    return [filled(outputs[0], [context.banded(action, site, column, steps) for column in columns])], None


def output_of(outputs: Sequence[Any], weights: Weights | None) -> Any:
    """Return the newest output, with each of its tensors predicted if there are weights."""
    if weights is None:
        return outputs[0]
    columns = [leaves(output) for output in outputs]
    return filled(outputs[0], [combine(column, weights) for column in zip(*columns, strict=True)])


Columns = Sequence[Sequence[torch.Tensor] | None]
"""The stored values of each stream of a segment, newest first. None where a stream has none."""


def segment_read(
    context: StepContext, site: int, entries: Sequence[ChainEntry], action: ir.Action | None
) -> tuple[Columns, Weights | None]:
    """Return the stored values of a segment that an answer reads, and the weights of a prediction.

    A prediction that is no weighted sum is made here, and returned in place of the stored values.

    Args:
        context: What the call is answered from.
        site: The number of the span.
        entries: The entries of the segment, newest first.
        action: The action of the span.
    """
    residual, rows, weights, steps = of_residual(action), context.rows, None, list[int]()
    read = entries[:1]
    if isinstance(action, ir.Predict):
        read = [entry for entry in entries[: reach(action)] if entry.rows.serves(rows)]
        steps = [entry.step for entry in read]
        weights = context.weights(action, site, steps) if is_weighted(action) else None
    columns = list[Sequence[torch.Tensor] | None]()
    for index in range(len(read[0].residuals)):
        column = list[torch.Tensor]()
        for entry in read:
            value = entry.at(index, residual=residual)
            # An older entry may hold only outputs, or only residuals.
            if value is not None:
                column.append(value if rows is WHOLE else rows.cut(value, entry.rows))
        if isinstance(action, ir.Predict) and weights is None and len(column) == len(read):
            columns.append((context.banded(action, site, column, steps),))
        else:
            columns.append(tuple(column) if len(column) == len(read) else None)
    return columns, weights


def values_of(columns: Columns, weights: Weights | None) -> list[Any]:
    """Return the newest value of each stream, or its prediction if there are weights."""
    values: list[Any] = []  # graphs cannot trace `list[Any]()`
    for column in columns:
        newest = None if column is None else column[0]
        values.append(newest if column is None or weights is None else combine(column, weights))
    return values
