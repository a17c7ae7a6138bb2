"""A root model of a run: finds the session of a forward pass, decides its sites and commits its results."""

from __future__ import annotations

import copy
import itertools
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES, distilled_by
from cachepolicy.engine import compat, guidance_observer, module_run, step_effects
from cachepolicy.engine.audit import Audit, Audits
from cachepolicy.engine.block_chain import Continuations
from cachepolicy.engine.branch_storage import BranchStorage
from cachepolicy.engine.cfg_branches import Calls
from cachepolicy.engine.cfg_cache import Guide
from cachepolicy.engine.class_swap import Handle
from cachepolicy.engine.clock import CONTEXT, Clock, Reading, Sources, arguments_of, inspect_root, read
from cachepolicy.engine.compile.regions import Graphs
from cachepolicy.engine.distributed import meeting
from cachepolicy.engine.forward_pass import ForwardPass
from cachepolicy.engine.gradients import GradientGuard
from cachepolicy.engine.guidance_batch import GuidanceSource
from cachepolicy.engine.history import held
from cachepolicy.engine.hook_placement import Placement
from cachepolicy.engine.hooks import SiteHandle
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.memory_budget import Account, Budget
from cachepolicy.engine.profiling import now
from cachepolicy.engine.refusals import is_running, refuse_again, warn_of_lone_site, warn_of_repeats
from cachepolicy.engine.root_hooks import AGAIN
from cachepolicy.engine.session_config import SessionConfig
from cachepolicy.engine.sessions import Entered, Session, Sessions, State
from cachepolicy.engine.signals import Measuring, Remembered
from cachepolicy.engine.site_handles import handles_of, lone_blocks
from cachepolicy.engine.step_context import Branch, StepContext
from cachepolicy.engine.tuned_for import TunedFor
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.schedule import Decision, rebuilds_uncond, untold
from cachepolicy.reports.nothing_reused import why_nothing_was_reused
from cachepolicy.tracing.trace import Trajectory

if TYPE_CHECKING:
    from cachepolicy.engine.history_storage import Storing
    from cachepolicy.engine.run import Run

DISABLED: ContextVar[frozenset[int]] = ContextVar("cachepolicy_disabled", default=frozenset())
_identities = itertools.count()


class RootModel(Handle):
    """A root model of a run: a denoiser with its plan, its hooks, its clock and its sessions.

    Args:
        run: The run.
        name: The name of the denoiser in the pipeline.
        module: The denoiser.
        session_config: The settings of sessions without settings of their own.
        sessions: The sessions of the run.
        storing: How results are stored.
        budget: The memory limit of the run, or None.
        audits: The audited trajectories of the run.
    """

    def __init__(
        self, run: Run, name: str, module: torch.nn.Module, session_config: SessionConfig, sessions: Sessions,
        storing: Storing, budget: Budget | None, audits: Audits,
    ) -> None:  # fmt: skip
        self.run = run
        self.name = name
        self.module = module
        self.session_config = session_config
        self.sessions = sessions
        self.storing = storing
        self.budget = budget
        self.audits = audits
        self.execution = session_config.executions[name]
        self.root = inspect_root(module)
        self.channels = _channels(module)
        self.identity = next(_identities)
        self.active = 0
        self.closed = False
        self.continuations = Continuations()
        self.repeated: set[int] = set()
        """The sites that one forward pass calls more than once."""
        self.remeasured: set[ir.Probe] = set()
        """The probes that one forward pass passes more than once."""
        self.keeps_graphs = False
        self.expects_calls = True
        self.switches = compat.checkpointing(module)
        tuned = self.execution.plan.resolved
        self.tuned_for = TunedFor(tuned, module) if tuned.tuned else None
        self.handles = handles_of(self)
        self.alone = lone_blocks(self.execution, self.handles)
        self.graphs = Graphs(self)
        self.placement = Placement(module, self.handles, profiled=session_config.options.trace == "profile")
        self._storage = BranchStorage(self)
        self._gradients = GradientGuard(module)
        self._lock = threading.Lock()
        self._warned = False
        self._warned_of_repeats = False

    # --- around calls ------------------------------------------------------------------------------------

    def finished(self, state: State) -> None:
        """Handle the end of a trajectory: warn once per root model if it has reused nothing."""
        if state.count > 1 and not state.reused and not self._warned:
            self._warned = True
            warnings.warn(_why_nothing(state, self.module), UserWarning, stacklevel=2)

    def runs_outside(self, site: SiteHandle, module: torch.nn.Module) -> None:
        """Handle a site that runs outside any call of the root model.

        Raises:
            PolicyError: Gradient checkpointing repeats a site that was answered (E342).
        """
        if self.keeps_graphs and compat.recomputes():
            compat.refuse_recompute(site.name)
        if not self.expects_calls or (site.index < 0 and not site.members):
            return  # a probed embedding may be called ahead of the loop
        with self._lock:
            if self.active or self.closed:
                return
        if self.identity in DISABLED.get() or compat.traced() or compat.recomputes():
            return
        # Neither a replica, nor a call that began before the policy was attached.
        if self.module.get_submodule(site.name) is module and not is_running(self.module):
            self.expects_calls = False
            warn_of_lone_site(self, site)

    def close(self) -> bool:
        """Stop accepting calls, before the hooks are removed. Return False while a call is running."""
        with self._lock:
            self.closed = not self.active
            return self.closed

    def reopen(self) -> None:
        """Accept calls again."""
        with self._lock:
            self.closed = False

    # --- the beginning of a call -------------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool = False) -> ForwardPass | None:
        """Read the clock and decide the sites of a forward pass.

        Args:
            args: Positional arguments of the forward pass.
            kwargs: Keyword arguments of the forward pass.
            compiler: Whether the root model is compiled as a whole.

        Returns:
            The forward pass, or None where the model runs without the policy.
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
            session, here = self.sessions.begin()
            try:
                return self._begun(session, here, args, kwargs, compiler=compiler)
            except BaseException as error:
                self._forget(session, error)
                raise
        except BaseException:
            with self._lock:
                self.active -= 1
            raise

    def _begun(
        self, session: Session, here: Entered | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool
    ) -> ForwardPass:
        if session.session_config is None:
            outer = here.session_config if here is not None and here.of(self.sessions) else None
            session.session_config = outer or self.session_config
        session_config = session.session_config
        state = session.states.get(self.name)
        if state is None:
            state = session.states[self.name] = State(session_config.executions[self.name])
            state.account = None if self.budget is None else Account(self.budget)
        arguments = arguments_of(self.root, args, kwargs)
        sources = self._sources(session_config, here)
        context = CONTEXT.get()
        before = None if context is None or not context.own else (copy.copy(session.clock), state.calls.copy())
        try:
            reading = read(session.clock, state.calls, sources, self.root, arguments)
        except BaseException:
            meeting.abandon(self, state.execution)
            raise
        if session.lost is not None and session.goes_on(reading.tick):
            self.sessions.continues(session)
        pipeline = here.pipeline if here is not None else None
        if reading.starts:
            self._start(session, state, reading)
            if self.tuned_for is not None:
                skipped = 0 if session.clock.before else session.clock.begin
                latents = arguments.named.get(arguments.latents or "")
                guidance = here.guidance if here is not None else None
                self.tuned_for.compare_run(sources, reading.tick.steps, skipped, latents, guidance)
        if state.execution.skipped and self.graphs.derives and (args or kwargs):
            self.graphs.derive(state.execution, args, kwargs)
        decided = self._decided(session_config, state, reading)
        call = ForwardPass(*decided, session, state, reading, arguments, args, kwargs)
        call.before = before
        execution = state.execution
        if execution.approximation is not None or execution.signals.crossed or execution.takes_mean:
            samples = sources.follower.rows if sources.follower is not None else None
            call.source = GuidanceSource(session_config.options.guidance, pipeline, samples)
        guidance_observer.describe(call)
        if state.execution.takes_mean:
            call.context.guided = state.guide.rows(arguments, call.source, self.module) is not None
        self._open(call)
        if state.audited:
            call.compares = call.answered or call.halved
            call.learns = self.graphs.used(whole=compiler)  # the answers are compared outside graphs
        elif self.graphs.used(whole=compiler) and not call.answered:
            call.learns = self.graphs.learns(arguments)
            if not call.learns:
                self.graphs.prepare(call, whole=compiler)
        call.codes = step_effects.planned_codes(call)
        return call

    def _sources(self, session_config: SessionConfig, here: Entered | None) -> Sources:
        """Return what the clock of a root call reads."""
        options = session_config.options
        if options.timestep is not None:
            return session_config.bare
        scheduler = options.scheduler
        pipeline = here.pipeline if here is not None and here.of(self.sessions) else None
        if scheduler is None and pipeline is not None:
            scheduler = getattr(pipeline, "scheduler", None)
        follower = self.run.follower_of(scheduler) if scheduler is not None else None
        if follower is None or getattr(scheduler, "timesteps", None) is None:
            return session_config.bare
        kind = None if pipeline is None else cast("Any", type(pipeline))
        return replace(session_config.bare, scheduler=scheduler, follower=follower, pipeline=kind)

    def _start(self, session: Session, state: State, reading: Reading) -> None:
        """Start a trajectory: release the state of the last one on all root models of the session."""
        compat.refuse(self.module, self.run.target)
        if self.run.attached:  # not when another thread's call has detached the run (E310, E311)
            self.placement.settle()
        for other in session.states.values():
            if other is state or other.calls.trajectory != session.clock.trajectories:
                self.finished(other)
                other.clear()
        self.graphs.look()
        if session.drawn != session.clock.trajectories:
            options = (session.session_config or self.session_config).options
            session.drawn = session.clock.trajectories
            session.audited = self.audits.draws(options.audit, options.audit_seed)
        state.audited = session.audited
        trace, plan = self.run.trace, state.execution.plan
        state.trajectory = trace.begin(session.key, plan, audited=state.audited) if trace is not None else None
        meeting.meet(self, state)
        error = untold(plan, reading.tick)
        if error is not None:
            raise error

    def _decided(
        self, session_config: SessionConfig, state: State, reading: Reading, *, earlier: StepContext | None = None
    ) -> tuple[StepContext, Ledger]:
        """Decide the sites of a call on its guidance branch. If it was decided `earlier`, every site computes now."""
        execution, tick, known = state.execution, reading.tick, reading.known
        if execution.approximation is not None and tick.branch in COND_BRANCHES:
            for key, other in state.branches.items():
                if key.branch in UNCOND_BRANCHES:
                    there = replace(tick, branch=key.branch)
                    alone = rebuilds_uncond(execution.program, other.partition, other.memories, there)
                    tick = replace(tick, uncond_skipped=alone)
        state.step = tick.step
        branch, facts = self._branch(state, reading, again=earlier is not None)
        if state.account is not None:
            state.account.give_way()
            refused = [site for site, slot in enumerate(branch.slots) if slot.storing.lacking is Fact.OVER_LIMIT]
            facts |= dict.fromkeys(refused, Fact.OVER_LIMIT)
        if self.repeated:
            facts |= dict.fromkeys(self.repeated, Fact.REPEATED)
        loose, liveness = bool(self.repeated) or self.budget is not None, state.liveness
        if liveness is None or liveness.outlooks.ahead is not reading.ahead or liveness.outlooks.loose is not loose:
            liveness = state.liveness = execution.liveness(reading.ahead, loose=loose)
        audit = Audit() if state.audited else None
        suppliers = session_config.options.externals
        context = StepContext(self, execution, branch, tick, liveness, suppliers, audit, earlier)
        if context.externals and earlier is None:
            meeting.compare_externals(state, tick, context.externals)
        measuring = None
        # Another branch may read what this one measures.
        if execution.signals.numbers and (execution.signals.crossed or liveness.measures(tick, now=True)):
            measuring = Measuring(
                execution.signals, branch.remembered, tick, execution.program.tables,
                memory_of=lambda site: branch.memories[branch.partition.group_of[site]],
                others=lambda name: None if (other := state.sibling(known, name)) is None else other.remembered,
                worst=session_config.options.samples == "max", agreement=state.agreement, undefined=self.remeasured,
                externals=context.externals,
            )  # fmt: skip
        leaders = _NO_LEADERS
        if execution.followed:
            others = {name: state.sibling(known, name) for name in execution.followed}
            leaders = {
                name: other.decided[1]
                for name, other in others.items()
                if other is not None and other.decided is not None and other.decided[0] == tick.step
            }
        return context, Ledger(context, leaders, measuring, facts, state.company, context.externals)

    def _branch(self, state: State, reading: Reading, *, again: bool) -> tuple[Branch, dict[int, str]]:
        """Return the branch of a call, and per site the reason where its history does not fit."""
        known = reading.known
        branch = known.state
        if branch is not None and not (again or known.stale or known.doubtful):
            return branch, {}
        slots, execution = self._storage.slots(state, reading.tick, reading.ahead), state.execution
        if branch is None:
            known.state = Branch(execution.program.coarse, execution.recall.start, slots)
            return known.state, {}
        # The history is discarded, the memories stay. `Calls.doubted` keeps an uncertain branch aside.
        reason = Fact.RERUN if again else Fact.MISFIT if known.stale else Fact.UNKNOWN_BRANCH
        known.state = Branch(branch.partition, branch.memories, slots)
        state.guide = Guide()
        return known.state, dict.fromkeys(range(len(slots)), reason)

    def _open(self, call: ForwardPass) -> None:
        """Handle the root model itself, where it is a site or has probes."""
        site, execution = self.handles[""], call.context.execution
        itself, names = execution.itself, call.arguments.named
        if site.special:
            call.enter(site, names)
        if itself is None:
            return
        decision = call.ledger.resolve(itself, module_run.problem(call, site, names, call.args, call.kwargs))
        action = decision.action if isinstance(decision.action, ir.ApproximateUncond) else None
        if execution.approximation is not None and (action is not None or decision.verdict != "reuse"):
            guidance_observer.before(call, itself, action or execution.approximation)
        if not (call.answered or call.halved):
            # Another rule may reuse the model at a later step.
            call.open(site)

    # --- the end of a call -------------------------------------------------------------------------------

    def end(self, call: ForwardPass, output: Any) -> Any:
        """Commit the forward pass: memories, counts and trace. Return its output, or `AGAIN`."""
        context, ledger, state = call.context, call.ledger, call.state
        if call.parts:
            self.graphs.look_for_repeats(call)
        if call.again:
            return AGAIN
        uncalled = step_effects.uncalled(call)
        if call.before is not None and len(uncalled) == len(self.execution.plan.sites) > 0:
            self._undo(call, *call.before)
            return output
        site = self.handles[""]
        if context.execution.itself is not None and not (call.answered or call.halved):
            call.shut(site, output)
        if call.guidance is not None:
            output = guidance_observer.after(call, output)
        errors: Mapping[int, float] = {}
        if context.audit is not None:
            errors = self.audits.compared(call, context.audit, output)
            output = call.computed if call.compares else output
        if site.outputs:
            call.leave(site, self.module, call.arguments.named, output, None)
        if call.parts:
            self.graphs.end(call)
        call.close(uncalled)
        table = ledger.table
        reuses = any([item.verdict == "reuse" for item in ledger.decisions]) if table is None else table.reuses
        if reuses and torch.is_grad_enabled() and self.session_config.options.gradients == "refuse":
            self._gradients.check(call.args, call.kwargs)
        if call.learns:
            self.graphs.learnt(call)
        context.branch.memories = ledger.after
        if (self.repeated or self.remeasured) and not self._warned_of_repeats:
            self._warned_of_repeats = True
            warn_of_repeats(self)
        self._release(call)
        if context.execution.followed:
            context.branch.decided = context.tick.step, ledger.by_site()
        state.count += 1
        state.reused |= reuses
        # A reused result may now be part of an autograd graph: sites then check for gradient checkpointing, which would
        # run them again in the backward pass.
        if state.reused and torch.is_grad_enabled():
            self.keeps_graphs = True
        if state.trajectory is not None and state.trajectory.size < _MOST_CALLS:
            self._record(call, state.trajectory, errors)
        if context.tick.steps is not None and context.tick.step + 1 >= context.tick.steps:
            self._over(call)
        with self._lock:
            self.active -= 1
        call.session.leave()
        return output

    def again(self, call: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardPass:
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
        session, state, reading = call.session, call.state, call.reading
        known = reading.known
        if known.conditioning.overwritten or known.latents.overwritten:
            refuse_again(self, "the model wrote into its own arguments")
        decided = self._decided(session.session_config or self.session_config, state, reading, earlier=call.context)
        anew = ForwardPass(*decided, session, state, reading, call.arguments, args, kwargs)
        anew.started, anew.source = call.started, call.source
        self._open(anew)
        anew.codes = step_effects.planned_codes(anew)
        return anew

    def _record(self, call: ForwardPass, trajectory: Trajectory, errors: Mapping[int, float]) -> None:
        """Add the call to the trace."""
        context, ledger = call.context, call.ledger
        profiled = self.session_config.options.trace == "profile"
        seconds = (now() if profiled else time.perf_counter()) - call.started
        profile = call.profile if trajectory.size < _MOST_PROFILED else ()
        trajectory.record((
            context.tick, context.branch.partition, ledger.decisions, ledger.facts, seconds, ledger.recorded(),
            call.state.held, call.started, profile, errors,
        ))  # fmt: skip

    def _release(self, call: ForwardPass) -> None:
        """Release the history that no later step of the trajectory reads, and count the rest."""
        state, branch = call.state, call.context.branch
        if state.execution.approximation is not None:
            guidance_observer.release(call)
        changed = step_effects.release(call)
        if state.account is not None:
            self._storage.limit(state, branch, state.account)
        if changed:
            branch.held = held(branch.slots, branch.remembered)

    def _over(self, call: ForwardPass) -> None:
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

    def fail(self, call: ForwardPass, error: BaseException) -> None:
        """End the session after an exception.

        An error that shows that the policy does not fit the model (E310, E311) also removes the run.
        """
        with self._lock:
            self.active -= 1
        self._forget(call.session, error)

    def _undo(self, call: ForwardPass, clock: Clock, calls: Calls) -> None:
        """Undo a `run.step` in which no site was called: it was no evaluation of the model."""
        with self._lock:
            self.active -= 1
        if call.reading.starts:
            self._forget(call.session, None)
            return
        call.session.clock, call.state.calls = clock, calls
        call.session.leave()

    def _forget(self, session: Session, error: BaseException | None) -> None:
        for _, state in session.end():
            if state.trajectory is not None and self.run.trace is not None:
                self.run.trace.drop(state.trajectory)
            state.abandon()
        session.leave()
        if isinstance(error, PolicyError) and any(diagnostic.code in _REFUTED for diagnostic in error.diagnostics):
            self.run.detach()


_REFUTED = frozenset({"E310", "E311"})  # errors of the model itself, which every later forward pass would raise too
_NO_LEADERS: Mapping[str, Sequence[Decision]] = {}
_MOST_CALLS = 10_000  # calls per trajectory in the trace, which bounds trajectories whose end is unknown
_MOST_PROFILED = 1_000  # calls per trajectory with the times of their modules


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
