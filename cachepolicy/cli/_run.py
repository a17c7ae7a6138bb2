"""Implementation of the `run` command: samples a pipeline from a folder, with and without a policy."""

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
from cachepolicy.language import ir
from cachepolicy.planning.tally import tally
from cachepolicy.reports.stats import speed_up
from cachepolicy.tools.quality import Quality, compare_pictures
from cachepolicy.tools.sampling import Sample, sample_pipeline, save_pictures


@dataclass(frozen=True, slots=True)
class Task:
    """One invocation of the command.

    Attributes:
        arguments: Arguments of the pipeline's call.
        seeds: Each seed is sampled once with the policy and once without.
        output: Folder for the files.
        policy: The policy; None samples the bare pipeline alone.
        settings: Parameters of the policy.
        compares: Whether the bare pipeline is sampled beside the policy.
    """

    arguments: Mapping[str, Any]
    seeds: Sequence[int]
    output: Path
    policy: ir.Policy | None
    settings: Mapping[str, Any]
    compares: bool


@dataclass(frozen=True, slots=True)
class _SeedOutcome:
    """Seconds with and without the policy, distance from the bare pipeline, and the files of one seed.

    `skipped` is the number of site calls that the policy skipped.
    """

    seed: int
    cached: Sample | None
    bare: Sample | None
    quality: Quality | None
    files: Sequence[Path]
    skipped: float

    @property
    def ratio(self) -> float | None:
        """The speed-up in the calls of the model; None if only one of the two was sampled, or nothing was skipped."""
        if self.bare is None or self.cached is None:
            return None
        return speed_up(self.cached.model_seconds, self.bare.model_seconds, self.skipped)

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome as plain data."""
        return {
            "seed": self.seed,
            "seconds": self.cached and self.cached.seconds,
            "uncached_seconds": self.bare and self.bare.seconds,
            "quality": self.quality and self.quality.to_json(),
            "files": [str(path) for path in self.files],
        }

    def __str__(self) -> str:
        samples = (("with the policy", self.cached), ("uncached", self.bare))
        seconds = ", ".join(f"{sample.seconds:.2f} s {label}" for label, sample in samples if sample)
        return f"seed {self.seed}: {seconds}{_quality(self.quality)}"


def show_run(pipe: Any, task: Task, *, as_json: bool) -> None:
    """Samples the pipeline and prints the outcome. Progress bars of the pipeline go to standard error.

    Raises:
        PolicyError: The policy does not fit the model, the call fails (E213), or a file cannot be written (E152).
    """
    files, summary = list[Path](), ""
    try:
        task.output.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            run = None if task.policy is None else stack.enter_context(apply(pipe, task.policy, **task.settings))
            if run is not None and not run.attached:
                output.say("note: `CACHEPOLICY_DISABLE` is set, so the bare pipeline alone is sampled", error=True)
                run = None
            outcomes = [_sampled(pipe, run, task, seed, index) for index, seed in enumerate(task.seeds)]
            if run is not None and run.trace is not None:
                files, summary = [task.output / "trace.json", task.output / "report.html"], str(run.trace)
                run.trace.save(files[0])
                bare = outcomes[-1].bare
                run.report(files[1], uncached=None if bare is None else bare.model_seconds)
    except OSError as error:
        raise output.unwritable(task.output, error) from error
    ratios = [outcome.ratio for outcome in outcomes if outcome.ratio is not None]
    faster = statistics.median(ratios) if ratios else None
    if as_json:
        seeds = [outcome.to_json() for outcome in outcomes]
        output.say_json({"seeds": seeds, "files": {path.name: str(path) for path in files}, "speed_up": faster})
        return
    lines = [summary] if summary else []
    lines += map(str, outcomes)
    if faster is not None:
        spread = f" ({min(ratios):.2f}..{max(ratios):.2f})" if len(ratios) > 1 else ""
        timed = "timed once per seed; the first call includes the warm-up"
        lines.append(f"{faster:.2f}x as fast in the calls of the model{spread}, {timed}")
    elif task.compares and run is not None:
        lines.append("no speed-up: the policy reused nothing")
    output.say("\n".join([*lines, *map(str, files)]))


def _sampled(pipe: Any, run: Run | None, task: Task, seed: int, index: int) -> _SeedOutcome:
    """Samples one seed. The order alternates between seeds, so that neither variant always runs first."""
    samples = dict[str, Sample]()
    variants = (
        ["uncached"] if run is None else ["uncached", "with the policy"] if task.compares else ["with the policy"]
    )
    for variant in reversed(variants) if index % 2 else variants:
        pipe.set_progress_bar_config(desc=f"seed {seed}, {variant}", leave=False)
        with run.disabled() if run is not None and variant == "uncached" else contextlib.nullcontext():
            samples[variant] = sample_pipeline(pipe, task.arguments, seed)
    cached, bare = samples.get("with the policy"), samples.get("uncached")
    files = list[Path]()
    for name, sample in ((f"seed-{seed}", cached), (f"seed-{seed}-uncached", bare)):
        files += [] if sample is None else save_pictures(sample, task.output, name)
    quality = None if cached is None or bare is None else compare_pictures(bare.pictures, cached.pictures)
    recorded = run.trace.latest if run is not None and run.trace is not None else ()
    return _SeedOutcome(seed, cached, bare, quality, files, sum(tally(trajectory).skipped for trajectory in recorded))


def _quality(quality: Quality | None) -> str:
    if quality is None:
        return ""
    if math.isinf(quality.psnr):
        return "; the pictures are bitwise equal"
    metrics = [f"PSNR {quality.psnr:.1f} dB"]
    metrics += [] if quality.ssim is None else [f"SSIM {quality.ssim:.4f}"]
    metrics += [] if quality.lpips is None else [f"LPIPS {quality.lpips:.4f}"]
    return f"; {', '.join(metrics)}"
