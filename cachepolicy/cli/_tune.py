"""Implementation of the commands `tune` and `calibrate`: they find policies for a pipeline from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachepolicy.cli import output
from cachepolicy.cli._progress import progress_bar
from cachepolicy.errors import PolicyError, counted
from cachepolicy.tuning.calibration import Calibration, calibrate
from cachepolicy.tuning.calls import Calls
from cachepolicy.tuning.tuner import SchedulePoint, Tuning, tune

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def show_tuning(
    pipe: Any, calls: Calls, target: Mapping[str, Any], *, out: Path, run_dir: str | None, as_json: bool
) -> None:
    """Tune, write the policy and print what was found. Progress goes to standard error.

    Args:
        pipe: The pipeline.
        calls: Its calls.
        target: Further arguments of `tune`: the target, order and gap.
        out: Where the policy is written.
        run_dir: The folder that keeps what was sampled.
        as_json: Print JSON.

    Raises:
        PolicyError: The calls cannot be tuned, or the policy cannot be written (E152).
    """
    _require_folder(out)
    pipe.set_progress_bar_config(disable=True)
    training, held_out = calls.split()
    try:
        with progress_bar("recording", "run") as progress:
            result = tune(pipe, training, held_out=held_out, run_dir=run_dir, progress=progress, **target)
    except KeyboardInterrupt:
        kept = f"`{run_dir}` has what was sampled; run the command again to go on"
        output.say(f"interrupted: {kept if run_dir else 'nothing was kept; `--run-dir DIR` keeps it'}", error=True)
        raise SystemExit(INTERRUPTED) from None
    _save(result, out)
    if as_json:
        output.say_json({**_to_json(result), "output": str(out)})
    else:
        output.say("\n".join(_lines(result, len(held_out), str(out))))


def show_calibration(pipe: Any, calls: Calls, method: Any, cost: float, *, out: Path, as_json: bool) -> None:
    """Calibrate a method, write the policy and print what was found. Progress goes to standard error.

    Raises:
        PolicyError: The model cannot be calibrated, or the policy cannot be written (E152).
    """
    _require_folder(out)
    pipe.set_progress_bar_config(disable=True)
    with progress_bar("recording", "run") as progress:
        found = calibrate(pipe, calls.split()[0], method, cost=cost, progress=progress)
    _save(found, out)
    if as_json:
        values = {"method": found.method, "threshold": found.threshold, "cost": found.cost}
        output.say_json({"policy": found.text, **values, "output": str(out)})
    else:
        output.say(f"{out}: {method} with a threshold of {found.threshold:g}")
        output.say(f"by the recording, {found.cost:.0%} of the steps are computed; `cachepolicy run` measures it")


def _require_folder(out: Path) -> None:
    """Raise before anything is sampled if the file to write has no folder (E152)."""
    if not out.parent.is_dir():
        raise PolicyError.of("E152", f"`{out}` cannot be written: there is no folder `{out.parent}`")


def _save(result: Tuning | Calibration, out: Path) -> None:
    try:
        result.save(str(out))
    except OSError as error:
        raise output.unwritable(out, error) from error


def _lines(result: Tuning, held_out: int, out: str) -> list[str]:
    chosen, calls = result.chosen, len(result.frontier[-1].steps)
    measured = f"PSNR {chosen.psnr:.1f} dB, 10th percentile {chosen.psnr_p10:.1f} dB" if chosen.psnr else "not measured"
    others = f"{counted(held_out, 'call')} that {'was' if held_out == 1 else 'were'}"
    lines = [
        f"{out}: {len(chosen.steps)} of {counted(calls, 'call')} computed, cost {chosen.cost:.3g}",
        f"{measured}, on {others} not recorded; forecast {chosen.forecast:.1f} dB",
        f"a call is {chosen.speedup:.2f}x as fast; the denoiser takes {result.model_share:.0%} of an uncached one",
        f"sampled as many calls of the model as {result.evaluations:.1f} uncached runs",
    ]
    if not result.linear:
        lines.append("note: the scheduler is not linear, so its weights hold near the recorded trajectories only")
    return lines


def _to_json(result: Tuning) -> dict[str, Any]:
    return {
        "policy": result.text,
        "chosen": _point(result.chosen),
        "frontier": [_point(point) for point in result.frontier],
        "model_share": result.model_share,
        "evaluations": result.evaluations,
        "linear": result.linear,
    }


def _point(point: SchedulePoint) -> dict[str, Any]:
    exact = len(point.steps) and point.forecast == float("inf")
    return {
        "steps": list(point.steps),
        "cost": point.cost,
        "forecast": None if exact else point.forecast,
        "psnr": point.psnr,
        "psnr_p10": point.psnr_p10,
        "speedup": point.speedup,
    }
