"""History of a span: how the outputs of its blocks become inputs of later blocks, and the results of its segments.

If every output of one block is, by identity, an input of the next, both belong to one *segment*. If the model works in
between (concatenates streams, reshapes, adds a control signal), a new segment begins. Each segment has a residual of
its own, so that on a reuse the work between segments runs as usual and is not counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachepolicy.engine.batch_view import WHOLE, BatchView
from cachepolicy.engine.history_packing import Packed, Packing, packed
from cachepolicy.engine.history_storage import ANYHOW, Storing

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

    def entry(self, bases: Sequence[Any], reached: Sequence[Any]) -> ChainEntry:
        """Return what is stored of a segment. Arguments as for `results`."""
        return ChainEntry(
            *results(bases, reached, residuals=self.residuals, outputs=self.outputs), self.step, self.rows
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


@dataclass(slots=True, eq=False)
class Chain:
    """History of one span on one branch: the links of its blocks, and entries per segment, newest first.

    Attributes:
        storing: How results are stored, and the memory limit.
        splits: Blocks after which a segment always ends.
        leads: Blocks whose inputs have to be copied before they run.
        clones: Whether blocks modify their inputs in place.
        signature: Shapes, dtypes and devices of the first block's inputs. None after a compute in a graph.
        rows: The rows of the batch that these inputs had.
        autocast: The autocast dtypes, with which graphs detect changed dtypes instead.
        answers: How the blocks answer, made from `links`, or None.
    """

    storing: Storing = field(default_factory=lambda: ANYHOW)
    links: dict[int, Link] = field(default_factory=dict[int, Link])
    endings: dict[int, Ending] = field(default_factory=dict[int, Ending])
    history: list[list[ChainEntry]] = field(default_factory=list[list[ChainEntry]])
    signature: tuple[Any, ...] | None = None
    rows: BatchView = WHOLE
    autocast: tuple[Any, ...] | None = None
    clones: bool = False
    splits: set[int] = field(default_factory=set[int])
    leads: set[int] = field(default_factory=set[int])
    answers: Answers | None = None

    def put(self, newest: Sequence[ChainEntry], depth: int, *, follows: bool = True) -> None:
        """Store the newest entry of each segment and trim to `depth`. Clear the chain if memory is lacking.

        Args:
            newest: The entries.
            depth: The number of entries to keep for each segment.
            follows: Whether the earlier entries had the same signature.
        """
        follows = follows and len(self.history) == len(newest)
        rest = [past[: depth - 1] for past in self.history] if follows else [list[ChainEntry]() for _ in newest]
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

    def forget(self) -> None:
        """Release all entries, and the structure."""
        self.links, self.endings, self.history, self.signature = {}, {}, [], None

    def learn(self, form: ChainForm) -> None:
        """Take over the structure from another compute of the span."""
        self.links = dict(enumerate(form.links))
        self.endings = {position: ending for position, ending in enumerate(form.endings) if ending is not None}

    def holds(self, *, residual: bool) -> bool:
        """Return True if the newest entry of each segment has the requested form."""
        # Loops, because generators take twice the time, and this runs once a decision.
        for entries in self.history:
            if not entries:
                return False
            newest = entries[0].residuals if residual else entries[0].outputs
            if newest.count(None) == len(newest):
                return False
        return bool(self.history)

    def form(self, blocks: int) -> ChainForm | None:
        """Return the structure of the span, if all of its blocks were observed."""
        if len(self.links) < blocks or not self.history:
            return None
        places = range(blocks)
        links = tuple(self.links[position] for position in places)
        return ChainForm(links, tuple(self.endings.get(position) for position in places), len(self.history))


def results(
    bases: Sequence[Any], reached: Sequence[Any], *, residuals: bool, outputs: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what is stored of a segment: the residuals and the outputs, by stream. None where there is none.

    Args:
        bases: The inputs of the segment. None where a stream is a constant or not known.
        reached: The outputs of the segment in which they continue. None where a stream ends inside.
        residuals: Whether residuals are stored.
        outputs: Whether outputs are stored, as copies, because the model may modify block outputs in place.
    """
    # Graphs cannot trace `list[Any]()`.
    differences: list[Any] = []
    kept: list[Any] = []
    for base, output in zip(bases, reached, strict=True):
        differences.append((output - base).detach() if residuals and output is not None and base is not None else None)
        kept.append(output.detach().clone() if outputs and output is not None else None)
    return tuple(differences), tuple(kept)


def led(inputs: Sequence[Any], values: Sequence[Any], *, residual: bool) -> list[Any]:
    """Return the answer of the first block of a segment, which carries the result of the whole segment.

    Args:
        inputs: The inputs of the segment, by stream.
        values: The residuals or outputs of the segment. None where a stream passes through.
        residual: Whether the values are residuals.
    """
    answers: list[Any] = []
    for stream, value in zip(inputs, values, strict=True):
        if stream is None or value is None:
            answers.append(stream)
        else:
            answers.append(stream + value if residual else value.clone())
    return answers


def fed_back(
    inputs: Sequence[Any], values: Sequence[Any], answers: Sequence[Any], *, residuals: bool, outputs: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what is stored of an answer of a segment. Arguments as for `led` and `results`."""
    made = [None if value is None else answer for value, answer in zip(values, answers, strict=True)]
    return results(inputs, made, residuals=residuals, outputs=outputs)


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


def alike(kept: tuple[Any, ...] | None, stored: BatchView, present: tuple[Any, ...] | None, rows: BatchView) -> bool:
    """Return True if one signature is equal to another, or has the form that the other has on its rows.

    Args:
        kept: The signature of a stored result.
        stored: The rows of that result.
        present: The signature of a call.
        rows: The rows of that call.
    """
    if kept == present:
        return True
    if kept is None or present is None or len(kept) != len(present):
        return False
    return all(
        now in (before, (before[0], rows.shape(before[1], stored), *before[2:]))
        for before, now in zip(kept, present, strict=True)
    )


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
