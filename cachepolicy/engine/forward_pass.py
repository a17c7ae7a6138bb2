"""State of one forward pass of the root model: what its sites do, and how they run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cachepolicy.diffusers.hook_names import REGISTRY
from cachepolicy.engine import module_run
from cachepolicy.engine.actions import ANSWER, COMPUTE, Op, hidden_states
from cachepolicy.engine.audit import run_bare
from cachepolicy.engine.batch_view import WHOLE
from cachepolicy.engine.block_chain import Names, Passage, bind_names
from cachepolicy.engine.chain_check import Tracker
from cachepolicy.engine.chain_recording import Begun
from cachepolicy.engine.compat import left, split_arguments
from cachepolicy.engine.compile.graph_io import fill, problem
from cachepolicy.engine.compile.graph_ops import Part, Stage
from cachepolicy.engine.guidance_batch import GuidanceSource
from cachepolicy.engine.hooks import LOCAL, Leave, SiteHandle
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.probing import Probing, counter
from cachepolicy.engine.span_run import Phase, SpanRun
from cachepolicy.engine.step_context import StepContext
from cachepolicy.planning.schedule import WAITING

if TYPE_CHECKING:
    from cachepolicy.engine.call_arguments import CallArguments
    from cachepolicy.engine.cfg_branches import Calls
    from cachepolicy.engine.clock import Clock, Reading
    from cachepolicy.engine.session_state import Session, State

_NO_GUIDANCE_SOURCE = GuidanceSource()
_NO_PARTS: Mapping[int, Part] = {}


class ForwardPass:
    """One forward pass of a root model, from its decisions to its end. It is the frame that the sites read.

    Attributes:
        owner: The root model.
        context: What the call is decided from.
        ledger: The decisions.
        args: Positional arguments of the root model. Half a guidance batch may replace those of the caller.
        kwargs: Keyword arguments of the root model.
        before: The clock and the calls before a `run.step`, or None.
        codes: What each site does, by site number. A called site replaces its own code by `ANSWERED`, `COMPUTED` or
            `RAN`, so that a second call is noticed, and also that there was none.
        slots: The histories, by site number.
        passages: The blocks that pass their inputs through, because the span around them has answered.
        unfit: Sites whose history did not fit and which computed instead, with the reasons.
        again: Whether the forward pass has to run again, with every site computing.
        answered: Whether the root model itself is answered, with `output`.
        compares: Whether the call is audited and the policy answers it or halves its batch. The bare model then runs
            first, and its output `computed` is what the call returns.
        spans: The spans of which a block has been called, by site number.
        called: The modules that have been called through `special`.
        foreseen: Predictions of sites that were made before the sites were called, in order to check them.
        learns: Whether the call runs outside graphs to learn the structure of its spans.
        parts: What the graphs read and leave, by site number.
        stage: State that compiled graphs read. Blocks that are compiled alone read theirs in `blocks`.
        spans_calls: Whether it belongs to a `run.step` context, so that a call of the root model is part of it.
        profile: Times of the modules, where the run is profiled.
        opened: What the span of the root model itself has recorded of its inputs.
        remembers: Whether this call has changed the remembered signals.
    """

    __slots__ = (
        "_again", "_before", "_gated", "_probing", "_waiting", "answered", "args", "arguments", "before",
        "blocks", "called", "codes", "compares", "computed", "context", "foreseen", "guidance", "inference", "kwargs",
        "learns", "ledger", "opened", "output", "owner", "parts", "passages", "profile", "reading", "remembers",
        "session", "slots", "source", "spans", "spans_calls", "stage", "started", "state", "step", "store", "unfit",
    )  # fmt: skip

    def __init__(
        self, context: StepContext, ledger: Ledger, session: Session, state: State, reading: Reading,
        arguments: CallArguments, args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.started = time.perf_counter()
        self.owner = context.root
        self.context = context
        self.ledger = ledger
        self.session = session
        self.state = state
        self.reading = reading
        self.arguments = arguments
        self.args = args
        self.kwargs = kwargs
        self.before: tuple[Clock, Calls] | None = None
        self.codes: list[Op] = []
        self.slots = context.branch.slots
        self.step = context.tick.step
        self.store = context.store
        self.inference = context.inference
        self.passages: dict[SiteHandle, Passage] = {}
        self.unfit: list[tuple[int, str]] = []
        self.answered = self.learns = self.compares = self.spans_calls = self.remembers = self._again = False
        self.output: Any = None
        self.computed: Any = None
        self.guidance: dict[str, Any] | None = None
        self.source = _NO_GUIDANCE_SOURCE
        self.parts = _NO_PARTS
        self.stage: Stage | None = None
        self.blocks: Sequence[Stage] = ()
        self.profile: list[Any] = []
        self._probing = Probing(context, ledger)
        self.spans: dict[int, SpanRun] = {}
        self.called: set[SiteHandle] = set()
        self._waiting: Mapping[SpanRun, Names] = {}
        """The spans whose first block runs before they are decided, with its inputs."""
        self._gated: set[SiteHandle] = set()
        self._before: dict[str, int | None] = {}
        self.opened: Begun | None = None
        self.foreseen: dict[int, Any] = {}
        """Predictions of sites that were made before they were called, in order to check them."""

    @property
    def halved(self) -> bool:
        """Whether only the conditional half of a guidance batch runs."""
        return self.context.rows is not WHOLE

    @property
    def again(self) -> bool:
        """Whether the forward pass has to run again, because a site had answered before it was called once more."""
        return self._again or self._probing.again

    # --- what graphs ask -----------------------------------------------------------------------------------

    def gate(self, site: SiteHandle, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle a probed or waiting module that is about to run in a graph."""
        positional, named = split_arguments(module, args, kwargs)
        names = bind_names(site.parameters, positional, named)
        self.enter(site, names)
        self._gated.add(site)
        self._before[site.name] = counter(names)
        self.release()

    def look_after(
        self, site: SiteHandle, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Handle a probed module that has run in a graph."""
        names = bind_names(site.parameters, *split_arguments(module, args, kwargs))
        self.leave(site, module, names, output, self._before.pop(site.name, None))

    def release(self) -> None:
        """Decide the sites that graphs wait for, once all signals are measured."""
        read_now = self.context.execution.plan.read_now
        for site, part in self.parts.items():
            if self.ledger.of(site) is not WAITING or not self._probing.has_all(read_now.get(site, ())):
                continue
            refusal = problem(self, site, self.ledger.action(site)) if self.ledger.shared(site) else None
            decision = self.ledger.resolve(site, refusal)
            reason = problem(self, site, decision.action) if decision.verdict == "reuse" else None
            if reason is not None:
                self.ledger.refuse(site, reason)
            fill(self, site, part)

    # --- probes --------------------------------------------------------------------------------------------

    def enter(self, site: SiteHandle, names: Names) -> None:
        """Let the probes read the inputs of a module, and decide what waits for them."""
        if self._probing.enter(site, names):
            self._look()

    def leave(self, site: SiteHandle, module: Any, names: Names, output: Any, before: int | None) -> None:
        """Let the probes read the outputs of a module, and decide what waits for them."""
        if self._probing.leave(site, module, names, output, before):
            self._look()

    def _look(self) -> None:
        """Decide the spans that wait for a probe, and leave a running first block if its span reuses."""
        audit = self.context.audit
        for span, names in self._waiting.items():
            if span.phase is not Phase.FIRST_BLOCK:
                continue
            if self._probing.has_all(self.context.execution.inside[span.number]) and span.settle(None, ran=False):
                if audit is None:
                    self.passages |= span.passages
                    raise Leave(span)
                # The block goes on, but what follows in it is not seen: under the policy, it would be left here.
                span.expect(audit, 0, names)
                audit.left, LOCAL.frame = span, None
                return

    # --- one intercepted call ------------------------------------------------------------------------------

    def special(  # noqa: PLR0915 (one call of a module, from its inputs to its output)
        self, original: Any, module: Any, site: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module that is probed, belongs to a span, or waits for signals."""
        positional, named = split_arguments(module, args, kwargs) if REGISTRY in module.__dict__ else (args, kwargs)
        names = named if not positional else bind_names(site.parameters, positional, named)
        if site.alone:
            number, position = site.members[0]
            span = self.spans.get(number)
            if span is not None and span.phase is Phase.ANSWERING:
                if self.passages.pop(site, None) is None and position not in span.links:
                    return self._repeated(original, module, site, args, kwargs)
                return self._answered_block(span, position, original, module, args, kwargs, names)
            # A span is decided when its first block has run. A tracker exists only if it computes.
            if span is not None and position > 0 and type(span.recorder) is Tracker:
                if position < span.recorder.calls:
                    return self._repeated(original, module, site, args, kwargs)
                span.recorder.begin(position, names)
                output = original(module, *args, **kwargs)
                span.end(position, module, names, None, output)
                self._probing.forget()
                return output
        if site in self.called or (self.spans and any([self._is_done(span) for span, _ in site.members])):
            return self._repeated(original, module, site, args, kwargs)
        audit = self.context.audit
        self.called.add(site)
        self._probing.learn(names)
        if site in self._gated:
            # The probes have read this call between two graphs.
            self._gated.discard(site)
        elif self.ledger.measuring is not None:
            self.enter(site, names)
        if audit is not None and audit.left is not None:
            return original(module, *args, **kwargs)
        if self.parts:
            self.release()
        recording, waiting, answering = list[tuple[SpanRun, int, Begun | None]](), list[SpanRun](), None
        position = 0
        for number, position in site.members:
            span = self.span(number)
            phase = self.enter_span(span, position, names)
            if phase is Phase.ANSWERING:
                answering = span
                break
            if phase is Phase.FIRST_BLOCK:
                waiting.append(span)
            recording.append((span, position, span.begin(position, names)))
        code = COMPUTE if answering is not None else module_run.operation(self, site, args, kwargs)
        before = counter(names) if site.outputs else None
        if answering is not None:
            self.passages.pop(site, None)
            output = self._answered_block(answering, position, original, module, args, kwargs, names)
        elif code is ANSWER:
            output = module_run.answered(self, site.index)
            if audit is not None:
                computed = run_bare(original, module, args, kwargs)
                audit.compare(site.index, output, computed)
                output = computed
        else:
            output, answering = self._run(original, module, args, kwargs, waiting, names)
            if audit is not None and audit.left is not None:
                return output
        for span in waiting:
            if span.phase is Phase.FIRST_BLOCK:
                span.settle(names, ran=True)
        for span, position, begun in recording:
            span.end(position, module, names, begun, output)
        if answering is not None or code is ANSWER:
            return output
        if code is not COMPUTE:
            module_run.store(self, site.index, code, hidden_states(args, kwargs), output)
        if site.outputs:
            self.leave(site, module, names, output, before)
        self._probing.ran(module, names, output)
        return output

    def _run(
        self, original: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], waiting: Sequence[SpanRun],
        names: Names,
    ) -> tuple[Any, SpanRun | None]:  # fmt: skip
        """Run the module, or answer a waiting span that is decided meanwhile. Return the output, and that span."""
        if not waiting:
            return original(module, *args, **kwargs), None
        outer, frame = self._waiting, LOCAL.frame
        self._waiting = {**outer, **dict.fromkeys(waiting, names)}
        try:
            output = original(module, *args, **kwargs)
        except Leave as leave:
            if leave.span not in waiting:
                raise
            # The first block was left before its end, so its recording is incomplete.
            leave.span.recorder = None
            left(module)
            return leave.span.linked(0, names), leave.span
        finally:
            self._waiting = outer
        audit = self.context.audit
        if audit is None or audit.left is None or audit.left not in waiting:
            return output, None
        span, audit.left, LOCAL.frame = audit.left, None, frame
        span.recorder = None
        span.compare(audit, 0, output)
        return output, span

    def _answered_block(
        self, span: SpanRun, position: int, original: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        names: Names,
    ) -> Any:  # fmt: skip
        """Return the answer of one block of a span that reuses, or its computed output in an audited trajectory."""
        audit = self.context.audit
        if audit is None:
            return span.linked(position, names)
        span.expect(audit, position, names)
        output = run_bare(original, module, args, kwargs)
        span.compare(audit, position, output)
        return output

    # --- spans ---------------------------------------------------------------------------------------------

    def span(self, number: int) -> SpanRun:
        """Return the state of a span in this call."""
        span = self.spans.get(number)
        if span is None:
            span = self.spans[number] = SpanRun(number, self.context, self.ledger)
        return span

    def _is_done(self, number: int) -> bool:
        return number in self.spans and self.spans[number].phase is Phase.DONE

    def enter_span(self, span: SpanRun, position: int, names: Names) -> Phase:
        """Decide a span when one of its blocks is called. Return where the span is then."""
        if span.phase is Phase.ANSWERING or span.phase is Phase.COMPUTING:
            return span.phase
        phase = span.enter(position, names, measured=self._probing.has_all(self.context.execution.inside[span.number]))
        if phase is Phase.ANSWERING:
            self.passages |= span.passages
        return phase

    # --- modules that are called more than once ------------------------------------------------------------

    def repeats(self, site: int, *, answered: bool) -> None:
        """Mark a site that one forward pass calls more than once. Its history holds one result, so it always computes.

        Args:
            site: The site number.
            answered: Whether an earlier call of this forward pass was answered. The forward pass then runs again.
        """
        self.owner.repeated.add(site)
        self._again |= answered
        span = self.spans.get(site)
        if span is not None:
            for block in span.passages:
                self.passages.pop(block, None)
            span.repeat()
        slot = self.slots[site]
        slot.clear()
        slot.storing.emptied()

    def _repeated(self, original: Any, module: Any, site: SiteHandle, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a module that this forward pass has called before."""
        for number, _ in site.members:
            self.repeats(number, answered=number in self.spans and self.spans[number].phase is Phase.ANSWERING)
        if site.index >= 0 and not self.context.execution.keepings[site.index].streams:
            reuses = self.ledger.of(site.index).verdict == "reuse" and site.index not in self.ledger.facts
            self.repeats(site.index, answered=reuses)
        positional, named = split_arguments(module, args, kwargs)
        names = bind_names(site.parameters, positional, named)
        self.enter(site, names)
        before = counter(names)
        output = original(module, *args, **kwargs)
        self.leave(site, module, names, output, before)
        self._probing.forget()
        return output

    # --- the end of the call -------------------------------------------------------------------------------

    def close(self, uncalled: Sequence[int] = ()) -> None:
        """Commit what happened: the decisions with all facts, the recorded spans, the remembered signals.

        Args:
            uncalled: The sites that were not called.
        """
        for site, reason in self.unfit:
            self.ledger.refuse(site, reason)
        for span in self.spans.values():
            span.finish()
        self.ledger.commit(uncalled)
        measuring = self.ledger.measuring
        if measuring is not None:
            self._probing.finish(measuring)
            decisions = self.ledger.by_site()
            computed = [site for site, decision in enumerate(decisions) if decision.computes]
            self.remembers = measuring.finish(list(range(len(decisions))), computed)
