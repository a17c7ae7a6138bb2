"""Storage of one site's results: packing, and the lease under the memory limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.engine.history_packing import Packed, Packing, is_whole, leaves
from cachepolicy.engine.memory_budget import Account, Lease
from cachepolicy.planning.facts import Fact

Saving = Callable[[Sequence[int]], float]
"""Maps the shape of a site's output to the work that its answers save over a trajectory."""


def _nothing(_shape: Sequence[int]) -> float:
    return 0.0


@dataclass(slots=True)
class Storing:
    """Storage settings of a site.

    Attributes:
        packing: The stored dtype and device, or None for unchanged tensors.
        account: The account of the session, if there is a memory limit.
        saving: The work that the answers of the site save.
        depth: The number of results for which memory is reserved.
        share: The lease of one site on one branch.
    """

    packing: Packing | None = None
    account: Account | None = None
    saving: Saving = _nothing
    depth: int = 1
    share: Lease | None = None

    def of_its_own(self, drop: Callable[[], None]) -> Storing:
        """Return a copy with a lease for one site on one branch. `drop` releases its history."""
        if self.account is None:
            return self
        return Storing(self.packing, self.account, self.saving, self.depth, Lease(self.account, drop))

    @property
    def lacking(self) -> Fact:
        """Why the site has no history."""
        return Fact.OVER_LIMIT if self.share is not None and self.share.refused else Fact.NO_HISTORY

    def admits(self, newest: Any, *, copied: bool) -> bool:
        """Return whether a result, and `depth` of its size, may be stored.

        Args:
            newest: The result.
            copied: Whether the tensors are copied before they are stored.
        """
        if self.share is None:
            return True
        tensors = flat(newest)
        size = self._size(tensors, copied=copied) * self.depth
        return self.share.admits(size, self.saving(tensors[0].shape) if tensors else 0.0)

    def emptied(self) -> None:
        """Report that the history is empty."""
        if self.share is not None:
            self.share.shrink(0)

    def _size(self, tensors: Sequence[torch.Tensor], *, copied: bool) -> int:
        """Return the bytes that the tensors take when stored.

        A tensor that is stored without a copy keeps its whole storage alive, which may be larger than the tensor.
        """
        if self.packing is not None:
            return sum(map(self.packing.size, tensors))
        if copied or not is_whole(tensors):
            return sum(tensor.nbytes for tensor in tensors)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


ANYHOW = Storing()
"""Stores results unchanged, without a memory limit."""


def flat(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an output or in its stored form. A tensor that occurs twice is listed once."""
    parts = leaves(value, (torch.Tensor, Packed))
    tensors = [tensor for part in parts for tensor in (part.tensors if isinstance(part, Packed) else (part,))]
    return list({id(tensor): tensor for tensor in tensors}.values())
