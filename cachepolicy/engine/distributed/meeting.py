"""Finds the processes that decide together with a root model at the start of a trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.groups import Peers, holders_of, peers_of
from cachepolicy.engine.execution_plan import ExecutionPlan
from cachepolicy.planning.schedule import Tick

if TYPE_CHECKING:
    from cachepolicy.engine.root_model import RootModel
    from cachepolicy.engine.session_state import State


def meet(root: RootModel, state: State) -> None:
    """Set the agreements of a trajectory.

    The search runs at each trajectory, because a model can be parallelized after `apply`.
    """
    policy = f"{state.execution.plan.resolved.digest} {root.session_config.options.samples}"
    peers, holders = _others(root, state.execution)
    state.agreement = Agreement(peers, policy) if peers is not None else None
    state.company = Agreement(holders, policy) if holders is not None else None
    group = root.session_config.options.process_group
    if peers is None and state.execution.reads_grid and group is not False:
        peers = peers_of(group, root.module, known=False)
    state.spread = peers is not None


def compare_externals(state: State, tick: Tick, externals: Mapping[str, float]) -> None:
    """Compare the externals of a call with those of the processes that decide together with this one.

    Raises:
        PolicyError: A process has other numbers (E351).
    """
    for agreement in (state.agreement, state.company):
        if agreement is not None:
            agreement.settle(f"the externals of step {tick.step}", [], past=f"{tick.branch} {dict(externals)}")


def abandon(root: RootModel, execution: ExecutionPlan) -> None:
    """Report that this process has stopped before it was known whether a trajectory begins.

    Peers would wait for this process in a collective.
    """
    for peers in _others(root, execution, known=True):
        if peers is not None:
            Agreement(peers, "").abandon()


def _others(root: RootModel, execution: ExecutionPlan, *, known: bool = False) -> tuple[Peers | None, Peers | None]:
    """Return the processes that share the samples, and those that share only sharded parameters."""
    group = root.session_config.options.process_group
    if not (execution.signals.numbers or execution.program.externals) or group is False:
        return None, None
    peers = peers_of(group, root.module, known=known)
    holders = holders_of(root.module, known=known)
    among = peers is not None and holders is not None and set(holders.ranks) <= set(peers.ranks)
    return peers, None if among else holders
