"""State of one forward pass of the root model: what its sites do, and how they run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import compress, count
from typing import TYPE_CHECKING, Any, TypeVar

from cachepolicy.diffusers.hook_names import REGISTRY
from cachepolicy.engine.actions import (
    ANSWER,
    COMPUTE,
    PENDING,
    REUSE,
    UNCALLED,
    Op,
    hidden_states,
    is_finite,
    keep,
    mean_of_halves,
    predicted,
    push,
    reused,
    unfit,
)
from cachepolicy.engine.audit import run_bare
from cachepolicy.engine.batch_view import WHOLE
from cachepolicy.engine.block_chain import Begun, Names, Passage, bind_names
from cachepolicy.engine.chain_check import Tracker
from cachepolicy.engine.compat import left, split_arguments
from cachepolicy.engine.compile.graph_io import fill, lacking, problem
from cachepolicy.engine.compile.graph_ops import Part, Stage
from cachepolicy.engine.distributed.groups import is_initialized
from cachepolicy.engine.execution_plan import UNKNOWN_TRIMS, Trims
from cachepolicy.engine.guidance_batch import GuidanceSource
from cachepolicy.engine.history import trim
from cachepolicy.engine.hooks import LOCAL, Leave, SiteHandle
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.probing import Probing, counter
from cachepolicy.engine.signals import Remembered
from cachepolicy.engine.span_run import Phase, SpanRun
from cachepolicy.engine.step_context import StepContext
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import feedback, is_mean
from cachepolicy.planning.possible_decisions import NOTHING, Reads
from cachepolicy.planning.schedule import WAITING, Decision

if TYPE_CHECKING:
    from cachepolicy.engine.cfg_branches import Calls
    from cachepolicy.engine.clock import CallArguments, Clock, Reading
    from cachepolicy.engine.sessions import Session, State

K = TypeVar("K")
V = TypeVar("V")
_NO_GUIDANCE_SOURCE = GuidanceSource()
_NO_PARTS: Mapping[int, Part] = {}
_MOST_FORECASTS = 8  # forecasts of the clock for which a table of decisions keeps what follows from it


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
        learns: Whether the call runs outside graphs to learn the structure of its spans.
        parts: What the graphs read and leave, by site number.
        stage: State that compiled graphs read. Blocks that are compiled alone read theirs in `blocks`.
        spans_calls: Whether it belongs to a `run.step` context, so that a call of the root model is part of it.
        profile: Times of the modules, where the run is profiled.
        remembers: Whether this call has changed the remembered signals.
    """

    __slots__ = (
        "_again", "_before", "_called", "_foreseen", "_gated", "_opened", "_probing", "_spans", "_waiting", "answered",
        "args", "arguments", "before", "blocks", "codes", "compares", "computed", "context", "guidance", "inference",
        "kwargs", "learns", "ledger",
        "output", "owner", "parts", "passages", "profile", "reading", "remembers", "session", "slots", "source",
        "spans_calls", "stage", "started", "state", "step", "store", "unfit",
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
        self._spans: dict[int, SpanRun] = {}
        self._called: set[SiteHandle] = set()
        self._waiting: Mapping[SpanRun, Names] = {}
        """The spans whose first block runs before they are decided, with its inputs."""
        self._gated: set[SiteHandle] = set()
        self._before: dict[str, int | None] = {}
        self._opened: Begun | None = None
        self._foreseen: dict[int, Any] = {}
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
        self.enter(site, names, positional, named)
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
            refusal = lacking(self, site, self.ledger.action(site)) if self.ledger.shared(site) else None
            self.ledger.resolve(site, refusal)
            reason = problem(self, site)
            if reason is not None:
                self.ledger.refuse(site, reason)
            fill(self, site, part, refused=reason is not None)

    # --- probes --------------------------------------------------------------------------------------------

    def enter(self, site: SiteHandle, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the probes read the inputs of a module, and decide what waits for them."""
        if self._probing.enter(site, names, args, kwargs):
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
            span = self._spans.get(number)
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
        if site in self._called or (self._spans and any([self._is_done(span) for span, _ in site.members])):
            return self._repeated(original, module, site, args, kwargs)
        audit = self.context.audit
        self._called.add(site)
        self._probing.learn(names)
        if site in self._gated:
            # The probes have read this call between two graphs.
            self._gated.discard(site)
        elif self.ledger.measuring is not None:
            self.enter(site, names, positional, named)
        if audit is not None and audit.left is not None:
            return original(module, *args, **kwargs)
        if self.parts:
            self.release()
        recording, waiting, answering = list[tuple[SpanRun, int, Begun | None]](), list[SpanRun](), None
        position = 0
        for number, position in site.members:
            span = self._span(number)
            phase = self._enter_span(span, position, names)
            if phase is Phase.ANSWERING:
                answering = span
                break
            if phase is Phase.FIRST_BLOCK:
                waiting.append(span)
            recording.append((span, position, span.begin(position, names)))
        code = COMPUTE if answering is not None else self._code(site, args, kwargs)
        before = counter(names) if site.outputs else None
        if answering is not None:
            self.passages.pop(site, None)
            output = self._answered_block(answering, position, original, module, args, kwargs, names)
        elif code is ANSWER:
            output = self._answered(site.index)
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
            self._keep(site.index, code, hidden_states(args, kwargs), output)
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

    def _span(self, number: int) -> SpanRun:
        span = self._spans.get(number)
        if span is None:
            span = self._spans[number] = SpanRun(number, self.context, self.ledger)
        return span

    def _is_done(self, number: int) -> bool:
        return number in self._spans and self._spans[number].phase is Phase.DONE

    def _enter_span(self, span: SpanRun, position: int, names: Names) -> Phase:
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
        span = self._spans.get(site)
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
            self.repeats(number, answered=number in self._spans and self._spans[number].phase is Phase.ANSWERING)
        if site.index >= 0 and not self.context.execution.keepings[site.index].streams:
            reuses = self.ledger.of(site.index).verdict == "reuse" and site.index not in self.ledger.facts
            self.repeats(site.index, answered=reuses)
        positional, named = split_arguments(module, args, kwargs)
        names = bind_names(site.parameters, positional, named)
        self.enter(site, names, positional, named)
        before = counter(names)
        output = original(module, *args, **kwargs)
        self.leave(site, module, names, output, before)
        self._probing.forget()
        return output

    # --- single modules ------------------------------------------------------------------------------------

    def _code(self, site: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
        """Return what a single-module site does: `ANSWER`, or how it computes."""
        index = site.index
        if index < 0 or self.context.execution.keepings[index].streams:
            return COMPUTE  # the history of a site with streams is its chain in `members`
        store = self.store if self.context.wanted(index).outputs else COMPUTE
        if self.ledger.resolve(index, self.problem(site, {}, args, kwargs)).verdict != "reuse":
            return store
        reason = unfit(self.slots[index], hidden_states(args, kwargs), self.context.rows) or self._unsound(index)
        if reason is None:
            return ANSWER
        self.ledger.refuse(index, reason)
        return store

    def problem(self, site: SiteHandle, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return why a site cannot reuse, where other processes need this before the decision."""
        if not self.ledger.shared(site.index):
            return None
        action = self.ledger.action(site.index)
        if isinstance(action, ir.ApproximateUncond):
            return None
        if self.context.execution.keepings[site.index].streams:
            return self._span(site.index).problem(names, action)
        reason = unfit(self.slots[site.index], hidden_states(args, kwargs), self.context.rows)
        return reason or self.context.excess(site.index, action)

    def _unsound(self, site: int) -> str | None:
        """Return why the prediction of a site is not finite, or None. A checked prediction is kept for the answer."""
        action = self.ledger.resolve(site).action
        excess = self.context.excess(site, action)
        if not isinstance(action, ir.Predict):
            return excess
        if excess is not None or is_initialized():
            # With several processes, one might refuse what the others give, so values are not checked.
            return excess
        output = self._foreseen[site] = self._predicted(site, action)
        return None if is_finite(output) else Fact.NOT_FINITE

    def _predicted(self, site: int, action: ir.Predict) -> Any:
        context, slot = self.context, self.slots[site]
        return predicted(slot, action, context.arguments(action, site), self.step, context.places(action), context.rows)

    def _answered(self, site: int) -> Any:
        """Return the answer of a site from its stored outputs."""
        slot, action, rows = self.slots[site], self.ledger.of(site).action, self.context.rows
        if is_mean(action):
            return mean_of_halves(slot, rows)
        if not isinstance(action, ir.Predict):
            return reused(slot, rows, inference=self.inference)
        output = self._foreseen.pop(site, None)
        if output is None:
            output = self._predicted(site, action)
        if feedback(action):
            if slot.shape is not None:
                slot.shape = rows.shape(slot.shape, slot.rows)
            push(slot, self.context.execution.keepings[site], self.store, output, self.step, rows)
        return output

    def _keep(self, site: int, code: Op, states: Any, output: Any) -> None:
        keeping = self.context.execution.keepings[site]
        keep(self.slots[site], keeping, code, states, output, self.step, self.context.rows)

    # --- the root model as a site --------------------------------------------------------------------------

    def open(self, site: SiteHandle) -> None:
        """Begin the root model as a site: it is answered, or its forward runs."""
        names = self.arguments.named
        for number, position in site.members:
            span = self._span(number)
            if self._enter_span(span, position, names) is Phase.ANSWERING:
                self.answered, self.output = True, span.linked(position, names)
                return
            self._opened = span.begin(position, names)
        if self._code(site, self.args, self.kwargs) is ANSWER:
            self.answered, self.output = True, self._answered(site.index)
        elif self.ledger.facts:
            self.ledger.plan()

    def shut(self, site: SiteHandle, output: Any) -> None:
        """Store the results of the root model as a site."""
        for number, position in site.members:
            self._span(number).end(position, self.owner.module, self.arguments.named, self._opened, output)
        keeping = self.context.execution.keepings[site.index]
        if not keeping.streams and self.context.wanted(site.index).outputs:
            self._keep(site.index, self.store, hidden_states(self.args, self.kwargs), output)

    # --- the end of the call -------------------------------------------------------------------------------

    def uncalled(self) -> list[int]:
        """Return the sites that the forward pass has not called, also those inside a site that has answered."""
        if self.answered or self.parts:
            return []  # a graph does not tell which of its sites have run
        names, keepings, handles = self.context.execution.names, self.context.execution.keepings, self.owner.handles
        # Almost always all sites were called, so the codes are looked up without a Python loop over the sites.
        return [
            site
            for site in compress(count(), map(UNCALLED.__contains__, self.codes))
            if names[site] != ("",)
            and (site not in self._spans or self._spans[site].phase is Phase.UNDECIDED)
            and (keepings[site].streams or handles[names[site][0]] not in self._called)
        ]

    def close(self, uncalled: Sequence[int] = ()) -> None:
        """Commit what happened: the decisions with all facts, the recorded spans, the remembered signals.

        Args:
            uncalled: The sites that were not called.
        """
        for site, reason in self.unfit:
            self.ledger.refuse(site, reason)
        for span in self._spans.values():
            span.finish()
        self.ledger.commit(uncalled)
        measuring = self.ledger.measuring
        if measuring is not None:
            self._probing.finish(measuring)
            decisions = self.ledger.by_site()
            computed = [site for site, decision in enumerate(decisions) if decision.computes]
            self.remembers = measuring.finish(list(range(len(decisions))), computed)

    def let_go(self) -> bool:
        """Release what no later step reads. Return True if the held bytes may have changed."""
        context, branch, table = self.context, self.context.branch, self.ledger.table
        if table is None or branch.trims is UNKNOWN_TRIMS or self.parts or self.owner.repeated:
            trims, branch.trims = self._trims(), UNKNOWN_TRIMS
        else:
            key = context.liveness, branch.trims
            trims = table.trims.get(key)
            if trims is None:
                trims = _put(table.trims, key, self._trims())
            branch.trims = trims
        for sites, reads in trims.releases:
            branch.reads[sites[0]] = reads
            for site in sites:
                trim(self.slots[site], reads)
        changed = trims.changed or self.remembers
        crosses = bool(context.execution.signals.crossed)
        if branch.remembered and not crosses and not context.liveness.measures(context.tick, now=False):
            branch.remembered = Remembered()
            changed = True
        return changed

    def _trims(self) -> Trims:
        """Return the sites with less to read than before."""
        context, ledger, repeated = self.context, self.ledger, self.owner.repeated
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
            if not same or ledger.facts or self.parts or (reads and short):
                releases.append((group.sites, reads))
        return Trims(releases, changed)

    def planned_codes(self) -> list[Op]:
        """Return what each site does, by site number. The list is cached with the decisions."""
        context, table = self.context, self.ledger.table
        if table is None or context.audit is not None or self.owner.repeated:
            return self._ops()
        key = context.liveness, self.store
        codes = table.codes.get(key)
        if codes is None:
            codes = _put(table.codes, key, self._ops())
        return codes.copy()

    def _ops(self) -> list[Op]:
        partition = self.context.branch.partition
        by_group = [
            self._op(decision, group.sites[0])
            for decision, group in zip(self.ledger.decisions, partition.groups, strict=True)
        ]
        return [by_group[group] for group in partition.group_of]

    def _op(self, decision: Decision, site: int) -> Op:
        """Return what a site does by its decision. A result is stored only if a later step may read it."""
        if decision is WAITING or self.context.audit is not None:
            return PENDING
        if decision.verdict != "reuse":
            return self.store if self.context.wanted(site).outputs else COMPUTE
        return REUSE if isinstance(decision.action, ir.Reuse) and not decision.action.mean else ANSWER


def _put(known: dict[K, V], key: K, value: V) -> V:
    """Add an entry to a cache, and return its value."""
    if len(known) >= _MOST_FORECASTS:
        known.clear()
    known[key] = value
    return value
