"""Implementation of the `demo` command: a policy on the emoji model, beside fewer steps and another solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachepolicy._resources import shipped
from cachepolicy.cli._progress import progress_bar
from cachepolicy.cli.output import say, say_json, unwritable
from cachepolicy.engine.options import is_disabled
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.reports.comparison import Reference, Row
from cachepolicy.tools.emoji import NAMES, load_pipeline
from cachepolicy.tuning.compare import CONVERGED_STEPS, Comparison, Variant, compare

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
                "num_inference_steps": self.steps,
                "generator": [torch.Generator().manual_seed(self.seed * 100_003 + number) for number in group],
            }
            for group in groups
        ]


def tuned_policy() -> Path:
    """Return the file of the policy that was tuned for the emoji model."""
    return Path(str(shipped("data"))) / "emoji-dit" / "tuned.cp"


def show_demo(
    policy: ir.Policy,
    name: str,
    settings: Mapping[str, ir.Expression],
    sampling: Sampling,
    output: Path,
    *,
    as_json: bool,
) -> None:
    """Compare the policy, write the pictures and a page, and print the table. Progress goes to standard error.

    Raises:
        PolicyError: The policy does not fit the model, or a file cannot be written (E152).
    """
    if not output.parent.is_dir():
        raise PolicyError.of("E152", f"`{output}` cannot be written: there is no folder `{output.parent}`")
    if is_disabled():
        say("note: `CACHEPOLICY_DISABLE` is set, so the policy is not attached", error=True)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)  # pyright: ignore[reportUnknownMemberType]
    # One thread: in a model this small, threads that wait for each other would take most of the measured time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress_bar("sampling", "run") as progress:
            variants = {name: Variant(policy, settings)}
            converged = min(CONVERGED_STEPS, 8 * sampling.steps)
            result = compare(
                pipe, sampling.calls(), variants, converged=converged, shown=sampling.pictures, progress=progress
            )
    finally:
        torch.set_num_threads(threads)
    page = output.with_suffix(".html")
    baselines = _at_its_cost(result, name)
    try:
        result.sheet(["uncached", name, *(row.name for row in baselines)], scale=3).save(output)
        result.report(page, title=f"{name} on the emoji model")
    except (OSError, ValueError) as error:
        raise unwritable(output, error) from error
    if as_json:
        say_json({**result.to_dict(), "output": str(output), "report": str(page)})
    else:
        say(f"{result}\n\n{verdict(result, name)}\n\nThe pictures are in {output}, and all of it is in {page}.")


def _at_its_cost(result: Comparison, name: str) -> list[Row]:
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
            for row in _at_its_cost(result, name)
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
