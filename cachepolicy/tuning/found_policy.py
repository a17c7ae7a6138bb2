"""What every search for a policy returns: the policy and its text."""

from __future__ import annotations

from dataclasses import dataclass

from cachepolicy.language.ir import Policy


@dataclass(frozen=True, slots=True)
class FoundPolicy:
    """A policy that was found by sampling.

    Args:
        policy: The policy.
        text: Its text.
    """

    policy: Policy
    text: str

    def save(self, path: str) -> None:
        """Write the policy file.

        Args:
            path: Where to write.

        Raises:
            OSError: It cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.text)
