"""Implementation of the `run` command: samples a pipeline from a folder, with and without a policy."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachepolicy.cli import output
from cachepolicy.engine.apply import apply
from cachepolicy.engine.class_swap import plain
from cachepolicy.engine.introspection import denoisers
from cachepolicy.engine.run import Run
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.planning.cost_model import Work, forecast
from cachepolicy.planning.tally import tally
from cachepolicy.reports.html.page import page
from cachepolicy.reports.run_record import Picture, RunRecord
from cachepolicy.reports.stats import speed_up
from cachepolicy.tools.flops import counting
from cachepolicy.tools.pictures import GAIN, difference, thumbnail
from cachepolicy.tools.quality import Quality, compare_pictures
from cachepolicy.tools.sampling import Sample, sample_pipeline, save_pictures
from cachepolicy.tracing.trace import Trajectory
from cachepolicy.tuning.sampling import STEPS


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

    `skipped` is the number of site calls that the policy skipped, `trajectories` the record of the run with it.
    """

    seed: int
    cached: Sample | None
    bare: Sample | None
    quality: Quality | None
    files: Sequence[Path]
    skipped: float
    trajectories: Sequence[Trajectory] = ()
    fewer: FewerSteps | None = None

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
            "fewer_steps": self.fewer and self.fewer.to_json(),
        }

    def __str__(self) -> str:
        samples = (("with the policy", self.cached), ("uncached", self.bare))
        seconds = ", ".join(f"{sample.seconds:.2f} s {label}" for label, sample in samples if sample)
        fewer = "" if self.fewer is None else f"\nseed {self.seed}: {self.fewer}"
        return f"seed {self.seed}: {seconds}{_quality(self.quality)}{fewer}"


@dataclass(frozen=True, slots=True)
class FewerSteps:
    """The bare pipeline with so few steps that its denoisers cost about as much as with the policy.

    Attributes:
        steps: The number of steps.
        measure: What is about as much: the FLOPs, or the seconds where they cannot be counted.
        sample: The pictures and the seconds.
        quality: The distance from the pictures with all steps.
    """

    steps: int
    measure: str
    sample: Sample
    quality: Quality

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome as plain data."""
        return {"steps": self.steps, "seconds": self.sample.seconds, "quality": self.quality.to_json()}

    def __str__(self) -> str:
        same = f"about as many {self.measure} in the model as with the policy"
        return f"{self.sample.seconds:.2f} s with {counted(self.steps, 'step')} ({same}){_quality(self.quality)}"


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
            work = None if run is None else _work(pipe, run, task)
            outcomes = [_sampled(pipe, run, task, seed, index, work) for index, seed in enumerate(task.seeds)]
            if run is not None and run.trace is not None:
                files, summary = [task.output / "trace.json", task.output / "report.html"], str(run.trace)
                run.trace.save(files[0])
                files[1].write_text(_report(pipe, task, outcomes, work), encoding="utf-8")
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


def _work(pipe: Any, run: Run, task: Task) -> Work | None:
    """Counts the FLOPs of one call of the only denoiser, in a run of one step. Returns None if that is not possible."""
    models = list(denoisers(pipe).values())
    if len(models) > 1 or STEPS not in inspect.signature(type(pipe).__call__).parameters:
        return None
    pipe.set_progress_bar_config(desc="FLOPs, one step", leave=False)
    try:
        with run.disabled(), counting(models[0]) as flops:
            sample_pipeline(pipe, {**task.arguments, STEPS: 1}, task.seeds[0])
    except PolicyError:
        return None
    calls = flops.calls[""]
    if not calls:
        return None
    return Work(flops.modules[""] // calls, {name: total // calls for name, total in flops.modules.items()})


def _fewer_steps(
    pipe: Any, run: Run, task: Task, seed: int, outcome: _SeedOutcome, work: Work | None
) -> FewerSteps | None:
    """Samples the bare pipeline with as many steps as the policy's cost pays for."""
    bare, cached, recorded = outcome.bare, outcome.cached, outcome.trajectories
    if bare is None or cached is None or not recorded or not outcome.skipped:
        return None
    if STEPS not in inspect.signature(type(pipe).__call__).parameters or {"timesteps", "sigmas"} & set(task.arguments):
        return None
    steps = len({call.tick.step for trajectory in recorded for call in trajectory.calls})
    share = cached.model_seconds / bare.model_seconds
    if work is not None:
        share = 1 - forecast(recorded[0].plan, recorded[0], work).share
    fewer = max(1, round(steps * share))
    if fewer >= steps:
        return None
    pipe.set_progress_bar_config(desc=f"seed {seed}, {counted(fewer, 'step')}", leave=False)
    try:
        with run.disabled():
            sample = sample_pipeline(pipe, {**task.arguments, STEPS: fewer}, seed)
        return FewerSteps(
            fewer, "seconds" if work is None else "FLOPs", sample, compare_pictures(bare.pictures, sample.pictures)
        )
    except (PolicyError, ValueError):  # the pipeline cannot run so few steps, or its output then has another size
        return None


def _sampled(pipe: Any, run: Run | None, task: Task, seed: int, index: int, work: Work | None) -> _SeedOutcome:
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
    skipped = sum(tally(trajectory).skipped for trajectory in recorded)
    outcome = _SeedOutcome(seed, cached, bare, quality, files, skipped, recorded)
    fewer = None if run is None else _fewer_steps(pipe, run, task, seed, outcome, work)
    if fewer is not None:
        files += save_pictures(fewer.sample, task.output, f"seed-{seed}-{fewer.steps}-steps")
    return replace(outcome, fewer=fewer)


# --- the report ------------------------------------------------------------------------------------------


def _report(pipe: Any, task: Task, outcomes: Sequence[_SeedOutcome], work: Work | None) -> str:
    """Returns the report: all samples, and the decisions of each seed that was decided in its own way."""
    by_decisions = dict[str, list[_SeedOutcome]]()
    for outcome in outcomes:
        shown = [{branch: each.rows(branch) for branch in each.branches} for each in outcome.trajectories]
        by_decisions.setdefault(repr(shown), []).append(outcome)
    trajectories, labels, uncached = list[Trajectory](), list[str](), list[float | None]()
    for alike in by_decisions.values():
        first, numbers = alike[0], [str(outcome.seed) for outcome in alike]
        seconds = sum(trajectory.seconds for trajectory in first.trajectories)
        for trajectory in first.trajectories:
            share = trajectory.seconds / seconds if seconds else 0.0
            trajectories.append(trajectory)
            labels.append(f"seed {numbers[0]}" if len(numbers) == 1 else f"seeds {', '.join(numbers)}, decided alike")
            uncached.append(None if first.bare is None else first.bare.model_seconds * share)
    return page(trajectories, work=work, uncached=uncached, labels=labels, record=_record(pipe, task, outcomes))


def _record(pipe: Any, task: Task, outcomes: Sequence[_SeedOutcome]) -> RunRecord:
    rows = list[tuple[str, ...]]()
    for outcome in outcomes:
        seed = f"seed {outcome.seed}"
        if outcome.bare is not None:
            rows.append(_row(f"{seed}, uncached", outcome.bare, None))
        if outcome.cached is not None:
            rows.append(_row(f"{seed}, with the policy", outcome.cached, outcome.quality))
        if outcome.fewer is not None:
            fewer = outcome.fewer
            rows.append(_row(f"{seed}, {counted(fewer.steps, 'step')} without it", fewer.sample, fewer.quality))
    measures = {outcome.fewer.measure for outcome in outcomes if outcome.fewer is not None}
    note = "Each sample was made once; the first also warms up. Quality is the distance from the uncached pictures."
    if measures:
        cost = " or ".join(sorted(measures))
        note += f" The runs with fewer steps have about as many {cost} in the model as those with the policy."
    return RunRecord(
        f"Samples of {plain(type(pipe)).__name__}",  # pyright: ignore[reportUnknownArgumentType]
        _facts(pipe, task),
        ("sample", "seconds of the call", "of these in the model", "PSNR, dB", "SSIM", "LPIPS"),
        rows,
        note,
        [(f"Seed {outcome.seed}", pictures) for outcome in outcomes if (pictures := _pictures(outcome))],
    )


def _row(name: str, sample: Sample, quality: Quality | None) -> tuple[str, ...]:
    numbers = ("", "", "")
    if quality is not None:
        psnr = "equal" if math.isinf(quality.psnr) else f"{quality.psnr:.1f}"
        numbers = (psnr, *("" if value is None else f"{value:.4f}" for value in (quality.ssim, quality.lpips)))
    return name, f"{sample.seconds:.2f}", f"{sample.model_seconds:.2f}", *numbers


def _facts(pipe: Any, task: Task) -> list[tuple[str, str]]:
    """Returns how the samples were made."""
    shown = {name: value for name, value in task.arguments.items() if isinstance(value, str | int | float | bool)}
    tensors = [name for name, value in task.arguments.items() if hasattr(value, "shape")]
    facts = [(name.replace("_", " ").capitalize(), str(value)) for name, value in shown.items()]
    facts += [("Tensors given", ", ".join(tensors))] if tensors else []
    facts += [("Seeds", ", ".join(map(str, task.seeds)))]
    if getattr(pipe, "scheduler", None) is not None:
        facts.append(("Scheduler", type(pipe.scheduler).__name__))
    model = next(iter(denoisers(pipe).values()))
    tensor = next(model.parameters(), None)
    if tensor is not None:
        facts.append(("Model", f"{plain(type(model)).__name__}, {str(tensor.dtype).removeprefix('torch.')}"))
        facts.append(("Device", str(tensor.device)))
    names = ("cachepolicy", "torch", "diffusers")
    versions = [f"{name} {getattr(importlib.import_module(name), '__version__', '')}" for name in names]
    return [*facts, ("Versions", ", ".join(versions)), ("Python", platform.python_version())]


_SHOWN = 4
"""Pictures of a sample in the report. The frames of a video are taken at equal distances."""


def _pictures(outcome: _SeedOutcome) -> list[Picture]:
    """Returns the pictures of a seed, each with its difference from the uncached one."""
    bare, files = outcome.bare, list[Picture]()
    fewer = outcome.fewer
    variants: list[tuple[str, Sample | None]] = [("uncached", bare), ("with the policy", outcome.cached)]
    if fewer is not None:
        variants.append((f"{counted(fewer.steps, 'step')} without the policy", fewer.sample))
    for name, sample in variants:
        if sample is None or sample.rate is not None or sample.pictures.shape[1] not in (1, 3):
            continue
        number = len(sample.pictures)
        for index in sorted({round(place * (number - 1) / max(1, _SHOWN - 1)) for place in range(_SHOWN)}):
            part = f"{name}, {'frame' if sample.frames else 'picture'} {index}" if number > 1 else name
            picture = sample.pictures[index : index + 1]
            files.append(_file(part, picture))
            if bare is not None and sample is not bare:
                off = difference(bare.pictures[index : index + 1], picture)
                files.append(_file(f"its difference from the uncached one, {GAIN} times enlarged", off))
    return files


def _file(caption: str, picture: Any) -> Picture:
    kind, content = thumbnail(picture)
    return Picture(caption, kind, content)


def _quality(quality: Quality | None) -> str:
    if quality is None:
        return ""
    if math.isinf(quality.psnr):
        return "; the pictures are bitwise equal"
    metrics = [f"PSNR {quality.psnr:.1f} dB"]
    metrics += [] if quality.ssim is None else [f"SSIM {quality.ssim:.4f}"]
    metrics += [] if quality.lpips is None else [f"LPIPS {quality.lpips:.4f}"]
    return f"; {', '.join(metrics)}"
