"""One span of blocks in one root call: when it is decided, how its blocks answer, and how a compute is recorded.

UNDECIDED -> FIRST_BLOCK -> ANSWERING | COMPUTING -> DONE
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine.actions import chain_of
from cachepolicy.engine.answers import lacking, of_residual, segment_read, values_of
from cachepolicy.engine.block_chain import (
    Answers,
    ChainEntry,
    Keeps,
    Link,
    Names,
    Passage,
    alike,
    fed_back,
    handed_on,
    led,
    parts,
    passage,
    passed,
    rebuilt,
    signature,
)
from cachepolicy.engine.chain_check import Tracker, is_trackable
from cachepolicy.engine.chain_recording import Begun, Recorder
from cachepolicy.engine.distributed.groups import is_initialized
from cachepolicy.engine.finite import is_finite
from cachepolicy.engine.hooks import SiteHandle
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.step_context import StepContext
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import feedback
from cachepolicy.planning.schedule import WAITING

if TYPE_CHECKING:
    from cachepolicy.engine.audit import Audit


class Phase(Enum):
    """Where a span is in a root call."""

    UNDECIDED = 0
    """None of its blocks has been called."""
    FIRST_BLOCK = 1
    """Its first block runs, and the signals that decide are inside."""
    ANSWERING = 2
    """Its blocks return the stored result."""
    COMPUTING = 3
    """Its blocks run."""
    DONE = 4
    """All its blocks have run."""


class SpanRun:
    """One span of blocks in one root call.

    Attributes:
        number: The site number of the span.
        phase: Where the span is.
        chain: The history of the span.
        links: The blocks that still have to answer, by position, without those in `passages`.
        passages: The inner blocks that pass their inputs through, with the names and places of the inputs. The hooks
            of the blocks answer from this table.
        recorder: Records the compute, or None.
    """

    __slots__ = (
        "_context", "_inputs", "_ledger", "_ready", "chain", "links", "number", "passages", "phase", "recorder",
    )  # fmt: skip

    def __init__(self, number: int, context: StepContext, ledger: Ledger) -> None:
        self._context = context
        self._ledger = ledger
        self.number = number
        self.chain = chain_of(context.branch.slots[number])
        self.phase = Phase.UNDECIDED
        self.links: dict[int, Link] = {}
        self.passages: Mapping[SiteHandle, Passage] = {}
        self.recorder: Recorder | Tracker | None = None
        self._inputs: Names | None = None
        """The inputs of the first block, while the span is undecided."""
        self._ready: dict[int, tuple[list[Any], list[Any] | None]] = {}
        """Values by segment, and their sums with its inputs, that were made early in order to check them."""

    # --- the decision ------------------------------------------------------------------------------------

    def enter(self, position: int, names: Names, *, measured: bool) -> Phase:
        """Decide the span when one of its blocks is called, unless its first block has to run for that.

        Args:
            position: The position of the block.
            names: The inputs of the block by name.
            measured: Whether the probes inside the first block have been read.
        """
        if self.phase is Phase.UNDECIDED and position == 0 and not measured and self._ledger.of(self.number) is WAITING:
            self.phase, self._inputs = Phase.FIRST_BLOCK, names
            problem = self.problem(names, self._ledger.action(self.number))
            if problem is not None:
                self._ledger.facts[self.number] = problem
        elif self.phase is Phase.UNDECIDED:
            self.settle(names, ran=False)
        elif self.phase is Phase.FIRST_BLOCK:
            self.settle(None, ran=True)
        return self.phase

    def settle(self, names: Names | None, *, ran: bool) -> bool:
        """Decide the span. A span that has begun to run, or whose history does not fit, computes.

        Args:
            names: The inputs of the first block, where its history has not been checked against them.
            ran: Whether the first block has run.

        Returns:
            Whether the span answers.
        """
        waited, self._inputs = self._inputs, None
        ledger, number = self._ledger, self.number
        problem = ledger.facts.get(number)
        late = Fact.LATE if ran else None
        if ledger.shared(number):
            if names is not None and problem is None:
                problem = self.problem(names, ledger.action(number))
            decision, problem = ledger.resolve(number, problem or late), None
        else:
            decision = ledger.resolve(number)
            if names is not None and problem is None and decision.verdict == "reuse":
                problem = self.problem(names, decision.action)
        self.phase = Phase.COMPUTING
        if decision.verdict != "reuse":
            return False
        problem = problem or late or self._unsound(decision.action, names or waited)
        if problem is not None:
            ledger.refuse(number, problem)
            return False
        self._answer()
        return True

    def problem(self, names: Names, action: ir.Action | None) -> str | None:
        """Return why the span cannot answer, or None. A `skip` needs only the structure of its blocks."""
        chain, reason = self.chain, lacking(self._context, self.number, action, names)
        if reason is not None or isinstance(action, ir.Skip) or chain.signature is None:
            return reason  # without a signature, a graph stored it, and the root model has checked the arguments
        if self._ledger.shared(self.number) and (excess := self._context.excess(self.number, action)) is not None:
            return excess
        fits = alike(chain.signature, chain.rows, signature(names), self._context.rows)
        return None if fits else Fact.MISFIT

    def _unsound(self, action: ir.Action | None, names: Names | None) -> str | None:
        """Return why the answer of the span would not be finite, or None. Checked answers are kept.

        A span has to compute from its first block, so the predictions of all its segments are made before it. A sum
        with an input is checked where the input is known, which is that of the first segment.
        """
        if isinstance(action, ir.Skip):
            return None
        excess = self._context.excess(self.number, action)
        if excess is not None or is_initialized():
            # With several processes, one might refuse what the others give, so values are not checked.
            return excess
        if isinstance(action, ir.Predict):
            for segment in range(len(self.chain.history)):
                values = self._values(segment, action)
                self._ready[segment] = values, None
                if not is_finite(values):
                    return Fact.NOT_FINITE
        if names is None or not of_residual(action):
            return None
        values = self._ready[0][0] if self._ready else self._values(0, action)
        sums = led(passed(self._structure().lead.shape, names), values, residual=True)
        self._ready[0] = values, sums
        # Streams that pass through are not checked.
        checked = [value for value, added in zip(sums, values, strict=True) if added is not None]
        return None if is_finite(checked) else Fact.NOT_FINITE

    # --- answers -----------------------------------------------------------------------------------------

    def _structure(self) -> Answers:
        """Return how the blocks answer. It is made once from the links of the chain."""
        chain = self.chain
        if chain.answers is None or chain.answers.of is not chain.links:
            # Not always the first block by name: the model may call the blocks in another order.
            lead = next(link for link in chain.links.values() if link.leads and link.segment == 0)
            links, passages = dict(chain.links), dict[Any, Passage]()
            for position, site in enumerate(self._context.root.alone[self.number]):
                if site is not None and position in links and not links[position].leads:
                    passages[site] = passage(links.pop(position).shape, site.parameters)
            chain.answers = Answers(chain.links, lead, links, passages)
        return chain.answers

    def _answer(self) -> None:
        self.phase = Phase.ANSWERING
        if self._context.audit is not None:
            self.links = dict(self.chain.links)
            return
        structure = self._structure()
        self.links, self.passages = structure.links.copy(), structure.passages

    def linked(self, position: int, names: Names) -> Any:
        """Return the answer of one block of a span that reuses."""
        link = self.links.pop(position, None) or self.chain.links[position]
        return rebuilt(link.shape, self._answers(link, names)) if link.leads else handed_on(link.shape, names)

    def expect(self, audit: Audit, position: int, names: Names) -> None:
        """Form the answer of a segment from the inputs of its first block, to compare it with the computed output."""
        link = self.links.pop(position)
        if link.leads:
            inputs = passed(link.shape, names)
            # The block may write into its inputs, which are answers of a `skip`.
            audit.expected[self.number, link.segment] = [
                answer.clone() if answer is stream and isinstance(stream, torch.Tensor) else answer
                for answer, stream in zip(self._answers(link, names), inputs, strict=True)
            ]

    def compare(self, audit: Audit, position: int, output: Any) -> None:
        """Compare the answer of a segment with the output of its last block."""
        ending = self.chain.endings.get(position)
        answers = None if ending is None else audit.expected.pop((self.number, ending.segment), None)
        if ending is None or answers is None:
            return
        outputs, _ = parts(output)
        for answer, index in zip(answers, ending.outputs, strict=True):
            if index is not None and isinstance(answer, torch.Tensor):
                audit.compare(self.number, answer, outputs[index])

    def _answers(self, link: Link, names: Names) -> list[Any]:
        """Return the answer of the first block of a segment, by output."""
        action, inputs = self._ledger.of(self.number).action, passed(link.shape, names)
        return inputs if isinstance(action, ir.Skip) else self._led(link.segment, inputs, action)

    def _led(self, segment: int, inputs: list[Any], action: ir.Action | None) -> list[Any]:
        """Return the answer of the first block of a segment, which carries the result of the whole segment."""
        values, sums = self._ready.pop(segment, None) or (self._values(segment, action), None)
        answers = led(inputs, values, residual=of_residual(action)) if sums is None else sums
        if feedback(action):
            context, entries = self._context, self.chain.history[segment]
            keeping = context.execution.keepings[self.number]
            fed = fed_back(inputs, values, answers, residuals=keeping.residuals > 0, outputs=keeping.outputs > 0)
            older = [entry for entry in entries if entry.rows.serves(context.rows)]
            self.chain.push(segment, ChainEntry(*fed, context.tick.step, context.rows), older, keeping.depth)
        return answers

    def _values(self, segment: int, action: ir.Action | None) -> list[Any]:
        """Return the residuals or outputs with which a segment is answered, by index."""
        return values_of(*segment_read(self._context, self.number, self.chain.history[segment], action))

    # --- computes ----------------------------------------------------------------------------------------

    def begin(self, position: int, names: Names) -> Begun | None:
        """Record the inputs of a block that is about to run, if the compute is recorded."""
        if self.recorder is None:
            context = self._context
            wanted = context.wanted(self.number)
            # A compute is recorded for its history, or to learn its blocks.
            if self.number in context.root.repeated or (self.chain.links and not wanted):
                return None
            blocks = context.execution.names[self.number]
            keeps = Keeps(
                max(1, wanted.depth), wanted.residuals > 0, wanted.outputs > 0, context.tick.step, context.rows
            )
            if position == 0 and is_trackable(self.chain, len(blocks), names):
                self.recorder = Tracker(self.chain, keeps, len(blocks))
            else:
                self.recorder = Recorder(self.chain, context.root.continuations, blocks, keeps)
        return self.recorder.begin(position, names)

    def end(self, position: int, module: Any, names: Names, begun: Begun | None, output: Any) -> None:
        """Record the output of a block."""
        recorder = self.recorder
        if recorder is None:
            return
        if isinstance(recorder, Tracker):
            recorder.end(position, output)
        elif begun is not None:
            recorder.end(position, module, names, begun, output)
        if recorder.calls == len(self._context.execution.names[self.number]):
            self.finish()
            self.phase = Phase.DONE
            if type(recorder) is Recorder and (form := self.chain.form(recorder.calls)) is not None:
                self._context.root.continuations.forms[self.number] = form

    def finish(self) -> None:
        """Store what was recorded."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.finish()

    def repeat(self) -> None:
        """Compute: one forward pass calls the span more than once."""
        self.recorder = None
        self.links, self.passages = {}, {}
        if self.phase is Phase.FIRST_BLOCK or self.phase is Phase.ANSWERING:
            self.phase = Phase.COMPUTING
