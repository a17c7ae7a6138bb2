"""Whether and how one site may store a result: its packing, and its share of the run's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.engine.history_packing import Packed, Packing, map_leaves, whole
from cachepolicy.engine.memory_budget import Account, Lease
from cachepolicy.planning.schedule import OVER_LIMIT

Saving = Callable[[Sequence[int]], float]
"""The work that a site's answers save over a trajectory, by the shape of its output."""


def _nothing(_shape: Sequence[int]) -> float:
    return 0.0


@dataclass(slots=True)
class Storing:
    """How a site's results are stored, and its share where the run has a limit: room for `depth` of them."""

    packing: Packing | None = None
    account: Account | None = None
    saving: Saving = _nothing
    depth: int = 1
    share: Lease | None = None

    def of_its_own(self, drop: Callable[[], None]) -> Storing:
        """The same for one site on one branch; `drop` lets go of its history."""
        if self.account is None:
            return self
        return Storing(self.packing, self.account, self.saving, self.depth, Lease(self.account, drop))

    @property
    def lacking(self) -> str:
        """Why a site has no history."""
        return OVER_LIMIT if self.share is not None and self.share.refused else "nothing is kept yet"

    def admits(self, newest: Any, *, copied: bool) -> bool:
        """Whether a result may be stored, and as many like it as the history is deep."""
        if self.share is None:
            return True
        tensors = flat(newest)
        size = self._size(tensors, copied=copied) * self.depth
        return self.share.admits(size, self.saving(tensors[0].shape) if tensors else 0.0)

    def emptied(self) -> None:
        """Nothing is held any more."""
        if self.share is not None:
            self.share.shrink(0)

    def _size(self, tensors: Sequence[torch.Tensor], *, copied: bool) -> int:
        """The bytes that tensors will take once they are stored."""
        if self.packing is not None:
            return sum(map(self.packing.size, tensors))
        if copied or not whole(tensors):
            return sum(each.nbytes for each in tensors)
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return sum(storages.values())


ANYHOW = Storing()
"""As it is, without a limit."""


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors in an output, or those that are stored for it; one that stands twice in it once."""
    found = dict[int, torch.Tensor]()

    def note(each: torch.Tensor | Packed) -> None:
        for tensor in each.tensors if isinstance(each, Packed) else (each,):
            found[id(tensor)] = tensor

    map_leaves(note, value, (torch.Tensor, Packed))
    return list(found.values())
