"""One span of blocks in one root call: when it is decided, how its blocks answer, and how a compute is recorded.

UNDECIDED -> FIRST_BLOCK -> ANSWERING | COMPUTING -> DONE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine.batch_view import WHOLE
from cachepolicy.engine.block_chain import (
    Answers,
    Begun,
    Chain,
    ChainEntry,
    Keeps,
    Link,
    Names,
    Passage,
    Recorder,
    handed_on,
    parts,
    passage,
    passed,
    rebuilt,
    signature,
)
from cachepolicy.engine.chain_check import Tracker, is_trackable
from cachepolicy.engine.distributed.groups import is_initialized
from cachepolicy.engine.finite import is_finite
from cachepolicy.engine.hooks import SiteHandle
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.step_context import StepContext
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import feedback, reach
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
        slot = context.branch.slots[number]
        if slot.chain is None:
            slot.chain = Chain(slot.storing)
        self.chain = slot.chain
        self.phase = Phase.UNDECIDED
        self.links: dict[int, Link] = {}
        self.passages: Mapping[SiteHandle, Passage] = {}
        self.recorder: Recorder | Tracker | None = None
        self._inputs: Names | None = None
        """The inputs of the first block, while the span is undecided."""
        self._ready: dict[int, _Answer] = {}
        """Answers by segment that were made before the span was decided, in order to check them."""

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
        chain, skips = self.chain, isinstance(action, ir.Skip)
        if skips and not chain.links:
            # What a skipped block returns does not depend on the trajectory or the branch.
            chain.links, chain.endings = self._context.root.continuations.links_of(self.number, names)
        if not chain.links:
            return Fact.UNKNOWN_FORM if skips else chain.storing.lacking
        if not skips and not chain.holds(residual=_of_residual(action)):
            return chain.storing.lacking
        if len(chain.links) < len(self._context.execution.names[self.number]):
            return Fact.INCOMPLETE
        if skips or chain.signature is None:
            return None  # without a signature, a graph stored it, and the root model has checked the arguments
        if self._ledger.shared(self.number) and (excess := self._context.excess(self.number, action)) is not None:
            return excess
        present = signature(names)
        if chain.signature == present:
            return None
        rows, stored = self._context.rows, chain.history[0][0].rows
        same = len(chain.signature) == len(present) and all(
            now in (kept, (kept[0], rows.shape(kept[1], stored), *kept[2:]))
            for kept, now in zip(chain.signature, present, strict=True)
        )
        return None if same else Fact.MISFIT

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
                answer = self._ready[segment] = _Answer(self._values(segment, action))
                if not is_finite(answer.values):
                    return Fact.NOT_FINITE
        if names is None or not _of_residual(action):
            return None
        answer = self._ready.get(0)
        if answer is None:
            answer = self._ready[0] = _Answer(self._values(0, action))
        answer.sums = [
            None if stream is None or value is None else stream + value
            for stream, value in zip(passed(self._structure().lead.shape, names), answer.values, strict=True)
        ]
        return None if is_finite(answer.sums) else Fact.NOT_FINITE

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
        residual = _of_residual(action)
        ready = self._ready.pop(segment, None) or _Answer(self._values(segment, action))
        answers = list[Any]()
        for index, (stream, value) in enumerate(zip(inputs, ready.values, strict=True)):
            if stream is None or value is None:
                answers.append(stream)
            elif not residual:
                answers.append(value.clone())
            else:
                answers.append(stream + value if ready.sums is None else ready.sums[index])
        if feedback(action):
            self._feed(segment, inputs, answers, ready.values)
        return answers

    def _feed(self, segment: int, inputs: Sequence[Any], answers: Sequence[Any], values: Sequence[Any]) -> None:
        """Store an answer as the newest result of a segment."""
        context = self._context
        keeping = context.execution.keepings[self.number]
        known = [stream is not None and value is not None for stream, value in zip(inputs, values, strict=True)]
        residuals = tuple(
            answer - stream if there and keeping.residuals else None
            for answer, stream, there in zip(answers, inputs, known, strict=True)
        )
        # Clone, because the caller may modify the answer in place.
        outputs = tuple(
            answer.clone() if there and keeping.outputs else None for answer, there in zip(answers, known, strict=True)
        )
        older = [entry for entry in self.chain.history[segment] if entry.rows.serves(context.rows)]
        newest = ChainEntry(residuals, outputs, context.tick.step, context.rows)
        self.chain.push(segment, newest, older, keeping.depth)

    def _values(self, segment: int, action: ir.Action | None) -> list[Any]:
        """Return the residuals or outputs with which a segment is answered, by index."""
        residual, rows = _of_residual(action), self._context.rows
        read = [entry for entry in self.chain.history[segment][: reach(action)] if entry.rows.serves(rows)]
        if not isinstance(action, ir.Predict):
            entry = read[0]
            values = [entry.at(index, residual=residual) for index in range(len(entry.residuals))]
            return values if rows is WHOLE else [rows.cut(value, entry.rows) for value in values]
        steps, values = [entry.step for entry in read], list[Any]()
        for index in range(len(read[0].residuals)):
            # An older entry may hold only outputs, or only residuals.
            column = [rows.cut(entry.at(index, residual=residual), entry.rows) for entry in read]
            lacking = any(tensor is None for tensor in column)
            values.append(None if lacking else self._context.predicted(action, self.number, column, steps))
        return values

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
            if len(self.chain.links) == recorder.calls:
                self._context.root.continuations.keep_links(self.number, self.chain.links, self.chain.endings)

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


class _Answer:
    """Values with which a segment is answered, and their sums with its inputs where they have been made."""

    __slots__ = ("sums", "values")

    def __init__(self, values: list[Any]) -> None:
        self.values = values
        self.sums: list[Any] | None = None


def _of_residual(action: ir.Action | None) -> bool:
    return isinstance(action, ir.Reuse | ir.Predict) and action.residual
