"""Implementation of the commands `tune` and `calibrate`: they find policies for a pipeline from a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from cachepolicy.cli import output
from cachepolicy.cli._progress import progress_bar
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language.ir import Policy
from cachepolicy.tools.sampling import Progress
from cachepolicy.tuning.calibration import Calibration, calibrate
from cachepolicy.tuning.calls import Calls
from cachepolicy.tuning.found_policy import FoundPolicy, MeasuredPolicy
from cachepolicy.tuning.levels import LevelTuning, tune_levels
from cachepolicy.tuning.threshold import ThresholdTuning, tune_threshold
from cachepolicy.tuning.tuner import SchedulePoint, Tuning, tune

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def show_tuning(
    pipe: Any,
    calls: Calls,
    target: Mapping[str, Any],
    *,
    out: Path,
    run_dir: str | None,
    as_json: bool,
    report: Path | None,
) -> None:
    """Tune, write the policy and print what was found. Progress goes to standard error.

    Args:
        pipe: The pipeline.
        calls: Its calls.
        target: Further arguments of `tune`: the target, order and gap.
        out: Where the policy is written.
        run_dir: The folder that keeps what was sampled.
        as_json: Print JSON.
        report: Where the report is written, None for none.

    Raises:
        PolicyError: The calls cannot be tuned, or a file cannot be written (E152).
    """
    training, held_out = calls.split()

    def search(progress: Progress) -> Tuning:
        return tune(pipe, training, held_out=held_out, run_dir=run_dir, progress=progress, **target)

    result = _found(pipe, search, out, run_dir)
    _report(result, report)
    if as_json:
        output.say_json({**_to_json(result), "output": str(out)})
    else:
        output.say("\n".join(_lines(result, len(held_out), str(out))))


def show_threshold(
    pipe: Any,
    calls: Calls,
    policy: Policy,
    further: Mapping[str, Any],
    *,
    out: Path,
    run_dir: str | None,
    as_json: bool,
    report: Path | None,
) -> None:
    """Tune the threshold of a policy, write it and print what was found. Progress goes to standard error.

    Args:
        pipe: The pipeline.
        calls: Its calls.
        policy: The policy.
        further: Further arguments of `tune_threshold`: the target and the param.
        out: Where the policy is written.
        run_dir: The folder that keeps what was sampled.
        as_json: Print JSON.
        report: Where the report is written, None for none.

    Raises:
        PolicyError: The policy or the calls cannot be tuned, or the policy cannot be written (E152).
    """
    training, held_out = calls.split()

    def search(progress: Progress) -> ThresholdTuning:
        sampled = {"held_out": held_out, "run_dir": run_dir, "progress": progress}
        return tune_threshold(pipe, training, policy, **sampled, **further)

    result = _found(pipe, search, out, run_dir)
    _report(result, report)
    if as_json:
        points = {"chosen": asdict(result.chosen), "measured": [asdict(point) for point in result.measured]}
        output.say_json({"policy": result.text, "param": result.param, **points, "output": str(out)})
        return
    chosen = result.chosen
    output.say(f"{out}: `{result.param}` {chosen.value:g} computes {chosen.cost:.0%} of the calls of its sites")
    output.say(f"PSNR {chosen.psnr:.1f} dB, 10th percentile {chosen.psnr_p10:.1f} dB, on {_others(len(held_out))}")
    output.say(f"a call is {chosen.speedup:.2f}x as fast")


def show_levels(
    pipe: Any,
    calls: Calls,
    levels: Sequence[float],
    further: Mapping[str, Any],
    *,
    out: Path,
    run_dir: str | None,
    as_json: bool,
    report: Path | None,
) -> None:
    """Tune several numbers of steps and levels, write one policy and print what was found.

    Args:
        pipe: The pipeline.
        calls: Its calls.
        levels: The values of the target.
        further: Further arguments of `tune_levels`: the target, the numbers of steps, order and gap.
        out: Where the policy is written.
        run_dir: The folder that keeps what was sampled.
        as_json: Print JSON.
        report: Where the report is written, None for none.

    Raises:
        PolicyError: A level cannot be tuned, or the policy cannot be written (E152).
    """
    training, held_out = calls.split()

    def search(progress: Progress) -> LevelTuning:
        return tune_levels(pipe, training, levels, held_out=held_out, run_dir=run_dir, progress=progress, **further)

    result = _found(pipe, search, out, run_dir)
    _report(result, report)
    if as_json:
        found = [{"steps": steps, "level": level, **_to_json(one)} for (steps, level), one in result.results.items()]
        output.say_json({"policy": result.text, "results": found, "output": str(out)})
        return
    for (steps, level), one in result.results.items():
        where = f"level {level:g}" if steps is None else f"{counted(steps, 'step')}, level {level:g}"
        output.say("\n  ".join(_lines(one, len(held_out), where)))
    output.say(str(out))


def _report(result: MeasuredPolicy | LevelTuning, path: Path | None) -> None:
    """Write the report of a result with a progress bar."""
    if path is not None:
        try:
            with progress_bar("comparing", "run") as progress:
                result.report(path, progress=progress)
        except OSError as error:
            raise output.unwritable(path, error) from error


R = TypeVar("R", bound=FoundPolicy)


def _found(pipe: Any, search: Callable[[Progress], R], out: Path, run_dir: str | None) -> R:
    """Run a search with a progress bar, and save its result. Ctrl-C ends the command (exit code 130)."""
    if not out.parent.is_dir():
        raise PolicyError.of("E152", f"`{out}` cannot be written: there is no folder `{out.parent}`")
    pipe.set_progress_bar_config(disable=True)
    try:
        with progress_bar("recording", "run") as progress:
            result = search(progress)
    except KeyboardInterrupt:
        kept = f"`{run_dir}` has what was sampled; run the command again to go on"
        output.say(f"interrupted: {kept if run_dir else 'nothing was kept; `--run-dir DIR` keeps it'}", error=True)
        raise SystemExit(INTERRUPTED) from None
    try:
        result.save(str(out))
    except OSError as error:
        raise output.unwritable(out, error) from error
    return result


def show_calibration(pipe: Any, calls: Calls, method: Any, cost: float, *, out: Path, as_json: bool) -> None:
    """Calibrate a method, write the policy and print what was found. Progress goes to standard error.

    Raises:
        PolicyError: The model cannot be calibrated, or the policy cannot be written (E152).
    """

    def search(progress: Progress) -> Calibration:
        return calibrate(pipe, calls.split()[0], method, cost=cost, progress=progress)

    found = _found(pipe, search, out, None)
    if as_json:
        values = {"method": found.method, "threshold": found.threshold, "cost": found.cost}
        output.say_json({"policy": found.text, **values, "output": str(out)})
    else:
        output.say(f"{out}: {method} with a threshold of {found.threshold:g}")
        output.say(f"by the recording, {found.cost:.0%} of the steps are computed; `cachepolicy run` measures it")


def _others(held_out: int) -> str:
    return f"{counted(held_out, 'call')} that {'was' if held_out == 1 else 'were'} not recorded"


def _lines(result: Tuning, held_out: int, out: str) -> list[str]:
    chosen, calls = result.chosen, len(result.frontier[-1].steps)
    measured = f"PSNR {chosen.psnr:.1f} dB, 10th percentile {chosen.psnr_p10:.1f} dB" if chosen.psnr else "not measured"
    lines = [
        f"{out}: {len(chosen.steps)} of {counted(calls, 'call')} computed, cost {chosen.cost:.3g}",
        f"{measured}, on {_others(held_out)}; forecast {chosen.forecast:.1f} dB",
        f"a call is {chosen.speedup:.2f}x as fast; the denoiser takes {result.model_share:.0%} of an uncached one",
        f"sampled as many calls of the model as {result.evaluations:.1f} uncached runs",
    ]
    if result.base.steps is not None:
        lines.append(f"set the scheduler and the steps: {result.base}")
    lines += [f"note: {note}" for note in result.notes]
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
        "scheduler": result.base.solver,
        "arguments": result.arguments,
        "reference": result.reference,
        "notes": list(result.notes),
    }


def _point(point: SchedulePoint) -> dict[str, Any]:
    return {
        "steps": list(point.steps),
        "cost": point.cost,
        "forecast": point.forecast,
        "psnr": point.psnr,
        "psnr_p10": point.psnr_p10,
        "speedup": point.speedup,
    }
