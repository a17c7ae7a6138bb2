"""Common decisions of several processes: one message of fixed length each, summed by one all-reduce.

Every process takes part in every decision. If one has no share of a norm, the norm is undefined for all, and all
compute. A message also identifies its decision, so that processes that run different calls detect it instead of mixing
their numbers. A process whose call has failed reports this in the next decision.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from cachepolicy.engine.distributed.groups import Peers
from cachepolicy.engine.distributed.norms import MESSAGE_WIDTH, Share, dtype_of, norm_of, numbers_of
from cachepolicy.errors import PolicyError

Wanted = tuple[str, Share | None]
"""The function of a norm, and this process' share of it, or None if it is undefined here."""

# Offsets in a message. Pairs hold a number and its square: the sum of squares distinguishes equal numbers from
# different numbers with the same sum.
_HERE, _SUBJECT, _ORDER, _TRAJECTORY, _REFUSED, _CULPRIT, _FAILED = 0, 1, 3, 5, 7, 8, 9
_SLOTS = 32
"""The number of concurrent trajectories that failure reports can distinguish."""
_NORMS = _FAILED + _SLOTS
_DEFINED, _ROWS, _CODE, _HEAD = 0, 1, 3, 5
LENGTH = 256
MOST_NORMS = (LENGTH - _NORMS) // (_HEAD + MESSAGE_WIDTH)
"""The number of single-sample norms that fit in one message."""
_BITS = 2**20  # sums of squares below this bound over thousands of processes are exact in float64


@dataclass(frozen=True, slots=True)
class Settled:
    """Result of a decision: the norms (NaN if undefined), and how many processes cannot reuse."""

    norms: list[float]
    refused: int


class Agreement:
    """The decisions of one trajectory. All processes make them in the same order."""

    __slots__ = ("_closed", "_number", "_order", "_peers", "_policy")

    def __init__(self, peers: Peers, policy: str) -> None:
        peers.number = (peers.number + 1) % _BITS
        peers.gone.discard(peers.number % _SLOTS)
        self._peers = peers
        self._policy = policy
        self._number = peers.number
        self._order = 0
        self._closed = False

    def settle(self, subject: str, wanted: Sequence[Wanted], *, past: str = "", refuses: bool = False) -> Settled:
        """Compute norms from the shares of all processes.

        Args:
            subject: The subject of the decision, equal on all processes. Errors name it.
            wanted: The norms, and the shares of this process.
            past: All other inputs of the decision, equal on all processes.
            refuses: Whether this process cannot reuse.

        Raises:
            PolicyError: Another process has failed (E350), makes another decision (E351), or does not answer (E352).
        """
        norms = list[float]()
        refused = 0
        for start in range(0, max(1, len(wanted)), MOST_NORMS):
            part = wanted[start : start + MOST_NORMS]
            about = f"{self._policy} {subject} {past} {start} of {len(wanted)}"
            settled = self._settle(subject, about, part, refuses=refuses)
            norms += settled.norms
            refused = settled.refused
        return Settled(norms, refused)

    def abandon(self) -> None:
        """Report the failure of this process, unless the last decision has shown it to all."""
        if self._closed:
            return
        self._closed = True
        message = [0.0] * LENGTH
        message[_FAILED + self._number % _SLOTS] = 1.0
        message[_CULPRIT] = float(self._peers.rank)
        self._peers.post(message)

    def _settle(self, subject: str, about: str, wanted: Sequence[Wanted], *, refuses: bool) -> Settled:
        self._order = (self._order + 1) % _BITS
        room = (LENGTH - _NORMS) // max(1, len(wanted))
        shares = [share for _, share in wanted if share is not None]
        rest = iter(numbers_of(shares))
        numbers = [next(rest) if share is not None else [] for _, share in wanted]
        # crc32 is equal on all processes. `hash` of a string is not.
        message = self._message(zlib.crc32(about.encode()) % _BITS, refuses=refuses)
        for index, ((_, share), mine) in enumerate(zip(wanted, numbers, strict=True)):
            if share is not None:
                _write(message, _NORMS + index * room, share, mine, room)
        total = self._checked(self._added(message, subject), subject)
        heads = [total[_NORMS + index * room :][:room] for index in range(len(wanted))]
        rest = self._rest(heads, numbers, room, subject)
        norms = [self._norm(function, head, rest) for (function, _), head in zip(wanted, heads, strict=True)]
        return Settled(norms, int(total[_REFUSED]))

    def _message(self, about: int, *, refuses: bool) -> list[float]:
        message = [0.0] * LENGTH
        message[_HERE] = 1.0
        for offset, number in ((_SUBJECT, about), (_ORDER, self._order), (_TRAJECTORY, self._number)):
            message[offset : offset + 2] = number, number * number
        message[_REFUSED] = float(refuses)
        return message

    def _added(self, message: Sequence[float], subject: str) -> list[float]:
        """Sum the messages of all processes. Repeat when another trajectory has failed."""
        mine = self._number % _SLOTS
        while mine not in self._peers.gone:
            total = self._ask(message, subject)
            failed = [slot for slot in range(_SLOTS) if total[_FAILED + slot]]
            if not failed:
                return total
            self._peers.gone.update(failed)
            # Count trajectories that failed elsewhere before they began here, so that the numbers stay equal.
            ahead = [(slot - self._peers.number) % _SLOTS for slot in failed]
            self._peers.number += max((lead for lead in ahead if lead < _SLOTS // 2), default=0)
            if mine in failed:
                culprit = f"process {total[_CULPRIT]:g}" if sum(total[_FAILED:_NORMS]) == 1 else "several processes"
                raise self._over(
                    "E350", f"{culprit} failed before {subject} was decided", "look for the error there, and start anew"
                )
        raise self._over("E350", f"another process failed before {subject} was decided", "look for the error there")

    def _ask(self, message: Sequence[float], subject: str) -> list[float]:
        try:
            return self._peers.add(message, subject)
        except PolicyError:
            self._closed = True
            raise

    def _checked(self, total: list[float], subject: str) -> list[float]:
        """Return the sums, after a check that all processes make the same decision."""
        if all(self._same(total, offset, total[_HERE]) for offset in (_SUBJECT, _ORDER, _TRAJECTORY)):
            return total
        self._peers.number = int(total[_TRAJECTORY]) % _BITS  # equal on all processes, so that they can start again
        raise self._over(
            "E351",
            f"the processes {list(self._peers.ranks)} are not at the same decision; this one is at {subject}",
            "all of them have to run the same calls in the same order, with the same policy and settings",
        )

    def _same(self, total: Sequence[float], offset: int, processes: float) -> bool:
        return int(processes) * int(total[offset + 1]) == int(total[offset]) ** 2

    def _rest(
        self, heads: Sequence[Sequence[float]], numbers: Sequence[Sequence[float]], room: int, subject: str
    ) -> dict[int, list[float]]:
        """Send a second message with the numbers of norms that do not fit in the first."""
        known = [index for index, head in enumerate(heads) if self._everywhere(head)]
        long = [index for index in known if _HEAD + len(numbers[index]) > room]
        if not long:
            return {}
        total = iter(self._ask([number for index in long for number in numbers[index]], subject))
        return {id(heads[index]): [next(total) for _ in numbers[index]] for index in long}

    def _everywhere(self, head: Sequence[float]) -> bool:
        """Return True if every process has a share, with the same number of samples."""
        return head[_DEFINED] == len(self._peers.ranks) and self._same(head, _ROWS, head[_DEFINED])

    def _norm(self, function: str, head: Sequence[float], rest: dict[int, list[float]]) -> float:
        if not self._everywhere(head):
            return float("nan")
        processes = head[_DEFINED]
        rows = int(head[_ROWS] / processes)
        dtype = dtype_of(head[_CODE] / processes if self._same(head, _CODE, processes) else 0)
        return norm_of(function, rest.get(id(head)) or head[_HEAD : _HEAD + rows * MESSAGE_WIDTH], dtype)

    def _over(self, code: str, message: str, help: str) -> PolicyError:
        """Return the error. All processes have read the same sums, so no report is sent."""
        self._closed = True
        return PolicyError.of(code, message, help=help)


def _write(message: list[float], offset: int, share: Share, numbers: Sequence[float], room: int) -> None:
    """Write a share into a message, with its numbers only if they fit."""
    message[offset : offset + _HEAD] = 1.0, share.rows, share.rows**2, share.code, share.code**2
    if _HEAD + len(numbers) <= room:
        message[offset + _HEAD : offset + _HEAD + len(numbers)] = numbers
