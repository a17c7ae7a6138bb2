"""Learns at run time how the outputs of blocks become inputs of later blocks. No class registry is needed.

While a span computes, the calls of its blocks are recorded. If every output of one block is, by identity, an input of
the next, both belong to one *segment*. If the model works in between (concatenates streams, reshapes, adds a control
signal), a new segment begins. Each segment has a residual of its own, so that on a reuse the work between segments runs
as usual and is not counted twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachepolicy.engine.batch_view import WHOLE, BatchView
from cachepolicy.engine.history_packing import Packed, Packing, packed
from cachepolicy.engine.history_storage import ANYHOW, Storing
from cachepolicy.errors import PolicyError

Names = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OutputStructure:
    """Structure of a module's output: for each element, the input that continues in it, or a constant."""

    inputs: tuple[str | None, ...]
    constants: tuple[Any, ...]
    kind: type[Any]
    fields: tuple[str, ...] | None = None


@dataclass(slots=True)
class Link:
    """One block of a span: the structure of its output, and whether it leads a segment.

    `takes` lists the outputs of the previous block, by place, with the input names under which this block receives
    them.
    """

    shape: OutputStructure
    segment: int
    leads: bool
    takes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a segment: for each stream of its first block, the index in the final output, or None."""

    segment: int
    outputs: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class ChainForm:
    """Structure of a span after a complete compute: links and endings by block position."""

    links: tuple[Link, ...]
    endings: tuple[Ending | None, ...]
    segments: int


@dataclass(slots=True)
class ChainEntry:
    """Stored result of a segment: residuals and outputs by place of the leading block's output.

    `rows` are the rows of the batch that were computed.
    """

    residuals: tuple[torch.Tensor | Packed | None, ...]
    outputs: tuple[torch.Tensor | Packed | None, ...]
    step: int
    rows: BatchView = WHOLE

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All stored tensors."""
        return (*self.residuals, *self.outputs)

    def at(self, index: int, *, residual: bool) -> torch.Tensor | None:
        """Return the residual or the output at an index, unpacked."""
        kept = (self.residuals if residual else self.outputs)[index]
        return kept.opened() if isinstance(kept, Packed) else kept

    def pack(self, packing: Packing) -> None:
        """Store the entry in the packed form."""
        self.residuals, self.outputs = packed(packing, self.residuals), packed(packing, self.outputs)


@dataclass(frozen=True, slots=True)
class Keeps:
    """Settings of one span compute: the number of stored results, residuals or outputs, the step, and the rows."""

    depth: int
    residuals: bool
    outputs: bool
    step: int
    rows: BatchView = WHOLE


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
        self._links: dict[int, tuple[dict[int, Link], dict[int, Ending]]] = {}

    def learn(self, module: Any, index: int, name: str) -> None:
        """Record that an output was passed on as `name`, which is also an input of the block itself."""
        self._known[type(module).__qualname__, index] = name

    def keep_links(self, span: int, links: dict[int, Link], endings: dict[int, Ending]) -> None:
        """Store the structure of a span after a complete compute."""
        self._links[span] = links, endings

    def links_of(self, span: int, names: Names) -> tuple[dict[int, Link], dict[int, Ending]]:
        """Return copies of a span's links and endings from any compute of the run, if these inputs fit its first block.

        If none is known or the inputs do not fit, both are empty.
        """
        links, endings = self._links.get(span, ({}, {}))
        fits = bool(links) and all(key is None or key in names for key in links[0].shape.inputs)
        return (dict(links), dict(endings)) if fits else ({}, {})

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
        known = call.learnt.get(index) or self._known.get((type(call.module).__qualname__, index))
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


Passage = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Maps the arguments of a block to its output, for a block that passes its inputs through."""


@dataclass(frozen=True, slots=True)
class Answers:
    """How the blocks of a span answer: by their links, or by passages that their hooks apply.

    Attributes:
        of: The links of all blocks, from which this was made.
        lead: The link of the first block.
        links: The links of the blocks without a passage.
        passages: The passages, by the handle of the block.
    """

    of: dict[int, Link]
    lead: Link
    links: dict[int, Link]
    passages: dict[Any, Passage]


class Chain:
    """History of one span on one branch: the links of its blocks, and entries per segment, newest first.

    Attributes:
        storing: How results are stored, and the memory limit.
        splits: Blocks after which a segment always ends.
        leads: Blocks whose inputs have to be copied before they run.
        clones: Whether blocks modify their inputs in place.
        signature: Shapes, dtypes and devices of the first block's inputs. None after a compute in a graph.
        autocast: The autocast dtypes, with which graphs detect changed dtypes instead.
        answers: How the blocks answer, made from `links`, or None.
    """

    __slots__ = (
        "answers", "autocast", "clones", "endings", "history", "leads", "links", "signature", "splits", "storing",
    )  # fmt: skip

    def __init__(self, storing: Storing = ANYHOW) -> None:
        self.storing = storing
        self.links: dict[int, Link] = {}
        self.endings: dict[int, Ending] = {}
        self.history: list[list[ChainEntry]] = []
        self.signature: tuple[Any, ...] | None = None
        self.autocast: tuple[Any, ...] | None = None
        self.clones = False
        self.splits: set[int] = set()
        self.leads: set[int] = set()
        self.answers: Answers | None = None

    def put(self, newest: Sequence[ChainEntry], older: Sequence[list[ChainEntry]], depth: int) -> None:
        """Store the newest entry of each segment and trim to `depth`. Clear the chain if memory is lacking."""
        rest = [past[: depth - 1] for past in older]
        self.history = rest
        if not self.storing.admits([entry.tensors for entry in newest], copied=True):
            self.clear()
            return
        if self.storing.packing is not None:
            for entry in newest:
                entry.pack(self.storing.packing)
        self.history = [[entry, *past] for entry, past in zip(newest, rest, strict=True)]

    def push(self, segment: int, newest: ChainEntry, older: list[ChainEntry], depth: int) -> None:
        """Store an answer as the newest entry of one segment. `put` has reserved the memory."""
        if self.storing.packing is not None:
            newest.pack(self.storing.packing)
        self.history[segment] = [newest, *older][:depth]

    def clear(self) -> None:
        """Release all entries. The structure of the blocks stays."""
        self.history = [[] for _ in self.history]

    def holds(self, *, residual: bool) -> bool:
        """Return True if the newest entry of each segment has the requested form."""
        return bool(self.history) and all(
            entries and any(tensor is not None for tensor in (entries[0].residuals if residual else entries[0].outputs))
            for entries in self.history
        )

    def form(self, blocks: int) -> ChainForm | None:
        """Return the structure of the span, if all of its blocks were observed."""
        if len(self.links) < blocks or not self.history:
            return None
        places = range(blocks)
        links = tuple(self.links[position] for position in places)
        return ChainForm(links, tuple(self.endings.get(position) for position in places), len(self.history))


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
        residuals, outputs = list[torch.Tensor | None](), list[torch.Tensor | None]()
        for source, end in zip(sources, ends, strict=True):
            output = last.outputs[end] if end is not None else None
            base = lead.bases[source] if source is not None and lead.bases is not None else None
            wanted = self._keeps.residuals
            residuals.append((output - base).detach() if wanted and output is not None and base is not None else None)
            # Clone, because the model may modify block outputs in place.
            outputs.append(output.detach().clone() if output is not None and self._keeps.outputs else None)
        self._entries.append(ChainEntry(tuple(residuals), tuple(outputs), self._keeps.step, self._keeps.rows))
        self._lead = self._last = self._previous = None

    def finish(self) -> str | None:
        """Store the entries of the completed span. Return the reason if nothing can be stored."""
        if self._last is not None:
            last = self._last
            self._close(last, self._settled(last))
        chain = self._chain
        if self._spoilt is not None or not self._entries:
            chain.links, chain.endings, chain.history, chain.signature = {}, {}, [], None
            return self._spoilt or "no block of the span ran"
        same = len(chain.history) == len(self._entries) and chain.signature == self._signature
        old: list[list[ChainEntry]] = chain.history if same else [[] for _ in self._entries]
        depth = self._keeps.depth
        chain.put(self._entries, old, depth)
        chain.links, chain.endings, chain.signature = self._links, self._ends, self._signature
        return None


def _held(call: BlockCall | None) -> list[Any]:
    """Return all values that a recorded call keeps alive."""
    return [] if call is None else [*call.names.values(), *call.outputs]


def bind_names(parameters: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by parameter name.

    Args:
        parameters: The parameter names of the forward.
        args: Positional arguments. Those beyond the parameters are named `*index`.
        kwargs: Keyword arguments.
    """
    names: dict[str, Any] = dict(zip(parameters, args, strict=False))
    for index in range(len(parameters), len(args)):
        names[f"*{index}"] = args[index]
    names.update(kwargs)
    return names


def parts(output: Any) -> tuple[list[Any], tuple[str, ...] | None]:
    """Return the elements of an output, and the field names of an output object."""
    if isinstance(output, torch.Tensor):
        return [output], None
    if isinstance(output, dict):
        return list(output.values()), tuple(output.keys())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return list(output), None


def signature(names: Names) -> tuple[Any, ...]:
    """Return the names, shapes, dtypes and devices of the tensors that a block receives."""
    # A list, because a generator takes twice the time, and this runs once a decision.
    return tuple([
        (key, value.shape, value.dtype, value.device) for key, value in names.items() if isinstance(value, torch.Tensor)
    ])  # fmt: skip


def rebuilt(shape: OutputStructure, tensors: Sequence[Any]) -> Any:
    """Build an output of this structure. `tensors` has one value for each element of the output."""
    if issubclass(shape.kind, torch.Tensor):
        return tensors[0]
    values = [
        constant if key is None else tensor
        for key, constant, tensor in zip(shape.inputs, shape.constants, tensors, strict=True)
    ]
    if shape.fields is not None:
        return shape.kind(**dict(zip(shape.fields, values, strict=True)))
    return shape.kind(*values) if hasattr(shape.kind, "_fields") else shape.kind(values)


def handed_on(shape: OutputStructure, names: Names) -> Any:
    """Return the output of a block that passes its inputs through unchanged."""
    if shape.kind is tuple and None not in shape.inputs:
        return tuple([names[key] for key in shape.inputs])  # pyright: ignore[reportArgumentType]
    return rebuilt(shape, passed(shape, names))


def passage(shape: OutputStructure, parameters: Sequence[str]) -> Passage:
    """Return a function that passes the inputs of a block through.

    Args:
        shape: The structure of the block's output.
        parameters: The parameter names of its forward.
    """
    match shape:
        case OutputStructure(inputs=(str(name),), kind=kind) if issubclass(kind, torch.Tensor):
            return lambda args, kwargs: kwargs[name] if name in kwargs else bind_names(parameters, args, kwargs)[name]
        case OutputStructure(inputs=(str(one), str(two))) if shape.kind is tuple:

            def pair(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                names = bind_names(parameters, args, kwargs) if args else kwargs
                return names[one], names[two]

            return pair
        case _:
            return lambda args, kwargs: handed_on(shape, bind_names(parameters, args, kwargs))


def passed(shape: OutputStructure, names: Names) -> list[Any]:
    """Return, for each element of the output, the input that continues in it, or None for a constant."""
    return [None if key is None else names[key] for key in shape.inputs]


def _version(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _inference(names: Names) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_inference() for value in names.values())
