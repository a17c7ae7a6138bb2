"""What a run holds at a time, against its limit."""

from __future__ import annotations

from dataclasses import dataclass

from cachepolicy.planning.forecast import size
from cachepolicy.planning.schedule import OVER_LIMIT


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of history: what all sessions hold now, the most that one has held after a call, and the limit.

    `refused` names the sites that compute in some session because the rest saves more for its bytes.
    """

    held: int
    most: int
    limit: int | None = None
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = "" if self.limit is None else f" of {size(self.limit)}"
        lines = [f"{size(self.held)}{of} held, {size(self.most)} by one session at most"]
        if self.refused:
            first, *others = self.refused
            more = f" and {len(others)} more" if others else ""
            lines.append(f"{OVER_LIMIT}: {first}{more}")
        return "\n".join(lines)
