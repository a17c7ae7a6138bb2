"""A root model of a run: finds the session of a forward pass, decides its sites and commits its results."""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import torch

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES, distilled_by
from cachepolicy.engine import compat
from cachepolicy.engine.actions import (
    ANSWER,
    COMPUTE,
    PENDING,
    REUSE,
    Slot,
)
from cachepolicy.engine.audit import Audit, Audits
from cachepolicy.engine.block_chain import Continuations
from cachepolicy.engine.cfg_branches import Calls
from cachepolicy.engine.cfg_cache import Guide, Problem
from cachepolicy.engine.class_swap import Handle, plain
from cachepolicy.engine.clock import CONTEXT, CallArguments, Clock, Reading, Sources, arguments_of, inspect_root, read
from cachepolicy.engine.compile.graph_ops import Part
from cachepolicy.engine.compile.regions import Graphs
from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.groups import Peers, holders_of, peers_of
from cachepolicy.engine.execution_plan import ExecutionPlan
from cachepolicy.engine.forward_pass import Branch, ForwardPass
from cachepolicy.engine.gradients import GradientGuard
from cachepolicy.engine.guidance_batch import GuidanceSource
from cachepolicy.engine.history import held, storage_bytes
from cachepolicy.engine.history_storage import ANYHOW, Saving, Storing
from cachepolicy.engine.hooks import AGAIN, Frame, SiteHandle, parameters_of, runs
from cachepolicy.engine.introspection import modules_by_path
from cachepolicy.engine.memory_budget import Account, Budget, Lease
from cachepolicy.engine.meta_forward import forms_of
from cachepolicy.engine.profiling import now
from cachepolicy.engine.session_config import SessionConfig
from cachepolicy.engine.sessions import Entered, Session, Sessions, State
from cachepolicy.engine.signals import Measuring, Remembered
from cachepolicy.engine.streams import layout_of
from cachepolicy.engine.tuned_for import TunedFor
from cachepolicy.errors import PolicyError, counted, warn
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined
from cachepolicy.planning.cost_model import Reuses, Weight, operations, site_weights
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import (
    OVER_LIMIT,
    REPEATED,
    RERUN,
    UNDEFINED_ARGUMENT,
    WAITING,
    Decision,
    Tick,
    rebuilds_uncond,
    untold,
)
from cachepolicy.reports.nothing_reused import why_nothing_was_reused
from cachepolicy.tracing.trace import CallRecord, Trace

DISABLED: ContextVar[frozenset[int]] = ContextVar("cachepolicy_disabled", default=frozenset())


@dataclass(frozen=True, slots=True)
class RootContext:
    """Callbacks and settings that a run passes to each of its root models."""

    sources: Callable[[SessionConfig, Entered | None], Sources]
    guidance: Callable[[SessionConfig, Entered | None, Sources], GuidanceSource]
    refuted: Callable[[], None]
    settle: Callable[[RootModel], None]
    intercept: Callable[[RootModel, str, SiteHandle], None]
    sessions: Sessions
    session_config: SessionConfig
    trace: Trace | None
    storing: Storing
    budget: Budget | None
    audits: Audits


@dataclass(slots=True)
class PassContext:
    """A root model under the settings of one session."""

    execution: ExecutionPlan
    continuations: Continuations
    externals: Mapping[str, Any]
    module: torch.nn.Module
    repeated: set[int]
    remeasured: set[ir.Probe]
    graphs: Graphs


class RootModel(Handle):
    """A root model of a run: a denoiser with its plan, its sites and its sessions."""

    def __init__(self, run: Any, name: str, module: torch.nn.Module, context: RootContext) -> None:
        self.run = run
        self.name = name
        self.module = module
        self.context = context
        self.execution = context.session_config.executions[name]
        self.plan = self.execution.plan
        self.root = inspect_root(module)
        self.channels = _channels(module)
        self.identity = next(_identities)
        self.active = 0
        self.closed = False
        self.continuations = Continuations()
        self.repeated: set[int] = set()
        self.remeasured: set[ir.Probe] = set()
        self.keeps_graphs = False
        self._gradients = GradientGuard(module)
        self.expects_calls = True
        self.switches = compat.checkpointing(module)
        self.tuned_for = TunedFor(self.plan.resolved, module) if self.plan.resolved.tuned else None
        self.handles = self._handles()
        self.graphs = Graphs(self)
        self._lock = threading.Lock()
        self._deriving = threading.Lock()
        self._derived = False
        self._warned = False
        self._warned_of_repeats = False
        self._reuses: dict[Ahead, Reuses] = {}

    def _handles(self) -> dict[str, SiteHandle]:
        """Build the `Site` of each intercepted module, by module name. The root model has the name ""."""
        handles = dict[str, SiteHandle]()

        def at(name: str) -> SiteHandle:
            if name not in handles:
                handles[name] = SiteHandle(self, name or "model", parameters_of(self.module.get_submodule(name)))
            return handles[name]

        at("")
        for site in sorted(self.plan.sites, key=lambda site: len(site.parents)):
            keeping = self.execution.keepings[site.index]
            if keeping.streams:
                for position, name in enumerate(site.modules):
                    at(name).members.append((site.index, position))
            if len(site.modules) == 1:
                handle = at(site.modules[0])
                handle.index, handle.keeping = site.index, keeping
                handle.plain = keeping.plain and self.context.storing is ANYHOW
        for probe, location in self.plan.probes.items():
            before = probe.stream in {"input", "argument"}
            handle = at(location.modules[0 if before else -1])
            (handle.inputs if before else handle.outputs).append(probe)
            if len(location.modules) > 1:
                at(location.modules[0]).starts.append(probe)
        if any(keeping.streams for keeping in self.execution.keepings) or self.plan.probes:
            # All blocks are watched: their calls show which output becomes which input.
            for name in self.plan.skeleton.block_lists:
                for block in self.plan.skeleton.elements[name]:
                    at(block).special = True
        for handle in handles.values():
            handle.special |= handle.watched
            handle.alone = (
                len(handle.members) == 1
                and not (handle.inputs or handle.outputs or handle.starts)
                and handle.index in {-1, handle.members[0][0]}
            )
        return handles

    def finished(self, state: State) -> None:
        """Handle the end of a trajectory: warn once per root model if it has reused nothing."""
        if state.count > 1 and not state.reused and not self._warned:
            self._warned = True
            warnings.warn(_why_nothing(state, self.module), UserWarning, stacklevel=2)

    def drop_current(self) -> None:
        """End the session of the current call, because its trajectory has ended."""
        self.context.sessions.end_current()

    # --- one call ----------------------------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool = False) -> RootCall | None:
        """Read the clock, decide the sites and build the frame of a forward pass.

        Args:
            args: Positional arguments of the forward pass.
            kwargs: Keyword arguments of the forward pass.
            compiler: Whether the root model is compiled as a whole.

        Returns:
            The call, or None where the model runs without the policy.
        """
        if self.identity in DISABLED.get() or compat.traced():
            return None
        compat.refuse_call(self.switches)
        with self._lock:
            if self.closed:
                return None
            # `close` reads the counter under the same lock, so hooks are not removed during a forward pass.
            self.active += 1
        try:
            session, here = self.context.sessions.begin()
            try:
                return self._call(session, here, args, kwargs, compiler=compiler)
            except BaseException as error:
                self._forget(session, error)
                raise
        except BaseException:
            with self._lock:
                self.active -= 1
            raise

    def runs_alone(self, site: SiteHandle, module: torch.nn.Module) -> None:
        """Warn once that a site runs outside any call of the root model, where the policy has no effect (W601)."""
        if site.index < 0 and not site.members:
            return  # a probed embedding may be called ahead of the loop
        with self._lock:
            if self.active or self.closed or not self.expects_calls:
                return
        if self.identity in DISABLED.get() or compat.traced() or compat.recomputes():
            return
        if self.module.get_submodule(site.name) is not module:
            return  # a replica
        if _is_running(self.module):
            return  # the call began before the policy was attached
        self.expects_calls = False
        warn(
            "W601",
            f"`{site.name}` runs outside any call of its `{type(self.module).__name__}`, where the policy does nothing",
            help="a loop of your own over the blocks needs `with run.step(t=..., branch=...):` around each evaluation",
        )

    def refuse_step(self) -> None:
        """Reject a step context for a policy that needs the inputs or the output of the root model.

        Raises:
            PolicyError: A rule or a probe is on the model itself, or a call is running (E324).
        """
        if runs(self):
            raise PolicyError.of(
                "E324",
                f"`run.step` is inside a call of `{type(self.module).__name__}`, or inside another `run.step`",
                help="leave one of them out: each is an evaluation of the model",
            )
        if self.execution.itself is not None or self.handles[""].special:
            raise PolicyError.of(
                "E324",
                "the policy has a rule or a probe on the model itself, and `run.step` cannot answer or see its calls",
                help="call the model's own `forward`, or select its blocks",
            )

    def close(self) -> bool:
        """Stop accepting calls, before the hooks are removed. Return False while a call is running."""
        with self._lock:
            self.closed = not self.active
            return self.closed

    def reopen(self) -> None:
        """Accept calls again."""
        with self._lock:
            self.closed = False

    def _call(
        self, session: Session, here: Entered | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool
    ) -> RootCall:
        session_config = self._terms(session, here)
        state = session.states.get(self.name)
        if state is None:
            state = session.states[self.name] = State(self._hosted(session_config))
            state.account = None if self.context.budget is None else Account(self.context.budget)
        arguments = arguments_of(self.root, args, kwargs)
        sources = self.context.sources(session_config, here)
        context = CONTEXT.get()
        before = None if context is None or not context.own else (copy.copy(session.clock), state.calls.copy())
        reading = self._read(session, state, sources, arguments)
        if session.goes_on(reading.tick):
            self.context.sessions.continues(session)
        if reading.starts:
            self.context.settle(self)
            self._start(session, state, reading.tick)
            if self.tuned_for is not None:
                skipped = 0 if session.clock.before else session.clock.begin
                pipeline = self.context.guidance(session_config, here, sources).pipeline
                latents = arguments.named.get(arguments.latents or "")
                self.tuned_for.compare_run(sources, reading.tick.steps, skipped, latents, pipeline)
        self._derive(state.host.execution, args, kwargs)
        forward_pass = self._new_pass(session_config, state, reading)
        call = RootCall(session, state, reading, forward_pass, arguments, args, kwargs, before)
        crosses = bool(forward_pass.host.execution.signals.crossed)
        if forward_pass.host.execution.approximation is not None or crosses:
            call.source = self.context.guidance(session_config, here, sources)
        self._describe(call)
        self._open(call)
        if state.audited:
            call.compares = call.answered or forward_pass.halved
            call.learns = self.graphs.used(whole=compiler)  # the answers are compared outside graphs
        elif self.graphs.used(whole=compiler) and not call.answered:
            call.learns = self.graphs.learns(arguments)
            if not call.learns:
                call.parts = self.graphs.parts(forward_pass, arguments, whole=compiler)
        call.frame = self._frame(forward_pass)
        if call.parts:
            self.graphs.place(call.frame, call.parts, whole=compiler)
        return call

    def _derive(self, execution: ExecutionPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Derive once what the spans with a `skip` return, so that they need no compute to show it."""
        if self._derived or not execution.skipped or not (args or kwargs):
            return
        with self._deriving:
            if self._derived:
                return
            for span, form in forms_of(self.module, (args, kwargs), execution.skipped).items():
                endings = {position: ending for position, ending in enumerate(form.endings) if ending is not None}
                self.continuations.keep_links(span, dict(enumerate(form.links)), endings)
                self.graphs.forms.setdefault(span, form)
            self._derived = True

    def _terms(self, session: Session, here: Entered | None) -> SessionConfig:
        if session.session_config is None:
            outer = here.session_config if here is not None and here.of(self.context.sessions) else None
            session.session_config = outer or self.context.session_config
        return session.session_config

    def _read(self, session: Session, state: State, sources: Sources, arguments: CallArguments) -> Reading:
        try:
            return read(session.clock, state.calls, sources, self.root, arguments)
        except BaseException:
            # The clock failed, so it is unknown whether a trajectory begins here. Peers would wait for this process in
            # a collective, so this process reports that it has stopped.
            for peers in self._others(state.host.execution, known=True):
                if peers is not None:
                    Agreement(peers, "").abandon()
            raise

    def _new_pass(
        self, session_config: SessionConfig, state: State, reading: Reading, *, again: bool = False
    ) -> ForwardPass:
        """Create the forward pass on its guidance branch, with its decisions. `again` lets every site compute."""
        execution, tick = state.host.execution, reading.tick
        if execution.approximation is not None and tick.branch in COND_BRANCHES:
            for name in UNCOND_BRANCHES & state.branches.keys():
                other = state.branches[name]
                alone = rebuilds_uncond(execution.program, other.partition, other.memories, replace(tick, branch=name))
                tick = replace(tick, uncond_skipped=alone)
        if tick.step != state.step:
            state.decided.clear()
            state.doubted.clear()
            state.step = tick.step
        branch, facts = self._emptied(state, tick, reading, RERUN) if again else self._branch(state, tick, reading)
        leaders = {name: state.decided[name] for name in execution.followed if name in state.decided}
        if state.account is not None:
            state.account.give_way()
            facts |= {site: OVER_LIMIT for site, slot in enumerate(branch.slots) if slot.storing.lacking is OVER_LIMIT}
        facts |= dict.fromkeys(self.repeated, REPEATED)
        liveness = self._liveness(state, reading.ahead)
        measuring = None
        # Another branch may read what this one measures.
        measures = bool(execution.signals.crossed) or liveness.measures(tick, now=True)
        if execution.signals.numbers and measures:
            worst = session_config.options.samples == "max"
            measuring = Measuring(
                execution.signals,
                branch.remembered,
                tick,
                execution.program.tables,
                memory_of=lambda site: branch.memories[branch.partition.group_of[site]],
                others=lambda name: state.branches[name].remembered if name in state.branches else None,
                worst=worst,
                agreement=state.agreement,
                undefined=self.remeasured,
            )
        audit = Audit() if state.audited else None
        return ForwardPass(state.host, branch, tick, leaders, measuring, facts, liveness, state.company, audit)

    def _liveness(self, state: State, ahead: Ahead) -> Liveness:
        """Return what later steps may read. The result is cached until the clock's forecast changes."""
        loose, liveness = bool(self.repeated) or self.context.budget is not None, state.liveness
        if liveness is None or liveness.outlooks.ahead is not ahead or liveness.outlooks.loose is not loose:
            liveness = state.liveness = state.host.execution.liveness(ahead, loose=loose)
        return liveness

    def _branch(self, state: State, tick: Tick, reading: Reading) -> tuple[Branch, dict[int, str]]:
        """Return the branch of a call, and per site the reason where its history does not fit."""
        if reading.revives is not None and reading.revives in state.doubted:
            state.branches[tick.branch] = state.doubted.pop(reading.revives)
        branch = state.branches.get(tick.branch)
        if branch is not None and not (reading.stale or reading.doubtful):
            return branch, {}
        if branch is None:
            execution, slots = state.host.execution, self._slots(state, tick, reading)
            state.branches[tick.branch] = Branch(execution.program.coarse, execution.recall.start, slots)
            return state.branches[tick.branch], {}
        # The shapes have changed, or the branch is uncertain: the history is discarded, the memories stay. An uncertain
        # branch is kept aside, in case the call turns out to be of another branch.
        if tick.branch in state.calls.doubted:
            state.doubted[tick.branch] = branch
        reason = "the history does not fit this call" if reading.stale else "nothing tells which branch this is"
        return self._emptied(state, tick, reading, reason)

    def _emptied(self, state: State, tick: Tick, reading: Reading, reason: str) -> tuple[Branch, dict[int, str]]:
        """Return the branch of a call without its history, and per site the reason why it computes."""
        branch, slots = state.branches[tick.branch], self._slots(state, tick, reading)
        state.branches[tick.branch] = Branch(branch.partition, branch.memories, slots)
        state.guide = Guide()
        return state.branches[tick.branch], dict.fromkeys(range(len(slots)), reason)

    def _slots(self, state: State, tick: Tick, reading: Reading) -> list[Slot]:
        """Return an empty history for each site of a branch."""
        return [Slot(storing) for storing in self._storings(state, tick, reading.ahead)]

    def _storings(self, state: State, tick: Tick, ahead: Ahead) -> list[Storing]:
        """Return how each site of a branch stores its results."""
        storing = self.context.storing
        if state.account is None:
            return [storing] * len(self.plan.sites)
        program = state.host.execution.program
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
            Storing(storing.packing, state.account, saving(site), keeping.depth)
            for site, keeping in enumerate(state.host.execution.keepings)
        ]

    @cached_property
    def weights(self) -> list[Weight]:
        """The compute weight of each site."""
        counts = {
            path: sum(parameter.numel() for parameter in module.parameters(recurse=False))
            for path, module in modules_by_path(self.module).items()
        }
        return site_weights(self.plan, counts)

    def _hosted(self, session_config: SessionConfig) -> PassContext:
        execution, externals = session_config.executions[self.name], session_config.options.externals
        return PassContext(
            execution, self.continuations, externals, self.module, self.repeated, self.remeasured, self.graphs
        )

    def _start(self, session: Session, state: State, tick: Tick) -> None:
        """Start a trajectory: release the state of the last one on all root models of the session."""
        for other in session.states.values():
            if other is state or other.calls.trajectory != session.clock.trajectories:
                self.finished(other)
                other.clear()
        self.graphs.look()
        if session.drawn != session.clock.trajectories:
            options = (session.session_config or self.context.session_config).options
            session.drawn = session.clock.trajectories
            session.audited = self.context.audits.draws(options.audit, options.audit_seed)
        state.audited = session.audited
        trace, plan = self.context.trace, state.host.execution.plan
        state.trajectory = trace.begin(session.key, plan, audited=state.audited) if trace is not None else None
        self._meet(state)
        error = untold(plan, tick)
        if error is not None:
            raise error

    def _meet(self, state: State) -> None:
        """Find the processes that decide together with this one.

        The search runs at each trajectory, because a model can be parallelized after `apply`.
        """
        execution = state.host.execution
        policy = f"{execution.plan.resolved.digest} {self.context.session_config.options.samples}"
        peers, holders = self._others(execution)
        state.agreement = Agreement(peers, policy) if peers is not None else None
        state.company = Agreement(holders, policy) if holders is not None else None

    def _others(self, execution: ExecutionPlan, *, known: bool = False) -> tuple[Peers | None, Peers | None]:
        """Return the processes that share the samples, and those that share only sharded parameters."""
        group = self.context.session_config.options.process_group
        if not execution.signals.numbers or group is False:
            return None, None
        peers = peers_of(group, self.module, known=known)
        holders = holders_of(self.module, known=known)
        among = peers is not None and holders is not None and set(holders.ranks) <= set(peers.ranks)
        return peers, None if among else holders

    def _describe(self, call: RootCall) -> None:
        """Tell the signals of a call what its arguments show: the grids of its tokens, and the halves of its batch."""
        measuring, arguments = call.forward_pass.measuring, call.arguments
        if measuring is None:
            return
        latents = arguments.named.get(arguments.latents or "")
        if call.forward_pass.host.execution.signals.reads_layout:
            patch = getattr(getattr(self.module, "config", None), "patch_size", None)
            measuring.layout = layout_of(arguments.named, latents, patch)
        guide = call.state.guide
        if call.forward_pass.host.execution.signals.crossed and not guide.named(call.forward_pass.tick.branch):
            rows = guide.rows(arguments, call.source, self.module)
            measuring.rows = rows
            if rows is not None:
                measuring.cond = int(call.source.layout("found", self.module) != "cond first")

    def _open(self, call: RootCall) -> None:
        """Handle the root model itself, where it is a site or has probes."""
        site, forward_pass = self.handles[""], call.forward_pass
        execution = forward_pass.host.execution
        if not site.special and execution.itself is None:
            return
        forward_pass.enter(site, call.arguments.named, call.args, call.kwargs)
        if execution.itself is None:
            return
        problem = forward_pass.problem(site, call.arguments.named, call.args, call.kwargs)
        decision = forward_pass.decision(execution.itself, problem)
        action = decision.action if isinstance(decision.action, ir.ApproximateUncond) else None
        if execution.approximation is not None and (action is not None or decision.verdict != "reuse"):
            self._open_guidance(call, action or execution.approximation)
        if not (call.answered or forward_pass.halved):
            # Another rule may reuse the model at a later step.
            call.answered, call.output = forward_pass.open(site, call.arguments.named, call.args, call.kwargs)

    def _open_guidance(self, call: RootCall, action: ir.ApproximateUncond) -> None:
        forward_pass = call.forward_pass
        itself = forward_pass.host.execution.itself
        assert itself is not None
        settings = forward_pass.arguments(action, itself, without=_FACTORS)
        guide = call.state.guide
        settings.setdefault("layout", "found")
        if not guide.named(forward_pass.tick.branch) and call.source.require():
            settings["layout"] = call.source.layout(settings["layout"], self.module)
        forward_pass.half = int(settings["layout"] != "cond first")
        call.guidance = settings
        problem = guide.problem(
            forward_pass.tick, call.arguments, call.source, self.module, calls=len(call.state.calls.present)
        )
        factors = dict[str, Any]()
        if problem is None and forward_pass.decision(itself).verdict == "reuse":
            try:
                factors = forward_pass.arguments(action, itself)
            except Undefined:
                problem = Problem(UNDEFINED_ARGUMENT, final=False)
        if problem is not None:
            call.guidance = None if problem.final else settings
            if forward_pass.decision(itself).verdict == "reuse":
                # The sites inside keep their own histories, so they may still reuse.
                forward_pass.facts[itself] = problem.reason
                forward_pass.decide_again()
        elif forward_pass.decision(itself).verdict == "reuse":
            if itself in forward_pass.signals_of:
                # The other sites were decided before the signals of this one were measured.
                forward_pass.decide_again()
            settings |= {name: factors[name] for name in _FACTORS}
            if guide.named(forward_pass.tick.branch):
                call.answered, call.output = True, guide.answered(settings)
            else:
                forward_pass.halved = True
                call.args, call.kwargs = guide.halved(call.arguments, call.args, settings)

    def _frame(self, forward_pass: ForwardPass) -> Frame:
        """Build the frame with the codes of all sites. Codes of equal decisions are cached."""
        partition, execution = forward_pass.branch.partition, forward_pass.host.execution
        by_group = tuple(
            _code(decision, forward_pass, group.sites[0])
            for decision, group in zip(forward_pass.decisions, partition.groups, strict=True)
        )
        key = (partition is execution.program.coarse, by_group)
        codes = execution.codes.get(key)
        if codes is None:
            if len(execution.codes) >= _MOST_SIGNATURES:
                execution.codes.clear()
            codes = execution.codes[key] = [by_group[group] for group in partition.group_of]
        return Frame(self, codes.copy(), forward_pass.branch.slots, forward_pass, forward_pass.tick.step)

    def surprised(self) -> None:
        """Record that a site ran in a graph without a stage. The next call prepares one."""
        self.graphs.surprised = True

    def end(self, call: RootCall, output: Any) -> Any:
        """Commit the forward pass: memories, counts and trace. Return its output, or `AGAIN`."""
        forward_pass, state = call.forward_pass, call.state
        if call.parts:
            self.graphs.look_for_repeats(forward_pass, call.parts)
        if forward_pass.again:
            return AGAIN
        # A graph does not tell which of its sites have run.
        unmarked = call.answered or call.parts
        uncalled = [] if unmarked else forward_pass.uncalled(call.frame.codes, self.handles)
        if call.before is not None and len(uncalled) == len(self.plan.sites) > 0:
            self._undo(call, *call.before)
            return output
        site = self.handles[""]
        if forward_pass.host.execution.itself is not None and not (call.answered or forward_pass.halved):
            forward_pass.shut(site, self.module, call.arguments.named, call.args, call.kwargs, output)
        if call.guidance is not None and not call.answered and self._guides(call):
            output = state.guide.ended(
                forward_pass.tick, call.arguments, call.guidance, output, self.channels, halved=forward_pass.halved
            )
        errors: Mapping[int, float] = {}
        if forward_pass.audit is not None:
            errors = self._compared(call, forward_pass.audit, output)
            output = call.computed if call.compares else output
        if site.outputs:
            forward_pass.leave(site, self.module, call.arguments.named, output, None)
        if call.parts:
            self.graphs.end(forward_pass, call.parts)
        forward_pass.close(call.frame.unfit, uncalled)
        if (
            torch.is_grad_enabled()
            and self.context.session_config.options.gradients == "refuse"
            and any(decision.verdict == "reuse" for decision in forward_pass.decisions)
        ):
            self._gradients.check(call.args, call.kwargs)
        if call.learns:
            self.graphs.learnt(forward_pass, call.arguments)
        forward_pass.branch.memories = forward_pass.after
        if (self.repeated or self.remeasured) and not self._warned_of_repeats:
            self._warn_of_repeats()
        self._release(call)
        if forward_pass.host.execution.followed:
            state.decided[forward_pass.tick.branch] = forward_pass.branch.partition.spread(forward_pass.decisions)
        state.count += 1
        if not state.reused:
            state.reused = any(decision.verdict == "reuse" for decision in forward_pass.decisions)
        # A reused result may now be part of an autograd graph: sites then check for gradient checkpointing, which would
        # run them again in the backward pass.
        if state.reused and torch.is_grad_enabled():
            self.keeps_graphs = True
        if state.trajectory is not None and len(state.trajectory.calls) < _MOST_CALLS:
            state.trajectory.calls.append(self._recorded(call, len(state.trajectory.calls), errors))
        if forward_pass.tick.steps is not None and forward_pass.tick.step + 1 >= forward_pass.tick.steps:
            self._over(call)
        with self._lock:
            self.active -= 1
        call.session.leave()
        return output

    def _compared(self, call: RootCall, audit: Audit, output: Any) -> dict[int, float]:
        """Return the error of each answer of an audited call by site number, and add them to those of the run."""
        itself = call.forward_pass.host.execution.itself
        if call.compares and itself is not None:
            audit.compare(itself, output, call.computed)
        errors = audit.errors()
        prefix = f"{self.name}: " if len(self.run.plans) > 1 else ""
        named = {f"{prefix}{self.plan.sites[site].name}": error for site, error in errors.items()}
        self.context.audits.add(call.forward_pass.tick.step, named)
        return errors

    def _undo(self, call: RootCall, clock: Clock, calls: Calls) -> None:
        """Undo a `run.step` in which no site was called: it was no evaluation of the model."""
        with self._lock:
            self.active -= 1
        if call.reading.starts:
            self._forget(call.session, None)
            return
        call.session.clock, call.state.calls = clock, calls
        call.session.leave()

    def again(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RootCall:
        """Prepare a forward pass anew, in which every site computes.

        A site had answered before the forward pass called it once more. What it answered with is the result of a
        forward pass that called it once, so neither that answer nor what followed from it can stand.

        Args:
            call: The call whose output is discarded.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            PolicyError: The model has written into its arguments, so that it cannot run again (E342).
        """
        self._require_intact(call.state, call.forward_pass.tick)
        session_config = call.session.session_config or self.context.session_config
        forward_pass = self._new_pass(session_config, call.state, call.reading, again=True)
        forward_pass.started = call.forward_pass.started
        anew = RootCall(call.session, call.state, call.reading, forward_pass, call.arguments, args, kwargs)
        anew.source = call.source
        self._open(anew)
        anew.frame = self._frame(forward_pass)
        return anew

    def _require_intact(self, state: State, tick: Tick) -> None:
        known = state.calls.known[tick.branch]
        if known.conditioning.overwritten or known.latents.overwritten:
            self.refuse_again("the model wrote into its own arguments")

    def refuse_again(self, reason: str) -> NoReturn:
        """Reject a forward pass that has to run again and cannot.

        Raises:
            PolicyError: Always (E342).
        """
        raise PolicyError.of(
            "E342",
            f"one forward calls {self._repeated_modules()} more than once, which was noticed after the policy had "
            f"answered, and it cannot run again, because {reason}",
            help="these modules compute from the next call on; select modules that run once to avoid this",
        )

    def _repeated_modules(self) -> str:
        """Return the modules that one forward calls more than once, as text."""
        sites = [self.plan.sites[site].name for site in sorted(self.repeated)]
        probed = [self.plan.probes[probe].modules[0] or "model" for probe in self.remeasured]
        names = list(dict.fromkeys([*sites, *probed]))
        rest = f" and {counted(len(names) - 3, 'other')}" if names[3:] else ""
        return ", ".join(f"`{name}`" for name in names[:3]) + rest

    def _warn_of_repeats(self) -> None:
        """Warn once that sites compute because one forward pass calls them more than once (W604)."""
        self._warned_of_repeats = True
        warn(
            "W604",
            f"one forward of `{plain(type(self.module)).__name__}` calls {self._repeated_modules()} more than once, "
            "and a history holds one result of a forward: what is selected or measured there computes at every step",
            help="select modules that one forward calls once",
        )

    def _recorded(self, call: RootCall, number: int, errors: Mapping[int, float]) -> CallRecord:
        """Return the trace entry of the call."""
        forward_pass = call.forward_pass
        profiled = self.context.session_config.options.trace == "profile"
        return CallRecord(
            forward_pass.tick,
            forward_pass.branch.partition,
            forward_pass.decisions,
            forward_pass.facts,
            (now() if profiled else time.perf_counter()) - forward_pass.started,
            forward_pass.signals_of,
            held=self.held(call.state),
            began=forward_pass.started,
            profile=call.frame.profile if number < _MOST_PROFILED else (),
            errors=errors,
        )

    def _release(self, call: RootCall) -> None:
        """Release the history that no later step of the trajectory reads, and count the rest."""
        forward_pass, state = call.forward_pass, call.state
        if forward_pass.host.execution.approximation is not None:
            to_come = self._uncond_to_come(call)
            state.guide.release(
                kept=not forward_pass.liveness.approximates(forward_pass.tick, now=to_come),
                cond=forward_pass.tick.branch in UNCOND_BRANCHES,
            )
        changed = forward_pass.let_go()
        if state.account is not None:
            self._limit(state, forward_pass.branch, state.account)
        if changed:
            forward_pass.branch.held = held(forward_pass.branch.slots, forward_pass.branch.remembered)

    def _limit(self, state: State, branch: Branch, account: Account) -> None:
        """Apply the memory limit to the state of signals and guidance. Rules that lose this state compute."""
        if branch.remembered:
            branch.signals = branch.signals or Lease(account)
            if not branch.signals.admits(held((), branch.remembered)):
                branch.remembered = Remembered()
        else:
            branch.signals = None
        kept = state.guide.held if state.host.execution.approximation is not None else []
        if kept:
            state.rebuilding = state.rebuilding or Lease(account)
            state.guide.limit(admitted=state.rebuilding.admits(storage_bytes(kept)))
        else:
            state.rebuilding = None

    def _guides(self, call: RootCall) -> bool:
        """Return whether this or a later step rebuilds an unconditional half from this prediction."""
        forward_pass, branch = call.forward_pass, call.forward_pass.tick.branch
        if forward_pass.halved:
            return True
        if branch in COND_BRANCHES:
            return self._uncond_to_come(call) and forward_pass.liveness.approximates(forward_pass.tick, now=True)
        return forward_pass.liveness.approximates(forward_pass.tick, now=False)

    def _uncond_to_come(self, call: RootCall) -> bool:
        """Return whether an unconditional call of its own may follow in this step."""
        named = call.forward_pass.tick.branch in COND_BRANCHES or UNCOND_BRANCHES & call.state.branches.keys()
        return bool(named) and UNCOND_BRANCHES.isdisjoint(call.state.calls.present)

    def held(self, state: State) -> int:
        """Return the bytes of history that the session holds on this root model."""
        guide = storage_bytes(state.guide.held) if state.host.execution.approximation is not None else 0
        branches = [*state.branches.values(), *state.doubted.values()]
        return guide + sum(branch.held for branch in branches)

    def _over(self, call: RootCall) -> None:
        """Release the history of a branch, and of earlier root models, after the last step."""
        state, tick = call.state, call.forward_pass.tick
        state.over = True
        crossed = call.forward_pass.branch.remembered.crossed
        call.forward_pass.branch.forget()
        if len(state.calls.present) < len(state.branches):
            # The other branches have not run in this step.
            call.forward_pass.branch.remembered.crossed = crossed
        elif crossed:
            for branch in state.branches.values():
                branch.remembered = Remembered()
        if not self._uncond_to_come(call):
            state.guide = Guide()
        for other in call.session.states.values():
            if other.step < tick.step - 1:
                other.branches.clear()
                other.guide = Guide()

    def fail(self, call: RootCall, error: BaseException) -> None:
        """End the session after an exception.

        An error that shows that the policy does not fit the model (E310, E311) also removes the run.
        """
        with self._lock:
            self.active -= 1
        self._forget(call.session, error)

    def refuse_recompute(self, name: str) -> None:
        """Reject a site call that gradient checkpointing repeats, because its answer is no longer available.

        Args:
            name: The name of the site.

        Raises:
            PolicyError: The call is in a backward pass (E342).
        """
        if compat.recomputes():
            compat.refuse_recompute(name)

    def _forget(self, session: Session, error: BaseException | None) -> None:
        for _, state in session.end():
            if state.trajectory is not None and self.context.trace is not None:
                self.context.trace.drop(state.trajectory)
            state.abandon()
        session.leave()
        if isinstance(error, PolicyError) and any(diagnostic.code in _REFUTED for diagnostic in error.diagnostics):
            self.context.refuted()


_REFUTED = frozenset({"E310", "E311"})  # errors of the model itself, which every later forward pass would raise too
_FACTORS = frozenset({"low", "high"})
"""Arguments that only a rebuilt step reads. A computed step does not evaluate them."""

_MOST_CALLS = 10_000  # calls per trajectory in the trace, which bounds trajectories whose end is unknown
_MOST_PROFILED = 1_000  # calls per trajectory with the times of their modules
_MOST_CLOCKS = 32  # number of clock forecasts whose planned reuses are cached
_MOST_SIGNATURES = 256  # number of cached code lists, one per set of decisions


_NO_GUIDANCE_SOURCE = GuidanceSource()


@dataclass(slots=True)
class RootCall:
    """State of one root call between `begin` and `end`. The root model runs with `args` and `kwargs`.

    Attributes:
        compares: Whether the call is audited and the policy answers it or halves its batch. The bare model then runs
            first, and its output `computed` is what the call returns.
    """

    session: Session
    state: State
    reading: Reading
    forward_pass: ForwardPass
    arguments: CallArguments
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: tuple[Clock, Calls] | None = None
    """The clock and the calls before a `run.step`."""
    frame: Frame = field(init=False)
    answered: bool = False
    output: Any = None
    guidance: dict[str, Any] | None = None
    learns: bool = False
    compares: bool = False
    computed: Any = None
    parts: Mapping[int, Part] = field(default_factory=dict[int, Part])
    source: GuidanceSource = _NO_GUIDANCE_SOURCE


def _code(decision: Decision, forward_pass: ForwardPass, site: int) -> str:
    """Return the code of a site at this call. A result is stored only if a later step may read it."""
    if decision is WAITING or forward_pass.audit is not None:
        return PENDING
    if decision.verdict != "reuse":
        return forward_pass.store if forward_pass.wanted(site).outputs else COMPUTE
    return REUSE if isinstance(decision.action, ir.Reuse) else ANSWER


def _is_running(module: torch.nn.Module) -> bool:
    """Return True inside a call of a module in this thread, also one that began without the policy."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _CALLS and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


_CALLS = {getattr(torch.nn.Module, name).__code__ for name in ("__call__", "_call_impl")}


def _channels(module: torch.nn.Module) -> int | None:
    """Return the number of channels of the prediction from the model's config, or None."""
    config = getattr(module, "config", None)
    for name in ("out_channels", "in_channels", "out_visual_dim", "in_visual_dim"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _why_nothing(state: State, module: torch.nn.Module) -> str:
    length = counted(state.count, "call")
    if state.trajectory is None:
        return f"the policy reused nothing in a trajectory of {length}"
    distilled = distilled_by(getattr(module, "config", None)) is not None
    why = why_nothing_was_reused(state.trajectory, distilled=distilled)
    ts = [call.tick.t for call in state.trajectory.calls if call.tick.t is not None]
    seen = f" (t went from {ts[0]:g} to {ts[-1]:g})" if ts else ""
    return f"the policy reused nothing in a trajectory of {length}: {why or 'no rule allows it'}{seen}"


_identities = itertools.count()
