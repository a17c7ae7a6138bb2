"""What the `run` command does: sample a pipeline from a folder, compare, write pictures, trace and report."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachepolicy.cli import output
from cachepolicy.engine.run import Run, apply
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.tools.quality import Quality, compare_pictures
from cachepolicy.tools.sampling import Sample, checked, sample_pipeline, save_pictures


@dataclass(frozen=True, slots=True)
class Task:
    """What is sampled: the arguments of the pipeline's call, one sampling a seed, and where everything is written.

    `policy` None samples the bare pipeline alone; `compares` samples it beside the policy, to see what that changed.
    """

    arguments: Mapping[str, Any]
    seeds: Sequence[int]
    output: Path
    policy: ir.Policy | None = None
    settings: Mapping[str, Any] | None = None
    compares: bool = True


@dataclass(frozen=True, slots=True)
class SeedOutcome:
    """One seed: its seconds with the policy and without, the quality against the bare pipeline, and the files."""

    seed: int
    seconds: float | None
    uncached_seconds: float | None
    quality: Quality | None
    files: Sequence[Path]
    uncached_model_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "seed": self.seed,
            "seconds": self.seconds,
            "uncached_seconds": self.uncached_seconds,
            "quality": None if self.quality is None else self.quality.to_json(),
            "files": [str(each) for each in self.files],
        }


def show_run(pipe: Any, task: Task, *, as_json: bool) -> None:
    """Do the task and print its outcome; the pipeline's own bars go to standard error.

    Raises:
        PolicyError: the policy does not fit, the call takes an argument not, or a file cannot be written (E152).
    """
    arguments = checked(pipe, task.arguments)
    try:
        task.output.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            run = None
            if task.policy is not None:
                run = stack.enter_context(apply(pipe, task.policy, **(task.settings or {})))
            outcomes = [_sampled(pipe, run, task, arguments, seed, place) for place, seed in enumerate(task.seeds)]
            files = [] if run is None else _written(run, task.output, outcomes[-1].uncached_model_seconds)
            told = "" if run is None or run.trace is None else str(run.trace)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PolicyError.of("E152", f"`{task.output}` cannot be written: {reason}") from error
    if as_json:
        paths = {path.name: str(path) for path in files}
        output.say_json({"seeds": [each.to_json() for each in outcomes], "files": paths, **_summary(outcomes)})
        return
    for line in (told, *_lines(outcomes), *(f"{path}" for path in files)):
        if line:
            output.say(line)


def _sampled(
    pipe: Any, run: Run | None, task: Task, arguments: Mapping[str, Any], seed: int, place: int
) -> SeedOutcome:
    """Both ways for one seed; every second seed runs in the other order, so that neither always goes first."""
    cached: Sample | None = None
    bare: Sample | None = None
    ways = ["bare"] if run is None else ["bare", "policy"] if task.compares else ["policy"]
    for way in reversed(ways) if place % 2 else ways:
        if way == "policy":
            cached = _bar(pipe, f"seed {seed}, with the policy", arguments, seed)
        else:
            with run.disabled() if run is not None else contextlib.nullcontext():
                bare = _bar(pipe, f"seed {seed}, uncached", arguments, seed)
    files = list[Path]()
    for name, found in ((f"seed-{seed}", cached), (f"seed-{seed}-uncached", bare)):
        files += [] if found is None else save_pictures(found, task.output, name)
    quality = None if cached is None or bare is None else compare_pictures(bare.pictures, cached.pictures)
    model = None if bare is None else bare.model_seconds
    return SeedOutcome(seed, cached and cached.seconds, bare and bare.seconds, quality, files, model)


def _bar(pipe: Any, description: str, arguments: Mapping[str, Any], seed: int) -> Sample:
    pipe.set_progress_bar_config(desc=description, leave=False)
    return sample_pipeline(pipe, arguments, seed)


def _written(run: Run, output: Path, uncached: float | None) -> list[Path]:
    """The trace of the run, and its report."""
    assert run.trace is not None
    trace = output / "trace.json"
    run.trace.save(trace)
    run.report(output / "report.html", uncached=uncached)
    return [trace, output / "report.html"]


# --- for a person ----------------------------------------------------------------------------------------


def _summary(outcomes: Sequence[SeedOutcome]) -> dict[str, Any]:
    ratios = _ratios(outcomes)
    return {"speed_up": statistics.median(ratios) if ratios else None}


def _ratios(outcomes: Sequence[SeedOutcome]) -> list[float]:
    return [each.uncached_seconds / each.seconds for each in outcomes if each.uncached_seconds and each.seconds]


def _lines(outcomes: Sequence[SeedOutcome]) -> list[str]:
    lines = list[str]()
    for each in outcomes:
        seconds = [
            f"{value:.2f} s {name}"
            for name, value in (("with the policy", each.seconds), ("uncached", each.uncached_seconds))
            if value is not None
        ]
        lines.append(f"seed {each.seed}: {', '.join(seconds)}{_told(each.quality)}")
    ratios = _ratios(outcomes)
    if ratios:
        spread = f" ({min(ratios):.2f}..{max(ratios):.2f})" if len(ratios) > 1 else ""
        lines.append(f"{statistics.median(ratios):.2f}x as fast{spread}, timed once a seed; the first also warms up")
    return lines


def _told(quality: Quality | None) -> str:
    if quality is None:
        return ""
    if math.isinf(quality.psnr):
        return "; the pictures are bitwise equal"
    more = f", SSIM {quality.ssim:.4f}" if quality.ssim is not None else ""
    more += f", LPIPS {quality.lpips:.4f}" if quality.lpips is not None else ""
    return f"; PSNR {quality.psnr:.1f} dB{more}"
