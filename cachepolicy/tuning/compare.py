# diffusers comes without complete types.
# pyright: basic
"""`compare`: measures policies, numbers of steps and solvers against each other on the same calls."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cachepolicy.engine.apply import apply
from cachepolicy.engine.run import Run
from cachepolicy.errors import counted
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.ir import Policy
from cachepolicy.reports.comparison import (
    Distance,
    Reference,
    Row,
    csv_table,
    decibels,
    pareto_front,
    text_table,
)
from cachepolicy.reports.html.comparison import PictureRow, Summary, comparison_page, plot
from cachepolicy.tools.flops import counting
from cachepolicy.tools.pictures import Strip, contact_sheet, difference, line, png
from cachepolicy.tools.quality import each_psnr, percentile
from cachepolicy.tools.sampling import Progress, Sample
from cachepolicy.tracing.trace import Trajectory
from cachepolicy.tuning.sampling import STEPS, ModelCall, SampleFunction, Sampler
from cachepolicy.tuning.schedulers import SOLVERS, adapted, with_solver

Metric = Callable[[torch.Tensor, torch.Tensor], Any]
"""Takes the uncached samples of a call and those to compare, `(n, ...)` in [-1, 1]; returns one number, or n."""

UNCACHED, CONVERGED = "uncached", "converged"
CONVERGED_STEPS = 120
"""Least steps of the converged run."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to sample.

    Attributes:
        policy: What `cachepolicy.apply` takes as a policy, None for none.
        params: Params of the policy.
        steps: The number of steps, None for that of the calls.
        solver: A name of `SOLVERS`, or a scheduler; None for the scheduler of the target.
        only: Indices of the steps that the scheduler runs, None for all. No policy runs the model in between.
    """

    policy: str | os.PathLike[str] | Policy | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    steps: int | None = None
    solver: Any = None
    only: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        rows: A row for each way to sample: the uncached run, the variants, their baselines, the converged run.
        samples: The number of samples of each row.
        evaluations: What was spent, in uncached runs over all calls.
        notes: What could not be compared, and why.
        texts: The texts of the policies, by the name of their row.
        pictures: The first pictures of each row, `(N, C, H, W)` in [-1, 1]; empty where the samples are none.
    """

    rows: Sequence[Row]
    samples: int
    evaluations: float
    notes: Sequence[str]
    texts: Mapping[str, str] = field(repr=False)
    pictures: Mapping[str, torch.Tensor] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join([text_table(self.rows), "", *self.captions(), *self.notes])

    def captions(self) -> list[str]:
        """Return what the columns mean, one sentence each."""
        return [
            f"{counted(self.samples, 'sample')}; PSNR in dB on floating-point numbers, p10 is the 10th percentile.",
            "Cost is the share of the denoisers' uncached FLOPs.",
            "A speed-up is the median over the calls of the uncached seconds divided by those of the row.",
        ]

    def __getitem__(self, name: str) -> Row:
        """Return the row of a name."""
        return next(row for row in self.rows if row.name == name)

    def front(self, reference: Reference = "uncached") -> list[Row]:
        """Return the rows that no other row beats in cost and distance, the cheapest first.

        Args:
            reference: `"uncached"` or `"converged"`.
        """
        return pareto_front(self.rows, reference)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain data. Infinite ones become None."""
        return {
            "samples": self.samples,
            "evaluations": self.evaluations,
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
            "front": {
                reference: [row.name for row in self.front(reference)] for reference in ("uncached", "converged")
            },
            "policies": dict(self.texts),
        }

    def to_csv(self) -> str:
        """Return the rows as CSV."""
        return csv_table(self.rows)

    def sheet(self, names: Sequence[str] | None = None, *, reference: str = UNCACHED, scale: int | None = None) -> Any:
        """Draw the pictures of rows below each other, each row with its differences from the reference.

        Args:
            names: The rows; all with pictures if None.
            reference: The row to which the others are compared.
            scale: How much the pictures are enlarged; by default, small ones are enlarged and large ones reduced.

        Returns:
            A Pillow image.

        Raises:
            ValueError: There are no pictures.
        """
        if not self.pictures:
            raise ValueError("the samples are no pictures")
        return contact_sheet(self.strips(names, reference=reference), scale=scale)

    def strips(self, names: Sequence[str] | None = None, *, reference: str = UNCACHED) -> list[Strip]:
        """Return the pictures of rows with their headings, and their differences from a reference."""
        base = self.pictures[reference]
        strips = list[Strip]()
        for name in self.pictures if names is None else names:
            pictures = self.pictures[name]
            same = name == reference or pictures.shape != base.shape
            row = self[name]
            heading = f"{name}: cost {row.cost:.2f}"
            heading += f", {decibels(row.uncached.mean)} dB to uncached" if row.uncached else ""
            strips.append(Strip(heading, pictures, None if same else difference(base, pictures)))
        return strips

    def report(
        self, path: str | os.PathLike[str], *, title: str = "Comparison", summary: Summary | None = None
    ) -> None:
        """Write the comparison as one HTML file, with charts and pictures.

        Args:
            path: Where to write.
            title: The title of the page.
            summary: What stands above, for the report of a tuning.

        Raises:
            OSError: It cannot be written.
        """
        pictures = list[PictureRow]()
        for strip in self.strips() if self.pictures else ():
            images = (strip.pictures, strip.differences)
            shown, differences = (None if part is None else png(line(part)) for part in images)
            pictures.append(PictureRow(strip.heading, shown or b"", differences))
        text = comparison_page(
            title,
            self.rows,
            captions=self.captions(),
            notes=self.notes,
            policies=self.texts,
            pictures=pictures,
            summary=summary,
        )
        Path(path).write_text(text, encoding="utf-8")

    def plot(self, reference: Reference = "uncached") -> str:
        """Return the costs and distances of all rows as an SVG file.

        Args:
            reference: `"uncached"` or `"converged"`.
        """
        return plot(self.rows, reference)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the comparison as `compare.json`, `compare.csv`, `compare.html`, `compare.svg` and `compare.png`.

        Args:
            folder: The folder; it is made if it does not exist.

        Returns:
            The paths.

        Raises:
            OSError: A file cannot be written.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        files = [path / f"compare.{suffix}" for suffix in ("json", "csv", "svg", "html")]
        texts = (json.dumps(self.to_dict(), indent=1) + "\n", self.to_csv(), self.plot())
        for file, text in zip(files, texts, strict=False):
            file.write_text(text, encoding="utf-8")
        self.report(files[-1])
        if self.pictures:
            files.append(path / "compare.png")
            self.sheet().save(files[-1])
        return files


def compare(
    target: Any,
    calls: Sequence[ModelCall],
    variants: Mapping[str, Any] | Sequence[Any] = (),
    *,
    converged: Variant | int | None = CONVERGED_STEPS,
    baselines: bool = True,
    metrics: Mapping[str, Metric] | None = None,
    sample: SampleFunction | None = None,
    scheduler: Any = None,
    shown: int = 8,
    progress: Progress | None = None,
) -> Comparison:
    """Measure policies, numbers of steps and solvers on the same calls.

    Each policy is compared with what costs nothing: as many model calls with fewer steps of the same scheduler, of
    UniPC and of DPM++ 2M. A policy that computes a fixed list of steps is also compared with these schedulers on the
    list alone. The first call is sampled once more to count FLOPs and to warm up. Then the calls are sampled one after
    another, and all rows take turns within each call.

    Args:
        target: A diffusers pipeline without a policy, or a denoiser.
        calls: Keyword arguments of each call. A call without a `generator` gets one of its own, seeded with its number.
        variants: By name: a policy as `apply` takes it, a number of steps, the name of a solver, a result of `tune`, or
            a `Variant`. In a sequence, policies and numbers are named by themselves.
        converged: The run that is taken for the exact solution: a number of UniPC steps (at least twice those of the
            calls are taken), a `Variant`, or None for none.
        baselines: False compares the variants with the uncached and the converged run alone.
        metrics: Further metrics against the uncached run, by name.
        sample: Samples once from the arguments of a call, see `Sampler`. Required for a denoiser. Other numbers of
            steps need an argument `num_inference_steps`, and other solvers an argument `scheduler`.
        scheduler: The scheduler that `sample` steps. Required for a denoiser.
        shown: The number of pictures that are kept of each row.
        progress: Called with the calls done, the calls in all, and what is sampled.

    Returns:
        The rows and the pictures.

    Raises:
        PolicyError: A policy does not fit the target, or a call fails (E213).
        ValueError: There are no calls, or two variants have the same name.
    """
    if not calls:
        raise ValueError("there are no calls to compare on")
    sampler = Sampler(target, sample, scheduler)
    bench = _Bench(sampler, _with_generators(sampler, calls), metrics or {}, shown, progress)
    bench.add(_Entry(UNCACHED, UNCACHED, Variant()))
    for name, variant in _named(variants).items():
        bench.add(_Entry(name, "baseline" if variant.policy is None else "policy", variant))
    if baselines:
        for entry in list(bench.entries):
            if entry.kind == "policy":
                for baseline in bench.baselines(entry):
                    bench.add(baseline)
    if converged is not None:
        bench.add(bench.converged(converged))
    bench.sample()
    return bench.result()


# --- what is compared ------------------------------------------------------------------------------------


def _named(variants: Mapping[str, Any] | Sequence[Any]) -> dict[str, Variant]:
    mapped = isinstance(variants, Mapping)
    pairs = list(variants.items()) if mapped else [(_name(value), value) for value in variants]
    names = [name for name, _ in pairs]
    if len({UNCACHED, CONVERGED, *names}) < len(names) + 2:
        raise ValueError("two variants have the same name, or the name of a reference")
    return {name: _variant(value) for name, value in pairs}


def _name(value: Any) -> str:
    if isinstance(value, int):
        return counted(value, "step")
    if isinstance(value, Policy):
        return value.title or value.name or "policy"
    if isinstance(value, str | os.PathLike):
        return Path(value).stem if os.fspath(value) not in SOLVERS else os.fspath(value)
    raise TypeError(f"a `{type(value).__name__}` has no name: pass a mapping from names to variants")


def _variant(value: Any) -> Variant:
    if isinstance(value, Variant):
        return value
    if isinstance(value, int):
        return Variant(steps=value)
    if isinstance(value, str) and value in SOLVERS:
        return Variant(solver=value)
    if isinstance(value, str | os.PathLike | Policy):
        return Variant(policy=value)
    if isinstance(getattr(value, "policy", None), Policy):
        base = getattr(value, "base", None)
        return Variant(
            value.policy, getattr(value, "settings", {}), getattr(base, "steps", None), getattr(base, "scheduler", None)
        )
    raise TypeError(f"a `{type(value).__name__}` is no variant")


def _with_generators(sampler: Sampler, calls: Sequence[ModelCall]) -> list[ModelCall]:
    """Return the calls, each with noise of its own that can be repeated."""
    if not sampler.takes("generator"):
        return list(calls)
    return [
        call if "generator" in call else {**call, "generator": torch.Generator().manual_seed(number)}
        for number, call in enumerate(calls)
    ]


@dataclass(slots=True)
class _Entry:
    """A way to sample, and what was measured of it so far."""

    name: str
    kind: Any
    variant: Variant
    at_cost_of: str | None = None
    computed: tuple[int, ...] | None = None
    """The steps that a policy computes, where it decides on whole calls of the model."""
    signals: bool = False
    """Whether what a policy computes depends on the call."""
    text: str = ""
    cost: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])
    model_seconds: list[float] = field(default_factory=list[float])
    distances: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    metrics: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    pictures: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    def same(self, other: _Entry) -> bool:
        """Return whether both sample without a policy and in the same way."""
        one, two = self.variant, other.variant
        return one.policy is two.policy is None and (one.steps, one.solver, one.only) == (
            two.steps,
            two.solver,
            two.only,
        )


class _Bench:
    """Samples the calls in each way."""

    def __init__(
        self,
        sampler: Sampler,
        calls: Sequence[ModelCall],
        metrics: Mapping[str, Metric],
        shown: int,
        progress: Progress | None,
    ) -> None:
        self._sampler = sampler
        self._calls = calls
        self._metrics = metrics
        self._shown = shown
        self._progress = progress
        self.entries = list[_Entry]()
        self._steps = sampler.steps(calls[0])
        self._notes = list[str]()
        self._samples = 0
        self._uncached_flops = 0.0
        self._done, self._total, self._spent = 0, 0, 0.0

    # --- what there is to sample

    def add(self, entry: _Entry) -> None:
        """Add a way to sample, unless it is there already or is not possible. Measure its cost on the first call."""
        if any(entry.same(other) for other in self.entries if entry.kind == other.kind):
            return
        reason = self._obstacle(entry.variant)
        if reason is not None:
            self._notes.append(f"left out: {entry.name}: {reason}")
            return
        if entry.kind == CONVERGED:
            # It is long, and its cost is of no interest.
            entry.cost.append((entry.variant.steps or 1) / (self._steps or 1))
        else:
            self._total += 1
            self._count(entry, self._calls[0])
        self.entries.append(entry)

    def _obstacle(self, variant: Variant) -> str | None:
        """Return why a variant cannot be sampled, None if it can."""
        if variant.steps is not None and self._steps is None:
            return f"the function that samples has no argument `{STEPS}`"
        if variant.solver is None and variant.only is None:
            return None
        scheduler = self._sampler.scheduler
        if scheduler is None:
            return "there is not exactly one scheduler that can be replaced"
        return None if self._made(variant) else f"diffusers has no such scheduler for a `{type(scheduler).__name__}`"

    def _made(self, variant: Variant) -> Any:
        """Return the scheduler of a variant, None where there is none."""
        made = variant.solver or self._sampler.scheduler
        if isinstance(made, str):
            made = with_solver(self._sampler.scheduler, made)
        return made if made is None or variant.only is None else adapted(made, variant.only)

    def baselines(self, entry: _Entry) -> list[_Entry]:
        """Return what a policy has to beat at its cost."""
        own, steps = entry.variant.solver, entry.variant.steps or self._steps
        own = next((name for name, cls in SOLVERS.items() if type(own).__name__ == cls), own)
        fewer = max(1, round(entry.cost[0] * (self._steps or 1)))
        short = counted(fewer, "step")
        found = [_Entry(short, "baseline", Variant(steps=fewer), entry.name)] if fewer != self._steps else []
        found += [
            _Entry(f"{solver}, {short}", "baseline", Variant(None, {}, fewer, solver), entry.name) for solver in SOLVERS
        ]
        if entry.computed is not None and len(entry.computed) < (steps or 0):
            for solver in dict.fromkeys([own, *SOLVERS]):
                variant = Variant(steps=steps, solver=solver, only=entry.computed)
                label = solver if isinstance(solver, str) else "same solver"
                found.append(_Entry(f"{label} on the steps of {entry.name}", "baseline", variant, entry.name))
        return found

    def converged(self, stated: Variant | int) -> _Entry:
        """Return the converged run."""
        if isinstance(stated, int):
            steps, scheduler = max(stated, 2 * (self._steps or 0)), self._sampler.scheduler
            known = scheduler is not None and with_solver(scheduler, "UniPC") is not None
            stated = Variant(steps=steps, solver="UniPC" if known else None)
        return _Entry(CONVERGED, CONVERGED, stated)

    # --- sampling

    def sample(self) -> None:
        """Sample all calls in all ways. Within a call the ways take turns, and each call begins with another one."""
        ways, calls = self.entries, self._calls
        recounted = sum(entry.signals for entry in ways) * (len(calls) - 1)
        self._total = self._done + len(calls) * len(ways) + recounted
        for number, call in enumerate(calls):
            shift = number % len(ways)
            taken = dict[str, Sample]()
            for entry in [*ways[shift:], *ways[:shift]]:
                if entry.signals and number:
                    # Counting takes time, so the run that is timed is another one.
                    self._count(entry, call)
                with self._way(entry.variant, call) as (arguments, _):
                    taken[entry.name] = self._sampler(arguments)
                self._advance(entry)
            self._compare(taken)

    def _compare(self, taken: Mapping[str, Sample]) -> None:
        """Add the distances of the samples of one call."""
        references = {name: taken[name].pictures for name in (UNCACHED, CONVERGED) if name in taken}
        uncached = references[UNCACHED]
        self._samples += len(uncached)
        for entry in self.entries:
            sampled = taken[entry.name]
            pictures = sampled.pictures
            entry.seconds.append(sampled.seconds)
            entry.model_seconds.append(sampled.model_seconds)
            for name, reference in references.items():
                if name != entry.name:
                    entry.distances.setdefault(name, []).extend(each_psnr(reference, pictures))
            for name, metric in self._metrics.items():
                if entry.name != UNCACHED:
                    values = torch.as_tensor(metric(uncached, pictures), dtype=torch.float64)
                    entry.metrics.setdefault(name, []).extend(values.reshape(-1).tolist())
            if sampled.rate is None and pictures.ndim == 4 and pictures.shape[1] in (1, 3):
                entry.pictures += pictures[: self._shown - len(entry.pictures)]

    def _count(self, entry: _Entry, call: ModelCall) -> None:
        """Sample a call, count the FLOPs of the denoisers, and note what the policy computes."""
        with self._way(entry.variant, call, trace=True) as (arguments, run):
            with contextlib.ExitStack() as stack:
                counts = [stack.enter_context(counting(model)) for model in self._sampler.models]
                self._sampler(arguments)
            if run is not None:
                entry.signals, entry.text = bool(run.plan.probes), format_policy(run.plan.policy)
                entry.computed = _computed(run.trace.latest) if run.trace is not None else None
        flops = float(sum(count.modules[""] for count in counts))
        self._uncached_flops = self._uncached_flops or flops
        entry.cost.append(flops / self._uncached_flops)
        self._advance(entry)

    @contextlib.contextmanager
    def _way(
        self, variant: Variant, call: ModelCall, *, trace: bool = False
    ) -> Generator[tuple[ModelCall, Run | None]]:
        """Set the scheduler and the policy, and yield the arguments of the call and the run of the policy."""
        other = variant.solver is not None or variant.only is not None
        with contextlib.ExitStack() as stack:
            scheduler = self._made(variant) if other else None
            arguments = stack.enter_context(self._sampler.on(scheduler, variant.steps, call))
            run = None
            if variant.policy is not None:
                applied = apply(self._sampler.target, variant.policy, trace=trace, **dict(variant.params))
                run = stack.enter_context(applied)
            yield arguments, run

    def _advance(self, entry: _Entry) -> None:
        self._done += 1
        self._spent += statistics.fmean(entry.cost)
        if self._progress is not None:
            self._progress(self._done, self._total, entry.name)

    # --- the result

    def result(self) -> Comparison:
        """Return all rows."""
        return Comparison(
            rows=[self._row(entry) for entry in self.entries],
            samples=self._samples,
            evaluations=self._spent,
            notes=self._notes,
            texts={entry.name: entry.text for entry in self.entries if entry.text},
            pictures={entry.name: torch.stack(entry.pictures) for entry in self.entries if entry.pictures},
        )

    def _row(self, entry: _Entry) -> Row:
        uncached, variant, cost = self.entries[0], entry.variant, statistics.fmean(entry.cost)
        steps = variant.steps or self._steps or 0
        scheduler = self._made(variant) if self._sampler.scheduler is not None else None
        return Row(
            name=entry.name,
            kind=entry.kind,
            at_cost_of=entry.at_cost_of,
            solver=type(scheduler).__name__ if scheduler is not None else "",
            steps=len(variant.only) if variant.only is not None else steps,
            cost=cost,
            evaluations=cost * (self._steps or 1),
            uncached=_distance(entry.distances.get(UNCACHED)),
            converged=_distance(entry.distances.get(CONVERGED)),
            seconds=statistics.median(entry.seconds),
            call_speedup=_speedup(uncached.seconds, entry.seconds),
            model_speedup=_speedup(uncached.model_seconds, entry.model_seconds),
            metrics={name: statistics.fmean(values) for name, values in entry.metrics.items()},
        )


def _distance(ratios: Sequence[float] | None) -> Distance | None:
    if ratios is None:
        return None
    different = [ratio for ratio in ratios if ratio != math.inf]
    return Distance(tuple(ratios), statistics.fmean(different) if different else math.inf, percentile(ratios, 10))


def _speedup(uncached: Sequence[float], seconds: Sequence[float]) -> float:
    pairs = zip(uncached, seconds, strict=True)
    return statistics.median(base / own if own else math.inf for base, own in pairs)


def _computed(trajectories: Sequence[Trajectory]) -> tuple[int, ...] | None:
    """Return the steps that a policy computed, None unless it decided on whole steps of one model."""
    if len(trajectories) != 1:
        return None
    plan = trajectories[0].plan
    if plan.probes or [site.modules for site in plan.sites] != [("",)]:
        return None
    rows = {row for branch in trajectories[0].branches for row in trajectories[0].rows(branch).values()}
    return tuple(step for step, letter in enumerate(rows.pop()) if letter == "C") if len(rows) == 1 else None
