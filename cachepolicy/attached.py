"""One root of a run: whose session a call is, what is decided for it, what is kept after it."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cachepolicy import ir, neighbours
from cachepolicy.actions import (
    ANSWER,
    COMPUTE,
    PENDING,
    REUSE,
    Keeping,
    Slot,
)
from cachepolicy.agreement import Agreement
from cachepolicy.blocks import Graphs
from cachepolicy.clock import CONTEXT, Arguments, Clock, Sources, arguments_of, inspect_root, read
from cachepolicy.diagnostics import PolicyError
from cachepolicy.evaluate import Environment
from cachepolicy.graphs import Part
from cachepolicy.guidance import Guide
from cachepolicy.intercept import Frame, Site, parameters_of
from cachepolicy.layout import lay_out
from cachepolicy.plan import Plan
from cachepolicy.processes import Peers, holders_of, peers_of
from cachepolicy.schedule import (
    COND_BRANCHES,
    UNCOND_BRANCHES,
    WAITING,
    Decision,
    Memory,
    Tick,
    clock_words,
    rebuilds_uncond,
    untold,
)
from cachepolicy.signals import Measuring, Remembered
from cachepolicy.spans import Continuations
from cachepolicy.stopwatch import now
from cachepolicy.swap import Handle
from cachepolicy.told import Told
from cachepolicy.trace import Call, Trace, Trajectory
from cachepolicy.turn import Branch, Turn

SESSION: ContextVar[Hashable] = ContextVar("cachepolicy_session", default=None)
DISABLED: ContextVar[frozenset[int]] = ContextVar("cachepolicy_disabled", default=frozenset())


@dataclass(slots=True)
class State:
    """One session on one root: its clock, its branches and the record of its trajectory."""

    clock: Clock = field(default_factory=Clock)
    branches: dict[str, Branch] = field(default_factory=dict[str, Branch])
    decided: dict[str, Sequence[Decision]] = field(default_factory=dict[str, Sequence[Decision]])
    guide: Guide = field(default_factory=Guide)
    step: int = -1
    reused: bool = False
    calls: int = 0
    trajectory: Trajectory | None = None
    agreement: Agreement | None = None
    company: Agreement | None = None

    def abandon(self) -> None:
        """Tell the processes that decide with this one that its trajectory has failed."""
        for agreement in (self.agreement, self.company):
            if agreement is not None:
                agreement.abandon()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a root is told by its run: where the clock reads, whether batches hold guidance, what the caller said."""

    sources: Callable[[], Sources]
    guided: Callable[[], bool | None]
    refuted: Callable[[], None]
    settle: Callable[[Attached], None]
    intercept: Callable[[Attached, str, Site], None]
    told: Told
    trace: Trace | None


class Attached(Handle):
    """One root of a run: a denoiser with its plan, its sites and the sessions that go through it."""

    def __init__(self, run: Any, module: torch.nn.Module, plan: Plan, around: Surroundings) -> None:
        self.run = run
        self.module = module
        self.plan = plan
        self.around = around
        self.layout = lay_out(plan)
        self.root = inspect_root(module)
        self.channels = _channels(module)
        self.identity = id(self)
        self.active = 0
        self.continuations = Continuations()
        self.externals = around.told.externals
        self.repeated: set[int] = set()
        self.keeps_graphs = False
        self.switches = neighbours.checkpointing(module)
        self.handles = self._handles()
        self.graphs = Graphs(self)
        self._states: OrderedDict[Hashable, State] = OrderedDict()
        self._lock = threading.Lock()
        self._warned = False
        self._peers: list[Peers] = []

    def _handles(self) -> dict[str, Site]:
        """What each intercepted module has to know, by the module's name; the root's is ""."""
        handles = dict[str, Site]()

        def at(name: str) -> Site:
            if name not in handles:
                handles[name] = Site(self, name or "model", parameters_of(self.module.get_submodule(name)))
            return handles[name]

        at("")
        for site in sorted(self.plan.sites, key=lambda site: len(site.parents)):
            what = self.layout.keepings[site.index]
            if what.streams:
                for position, name in enumerate(site.modules):
                    at(name).members.append((site.index, position))
            if len(site.modules) == 1:
                handle = at(site.modules[0])
                handle.index, handle.keeping, handle.plain = site.index, what, what.plain
        for probe, place in self.plan.probes.items():
            before = probe.stream in {"input", "argument"}
            handle = at(place.modules[0 if before else -1])
            (handle.inputs if before else handle.outputs).append(probe)
            if len(place.modules) > 1:
                at(place.modules[0]).starts.append(probe)
        if any(what.streams for what in self.layout.keepings) or self.plan.probes:
            # Watched blocks teach which output continues which input.
            for name in self.plan.skeleton.block_lists:
                for block in self.plan.skeleton.elements[name]:
                    at(block).special = True
        for handle in handles.values():
            handle.special |= bool(handle.members or handle.inputs or handle.outputs or handle.starts)
        return handles

    # --- sessions ----------------------------------------------------------------------------------------

    def state(self, key: Hashable) -> State:
        """The session's state; the least recently used session goes when there are too many."""
        with self._lock:
            state = self._states.get(key)
            if state is None:
                state = self._states[key] = State()
            self._states.move_to_end(key)
            while len(self._states) > self.around.told.most_sessions:
                self._states.popitem(last=False)
            return state

    def drop(self, key: Hashable, *, failed: bool = False) -> None:
        """End a session: its histories are released. The processes that share its samples hear of a failure."""
        with self._lock:
            state = self._states.pop(key, None)
        if state is None:
            return
        if failed:
            state.abandon()
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
            warnings.warn(_why_nothing(state), UserWarning, stacklevel=2)

    # --- one call ----------------------------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool = False) -> RootCall | None:
        """Read the clock, decide for every site, and lay out the frame; None where the run is disabled."""
        if self.identity in DISABLED.get() or neighbours.traced():
            return None
        neighbours.refuse_call(self.switches)
        key = session_key()
        state = self.state(key)
        try:
            call = self._call(key, state, args, kwargs, compiler=compiler)
        except BaseException as error:
            self._forget(key, state, error)
            raise
        with self._lock:
            self.active += 1
        return call

    def _call(
        self, key: Hashable, state: State, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool
    ) -> RootCall:
        arguments = arguments_of(self.root, args, kwargs)
        try:
            reading = read(state.clock, self.around.sources(), self.root, arguments)
        except BaseException:
            # Nobody can tell any more whether a trajectory was to begin here; one that was is over.
            for peers in self._peers:
                Agreement(peers, "").abandon()
            raise
        tick = reading.tick
        if reading.starts:
            self.around.settle(self)
            self._start(state, key, tick)
        if self.layout.approximation is not None and tick.branch in COND_BRANCHES:
            for name in UNCOND_BRANCHES & state.branches.keys():
                other = state.branches[name]
                alone = rebuilds_uncond(
                    self.layout.program, other.partition, other.memories, replace(tick, branch=name)
                )
                tick = replace(tick, uncond_skipped=alone)
        branch = state.branches.get(tick.branch)
        if branch is None:
            coarse, slots = self.layout.program.coarse, [Slot() for _ in self.plan.sites]
            branch = state.branches[tick.branch] = Branch(coarse, coarse.start(), slots)
        if tick.step != state.step:
            state.decided.clear()
            state.step = tick.step
        leaders = {name: state.decided[name] for name in self.layout.followed if name in state.decided}
        facts = dict[int, str]()
        if reading.stale:
            # The trajectory goes on with other shapes: what is kept fits none of its calls any more.
            branch.slots = [Slot() for _ in self.plan.sites]
            branch.remembered = Remembered()
            state.guide = Guide()
            facts = dict.fromkeys(range(len(self.plan.sites)), "the history does not fit this call")
        facts |= dict.fromkeys(self.repeated, "one forward calls it more than once")
        measuring = None
        if self.plan.probes or self.layout.signals.numbers:
            environment = Environment(clock_words(tick, Memory(tick.step)), self.layout.program.tables)
            worst = self.around.told.samples == "max"
            measuring = Measuring(
                self.layout.signals,
                branch.remembered,
                environment,
                tick.step,
                worst=worst,
                agreement=state.agreement,
            )
        turn = Turn(self, branch, tick, leaders, measuring, facts, state.company)
        call = RootCall(key, state, turn, arguments, args, kwargs)
        self._open(call)
        if self.graphs.used(whole=compiler) and not call.answered:
            call.learns = self.graphs.learns(arguments)
            if not call.learns:
                call.parts = self.graphs.parts(turn, arguments, whole=compiler)
        call.frame = self._frame(turn)
        if call.parts:
            self.graphs.place(call.frame, call.parts, whole=compiler)
        return call

    def _start(self, state: State, key: Hashable, tick: Tick) -> None:
        if state.calls:
            self._finished(state)
        self.graphs.look()
        state.branches.clear()
        state.decided.clear()
        state.guide = Guide()
        state.reused, state.calls = False, 0
        trace = self.around.trace
        state.trajectory = trace.begin(key, self.plan) if trace is not None else None
        self._meet(state)
        error = untold(self.plan, tick)
        if error is not None:
            raise error

    def _meet(self, state: State) -> None:
        """Find those who decide with this process; at each trajectory, for models are spread out late too."""
        state.agreement = state.company = None
        told = self.around.told
        if not self.layout.signals.numbers or told.process_group is False:
            return
        policy = f"{self.plan.resolved.digest} {told.samples}"
        peers, holders = peers_of(told.process_group, self.module), holders_of(self.module)
        if peers is not None:
            state.agreement = Agreement(peers, policy)
        if holders is not None and (peers is None or not set(holders.ranks) <= set(peers.ranks)):
            state.company = Agreement(holders, policy)
        self._peers = [each for each in (peers, holders if state.company is not None else None) if each is not None]

    def _open(self, call: RootCall) -> None:
        """What the root itself does, where it is a site or probed."""
        site, turn = self.handles[""], call.turn
        if not site.special and self.layout.itself is None:
            return
        turn.enter(site, call.arguments.named, call.args, call.kwargs)
        if self.layout.itself is None:
            return
        problem = turn.problem(site, call.arguments.named, call.args, call.kwargs)
        decision = turn.decision(self.layout.itself, problem)
        if self.layout.approximation is not None and (
            isinstance(decision.action, ir.ApproximateUncond) or decision.verdict != "reuse"
        ):
            action = decision.action if isinstance(decision.action, ir.ApproximateUncond) else self.layout.approximation
            self._open_guidance(call, action)
        else:
            call.answered, call.output = turn.open(site, call.arguments.named, call.args, call.kwargs)

    def _open_guidance(self, call: RootCall, action: ir.ApproximateUncond) -> None:
        turn = call.turn
        assert self.layout.itself is not None
        settings = turn.arguments(action, self.layout.itself, without=_FACTORS)
        turn.half = int(settings["layout"] == "uncond first")
        guide = call.state.guide
        call.guidance = settings
        guided = self._guided()
        if guided is None and not guide.named(turn.tick.branch):
            raise PolicyError.of(
                "E330",
                "nothing tells whether this batch holds both halves of guidance",
                help="apply the policy to the pipeline, or say `guidance=True` (or False) to `apply`",
            )
        problem = guide.problem(turn.tick, call.arguments, guided=guided is True, calls=len(call.state.clock.calls))
        if problem is not None:
            call.guidance = None if problem.final else settings
            if turn.decision(self.layout.itself).verdict == "reuse":
                turn.refuse(self.layout.itself, problem.reason)
                turn.decide_again()
        elif turn.decision(self.layout.itself).verdict == "reuse":
            settings |= turn.arguments(action, self.layout.itself)
            if guide.named(turn.tick.branch):
                call.answered, call.output = True, guide.answered(settings)
            else:
                turn.halved = True
                call.args, call.kwargs = guide.halved(call.arguments, call.args, settings)

    def _guided(self) -> bool | None:
        context = CONTEXT.get()
        return True if context is not None and context.name == "cond_uncond" else self.around.guided()

    def _frame(self, turn: Turn) -> Frame:
        """The codes of all sites; those of equal decisions are laid out once."""
        partition = turn.branch.partition
        by_group = tuple(
            _code(decision, self.layout.keepings[group.sites[0]], turn.store)
            for decision, group in zip(turn.decisions, partition.groups, strict=True)
        )
        key = (partition is self.layout.program.coarse, by_group)
        codes = self.layout.codes.get(key)
        if codes is None:
            if len(self.layout.codes) >= _MOST_SIGNATURES:
                self.layout.codes.clear()
            codes = self.layout.codes[key] = [by_group[group] for group in partition.group_of]
        return Frame(self, codes, turn.branch.slots, turn, turn.tick.step)

    def surprised(self) -> None:
        """A site found itself in a graph: from the next call on there is a stage for it."""
        self.graphs.surprised = True

    def end(self, call: RootCall, output: Any) -> Any:
        """Commit what the call did: memories, counts and the trace."""
        turn, state = call.turn, call.state
        site = self.handles[""]
        if self.layout.itself is not None and not call.answered and call.guidance is None:
            turn.shut(site, self.module, call.arguments.named, call.args, call.kwargs, output)
        if call.guidance is not None and not call.answered:
            output = state.guide.ended(
                turn.tick, call.arguments, call.guidance, output, self.channels, halved=turn.halved
            )
        if site.outputs:
            turn.leave(site, self.module, call.arguments.named, output, None)
        if call.parts:
            self.graphs.end(turn, call.parts)
        turn.close(call.frame.unfit)
        if call.learns:
            self.graphs.learnt(turn, call.arguments)
        turn.branch.memories = turn.after
        if self.layout.followed:
            state.decided[turn.tick.branch] = turn.branch.partition.spread(turn.decisions)
        state.calls += 1
        if not state.reused:
            state.reused = any(decision.verdict == "reuse" for decision in turn.decisions)
        if state.reused and torch.is_grad_enabled():
            self.keeps_graphs = True
        if state.trajectory is not None and len(state.trajectory.calls) < _MOST_CALLS:
            state.trajectory.calls.append(self._recorded(call, len(state.trajectory.calls)))
        with self._lock:
            self.active -= 1
        return output

    def _recorded(self, call: RootCall, number: int) -> Call:
        """The call as the trace has it."""
        turn = call.turn
        profiled = self.around.told.trace == "profile"
        return Call(
            turn.tick,
            turn.branch.partition,
            turn.decisions,
            turn.facts,
            (now() if profiled else time.perf_counter()) - turn.started,
            turn.signals_of,
            began=turn.started,
            profile=call.frame.profile if number < _MOST_PROFILED else (),
        )

    def fail(self, call: RootCall, error: BaseException) -> None:
        """Leave the session as if the trajectory had not been; a policy that the model refutes takes the run off."""
        with self._lock:
            self.active -= 1
        self._forget(call.key, call.state, error)

    def refuse_recompute(self, name: str) -> None:
        """Refuse a site that gradient checkpointing runs again; what it answered is not known any more.

        Raises:
            PolicyError: the call is in a backward pass (E342).
        """
        if neighbours.recomputes():
            neighbours.refuse_recompute(name)

    def _forget(self, key: Hashable, state: State, error: BaseException) -> None:
        with self._lock:
            self._states.pop(key, None)
        if state.trajectory is not None and self.around.trace is not None:
            self.around.trace.drop(state.trajectory)
        state.abandon()
        if isinstance(error, PolicyError) and any(each.code in _REFUTED for each in error.diagnostics):
            self.around.refuted()


_REFUTED = frozenset({"E310", "E311"})  # what the first forward tells of the model, whatever the next one would
_FACTORS = frozenset({"low", "high"})
"""What the rebuilding of a step is told, and a computed step does not ask for."""

_MOST_CALLS = 10_000  # of one trajectory in the trace; a model that tells no time may never end one
_MOST_PROFILED = 1_000  # of those, with the times of their modules
_MOST_SIGNATURES = 256  # distinct sets of decisions whose codes are kept laid out


@dataclass(slots=True)
class RootCall:
    """One call of a root, between its decision and its end; `args` and `kwargs` are what the root is run with."""

    key: Hashable
    state: State
    turn: Turn
    arguments: Arguments
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: Frame = field(init=False)
    answered: bool = False
    output: Any = None
    guidance: dict[str, Any] | None = None
    learns: bool = False
    parts: Mapping[int, Part] = field(default_factory=dict[int, Part])


def _code(decision: Decision, what: Keeping, store: str) -> str:
    """What a site does at this call."""
    if decision is WAITING:
        return PENDING
    if decision.verdict != "reuse":
        return store if what.outputs else COMPUTE
    return REUSE if isinstance(decision.action, ir.Reuse) else ANSWER


def _channels(module: torch.nn.Module) -> int | None:
    """How many channels the prediction has, where the model's config says so."""
    config = getattr(module, "config", None)
    for name in ("out_channels", "in_channels", "out_visual_dim", "in_visual_dim"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _why_nothing(state: State) -> str:
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
    if asyncio._get_running_loop() is not None:  # noqa: SLF001 (asyncio documents it for frameworks)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUnknownMemberType]
        task = asyncio.current_task()
        if task is not None:
            return _TASKS.setdefault(task, _Token())
    return _THREAD.token


class _Token:
    """Stands for one task or thread as long as it lives; numbers of dead ones are given again."""

    __slots__ = ("__weakref__",)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.token = _Token()


_THREAD = _Thread()
_TASKS: weakref.WeakKeyDictionary[Any, _Token] = weakref.WeakKeyDictionary()
