# diffusers comes without complete types.
# pyright: basic
"""`tune`: finds the policy of a model for a target, from recorded uncached runs."""

from __future__ import annotations

import functools
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

from cachepolicy.engine.apply import apply
from cachepolicy.engine.introspection import is_pipeline
from cachepolicy.engine.run import Run
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.formatter import format_node
from cachepolicy.language.ir import Tuned
from cachepolicy.language.parser import parse
from cachepolicy.reports.comparison import decibels
from cachepolicy.reports.html.comparison import Summary
from cachepolicy.tools.quality import each_psnr, percentile
from cachepolicy.tools.sampling import Progress, Sample
from cachepolicy.tuning.bases import (
    Base,
    Evidence,
    Predictor,
    candidate_bases,
    own_base,
    prepared,
    runs_alone,
    why_fixed,
)
from cachepolicy.tuning.compare import compare
from cachepolicy.tuning.found_policy import MeasuredPolicy
from cachepolicy.tuning.planner import PlanningProblem, Recorded, plan_steps, schedule_error
from cachepolicy.tuning.provenance import Circumstances, observed, tuned_statement
from cachepolicy.tuning.recording import OutputRecord, record
from cachepolicy.tuning.run_directory import (
    SAMPLE,
    Form,
    RunDirectory,
    pack_records,
    scheduler_key,
    settings_of,
    unpack_records,
)
from cachepolicy.tuning.sampling import STEPS, ModelCall, SampleFunction, Sampler

MOST_RUNS = 6
"""Most schedules that are sampled to reach a target of quality or speed."""
ROUND = 2
"""Recorded calls that each round of the choice between schedules samples."""
DECIDING = 8
"""Recorded calls on which a schedule is compared with an evenly spaced one, and scales with none."""
NEAR = 4.0
"""Ratio of the errors of two predictors up to which both are measured."""
PREDICTORS = 3
"""Most predictors that are measured."""
FEW_SAMPLES = 8
"""Of fewer samples, a 10th percentile says less than their mean."""
SCALES = 7
"""Numbers in the table of scales: each holds for the steps of a part of the trajectory."""
FEWEST_FITTED = 2
"""Fewest calls to which scales are fitted."""
NUDGE = 0.1
"""By how much a scale is changed to measure its effect."""
RIDGE = 0.1
"""How much the fit of the scales prefers small changes, relative to the effect of each."""
FEW_STEPS = 8
"""Of a run of so few steps, a note says what each number of computed calls gives."""
RUNS = 64.0
"""Sampling runs' worth of model calls that a tuning spends at most, unless it is given more."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to weigh errors when a schedule is planned.

    Args:
        early: By how much an error of the first call weighs more than one of the last.
        scaled: Whether an error also weighs in proportion to the sample's standard deviation, where that is below 1.
    """

    early: float = 1.0
    scaled: bool = False

    def of(self, problem: PlanningProblem) -> PlanningProblem:
        """Return the problem with weights of this kind."""
        outputs = list[Recorded]()
        for one in problem.outputs:
            early = [self.early ** (1 - call / problem.calls) for call in range(problem.calls)]
            scale = [min(size, 1.0) if self.scaled else 1.0 for size in one.scale or [1.0] * problem.calls]
            weights = [a * b * c for a, b, c in zip(one.weights, early, scale, strict=True)]
            outputs.append(replace(one, weights=weights))
        return replace(problem, outputs=outputs)


WAYS = (Way(scaled=True), Way(), Way(early=4.0))
"""The ways to plan, the one that was the best on most models first."""
Metric = Callable[[torch.Tensor, torch.Tensor], float]
"""Rates pictures `(N, ...)` against references; larger is better."""


@dataclass(frozen=True, slots=True)
class SchedulePoint:
    """A schedule, and what is known of it.

    Args:
        steps: The computed calls of the trajectory.
        cost: Their share of the denoiser's FLOPs in an uncached run, both halves of guidance counted.
        forecast: The PSNR in dB that the recording forecasts, infinite where every call is computed. That of the chosen
            schedule is the mean PSNR of the recorded calls, sampled with it.
        predictor: How skipped calls are extrapolated.
        scales: The table of factors of the extrapolation over the trajectory; empty where all are 1.
        index: The index at which a step reads the table.
        psnr: The measured mean PSNR in dB over the held-out samples, None where it was not sampled.
        psnr_p10: The 10th percentile of the same, None where it was not sampled.
        psnr_interval: The 95 % confidence interval of the mean over all calls like these, None where it is not known.
        speedup: Seconds of the uncached calls over those with the policy, whole calls, None where it was not sampled.
        metric: The mean of `metric` over the held-out calls, None without one.
    """

    steps: tuple[int, ...]
    cost: float
    forecast: float
    predictor: Predictor = field(default_factory=lambda: Predictor(1))
    scales: tuple[float, ...] = ()
    index: str = "step"
    psnr: float | None = None
    psnr_p10: float | None = None
    psnr_interval: tuple[float, float] | None = None
    speedup: float | None = None
    metric: float | None = None


@dataclass(frozen=True, slots=True)
class Tuning(MeasuredPolicy):
    """What `tune` found.

    Args:
        policy: The policy that meets the target.
        text: Its text, with where it comes from.
        chosen: Its point.
        frontier: The best schedule for each number of computed calls, the cheapest first.
        base: The scheduler and the number of steps that the policy is for.
        reference: What quality is measured against: `"own"` or `"converged"`.
        model_share: The denoisers' share of the seconds of an uncached call.
        evaluations: Sampling runs' worth of model calls that were spent, recordings included.
        linear: True if the scheduler is linear, so that the weights of its steps hold for every trajectory.
        notes: What a user should know, such as why the scheduler was kept.
        settings: Empty; the policy has no params.
        compared: Compares variants on the held-out calls, as `cachepolicy.compare` does.
    """

    chosen: SchedulePoint
    frontier: Sequence[SchedulePoint]
    base: Base
    reference: Reference
    model_share: float
    evaluations: float
    linear: bool
    notes: Sequence[str] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that each call needs: `num_inference_steps` where it differs from that of the tuned calls."""
        return {} if self.base.steps is None else {STEPS: self.base.steps}

    def apply(self, target: Any, **options: Any) -> Run:
        """Set the scheduler on a pipeline and apply the policy. Pass `arguments` to its calls.

        Args:
            target: The pipeline, or the denoiser.
            options: Further arguments of `cachepolicy.apply`.

        Returns:
            The run. When it is removed, the scheduler stays.
        """
        if self.base.scheduler is not None:
            target.scheduler = self.base.scheduler
        return apply(target, self.policy, **options)

    def _summary(self) -> Summary:
        """Return what stands above the comparison in the report."""
        chosen = self.chosen
        calls = next(part.steps for part in self.policy.statements if isinstance(part, Tuned))
        against = "the uncached run" if self.reference == "own" else "the converged run"
        figures = [
            ("Cost", f"{chosen.cost:.3g}", f"of the denoiser's FLOPs; {len(chosen.steps)} of {calls} calls computed"),
            ("Calls", str(calls), f"of the model, stepped by {self.base.solver}"),
            ("Forecast", f"{decibels(chosen.forecast)} dB", "by the recording"),
            ("Evaluations", f"{self.evaluations:.1f}", "spent on tuning, in uncached runs"),
        ]
        if chosen.psnr is not None and chosen.psnr_p10 is not None:
            note = f"mean, to {against}; 10th percentile {decibels(chosen.psnr_p10)}; on held-out calls"
            figures.insert(1, ("PSNR", f"{decibels(chosen.psnr)} dB", note))
        if chosen.speedup is not None:
            note = f"of a whole call; the denoiser takes {self.model_share:.0%} of an uncached one"
            figures.insert(2, ("Speed-up", f"{chosen.speedup:.2f}×", note))
        return Summary(
            figures,
            frontier=[(point.cost, point.forecast) for point in self.frontier],
            measured=[] if chosen.psnr is None else [(chosen.cost, chosen.psnr)],
            reference=against,
            schedule="".join("C" if _computes(chosen, call) else "R" for call in range(calls)),
        )


Reference = Literal["own", "converged"]


def tune(  # noqa: PLR0913 (one target of five, and how to sample)
    target: Any,
    calls: Sequence[ModelCall],
    *,
    cost: float | None = None,
    speedup: float | None = None,
    psnr: float | None = None,
    psnr_p10: float | None = None,
    quality: float | None = None,
    metric: Metric | None = None,
    keep_scheduler: bool = False,
    reference: Reference | None = None,
    held_out: Sequence[ModelCall] | None = None,
    sample: SampleFunction | None = None,
    scheduler: Any = None,
    order: int = 1,
    gap: int = 9,
    runs: float = RUNS,
    run_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Find the policy that meets a target with the least error, and the solver and number of steps to use it with.

    The calls are sampled uncached and what reaches the scheduler is recorded as inner products. A dynamic program then
    finds the best schedule of computed calls for each cost, where skipped calls are extrapolated (`predict taylor`).
    Few schedules are sampled with the policy, to choose between solvers and ways to plan and to fit how far skipped
    calls are extrapolated. The result is measured on calls that were not recorded.

    Args:
        target: A diffusers pipeline without a policy, or a denoiser.
        calls: Keyword arguments of each call. Each needs its own `generator`, so that it can be repeated.
        cost: Target: largest share of the denoiser's FLOPs in the uncached calls, 0 to 1.
        speedup: Target: how many times as fast a whole call gets, as timed; 1 or more.
        psnr: Target: mean PSNR in dB of the held-out samples against the reference.
        psnr_p10: Target: 10th percentile of the same.
        quality: Target: mean of `metric` over the held-out calls.
        metric: Rates pictures against the reference, `metric(reference, pictures)`; larger is better. It replaces the
            PSNR where schedules are compared.
        keep_scheduler: Keep the scheduler and the number of steps of the calls. Otherwise both are chosen: the
            scheduler that is there, the same with twice the steps, DPM++ 2M or UniPC with twice the steps.
        reference: What quality is measured against. `"own"`: the calls as they are, uncached; it implies
            `keep_scheduler`. `"converged"`: the most accurate solver with twice the steps, a better solution of the
            same equation. By default the converged run where the scheduler is chosen, and the own one otherwise.
        held_out: Calls to measure on. By default the last quarter of `calls` (at least one) is not recorded.
        sample: Samples once from the arguments of a call, see `Sampler`. Required for a denoiser.
        scheduler: The scheduler that `sample` steps. Required for a denoiser.
        order: Highest order of the extrapolation, 0 to 3. Calls are reused instead (order 0), or extrapolated along the
            timestep instead of the step, where that has the lower error.
        gap: Most calls between two computed ones, plus 1, in a run of the user's number of steps.
        runs: Sampling runs' worth of model calls to spend at most. Recording comes first; what is left bounds the
            choices after it.
        run_dir: A folder that keeps each recording, reference and measurement. Tuning with the same folder, model and
            calls goes on from there, also for another target, order or gap.
        progress: Called with the calls done, the calls in all, and what is sampled.

    Returns:
        The policy and the evidence.

    Raises:
        PolicyError: Not exactly one target is given (E402), the calls cannot be recorded (E400, E401, E403), the
            target cannot be reached; the message says what can (E404). The run directory holds results of another
            model (E405), or cannot tell an argument of a call from others (E406).
    """
    targets = {"cost": cost, "speedup": speedup, "psnr": psnr, "psnr_p10": psnr_p10, "quality": quality}
    wanted = {name: value for name, value in targets.items() if value is not None}
    if len(wanted) != 1 or (quality is not None and metric is None):
        stated = ", ".join(f"`{name}`" for name in wanted) or "none"
        raise PolicyError.of(
            "E402",
            f"exactly one target is needed, found {stated}{' without a `metric`' if quality is not None else ''}",
            help=f"one of {', '.join(f'`{n}=`' for n in targets)}; `quality=` is that of a `metric=`",
        )
    training, testing = _split(calls, held_out)
    sampler = Sampler(target, sample, scheduler)
    kept = RunDirectory(run_dir, settings_of(sampler.models, sample or target) if run_dir is not None else {})
    bench = _Bench(sampler, kept, progress, len(training) + len(testing), metric, runs)
    fixed = "it was asked for" if keep_scheduler or reference == "own" else why_fixed(sampler, [*training, *testing])
    against: Reference = reference or ("own" if fixed else "converged")
    notes = [f"the scheduler was kept: {fixed}"] if fixed and not (keep_scheduler or reference == "own") else []
    if against == "converged" and fixed and (reason := why_fixed(sampler, [*training, *testing])):
        raise PolicyError.of("E401", f"no converged run can be sampled: {reason}", help='pass `reference="own"`')
    bases = [own_base(sampler)]
    if against == "converged":
        steps = sampler.steps(training[0])
        assert steps is not None
        found = candidate_bases(sampler, steps)
        bases = [found[0], found[-1]] if fixed else found
    recorded = bench.recorded(training, bases[-1])
    bench.reference(testing, bases[-1])
    evidence = [recorded] if len(bases) == 1 else bench.carried(recorded, bases, training[0])
    if fixed and len(evidence) > 1:
        evidence = evidence[:1]
    (name, value), *_ = wanted.items()
    search = _Search(bench, evidence, order, gap, name, value)
    chosen = search.chosen()
    base = bench.placed(chosen, search.evidence.base)
    made = {"target": f"{name} {value:g}", "cost": chosen.cost, "samples": len(training), "held_out": len(testing)}
    first = search.evidence.outputs[0][0]
    if chosen.predictor.alone:
        models = tuple(first.models[step] for step in chosen.steps)
        first = replace(
            first, models=models, solver=replace(first.solver, scheduler=prepared(sampler, base, training[0]))
        )
        notes.append(f"no cache is best: {base} runs the steps {', '.join(map(str, chosen.steps))} alone")
    text = _policy_text(chosen, base, tuned_statement(first, sampler.models, bench.seen, {**made, **_quality(chosen)}))
    frontier = [point for _, point in sorted(search.frontier.items())]
    return Tuning(
        policy=parse(text, source="<tuned>"),
        text=text,
        chosen=chosen,
        frontier=frontier,
        base=base,
        reference=against,
        model_share=bench.model_share,
        evaluations=bench.evaluations,
        linear=all(weights.linear for weights in search.evidence.weights),
        notes=[*notes, *_few(frontier)],
        compared=functools.partial(compare, target, testing, sample=sample, scheduler=scheduler),
    )


def _few(frontier: Sequence[SchedulePoint]) -> list[str]:
    """Return what a run of few steps can win."""
    if len(frontier[-1].steps) > FEW_STEPS:
        return []
    points = [f"{point.forecast:.0f} dB at a cost of {point.cost:.2f}" for point in frontier if point.cost < 1]
    steps = counted(len(frontier[-1].steps), "call")
    return [f"of {steps}, few can be left out; forecast: {', '.join(points) or 'none'}"]


def _split(
    calls: Sequence[ModelCall], held_out: Sequence[ModelCall] | None
) -> tuple[Sequence[ModelCall], Sequence[ModelCall]]:
    if held_out is None:
        count = max(1, len(calls) // 4)
        calls, held_out = calls[:-count], calls[-count:]
    if not calls or not held_out:
        raise PolicyError.of(
            "E403", "too few calls to record some and to measure others", help="pass 8 or more; 24 is a good number"
        )
    return calls, held_out


# --- the recording ---------------------------------------------------------------------------------------


Frontier = Mapping[int, SchedulePoint]
"""The schedule of each number of computed calls."""


def _frontier(
    evidence: Evidence, predictor: Predictor, problem: PlanningProblem, schedules: Mapping[int, tuple[int, ...]]
) -> Frontier:
    """Return the points of schedules that cost no more than an uncached run."""
    points = {count: _point(evidence, predictor, problem, steps) for count, steps in schedules.items()}
    return {count: point for count, point in points.items() if point.cost <= 1 + 1e-9}


def _planned(evidence: Evidence, predictor: Predictor, gap: int, way: Way) -> Frontier:
    """Return the best schedules of one way to plan."""
    problem = evidence.problem(predictor, gap)
    most = int(evidence.work // min(evidence.rows) + 1e-9)
    plans = plan_steps(way.of(problem), most)
    return _frontier(evidence, predictor, problem, {count: plan.steps for count, plan in plans.items()})


def _even(evidence: Evidence, predictor: Predictor, gap: int) -> Frontier:
    """Return evenly spaced schedules."""
    problem = evidence.problem(predictor, gap)
    calls = problem.calls
    even = {count: tuple(number * calls // count for number in range(count)) for count in range(1, calls + 1)}
    possible = {count: steps for count, steps in even.items() if {*problem.starts} <= {*steps}}
    return _frontier(evidence, predictor, problem, possible)


def _alone(frontier: Frontier) -> Frontier:
    """Return the same schedules, run by the scheduler alone."""
    return {count: replace(point, predictor=replace(point.predictor, alone=True)) for count, point in frontier.items()}


def _predictors(evidence: Evidence, schedules: Sequence[tuple[int, ...]], order: int, gap: int) -> list[Predictor]:
    """Return the predictors whose error is near the lowest one, which comes first.

    Args:
        evidence: What was recorded.
        schedules: Schedules of which the one with the lower error counts.
        order: The highest order.
        gap: The gap limit.
    """
    found = [Predictor(order)]
    if order:
        found += [Predictor(0), *([Predictor(order, "t")] if evidence.uneven else [])]
    if evidence.has_residuals:
        found += [replace(predictor, residual=True) for predictor in found]
    errors = list[float]()
    for predictor in found:
        problem = evidence.problem(predictor, gap)
        errors.append(min(schedule_error(problem, steps) for steps in schedules))
    near = [index for index, error in enumerate(errors) if error <= NEAR * min(errors)]
    return [found[index] for index in sorted(near, key=lambda index: errors[index])][:PREDICTORS]


def _point(evidence: Evidence, predictor: Predictor, problem: PlanningProblem, steps: tuple[int, ...]) -> SchedulePoint:
    error = schedule_error(problem, steps)
    # The error is a mean square per element. Numbers in [-1, 1] span 2, so the square of the peak is 4.
    forecast = 10 * math.log10(4 / error) if error > 0 else math.inf
    return SchedulePoint(steps, evidence.cost(steps), forecast, predictor)


T = TypeVar("T")
_Recording = tuple[Sample, list[OutputRecord], Circumstances]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured of a call: the PSNR of each sample, the metric, and the seconds."""

    psnr: list[float]
    metric: float | None
    seconds: float


_MEASURED: Form[_Measured] = Form(
    lambda made: [made.psnr, made.metric, made.seconds], lambda data: _Measured(data[0], data[1], data[2])
)
_Equations = tuple[torch.Tensor, torch.Tensor]
_EQUATIONS: Form[_Equations] = Form(list, lambda data: (data[0], data[1]))


@dataclass(slots=True)
class _Bench:
    """Samples the calls, and counts what was spent."""

    sampler: Sampler
    kept: RunDirectory
    progress: Progress | None
    total: int
    metric: Metric | None
    runs: float
    evaluations: float = 0.0
    model_share: float = 1.0
    seen: Circumstances = field(default_factory=Circumstances)
    training: list[tuple[ModelCall, Sample]] = field(default_factory=list[tuple[ModelCall, Sample]])
    held_out: list[tuple[ModelCall, Sample]] = field(default_factory=list[tuple[ModelCall, Sample]])
    _done: int = 0
    _longer: float = 1.0
    """The cost of a reference."""
    _seen: dict[tuple[str, str, int], _Measured] = field(default_factory=dict[tuple[str, str, int], _Measured])

    @property
    def left(self) -> float:
        """What may still be spent."""
        return self.runs - self.evaluations

    def recorded(self, calls: Sequence[ModelCall], base: Base) -> Evidence:
        """Record all calls.

        Raises:
            PolicyError: They cannot be recorded (E400), or they differ in their number of steps (E403).
        """
        sampler = self.sampler
        if base.steps is not None:
            self._longer = base.steps / (sampler.steps(calls[0]) or base.steps)
        schedulers = self._schedulers(base)

        def recording(call: ModelCall) -> _Recording:
            samples = list[Sample]()
            with observed(sampler, call) as seen:
                records = record(lambda: samples.append(self._sampled(call, base)), schedulers, sampler.models)
            return samples[0], records, seen

        form: Form[_Recording] = Form(
            lambda made: {"sample": SAMPLE.pack(made[0]), "records": pack_records(made[1]), "seen": asdict(made[2])},
            lambda data: (
                SAMPLE.unpack(data["sample"]),
                unpack_records(data["records"], schedulers),
                Circumstances(**data["seen"]),
            ),
        )
        runs = list[list[OutputRecord]]()
        for call in calls:
            sample, records, self.seen = self._recall(
                "recording", call, base, recording, form, "recording", cost=self._longer
            )
            self.training.append((call, sample))
            runs.append(records)
        lengths = {tuple(len(output.models) for output in run) for run in runs}
        if len(lengths) > 1 or len({*lengths.pop()}) > 1:
            raise PolicyError.of(
                "E403",
                "the calls differ in their number of steps",
                help="pass calls with the same `num_inference_steps`, and tune each number of steps alone",
            )
        outputs = list(zip(*runs, strict=True))
        return Evidence(base, outputs, sum(outputs[0][0].rows) / self._longer)

    def carried(self, recorded: Evidence, bases: Sequence[Base], call: ModelCall) -> list[Evidence]:
        """Return what a recording of the last base tells of all bases.

        Raises:
            PolicyError: The pipeline does not take all of a scheduler's timesteps (E403).
        """
        found = list[Evidence]()
        for base in bases[:-1]:
            found.append(recorded.carried_to(base, prepared(self.sampler, base, call)))
        known = recorded.outputs[0][0].timesteps
        if len(known) != len(prepared(self.sampler, bases[-1], call).timesteps):
            raise PolicyError.of(
                "E403",
                "the calls do not take all timesteps of their scheduler",
                help="pass `keep_scheduler=True`",
            )
        return [*found, recorded]

    def _schedulers(self, base: Base) -> list[Any]:
        return self.sampler.schedulers if base.scheduler is None else [base.scheduler]

    def reference(self, calls: Sequence[ModelCall], base: Base) -> None:
        """Sample the held-out calls uncached."""
        self.held_out = [
            (
                call,
                self._recall(
                    "reference", call, base, lambda c: self._sampled(c, base), SAMPLE, "uncached", cost=self._longer
                ),
            )
            for call in calls
        ]
        uncached = [sampled for _, sampled in self.held_out]
        self.model_share = (
            sum(one.model_seconds for one in uncached) / self._longer / sum(map(self._own_seconds, uncached))
        )

    def _own_seconds(self, sample: Sample) -> float:
        """Return the seconds of an uncached call of the user, from those of a reference."""
        return sample.seconds - sample.model_seconds * (1 - 1 / self._longer)

    def on_recorded(self, point: SchedulePoint, base: Base) -> SchedulePoint:
        """Return a schedule whose forecast is the mean PSNR of as many recorded calls as may be sampled with it."""
        reserved = point.cost * (len(self.held_out) + 1)
        found = list[_Measured]()
        for call in self.training:
            if self._key(point, base, call[0]) not in self._seen and found and self.left < reserved:
                break
            found += self.tried(point, base, [call])
        return replace(point, forecast=_mean_psnr(found))

    def measured(self, point: SchedulePoint, base: Base) -> SchedulePoint:
        """Sample the held-out calls with a schedule."""
        found = self.tried(point, base, self.held_out)
        ratios = _ratios(found)
        metrics = [one.metric for one in found if one.metric is not None]
        cached = sum(one.seconds for one in found)
        return replace(
            point,
            psnr=statistics.fmean(ratios),
            psnr_p10=percentile(ratios, 10),
            psnr_interval=_interval(ratios),
            speedup=sum(self._own_seconds(sample) for _, sample in self.held_out) / cached,
            metric=statistics.fmean(metrics) if metrics else None,
        )

    def best(self, points: Sequence[tuple[SchedulePoint, Base]], *, defaults: int = 0) -> int:
        """Return the index of the best schedule on recorded calls, by successive halving.

        Each round samples `ROUND` more calls with the better half of the schedules that are left.

        Args:
            points: The schedules and their bases.
            defaults: How many of the first schedules are evenly spaced. The best of these is returned unless another
                schedule is clearly better.
        """
        left = [index for index, point in enumerate(points) if point not in points[:index]]
        scores = dict[int, float]()
        default: int | None = None
        end = 0
        while len(left) > 1 and end < len(self.training):
            end = min(end + ROUND, len(self.training))
            if self.left < ROUND * sum(points[index][0].cost for index in left):
                break
            for index in left:
                scores[index] = self.score(self.tried(*points[index], self.training[:end]))
            ranked = sorted(left, key=lambda index: scores[index], reverse=True)
            default = next((index for index in ranked if index < defaults), default)
            left = ranked[: math.ceil(len(left) / 2)]
        first = left[0]
        if default is None or first < defaults:
            return first
        spare = self.left > 2 * DECIDING * (points[first][0].cost + points[default][0].cost)
        gains = self._gains(*points[first], *points[default], self.training[: max(end, DECIDING if spare else 0)])
        return first if _clear(gains) else default

    def _gains(
        self,
        one: SchedulePoint,
        base: Base,
        two: SchedulePoint,
        of_two: Base,
        calls: Sequence[tuple[ModelCall, Sample]],
    ) -> list[float]:
        """Return by how much the first schedule is better than the second one, for each call."""
        pairs = zip(self.tried(one, base, calls), self.tried(two, of_two, calls), strict=True)
        return [self.score([first]) - self.score([second]) for first, second in pairs]

    def score(self, found: Sequence[_Measured]) -> float:
        """Return the number by which schedules are compared."""
        if self.metric is not None:
            return statistics.fmean(one.metric or 0.0 for one in found)
        ratios = _ratios(found)
        return statistics.fmean(ratios) + (percentile(ratios, 10) if len(ratios) >= FEW_SAMPLES else 0.0)

    def tried(self, point: SchedulePoint, base: Base, calls: Sequence[tuple[ModelCall, Sample]]) -> list[_Measured]:
        """Sample calls with a schedule."""
        found = list[_Measured]()
        # Where no policy is needed, the scheduler has the steps.
        rule = None if point.predictor.alone else _rule(point)
        placed = self.placed(point, base)
        for call, reference in calls:

            def measure(call: ModelCall, reference: Sample = reference) -> _Measured:
                sampled = self._sampled(call, placed, rule)
                metric = None if self.metric is None else float(self.metric(reference.pictures, sampled.pictures))
                return _Measured(each_psnr(reference.pictures, sampled.pictures), metric, sampled.seconds)

            key = self._key(point, base, call)
            if key not in self._seen:
                self.total += 1
                label = f"{len(point.steps)} computed"
                self._seen[key] = self._recall(
                    "measured", call, base, measure, _MEASURED, label, policy=key[0], cost=point.cost
                )
            found.append(self._seen[key])
        return found

    def may_run_alone(self, base: Base) -> bool:
        """Return whether the scheduler of a base is worth running on a few steps: a multi-step solver that can be."""
        scheduler = self.sampler.scheduler if base.scheduler is None else base.scheduler
        # Solvers of order 1 are far from converged on few steps.
        order = getattr(getattr(scheduler, "config", None), "solver_order", 1)
        return base.steps is not None and order > 1 and runs_alone(self.sampler, base, (0,)) is not None

    def _key(self, point: SchedulePoint, base: Base, call: ModelCall) -> tuple[str, str, int]:
        return f"only {point.steps}" if point.predictor.alone else _rule(point), str(base), id(call)

    def placed(self, point: SchedulePoint, base: Base) -> Base:
        """Return what a schedule is sampled on: the base, or one whose scheduler runs its steps alone."""
        made = runs_alone(self.sampler, base, point.steps) if point.predictor.alone else base
        assert made is not None
        return made

    def fitted(self, point: SchedulePoint, evidence: Evidence) -> SchedulePoint:
        """Return the schedule with scales of the extrapolation that bring the results nearer to the references.

        The effect of each scale on the result is measured by changing it. The sum of the squared errors, each relative
        to that of its call, is then a quadratic function of the scales, whose minimum is near those of the recorded
        calls. The scales are kept if they are better on calls to which they were not fitted.
        """
        calls, base = len(evidence.rows), evidence.base
        bins = [_bin(step, calls) for step in range(calls)]
        free = sorted({bins[step] for step in range(point.steps[0] + 1, calls) if step not in point.steps})
        distinct = len({*evidence.outputs[0][0].timesteps}) == calls
        reserved = point.cost * (len(self.held_out) + DECIDING + 1)
        count = min(len(self.training) - 1, int((self.left - reserved) / (point.cost * (len(free) + 1))))
        if point.predictor.alone or not free or not distinct or count < FEWEST_FITTED:
            return point
        # Reuse is an extrapolation whose scales are 0.
        plain = float(point.predictor.order > 0)
        start = replace(
            point,
            predictor=replace(point.predictor, order=max(1, point.predictor.order)),
            scales=(plain,) * (bins[-1] + 1),
            # A denoiser alone does not know the number of steps, by which `scales[step]` is read.
            index="step" if is_pipeline(self.sampler.target) else f"floor(step * {bins[-1]} / {calls - 1} + 0.5)",
        )

        def equations(call: ModelCall, reference: Sample) -> _Equations:
            def pictures(scales: tuple[float, ...]) -> torch.Tensor:
                rule = _rule(replace(start, scales=scales))
                return self._sampled(call, base, rule).pictures.double().flatten()

            before = pictures(start.scales)
            moved = [tuple(at + NUDGE * (place == one) for place, at in enumerate(start.scales)) for one in free]
            effects = torch.stack([(pictures(scales) - before) / NUDGE for scales in moved])
            error = reference.pictures.double().flatten() - before
            size = error.square().sum().clamp(min=1e-12)
            return effects @ effects.T / size, effects @ error / size

        self.total += count
        found = [
            self._recall(
                "fit",
                call,
                base,
                lambda call, reference=reference: equations(call, reference),
                _EQUATIONS,
                "fitting scales",
                policy=_rule(point),
                cost=point.cost * (len(free) + 1),
            )
            for call, reference in self.training[-count:]
        ]
        matrix, vector = (torch.stack(part).sum(0) for part in zip(*found, strict=True))
        diagonal = matrix.diagonal().clamp(min=1e-12)
        change = torch.linalg.solve(matrix + RIDGE * torch.diag(diagonal), vector).tolist()
        # Two shares of the change and the schedule itself are compared.
        spare = self.left > point.cost * (len(self.held_out) + 3 * DECIDING)
        others = self.training[: max(DECIDING // 2, len(self.training) - count)][: DECIDING if spare else DECIDING // 2]
        # The effects are those of small changes, so that a half of a large change may be better than all of it.
        best = max(
            (
                replace(start, scales=_moved(start.scales, dict(zip(free, change, strict=True)), share))
                for share in (1.0, 0.5)
            ),
            key=lambda scaled: self.score(self.tried(scaled, base, others)),
        )
        gains = self._gains(best, base, point, base, others)
        return best if _clear(gains) else point

    def _sampled(self, call: ModelCall, base: Base, rule: str | None = None) -> Sample:
        """Sample a call on a base, with a policy or without."""
        with self.sampler.on(base.scheduler, base.steps, call) as arguments:
            if rule is None:
                return self.sampler(arguments)
            with apply(self.sampler.target, parse(rule), trace=False):
                return self.sampler(arguments)

    def _recall(
        self,
        kind: str,
        call: ModelCall,
        base: Base,
        produce: Callable[[ModelCall], T],
        form: Form[T],
        label: str,
        *,
        policy: str = "",
        cost: float = 1.0,
    ) -> T:
        """Sample a call, or take what an earlier run kept of it, which counts as spent too."""
        key = [
            scheduler_key(self._schedulers(base)),
            {**call, **({} if base.steps is None else {STEPS: base.steps})},
            policy,
        ]
        result = self.kept.recall(kind, key, lambda: produce(call), form)
        self.evaluations += cost
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, max(self.total, self._done), label)
        return result


def _moved(scales: Sequence[float], change: Mapping[int, float], share: float) -> tuple[float, ...]:
    """Return scales with a share of a change, within 0 to 4."""
    return tuple(round(min(max(at + share * change.get(place, 0.0), 0.0), 4.0), 2) for place, at in enumerate(scales))


def _clear(gains: Sequence[float]) -> bool:
    """Return whether the mean gain is above its standard error."""
    if len(gains) < 2:
        return gains[0] > 0
    return statistics.fmean(gains) > statistics.stdev(gains) / math.sqrt(len(gains))


def _ratios(found: Sequence[_Measured]) -> list[float]:
    return [ratio for one in found for ratio in one.psnr]


def _mean_psnr(found: Sequence[_Measured]) -> float:
    return statistics.fmean(_ratios(found))


def _bin(step: int, calls: int) -> int:
    """Return the index at which a table of scales is read at a step."""
    count = max(1, min(SCALES, calls // 4))
    return math.floor(step * (count - 1) / (calls - 1) + 0.5) if calls > 1 else 0


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean, by Student's distribution; None of fewer than two values."""
    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        return None
    # The quantile of 97.5 % in Hill's expansion around that of the normal distribution, within 1 % from 3 degrees on.
    z, free = 1.959964, count - 1
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    quantile = exact.get(free) or z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    mean, half = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half


# --- the search ------------------------------------------------------------------------------------------


class _Search:
    """Finds the cheapest point that meets a target, by few measurements."""

    def __init__(
        self, bench: _Bench, evidence: Sequence[Evidence], order: int, gap: int, name: str, target: float
    ) -> None:
        self.evidence = evidence[0]
        self.frontier: Frontier = {}
        self._bench = bench
        self._all = evidence
        self._order = order
        self._gap = gap
        self._name = name
        self._target = target

    def chosen(self) -> SchedulePoint:
        """Return the measured point.

        Raises:
            PolicyError: No point meets the target (E404).
        """
        predictor = Predictor(self._order)
        frontiers = [_planned(one, predictor, self._gap_of(one), WAYS[0]) for one in self._all]
        self.frontier = frontiers[0]
        count = self._first_guess()
        options = [(one, frontier) for one, frontier in zip(self._all, frontiers, strict=True) if count in frontier]
        options += [(one, _alone(frontier)) for one, frontier in options if self._bench.may_run_alone(one.base)]
        pairs = [(frontier[count], one.base) for one, frontier in options]
        self.evidence, self.frontier = options[self._bench.best(pairs)]
        alone = self.frontier[count].predictor.alone
        gap = self._gap_of(self.evidence)
        even = _even(self.evidence, predictor, gap)
        schedules = [frontier[count].steps for frontier in (self.frontier, even) if count in frontier]
        first, *others = [predictor] if alone else _predictors(self.evidence, schedules, self._order, gap)
        # No way to weigh the errors is the best for all models: an early error is enlarged by some and corrected by
        # others. How errors of neighbouring calls add up differs between schedulers, so that the recording does not
        # tell which of two near predictors is better. Both are measured.
        ways = [_planned(self.evidence, first, gap, way) for way in WAYS]
        ways += [_planned(self.evidence, other, gap, WAYS[0]) for other in others]
        evens = [_even(self.evidence, each, gap) for each in (first, *others)]
        ways, evens = (
            [_alone(frontier) if alone else frontier for frontier in group if count in frontier]
            for group in (ways, evens)
        )
        self.frontier = ways[0]
        ways = [*evens, *ways]
        pairs = [(frontier[count], self.evidence.base) for frontier in ways]
        best = self._bench.best(pairs, defaults=len(evens))
        # The even schedules may lack some counts, for which those of the first way are taken.
        self.frontier = {**self.frontier, **ways[best]}
        self._adjust(self.frontier[count])
        if self._name != "cost":
            count = self._bisected(self._first_guess())
        point = self._bench.fitted(self.frontier[count], self.evidence)
        return self._bench.measured(self._bench.on_recorded(point, self.evidence.base), self.evidence.base)

    def _gap_of(self, evidence: Evidence) -> int:
        return max(1, round(self._gap * len(evidence.rows) / len(self._all[0].rows)))

    def _adjust(self, point: SchedulePoint) -> None:
        """Add to all forecasts what the recorded calls have shown to be missing."""
        found = self._bench.tried(point, self.evidence.base, self._bench.training[: DECIDING // 2])
        offset = _mean_psnr(found) - point.forecast
        if math.isfinite(offset):
            self.frontier = {
                count: replace(one, forecast=one.forecast + offset) for count, one in self.frontier.items()
            }

    def _bisected(self, guess: int) -> int:
        """Bisect on the number of computed calls: more of them are nearer to the reference, and slower."""
        counts = sorted(self.frontier)
        points = [self.frontier[count] for count in counts]
        middle = counts.index(guess)
        low, high, reached, best = 0, len(points) - 1, None, None
        for number in range(MOST_RUNS):
            if number and self._bench.left < 2 * points[middle].cost * len(self._bench.held_out):
                break
            point = self._bench.measured(points[middle], self.evidence.base)
            best = point if best is None or self._value(point) > self._value(best) else best
            meets = self._value(point) >= self._target
            reached = counts[middle] if meets else reached
            if meets == (self._name == "speedup"):
                low = middle + 1
            else:
                high = middle - 1
            if low > high:
                break
            middle = (low + high) // 2
        if reached is None:
            assert best is not None
            share = f"the denoiser takes {self._bench.model_share:.0%} of an uncached call; ask for less"
            unit = {"speedup": "x", "quality": ""}.get(self._name, " dB")
            raise PolicyError.of(
                "E404",
                f"`{self._name}` {self._target:g}{unit} was not reached: the best of the measured schedules has "
                f"{self._value(best):.3g}{unit} at a cost of {best.cost:.3g}",
                help=share if self._name == "speedup" else "ask for less",
            )
        return reached

    def _value(self, point: SchedulePoint) -> float:
        values = {"speedup": point.speedup, "psnr": point.psnr, "psnr_p10": point.psnr_p10, "quality": point.metric}
        value = values[self._name]
        assert value is not None
        return value

    def _first_guess(self) -> int:
        """Return the count that the cost, the forecast or the denoiser's share of the time suggests.

        Raises:
            PolicyError: No schedule is as cheap as the target (E404).
        """
        counts = sorted(self.frontier)
        points = [self.frontier[count] for count in counts]
        if self._name in ("psnr", "psnr_p10"):
            enough = [count for count, point in zip(counts, points, strict=True) if point.forecast >= self._target]
            return enough[0] if enough else counts[-1]
        if self._name == "quality":
            return counts[len(counts) // 2]
        share = self._bench.model_share
        cost = self._target if self._name == "cost" else (1 / self._target - (1 - share)) / share
        within = [count for count, point in zip(counts, points, strict=True) if point.cost <= cost + 1e-9]
        if not within and self._name == "cost":
            raise PolicyError.of(
                "E404",
                f"a cost of {cost:g} is out of reach: the least is {points[0].cost:.3g}",
                help="raise `gap` or the cost",
            )
        return within[-1] if within else counts[0]


# --- the policy ------------------------------------------------------------------------------------------


def _rule(point: SchedulePoint) -> str:
    """Return the rule of a schedule, and the table of its scales before it."""
    numbers = ", ".join(str(step) for step in point.steps)
    table = f"table scales = [{', '.join(f'{scale:g}' for scale in point.scales)}]\n" if point.scales else ""
    scale = f", scale: scales[{point.index}]" if point.scales else ""
    along = "" if point.predictor.along == "step" else f', along: "{point.predictor.along}"'
    order = point.predictor.order
    answer = f"predict taylor(order: {order}{scale}{along})" if order else "reuse"
    residual = "" if not point.predictor.residual else " of residual" if order else " residual"
    return f"{table}match model on {{{numbers}}} -> {answer}{residual}\n"


def _quality(point: SchedulePoint) -> dict[str, float]:
    """Return the forecast and the measured quality of a schedule. All are infinite where every call is computed."""
    values = {"forecast": point.forecast, "psnr": point.psnr, "psnr_p10": point.psnr_p10}
    return {name: value for name, value in values.items() if value is not None}


def _policy_text(point: SchedulePoint, base: Base, tuned: Tuned) -> str:
    """Return the policy with an expectation of its schedule, and with what it was tuned for."""
    row = " ".join("C" if _computes(point, call) else "R" for call in range(tuned.steps))
    steps = base.steps
    note = "" if steps is None else f"# for {base}: call the pipeline with {STEPS}={steps}\n"
    rule = _rule(point)
    if point.predictor.alone:
        numbers = ", ".join(map(str, point.steps))
        note += f"# No cache is best: the scheduler runs its steps {numbers} alone.\n"
        rule = "match model -> compute\n"
    text = f"""\
{note}policy tuned
{rule}
expect model over {tuned.steps} steps: {row}
{format_node(tuned)}
"""
    return format_policy(parse(text))


def _computes(point: SchedulePoint, call: int) -> bool:
    """Return whether a call of a trajectory is computed."""
    return point.predictor.alone or call in point.steps
