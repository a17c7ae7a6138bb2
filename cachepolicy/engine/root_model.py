"""A root model of a run: finds the session of a forward pass, decides its sites and commits its results."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.engine import compat, guidance_observer, root_site, step_effects
from cachepolicy.engine.audit import Audit
from cachepolicy.engine.branch_storage import BranchStorage
from cachepolicy.engine.call_arguments import CallArguments, arguments_of, inspect_root
from cachepolicy.engine.cfg_branches import Calls
from cachepolicy.engine.chain_recording import Continuations
from cachepolicy.engine.class_swap import Handle
from cachepolicy.engine.clock import Clock, Reading, read
from cachepolicy.engine.compile.regions import Graphs
from cachepolicy.engine.contexts import CONTEXT
from cachepolicy.engine.distributed import meeting
from cachepolicy.engine.forward_pass import ForwardPass
from cachepolicy.engine.gradients import GradientGuard
from cachepolicy.engine.guidance_batch import GuidanceSource
from cachepolicy.engine.hook_placement import Placement
from cachepolicy.engine.hooks import SiteHandle
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.memory_budget import Account
from cachepolicy.engine.refusals import is_running, refuse_again, warn_of_lone_site, warn_of_no_reuse, warn_of_repeats
from cachepolicy.engine.root_hooks import AGAIN
from cachepolicy.engine.session_state import Session, State
from cachepolicy.engine.sessions import Entered
from cachepolicy.engine.signals import Measuring
from cachepolicy.engine.site_handles import handles_of, lone_blocks
from cachepolicy.engine.step_context import StepContext
from cachepolicy.engine.tuned_for import TunedFor
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.schedule import Decision, rebuilds_uncond, untold

if TYPE_CHECKING:
    from cachepolicy.engine.attachment import Attachment

DISABLED: ContextVar[frozenset[int]] = ContextVar("cachepolicy_disabled", default=frozenset())
_identities = itertools.count()


class RootModel(Handle):
    """A root model of a run: a denoiser with its plan, its hooks, its clock and its sessions.

    Args:
        attachment: What it shares with the other root models of the run.
        name: The name of the denoiser in the pipeline.
        module: The denoiser.
    """

    def __init__(self, attachment: Attachment, name: str, module: torch.nn.Module) -> None:
        self.attachment = attachment
        self.name = name
        self.module = module
        self.session_config = session_config = attachment.session_config
        self.execution = session_config.executions[name]
        self.root = inspect_root(module)
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
        """Handle the end of a trajectory: warn once per root model if it has reused nothing, unless that is meant."""
        if state.count > 1 and not state.reused and not self._warned:
            self._warned = True
            rules = state.execution.plan.rules
            if rules and all(isinstance(bound.rule.action, ir.Compute) for bound in rules):
                return
            warn_of_no_reuse(self, state)

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
            session, here = self.attachment.sessions.begin()
            try:
                return self._begun(session, here, args, kwargs, compiler=compiler)
            except BaseException as error:
                self._forget(session, error)
                raise
        except BaseException:
            self._left()
            raise

    def _left(self) -> None:
        """Count the end of a forward pass."""
        with self._lock:
            self.active -= 1

    def _begun(
        self, session: Session, here: Entered | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiler: bool
    ) -> ForwardPass:
        mine = here if here is not None and here.of(self.attachment.sessions) else None
        if session.session_config is None:
            session.session_config = (mine.session_config if mine is not None else None) or self.session_config
        session_config = session.session_config
        state = session.states.get(self.name)
        if state is None:
            state = session.states[self.name] = State(session_config.executions[self.name])
            budget = self.attachment.budget
            state.account = None if budget is None else Account(budget)
        arguments = arguments_of(self.root, args, kwargs)
        pipeline = here.pipeline if here is not None else None
        sources = session_config.sources(self.attachment, mine.pipeline if mine is not None else None)
        context = CONTEXT.get()
        before = None if context is None or not context.own else (copy.copy(session.clock), state.calls.copy())
        try:
            reading = read(session.clock, state.calls, sources, self.root, arguments)
        except BaseException:
            meeting.abandon(self, state.execution)
            raise
        if session.lost is not None and session.goes_on(reading.tick):
            self.attachment.sessions.continues(session)
        if reading.starts:
            self._start(session, state, reading)
            if self.tuned_for is not None:
                skipped = 0 if session.clock.before else session.clock.begin
                guidance = here.guidance if here is not None else None
                self.tuned_for.compare_run(sources, reading.tick.steps, skipped, arguments.latent_input, guidance)
        if state.execution.skipped and self.graphs.derives and (args or kwargs):
            self.graphs.derive(state.execution, args, kwargs)
        call = self._decided(session, state, reading, arguments, args, kwargs)
        call.before = before
        execution = state.execution
        if execution.approximation is not None or execution.signals.crossed or execution.takes_mean:
            samples = sources.follower.rows if sources.follower is not None else None
            call.source = GuidanceSource(session_config.options.guidance, pipeline, samples)
        self._enter(call)
        if state.audited:
            call.compares = call.answered or call.halved
            call.learns = self.graphs.used(whole=compiler)  # the answers are compared outside graphs
        elif self.graphs.used(whole=compiler) and not call.answered:
            call.learns = self.graphs.learns(arguments)
            if not call.learns:
                self.graphs.prepare(call, whole=compiler)
        call.codes = step_effects.planned_codes(call)
        return call

    def _enter(self, call: ForwardPass) -> None:
        """Let a decided call see its arguments, and answer the root model if that is what the policy says."""
        guidance_observer.describe(call)
        if call.context.execution.takes_mean:
            call.context.guided = call.state.guide.rows(call.arguments, call.source, self.module) is not None
        root_site.before(call)

    def _start(self, session: Session, state: State, reading: Reading) -> None:
        """Start a trajectory: release the state of the last one on all root models of the session."""
        compat.refuse(self.module, self.attachment.target)
        if self.attachment.roots:  # not when another thread's call has detached the run (E310, E311)
            self.placement.settle()
        for other in session.states.values():
            if other is state or other.calls.trajectory != session.clock.trajectories:
                self.finished(other)
                other.clear()
        self.graphs.look()
        if session.drawn != session.clock.trajectories:
            options = (session.session_config or self.session_config).options
            session.drawn = session.clock.trajectories
            session.audited = self.attachment.audits.draws(options.audit, options.audit_seed)
        state.audited = session.audited
        trace, plan = self.attachment.trace, state.execution.plan
        state.trajectory = trace.begin(session.key, plan, audited=state.audited) if trace is not None else None
        meeting.meet(self, state)
        error = untold(plan, reading.tick)
        if error is not None:
            raise error

    def _decided(
        self, session: Session, state: State, reading: Reading, arguments: CallArguments, args: tuple[Any, ...],
        kwargs: dict[str, Any], *, earlier: StepContext | None = None,
    ) -> ForwardPass:  # fmt: skip
        """Decide the sites of a call on its guidance branch. If it was decided `earlier`, every site computes now."""
        execution, tick, known = state.execution, reading.tick, reading.known
        if execution.approximation is not None and tick.branch in COND_BRANCHES:
            for key, other in state.branches.items():
                if key.branch in UNCOND_BRANCHES:
                    there = replace(tick, branch=key.branch)
                    alone = rebuilds_uncond(execution.program, other.partition, other.memories, there)
                    tick = replace(tick, uncond_skipped=alone)
        state.step = tick.step
        options = (session.session_config or self.session_config).options
        branch, facts = self._storage.branch(state, reading, again=earlier is not None)
        if state.account is not None:
            state.account.give_way()
            refused = [site for site, slot in enumerate(branch.slots) if slot.storing.lacking is Fact.OVER_LIMIT]
            facts |= dict.fromkeys(refused, Fact.OVER_LIMIT)
        if self.repeated:
            facts |= dict.fromkeys(self.repeated, Fact.REPEATED)
        loose, liveness = bool(self.repeated) or state.account is not None, state.liveness
        if liveness is None or liveness.outlooks.ahead is not reading.ahead or liveness.outlooks.loose is not loose:
            liveness = state.liveness = execution.liveness(reading.ahead, loose=loose)
        audit = Audit() if state.audited else None
        context = StepContext(self, execution, branch, tick, liveness, options.externals, audit, earlier)
        if context.externals and earlier is None:
            meeting.compare_externals(state, tick, context.externals)
        measuring = None
        # Another branch may read what this one measures.
        if execution.signals.numbers and (execution.signals.crossed or liveness.measures(tick, now=True)):
            measuring = Measuring(
                execution.signals, branch.remembered, tick,
                memory_of=lambda site: branch.memories[branch.partition.group_of[site]],
                others=lambda name: None if (other := state.sibling(known, name)) is None else other.remembered,
                worst=options.samples == "max", agreement=state.agreement, undefined=self.remeasured,
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
        ledger = Ledger(context, leaders, measuring, facts, state.company)
        return ForwardPass(context, ledger, session, state, reading, arguments, args, kwargs)

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
        site, output = self.handles[""], root_site.after(call, output)
        errors: Mapping[int, float] = {}
        if context.audit is not None:
            errors = self.attachment.audits.compared(call, context.audit, output)
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
        self._storage.release(call)
        if context.execution.followed:
            context.branch.decided = context.tick.step, ledger.by_site()
        state.count += 1
        state.reused |= reuses
        # A reused result may now be part of an autograd graph: sites then check for gradient checkpointing, which would
        # run them again in the backward pass.
        if state.reused and torch.is_grad_enabled():
            self.keeps_graphs = True
        if state.trajectory is not None:
            step_effects.record(call, state.trajectory, errors)
        if context.tick.steps is not None and context.tick.step + 1 >= context.tick.steps:
            self._storage.over(call)
        self._left()
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
        anew = self._decided(session, state, reading, call.arguments, args, kwargs, earlier=call.context)
        anew.started, anew.source = call.started, call.source
        self._enter(anew)
        anew.codes = step_effects.planned_codes(anew)
        return anew

    def fail(self, call: ForwardPass, error: BaseException) -> None:
        """End the session after an exception.

        An error that shows that the policy does not fit the model (E310, E311) also removes the run.
        """
        self._left()
        self._forget(call.session, error)

    def _undo(self, call: ForwardPass, clock: Clock, calls: Calls) -> None:
        """Undo a `run.step` in which no site was called: it was no evaluation of the model."""
        self._left()
        if call.reading.starts:
            self._forget(call.session, None)
            return
        call.session.clock, call.state.calls = clock, calls
        call.session.leave()

    def _forget(self, session: Session, error: BaseException | None) -> None:
        for _, state in session.end():
            if state.trajectory is not None and self.attachment.trace is not None:
                self.attachment.trace.drop(state.trajectory)
            state.abandon()
        session.leave()
        if isinstance(error, PolicyError) and any(diagnostic.code in _REFUTED for diagnostic in error.diagnostics):
            self.attachment.lift()


_REFUTED = frozenset({"E310", "E311"})  # errors of the model itself, which every later forward pass would raise too
_NO_LEADERS: Mapping[str, Sequence[Decision]] = {}
