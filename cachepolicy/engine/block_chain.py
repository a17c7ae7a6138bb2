"""How blocks' outputs continue as inputs: learnt from the calls themselves, no registry of classes.

While a span computes, its blocks' calls are watched. Where every output of one block is, as the very same tensor, an
input of the next, both belong to one *segment*; where the model works in between (concatenates two streams, reshapes,
adds a control signal), a new segment begins. Each segment keeps its own residual, so that on a reuse the work between
the segments runs as it always does and is never counted twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachepolicy.engine.history_packing import Packed, Packing, packed
from cachepolicy.engine.history_storage import ANYHOW, Storing
from cachepolicy.errors import PolicyError

Names = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of a module's output: for each place the input that continues there, or its constant."""

    inputs: tuple[str | None, ...]
    constants: tuple[Any, ...]
    kind: type[Any]
    fields: tuple[str, ...] | None = None


@dataclass(slots=True)
class Link:
    """One block in a span: its output's form, and whether it leads a segment.

    `takes` are the outputs of the block before, by place, with the names of the inputs that they are.
    """

    shape: Shape
    segment: int
    leads: bool
    takes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a segment: for each stream of its first block, the output that it ends as, if any."""

    segment: int
    outputs: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """How the blocks of a span go on into one another, by position, once a compute has shown it."""

    links: tuple[Link, ...]
    endings: tuple[Ending | None, ...]
    segments: int


@dataclass(slots=True)
class Entry:
    """One computed result of a segment: residuals and outputs, as far as kept, by place of the leading block's output.

    `full` is False where only the conditional half of a guidance batch was computed.
    """

    residuals: tuple[torch.Tensor | Packed | None, ...]
    outputs: tuple[torch.Tensor | Packed | None, ...]
    step: int
    full: bool = True

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All that is stored."""
        return (*self.residuals, *self.outputs)

    def at(self, place: int, *, residual: bool) -> torch.Tensor | None:
        """The residual or the output of one place, as it was before it was packed."""
        kept = (self.residuals if residual else self.outputs)[place]
        return kept.opened() if isinstance(kept, Packed) else kept

    def pack(self, packing: Packing) -> None:
        """Store it as `packing` says."""
        self.residuals, self.outputs = packed(packing, self.residuals), packed(packing, self.outputs)


@dataclass(frozen=True, slots=True)
class Keeps:
    """What one compute of a span is to keep: how many results, which of the two forms, at which step."""

    depth: int
    residuals: bool
    outputs: bool
    step: int
    full: bool


@dataclass(slots=True)
class Call:
    """One block's call while its span computes; `bases` are its inputs as they were, None where that is not known."""

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
    """Which output of a block class continues which of its inputs, as far as calls have shown it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], str] = {}

    def learn(self, module: Any, place: int, name: str) -> None:
        """An output was passed on as `name`, and the block takes an input of that name itself."""
        self._known[type(module).__qualname__, place] = name

    def input_of(self, module: Any, place: int) -> str | None:
        """The input that an output is known to continue."""
        return self._known.get((type(module).__qualname__, place))

    def of(self, call: Call, name: str) -> Shape:
        """The form of a call's output.

        Raises:
            PolicyError: an output continues no input, or it is not clear which.
        """
        inputs = list[str | None]()
        constants = list[Any]()
        for place, output in enumerate(call.outputs):
            if isinstance(output, torch.Tensor):
                inputs.append(self._input(call, place, output, inputs, name))
                constants.append(None)
            elif output is None or isinstance(output, bool | int | float | str):
                inputs.append(None)
                constants.append(output)
            else:
                raise PolicyError.of(
                    "E311",
                    f"`{name}` returns a `{type(output).__name__}` inside its output, so its blocks form no chain",
                )
        return Shape(tuple(inputs), tuple(constants), call.kind, call.fields)

    def _input(self, call: Call, place: int, output: torch.Tensor, taken: Sequence[str | None], name: str) -> str:
        known = call.learnt.get(place) or self._known.get((type(call.module).__qualname__, place))
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
            f"output {place} of `{name}` {problem}",
            help="a residual or a span needs a module that returns the streams it is given; a plain `reuse` does not",
        )


class Chain:
    """What one span keeps on one branch: the links of its blocks and a history per segment, the newest entry first.

    `splits` are the blocks after which a segment ends, whatever follows; `leads` those whose inputs have to be copied;
    `clones` says that blocks write into their inputs. `storing` says how results are stored, and whether there is room.
    `signature` is what the first block was called with; graphs leave none, and know by `autocast` whether dtypes are
    others now.
    """

    __slots__ = ("autocast", "clones", "endings", "history", "leads", "links", "signature", "splits", "storing")

    def __init__(self, storing: Storing = ANYHOW) -> None:
        self.storing = storing
        self.links: dict[int, Link] = {}
        self.endings: dict[int, Ending] = {}
        self.history: list[list[Entry]] = []
        self.signature: tuple[Any, ...] | None = None
        self.autocast: tuple[Any, ...] | None = None
        self.clones = False
        self.splits: set[int] = set()
        self.leads: set[int] = set()

    def put(self, newest: Sequence[Entry], older: Sequence[list[Entry]], depth: int) -> None:
        """Put each segment's newest result before the older ones, and keep so many; none where there is no room."""
        rest = [past[: depth - 1] for past in older]
        self.history = rest
        if not self.storing.admits([entry.tensors for entry in newest], copied=True):
            self.clear()
            return
        if self.storing.packing is not None:
            for entry in newest:
                entry.pack(self.storing.packing)
        self.history = [[entry, *past] for entry, past in zip(newest, rest, strict=True)]

    def push(self, segment: int, newest: Entry, older: list[Entry], depth: int) -> None:
        """Put an answer before one segment's older results; `put` has seen to the room."""
        if self.storing.packing is not None:
            newest.pack(self.storing.packing)
        self.history[segment] = [newest, *older][:depth]

    def clear(self) -> None:
        """Let go of all results; how the blocks go on stays known."""
        self.history = [[] for _ in self.history]

    def holds(self, *, residual: bool) -> bool:
        """True where each segment's newest result is kept in the form that is asked for."""
        return bool(self.history) and all(
            entries and any(tensor is not None for tensor in (entries[0].residuals if residual else entries[0].outputs))
            for entries in self.history
        )

    def form(self, blocks: int) -> Form | None:
        """How the blocks go on, where all of so many have shown it."""
        if len(self.links) < blocks or not self.history:
            return None
        places = range(blocks)
        links = tuple(self.links[place] for place in places)
        return Form(links, tuple(self.endings.get(place) for place in places), len(self.history))


Begun = tuple[Names | None, dict[str, int | None]]
"""A block's inputs as they were before it ran (None: not known), and their write counters."""


_HELD = 2  # the outputs of so many blocks before this one are held by the recorder itself


class Recorder:
    """Watches the blocks of one span through one compute and forms what its segments keep.

    It holds on to the first and the last two blocks of the present segment, not to what the others gave.
    """

    def __init__(self, chain: Chain, continuations: Continuations, names: Sequence[str], keeps: Keeps) -> None:
        self._chain = chain
        self._continuations = continuations
        self._names = names
        self._keeps = keeps
        self._lead: Call | None = None
        self._previous: Call | None = None
        self._last: Call | None = None
        self._segment: list[tuple[int, Shape]] = []
        self._links: dict[int, Link] = {}
        self._ends: dict[int, Ending] = {}
        self._takes: dict[int, tuple[tuple[int, str], ...]] = {}
        self._seen: set[int] = set()
        self._entries: list[Entry] = []
        self._given: list[tuple[int, list[weakref.ref[torch.Tensor]]]] = []
        self._spoilt: str | None = None
        self._signature: tuple[Any, ...] | None = None
        self.calls = 0

    def begin(self, position: int, names: Names) -> Begun:
        """A block is about to run; gives its inputs as they are now, and their write counters.

        Where blocks write into their inputs, or nobody could tell, the inputs of a segment's first block are copied;
        those of a block that turns out to lead a segment for the first time are not known then.
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
        """A block has run."""
        self.calls += 1
        if position in self._seen:
            self._spoilt = "a block ran more than once"
        self._seen.add(position)
        outputs, fields = parts(output)
        bases, before = begun
        written = [_version(each) for each in outputs]
        call = Call(position, module, names, bases, outputs, type(output), written, fields)  # pyright: ignore[reportUnknownArgumentType]
        if bases is names and any(_version(value) != before[key] for key, value in names.items()):
            self._spoilt = "a block wrote into its input"
            self._chain.clones = True
        self._look_back(call)
        self._follow(call)
        if position in self._chain.splits:
            # At once, before the model can write into what the block gave.
            self._close(call, self._settled(call))

    def _follow(self, call: Call) -> None:
        """Put a call behind the last one, or at the head of a new segment."""
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
        for place, name in became.items():
            source = shape.inputs[place]
            if source is not None and source in last.origin:
                call.origin[name] = last.origin[source]
        self._takes[call.position] = tuple(became.items())
        self._segment.append((last.position, shape))
        self._previous, self._last = last, call

    def _start(self, call: Call) -> None:
        call.origin = {key: key for key in call.names}
        self._lead = self._last = call
        self._previous = None
        self._segment = []

    def _look_back(self, call: Call) -> None:
        """What an earlier block gave and somebody else still holds is used elsewhere: it has to come out right."""
        older = self._given[:-_HELD]
        if not any(reference() is not None for _, references in older for reference in references):
            self._given = self._given[-_HELD:]
            self._give(call)
            return
        mine = {id(value) for held in (self._lead, self._previous, self._last, call) for value in _held(held)}
        mine |= {id(tensor) for entry in self._entries for tensor in entry.outputs}
        self._given = [each for each in self._given if any(reference() is not None for reference in each[1])]
        for position, references in self._given:
            if position in self._chain.splits or position in self._ends:
                continue
            if any(tensor is not None and id(tensor) not in mine for tensor in (each() for each in references)):
                self._spoilt = "the output of a block is used elsewhere"
                self._chain.splits.add(position)
        self._give(call)

    def _give(self, call: Call) -> None:
        inputs = {id(value) for value in call.names.values()}
        fresh = [each for each in call.outputs if isinstance(each, torch.Tensor) and id(each) not in inputs]
        self._given.append((call.position, [weakref.ref(each) for each in fresh]))

    def _became(self, last: Call, call: Call) -> dict[int, str] | None:
        """Which input of `call` each output of `last` is; None where `call` does not take them all."""
        became = dict[int, str]()
        for place, output in enumerate(last.outputs):
            if isinstance(output, torch.Tensor):
                name = next((key for key, value in call.names.items() if value is output), None)
                if name is None:
                    return None
                became[place] = name
        for place, name in became.items():
            if name in last.names:
                last.learnt[place] = name
                self._continuations.learn(last.module, place, name)
        if any(_version(each) != version for each, version in zip(last.outputs, last.versions, strict=True)):
            self._spoilt = "the model wrote into the output of a block"
            self._chain.splits.add(last.position)
            return None
        return became or None

    def _settled(self, last: Call) -> Shape:
        """The form of a call whose successor is known; where a stream joins at it, it leads a segment of its own."""
        shape = self._continuations.of(last, self._names[last.position])
        joins = any(source is not None and source not in last.origin for source in shape.inputs)
        if joins and self._previous is not None:
            position, before = self._segment.pop()
            assert position == self._previous.position
            self._close(self._previous, before)
            self._start(last)
        return shape

    def _close(self, last: Call, shape: Shape) -> None:
        """The segment ends with `last`: form what it keeps."""
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
        reached = {last.origin.get(source): place for place, source in enumerate(shape.inputs) if source is not None}
        sources = self._segment[0][1].inputs
        ends = tuple(reached.get(source) if source is not None else None for source in sources)
        self._ends[last.position] = Ending(number, ends)
        residuals, outputs = list[torch.Tensor | None](), list[torch.Tensor | None]()
        for source, place in zip(sources, ends, strict=True):
            output = last.outputs[place] if place is not None else None
            base = lead.bases[source] if source is not None and lead.bases is not None else None
            wanted = self._keeps.residuals
            residuals.append((output - base).detach() if wanted and output is not None and base is not None else None)
            # A copy: the model may write into what its blocks return.
            outputs.append(output.detach().clone() if output is not None and self._keeps.outputs else None)
        self._entries.append(Entry(tuple(residuals), tuple(outputs), self._keeps.step, self._keeps.full))
        self._lead = self._last = self._previous = None

    def finish(self) -> str | None:
        """The span has run: its entries enter the history. Gives the reason where nothing can be kept."""
        if self._last is not None:
            last = self._last
            self._close(last, self._settled(last))
        chain = self._chain
        if self._spoilt is not None or not self._entries:
            chain.links, chain.endings, chain.history, chain.signature = {}, {}, [], None
            return self._spoilt or "no block of the span ran"
        same = len(chain.history) == len(self._entries) and chain.signature == self._signature
        old: list[list[Entry]] = chain.history if same else [[] for _ in self._entries]
        depth = self._keeps.depth
        chain.put(self._entries, old, depth)
        chain.links, chain.endings, chain.signature = self._links, self._ends, self._signature
        return None


def _held(call: Call | None) -> list[Any]:
    """All that the record of a call keeps alive."""
    return [] if call is None else [*call.names.values(), *call.outputs]


def bind_names(parameters: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by parameter name."""
    names: dict[str, Any] = dict(zip(parameters, args, strict=False))
    for index in range(len(parameters), len(args)):
        names[f"*{index}"] = args[index]
    names.update(kwargs)
    return names


def parts(output: Any) -> tuple[list[Any], tuple[str, ...] | None]:
    """What an output is made of, and the field names where it is an output object."""
    if isinstance(output, torch.Tensor):
        return [output], None
    if isinstance(output, dict):
        return list(output.values()), tuple(output.keys())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return list(output), None


def signature(names: Names) -> tuple[Any, ...]:
    """Shapes, dtypes and devices of what goes into a block."""
    return tuple(
        (key, value.shape, value.dtype, value.device) for key, value in names.items() if isinstance(value, torch.Tensor)
    )


def rebuilt(shape: Shape, tensors: Sequence[Any]) -> Any:
    """An output of the given form, from a tensor for each place that continues an input."""
    if issubclass(shape.kind, torch.Tensor):
        return tensors[0]
    values = [
        constant if key is None else tensor
        for key, constant, tensor in zip(shape.inputs, shape.constants, tensors, strict=True)
    ]
    if shape.fields is not None:
        return shape.kind(**dict(zip(shape.fields, values, strict=True)))
    return shape.kind(*values) if hasattr(shape.kind, "_fields") else shape.kind(values)


def handed_on(shape: Shape, names: Names) -> Any:
    """The output of a block that gives its inputs on as they are."""
    if shape.kind is tuple and None not in shape.inputs:
        return tuple([names[key] for key in shape.inputs])  # pyright: ignore[reportArgumentType]
    return rebuilt(shape, passed(shape, names))


def passed(shape: Shape, names: Names) -> list[Any]:
    """For each place of the output the input that continues there."""
    return [None if key is None else names[key] for key in shape.inputs]


def _version(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _inference(names: Names) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_inference() for value in names.values())
