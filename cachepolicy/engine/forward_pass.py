"""State of one forward pass of the root model.

Sites that depend only on the clock are decided before the forward pass, signal-dependent sites during it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, count
from numbers import Real
from typing import Any, Protocol

import torch

from cachepolicy.diffusers.argument_names import HIDDEN_STATES
from cachepolicy.engine.actions import (
    ANSWER,
    COMPUTE,
    NOT_FINITE,
    PENDING,
    STORE,
    STORE_CLONE,
    TOO_LARGE,
    UNCALLED,
    Place,
    Slot,
    hidden_states,
    is_finite,
    is_too_large,
    keep,
    predict,
    predicted,
    push,
    reused,
    unfit,
    versions,
)
from cachepolicy.engine.audit import Audit, run_bare
from cachepolicy.engine.block_chain import (
    Begun,
    Chain,
    ChainEntry,
    ChainForm,
    Continuations,
    Keeps,
    Link,
    Names,
    Recorder,
    bind_names,
    handed_on,
    parts,
    passed,
    rebuilt,
    signature,
)
from cachepolicy.engine.chain_check import Tracker, is_trackable
from cachepolicy.engine.compat import left, split_arguments
from cachepolicy.engine.compile.graph_io import fill, lacking, problem
from cachepolicy.engine.compile.graph_ops import Part
from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.groups import is_initialized
from cachepolicy.engine.execution_plan import ExecutionPlan
from cachepolicy.engine.history import trim
from cachepolicy.engine.hooks import LOCAL, Leave, SiteHandle
from cachepolicy.engine.memory_budget import Lease
from cachepolicy.engine.signals import Measuring, Remembered, probed
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.traversal import names_in
from cachepolicy.planning.history_spec import Keeping, axis, feedback, reach
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.possible_decisions import NOTHING, Reads
from cachepolicy.planning.predictors import Weights, weights
from cachepolicy.planning.schedule import (
    HIDDEN,
    NOT_CALLED,
    UNDEFINED_ARGUMENT,
    UNKNOWN_FORM,
    WAITING,
    Decision,
    Inputs,
    Memory,
    Partition,
    Tick,
    advance,
    clock_words,
    decide,
    decide_all,
    hides,
    owner_of,
)


@dataclass(slots=True)
class Branch:
    """State of one guidance branch: memories of the decisions, slots of the sites, and past signals."""

    partition: Partition
    memories: list[Memory]
    slots: list[Slot]
    remembered: Remembered = field(default_factory=Remembered)
    reads: dict[int, Reads] = field(default_factory=dict[int, Reads])
    """Reads of each group at the last check, by the first site of the group."""
    held: int = 0
    """Bytes that the branch holds."""
    signals: Lease | None = None
    """The lease for remembered signals, if there is a memory limit."""
    ticks: dict[int, Tick] = field(default_factory=dict[int, Tick])
    """The times of the calls so far, by step."""

    def forget(self) -> None:
        """Release the history. The memories of the decisions stay."""
        self.slots = [Slot(slot.storing) for slot in self.slots]
        self.remembered = Remembered()
        self.reads.clear()
        self.held = 0


class Forms(Protocol):
    """Known structure of the spans, as learned from calls outside graphs."""

    forms: dict[int, ChainForm]


class Host(Protocol):
    """The interface of a root model for `ForwardPass`."""

    execution: ExecutionPlan
    continuations: Continuations
    externals: Mapping[str, Any]
    module: torch.nn.Module
    repeated: set[int]
    remeasured: set[ir.Probe]

    @property
    def graphs(self) -> Forms:
        """The known structure of the model's graphs."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """A module output that a probe reads."""

    probe: ir.Probe
    module: Any
    names: Names
    output: Any
    written: tuple[int, ...]
    before: int | None

    def fresh(self, before: torch.Tensor) -> bool:
        """Return True if neither output nor input was modified in place since the module began."""
        return versions(self.output) == self.written and (self.before is None or before._version == self.before)


class ForwardPass:
    """One forward pass of a root model, from its decisions to its end.

    Args:
        host: The root model under the settings of the session.
        branch: The state of the guidance branch.
        tick: The time of the call.
        leaders: Decisions of other branches at this step, by branch name, for rules that follow them.
        measuring: The signals of this call, or None if no rule can read one.
        facts: Reasons why sites have to compute, by site number.
        liveness: What later steps may read.
        company: The processes that hold shards of the parameters, or None.
        audit: Compares the answers with computed outputs, or None where the trajectory is not audited.
    """

    def __init__(
        self,
        host: Host,
        branch: Branch,
        tick: Tick,
        leaders: Mapping[str, Sequence[Decision]],
        measuring: Measuring | None,
        facts: dict[int, str],
        liveness: Liveness,
        company: Agreement | None = None,
        audit: Audit | None = None,
    ) -> None:
        self.host = host
        self.audit = audit
        self.branch = branch
        self.tick = branch.ticks[tick.step] = tick
        self.leaders = leaders
        self.measuring = measuring
        self.company = company
        self.liveness = liveness
        self.inference = torch.is_inference_mode_enabled()
        # Inference tensors have no `_version` counter, so in-place writes cannot be detected. Clones are stored.
        self.store = STORE_CLONE if self.inference else STORE
        self.facts = facts
        self.signals_of: dict[int, Mapping[str, float]] = {}
        self.halved = False
        self.half = 1
        self.again = False
        self.remembers = False
        """Whether this call has changed the remembered signals."""
        self.started = time.perf_counter()
        self.decisions: list[Decision]
        self.after: list[Memory]
        if facts or self._leaders_part():
            self.decide_again()
        else:
            self.decisions, self.after = self._decided()
        self.parts: Mapping[int, Part] = {}
        self._before: dict[str, int | None] = {}
        self._modes: dict[int, str] = {}
        self._links: dict[int, dict[int, Link]] = {}
        """The blocks of the spans that answer, without those that have been called."""
        self._called: set[SiteHandle | int] = set()
        """The modules that have been called, and the spans that have computed from their first block to their last."""
        self._gated: set[SiteHandle] | None = None
        self._recorders: dict[int, Recorder | Tracker] = {}
        self._waiting: dict[int, Names] = {}
        """The spans whose first block runs before they are decided, with its inputs."""
        self._unclear: list[Seen] = []
        self._begun: dict[ir.Probe, tuple[Names, int | None]] = {}
        self._opened: Begun | None = None
        self._last: tuple[Any, Names, list[Any]] | None = None
        self._arguments: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
        self._foreseen: dict[tuple[int, int], Any] = {}
        """What a site would be answered with, made before it was settled in order to check it, by site and segment."""
        self._sums: dict[tuple[int, int], list[torch.Tensor | None]] = {}
        """The sums of the inputs of a segment with its residuals, likewise."""
        self._inputs_of: dict[int, Names] = {}
        """The inputs of the spans that are pending."""

    def _leaders_part(self) -> bool:
        """Return whether a followed branch was decided site by site, so that the sites of a group may have to part."""
        groups = self.branch.partition.groups
        return any(
            decided[site] is not decided[group.sites[0]]
            for decided in self.leaders.values()
            for group in groups
            for site in group.sites[1:]
        )

    def _decided(self) -> tuple[list[Decision], list[Memory]]:
        execution, program = self.host.execution, self.host.execution.program
        if not (self.facts or execution.followed or program.measured) and self.branch.partition is program.coarse:
            return execution.recall.decided(self.branch.memories, self.tick)
        return decide_all(
            program,
            self.branch.partition,
            self.branch.memories,
            self.tick,
            signals_of=self.signals_of if program.measured else None,
            followed=self.leaders,
            facts=self.facts,
        )

    # --- what graphs ask -----------------------------------------------------------------------------------

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots, by site number."""
        return self.branch.slots

    @property
    def keepings(self) -> Sequence[Keeping]:
        """The stored results of each site, by site number."""
        return self.host.execution.keepings

    @property
    def forms(self) -> Mapping[int, ChainForm]:
        """The known structure of the spans, by site number."""
        return self.host.graphs.forms

    @property
    def step(self) -> int:
        """The step of the call."""
        return self.tick.step

    def gate(self, site: SiteHandle, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle a probed or waiting module that is about to run in a graph."""
        positional, named = split_arguments(module, args, kwargs)
        names = bind_names(site.parameters, positional, named)
        self.enter(site, names, positional, named)
        self._gated = (self._gated or set()) | {site}
        self._before[site.name] = _counter(names)
        self.release()

    def look_after(
        self, site: SiteHandle, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Handle a probed module that has run in a graph."""
        names = bind_names(site.parameters, *split_arguments(module, args, kwargs))
        self.leave(site, module, names, output, self._before.pop(site.name, None))

    def release(self) -> None:
        """Decide the sites that graphs wait for, once all signals are measured."""
        if not self.parts or self.measuring is None:
            return
        read_now = self.host.execution.plan.read_now
        for site, part in self.parts.items():
            if self.decided(site) is not WAITING or not all(map(self.measuring.has, read_now.get(site, ()))):
                continue
            self.decision(site, lacking(self, site, self._action(site)) if self._shared(site) else None)
            reason = problem(self, site)
            if reason is not None:
                self.refuse(site, reason)
            fill(self, site, part, refused=reason is not None)

    def decided(self, site: int) -> Decision:
        """Return the current decision of the site, `WAITING` if its signals are missing."""
        return self.decisions[self.branch.partition.group_of[site]]

    # --- what is kept ------------------------------------------------------------------------------------

    def wanted(self, site: int) -> Reads:
        """Return what later steps may read of a result that the site computes now."""
        if site in self.host.repeated:
            return NOTHING
        return self.liveness.wanted(self.host.execution.program.alike.group_of[site], self.tick, self.tick.step)

    def let_go(self) -> bool:
        """Release what no later step reads. Return True if the held bytes may have changed."""
        alike, reads_of, slots = self.host.execution.program.alike.group_of, self.branch.reads, self.branch.slots
        changed = False
        for group, decision, memory in zip(self.branch.partition.groups, self.decisions, self.after, strict=True):
            first = group.sites[0]
            reads = self.liveness.wanted(alike[first], self.tick, memory.last)
            if first in self.host.repeated:
                reads = NOTHING
            pushes = decision.computes or (decision.verdict == "reuse" and feedback(decision.action))
            same = reads_of.get(first) is reads
            if same and not pushes:
                continue
            changed |= bool(reads) or not same
            # A graph stores every result, read later or not, so that one graph serves all steps. Trim those here.
            short = reads.depth < self.liveness.full[alike[first]].depth
            if not same or self.facts or self.parts or (reads and short):
                reads_of[first] = reads
                for site in group.sites:
                    trim(slots[site], reads)
        past = self.branch.remembered
        crosses = bool(self.host.execution.signals.crossed)
        if past and not crosses and not self.liveness.measures(self.tick, now=False):
            self.branch.remembered = Remembered()
            changed = True
        return changed or self.remembers

    # --- decisions on the way ----------------------------------------------------------------------------

    def decision(self, site: int, problem: str | None = None) -> Decision:
        """Return the decision of the site, and make it now if it waits for signals.

        Args:
            site: The site number.
            problem: Why the site cannot reuse. Processes that decide together exchange it.
        """
        group = self.branch.partition.group_of[site]
        if self.decisions[group] is WAITING:
            refusal = self.facts.get(site) or problem
            if self.measuring is not None and self.measuring.agreement is not None:
                refusal = self._measured_together(site, refusal)
            self._decide(site)
            self._consent(site, refusal)
        return self.decisions[group]

    def _decide(self, site: int) -> None:
        assert self.measuring is not None
        group = self.branch.partition.group_of[site]
        self.signals_of[site] = self.measuring.numbers(site)
        rules, memory = self.branch.partition.groups[group].rules, self.branch.memories[group]
        self.decisions[group] = decide(rules, self._inputs(site, memory))

    def _shared(self, site: int) -> bool:
        """Return whether a pending decision involves other processes."""
        waits = self.decisions[self.branch.partition.group_of[site]] is WAITING
        measures = self.measuring is not None and self.measuring.agreement is not None
        return waits and (measures or self.company is not None)

    def _measured_together(self, site: int, refusal: str | None) -> str | None:
        """Measure together with the processes that hold the other parts of the samples.

        If one process cannot reuse, none does.
        """
        assert self.measuring is not None
        refused = self.measuring.agree(*self._matter(site), [site], refuses=refusal is not None)
        return (refusal or "another process could not reuse") if refused else None

    def _consent(self, site: int, refusal: str | None) -> None:
        """Let a decided site compute if a process refuses, or if a process that shares its parameters computes.

        Sharded parameters are gathered by a collective, so either all processes run the site or none does.
        """
        decision = self.decisions[self.branch.partition.group_of[site]]
        if self.company is not None:
            subject, past = self._matter(site)
            computes = decision.verdict != "reuse" or refusal is not None
            refused = self.company.settle(
                f"{subject} at step {self.tick.step}", [], past=past, refuses=computes
            ).refused
            refusal = refusal or ("another process had to compute" if refused else None)
        if refusal is not None and decision.verdict == "reuse":
            self.facts[site] = refusal
            self._decide(site)

    def _matter(self, site: int) -> tuple[str, str]:
        """Return what is decided, and the non-signal inputs of the decision, as text equal on all processes."""
        memory = self.branch.memories[self.branch.partition.group_of[site]]
        name = self.host.execution.program.plan.sites[site].name
        return f"`{name}`", f"{self.tick.branch} {memory.last} {memory.computes}"

    def problem(self, site: SiteHandle, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return why a site cannot reuse, where other processes need this before the decision."""
        if not self._shared(site.index) or isinstance(self._action(site.index), ir.ApproximateUncond):
            return None
        if self.host.execution.keepings[site.index].streams:
            return self._chain_problem(site.index, names, self._action(site.index))
        action = self._action(site.index)
        problem = unfit(self.branch.slots[site.index], hidden_states(args, kwargs), halved=self.halved)
        return problem or self.excess(site.index, action)

    def _action(self, site: int) -> ir.Action | None:
        """Return the action of the site if it reuses. It depends only on the clock."""
        group = self.branch.partition.group_of[site]
        rules, memory = self.branch.partition.groups[group].rules, self.branch.memories[group]
        owner = owner_of(rules, self._inputs(site, memory))
        return None if owner is None else owner.rule.action

    def _inputs(self, site: int, memory: Memory) -> Inputs:
        leaders = {name: decided[site] for name, decided in self.leaders.items()}
        signals = self.signals_of.get(site, {})
        tick = replace(self.tick, uncond_skipped=True) if self.halved else self.tick
        return Inputs(tick, memory, signals, self.host.execution.program.tables, leaders, self.facts.get(site))

    def repeats(self, site: int, *, answered: bool) -> None:
        """Mark a site that one forward pass calls more than once. Its history holds one result, so it always computes.

        Args:
            site: The site number.
            answered: Whether an earlier call of this forward pass was answered. The forward pass then runs again.
        """
        self.host.repeated.add(site)
        self.again |= answered
        self._recorders.pop(site, None)
        self._links.pop(site, None)
        if self._modes.get(site) is not None:
            self._modes[site] = COMPUTE
        slot = self.branch.slots[site]
        slot.clear()
        slot.storing.emptied()

    def _repeated(self, original: Any, module: Any, site: SiteHandle, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a module that this forward pass has called before."""
        for span, _ in site.members:
            self.repeats(span, answered=self._modes.get(span) == ANSWER)
        if site.index >= 0 and not self.host.execution.keepings[site.index].streams:
            reuses = self.decided(site.index).verdict == "reuse" and site.index not in self.facts
            self.repeats(site.index, answered=reuses)
        positional, named = split_arguments(module, args, kwargs)
        names = bind_names(site.parameters, positional, named)
        self.enter(site, names, positional, named)
        before = _counter(names)
        output = original(module, *args, **kwargs)
        self.leave(site, module, names, output, before)
        self._last = None
        return output

    def refuse(self, site: int, reason: str) -> None:
        """Force a site and the sites inside it to compute."""
        self.facts[site] = reason
        for other in self.host.execution.program.plan.sites:
            if site in other.parents:
                self.facts.setdefault(other.index, "the site around it had to compute")

    def uncalled(self, codes: Sequence[str], handles: Mapping[str, SiteHandle]) -> list[int]:
        """Return the sites that the forward pass has not called, also those inside a site that has answered.

        Args:
            codes: The codes of the frame after the forward pass. Compiled graphs do not mark them.
            handles: The sites by module name.
        """
        names, keepings = self.host.execution.names, self.host.execution.keepings
        # Almost always all sites were called, so the codes are looked up without a Python loop over the sites.
        return [
            site
            for site in compress(count(), map(UNCALLED.__contains__, codes))
            if names[site] != ("",)
            and site not in self._modes
            and (keepings[site].streams or handles[names[site][0]] not in self._called)
        ]

    def close(self, unfit: Sequence[tuple[int, str]], uncalled: Sequence[int] = ()) -> None:
        """Decide again with all facts of the call, so that memories and trace record what happened.

        Args:
            unfit: The sites whose history did not fit, with the reasons, as the frame has collected them. They are
                passed here because the frame refers to this object: a reference back would be a cycle, and the tensors
                of the call would live until the garbage collector runs.
            uncalled: The sites that were not called.
        """
        for site, reason in unfit:
            self.refuse(site, reason)
        for recorder in self._recorders.values():
            recorder.finish()
        undecided = self._undecided()
        if undecided and self.measuring is not None and self.measuring.agreement is not None:
            self.measuring.agree("what did not run", "", undecided)
        for site in undecided:
            self._decide(site)
            if not any(hides(self.decisions[parent], self.tick.branch) for parent in self._around(site)):
                self._consent(site, self.facts.get(site))
        parents = self.host.execution.plan.sites
        for site in uncalled:
            around = [outer for outer in parents[site].parents if outer not in self.facts]
            if not any(hides(self.decided(outer), self.tick.branch) for outer in around):
                self.facts[site] = NOT_CALLED
        if self.facts:
            self.decide_again()
            if waiting := self._undecided():
                # The sites around them had to compute after all, so these sites need decisions too.
                assert self.measuring is not None
                self.signals_of |= {site: self.measuring.numbers(site) for site in waiting}
                self.decide_again()
        elif self.signals_of:
            self._resolve()
        if self.measuring is not None:
            for seen in self._unclear:
                self._see(seen, last=True)
            decisions = self.branch.partition.spread(self.decisions)
            computed = [site for site, decision in enumerate(decisions) if decision.computes]
            self.remembers = self.measuring.finish(list(range(len(decisions))), computed)

    def _around(self, site: int) -> Sequence[int]:
        """Return the groups of the sites that contain a site."""
        return self.branch.partition.groups[self.branch.partition.group_of[site]].parents

    def _undecided(self) -> list[int]:
        """Return the sites that wait for their signals."""
        if not self.host.execution.program.measured:
            return []
        return [site for site, group in enumerate(self.branch.partition.group_of) if self.decisions[group] is WAITING]

    def decide_again(self) -> None:
        """Decide again with the facts known so far, on the fine partition."""
        if self.branch.partition is not self.host.execution.program.fine:
            self.branch.memories = self.host.execution.program.split(self.branch.memories)
            self.branch.partition = self.host.execution.program.fine
        self.decisions, self.after = self._decided()

    def open(self, site: SiteHandle, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Begin the root model as a site. Return whether it is answered, and the answer."""
        for span, position in site.members:
            if self._mode(span, position, names) == ANSWER:
                return True, self._linked(span, self._links[span].pop(position), names)
            if self._watches(span):
                self._opened = self._recorder(span, position, names).begin(position, names)
        if self._code(site, args, kwargs) == ANSWER:
            return True, self.answered(site.index)
        if self.facts:
            self.decide_again()
        return False, None

    def shut(
        self, site: SiteHandle, module: Any, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Store the results of the root model as a site."""
        for span, position in site.members:
            if span in self._recorders:
                self._record(span, position, module, names, self._opened, output)
        keeping = self.host.execution.keepings[site.index]
        if not keeping.streams and self.wanted(site.index).outputs:
            states = hidden_states(args, kwargs)
            keep(
                self.branch.slots[site.index],
                keeping,
                self.store,
                states,
                output,
                step=self.tick.step,
                full=not self.halved,
            )

    def _resolve(self) -> None:
        """Merge the decisions made during the forward pass, and what they hide, into the earlier ones."""
        groups = self.branch.partition.groups
        for index, group in enumerate(groups):
            site, memory = group.sites[0], self.branch.memories[index]
            hidden = any(hides(self.decisions[parent], self.tick.branch) for parent in group.parents)
            if hidden:
                self.decisions[index] = HIDDEN
            if hidden or site in self.signals_of:
                self.after[index] = advance(group.rules, self._inputs(site, memory), self.decisions[index])

    # --- one intercepted call ----------------------------------------------------------------------------

    def special(
        self, original: Any, module: Any, site: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module that is probed, belongs to a span, or waits for signals."""
        positional, named = split_arguments(module, args, kwargs)
        names = named if not positional else bind_names(site.parameters, positional, named)
        if site.alone:
            span, position = site.members[0]
            links = self._links.get(span)
            if links is not None:
                link = links.pop(position, None)
                if link is None:
                    return self._repeated(original, module, site, args, kwargs)
                if self.audit is None and not link.leads:
                    return handed_on(link.shape, names)
                return self._answered_block(span, position, link, original, module, args, kwargs, names)
            if position > 0:
                # A span is decided when its first block has run. A tracker exists only if it computes.
                tracker = self._recorders.get(span)
                if type(tracker) is Tracker:
                    return self._tracked(tracker, original, module, site, args, kwargs, names)
        if site in self._called or any([span in self._called for span, _ in site.members]):
            return self._repeated(original, module, site, args, kwargs)
        self._begin(site, names, positional, named)
        if self.audit is not None and self.audit.left is not None:
            return original(module, *args, **kwargs)
        self.release()
        recording = list[tuple[int, int, Begun | None]]()
        waiting = list[int]()
        answer: int | None = None
        position = 0
        for span, position in site.members:
            mode = self._mode(span, position, names)
            if mode == ANSWER:
                answer = span
                break
            if mode == PENDING:
                waiting.append(span)
            if self._watches(span):
                recording.append((span, position, self._recorder(span, position, names).begin(position, names)))
        code = COMPUTE if answer is not None else self._code(site, args, kwargs)
        before = _counter(names)
        if answer is not None:
            link = self._links[answer].pop(position)
            output = self._answered_block(answer, position, link, original, module, args, kwargs, names)
        elif code == ANSWER:
            output = self._answered_site(site.index, original, module, args, kwargs)
        else:
            output, answer = self._run(original, module, args, kwargs, waiting, names)
            if self.audit is not None and self.audit.left is not None:
                return output
        for span in waiting:
            if self._modes[span] == PENDING:
                self._settle(span, names, ran=True)
        for span, position, begun in recording:
            self._record(span, position, module, names, begun, output)
        if answer is not None or code == ANSWER:
            return output
        if code != COMPUTE:
            slot, keeping = self.branch.slots[site.index], self.host.execution.keepings[site.index]
            keep(slot, keeping, code, hidden_states(args, kwargs), output, step=self.tick.step, full=not self.halved)
        self.leave(site, module, names, output, before)
        self._last = (module, names, parts(output)[0]) if isinstance(output, torch.Tensor | tuple) else None
        return output  # pyright: ignore[reportUnknownVariableType]

    def _begin(self, site: SiteHandle, names: Names, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Begin the first call of a module: learn from its inputs, and let the probes read them."""
        self._called.add(site)
        self._learn(names)
        if self._gated and site in self._gated:
            # The probes have read this call between two graphs.
            self._gated.discard(site)
        else:
            self.enter(site, names, positional, named)

    def _run(
        self,
        original: Any,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        waiting: Sequence[int],
        names: Names,
    ) -> tuple[Any, int | None]:
        """Run the module, or answer a waiting span that is decided meanwhile.

        Returns:
            The output, and the number of the answered span or None.
        """
        if not waiting:
            return original(module, *args, **kwargs), None
        frame = LOCAL.frame
        self._waiting |= dict.fromkeys(waiting, names)
        try:
            output = original(module, *args, **kwargs)
        except Leave as leave:
            if leave.span not in waiting:
                raise
            # The first block was left before its end, so its recording is incomplete.
            self._recorders.pop(leave.span, None)
            left(module)
            return self._linked(leave.span, self._links[leave.span].pop(0), names), leave.span
        finally:
            for span in waiting:
                del self._waiting[span]
        span = None if self.audit is None else self.audit.left
        if self.audit is None or span is None or span not in waiting:
            return output, None
        self.audit.left, LOCAL.frame = None, frame
        self._recorders.pop(span, None)
        self._compare_segment(self.audit, span, 0, output)
        return output, span

    def _learn(self, names: Names) -> None:
        """Learn which input of a module continues which output of the module before it, by tensor identity."""
        if self._last is None:
            return
        module, before, outputs = self._last
        self._last = None
        for index, output in enumerate(outputs):
            for name, value in names.items():
                if value is output and name in before and isinstance(output, torch.Tensor):
                    self.host.continuations.learn(module, index, name)

    def enter(self, site: SiteHandle, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the probes read the inputs."""
        if self.measuring is None:
            return
        for probe in site.starts:
            if probe in self._begun:
                self._remeasures(probe)
            self._begun[probe] = (names, _counter(names))
        for probe in site.inputs:
            tensor = probed(probe, names, hidden_states(args, kwargs))
            if tensor is not None:
                self._sees(probe, tensor)
        if site.inputs:
            self._look()

    def leave(self, site: SiteHandle, module: Any, names: Names, output: Any, before: int | None) -> None:
        """Let the probes read the outputs."""
        if self.measuring is None or not site.outputs:
            return
        for probe in site.outputs:
            # The residual of a span is relative to the input of its first block.
            first, counter = self._begun.get(probe, (names, before))
            self._see(Seen(probe, module, first, output, versions(output), counter), last=False)
        self._look()

    def _see(self, seen: Seen, *, last: bool) -> None:
        """Pass the hidden states of an output to a probe. Ambiguous outputs are resolved at the end of the call."""
        assert self.measuring is not None
        outputs, _ = parts(seen.output)
        target = _target(seen.names)
        before = seen.names.get(target or "")
        places = [index for index, output in enumerate(outputs) if isinstance(output, torch.Tensor)]
        alike = [index for index in places if isinstance(before, torch.Tensor) and outputs[index].shape == before.shape]
        known = [index for index in alike if self.host.continuations.input_of(seen.module, index) == target]
        if len(known) != 1 and len(alike) > 1 and not last:
            self._unclear.append(seen)
            return
        if not places:
            return
        index = (known or alike or places)[0]
        stream = outputs[index]
        if seen.probe.stream == "output":
            self._sees(seen.probe, stream)
        elif isinstance(before, torch.Tensor) and before.shape == stream.shape and seen.fresh(before):
            self._sees(seen.probe, stream - before)

    def _sees(self, probe: ir.Probe, tensor: torch.Tensor) -> None:
        """Record the tensor of a probe."""
        assert self.measuring is not None
        if self.measuring.has(probe):
            self._remeasures(probe)
        else:
            self.measuring.see(probe, tensor)

    def _remeasures(self, probe: ir.Probe) -> None:
        """Mark a probe that one forward pass passes more than once. Signals that read it are undefined.

        If a site has been answered because of a signal, the forward pass runs again.
        """
        self.host.remeasured.add(probe)
        self.again |= any(self.decided(site).verdict == "reuse" for site in self.signals_of)

    def _look(self) -> None:
        """Decide the spans that wait for a probe, and leave a running first block if its span reuses."""
        for span in self._waiting:
            if self._modes[span] == PENDING and self.measuring is not None and self._ready(span):
                self._settle(span, None, ran=False)
                if self._modes[span] == ANSWER and self.audit is not None:
                    # The block goes on, but what follows in it is not seen: under the policy, it would be left here.
                    self._expect(self.audit, span, self._links[span].pop(0), self._waiting[span])
                    self.audit.left, LOCAL.frame = span, None
                    return
                if self._modes[span] == ANSWER:
                    raise Leave(span)

    def _ready(self, span: int) -> bool:
        assert self.measuring is not None
        return all(self.measuring.has(probe) for probe in self.host.execution.inside[span])

    # --- spans -------------------------------------------------------------------------------------------

    def _mode(self, span: int, position: int, names: Names) -> str:
        """Return whether the span answers, computes, or stays pending until its first block runs."""
        mode = self._modes.get(span)
        if mode is not None and mode != PENDING:
            return mode
        group = self.branch.partition.group_of[span]
        if mode is None and self.decisions[group] is WAITING and position == 0 and not self._ready(span):
            self._modes[span] = PENDING
            self._inputs_of[span] = names
            problem = self._chain_problem(span, names, self._action(span))
            if problem is not None:
                self.facts[span] = problem
            return PENDING
        self._settle(span, names if mode is None else None, ran=mode is not None)
        return self._modes[span]

    def _settle(self, span: int, names: Names | None, *, ran: bool) -> None:
        """Decide a span. A span that has begun to run, or whose history does not fit, computes."""
        waited = self._inputs_of.pop(span, None)
        problem = self.facts.get(span)
        late = "its first block had run before it was decided" if ran else None
        if self._shared(span):
            if names is not None and problem is None:
                problem = self._chain_problem(span, names, self._action(span))
            decision, problem = self.decision(span, problem or late), None
        else:
            decision = self.decision(span)
            if names is not None and problem is None and decision.verdict == "reuse":
                problem = self._chain_problem(span, names, decision.action)
        if decision.verdict != "reuse":
            self._modes[span] = COMPUTE
        elif problem is not None or ran:
            self.refuse(span, problem or late or "")
            self._modes[span] = COMPUTE
        elif (overflow := self._overflow(span, decision.action, names or waited)) is not None:
            self.refuse(span, overflow)
            self._modes[span] = COMPUTE
        else:
            self._modes[span] = ANSWER
            self._links[span] = dict(self._chain(span).links)

    def _watches(self, span: int) -> bool:
        """Return whether a computing span is recorded: for its history, or to learn its blocks."""
        return span not in self.host.repeated and (not self._chain(span).links or bool(self.wanted(span)))

    def _chain(self, span: int) -> Chain:
        slot = self.branch.slots[span]
        if slot.chain is None:
            slot.chain = Chain(slot.storing)
        return slot.chain

    def _recorder(self, span: int, position: int, names: Names) -> Recorder | Tracker:
        recorder = self._recorders.get(span)
        if recorder is None:
            wanted, chain = self.wanted(span), self._chain(span)
            keeps = Keeps(
                max(1, wanted.depth),
                residuals=wanted.residuals > 0,
                outputs=wanted.outputs > 0,
                step=self.tick.step,
                full=not self.halved,
            )
            blocks = self.host.execution.names[span]
            if position == 0 and is_trackable(chain, len(blocks), names):
                recorder = Tracker(chain, keeps, len(blocks))
            else:
                recorder = Recorder(chain, self.host.continuations, blocks, keeps)
            self._recorders[span] = recorder
        return recorder

    def _record(self, span: int, position: int, module: Any, names: Names, begun: Begun | None, output: Any) -> None:
        recorder = self._recorders.get(span)
        match recorder:
            case None:
                return
            case Tracker():
                recorder.end(position, output)
            case Recorder():
                assert begun is not None
                recorder.end(position, module, names, begun, output)
        if recorder.calls == len(self.host.execution.names[span]):
            self._recorders.pop(span).finish()
            links = self._chain(span).links
            if len(links) == recorder.calls:
                self.host.continuations.keep_links(span, links, self._chain(span).endings)

    def _tracked(
        self,
        tracker: Tracker,
        original: Any,
        module: Any,
        site: SiteHandle,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Names,
    ) -> Any:
        """Run a block of a computing span whose structure is known."""
        span, position = site.members[0]
        if position < tracker.calls:
            return self._repeated(original, module, site, args, kwargs)
        tracker.begin(position, names)
        output = original(module, *args, **kwargs)
        tracker.end(position, output)
        self._last = None
        if tracker.calls == len(self.host.execution.names[span]):
            self._recorders.pop(span).finish()
            self._called.add(span)
        return output

    def _linked(self, span: int, link: Link, names: Names) -> Any:
        """Return the answer of one block of a span that reuses."""
        action = self.decision(span).action
        inputs = passed(link.shape, names)
        if link.leads and not isinstance(action, ir.Skip):
            inputs = self._led(span, link, inputs, action)
        return rebuilt(link.shape, inputs)

    def _answered_block(
        self,
        span: int,
        position: int,
        link: Link,
        original: Any,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Names,
    ) -> Any:
        """Return the answer of one block of a span that reuses, or its computed output in an audited trajectory."""
        if self.audit is None:
            return self._linked(span, link, names)
        self._expect(self.audit, span, link, names)
        output = run_bare(original, module, args, kwargs)
        self._compare_segment(self.audit, span, position, output)
        return output

    def _expect(self, audit: Audit, span: int, link: Link, names: Names) -> None:
        """Form the answer of a segment from the inputs of its first block."""
        if not link.leads:
            return
        inputs, action = passed(link.shape, names), self.decision(span).action
        answers = inputs if isinstance(action, ir.Skip) else self._led(span, link, inputs, action)
        # The block may write into its inputs, which are answers of a `skip`.
        audit.expected[span, link.segment] = [
            answer.clone() if answer is stream and isinstance(stream, torch.Tensor) else answer
            for answer, stream in zip(answers, inputs, strict=True)
        ]

    def _compare_segment(self, audit: Audit, span: int, position: int, output: Any) -> None:
        """Compare the answer of a segment with the output of its last block."""
        ending = self._chain(span).endings.get(position)
        answers = None if ending is None else audit.expected.pop((span, ending.segment), None)
        if ending is None or answers is None:
            return
        outputs, _ = parts(output)
        for answer, index in zip(answers, ending.outputs, strict=True):
            if index is not None and isinstance(answer, torch.Tensor):
                audit.compare(span, answer, outputs[index])

    def _led(self, span: int, link: Link, inputs: list[Any], action: ir.Action | None) -> list[Any]:
        """Return the answer of the first block of a segment, which carries the result of the whole segment."""
        chain, residual = self._chain(span), _of_residual(action)
        history = [entry for entry in chain.history[link.segment] if self.halved or entry.full]
        values = list[torch.Tensor | None]()
        answers = list[Any]()
        foreseen = self._foreseen.pop((span, link.segment), None) or self._values(span, link.segment, action)
        sums = self._sums.pop((span, link.segment), None) or [None] * len(foreseen)
        for stream, value, total in zip(inputs, foreseen, sums, strict=True):
            if stream is None or value is None:
                values.append(None)
                answers.append(stream)
                continue
            values.append(value)
            if residual:
                answers.append(stream + value if total is None else total)
            else:
                answers.append(value.clone())
        if feedback(action):
            pairs = [
                (answer, stream, value is not None)
                for answer, stream, value in zip(answers, inputs, values, strict=True)
            ]
            keeping = self.host.execution.keepings[span]
            residuals = tuple(
                answer - stream if known and keeping.residuals else None for answer, stream, known in pairs
            )
            # Clone, because the caller may modify the answer in place.
            outputs = tuple(answer.clone() if known and keeping.outputs else None for answer, _, known in pairs)
            newest = ChainEntry(residuals, outputs, self.tick.step, not self.halved)
            chain.push(link.segment, newest, history, self.host.execution.keepings[span].depth)
        return answers

    def _values(self, span: int, segment: int, action: ir.Action | None) -> list[torch.Tensor | None]:
        """Return the residuals or outputs with which a segment is answered, by index."""
        residual = _of_residual(action)
        # An older entry may hold only outputs, or only residuals.
        read = [entry for entry in self._chain(span).history[segment][: reach(action)] if self.halved or entry.full]
        values = list[torch.Tensor | None]()
        for index in range(len(read[0].residuals)):
            column = [self._own(entry, index, residual=residual) for entry in read]
            tensors = [tensor for tensor in column if tensor is not None]
            if len(tensors) < len(column):
                values.append(None)
            elif isinstance(action, ir.Predict):
                place, arguments = self.places(action), self.arguments(action, span)
                places = [place(entry.step) for entry in read]
                values.append(predict(action.predictor, tensors, places, place(self.tick.step), arguments))
            else:
                values.append(tensors[0])
        return values

    def excess(self, site: int, action: ir.Action | None) -> str | None:
        """Return the reason if the weights of a predictor are too large for the dtype of its history, or None."""
        if not isinstance(action, ir.Predict):
            return None
        slot = self.branch.slots[site]
        if self.host.execution.keepings[site].streams:
            newest: Any = [entry.tensors for entry in self._chain(site).history[0][:1]]
            history = [(entry.step, entry.full) for entry in self._chain(site).history[0]]
        else:
            newest = slot.output
            history = [(slot.step, slot.full), *[(kept.step, kept.full) for kept in slot.older]]
        steps = [step for step, full in history[: reach(action)] if self.halved or full]
        try:
            self.arguments(action, site)
        except Undefined:
            return UNDEFINED_ARGUMENT
        if len(steps) < 2:
            return None  # the answer is the newest value itself
        numbers = self.weights(action, site, steps)
        return TOO_LARGE if is_too_large(numbers, newest) else None

    @property
    def _checks(self) -> bool:
        """Whether the values of answers may be checked. With several processes, one might refuse what others give."""
        return not is_initialized()

    def _overflow(self, span: int, action: ir.Action | None, names: Names | None) -> str | None:
        """Return why a span that is decided to reuse would give an answer that is not finite, or None.

        A span has to compute from its first block, so the predictions of all its segments are made before it. A sum
        with an input is checked where the input is known, which is that of the first segment.
        """
        if isinstance(action, ir.Skip):
            return None
        excess = self.excess(span, action)
        if excess is not None or not self._checks:
            return excess
        chain = self._chain(span)
        if isinstance(action, ir.Predict):
            for segment in range(len(chain.history)):
                values = self._foreseen[span, segment] = self._values(span, segment, action)
                if not is_finite(values):
                    return NOT_FINITE
        if names is None or not _of_residual(action):
            return None
        # Not always the first block by name: the model may call the blocks in another order.
        link = next(link for link in chain.links.values() if link.leads and link.segment == 0)
        values = self._foreseen.get((span, link.segment)) or self._values(span, link.segment, action)
        inputs = passed(link.shape, names)
        sums = [
            None if stream is None or value is None else stream + value
            for stream, value in zip(inputs, values, strict=True)
        ]
        self._foreseen[span, link.segment], self._sums[span, link.segment] = values, sums
        return None if is_finite(sums) else NOT_FINITE

    def _own(self, entry: ChainEntry, index: int, *, residual: bool) -> torch.Tensor | None:
        tensor = entry.at(index, residual=residual)
        return tensor.chunk(2, dim=0)[self.half] if tensor is not None and self.halved and entry.full else tensor

    def _chain_problem(self, span: int, names: Names, action: ir.Action | None) -> str | None:
        """Return why a span cannot answer, or None. A `skip` needs only the structure of its blocks."""
        chain = self._chain(span)
        skips = isinstance(action, ir.Skip)
        if skips and not chain.links:
            # What a skipped block returns does not depend on the trajectory or the branch.
            chain.links, chain.endings = self.host.continuations.links_of(span, names)
        if not chain.links:
            return UNKNOWN_FORM if skips else chain.storing.lacking
        if not skips and not chain.holds(residual=_of_residual(action)):
            return chain.storing.lacking
        if len(chain.links) < len(self.host.execution.names[span]):
            return "a block of it did not run when it computed"
        if skips:
            return None
        if chain.signature is None:
            return None  # a graph stored it, and the root model has checked the arguments
        if self._shared(span) and (excess := self.excess(span, action)) is not None:
            return excess
        present, newest = signature(names), chain.history[0][0]
        if len(chain.signature) != len(present):
            return "the history does not fit this call"
        halved = self.halved and newest.full
        same = all(_alike(kept, now, halved=halved) for kept, now in zip(chain.signature, present, strict=True))
        return None if same else "the history does not fit this call"

    # --- single modules ----------------------------------------------------------------------------------

    def _code(self, site: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the code of a single-module site: `ANSWER`, or how it computes."""
        if site.index < 0:
            return COMPUTE
        keeping = self.host.execution.keepings[site.index]
        if keeping.streams:
            return COMPUTE  # the history of a stream site is its chain in `members`
        store = self.store if self.wanted(site.index).outputs else COMPUTE
        if self.decision(site.index, self.problem(site, {}, args, kwargs)).verdict != "reuse":
            return store
        problem = unfit(self.branch.slots[site.index], hidden_states(args, kwargs), halved=self.halved)
        problem = problem or self._unsound(site.index)
        if problem is None:
            return ANSWER
        self.refuse(site.index, problem)
        return store

    def _unsound(self, site: int) -> str | None:
        """Return why the prediction of a site is not finite, or None. A checked prediction is kept for `answered`."""
        action = self.decision(site).action
        if not isinstance(action, ir.Predict):
            return None
        excess = self.excess(site, action)
        if excess is not None or not self._checks:
            return excess
        output = self._predicted(site, action)
        if not is_finite(output):
            return NOT_FINITE
        self._foreseen[site, 0] = output
        return None

    def _predicted(self, site: int, action: ir.Predict) -> Any:
        slot, arguments = self.branch.slots[site], self.arguments(action, site)
        place = self.places(action)
        return predicted(slot, action, arguments, self.tick.step, place, halved=self.halved, half=self.half)

    def _answered_site(
        self, site: int, original: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the answer of a site, or its computed output in an audited trajectory."""
        answer = self.answered(site)
        if self.audit is None:
            return answer
        output = run_bare(original, module, args, kwargs)
        self.audit.compare(site, answer, output)
        return output

    def answered(self, site: int) -> Any:
        """Return the answer of a site from its stored outputs."""
        slot, action = self.branch.slots[site], self.decision(site).action
        if not isinstance(action, ir.Predict):
            return reused(slot, halved=self.halved, half=self.half, inference=self.inference)
        output = self._foreseen.pop((site, 0), None)
        if output is None:
            output = self._predicted(site, action)
        if feedback(action):
            if self.halved and slot.full and slot.shape is not None:
                slot.shape = torch.Size((slot.shape[0] // 2, *slot.shape[1:]))
            push(
                slot, self.host.execution.keepings[site], self.store, output, step=self.tick.step, full=not self.halved
            )
        return output

    def weights(self, action: ir.Predict, site: int, steps: Sequence[int]) -> Weights:
        """Return the coefficients of the prediction at this step from results of other steps.

        Args:
            action: The action.
            site: The number of the site that is answered.
            steps: The steps of the results, newest first.
        """
        place = self.places(action)
        places = [place(step) for step in steps]
        return weights(action.predictor, places, place(self.tick.step), self.arguments(action, site))

    def places(self, action: ir.Predict) -> Place:
        """Return the function that gives the place of a step on the axis of a predictor."""
        word, ticks = axis(action), self.branch.ticks
        return int if word == "step" else lambda step: getattr(ticks[step], word)

    def arguments(
        self, action: ir.Predict | ir.ApproximateUncond, site: int, *, without: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Evaluate the arguments of the action at this step, with externals that are called once for the site.

        Args:
            action: The action.
            site: The number of the site that is answered.
            without: Labels of arguments that are left out.

        Raises:
            Undefined: An argument has no value at this step.
        """
        known = self._arguments.get((site, without))
        if known is not None:
            return known
        wanted = [argument for argument in action.arguments if argument.label not in without]
        memory = self.branch.memories[self.branch.partition.group_of[site]]
        names = clock_words(replace(self.tick, uncond_skipped=True) if self.halved else self.tick, memory)
        if self.host.externals:
            read = set[str]().union(*(names_in(argument.value) for argument in wanted))
            names |= {name: self._asked(name, site) for name in self.host.externals if name in read}
        environment = Environment(names, self.host.execution.program.tables)
        values = {argument.label: evaluate(argument.value, environment) for argument in wanted}
        self._arguments[site, without] = values
        return values

    def _asked(self, external: str, site: int) -> Any:
        """Call an external. A callback in diffusers' style receives the module of the site."""
        supply = self.host.externals[external]
        if not getattr(supply, "takes_module", False):
            value = supply()
        else:
            value = supply(self.host.module.get_submodule(self.host.execution.names[site][0]))
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value.reshape(())
        if isinstance(value, Real) and value is not True and value is not False:
            return value
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"`{value!r}`"
        raise PolicyError.of("E307", f"the function for `{external}` returned {shown}", help="it must return a number")


def _target(names: Names) -> str | None:
    """Return the name of the input that carries the hidden states."""
    if isinstance(names.get(HIDDEN_STATES), torch.Tensor):
        return HIDDEN_STATES
    return next((name for name, value in names.items() if isinstance(value, torch.Tensor)), None)


def _counter(names: Names) -> int | None:
    """Return the `_version` of the input hidden states, or None if they have none."""
    states = names.get(_target(names) or "")
    return states._version if isinstance(states, torch.Tensor) and not states.is_inference() else None


def _of_residual(action: ir.Action | None) -> bool:
    return isinstance(action, ir.Reuse | ir.Predict) and action.residual


def _alike(kept: tuple[Any, ...], now: tuple[Any, ...], *, halved: bool) -> bool:
    """Return True if an input matches the stored name, shape, dtype and device, or its conditional half."""
    if kept == now:
        return True
    (name, shape, *rest), (other, size, *others) = kept, now
    return halved and name == other and rest == others and (shape[0] // 2, *shape[1:]) == tuple(size)
