"""What runs inside an intercepted call: the root publishes a frame, the sites look up and act."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from cachepolicy.actions import (
    ANSWERS,
    COMPUTE,
    REUSE,
    STORE,
    Keeping,
    Slot,
    answer,
    keep,
    unfit,
)
from cachepolicy.swap import ATTRIBUTE, Method


class Frame:
    """What the root decided for one call: for each site number a code and a slot. Sites read it and nothing else.

    `unfit` collects the sites whose history did not fit their call after all, so that they computed.
    """

    __slots__ = ("codes", "owner", "slots", "store", "unfit")

    def __init__(self, owner: object, codes: Sequence[str], slots: Sequence[Slot], store: str) -> None:
        self.owner = owner
        self.codes = codes
        self.slots = slots
        self.store = store
        self.unfit: list[tuple[int, str]] = []


class _Local(threading.local):
    frame: Frame | None = None


LOCAL = _Local()
"""The frame of the root call that this thread is in. Dynamo traces a `threading.local`, not a ContextVar."""


class Site:
    """What an intercepted module knows: whose site it is, its number there, and what it has to keep."""

    __slots__ = ("index", "keeping", "name", "owner", "plain")

    def __init__(self, owner: object, index: int, name: str, keeping: Keeping) -> None:
        self.owner = owner
        self.index = index
        self.name = name
        self.keeping = keeping
        self.plain = not keeping.streams


def site_override(original: Method) -> Method:
    """`__call__` of a site: answer from the slot, or compute and keep, as the frame says."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        frame = LOCAL.frame
        site = self.__dict__.get(ATTRIBUTE)
        if frame is None or site is None or frame.owner is not site.owner:
            return original(self, *args, **kwargs)
        index = site.index
        code = frame.codes[index]
        slot = frame.slots[index]
        if code is REUSE and slot.version is not None:
            # The usual hit, written out: one tensor, kept from hidden states like these, that nobody wrote into.
            kept = slot.output
            states = args[0] if args else kwargs.get("hidden_states")
            if (
                type(states) is torch.Tensor
                and states.shape == slot.shape
                and kept._version == slot.version
                and states.dtype is slot.dtype
                and states.device == slot.device
            ):
                return kept
        if code in ANSWERS:
            reason = unfit(slot, code, args, kwargs)
            if reason is None:
                return answer(slot, code, args, kwargs)
            frame.unfit.append((index, reason))
            code = frame.store
        output = original(self, *args, **kwargs)
        if code is COMPUTE:
            return output
        if code is STORE and site.plain and type(output) is torch.Tensor and not torch.compiler.is_compiling():
            # The usual miss, likewise.
            states = args[0] if args else kwargs.get("hidden_states")
            if type(states) is torch.Tensor and not output.requires_grad and not slot.clones:
                slot.output = output
                slot.version = output._version
                slot.shape = states.shape
                slot.dtype = states.dtype
                slot.device = states.device
                return output
        keep(slot, site.keeping, code, args, kwargs, output, site.name)
        return output

    return __call__


class Turn(Protocol):
    """One call of a root, between its decision and its end."""

    frame: Frame
    answered: bool
    output: Any


class RootHandle(Protocol):
    """What the root's override asks: `begin` decides (None: run bare), then `end` or `fail`."""

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Turn | None: ...
    def end(self, turn: Turn, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any: ...
    def fail(self, turn: Turn, error: BaseException) -> None: ...


@torch.compiler.disable
def _begin(handle: RootHandle, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Turn | None:
    return handle.begin(module, args, kwargs)


@torch.compiler.disable
def _end(handle: RootHandle, turn: Turn, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return handle.end(turn, args, kwargs, output)


@torch.compiler.disable
def _fail(handle: RootHandle, turn: Turn, error: BaseException) -> None:
    handle.fail(turn, error)


def root_override(original: Method) -> Method:
    """`__call__` of a root: decide in eager, publish the frame, run, take the frame back."""

    # Dynamo skips this frame and traces what it calls, so that the decision is never part of a graph.
    @torch.compiler.disable(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        handle = self.__dict__.get(ATTRIBUTE)
        turn = None if handle is None else _begin(handle, self, args, kwargs)
        if handle is None or turn is None:
            return original(self, *args, **kwargs)
        outer = LOCAL.frame
        LOCAL.frame = turn.frame
        try:
            output = turn.output if turn.answered else original(self, *args, **kwargs)
            return _end(handle, turn, args, kwargs, output)
        except BaseException as error:
            _fail(handle, turn, error)
            raise
        finally:
            LOCAL.frame = outer

    return __call__
