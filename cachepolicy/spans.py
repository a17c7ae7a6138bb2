"""How blocks' outputs continue as inputs: learnt from the calls themselves, no registry of classes.

While a span computes, its blocks' calls are watched. Where every output of one block is, as the very same tensor, an
input of the next, both belong to one *segment*; where the model works in between (concatenates two streams, reshapes,
adds
a control signal), a new segment begins. Each segment keeps its own residual, so that on a reuse the work between the
segments runs as it always does and is never counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachepolicy.diagnostics import PolicyError

Names = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of a module's output: for each place the input that continues there, or its constant."""

    inputs: tuple[str | None, ...]
    constants: tuple[Any, ...]
    kind: type
    fields: tuple[str, ...] | None = None


@dataclass(slots=True)
class Link:
    """One block in a span: its output's form, and whether it leads a segment."""

    shape: Shape
    segment: int
    leads: bool


@dataclass(slots=True)
class Entry:
    """One computed result of a segment, at one step: residuals or outputs by place of the leading block's output.

    `full` is False where only the conditional half of a guidance batch was computed.
    """

    tensors: tuple[torch.Tensor | None, ...]
    step: int
    full: bool = True


@dataclass(slots=True)
class Call:
    """One block's call while its span computes; `bases` are its inputs as they were, None where that is not known."""

    position: int
    module: Any
    names: Names
    bases: Names | None
    outputs: list[Any]
    kind: type
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
    """What one span keeps on one branch: the links of its blocks and a history per segment, the newest entry first."""

    __slots__ = ("clones", "history", "leads", "links", "signature", "splits")

    def __init__(self) -> None:
        self.links: dict[int, Link] = {}
        self.history: list[list[Entry]] = []
        self.signature: tuple[Any, ...] | None = None
        self.clones = False
        self.splits: set[int] = set()
        self.leads: set[int] = {0}


class Recorder:
    """Watches the blocks of one span through one compute and forms the residuals or outputs of its segments."""

    def __init__(
        self, chain: Chain, continuations: Continuations, names: Sequence[str], *, residual: bool, step: int, full: bool
    ) -> None:
        self._chain = chain
        self._continuations = continuations
        self._names = names
        self._residual = residual
        self._step = step
        self._full = full
        self._segment: list[Call] = []
        self._links: dict[int, Link] = {}
        self._entries: list[Entry] = []
        self._spoilt: str | None = None
        self.signature: tuple[Any, ...] | None = None

    def begin(self, position: int, names: Names) -> tuple[Names | None, dict[str, int | None]]:
        """A block is about to run; gives its inputs as they are now, and their write counters.

        Where blocks write into their inputs, or nobody could tell, the inputs of a segment's first block are copied;
        those of
        a block that turns out to lead a segment for the first time are not known then.
        """
        if position == 0:
            self.signature = signature(names)
        bases: Names | None = names
        if self._chain.clones or _inference(names):
            leads = position in self._chain.leads
            bases = {key: _copy(value) for key, value in names.items()} if leads else None
        return bases, {key: _version(value) for key, value in names.items()}

    def end(
        self,
        position: int,
        module: Any,
        names: Names,
        begun: tuple[Names | None, dict[str, int | None]],
        output: Any,
    ) -> None:
        """A block has run."""
        outputs, fields = parts(output)
        bases, before = begun
        written = [_version(each) for each in outputs]
        call = Call(position, module, names, bases, outputs, type(output), written, fields)
        if self._segment and not self._continues(self._segment[-1], call):
            self._close()
        if not self._segment:
            call.origin = {key: key for key in names}
        if bases is names and any(_version(value) != before[key] for key, value in names.items()):
            self._spoilt = "a block wrote into its input"
            self._chain.clones = True
        self._segment.append(call)
        if position in self._chain.splits:
            self._close()

    def _continues(self, last: Call, call: Call) -> bool:
        """True where `call` takes all that `last` gave; learns on the way which input each output became."""
        became = dict[int, str]()
        for place, output in enumerate(last.outputs):
            if isinstance(output, torch.Tensor):
                name = next((key for key, value in call.names.items() if value is output), None)
                if name is None:
                    return False
                became[place] = name
        for place, name in became.items():
            if name in last.names:
                last.learnt[place] = name
                self._continuations.learn(last.module, place, name)
        written = any(_version(each) != version for each, version in zip(last.outputs, last.versions, strict=True))
        if written:
            self._spoilt = "the model wrote into the output of a block"
            self._chain.splits.add(last.position)
            return False
        shape = self._continuations.of(last, self._names[last.position])
        for place, name in became.items():
            source = shape.inputs[place]
            if source is not None and source in last.origin:
                call.origin[name] = last.origin[source]
        return bool(became)

    def _close(self) -> None:
        """The segment is complete: form what it keeps."""
        calls, self._segment = self._segment, []
        lead, last = calls[0], calls[-1]
        if lead.bases is None:
            self._spoilt = "a segment of the span was not known yet"
            self._chain.leads.add(lead.position)
        shapes = [self._continuations.of(call, self._names[call.position]) for call in calls]
        number = len(self._entries)
        for call, shape in zip(calls, shapes, strict=True):
            self._links[call.position] = Link(shape, number, leads=call is lead)
        reached = {
            last.origin.get(source): output
            for source, output in zip(shapes[-1].inputs, last.outputs, strict=True)
            if source is not None
        }
        kept = list[torch.Tensor | None]()
        for source in shapes[0].inputs:
            output = reached.get(source) if source is not None else None
            if output is None or source is None or lead.bases is None:
                kept.append(None)
            else:
                kept.append(((output - lead.bases[source]) if self._residual else output).detach())
        self._entries.append(Entry(tuple(kept), self._step, self._full))

    def finish(self, depth: int) -> str | None:
        """The span has run: its entries enter the history. Gives the reason where nothing can be kept."""
        if self._segment:
            self._close()
        chain = self._chain
        if self._spoilt is not None or not self._entries:
            chain.links, chain.history, chain.signature = {}, [], None
            return self._spoilt or "no block of the span ran"
        same = len(chain.history) == len(self._entries) and chain.signature == self.signature
        old = chain.history if same else [[] for _ in self._entries]
        chain.history = [[entry, *past][:depth] for entry, past in zip(self._entries, old, strict=True)]
        chain.links, chain.signature = self._links, self.signature
        return None


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
