"""Decisions of one root call: planned from the clock, resolved once by signals, refused by facts, committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cachepolicy.engine.batch_view import BatchView
from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.execution_plan import StepTable
from cachepolicy.engine.signals import Measuring
from cachepolicy.engine.step_context import StepContext
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.schedule import (
    HIDDEN,
    NOT_CALLED,
    WAITING,
    Decision,
    Inputs,
    Memory,
    decide_all,
    hides,
)


class Ledger:
    """Decisions of the sites in one root call.

    Args:
        context: What the call is decided from.
        leaders: Decisions of other branches at this step, by branch name, for rules that follow them.
        measuring: The signals of this call, or None if no rule can read one.
        facts: Reasons why sites have to compute, by site number.
        company: The processes that hold shards of the parameters, or None.

    Attributes:
        decisions: The decisions, by group of the branch's partition. `WAITING` where signals are missing.
        after: The memories after the call, by group.
        facts: Reasons why sites have to compute, by site number.
        table: The table of the decisions, if they depend only on the clock and the memories, or None.
        signals: The measured numbers of the sites that were decided by signals, by site number.
    """

    __slots__ = (
        "_branch", "_company", "_context", "_externals", "_leaders", "_tick", "after", "decisions", "facts",
        "measuring", "signals", "table",
    )  # fmt: skip

    def __init__(
        self, context: StepContext, leaders: Mapping[str, Sequence[Decision]], measuring: Measuring | None,
        facts: dict[int, str], company: Agreement | None,
    ) -> None:  # fmt: skip
        self._context = context
        self._branch = context.branch
        self._externals = context.externals
        self._leaders = leaders
        self._company = company
        self._tick = context.tick
        self.measuring = measuring
        self.facts = facts
        self.signals: dict[int, Mapping[str, float]] = {}
        context.signals = self.signals
        self.decisions: list[Decision]
        self.after: list[Memory]
        self.table: StepTable | None = None
        execution, branch = context.execution, self._branch
        if facts or (leaders and self._leaders_part()):
            self.plan()
        elif execution.is_static and branch.partition is execution.program.coarse:
            self.table = execution.recall.table(branch.memories, context.tick)
            self.decisions, self.after = self.table.decisions, self.table.after
        else:
            self.decisions, self.after = self._planned()

    def _leaders_part(self) -> bool:
        """Return whether a followed branch was decided site by site, so that the sites of a group may have to part."""
        return any(
            decided[site] is not decided[group.sites[0]]
            for decided in self._leaders.values()
            for group in self._branch.partition.groups
            for site in group.sites[1:]
        )

    def _planned(self) -> tuple[list[Decision], list[Memory]]:
        program, branch = self._context.execution.program, self._branch
        return decide_all(
            program, branch.partition, branch.memories, self._context.tick, signals=self._externals,
            signals_of=self.signals if program.measured else None, followed=self._leaders, facts=self.facts,
        )  # fmt: skip

    def plan(self) -> None:
        """Decide again with the facts known so far, site by site."""
        branch, program = self._branch, self._context.execution.program
        if branch.partition is not program.fine:
            branch.memories = program.split(branch.memories)
            branch.partition = program.fine
        self.table = None
        self.decisions, self.after = self._planned()

    def halve(self, rows: BatchView) -> None:
        """Run only these rows: the unconditional half is rebuilt afterwards."""
        self._context.rows = rows
        self._tick = replace(self._tick, uncond_skipped=True)

    # --- one site ----------------------------------------------------------------------------------------

    def of(self, site: int) -> Decision:
        """Return the current decision of the site, `WAITING` if its signals are missing."""
        return self.decisions[self._branch.partition.group_of[site]]

    def by_site(self) -> list[Decision]:
        """Return the decisions by site number."""
        return self._branch.partition.spread(self.decisions)

    def resolve(self, site: int, problem: str | None = None) -> Decision:
        """Return the decision of the site, and make it now if it waits for signals.

        Args:
            site: The site number.
            problem: Why the site cannot reuse. Processes that decide together exchange it.
        """
        decision = self.of(site)
        if decision is not WAITING:
            return decision
        refusal = self.facts.get(site) or problem
        if self.measuring is not None and self.measuring.agreement is not None:
            # If one of the processes that hold parts of the samples cannot reuse, none does.
            refused = self.measuring.agree(*self._subject(site), [site], refuses=refusal is not None)
            refusal = (refusal or Fact.PEER_REFUSED) if refused else None
        self._decide(site)
        self._consent(site, refusal)
        return self.of(site)

    def _decide(self, site: int) -> None:
        if site not in self.signals:
            self.signals[site] = self._numbers(site)
        branch = self._branch
        group = branch.partition.group_of[site]
        decider = branch.partition.groups[group].decider
        self.decisions[group] = decider.decide(self._inputs(site, branch.memories[group]))

    def _numbers(self, site: int) -> Mapping[str, float]:
        """Return the numbers that the rules of a site read now."""
        assert self.measuring is not None
        numbers = self.measuring.numbers(site)
        return {**self._externals, **numbers} if self._externals else numbers

    def recorded(self) -> Mapping[int, Mapping[str, float]]:
        """Return the numbers of the trace: those of measured sites, and at all sites the externals."""
        if not self._externals:
            return self.signals
        sites = range(len(self._context.execution.plan.sites))
        return {site: self.signals.get(site, self._externals) for site in sites}

    def _consent(self, site: int, refusal: str | None) -> None:
        """Let a decided site compute if a process refuses, or if a process that shares its parameters computes.

        Sharded parameters are gathered by a collective, so either all processes run the site or none does.
        """
        decision = self.of(site)
        if self._company is not None:
            subject, past = self._subject(site)
            computes = decision.verdict != "reuse" or refusal is not None
            refused = self._company.settle(
                f"{subject} at step {self._context.tick.step}", [], past=past, refuses=computes
            ).refused
            refusal = refusal or (Fact.PEER_COMPUTED if refused else None)
        if refusal is not None and decision.verdict == "reuse":
            self.facts[site] = refusal
            self._decide(site)

    def _subject(self, site: int) -> tuple[str, str]:
        """Return what is decided, and the non-signal inputs of the decision, as text equal on all processes."""
        branch = self._branch
        memory = branch.memories[branch.partition.group_of[site]]
        name = self._context.execution.plan.sites[site].name
        return f"`{name}`", f"{self._context.tick.branch} {memory.last} {memory.computes}"

    def _inputs(self, site: int, memory: Memory) -> Inputs:
        leaders = {name: decided[site] for name, decided in self._leaders.items()} if self._leaders else self._leaders
        tables = self._context.execution.program.tables
        signals = self.signals.get(site, self._externals)
        return Inputs(self._tick, memory, signals, tables, leaders, self.facts.get(site))  # pyright: ignore[reportArgumentType]

    def shared(self, site: int) -> bool:
        """Return whether the decision of the site is pending and involves other processes."""
        if self._company is None and (self.measuring is None or self.measuring.agreement is None):
            return False
        return self.of(site) is WAITING

    def action(self, site: int) -> ir.Action | None:
        """Return the action of the site if it reuses. It depends only on the clock."""
        branch = self._branch
        group = branch.partition.group_of[site]
        owner = branch.partition.groups[group].decider.owner(self._inputs(site, branch.memories[group]))
        return None if owner is None else owner.rule.action

    def refuse(self, site: int, reason: str) -> None:
        """Force a site and the sites inside it to compute."""
        self.facts[site] = reason
        for inner in self._context.execution.within.get(site, ()):
            self.facts.setdefault(inner, Fact.OUTER)

    # --- the end of the call -----------------------------------------------------------------------------

    def commit(self, uncalled: Sequence[int]) -> None:
        """Decide what is left, with all facts of the call, so that memories and trace record what happened.

        Args:
            uncalled: The sites that were not called.
        """
        if self.table is not None and not (self.facts or uncalled):
            return
        waiting = self._waiting()
        if waiting and self.measuring is not None and self.measuring.agreement is not None:
            self.measuring.agree("what did not run", "", waiting)
        for site in waiting:
            self._decide(site)
            if not self._hidden(self._branch.partition.group_of[site]):
                self._consent(site, self.facts.get(site))
        for site in uncalled:
            around = [outer for outer in self._context.execution.plan.sites[site].parents if outer not in self.facts]
            if not any(hides(self.of(outer), self._context.tick.branch) for outer in around):
                self.facts[site] = NOT_CALLED
        if self.facts:
            self.plan()
            if waiting := self._waiting():
                # The sites around them had to compute after all, so these sites need decisions too.
                self.signals |= {site: self._numbers(site) for site in waiting}
                self.plan()
        elif self.signals:
            # Merge the decisions made during the forward pass, and what they hide, into the earlier ones.
            branch = self._branch
            for index, group in enumerate(branch.partition.groups):
                site, hidden = group.sites[0], self._hidden(index)
                if hidden:
                    self.decisions[index] = HIDDEN
                if hidden or site in self.signals:
                    decision = self.decisions[index]
                    inputs = decision.inputs
                    if inputs is None or inputs.tick is not self._tick:
                        inputs = self._inputs(site, branch.memories[index])
                    self.after[index] = group.decider.advance(inputs, decision)

    def _waiting(self) -> list[int]:
        """Return the sites that wait for their signals."""
        if not self._context.execution.program.measured:
            return []
        return [site for site, group in enumerate(self._branch.partition.group_of)
                if self.decisions[group] is WAITING]  # fmt: skip

    def _hidden(self, group: int) -> bool:
        """Return whether a site around the sites of a group reuses."""
        parents = self._branch.partition.groups[group].parents
        return bool(parents) and any(hides(self.decisions[parent], self._context.tick.branch) for parent in parents)
