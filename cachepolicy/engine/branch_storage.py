"""The state of one root model's branches: it is created, released when no step reads it, and limited."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from cachepolicy.engine import guidance_observer, step_effects
from cachepolicy.engine.actions import Slot
from cachepolicy.engine.cfg_cache import Guide
from cachepolicy.engine.history import held, storage_bytes
from cachepolicy.engine.history_storage import Saving, Storing
from cachepolicy.engine.introspection import modules_by_path
from cachepolicy.engine.memory_budget import Account, Lease
from cachepolicy.engine.signals import Remembered
from cachepolicy.engine.step_context import Branch
from cachepolicy.planning.cost_model import Reuses, Weight, operations, site_weights
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import Tick

if TYPE_CHECKING:
    from cachepolicy.engine.clock import Reading
    from cachepolicy.engine.forward_pass import ForwardPass
    from cachepolicy.engine.root_model import RootModel
    from cachepolicy.engine.session_state import State

_MOST_CLOCKS = 32  # number of clock forecasts whose planned reuses are cached


class BranchStorage:
    """Creates and limits the histories of one root model."""

    def __init__(self, root: RootModel) -> None:
        self._root = root
        self._reuses: dict[Ahead, Reuses] = {}

    @cached_property
    def weights(self) -> Sequence[Weight]:
        """The compute weight of each site."""
        counts = {
            path: sum(parameter.numel() for parameter in module.parameters(recurse=False))
            for path, module in modules_by_path(self._root.module).items()
        }
        return site_weights(self._root.execution.plan, counts)

    def _slots(self, state: State, tick: Tick, ahead: Ahead) -> list[Slot]:
        """Return an empty history for each site of a branch."""
        storing = self._root.attachment.storing
        if state.account is None:
            return [Slot(storing) for _ in state.execution.plan.sites]
        program = state.execution.program
        counted = self._reuses.get(ahead)
        if counted is None or counted.program is not program:
            if len(self._reuses) >= _MOST_CLOCKS:
                self._reuses.clear()
            counted = self._reuses[ahead] = Reuses(program, ahead)

        def saving(site: int) -> Saving:
            weight = self.weights[site]
            group = program.alike.group_of[site]
            return lambda shape: operations(weight, shape) * counted.of(group, tick)

        return [
            Slot(Storing(storing.packing, state.account, saving(site), keeping.depth))
            for site, keeping in enumerate(state.execution.keepings)
        ]

    def branch(self, state: State, reading: Reading, *, again: bool) -> tuple[Branch, dict[int, str]]:
        """Return the branch of a call, and per site the reason where its history does not fit."""
        known = reading.known
        branch = known.state
        if branch is not None and not (again or known.stale or known.doubtful):
            return branch, {}
        slots, execution = self._slots(state, reading.tick, reading.ahead), state.execution
        if branch is None:
            known.state = Branch(execution.program.coarse, execution.recall.start, slots)
            return known.state, {}
        # The history is discarded, the memories stay. `Calls.doubted` keeps an uncertain branch aside.
        reason = Fact.RERUN if again else Fact.MISFIT if known.stale else Fact.UNKNOWN_BRANCH
        known.state = Branch(branch.partition, branch.memories, slots)
        state.guide = Guide()
        return known.state, dict.fromkeys(range(len(slots)), reason)

    def release(self, call: ForwardPass) -> None:
        """Release the history that no later step of the trajectory reads, and count the rest."""
        state, branch = call.state, call.context.branch
        if state.execution.approximation is not None:
            guidance_observer.release(call)
        changed = step_effects.release(call)
        if state.account is not None:
            self._limit(state, branch, state.account)
        if changed:
            branch.held = held(branch.slots, branch.remembered)

    def over(self, call: ForwardPass) -> None:
        """Release the history of a branch, and of earlier root models, after the last step."""
        state, branch = call.state, call.context.branch
        state.over = True
        crossed = branch.remembered.crossed
        branch.forget()
        if len(state.calls.present) < len(state.branches):
            branch.remembered.crossed = crossed  # the other branches have not run in this step
        elif crossed:
            for other in state.branches.values():
                other.remembered = Remembered()
        if not guidance_observer.to_come(call):
            state.guide = Guide()
        for other in call.session.states.values():
            if other.step < call.context.tick.step - 1:
                other.release()

    def _limit(self, state: State, branch: Branch, account: Account) -> None:
        """Apply the memory limit to the state of signals and guidance. Rules that lose this state compute."""
        if branch.remembered:
            branch.signals = branch.signals or Lease(account)
            if not branch.signals.admits(held((), branch.remembered)):
                branch.remembered = Remembered()
        else:
            branch.signals = None
        kept = state.guide.held if state.execution.approximation is not None else []
        if kept:
            state.rebuilding = state.rebuilding or Lease(account)
            state.guide.limit(admitted=state.rebuilding.admits(storage_bytes(kept)))
        else:
            state.rebuilding = None
