# diffusers comes without complete types.
# pyright: basic
"""Tunes the threshold of a policy that decides by a signal, such as First Block Cache."""

from __future__ import annotations

import functools
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np

from cachepolicy.engine.apply import apply
from cachepolicy.engine.run import Run
from cachepolicy.errors import PolicyError, suggestion
from cachepolicy.language import ir
from cachepolicy.language.evaluate import constant
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.linker import load, resolve
from cachepolicy.language.parser import parse
from cachepolicy.language.traversal import names_in
from cachepolicy.planning.bind import bind
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import Decision, Tick
from cachepolicy.planning.simulation import MeasuredNumbers, replay
from cachepolicy.planning.tally import tally
from cachepolicy.tools.quality import each_psnr, percentile
from cachepolicy.tools.sampling import Progress, Sample
from cachepolicy.tuning.compare import compare
from cachepolicy.tuning.found_policy import MeasuredPolicy
from cachepolicy.tuning.provenance import Circumstances, observed, statement
from cachepolicy.tuning.run_directory import SAMPLE, Form, RunDirectory, scheduler_key, settings_of
from cachepolicy.tuning.sampling import ModelCall, SampleFunction, Sampler

MOST_RUNS = 8
"""Most thresholds that are sampled."""
RECORDED = 2
"""Most calls whose signals are recorded."""
_GRID = 96
"""Thresholds of which the cost is simulated."""
_BEYOND = 1.3
"""Ratio of the thresholds above those of the recording, since drift grows with the steps after a compute."""
_NEAR = 1.03
"""Ratio of two thresholds between which no other one is tried."""


@dataclass(frozen=True, slots=True)
class ThresholdPoint:
    """A threshold, and what is known of it.

    Args:
        value: The threshold.
        forecast: The share of the calls of the policy's sites that are computed, by the recorded signals; None beyond
            what they show.
        cost: The same as measured on the held-out calls, None where it was not sampled.
        psnr: The mean PSNR in dB over the held-out samples, None where it was not sampled.
        psnr_p10: The 10th percentile of the same, None where it was not sampled.
        speedup: Seconds of the uncached calls over those with the policy, None where it was not sampled.
    """

    value: float
    forecast: float | None
    cost: float | None = None
    psnr: float | None = None
    psnr_p10: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, slots=True)
class ThresholdTuning(MeasuredPolicy):
    """What `tune_threshold` found.

    Args:
        policy: The policy, whose default meets the target.
        text: Its text.
        param: The name of its threshold.
        chosen: The point.
        measured: All measured points, the smallest threshold first.
        evaluations: Sampling runs' worth of calls of the sites that were spent.
        settings: The values of its other params.
        compared: Compares variants on the held-out calls, as `cachepolicy.compare` does.
    """

    param: str
    chosen: ThresholdPoint
    measured: Sequence[ThresholdPoint]
    evaluations: float


def tune_threshold(  # noqa: PLR0913 (one target of four, and how to sample)
    target: Any,
    calls: Sequence[ModelCall],
    policy: str | os.PathLike[str] | ir.Policy,
    *,
    param: str | None = None,
    settings: Mapping[str, Any] | None = None,
    cost: float | None = None,
    speedup: float | None = None,
    psnr: float | None = None,
    psnr_p10: float | None = None,
    held_out: Sequence[ModelCall],
    sample: SampleFunction | None = None,
    scheduler: Any = None,
    run_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ThresholdTuning:
    """Find the threshold with which a policy meets a target.

    The signals of a few uncached runs are recorded, and the policy is replayed on them with many thresholds. One
    threshold is kept for each share of skipped calls. A bisection over these measures the held-out calls.

    Args:
        target: A diffusers pipeline without a policy, or a denoiser.
        calls: Keyword arguments of the calls that are recorded; the first two are used.
        policy: The policy: a shipped name, a path, or a `Policy`.
        param: The param that is the threshold. By default the only `float` param that a `while` reads.
        settings: Values of its other params.
        cost: Target: largest share of the calls of the policy's sites that are computed, 0 to 1.
        speedup: Target: how many times as fast a whole call gets, as timed; 1 or more.
        psnr: Target: mean PSNR in dB of the held-out samples against the uncached ones.
        psnr_p10: Target: 10th percentile of the same.
        held_out: Calls to measure on.
        sample: Samples once from the arguments of a call, see `tune`. Required for a denoiser.
        scheduler: The scheduler that `sample` steps. Required for a denoiser.
        run_dir: A folder that keeps what was sampled, as that of `tune`.
        progress: Called with the calls done, the calls in all, and what is sampled.

    Returns:
        The policy with the threshold as its default.

    Raises:
        PolicyError: Not exactly one target is given (E402), the policy has no threshold or several (E408), or no
            threshold meets the target (E404).
    """
    targets = {"cost": cost, "speedup": speedup, "psnr": psnr, "psnr_p10": psnr_p10}
    wanted = [(name, value) for name, value in targets.items() if value is not None]
    if len(wanted) != 1:
        stated = ", ".join(f"`{name}`" for name, _ in wanted) or "none"
        raise PolicyError.of("E402", f"exactly one target is needed, found {stated}")
    if not calls or not held_out:
        raise PolicyError.of("E403", "too few calls to record some and to measure others")
    (name, goal), *_ = wanted
    loaded = load(policy)
    threshold = _threshold(loaded, param)
    sampler = Sampler(target, sample, scheduler)
    kept = RunDirectory(run_dir, settings_of(sampler.models, sample or target) if run_dir is not None else {})
    bench = _Bench(sampler, kept, loaded, threshold, dict(settings or {}), progress)
    recorded = [bench.recorded(call) for call in calls[:RECORDED]]
    points = bench.candidates(recorded)
    bench.reference(held_out)
    measured, chosen = _search(bench, points, name, goal)
    assert chosen.cost is not None
    found: dict[str, str | float] = {threshold.name: chosen.value, "target": f"{name} {goal:g}", "cost": chosen.cost}
    quality = {"psnr": chosen.psnr, "psnr_p10": chosen.psnr_p10}
    found |= {"samples": len(recorded), "held_out": len(held_out)}
    found |= {name: value for name, value in quality.items() if value is not None}
    text = _text(loaded, threshold, chosen.value, bench.statement(recorded[0], found))
    return ThresholdTuning(
        parse(text, source="<tuned>"),
        text,
        threshold.name,
        chosen,
        measured,
        bench.evaluations,
        settings=dict(settings or {}),
        compared=functools.partial(compare, target, held_out, sample=sample, scheduler=scheduler),
    )


def _threshold(policy: ir.Policy, name: str | None) -> ir.Param:
    """Return the param that is the threshold.

    Raises:
        PolicyError: There is none, or several (E408).
    """
    params = {each.name: each for each in policy.statements if isinstance(each, ir.Param) and each.type == "float"}
    lets = {each.name: each.value for each in policy.statements if isinstance(each, ir.Let)}
    conditions = [
        each.condition for each in policy.statements if isinstance(each, ir.Rule) and each.condition is not None
    ]
    waiting, read = list[ir.Expression](conditions), set[str]()
    while waiting:
        new = names_in(waiting.pop()) - read
        read |= new
        waiting += [lets[each] for each in new & lets.keys()]
    found = [each for each in params if each in read]
    if name is not None:
        if name in params:
            return params[name]
        raise PolicyError.of(
            "E408", f"the policy has no `float` param `{name}`", help=suggestion(name, list(params)) or _THRESHOLD_HELP
        )
    if len(found) != 1:
        listed = ", ".join(f"`{each}`" for each in found)
        message = f"several params could be the threshold: {listed}" if found else "no param is a threshold"
        raise PolicyError.of("E408", message, help=_THRESHOLD_HELP)
    return params[found[0]]


_THRESHOLD_HELP = "name a `float` param that a `while` compares with a signal: `param=`, or `--param` of the command"


def _bounds(param: ir.Param) -> tuple[float, float]:
    """Return the least value of a threshold, and the largest one."""
    if not isinstance(param.domain, ir.Interval):
        return 0.0, math.inf
    low, high = constant(param.domain.low), constant(param.domain.high)
    least = float(low) if isinstance(low, int | float) and math.isfinite(low) else 0.0
    return least, high if isinstance(high, int | float) else math.inf


def _text(policy: ir.Policy, threshold: ir.Param, value: float, tuned: ir.Tuned) -> str:
    """Return the policy with another default. Its expectations keep the value that they were written for."""
    before = () if threshold.default is None else (ir.Setting(name=threshold.name, value=threshold.default),)

    def changed(statement: ir.Statement) -> ir.Statement:
        if statement is threshold:
            return threshold.model_copy(update={"default": ir.Number(value=value)})
        if isinstance(statement, ir.Expect) and all(each.name != threshold.name for each in statement.settings):
            return statement.model_copy(update={"settings": (*statement.settings, *before)})
        return statement

    statements = tuple(changed(each) for each in policy.statements if not isinstance(each, ir.Tuned))
    return format_policy(policy.model_copy(update={"statements": (*statements, tuned)}))


# --- sampling --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Recording:
    """What an uncached run showed: its calls, the signals of each, and its circumstances."""

    ticks: list[Tick]
    signals: MeasuredNumbers
    seen: Circumstances
    scheduler: str
    timesteps: list[float]
    sigmas: list[float] | None


_RECORDING: Form[list[_Recording]] = Form(
    lambda made: [
        {
            **{name: getattr(one, name) for name in ("scheduler", "timesteps", "sigmas")},
            "ticks": [asdict(tick) for tick in one.ticks],
            "signals": [
                [*call, {site: dict(numbers) for site, numbers in sites.items()}] for call, sites in one.signals.items()
            ],
            "seen": asdict(one.seen),
        }
        for one in made
    ],
    lambda data: [
        _Recording(
            [Tick(**tick) for tick in one["ticks"]],
            {(step, branch): sites for step, branch, sites in one["signals"]},
            Circumstances(**one["seen"]),
            one["scheduler"],
            one["timesteps"],
            one["sigmas"],
        )
        for one in data
    ],
)
_Measured = tuple[list[float], float, float]
"""The PSNR of each sample of a call, its cost and its seconds."""
_MEASURED: Form[_Measured] = Form(list, lambda data: (data[0], data[1], data[2]))


class _Bench:
    """Samples the policy with different thresholds."""

    def __init__(
        self,
        sampler: Sampler,
        kept: RunDirectory,
        policy: ir.Policy,
        param: ir.Param,
        settings: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.evaluations = 0.0
        self._sampler = sampler
        self._kept = kept
        self._policy = policy
        self._param = param.name
        self._least, self._most = _bounds(param)
        self._settings = settings
        self._progress = progress
        self._done = 0
        self._total = 0
        self._references = list[tuple[ModelCall, Sample]]()
        self._plans = list[Plan]()

    def _applied(self, value: float, *, trace: bool = True) -> Run:
        return apply(self._sampler.target, self._policy, trace=trace, **{**self._settings, self._param: value})

    def _key(self, call: ModelCall, value: float) -> list[Any]:
        digest = resolve(self._policy, {**self._settings, self._param: value}).digest
        return [scheduler_key(self._sampler.schedulers), call, digest]

    def recorded(self, call: ModelCall) -> list[_Recording]:
        """Record the signals of a run in which everything computes, one trajectory for each denoiser."""
        with self._applied(self._least) as run:
            self._plans = [*run.plans.values()]

        def produce() -> list[_Recording]:
            with self._applied(self._least) as run, observed(self._sampler, call) as seen:
                with warnings.catch_warnings():
                    # That is meant: the signals of all steps are recorded.
                    warnings.filterwarnings("ignore", "the policy reused nothing")
                    self._sampler(call)
                assert run.trace is not None
                trajectories = list(run.trace.latest)
            scheduler = self._sampler.schedulers[0]
            sigmas = getattr(scheduler, "sigmas", None)
            return [
                _Recording(
                    [each.tick for each in trajectory.calls],
                    trajectory.signals,
                    seen,
                    type(scheduler).__name__,
                    [float(each) for each in scheduler.timesteps],
                    None if sigmas is None else [float(each) for each in sigmas],
                )
                for trajectory in trajectories
            ]

        result = self._kept.recall("signals", self._key(call, self._least), produce, _RECORDING)
        self._count("recording", 1.0)
        return result

    def candidates(self, recorded: Sequence[Sequence[_Recording]]) -> list[ThresholdPoint]:
        """Return one threshold for each cost, from the recorded signals, and some beyond, the smallest first."""
        values = [
            value
            for runs in recorded
            for one in runs
            for sites in one.signals.values()
            for numbers in sites.values()
            for value in numbers.values()
            if math.isfinite(value) and value > 0
        ]
        steps = max(len(one.ticks) for runs in recorded for one in runs)
        if not values:
            raise PolicyError.of(
                "E408", "the recorded runs measured no signal", help="the policy needs a `while` that reads a signal"
            )
        largest = max(values) * steps
        grid = [float(f"{value:.4g}") for value in np.geomspace(min(values) / 2, largest, _GRID)]
        points = list[ThresholdPoint]()
        for value in grid:
            if value > self._most:
                break
            forecast = self._forecast(value, recorded)
            if not points or forecast < (points[-1].forecast or 0.0) - 1e-9:
                points.append(ThresholdPoint(value, forecast))
        beyond = [points[-1].value * _BEYOND**number for number in range(1, 9)] if points else []
        points += [ThresholdPoint(float(f"{value:.4g}"), None) for value in beyond if value <= self._most]
        return points

    def _forecast(self, value: float, recorded: Sequence[Sequence[_Recording]]) -> float:
        resolved = resolve(self._policy, {**self._settings, self._param: value})
        plans = [bind(resolved, plan.skeleton) for plan in self._plans]
        return _cost(
            replay(plan, one.ticks, signals=one.signals)
            for runs in recorded
            for plan, one in zip(plans, runs, strict=False)
        )

    def reference(self, calls: Sequence[ModelCall]) -> None:
        """Sample the held-out calls uncached."""
        self._total += len(calls)
        for call in calls:
            key = [scheduler_key(self._sampler.schedulers), call, ""]
            sampled = self._kept.recall("reference", key, lambda call=call: self._sampler(call), SAMPLE)
            self._references.append((call, sampled))
            self._count("uncached", 1.0)

    def measured(self, point: ThresholdPoint) -> ThresholdPoint:
        """Sample the held-out calls with a threshold."""
        self._total += len(self._references)
        ratios, costs, uncached, cached = list[float](), list[float](), 0.0, 0.0
        with self._applied(point.value) as run:
            for call, reference in self._references:

                def produce(call: ModelCall = call, reference: Sample = reference) -> _Measured:
                    sampled = self._sampler(call)
                    assert run.trace is not None
                    ratios = each_psnr(reference.pictures, sampled.pictures)
                    return ratios, _cost(run.trace.latest), sampled.seconds

                psnr, cost, seconds = self._kept.recall("threshold", self._key(call, point.value), produce, _MEASURED)
                ratios += psnr
                costs.append(cost)
                uncached, cached = uncached + reference.seconds, cached + seconds
                self._count(f"{self._param} {point.value:g}", cost)
        return replace(
            point,
            cost=statistics.fmean(costs),
            psnr=statistics.fmean(ratios),
            psnr_p10=percentile(ratios, 10),
            speedup=uncached / cached,
        )

    def statement(self, recorded: Sequence[_Recording], found: Mapping[str, str | float]) -> ir.Tuned:
        """Return what the policy was tuned for."""
        one = recorded[0]
        return statement(one.scheduler, one.timesteps, one.sigmas, self._sampler.models, one.seen, found)

    def _count(self, label: str, cost: float) -> None:
        self.evaluations += cost
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done), label)


def _cost(runs: Iterable[Iterable[tuple[Tick, Sequence[Decision]]]]) -> float:
    """Return the share of the calls of the sites that are computed."""
    counts = tally(chain.from_iterable(runs))
    return 1 - counts.skipped / max(counts.total, 1)


def _search(
    bench: _Bench, points: Sequence[ThresholdPoint], name: str, goal: float
) -> tuple[list[ThresholdPoint], ThresholdPoint]:
    """Bisect over the thresholds: a larger one skips more, so that cost and quality fall and the speed rises.

    Returns:
        The measured points, and the one that meets the target: of a quality the largest threshold, else the smallest.
    """
    falls = name in ("psnr", "psnr_p10")

    def meets(point: ThresholdPoint) -> bool:
        value = getattr(point, name)
        return value <= goal + 1e-9 if name == "cost" else value >= goal

    low, high, measured = 0, len(points) - 1, dict[int, ThresholdPoint]()
    middle = next(
        (index for index, point in enumerate(points) if name == "cost" and (point.forecast or 0.0) <= goal + 1e-9),
        (low + high) // 2,
    )
    while low <= high and len(measured) < MOST_RUNS:
        measured[middle] = bench.measured(points[middle])
        if meets(measured[middle]) == falls:
            low = middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    every = _refined(bench, [measured[index] for index in sorted(measured)], meets)
    meeting = [point for point in every if meets(point)]
    if not meeting:
        best: Callable[..., ThresholdPoint] = min if name == "cost" else max
        point = best(every, key=lambda point: getattr(point, name))
        unit = {"cost": "", "speedup": "x"}.get(name, " dB")
        raise PolicyError.of(
            "E404",
            f"`{name}` {goal:g}{unit} was not reached: the best of the measured thresholds, {point.value:g}, has "
            f"{getattr(point, name):.3g}{unit} at a cost of {point.cost:.3g}",
            help="ask for less",
        )
    return every, meeting[-1] if falls else meeting[0]


def _refined(
    bench: _Bench, points: list[ThresholdPoint], meets: Callable[[ThresholdPoint], bool]
) -> list[ThresholdPoint]:
    """Bisect the thresholds between the last one that meets the target and its neighbour that does not."""
    while len(points) < MOST_RUNS:
        sides = [(one, other) for one, other in pairwise(points) if meets(one) != meets(other)]
        if not sides or sides[0][1].value <= _NEAR * sides[0][0].value:
            break
        one, other = sides[0]
        value = float(f"{math.sqrt(one.value * other.value):.4g}")
        points = sorted([*points, bench.measured(ThresholdPoint(value, None))], key=lambda point: point.value)
    return points
