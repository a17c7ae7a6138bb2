"""Records the blocks of a span while they compute: how they continue, and what each segment leaves."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachepolicy.engine.block_chain import (
    Chain,
    ChainEntry,
    ChainForm,
    Ending,
    Keeps,
    Link,
    Names,
    OutputStructure,
    alike,
    parts,
    signature,
)
from cachepolicy.errors import PolicyError


@dataclass(slots=True)
class BlockCall:
    """One block call of a computing span. `bases` are the inputs before the call, or None if unknown."""

    position: int
    module: Any
    names: Names
    bases: Names | None
    outputs: list[Any]
    kind: type[Any]
    versions: list[int | None]
    fields: tuple[str, ...] | None = None
    learnt: dict[int, str] = field(default_factory=dict[int, str])
    origin: dict[str, str] = field(default_factory=dict[str, str])


class Continuations:
    """Which output of a block class continues which of its inputs, as observed in calls."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], str] = {}
        self.settled: set[type] = set()
        """The classes of which it is known how each output continues."""
        self.forms: dict[int, ChainForm] = {}
        """The structure of each span after a complete compute, by site number."""

    def learn(self, module: Any, index: int, name: str) -> None:
        """Record that an output was passed on as `name`, which is also an input of the block itself."""
        self._known[type(module).__qualname__, index] = name

    def form_of(self, span: int, names: Names | None) -> ChainForm | None:
        """Return the structure of a span from any compute of the run, if these inputs fit its first block."""
        form = self.forms.get(span)
        fits = form is not None and all(
            key is None or names is None or key in names for key in form.links[0].shape.inputs
        )
        return form if fits else None

    def input_of(self, module: Any, index: int) -> str | None:
        """Return the input that an output continues, or None if unknown."""
        return self._known.get((type(module).__qualname__, index))

    def of(self, call: BlockCall, name: str) -> OutputStructure:
        """Return the structure of a call's output.

        Args:
            call: The recorded call.
            name: The name of the block, for errors.

        Raises:
            PolicyError: An output continues no input or could continue several (E310), or has an unsupported type
                (E311).
        """
        inputs = list[str | None]()
        constants = list[Any]()
        for index, output in enumerate(call.outputs):
            if isinstance(output, torch.Tensor):
                inputs.append(self._input(call, index, output, inputs, name))
                constants.append(None)
            elif output is None or isinstance(output, bool | int | float | str):
                inputs.append(None)
                constants.append(output)
            else:
                raise PolicyError.of(
                    "E311",
                    f"`{name}` returns a `{type(output).__name__}` inside its output, so its blocks form no chain",
                )
        return OutputStructure(tuple(inputs), tuple(constants), call.kind, call.fields)

    def _input(self, call: BlockCall, index: int, output: torch.Tensor, taken: Sequence[str | None], name: str) -> str:
        known = call.learnt.get(index) or self.input_of(call.module, index)
        if known is not None and known in call.names and known not in taken:
            return known
        alike = [
            key
            for key, value in call.names.items()
            if isinstance(value, torch.Tensor) and value.shape == output.shape and key not in taken
        ]
        if len(call.outputs) == 1 and alike:
            return alike[0]
        spoken = [key for key in self._known.values() if key in alike]
        alike = [key for key in alike if key not in spoken] if len(alike) > 1 else alike
        if len(alike) == 1:
            return alike[0]
        problem = "continues none of its inputs" if not alike else "could continue more than one of its inputs"
        raise PolicyError.of(
            "E310",
            f"output {index} of `{name}` {problem}",
            help="a residual or a span needs a module that returns the streams it is given; a plain `reuse` does not",
        )


Begun = tuple[Names | None, dict[str, int | None]]
"""The inputs of a block before it ran (None: unknown), and their `_version` counters."""


_HELD = 2  # the recorder itself holds the outputs of this many previous blocks


class Recorder:
    """Records the blocks of one span during a compute, and builds the entries of its segments.

    It references only the first and the last two blocks of the current segment, to keep memory low.
    """

    def __init__(self, chain: Chain, continuations: Continuations, names: Sequence[str], keeps: Keeps) -> None:
        self._chain = chain
        self._continuations = continuations
        self._names = names
        self._keeps = keeps
        self._lead: BlockCall | None = None
        self._previous: BlockCall | None = None
        self._last: BlockCall | None = None
        self._segment: list[tuple[int, OutputStructure]] = []
        self._links: dict[int, Link] = {}
        self._ends: dict[int, Ending] = {}
        self._takes: dict[int, tuple[tuple[int, str], ...]] = {}
        self._entries: list[ChainEntry] = []
        self._passed_on: list[tuple[int, list[weakref.ref[torch.Tensor]]]] = []
        self._spoilt: str | None = None
        self._signature: tuple[Any, ...] | None = None
        self.calls = 0

    def begin(self, position: int, names: Names) -> Begun:
        """Record the inputs of a block that is about to run, and their `_version` counters.

        If blocks modify inputs in place, or inference tensors hide this, the inputs of a segment's first block are
        copied. A block that turns out to lead a segment for the first time has no copies, so this compute is not
        stored.
        """
        first = self._signature is None
        if first:
            self._signature = signature(names)
        bases: Names | None = names
        if self._chain.clones or _inference(names):
            leads = first or position in self._chain.leads
            bases = {key: _copy(value) for key, value in names.items()} if leads else None
        return bases, {key: _version(value) for key, value in names.items()}

    def end(self, position: int, module: Any, names: Names, begun: Begun, output: Any) -> None:
        """Record the output of a block."""
        self.calls += 1
        outputs, fields = parts(output)
        bases, before = begun
        written = [_version(value) for value in outputs]
        call = BlockCall(position, module, names, bases, outputs, type(output), written, fields)  # pyright: ignore[reportUnknownArgumentType]
        if bases is names and any(_version(value) != before[key] for key, value in names.items()):
            self._spoilt = "a block wrote into its input"
            self._chain.clones = True
        self._look_back(call)
        self._follow(call)
        if position in self._chain.splits:
            # Close the segment now, before the model can modify the output in place.
            self._close(call, self._settled(call))

    def _follow(self, call: BlockCall) -> None:
        """Append a call to the segment, or begin a new segment with it."""
        last = self._last
        if last is None:
            self._start(call)
            return
        became = self._became(last, call)
        shape = self._settled(last)
        if became is None:
            self._close(last, shape)
            self._start(call)
            return
        for index, name in became.items():
            source = shape.inputs[index]
            if source is not None and source in last.origin:
                call.origin[name] = last.origin[source]
        self._takes[call.position] = tuple(became.items())
        self._segment.append((last.position, shape))
        self._previous, self._last = last, call

    def _start(self, call: BlockCall) -> None:
        call.origin = {key: key for key in call.names}
        self._lead = self._last = call
        self._previous = None
        self._segment = []

    def _look_back(self, call: BlockCall) -> None:
        """Detect outputs of earlier blocks that other code still references.

        Such an output is used elsewhere, for example as a skip connection. A segment has to end there, so that a reuse
        gives the right value. Weak references show which outputs are alive.
        """
        older = self._passed_on[:-_HELD]
        if not any(reference() is not None for _, references in older for reference in references):
            self._passed_on = self._passed_on[-_HELD:]
            self._give(call)
            return
        mine = {id(value) for held in (self._lead, self._previous, self._last, call) for value in _held(held)}
        mine |= {id(tensor) for entry in self._entries for tensor in entry.outputs}
        self._passed_on = [entry for entry in self._passed_on if any(reference() is not None for reference in entry[1])]
        for position, references in self._passed_on:
            if position in self._chain.splits or position in self._ends:
                continue
            if any(
                tensor is not None and id(tensor) not in mine for tensor in (reference() for reference in references)
            ):
                self._spoilt = "the output of a block is used elsewhere"
                self._chain.splits.add(position)
        self._give(call)

    def _give(self, call: BlockCall) -> None:
        inputs = {id(value) for value in call.names.values()}
        fresh = [output for output in call.outputs if isinstance(output, torch.Tensor) and id(output) not in inputs]
        self._passed_on.append((call.position, [weakref.ref(output) for output in fresh]))

    def _became(self, last: BlockCall, call: BlockCall) -> dict[int, str] | None:
        """Return the input name of each output of `last` in `call`, or None unless `call` takes them all."""
        became = dict[int, str]()
        for index, output in enumerate(last.outputs):
            if isinstance(output, torch.Tensor):
                name = next((key for key, value in call.names.items() if value is output), None)
                if name is None:
                    return None
                became[index] = name
        for index, name in became.items():
            if name in last.names:
                last.learnt[index] = name
                self._continuations.learn(last.module, index, name)
        if any(_version(output) != version for output, version in zip(last.outputs, last.versions, strict=True)):
            self._spoilt = "the model wrote into the output of a block"
            self._chain.splits.add(last.position)
            return None
        return became or None

    def _settled(self, last: BlockCall) -> OutputStructure:
        """Return the structure of a completed call. A call at which another stream joins leads a new segment."""
        shape = self._continuations.of(last, self._names[last.position])
        joins = any(source is not None and source not in last.origin for source in shape.inputs)
        if joins and self._previous is not None:
            position, before = self._segment.pop()
            assert position == self._previous.position
            self._close(self._previous, before)
            self._start(last)
        return shape

    def _close(self, last: BlockCall, shape: OutputStructure) -> None:
        """End the segment with `last`, and build its entry."""
        lead = self._lead
        assert lead is not None
        if lead.bases is None:
            self._spoilt = "a segment of the span was not known yet"
            self._chain.leads.add(lead.position)
        number = len(self._entries)
        self._segment.append((last.position, shape))
        for position, form in self._segment:
            leads = position == lead.position
            self._links[position] = Link(form, number, leads, () if leads else self._takes[position])
        reached = {last.origin.get(source): index for index, source in enumerate(shape.inputs) if source is not None}
        sources = self._segment[0][1].inputs
        ends = tuple(reached.get(source) if source is not None else None for source in sources)
        self._ends[last.position] = Ending(number, ends)
        bases = [None if source is None or lead.bases is None else lead.bases[source] for source in sources]
        self._entries.append(self._keeps.entry(bases, [None if end is None else last.outputs[end] for end in ends]))
        self._lead = self._last = self._previous = None

    def finish(self) -> str | None:
        """Store the entries of the completed span. Return the reason if nothing can be stored."""
        if self._last is not None:
            last = self._last
            self._close(last, self._settled(last))
        chain = self._chain
        if self._spoilt is not None or not self._entries:
            chain.forget()
            return self._spoilt or "no block of the span ran"
        before, now = (chain.signature, chain.rows), (self._signature, self._keeps.rows)
        # Results of half a guidance batch and of whole ones are kept side by side.
        chain.put(self._entries, self._keeps.depth, follows=alike(*before, *now) or alike(*now, *before))
        chain.links, chain.endings = self._links, self._ends
        chain.signature, chain.rows = now
        return None


def _held(call: BlockCall | None) -> list[Any]:
    """Return all values that a recorded call keeps alive."""
    return [] if call is None else [*call.names.values(), *call.outputs]


def _version(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _inference(names: Names) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_inference() for value in names.values())
