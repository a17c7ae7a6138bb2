"""What every search for a policy returns: the policy and its text."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.language.ir import Policy
from cachepolicy.reports.html.comparison import Summary
from cachepolicy.tuning.compare import Comparison


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


@dataclass(frozen=True, slots=True)
class MeasuredPolicy(FoundPolicy):
    """A policy that was found by sampling and measured on held-out calls.

    Args:
        settings: Values of its params.
        compared: Compares variants on the held-out calls, as `cachepolicy.compare` does.
    """

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any], kw_only=True)
    compared: Callable[..., Comparison] = field(repr=False, compare=False, kw_only=True)

    def report(self, path: str | os.PathLike[str], **options: Any) -> Comparison:
        """Sample the held-out calls beside what costs as much, and write all evidence as one HTML file.

        The pipeline has to be as it was when it was tuned, without a policy.

        Args:
            path: Where to write.
            options: Further arguments of `cachepolicy.compare`, such as `metrics` and `progress`.

        Returns:
            The comparison of the policy with fewer steps and other solvers.

        Raises:
            OSError: The file cannot be written.
            PolicyError: A call fails (E213).
        """
        comparison = self.compared({"tuned": self}, **options)
        comparison.report(path, title="A tuned policy", summary=self._summary())
        return comparison

    def _summary(self) -> Summary | None:
        """Return what stands above the comparison in the report."""
        return None
