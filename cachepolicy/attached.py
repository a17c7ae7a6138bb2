"""One root of a run: whose session a call is, what is decided for it, what is kept after it."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from cachepolicy import ir
from cachepolicy.actions import (
    ANSWERS,
    COMPUTE,
    RESIDUAL,
    REUSE,
    REUSE_CLONE,
    SKIP,
    STORE,
    STORE_CLONE,
    Keeping,
    Slot,
    answer,
    keep,
    keeping,
    unfit,
)
from cachepolicy.clock import Clock, Follower, Sources, arguments_of, inspect_root, read
from cachepolicy.diagnostics import PolicyError
from cachepolicy.intercept import Frame
from cachepolicy.plan import Plan
from cachepolicy.schedule import (
    Decision,
    Memory,
    Partition,
    Tick,
    decide_all,
    follows,
    prepare,
    untold,
)
from cachepolicy.trace import Call, Trace, Trajectory

SESSION: ContextVar[Hashable] = ContextVar("cachepolicy_session", default=None)
DISABLED: ContextVar[frozenset[int]] = ContextVar("cachepolicy_disabled", default=frozenset())


@dataclass(slots=True)
class Branch:
    """The state of one branch: what the decision function remembers by group, and what the sites keep."""

    partition: Partition
    memories: list[Memory]
    slots: list[Slot]


@dataclass(slots=True)
class State:
    """One session on one root: its clock, its branches and the record of its trajectory."""

    clock: Clock = field(default_factory=Clock)
    branches: dict[str, Branch] = field(default_factory=dict[str, Branch])
    decided: dict[str, Sequence[Decision]] = field(default_factory=dict[str, Sequence[Decision]])
    step: int = -1
    reused: bool = False
    calls: int = 0
    trajectory: Trajectory | None = None


class Attached:
    """One root of a run: a denoiser with its plan, its sites and the sessions that go through it."""

    def __init__(
        self,
        module: torch.nn.Module,
        plan: Plan,
        sources: Callable[[], Sources],
        refuted: Callable[[], None],
        trace: Trace | None,
        most_sessions: int,
    ) -> None:
        self.module = module
        self.plan = plan
        self.program = prepare(plan)
        self.followed = follows(plan)
        self.root = inspect_root(module)
        self.sources = sources
        self.refuted = refuted
        self.trace = trace
        self.identity = id(self)
        self.active = 0
        self.keepings = [
            keeping([rule.rule.action for rule in plan.rules if site.index in rule.sites]) for site in plan.sites
        ]
        self._codes: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        self.itself = next((site.index for site in plan.sites if site.modules == ("",)), None)
        self._states: OrderedDict[Hashable, State] = OrderedDict()
        self._most_sessions = most_sessions
        self._lock = threading.Lock()
        self._warned = False
        self.run: Any = None

    # --- sessions ----------------------------------------------------------------------------------------

    def state(self, key: Hashable) -> State:
        """The session's state; the least recently used session goes when there are too many."""
        with self._lock:
            state = self._states.setdefault(key, State())
            self._states.move_to_end(key)
            while len(self._states) > self._most_sessions:
                self._states.popitem(last=False)
            return state

    def drop(self, key: Hashable) -> None:
        """End a session: its histories are released."""
        with self._lock:
            state = self._states.pop(key, None)
        if state is not None:
            self._finished(state)

    def drop_current(self) -> None:
        """End the session of the present call: its trajectory is over."""
        self.drop(session_key())

    def drop_all(self) -> None:
        """End all sessions."""
        with self._lock:
            states = list(self._states.values())
            self._states.clear()
        for state in states:
            self._finished(state)

    @property
    def sessions(self) -> tuple[Hashable, ...]:
        """The keys of the sessions that have state."""
        with self._lock:
            return tuple(self._states)

    def _finished(self, state: State) -> None:
        if state.calls > 1 and not state.reused and not self._warned:
            self._warned = True
            warnings.warn(_why_nothing(self.plan, state), UserWarning, stacklevel=2)

    # --- one call ----------------------------------------------------------------------------------------

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RootTurn | None:
        """Read the clock, decide for every site, and lay out the frame; None where the run is disabled."""
        if self.identity in DISABLED.get() or torch.compiler.is_exporting():
            return None
        key = session_key()
        state = self.state(key)
        reading = read(state.clock, self.sources(), self.root, arguments_of(self.root, args, kwargs))
        if reading.starts:
            self._start(state, key, reading.tick)
        elif reading.stale:
            state.branches.clear()
        tick = reading.tick
        branch = state.branches.get(tick.branch)
        if branch is None:
            coarse, slots = self.program.coarse, [Slot() for _ in self.plan.sites]
            branch = state.branches[tick.branch] = Branch(coarse, coarse.start(), slots)
        if tick.step != state.step:
            state.decided.clear()
            state.step = tick.step
        turn = self._decide(key, state, branch, tick, args, kwargs)
        with self._lock:
            self.active += 1
        return turn

    def _start(self, state: State, key: Hashable, tick: Tick) -> None:
        if state.calls:
            self._finished(state)
        state.branches.clear()
        state.decided.clear()
        state.reused, state.calls = False, 0
        error = untold(self.plan, tick)
        if error is not None:
            self.drop(key)
            raise error
        state.trajectory = self.trace.begin(key, self.plan) if self.trace is not None else None

    def _decide(
        self,
        key: Hashable,
        state: State,
        branch: Branch,
        tick: Tick,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> RootTurn:
        leader = next((state.decided[name] for name in self.followed if name in state.decided), None)
        decisions, after = decide_all(self.program, branch.partition, branch.memories, tick, followed=leader)
        turn = RootTurn(key, state, branch, tick, decisions, after, leader)
        turn.frame = self._frame(turn)
        if self.itself is not None and turn.frame.codes[self.itself] in ANSWERS:
            slot, code = branch.slots[self.itself], turn.frame.codes[self.itself]
            reason = unfit(slot, code, args, kwargs)
            if reason is None:
                turn.answered, turn.output = True, answer(slot, code, args, kwargs)
            else:
                self._correct(turn, [(self.itself, reason)])
                turn.frame = self._frame(turn)
        return turn

    def _frame(self, turn: RootTurn) -> Frame:
        """The codes of all sites; those of equal decisions are laid out once."""
        inference = torch.is_inference_mode_enabled()
        partition = turn.branch.partition
        by_group = tuple(
            _code(decision, self.keepings[group.sites[0]], inference=inference)
            for decision, group in zip(turn.decisions, partition.groups, strict=True)
        )
        codes = self._codes.get((partition is self.program.coarse, by_group))
        if codes is None:
            if len(self._codes) >= _MOST_SIGNATURES:
                self._codes.clear()
            codes = [by_group[group] for group in partition.group_of]
            self._codes[partition is self.program.coarse, by_group] = codes
        return Frame(self, codes, turn.branch.slots, STORE_CLONE if inference else STORE)

    def end(self, turn: RootTurn, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Commit what the call did: memories, counts and the trace."""
        index, frame, state = self.itself, turn.frame, turn.state
        if index is not None and not turn.answered and frame.codes[index] is not COMPUTE:
            code = frame.codes[index]
            keep(turn.branch.slots[index], self.keepings[index], code, args, kwargs, output, "the model")
        if frame.unfit:
            self._correct(turn, frame.unfit)
        turn.branch.memories = turn.after
        if self.followed:
            state.decided[turn.tick.branch] = turn.branch.partition.spread(turn.decisions)
        state.calls += 1
        if not state.reused:
            state.reused = any(decision.verdict == "reuse" for decision in turn.decisions)
        if state.trajectory is not None:
            seconds = time.perf_counter() - turn.started
            call = Call(turn.tick, turn.branch.partition, turn.decisions, turn.facts, seconds)
            state.trajectory.calls.append(call)
        with self._lock:
            self.active -= 1
        return output

    def _correct(self, turn: RootTurn, unfit: Sequence[tuple[int, str]]) -> None:
        """Decide again with what the sites found out, so that memory and trace say what happened."""
        branch = turn.branch
        if branch.partition is not self.program.fine:
            branch.memories = self.program.split(branch.memories)
            branch.partition = self.program.fine
        for index, reason in unfit:
            turn.facts[index] = reason
            for site in self.plan.sites:
                if index in site.parents:
                    turn.facts.setdefault(site.index, "the site around it had to compute")
        turn.decisions, turn.after = decide_all(
            self.program, branch.partition, branch.memories, turn.tick, followed=turn.leader, facts=turn.facts
        )

    def fail(self, turn: RootTurn, error: BaseException) -> None:
        """Leave the session as if the trajectory had not been; a policy that the model refutes takes the run off."""
        with self._lock:
            self.active -= 1
            self._states.pop(turn.key, None)
        if turn.state.trajectory is not None and self.trace is not None:
            self.trace.drop(turn.state.trajectory)
        if isinstance(error, PolicyError):
            self.refuted()


_MOST_SIGNATURES = 256  # distinct sets of decisions whose codes are kept laid out


@dataclass(slots=True)
class RootTurn:
    """One call of a root, between its decision and its end."""

    key: Hashable
    state: State
    branch: Branch
    tick: Tick
    decisions: Sequence[Decision]
    after: list[Memory]
    leader: Sequence[Decision] | None
    facts: dict[int, str] = field(default_factory=dict[int, str])
    frame: Frame = field(init=False)
    answered: bool = False
    output: Any = None
    started: float = field(default_factory=time.perf_counter)


def _code(decision: Decision, what: Keeping, *, inference: bool) -> str:
    """What a site does at this call. Inference tensors have no write counter, so there copies are kept and given."""
    if decision.verdict != "reuse":
        if not (what.output or what.streams):
            return COMPUTE
        return STORE_CLONE if inference else STORE
    match decision.action:
        case ir.Reuse(residual=True):
            return RESIDUAL
        case ir.Skip():
            return SKIP
        case _:
            return REUSE_CLONE if inference else REUSE


def _why_nothing(plan: Plan, state: State) -> str:
    reasons = dict[str, int]()
    if state.trajectory is not None:
        for call in state.trajectory.calls:
            for decision in call.decided:
                reasons[decision.reason] = reasons.get(decision.reason, 0) + 1
    common = max(reasons, key=lambda reason: reasons[reason], default="")
    ts = [call.tick.t for call in state.trajectory.calls if call.tick.t is not None] if state.trajectory else []
    seen = f"; t went from {ts[0]:g} to {ts[-1]:g}" if ts else ""
    return f"the policy reused nothing in a trajectory of {state.calls} calls (mostly: {common or 'unknown'}{seen})"


def session_key() -> Hashable:
    """Whose state a call is: the explicit session, the pipeline call, else the task or thread."""
    explicit = SESSION.get()
    if explicit is not None:
        return explicit
    if asyncio._get_running_loop() is not None:  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUnknownMemberType]
        task = asyncio.current_task()
        if task is not None:
            return ("task", id(task))
    return ("thread", threading.get_ident())
