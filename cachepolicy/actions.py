"""What each action does with a history: the tensor side of `skip`, `reuse` and `reuse residual`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy import ir
from cachepolicy.diagnostics import PolicyError

COMPUTE = "compute"
STORE = "store"
STORE_CLONE = "store a clone"
REUSE = "reuse"
REUSE_CLONE = "reuse a clone"
RESIDUAL = "reuse residual"
SKIP = "skip"
ANSWERS = frozenset({REUSE, REUSE_CLONE, RESIDUAL, SKIP})


class Slot:
    """What one site keeps on one branch: its last output, its last residual, and what they were computed from.

    `shape`, `dtype` and `device` are those of the hidden states that went in; an answer is given only to a call with
    the same ones. `version` is the output's write counter when it was kept, where it is one tensor that may be handed
    out as it is; `versions` are those of its tensors elsewhere. `clones` is set once somebody wrote into an answer.
    """

    __slots__ = ("clones", "device", "dtype", "output", "residual", "shape", "streams", "version", "versions")

    def __init__(self) -> None:
        self.output: Any = None
        self.residual: tuple[torch.Tensor, ...] | None = None
        self.streams: Streams | None = None
        self.shape: Any = None
        self.dtype: Any = None
        self.device: Any = None
        self.version: int | None = None
        self.versions: tuple[int, ...] | None = None
        self.clones = False


@dataclass(frozen=True, slots=True)
class Streams:
    """How a module's outputs continue its inputs: for each output tensor the position or name of its input."""

    inputs: tuple[int | str, ...]
    single: bool


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a site has to keep for the actions of its rules."""

    output: bool
    residual: bool
    streams: bool


def keeping(actions: list[ir.Action]) -> Keeping:
    """What the actions of a site's rules read from its history."""
    output = any(isinstance(action, ir.Reuse) and not action.residual for action in actions)
    residual = any(isinstance(action, ir.Reuse) and action.residual for action in actions)
    skip = any(isinstance(action, ir.Skip) for action in actions)
    return Keeping(output, residual, residual or skip)


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that a module works on: its first positional one, else `hidden_states`, else its first keyword one."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    named = kwargs.get("hidden_states")
    if isinstance(named, torch.Tensor):
        return named
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None


def fits(slot: Slot, states: torch.Tensor | None) -> bool:
    """True where the kept history was computed from hidden states like these."""
    if states is None:
        return slot.shape is None
    return states.shape == slot.shape and states.dtype is slot.dtype and states.device == slot.device


def unfit(slot: Slot, code: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the slot cannot answer this call; None where it can."""
    kept = slot.streams if code == SKIP else slot.residual if code == RESIDUAL else slot.output
    if kept is None:
        return "nothing is kept yet"
    if code != SKIP and not fits(slot, hidden_states(args, kwargs)):
        return "the history does not fit this call"
    if code == REUSE and _overwritten(slot):
        # From now on this site keeps and gives copies: somebody downstream writes into what it returns.
        slot.clones = True
        return "the history was overwritten in place"
    return None


def _overwritten(slot: Slot) -> bool:
    if slot.version is not None:
        return slot.output._version != slot.version
    return slot.versions is not None and versions(slot.output) != slot.versions


def keep(
    slot: Slot, what: Keeping, code: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str
) -> None:
    """Put a computed output into the slot.

    Raises:
        PolicyError: a residual is wanted and it is not clear which output continues which input.
    """
    states = hidden_states(args, kwargs)
    if states is None:
        slot.shape = slot.dtype = slot.device = None
    else:
        slot.shape, slot.dtype, slot.device = states.shape, states.dtype, states.device
    if what.streams:
        if slot.streams is None:
            slot.streams = streams_of(args, kwargs, output, name)
        if what.residual:
            befores = _befores(slot.streams, args, kwargs)
            slot.residual = tuple((a - b).detach() for a, b in zip(_flat(output), befores, strict=True))
    if not what.output:
        return
    clone = slot.clones or code == STORE_CLONE
    slot.output = kept = cloned(output) if clone else map_tensors(_detached, output)
    # Inside a graph there are no write counters; there the graph itself owns its outputs.
    slot.version, slot.versions = None, None if torch.compiler.is_compiling() else versions(kept)


def answer(slot: Slot, code: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The site's answer from its history, in the structure of its output."""
    if code == REUSE and not slot.clones:
        output = slot.output
        # A list or an output object may be changed by who receives it; tensors and tuples of them may be shared.
        return output if isinstance(output, torch.Tensor | tuple) else map_tensors(_itself, output)
    if code in (REUSE, REUSE_CLONE):
        return cloned(slot.output)
    streams = slot.streams
    assert streams is not None  # noqa: S101 (the root answers only with slots that know their streams)
    befores = _befores(streams, args, kwargs)
    if code == SKIP:
        return befores[0] if streams.single else tuple(befores)
    sums = [before + kept for before, kept in zip(befores, slot.residual or (), strict=True)]
    return sums[0] if streams.single else tuple(sums)


def streams_of(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str) -> Streams:
    """Which output tensor continues which input tensor, told by their shapes.

    Raises:
        PolicyError: an output has the shape of no input, or of more than one.
    """
    inputs: dict[int | str, torch.Tensor] = {
        key: value for key, value in (*enumerate(args), *kwargs.items()) if isinstance(value, torch.Tensor)
    }
    found = list[int | str]()
    outputs = _flat(output)
    for tensor in outputs:
        same = [key for key, value in inputs.items() if value.shape == tensor.shape and key not in found]
        if isinstance(output, torch.Tensor):
            same = same[:1]  # a module with one output continues its first input of that shape
        if len(same) != 1:
            problem = "no input" if not same else "more than one input"
            raise PolicyError.of(
                "E310",
                f"an output of `{name}` has the shape of {problem}, so its residual is not defined",
                help="`reuse` keeps the output itself and needs no input",
            )
        found.append(same[0])
    return Streams(tuple(found), isinstance(output, torch.Tensor))


def _befores(streams: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [args[key] if isinstance(key, int) else kwargs[key] for key in streams.inputs]


def _flat(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [each for each in output if isinstance(each, torch.Tensor)]


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with `function` applied to each tensor in its tuples, lists, dicts and output objects."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[map_tensors(function, each) for each in value])  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(function, each) for each in value])  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(value, dict):
        items = {key: map_tensors(function, each) for key, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
        return items if type(value) is dict else type(value)(**items)  # pyright: ignore[reportUnknownArgumentType]
    return value


def cloned(value: Any) -> Any:
    """`value` with copies of its tensors; one that stands twice in it stays one."""
    done: dict[int, torch.Tensor] = {}

    def once(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = tensor.detach().clone()
        return done[id(tensor)]

    return map_tensors(once, value)


def versions(value: Any) -> tuple[int, ...]:
    """The write counters of all tensors in `value`; an inference tensor has none and counts as 0."""
    if isinstance(value, torch.Tensor):
        return (0,) if value.is_inference() else (value._version,)  # pyright: ignore[reportPrivateUsage]
    found = list[int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(0 if tensor.is_inference() else tensor._version)
        return tensor

    map_tensors(note, value)
    return tuple(found)
