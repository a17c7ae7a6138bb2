"""Memory of a run: the bytes that its sessions hold, and a limit on them. This module does not use torch.

A session asks before it stores something. Over the limit, it releases its own items that save the least work per byte.
It does not touch items of other sessions, so no session waits for another. If a session is refused although it holds
less than its fair share, the other sessions shrink to theirs at their next call.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cachepolicy.errors import counted
from cachepolicy.planning.cost_model import format_bytes
from cachepolicy.planning.facts import Fact

_numbers = itertools.count()
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", re.IGNORECASE)


def bytes_of(text: str) -> int | None:
    """Return the bytes of a size such as `512MiB` or `2GB`, or None if the text is no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower() or " ")
    if binary and not power:
        return None
    return int(float(number) * (1024 if binary else 1000) ** power)


class Lease:
    """Permission of a session to store one item, such as the history of a site. It ends with the object.

    Args:
        account: The account of the session.
        drop: Releases the item when the session gives it up.
    """

    __slots__ = ("__weakref__", "_account", "_drop", "number", "refused", "worth")

    def __init__(self, account: Account, drop: Callable[[], None] | None = None) -> None:
        self._account = account
        self._drop = drop
        self.number = next(_numbers)
        self.worth = math.inf
        self.refused = False

    def admits(self, size: int, saving: float = math.inf) -> bool:
        """Return whether the item may take `size` bytes from now on.

        The new size replaces the old one. If it is refused, the lease holds nothing.

        Args:
            size: Bytes.
            saving: The work that the item saves.
        """
        self.worth = saving / size if size else math.inf
        self.refused = not self._account.admits(self, size)
        return not self.refused

    def shrink(self, size: int) -> None:
        """Reduce the size of the item to at most `size` bytes."""
        self._account.shrink(self, size)

    def give_up(self) -> None:
        """Release the item in favour of more valuable ones."""
        self.refused = True
        if self._drop is not None:
            self._drop()


@dataclass(slots=True)
class _Held:
    lease: weakref.ref[Lease]
    size: int


class Account:
    """The bytes of one session, by lease."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.waits = False
        self._held: dict[int, _Held] = {}
        budget.join(self)

    @property
    def held(self) -> int:
        """Bytes that the session holds."""
        # Iterate over a copy: the callback of a dying lease may change the dict.
        return sum(held.size for held in list(self._held.values()))

    def admits(self, lease: Lease, size: int) -> bool:
        """Make room for a lease by releasing less valuable ones. Return False if these do not suffice."""
        with self.budget.lock:
            self._held.pop(lease.number, None)
            room, fair = self.budget.room(self)
            needed = self.held + size - room
            if needed > 0:
                worse = [pair for pair in self._by_worth() if pair[0].worth < lease.worth]
                if needed > sum(size for _, size in worse):
                    self.waits = self.held + size <= fair
                    return False
                self._give_up(worse, needed)
            # The callback frees the bytes when the lease dies. It refers to the dict only, so it does not keep the
            # account alive.
            number, held = lease.number, self._held
            held[number] = _Held(weakref.ref(lease, lambda _: held.pop(number, None)), size)
            return True

    def shrink(self, lease: Lease, size: int) -> None:
        """Reduce the size of a lease."""
        with self.budget.lock:
            held = self._held.get(lease.number)
            if held is not None and size:
                held.size = min(size, held.size)
            elif held is not None:
                del self._held[lease.number]

    def give_way(self) -> None:
        """Shrink to the fair share if another session waits for its own."""
        self.waits = False
        with self.budget.lock:
            room, _ = self.budget.room(self)
            self._give_up(
                [(lease, size) for lease, size in self._by_worth() if lease.worth < math.inf], self.held - room
            )

    def _by_worth(self) -> list[tuple[Lease, int]]:
        """Return the live leases and sizes, least valuable first, newest first among equals."""
        leases = [(held.lease(), held.size) for held in list(self._held.values())]
        alive = [(lease, size) for lease, size in leases if lease is not None]
        return sorted(alive, key=lambda pair: (pair[0].worth, -pair[0].number))

    def _give_up(self, leases: list[tuple[Lease, int]], needed: int) -> None:
        for lease, size in leases:
            if needed <= 0:
                return
            lease.give_up()
            self._held.pop(lease.number, None)
            needed -= size


class Budget:
    """The memory limit and the accounts that share it. An account ends with its session."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Reentrant: `Account.admits` holds the lock while `room` acquires it again.
        self.lock = threading.RLock()
        self._accounts: weakref.WeakSet[Account] = weakref.WeakSet()

    def join(self, account: Account) -> None:
        """Add the account of a new session."""
        with self.lock:
            self._accounts.add(account)

    @property
    def held(self) -> int:
        """Bytes that all sessions hold."""
        with self.lock:
            return sum(account.held for account in self._others(None))

    def room(self, account: Account) -> tuple[int, int]:
        """Return the bytes that an account may hold, and its fair share."""
        others = list(self._others(account))
        fair = self.limit // (1 + sum(1 for other in others if other.waits or other.held))
        room = self.limit - sum(other.held for other in others)
        return (min(room, fair) if any(other.waits for other in others) else room), fair

    def _others(self, account: Any) -> Iterator[Account]:
        with self.lock:
            return iter([other for other in self._accounts if other is not account])


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Bytes of history.

    Attributes:
        held: Bytes that all sessions hold now.
        most: The most bytes that one session has held after a call.
        limit: The memory limit in bytes, or None.
        refused: Names of sites that compute in some session because of the limit.
        continued: How often a session went on after `max_sessions` had ended it in mid-trajectory.
        max_sessions: The number of sessions that hold history at a time, or None if unknown.
    """

    held: int
    most: int
    limit: int | None = None
    refused: tuple[str, ...] = ()
    continued: int = 0
    max_sessions: int | None = None

    def __str__(self) -> str:
        of = "" if self.limit is None else f" of {format_bytes(self.limit)}"
        lines = [f"{format_bytes(self.held)}{of} held, {format_bytes(self.most)} by one session at most"]
        if self.refused:
            first, *others = self.refused
            more = f" and {len(others)} more" if others else ""
            lines.append(f"{Fact.OVER_LIMIT}: {first}{more}")
        if self.continued:
            times = counted(self.continued, "time")
            lines.append(f"max_sessions={self.max_sessions}: {times} a session went on without its histories")
        return "\n".join(lines)
