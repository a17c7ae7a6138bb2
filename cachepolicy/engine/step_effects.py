"""What follows from the decisions of one root call: the operations of its sites, what it releases, and its record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import compress, count
from typing import TYPE_CHECKING, TypeVar

from cachepolicy.engine.actions import COMPUTE, PENDING, UNCALLED, Op
from cachepolicy.engine.answers import operation
from cachepolicy.engine.execution_plan import UNKNOWN_TRIMS, Trims
from cachepolicy.engine.history import trim
from cachepolicy.engine.profiling import now
from cachepolicy.engine.signals import Remembered
from cachepolicy.engine.span_run import Phase
from cachepolicy.planning.history_spec import feedback
from cachepolicy.planning.possible_decisions import NOTHING, Reads
from cachepolicy.tracing.trace import Trajectory

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass

K = TypeVar("K")
V = TypeVar("V")
_MOST_FORECASTS = 8  # forecasts of the clock for which a table of decisions keeps what follows from it


def release(call: ForwardPass) -> bool:
    """Release what no later step reads. Return True if the held bytes may have changed."""
    context, branch, table = call.context, call.context.branch, call.ledger.table
    if table is None or branch.trims is UNKNOWN_TRIMS or call.parts or call.owner.repeated:
        trims, branch.trims = _trims(call), UNKNOWN_TRIMS
    else:
        key = context.liveness, branch.trims
        trims = table.trims.get(key)
        if trims is None:
            trims = _put(table.trims, key, _trims(call))
        branch.trims = trims
    for sites, reads in trims.releases:
        branch.reads[sites[0]] = reads
        for site in sites:
            trim(call.slots[site], reads)
    changed = trims.changed or call.remembers
    crosses = bool(context.execution.signals.crossed)
    if branch.remembered and not crosses and not context.liveness.measures(context.tick, now=False):
        branch.remembered = Remembered()
        changed = True
    return changed


def _trims(call: ForwardPass) -> Trims:
    """Return the sites with less to read than before."""
    context, ledger, repeated = call.context, call.ledger, call.owner.repeated
    branch, liveness, alike = context.branch, context.liveness, context.execution.program.alike.group_of
    releases, changed = list[tuple[Sequence[int], Reads]](), False
    for group, decision, memory in zip(branch.partition.groups, ledger.decisions, ledger.after, strict=True):
        first = group.sites[0]
        reads = NOTHING if first in repeated else liveness.wanted(alike[first], context.tick, memory.last)
        same = branch.reads.get(first) is reads
        if same and not (decision.computes or (decision.verdict == "reuse" and feedback(decision.action))):
            continue
        changed |= bool(reads) or not same
        # A graph stores every result, read later or not, so that one graph serves all steps. Trim those here.
        short = reads.depth < liveness.full[alike[first]].depth
        if not same or ledger.facts or call.parts or (reads and short):
            releases.append((group.sites, reads))
    return Trims(releases, changed)


def planned_codes(call: ForwardPass) -> list[Op]:
    """Return what each site does, by site number. The list is cached with the decisions."""
    context, table = call.context, call.ledger.table
    if table is None or context.audit is not None or call.owner.repeated:
        return _ops(call)
    key = context.liveness, call.store
    codes = table.codes.get(key)
    if codes is None:
        codes = _put(table.codes, key, _ops(call))
    return codes.copy()


def _ops(call: ForwardPass) -> list[Op]:
    partition = call.context.branch.partition
    if call.context.audit is not None:
        return [PENDING] * len(partition.group_of)
    by_group = list[Op]()
    for decision, group in zip(call.ledger.decisions, partition.groups, strict=True):
        op = operation(decision, call.store)
        # A result is stored only if a later step may read it.
        by_group.append(COMPUTE if op is call.store and not call.context.wanted(group.sites[0]).outputs else op)
    return [by_group[group] for group in partition.group_of]


def uncalled(call: ForwardPass) -> list[int]:
    """Return the sites that the forward pass has not called, also those inside a site that has answered."""
    if call.answered or call.parts:
        return []  # a graph does not tell which of its sites have run
    names, keepings, handles = call.context.execution.names, call.context.execution.keepings, call.owner.handles
    # Almost always all sites were called, so the codes are looked up without a Python loop over the sites.
    return [
        site
        for site in compress(count(), map(UNCALLED.__contains__, call.codes))
        if names[site] != ("",)
        and (site not in call.spans or call.spans[site].phase is Phase.UNDECIDED)
        and (keepings[site].streams or handles[names[site][0]] not in call.called)
    ]


def record(call: ForwardPass, trajectory: Trajectory, errors: Mapping[int, float]) -> None:
    """Add the call to the trace.

    Args:
        call: The call, after its commit.
        trajectory: The record of the trajectory.
        errors: The errors of its answers by site number, where it is audited.
    """
    size = trajectory.size
    if size >= _MOST_CALLS:
        return
    context, ledger = call.context, call.ledger
    seconds = (now() if call.owner.placement.profiled else time.perf_counter()) - call.started
    trajectory.record((
        context.tick, context.branch.partition, ledger.decisions, ledger.facts, seconds, ledger.recorded(),
        call.state.held, call.started, call.profile if size < _MOST_PROFILED else (), errors,
    ))  # fmt: skip


_MOST_CALLS = 10_000  # calls per trajectory in the trace, which bounds trajectories whose end is unknown
_MOST_PROFILED = 1_000  # calls per trajectory with the times of their modules


def _put(known: dict[K, V], key: K, value: V) -> V:
    """Add an entry to a cache, and return its value."""
    if len(known) >= _MOST_FORECASTS:
        known.clear()
    known[key] = value
    return value
