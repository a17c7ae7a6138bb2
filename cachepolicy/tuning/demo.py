"""The demonstration: a policy on the emoji model, beside fewer steps and other solvers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachepolicy._resources import shipped
from cachepolicy.errors import counted
from cachepolicy.language import ir
from cachepolicy.reports.comparison import Reference, Row
from cachepolicy.tools.emoji import NAMES, load_pipeline
from cachepolicy.tools.sampling import Progress
from cachepolicy.tuning.compare import CONVERGED_STEPS, Comparison, Variant, compare
from cachepolicy.tuning.sampling import STEPS

AT_A_TIME = 4
"""Pictures in one call of the pipeline."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is drawn.

    Attributes:
        steps: The number of denoising steps.
        seed: The seed of the initial noise.
        pictures: The number of pictures, of different classes.
    """

    steps: int = 50
    seed: int = 0
    pictures: int = 12

    def calls(self) -> list[dict[str, Any]]:
        """Return calls of the emoji pipeline that draw the pictures, each with noise of its own."""
        numbers = range(self.pictures)
        groups = [numbers[first : first + AT_A_TIME] for first in range(0, self.pictures, AT_A_TIME)]
        return [
            {
                "class_labels": [7 * number % len(NAMES) for number in group],
                STEPS: self.steps,
                "generator": [torch.Generator().manual_seed(self.seed * 100_003 + number) for number in group],
            }
            for group in groups
        ]


def tuned_policy() -> Path:
    """Return the file of the policy that was tuned for the emoji model."""
    return Path(str(shipped("data"))) / "emoji-dit" / "tuned.cp"


def measure(
    policy: ir.Policy, name: str, settings: Mapping[str, Any], sampling: Sampling, progress: Progress | None = None
) -> Comparison:
    """Compare a policy with what costs as much, on the emoji model.

    Args:
        policy: The policy.
        name: The name of its row.
        settings: Params of the policy.
        sampling: What is drawn.
        progress: Called with the runs done, the runs in all, and what is sampled.

    Raises:
        PolicyError: The policy or a param is wrong, or no module of the model matches the policy.
    """
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)  # pyright: ignore[reportUnknownMemberType]
    # One thread: in a model this small, threads that wait for each other would take most of the measured time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare(
            pipe,
            sampling.calls(),
            {name: Variant(policy, settings)},
            converged=min(CONVERGED_STEPS, 8 * sampling.steps),
            shown=sampling.pictures,
            progress=progress,
        )
    finally:
        torch.set_num_threads(threads)


def at_its_cost(result: Comparison, name: str) -> list[Row]:
    """Return the runs of fewer steps of the pipeline's scheduler and of UniPC with as many model calls."""
    fewer = [row for row in result.rows if row.kind == "baseline" and " on the steps of " not in row.name]
    return [row for row in fewer if "DPM" not in row.solver and row.at_cost_of == name]


def verdict(result: Comparison, name: str) -> str:
    """Return what the table says of a policy, in sentences."""
    policy, lines = result[name], list[str]()
    references: tuple[Reference, ...] = ("uncached", "converged")
    for reference in references:
        others = [
            f"{_difference(policy, row, reference)} {row.name}"
            for row in at_its_cost(result, name)
            if policy.distance(reference) and row.distance(reference)
        ]
        if others:
            lines.append(f"Against the {reference} run, {name} is {' and '.join(others)}.")
    size = counted(len(policy.uncached.each) if policy.uncached else 0, "picture")
    lines.append(
        f"{name} computes {policy.cost:.0%} of the model; a whole call is {policy.call_speedup:.2f}x as fast and the "
        f"model's part {policy.model_speedup:.2f}x, measured on {size} on one thread."
    )
    return "\n".join(lines)


def _difference(policy: Row, other: Row, reference: Reference) -> str:
    one, two = policy.distance(reference), other.distance(reference)
    assert one is not None
    assert two is not None
    if one.mean == two.mean:
        return "as near as"
    difference = one.mean - two.mean
    return f"{abs(difference):.1f} dB {'nearer' if difference > 0 else 'farther'} than"
