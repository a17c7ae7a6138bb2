# diffusers comes without complete types.
# pyright: basic
"""`tune`: finds the policy of a model for a target, from recorded uncached runs."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from cachepolicy.engine.run import apply
from cachepolicy.errors import PolicyError
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.formatter import format_node
from cachepolicy.language.ir import Policy, Tuned
from cachepolicy.language.parser import parse
from cachepolicy.tools.quality import each_psnr, percentile
from cachepolicy.tools.sampling import Progress, Sample
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
from cachepolicy.tuning.sampling import ModelCall, SampleFunction, Sampler
from cachepolicy.tuning.solver import SolverWeights, solver_weights

MOST_RUNS = 6
"""Most schedules that are sampled to reach a target of quality or speed."""
ROUND = 2
"""Recorded calls that each round of the choice between schedules samples."""
WAYS = ((1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (1.0, 1.0))
"""The ways to plan: by how much an error of the first call weighs more than one of the last, and the coherence."""


@dataclass(frozen=True, slots=True)
class SchedulePoint:
    """A schedule, and what is known of it.

    Args:
        steps: The computed calls of the trajectory.
        cost: Their share of all calls, and thereby of the denoiser's FLOPs.
        forecast: The PSNR in dB that the recording forecasts, infinite where every call is computed.
        psnr: The measured mean PSNR in dB over the held-out samples, None where it was not sampled.
        psnr_p10: The 10th percentile of the same, None where it was not sampled.
        speedup: Seconds of the uncached calls over those with the policy, whole calls, None where it was not sampled.
    """

    steps: tuple[int, ...]
    cost: float
    forecast: float
    psnr: float | None = None
    psnr_p10: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """What `tune` found.

    Args:
        policy: The policy that meets the target.
        text: Its text, with where it comes from.
        chosen: Its point.
        frontier: The best schedule for each number of computed calls, the cheapest first.
        model_share: The denoisers' share of the seconds of an uncached call.
        evaluations: Sampling runs' worth of model calls that were spent, recordings included.
        linear: True if the scheduler is linear, so that the weights of its steps hold for every trajectory.
    """

    policy: Policy
    text: str
    chosen: SchedulePoint
    frontier: Sequence[SchedulePoint]
    model_share: float
    evaluations: float
    linear: bool

    def save(self, path: str) -> None:
        """Write the policy file.

        Args:
            path: Where to write.

        Raises:
            OSError: It cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.text)


def tune(  # noqa: PLR0913 (one target of four, and how to sample)
    target: Any,
    calls: Sequence[ModelCall],
    *,
    cost: float | None = None,
    speedup: float | None = None,
    psnr: float | None = None,
    psnr_p10: float | None = None,
    held_out: Sequence[ModelCall] | None = None,
    sample: SampleFunction | None = None,
    scheduler: Any = None,
    order: int = 1,
    gap: int = 9,
    run_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Find the schedule of computed calls that meets a target with the least error.

    The calls are sampled uncached and what reaches the scheduler is recorded as inner products. A dynamic program then
    finds the best schedule for each cost, where skipped calls are extrapolated (`predict taylor`). Few schedules are
    sampled with the policy, on calls that were not recorded, to measure what the target asks for.

    Args:
        target: A diffusers pipeline without a policy, or a denoiser.
        calls: Keyword arguments of each call. Each needs its own `generator`, so that it can be repeated.
        cost: Target: largest share of the denoiser's calls that are computed, 0 to 1.
        speedup: Target: how many times as fast a whole call gets, as timed; 1 or more.
        psnr: Target: mean PSNR in dB of the held-out samples against the uncached ones.
        psnr_p10: Target: 10th percentile of the same.
        held_out: Calls to measure on. By default the last quarter of `calls` (at least one) is not recorded.
        sample: Samples once from the arguments of a call, see `Sampler`. Required for a denoiser.
        scheduler: The scheduler that `sample` steps. Required for a denoiser.
        order: Order of the extrapolation, 0 to 3.
        gap: Most calls between two computed ones, plus 1.
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
    targets = {"cost": cost, "speedup": speedup, "psnr": psnr, "psnr_p10": psnr_p10}
    wanted = {name: value for name, value in targets.items() if value is not None}
    if len(wanted) != 1:
        stated = ", ".join(f"`{name}`" for name in wanted) or "none"
        raise PolicyError.of(
            "E402",
            f"exactly one target is needed, found {stated}",
            help=f"one of {', '.join(f'`{n}=`' for n in targets)}",
        )
    training, testing = _split(calls, held_out)
    sampler = Sampler(target, sample, scheduler)
    kept = RunDirectory(run_dir, settings_of(sampler.models, sample or target) if run_dir is not None else {})
    bench = _Bench(sampler, kept, progress, len(training) + len(testing))
    evidence = bench.recorded(training)
    bench.reference(testing)
    (name, value), *_ = wanted.items()
    search = _Search(bench, _frontiers(evidence, order, gap), order, name, value)
    chosen = search.chosen()
    found = {"target": f"{name} {value:g}", "cost": chosen.cost, "samples": len(training), "held_out": len(testing)}
    tuned = tuned_statement(evidence.outputs[0][0], sampler.models, evidence.seen, {**found, **_quality(chosen)})
    text = _policy_text(chosen, evidence, order, tuned)
    return Tuning(
        policy=parse(text, source="<tuned>"),
        text=text,
        chosen=chosen,
        frontier=[point for _, point in sorted(search.frontier.items())],
        model_share=bench.model_share,
        evaluations=bench.evaluations,
        linear=all(weights.linear for weights in evidence.weights),
    )


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


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Recorded runs: the records of each output over the runs, and the weights of its solver."""

    outputs: Sequence[Sequence[OutputRecord]]
    weights: Sequence[SolverWeights]
    seen: Circumstances

    def problem(self, order: int, gap: int) -> PlanningProblem:
        """Return what is planned: the means over the runs."""
        outputs = list[Recorded]()
        for records, weights in zip(self.outputs, self.weights, strict=True):
            gram = torch.stack([one.gram for one in records]).mean(0)
            scale = torch.tensor([one.scale for one in records], dtype=torch.float64).mean(0)
            outputs.append(Recorded(gram.tolist(), weights.error_weights(scale.tolist())))
        return PlanningProblem(outputs, order, gap, self.outputs[0][0].starts)


Frontier = Mapping[int, SchedulePoint]
"""The schedule of each number of computed calls."""


def _frontiers(evidence: _Evidence, order: int, gap: int) -> list[Frontier]:
    """Return schedules that are planned in different ways.

    No way to add up the errors is the best for all models: an early error is enlarged by some and corrected by others,
    and errors of one gap are more or less alike. Which way suits the model is measured. Evenly spaced schedules are
    among the candidates, so that the result is not worse than they are on the calls that are measured.
    """
    problem = evidence.problem(order, gap)
    problems = [replace(problem, outputs=_early(problem.outputs, by), coherence=c) for by, c in WAYS]
    planned = [{count: plan.steps for count, plan in plan_steps(one).items()} for one in problems]
    even = {count: tuple(number * problem.calls // count for number in range(count)) for count in planned[0]}
    possible = {count: steps for count, steps in even.items() if {*problem.starts} <= {*steps}}
    return [{count: _point(problem, steps) for count, steps in schedules.items()} for schedules in (*planned, possible)]


def _early(outputs: Sequence[Recorded], by: float) -> list[Recorded]:
    """Return the outputs with the weights falling by a factor over the trajectory."""
    return [
        Recorded(one.gram, [weight * by ** (1 - call / len(one.weights)) for call, weight in enumerate(one.weights)])
        for one in outputs
    ]


def _point(problem: PlanningProblem, steps: tuple[int, ...]) -> SchedulePoint:
    error = schedule_error(problem, steps)
    # The error is a mean square per element. Numbers in [-1, 1] span 2, so the square of the peak is 4.
    forecast = 10 * math.log10(4 / error) if error > 0 else math.inf
    return SchedulePoint(steps, len(steps) / problem.calls, forecast)


T = TypeVar("T")
_Recording = tuple[Sample, list[OutputRecord], Circumstances]
_Measured = tuple[list[float], float]
"""The PSNR of each sample of a call, and its seconds."""
_MEASURED: Form[_Measured] = Form(list, lambda data: (data[0], data[1]))


class _Bench:
    """Samples the calls, and counts what was spent."""

    def __init__(self, sampler: Sampler, kept: RunDirectory, progress: Progress | None, total: int) -> None:
        self.evaluations = 0.0
        self.model_share = 1.0
        self._sampler = sampler
        self._kept = kept
        self._progress = progress
        self._done, self._total = 0, total
        self._training = list[tuple[ModelCall, Sample]]()
        self._held_out = list[tuple[ModelCall, Sample]]()

    def recorded(self, calls: Sequence[ModelCall]) -> _Evidence:
        """Record all calls.

        Raises:
            PolicyError: They cannot be recorded (E400), or they differ in their number of steps (E403).
        """
        runs, seen = list[list[OutputRecord]](), Circumstances()
        for call in calls:
            sample, records, seen = self._recall("recording", call, self._record, self._recording_form, "recording")
            self._training.append((call, sample))
            runs.append(records)
        lengths = {tuple(len(output.models) for output in run) for run in runs}
        if len(lengths) > 1 or len({*lengths.pop()}) > 1:
            raise PolicyError.of(
                "E403",
                "the calls differ in their number of steps",
                help="pass calls with the same `num_inference_steps`, and tune each number of steps alone",
            )
        outputs = list(zip(*runs, strict=True))
        weights = [solver_weights(records[0].solver) for records in outputs]
        return _Evidence(outputs, weights, seen)

    def reference(self, calls: Sequence[ModelCall]) -> None:
        """Sample the held-out calls uncached."""
        self._held_out = [(call, self._recall("reference", call, self._sampler, SAMPLE, "uncached")) for call in calls]
        uncached = [sampled for _, sampled in self._held_out]
        self.model_share = sum(one.model_seconds for one in uncached) / sum(one.seconds for one in uncached)

    def measured(self, point: SchedulePoint, order: int) -> SchedulePoint:
        """Sample the held-out calls with a schedule."""
        ratios, speedup = self._with(point, order, self._held_out)
        return replace(point, psnr=statistics.fmean(ratios), psnr_p10=percentile(ratios, 10), speedup=speedup)

    def best(self, points: Sequence[SchedulePoint], order: int) -> int:
        """Return the index of the best schedule on recorded calls, by successive halving.

        Each round samples `ROUND` more calls with the better half of the schedules that are left.
        """
        ratios: dict[int, list[float]] = {
            index: [] for index, point in enumerate(points) if point not in points[:index]
        }

        def score(index: int) -> float:
            return statistics.fmean(ratios[index]) + percentile(ratios[index], 10)

        begin = 0
        while len(ratios) > 1 and begin < len(self._training):
            for index in ratios:
                ratios[index] += self._with(points[index], order, self._training[begin : begin + ROUND])[0]
            kept = sorted(ratios, key=score, reverse=True)[: math.ceil(len(ratios) / 2)]
            ratios = {index: ratios[index] for index in kept}
            begin += ROUND
        return next(iter(ratios))

    def _with(
        self, point: SchedulePoint, order: int, calls: Sequence[tuple[ModelCall, Sample]]
    ) -> tuple[list[float], float]:
        """Sample with a schedule, and return the PSNR of each sample and the speed-up."""
        self._total += len(calls)
        ratios, uncached, cached = list[float](), 0.0, 0.0
        rule = _rule(point.steps, order)
        with apply(self._sampler.target, parse(rule), trace=False):
            for call, reference in calls:

                def measure(call: ModelCall, reference: Sample = reference) -> _Measured:
                    sampled = self._sampler(call)
                    return each_psnr(reference.pictures, sampled.pictures), sampled.seconds

                label = f"{len(point.steps)} computed"
                psnr, seconds = self._recall("measured", call, measure, _MEASURED, label, policy=rule, cost=point.cost)
                ratios += psnr
                uncached, cached = uncached + reference.seconds, cached + seconds
        return ratios, uncached / cached

    def _record(self, call: ModelCall) -> _Recording:
        samples, sampler = list[Sample](), self._sampler
        with observed(sampler.target, sampler.models[0]) as seen:
            records = record(lambda: samples.append(sampler(call)), sampler.schedulers, sampler.models)
        return samples[0], records, seen

    @property
    def _recording_form(self) -> Form[_Recording]:
        return Form(
            lambda made: {
                "sample": SAMPLE.pack(made[0]),
                "records": pack_records(made[1]),
                "seen": asdict(made[2]),
            },
            lambda data: (
                SAMPLE.unpack(data["sample"]),
                unpack_records(data["records"], self._sampler.schedulers),
                Circumstances(**data["seen"]),
            ),
        )

    def _recall(
        self,
        kind: str,
        call: ModelCall,
        produce: Callable[[ModelCall], T],
        form: Form[T],
        label: str,
        *,
        policy: str = "",
        cost: float = 1.0,
    ) -> T:
        """Sample a call, or take what an earlier run kept of it, which counts as spent too."""
        key = [scheduler_key(self._sampler.schedulers), call, policy]
        result = self._kept.recall(kind, key, lambda: produce(call), form)
        self.evaluations += cost
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, label)
        return result


# --- the search ------------------------------------------------------------------------------------------


class _Search:
    """Finds the cheapest point that meets a target, by few measurements."""

    def __init__(self, bench: _Bench, frontiers: Sequence[Frontier], order: int, name: str, target: float) -> None:
        self.frontier = frontiers[0]
        self._bench = bench
        self._frontiers = frontiers
        self._order = order
        self._name = name
        self._target = target

    def chosen(self) -> SchedulePoint:
        """Return the measured point.

        Raises:
            PolicyError: No point meets the target (E404).
        """
        counts = sorted(self.frontier)
        guess = self._first_guess(counts)
        ways = [index for index, frontier in enumerate(self._frontiers) if counts[guess] in frontier]
        best = self._bench.best([self._frontiers[index][counts[guess]] for index in ways], self._order)
        # The even schedules may lack some counts, for which those of the first way are taken.
        self.frontier = {**self.frontier, **self._frontiers[ways[best]]}
        if self._name == "cost":
            return self._bench.measured(self.frontier[counts[guess]], self._order)
        return self._bisected([self.frontier[count] for count in counts], guess)

    def _bisected(self, points: Sequence[SchedulePoint], middle: int) -> SchedulePoint:
        """Bisect on the number of computed calls: more of them are nearer to the uncached run, and slower."""
        low, high, reached, best = 0, len(points) - 1, None, None
        for _ in range(MOST_RUNS):
            point = self._bench.measured(points[middle], self._order)
            best = point if best is None or self._value(point) > self._value(best) else best
            meets = self._value(point) >= self._target
            reached = point if meets else reached
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
            unit, help = ("x", share) if self._name == "speedup" else (" dB", "ask for less")
            raise PolicyError.of(
                "E404",
                f"`{self._name}` {self._target:g}{unit} was not reached: the best of the measured schedules has "
                f"{self._value(best):.3g}{unit} at a cost of {best.cost:.3g}",
                help=help,
            )
        return reached

    def _value(self, point: SchedulePoint) -> float:
        value = {"speedup": point.speedup, "psnr": point.psnr, "psnr_p10": point.psnr_p10}[self._name]
        assert value is not None
        return value

    def _first_guess(self, counts: Sequence[int]) -> int:
        """Return the index of the count that the cost, the forecast or the denoiser's share of the time suggests.

        Raises:
            PolicyError: No schedule is as cheap as the target (E404).
        """
        points = [self.frontier[count] for count in counts]
        if self._name in ("psnr", "psnr_p10"):
            enough = [index for index, point in enumerate(points) if point.forecast >= self._target]
            return enough[0] if enough else len(points) - 1
        share = self._bench.model_share
        cost = self._target if self._name == "cost" else (1 / self._target - (1 - share)) / share
        within = [index for index, point in enumerate(points) if point.cost <= cost + 1e-9]
        if not within and self._name == "cost":
            raise PolicyError.of(
                "E404",
                f"a cost of {cost:g} is out of reach: the least is {points[0].cost:.3g}",
                help="raise `gap` or the cost",
            )
        return within[-1] if within else 0


# --- the policy ------------------------------------------------------------------------------------------


def _rule(steps: Sequence[int], order: int) -> str:
    numbers = ", ".join(str(step) for step in steps)
    return f"match model on {{{numbers}}} -> {'predict taylor(order: ' + str(order) + ')' if order else 'reuse'}\n"


def _quality(point: SchedulePoint) -> dict[str, float]:
    """Return the forecast and the measured quality of a schedule. All are infinite where every call is computed."""
    values = {"forecast": point.forecast, "psnr": point.psnr, "psnr_p10": point.psnr_p10}
    return {name: value for name, value in values.items() if value is not None}


def _policy_text(point: SchedulePoint, evidence: _Evidence, order: int, tuned: Tuned) -> str:
    """Return the policy with an expectation of its schedule, and with what it was tuned for."""
    calls = len(evidence.outputs[0][0].models)
    row = " ".join("C" if call in point.steps else "R" for call in range(calls))
    text = f"""\
policy tuned
{_rule(point.steps, order)}
expect model over {calls} steps: {row}
{format_node(tuned)}
"""
    return format_policy(parse(text))
