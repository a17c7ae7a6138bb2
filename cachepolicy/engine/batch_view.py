"""The rows of a guidance batch that a call runs, or that a stored result has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.engine.history_packing import map_leaves


@dataclass(frozen=True, slots=True, eq=False)
class BatchView:
    """All rows of a batch, or one half of a guidance batch.

    Attributes:
        half: The index of the half, 0 or 1. None stands for all rows.
    """

    half: int | None = None

    def serves(self, call: BatchView) -> bool:
        """Return True if a result with these rows can answer a call that runs the rows `call`."""
        return self.half is None or call.half is not None

    def cut(self, value: Any, stored: BatchView) -> Any:
        """Return the rows of this call from an output that was stored with the rows `stored`."""
        half = self.half
        if half is None or stored.half is not None:
            return value
        return map_leaves(lambda tensor: tensor.chunk(2, dim=0)[half], value, torch.Tensor)

    def shape(self, shape: torch.Size, stored: BatchView) -> torch.Size:
        """Return the shape that a tensor stored with the rows `stored` has in this call."""
        if self.half is None or stored.half is not None or not shape:
            return shape
        return torch.Size((shape[0] // 2, *shape[1:]))


WHOLE = BatchView()
"""All rows."""

HALVES = (BatchView(0), BatchView(1))
"""The halves of a guidance batch, by index."""
