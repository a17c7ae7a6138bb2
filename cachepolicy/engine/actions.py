"""Tensor operations of the actions: `reuse`, `predict` and their residual forms."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch

from cachepolicy.diffusers.argument_names import HIDDEN_STATES
from cachepolicy.engine.batch_view import WHOLE, BatchView
from cachepolicy.engine.block_chain import Chain
from cachepolicy.engine.history_packing import Packing, compact, is_whole, leaves, map_leaves, map_once, opened, packed
from cachepolicy.engine.history_storage import ANYHOW, Storing
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import Keeping
from cachepolicy.planning.predictors import Weights, extrapolate


class Op(Enum):
    """What a site does in one root call."""

    COMPUTE = 0
    """Run, and store nothing."""
    STORE = 1
    """Run, and store the result."""
    STORE_CLONE = 2
    """Run, and store a copy of the result."""
    REUSE = 3
    """Return the stored result."""
    ANSWER = 4
    """Return an answer that is more than the stored result."""
    PENDING = 5
    """Wait for signals."""
    ANSWERED = 6
    """Answered in this call. A second call is a repeat."""
    COMPUTED = 7
    """Run in this call, with a stored result. A second call is a repeat."""
    RAN = 8
    """Run in this call, and stored nothing."""

    __hash__ = object.__hash__  # members are singletons, and the hash of `Enum` is a Python function


# Names of the module are compared by identity on the hot path: attributes of the class take longer to look up.
COMPUTE, STORE, STORE_CLONE, REUSE, ANSWER, PENDING, ANSWERED, COMPUTED, RAN = Op
UNCALLED = frozenset({COMPUTE, STORE, STORE_CLONE, REUSE, ANSWER, PENDING})
"""The operations of sites that were not called, or whose calls leave no mark."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An earlier output, its step, and the rows of the batch that it has.

    `versions` are the `_version` counters of its tensors when stored, or None for a copy.
    """

    output: Any
    step: int
    rows: BatchView
    versions: tuple[int, ...] | None = None


@dataclass(slots=True, eq=False, weakref_slot=True)
class Slot:
    """History of one site on one branch: its stored outputs, newest first, or the chain of its segments.

    Attributes:
        output: The newest output.
        shape: Shape of the hidden states of that compute. With `dtype` and `device`, it must match those of a reuse.
        version: `_version` of the output when stored, if it is a single tensor that may be returned without a copy.
        versions: The `_version` counters of all tensors of any other output.
        flat: Whether `versions` are those of a tuple of plain tensors without gradients.
        clones: Whether an answer was modified in place. The site then stores and returns copies.
        rows: The rows of the batch that the newest output has.
        whole: Whether the stored tensors were most of their storages.
        storing: How results are stored, and the memory limit.
    """

    storing: Storing = field(default_factory=lambda: ANYHOW)
    packing: Packing | None = None
    output: Any = None
    older: list[Kept] = field(default_factory=list[Kept])
    chain: Chain | None = None
    shape: Any = None
    dtype: Any = None
    device: Any = None
    version: int | None = None
    versions: tuple[int, ...] | None = None
    flat: bool = False
    clones: bool = False
    step: int = -1
    rows: BatchView = WHOLE
    whole: bool = False

    def __post_init__(self) -> None:
        self.packing = self.storing.packing
        if self.storing is not ANYHOW:
            # A weak reference, because the slot owns the lease that calls `_drop`: a strong one would be a cycle.
            mine: weakref.ref[Slot] = weakref.ref(self)
            self.storing = self.storing.of_its_own(lambda: _drop(mine))

    def clear(self) -> None:
        """Release all outputs. The structure of a span stays."""
        self.output, self.older, self.version, self.versions = None, [], None, None
        if self.chain is not None:
            self.chain.clear()


def chain_of(slot: Slot) -> Chain:
    """Return the history of a span, and create it if needed."""
    chain = slot.chain
    if chain is None:
        chain = slot.chain = Chain(slot.storing)
    return chain


def _drop(slot: weakref.ref[Slot]) -> None:
    target = slot()
    if target is not None:
        target.clear()


# --- predictors ------------------------------------------------------------------------------------------


def combine(history: Sequence[torch.Tensor], numbers: Weights) -> torch.Tensor:
    """Return the prediction from a history, as a new tensor.

    Args:
        history: Stored values, newest first. All have the same shape.
        numbers: The coefficients of the prediction.
    """
    answer = extrapolate(history, numbers)
    # Never return the stored tensor itself: the caller may modify it in place.
    return answer.clone() if answer is history[0] else answer


# --- outputs ---------------------------------------------------------------------------------------------


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the main tensor of a call, usually of shape `(B, S, C)`.

    Args:
        args: Positional arguments. The first one is the main tensor, if it is a tensor.
        kwargs: Keyword arguments. `hidden_states` comes next, then the first other tensor of the call.

    Returns:
        The tensor, or None if the call has none.
    """
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    named = kwargs.get(HIDDEN_STATES)
    if isinstance(named, torch.Tensor):
        return named
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None


def unfit(slot: Slot, states: torch.Tensor | None, rows: BatchView = WHOLE) -> Fact | None:
    """Return why the stored output cannot answer this call, or None.

    Args:
        slot: The history of the site.
        states: The hidden states of the call, or None.
        rows: The rows of the batch that the call runs. A stored whole batch also fits a half of it.
    """
    if states is None or slot.shape is None:
        fits = states is None and slot.shape is None
    else:
        fits = states.dtype is slot.dtype and states.device == slot.device
        fits = fits and states.shape == rows.shape(slot.shape, slot.rows)
    return Fact.MISFIT if slot.output is not None and not fits else lacks(slot)


def lacks(slot: Slot) -> Fact | None:
    """Return why a site has no stored output that can answer, whatever it is called with, or None."""
    if slot.output is None:
        return slot.storing.lacking
    if not slot.clones and overwritten(slot):
        # Downstream code modifies outputs of this site in place, so the site uses copies from now on.
        spoil(slot)
        return Fact.OVERWRITTEN
    return None


def overwritten(slot: Slot) -> bool:
    """Return True if any stored output was modified in place, which is possible because answers are not copies."""
    if slot.version is not None:
        newest = slot.output._version != slot.version
    else:
        newest = slot.versions is not None and versions(slot.output) != slot.versions
    return newest or any(kept.versions is not None and versions(kept.output) != kept.versions for kept in slot.older)


def spoil(slot: Slot) -> None:
    """Release the outputs of a site, older ones too, and store copies from now on."""
    slot.clones, slot.output, slot.older = True, None, []


class TensorForm(NamedTuple):
    """What must be equal of the hidden states of a compute and of a reuse."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def keep(
    slot: Slot, keeping: Keeping, code: Op, states: torch.Tensor | TensorForm | None, output: Any, step: int,
    rows: BatchView,
) -> None:  # fmt: skip
    """Store a computed output with the shape, dtype and device of its hidden states.

    Args:
        slot: The history of the site.
        keeping: What the history has to hold.
        code: The code of the site. `STORE_CLONE` stores a copy.
        states: The hidden states of the call, or their form, or None.
        output: The computed output.
        step: The step of the call.
        rows: The rows of the batch that were computed.
    """
    if states is None:
        slot.shape = slot.dtype = slot.device = None
    else:
        slot.shape, slot.dtype, slot.device = states.shape, states.dtype, states.device
    push(slot, keeping, code, output, step, rows)


def push(slot: Slot, keeping: Keeping, code: Op, output: Any, step: int, rows: BatchView) -> None:
    """Store `output` as the newest entry of the history. Arguments as for `keep`."""
    if keeping.outputs > 1 and not slot.clones and slot.output is not None and overwritten(slot):
        spoil(slot)
    if keeping.outputs > 1 and slot.output is not None:
        counted = slot.versions if slot.version is None else (slot.version,)
        slot.older = [Kept(slot.output, slot.step, slot.rows, counted), *slot.older][: keeping.outputs - 1]
    slot.step, slot.rows = step, rows
    if slot.storing is not ANYHOW:
        # Release the replaced output first, so that its memory can be used.
        slot.output, slot.version, slot.versions = None, None, None
        if not slot.storing.admits(output, copied=slot.clones or code is STORE_CLONE):
            slot.clear()
            return
    if slot.packing is not None:
        slot.output, slot.version, slot.versions = packed(slot.packing, output), None, None
        return
    clone = slot.clones or code is STORE_CLONE
    slot.output = kept = cloned(output) if clone else map_tensors(_detached, output)
    if not clone and not torch.compiler.is_compiling():
        slot.whole = is_whole(leaves(kept))
        if not slot.whole:
            slot.output = kept = map_tensors(compact, kept)
    slot.version = slot.versions = None
    # Graphs have no `_version` counters. There, the graph owns its outputs.
    if not clone and not torch.compiler.is_compiling():
        if type(kept) is torch.Tensor and not kept.is_inference():
            slot.version = kept._version
        else:
            slot.versions = versions(kept)
            slot.flat = counters(kept) is not None


def reused(slot: Slot, rows: BatchView, *, inference: bool) -> Any:
    """Return the newest stored output, as a copy if the caller must not share it.

    Args:
        slot: The history of the site.
        rows: The rows of the batch that the call runs.
        inference: Whether the call runs in inference mode.
    """
    output = rows.cut(slot.output if slot.packing is None else opened(slot.output), slot.rows)
    if slot.packing is not None:
        return output
    if slot.clones or inference or (slot.version is None and slot.versions is None and _of_inference(output)):
        return cloned(output)
    return rebuilt_containers(output)


def mean_of_halves(slot: Slot, rows: BatchView) -> Any:
    """Return the mean of both halves of the newest output, once for each half that the call runs (T-GATE)."""
    stored = slot.output if slot.packing is None else opened(slot.output)

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        first, second = tensor.chunk(2, dim=0)
        value = (first + second) / 2
        return value if rows.half is not None else torch.cat([value, value])

    return map_tensors(mean, stored)


def _of_inference(output: Any) -> bool:
    """Return True if the output has inference tensors, which must be copied for use outside inference mode."""
    return not torch.compiler.is_compiling() and any(tensor.is_inference() for tensor in leaves(output))


def rebuilt_containers(value: Any) -> Any:
    """Return `value` with new lists and output objects, which callers may modify. Tensors and tuples are shared."""
    return value if isinstance(value, torch.Tensor | tuple) else map_tensors(lambda tensor: tensor, value)  # pyright: ignore[reportUnknownVariableType]


def filled(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Return `value` with its tensors replaced by `tensors`, in order."""
    rest = list(tensors)
    return map_tensors(lambda _: rest.pop(0), value)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply `function` to each tensor in tuples, lists, dicts and output objects."""
    return map_leaves(function, value, torch.Tensor)


def cloned(value: Any) -> Any:
    """Clone all tensors in `value`. A tensor that occurs twice is cloned once."""
    return map_once(lambda tensor: tensor.detach().clone(), value, torch.Tensor)


def counters(value: Any) -> tuple[int, ...] | None:
    """Return the `_version` counters of a tuple of plain tensors without gradients, else None."""
    if type(value) is not tuple:
        return None
    counts = list[int]()
    for tensor in value:  # pyright: ignore[reportUnknownVariableType]
        if type(tensor) is not torch.Tensor or tensor.requires_grad or tensor.is_inference():  # pyright: ignore[reportUnknownArgumentType]
            return None
        counts.append(tensor._version)
    return tuple(counts)


def versions(value: Any) -> tuple[int, ...]:
    """Return the `_version` counters of all tensors. Inference tensors have none and count as 0."""
    return tuple([0 if tensor.is_inference() else tensor._version for tensor in _tensors(value)])


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    """Return all tensors in `value`, with a fast path for a tensor and a tuple of tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) is tuple and all([isinstance(item, torch.Tensor) for item in value]):  # pyright: ignore[reportUnknownVariableType]
        return value  # pyright: ignore[reportUnknownVariableType]
    return leaves(value)
