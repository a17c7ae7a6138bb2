"""Memory of histories: releases what nothing reads later, and counts the stored bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from cachepolicy.engine.actions import Slot
from cachepolicy.engine.history_storage import flat
from cachepolicy.engine.signals import Remembered
from cachepolicy.engine.streams import Stream
from cachepolicy.planning.possible_decisions import Reads


def trim(slot: Slot, reads: Reads) -> None:
    """Release everything that later steps do not read.

    Args:
        slot: The history of one site.
        reads: What later steps may read.
    """
    if not reads:
        slot.clear()
        slot.storing.emptied()
        return
    if slot.chain is not None:
        # The links stay: they hold no tensors, and `skip` needs only them.
        for entries in slot.chain.history:
            del entries[reads.depth :]
            for age, entry in enumerate(entries):
                if age >= reads.residuals:
                    entry.residuals = (None,) * len(entry.residuals)
                if age >= reads.outputs:
                    entry.outputs = (None,) * len(entry.outputs)
    if not reads.outputs:
        slot.output, slot.older, slot.version, slot.versions = None, [], None, None
    elif slot.older:
        slot.older = slot.older[: reads.outputs - 1]


# --- bytes -----------------------------------------------------------------------------------------------


def held(slots: Iterable[Slot], remembered: Remembered) -> int:
    """Return the bytes of all storages that histories and remembered signals keep alive."""
    return storage_bytes(_tensors(slots, remembered))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind these tensors. Shared storages count once."""
    sizes = dict[int, int]()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return sum(sizes.values())


def _tensors(slots: Iterable[Slot], remembered: Remembered) -> Iterator[torch.Tensor]:
    for slot in slots:
        if slot.output is not None:
            yield from flat(slot.output)
            for kept in slot.older:
                yield from flat(kept.output)
        if slot.chain is not None:
            for entry in (entry for entries in slot.chain.history for entry in entries):
                yield from flat((entry.residuals, entry.outputs))
    for value in remembered.previous.values():
        yield from _streamed(value)
    for values in remembered.kept.values():
        for value in values:
            yield from _streamed(value)
    for _, values in remembered.crossed:
        for value in values.values():
            yield from _streamed(value)


def _streamed(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, Stream):
        yield value.held
