"""Output of the `demo` command: a progress bar, a table of measurements, and a PNG file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from cachepolicy.cli._progress import progress_bar
from cachepolicy.cli.output import say, say_json, unwritable
from cachepolicy.engine.options import is_disabled
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.planning.tally import percent
from cachepolicy.tools.demo import Demo, Row, Sampling, Spread, measure, save


def show_demo(
    policy: ir.Policy,
    name: str,
    settings: Mapping[str, ir.Expression],
    sampling: Sampling,
    output: Path,
    *,
    as_json: bool,
) -> None:
    """Measures the policy, writes the pictures to `output` and prints the result. Progress goes to standard error.

    Raises:
        PolicyError: The policy does not fit the model, or the file cannot be written (E152).
    """
    if not output.parent.is_dir():
        raise PolicyError.of("E152", f"`{output}` cannot be written: there is no folder `{output.parent}`")
    if is_disabled():
        say("note: `CACHEPOLICY_DISABLE` is set, so the policy is not attached", error=True)
    with progress_bar("loading the model", "step") as progress:
        demo = measure(policy, settings, sampling, progress=progress)
    headings = (
        f"uncached, {counted(sampling.steps, 'step')}",
        f"{Path(name).name}, PSNR {_decibels(demo.policy.psnr)}",
    )
    try:
        save(demo, output, headings)
    except (OSError, ValueError) as error:
        raise unwritable(output, error) from error
    if as_json:
        say_json({**demo.to_json(), "output": str(output)})
    else:
        say(f"{demo_table(demo, name)}\nThe pictures are side by side in {output}.")


def demo_table(demo: Demo, name: str) -> str:
    """Returns the measurements as text. `name` is the name of the policy."""
    sampling, rows = demo.sampling, (demo.policy, demo.fewer_steps)
    names = [f"{name}, {counted(demo.policy.steps, 'step')}", f"no policy, {counted(demo.fewer_steps.steps, 'step')}"]
    width = max(map(len, names))
    size = f"{counted(sampling.pictures, 'picture')}, {counted(sampling.steps, 'step')}"
    bound = f"FLOPs alone would give {1 / demo.policy.flops:.2f}x." if demo.policy.flops else "No FLOPs are left."
    return "\n".join(
        [
            f"{size} uncached: {demo.seconds:.2f} s on one thread",
            "",
            f"{'':<{width}}  {'speed-up, wall':<19}  {'speed-up, CPU':<19}  FLOPs skipped  calls skipped  PSNR",
            *(f"{label:<{width}}  {_cells(row)}" for label, row in zip(names, rows, strict=True)),
            "",
            _verdict(demo.policy.wall),
            f"Speed-ups are medians of {counted(sampling.pairs, 'interleaved pair')} (least..most). {bound}",
            f"The policy's hash is {demo.digest[:12]}.",
        ]
    )


def _cells(row: Row) -> str:
    skipped = f"{percent(1 - row.flops, 1):>13}  {percent(1 - row.calls, 1):>13}"
    worst = f" (worst picture {_decibels(row.worst_psnr)})" if math.isfinite(row.psnr) else " (bitwise equal)"
    return f"{_ratio(row.wall):<19}  {_ratio(row.cpu):<19}  {skipped}  {_decibels(row.psnr)}{worst}"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f}x ({spread.least:.2f}..{spread.most:.2f})"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "infinite"


def _verdict(wall: Spread) -> str:
    """States whether the wall-clock times show a difference. A spread that includes 1 shows none."""
    if wall.least <= 1 <= wall.most:
        return "The wall-clock times show no difference from the uncached run: their spread includes 1."
    if wall.median < 1:
        return f"By wall clock, the policy is SLOWER than the uncached run: {wall.median:.2f}x."
    return f"By wall clock, the policy is faster than the uncached run: {wall.median:.2f}x."
