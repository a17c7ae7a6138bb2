"""The state of one session: its clock, its settings, and the branches of each root model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cachepolicy.engine.cfg_branches import Calls, Known, StateKey
from cachepolicy.engine.cfg_cache import Guide
from cachepolicy.engine.clock import Clock
from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.execution_plan import ExecutionPlan
from cachepolicy.engine.history import storage_bytes
from cachepolicy.engine.memory_budget import Account, Lease
from cachepolicy.engine.session_config import SessionConfig
from cachepolicy.engine.step_context import Branch
from cachepolicy.errors import PolicyError
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.schedule import Tick
from cachepolicy.tracing.trace import Trajectory


@dataclass(slots=True)
class State:
    """State of one root model in a session: its calls, its branches and its trace.

    Attributes:
        execution: The plan under the settings of the session.
        over: Whether the last step has run.
        audited: Whether the answers of the trajectory are compared with computed outputs.
    """

    execution: ExecutionPlan
    calls: Calls = field(default_factory=Calls)
    guide: Guide = field(default_factory=Guide)
    step: int = -1
    reused: bool = False
    count: int = 0
    over: bool = False
    audited: bool = False
    trajectory: Trajectory | None = None
    agreement: Agreement | None = None
    spread: bool = False
    company: Agreement | None = None
    liveness: Liveness | None = None
    account: Account | None = None
    rebuilding: Lease | None = None
    """The lease for the guidance state, if there is a memory limit."""

    @property
    def held(self) -> int:
        """Bytes of history that the session holds on the root model."""
        guide = storage_bytes(self.guide.held) if self.execution.approximation is not None else 0
        calls = self.calls
        known = (*calls.known.values(), *calls.doubted.values())
        return guide + sum([one.state.held for one in known if one.state is not None])

    @property
    def branches(self) -> dict[StateKey, Branch]:
        """The states of the branches that have one."""
        # A list, because another thread may ask while a call adds a branch.
        return {key: known.state for key, known in list(self.calls.known.items()) if known.state is not None}

    def sibling(self, known: Known, name: str) -> Branch | None:
        """Return the state of another branch of the same rows, if it has one."""
        other = self.calls.known.get(known.key.of(name))
        return None if other is None else other.state

    def release(self) -> None:
        """Release the memories and histories of all branches, and what guidance keeps."""
        for known in self.calls.known.values():
            known.state = None
        self.calls.doubted.clear()
        self.guide = Guide()

    def abandon(self) -> None:
        """Tell the processes that decide together with this one that the trajectory has failed."""
        for agreement in (self.agreement, self.company):
            if agreement is not None:
                agreement.abandon()

    def clear(self) -> None:
        """Release the history before a new trajectory."""
        self.liveness = self.rebuilding = None
        if self.account is not None:
            self.account.waits = False
        self.release()
        self.step, self.count = -1, 0
        self.reused = self.over = False


Lost = tuple[float | None, int]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Session:
    """One request: its clock, its settings (None before the first call), and the state of each root model.

    Attributes:
        lost: The last timestep, and the direction of `t`, of a trajectory that was under way when `max_sessions` ended
            the session.
        drawn: The trajectory for which `audited` was drawn, -1 before the first.
        audited: Whether that trajectory is audited.
    """

    key: object
    clock: Clock = field(default_factory=Clock)
    session_config: SessionConfig | None = None
    states: dict[str, State] = field(default_factory=dict[str, State])
    lost: Lost | None = None
    drawn: int = -1
    audited: bool = False
    _thread: int | None = None
    _depth: int = 0

    @property
    def under_way(self) -> bool:
        """True while the trajectory may continue."""
        return any(state.count and not state.over for state in self.states.values())

    @property
    def busy(self) -> bool:
        """True while a call runs in the session."""
        return self._depth > 0

    def enter(self) -> None:
        """Begin a call. Nested calls of the same thread belong to it.

        Raises:
            PolicyError: A call of another thread is running (E312).
        """
        thread = threading.get_ident()
        if self._depth and self._thread != thread:
            raise PolicyError.of(
                "E312",
                f"two threads call the model in the session `{self.key}` at the same time",
                help="a session runs one call after another: give each request a session of its own",
            )
        self._thread = thread
        self._depth += 1

    def leave(self) -> None:
        """End the call."""
        self._depth -= 1

    def end(self) -> list[tuple[str, State]]:
        """Release the state and return it by root model. The next call starts a trajectory."""
        states, self.states = self.states, {}
        self.clock, self.session_config, self.lost, self.drawn = Clock(), None, None, -1
        return list(states.items())

    def goes_on(self, tick: Tick) -> bool:
        """Return True if this first call continues the trajectory that was lost, and forget that one."""
        lost, self.lost = self.lost, None
        if lost is None:
            return False
        t, direction = lost
        if tick.step > 0 or t is None or tick.t is None:
            return True
        return tick.t >= t if direction > 0 else tick.t <= t
