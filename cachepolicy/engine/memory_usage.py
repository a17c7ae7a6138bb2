"""The memory use of a run."""

from __future__ import annotations

from dataclasses import dataclass

from cachepolicy.planning.cost_model import format_bytes
from cachepolicy.planning.schedule import OVER_LIMIT


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Bytes of history.

    Attributes:
        held: Bytes that all sessions hold now.
        most: The most bytes that one session has held after a call.
        limit: The memory limit in bytes, or None.
        refused: Names of sites that compute in some session because of the limit.
    """

    held: int
    most: int
    limit: int | None = None
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = "" if self.limit is None else f" of {format_bytes(self.limit)}"
        lines = [f"{format_bytes(self.held)}{of} held, {format_bytes(self.most)} by one session at most"]
        if self.refused:
            first, *others = self.refused
            more = f" and {len(others)} more" if others else ""
            lines.append(f"{OVER_LIMIT}: {first}{more}")
        return "\n".join(lines)
