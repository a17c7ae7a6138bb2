"""Identifies the guidance branch of a root call, by `cache_context` name or by its conditioning tensors.

A history answers only calls of its own branch. Calls that cannot be identified compute. If several branches have the
same conditioning (tiles of one image), the nearest latents decide, if one branch is clearly the nearest.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cachepolicy.engine.conditioning import Conditioning, Path, SeenLatents

if TYPE_CHECKING:
    from cachepolicy.engine.step_context import Branch


class StateKey(NamedTuple):
    """Identity of a state of one root model in a session: the calls that share memories and histories.

    With the number of a site, it identifies one history.

    Attributes:
        branch: The guidance branch.
        rows: The group of rows of the batch. None is the whole call.
        repeat: The pass of one forward over the modules, 0 for the first.
    """

    branch: str
    rows: Hashable = None
    repeat: int = 0

    def of(self, branch: str) -> StateKey:
        """Return the key of the same rows and pass on another branch."""
        return StateKey(branch, self.rows, self.repeat)


FAR = 1.0
"""Largest distance of two stages of one step. Different tiles, or the noise of different images, are farther apart."""
_CLEARLY = 0.5
"""The nearest tile must be nearer than this multiple of the second distance."""
_IN_TURN = 0.95
"""The same for the tile that is next in order."""


@dataclass(slots=True)
class Known:
    """A branch at its last call: what identifies it, the parts that change, and its state.

    Attributes:
        key: The identity of the state.
        name: The name that the caller gave, or None.
        signature: The signature of the arguments.
        number: The number of the step.
        state: The memories and histories. None before the branch has any.
        changing: The parts of the conditioning that change at each step.
        count: The number of calls.
        restless: Whether the call was assigned to the branch although its conditioning differs.
        doubtful: Whether the call may belong to another branch, so that no history is used.
        stale: Whether the signature has changed, so that no history applies.
    """

    key: StateKey
    name: str | None
    conditioning: Conditioning
    latents: SeenLatents
    signature: Any
    number: int
    state: Branch | None = None
    changing: frozenset[Path] = frozenset()
    count: int = 1
    restless: bool = False
    doubtful: bool = False
    stale: bool = False

    @property
    def lasts(self) -> bool:
        """False if every part is a number that changes, so that none identifies the branch."""
        return not self.changing or bool(self.conditioning.parts.keys() - self.changing)


@dataclass(slots=True)
class BranchMatch:
    """The branch of a call. If `doubtful`, its history is not used.

    `revives` is a branch: its state from before a doubtful call of this step belongs to this branch.
    """

    key: StateKey
    doubtful: bool = False
    revives: StateKey | None = None


@dataclass(slots=True)
class Calls:
    """The calls of one root model in a session: the branches of the current step, and all known branches.

    Attributes:
        number: The number of the current step.
        trajectory: The number of the trajectory.
        raw: The timestep argument of the first call of the current step.
        context: The entry of a `cache_context` that the last call was in, or None.
        present: Branches that were called in the current step.
        known: All known branches.
        doubted: Branches as they were before a doubtful call of the current step.
    """

    number: int = -1
    trajectory: int = -1
    raw: Any = None
    context: object = None
    present: list[StateKey] = field(default_factory=list[StateKey])
    known: dict[StateKey, Known] = field(default_factory=dict[StateKey, Known])
    doubted: dict[StateKey, Known] = field(default_factory=dict[StateKey, Known])

    def copy(self) -> Calls:
        """Return a copy that later calls do not change."""
        return replace(self, present=[*self.present], known={**self.known}, doubted={**self.doubted})

    def follow(self, number: int) -> None:
        """Set the number of the current step. A new number clears the state of the step."""
        if self.number != number:
            self.present.clear()
            self.doubted.clear()
            self.number = number

    def begin(self, trajectory: int) -> None:
        """Begin a trajectory without known branches."""
        self.trajectory = trajectory
        self.known.clear()

    def conditioning(self, named: Mapping[str, Any]) -> Conditioning:
        """Return the conditioning of a call: that of the last call of a branch, if the arguments are the same."""
        for known in self.known.values():
            if known.conditioning.is_of(named):
                return known.conditioning
        return Conditioning(named)

    def matching(self, name: str | None, conditioning: Conditioning) -> list[StateKey]:
        """Return the known branches that fit this call: by name, else by conditioning."""
        if name is not None:
            return [branch for branch, known in self.known.items() if known.name == name]
        if len(self.known) == 1:
            # One branch is the usual case, and this runs at each call.
            ((branch, known),) = self.known.items()
            if known.conditioning is conditioning and known.name is None and known.lasts:
                return [branch]
        unnamed = {branch: known for branch, known in self.known.items() if known.name is None and known.lasts}
        same = [branch for branch, known in unnamed.items() if conditioning.same(known.conditioning, known.changing)]
        return same or [
            branch for branch, known in unnamed.items() if conditioning.equal(known.conditioning, known.changing)
        ]

    def stage(self, matching: Sequence[StateKey], latents: SeenLatents) -> bool:
        """Return True if this call is another stage of the current step, as in second-order samplers.

        A stage repeats a call on nearby latents.
        """
        if any(branch not in self.present for branch in matching):
            return False
        distances = [latents.distance(self.known[branch].latents) for branch in matching]
        return any(distance is not None and (latents.few or distance <= FAR) for distance in distances)

    def assign(
        self, name: str | None, conditioning: Conditioning, latents: SeenLatents, signature: Any,
        matching: Sequence[StateKey],
    ) -> Known:  # fmt: skip
        """Assign the next call of the current step to a branch, and record it."""
        match = self._found(name, conditioning, latents, matching)
        key = match.key
        before = self.known.get(key) if match.revives is None else self.doubted.pop(match.revives)
        known = self.known[key] = Known(key, name, conditioning, latents, signature, self.number)
        known.doubtful = match.doubtful
        self.present.append(key)
        if before is None:
            return known
        known.state, known.count, known.stale = before.state, before.count + 1, before.signature != signature
        if match.revives is not None:
            # The doubtful call was the start of another branch, so neither branch has changed.
            other = self.known[match.revives]
            other.changing, other.count, other.restless = frozenset(), 1, False
            return known
        known.changing = before.changing
        if match.doubtful and key not in matching:
            self.doubted[key] = before
            if not conditioning.reshaped(before.conditioning):
                differing = conditioning.differing(before.conditioning)
                known.changing |= conditioning.counting(before.conditioning, differing)
                known.restless = bool(differing - known.changing)
        return known

    def _found(
        self, name: str | None, conditioning: Conditioning, latents: SeenLatents, matching: Sequence[StateKey]
    ) -> BranchMatch:
        if name is None:
            for branch, known in self.doubted.items():
                if conditioning.equal(known.conditioning):
                    return BranchMatch(self._new(name), revives=branch)
        if len(matching) == 1 and matching[0] not in self.present:
            return BranchMatch(matching[0])
        if len(matching) > 1:
            return self._sibling(name, conditioning, latents, matching)
        if name is None and not matching:
            waiting = [branch for branch in self.known if self._may_continue(branch, conditioning)]
            if waiting:
                return BranchMatch(waiting[0], doubtful=not self._alone(waiting[0], conditioning))
        return BranchMatch(self._new(name))

    def _may_continue(self, branch: StateKey, conditioning: Conditioning) -> bool:
        """Return True if a branch of the previous step may continue with this call despite other conditioning.

        After one call any part may be changing, later only parts that changed before. A batch may also lose a half. The
        history is not used in these cases, because the change may indicate another branch.
        """
        known = self.known[branch]
        if known.name is not None or known.number != self.number - 1 or branch in self.present:
            return False
        return known.count == 1 or known.restless or not known.lasts or conditioning.reshaped(known.conditioning)

    def _alone(self, branch: StateKey, conditioning: Conditioning) -> bool:
        """Return True if the conditioning is only a changing number, and there is only one branch."""
        known = self.known[branch]
        return len(self.known) == 1 and not known.lasts and conditioning.equal(known.conditioning, known.changing)

    def _sibling(
        self, name: str | None, conditioning: Conditioning, latents: SeenLatents, matching: Sequence[StateKey]
    ) -> BranchMatch:
        """Choose between branches with the same name or conditioning."""
        exact = [branch for branch in matching if conditioning.equal(self.known[branch].conditioning)]
        if name is None and len(exact) == 1:
            return BranchMatch(exact[0] if exact[0] not in self.present else self._new(name))
        distances = {branch: latents.distance(self.known[branch].latents) for branch in matching}
        near = sorted((distance, branch) for branch, distance in distances.items() if distance is not None)
        waiting = [branch for branch in matching if branch not in self.present]
        if len(near) == len(matching):
            (closest, branch), (second, _) = near[:2]
            clear = closest < _CLEARLY * second
            # The branch that is next in order needs a smaller margin.
            if branch in waiting and (clear or (branch == waiting[0] and closest < min(FAR, _IN_TURN * second))):
                return BranchMatch(branch)
            if clear:
                return BranchMatch(self._new(name))
        return BranchMatch(waiting[0], doubtful=True) if waiting else BranchMatch(self._new(name))

    def _new(self, name: str | None) -> StateKey:
        """Return an unused key. The first unnamed branch is "", others are numbered."""
        if name is not None:
            taken = sum(known.name == name for known in self.known.values())
            return StateKey(f"{name} {taken + 1}" if taken else name)
        number = len(self.known)
        while (key := StateKey(str(number) if number else "")) in self.known:
            number += 1
        return key
