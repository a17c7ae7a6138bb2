"""What a schedule saves and what a site's history is worth, in FLOPs, computed before anything runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.diffusers.guidance import UNCOND_BRANCHES
from cachepolicy.errors import counted
from cachepolicy.language import ir
from cachepolicy.planning.module_tree import ancestors
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import Ahead, Moment, Outlooks
from cachepolicy.planning.schedule import Decision, Program, Tick
from cachepolicy.planning.simulation import evenly, replay
from cachepolicy.planning.tally import percent

STEPS = 50
"""Steps of a trajectory whose length is not known."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one call of a model.

    Attributes:
        total: FLOPs of the call.
        modules: FLOPs by module name, those of the modules inside included.
        outputs: Bytes of each output tensor by module name, where they were measured.
    """

    total: int
    modules: Mapping[str, int] = field(repr=False)
    outputs: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]], repr=False)

    def of(self, modules: Iterable[str]) -> int:
        """Returns the FLOPs of modules, none of which is inside another."""
        return sum(self.total if name == "" else self.modules.get(name, 0) for name in modules)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The FLOPs of a trajectory and those that the policy skips.

    Element-wise operations and memory traffic count no FLOPs, so the measured speed-up may be lower, and is never much
    higher.

    Attributes:
        total: FLOPs without the policy.
        skipped_by_site: Skipped FLOPs by site name.
        skipped_by_rule: Skipped FLOPs by rule number.
    """

    total: int
    skipped_by_site: Mapping[str, int]
    skipped_by_rule: Mapping[int, int]

    @property
    def skipped(self) -> int:
        """All skipped FLOPs."""
        return sum(self.skipped_by_site.values())

    @property
    def share(self) -> float:
        """The skipped share, 0 to 1."""
        return self.skipped / self.total if self.total else 0.0

    @property
    def speed_up(self) -> float:
        """Upper bound of the speed-up of the model's calls. Infinite where everything is skipped."""
        left = self.total - self.skipped
        return self.total / left if left else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Returns plain data. Rules are numbered from 1."""
        return {
            "flops": self.total,
            "skipped": self.skipped,
            "share": self.share,
            "speed_up": self.speed_up if self.share < 1 else None,
            "sites": dict(self.skipped_by_site),
            "rules": {str(rule + 1): flops for rule, flops in self.skipped_by_rule.items()},
        }


def forecast(plan: Plan, calls: Iterable[tuple[Tick, Sequence[Decision]]], work: Work) -> Forecast:
    """Returns the FLOPs that a simulated or recorded trajectory skips.

    A guidance batch whose unconditional half is approximated runs half of everything. An unconditional call that is
    answered runs nothing.

    Args:
        plan: The plan of the decisions.
        calls: The calls with their decisions by site number.
        work: The work of one call.
    """
    by_site, by_rule, total = Counter[str](), Counter[int](), 0
    for tick, decisions in calls:
        total += work.total
        share = 1.0
        for site, decision in zip(plan.sites, decisions, strict=True):
            if decision.verdict != "reuse":
                continue
            whole = work.of(site.modules)
            if isinstance(decision.action, ir.ApproximateUncond):
                left = 0.0 if tick.branch in UNCOND_BRANCHES else 0.5
                saved, share = round(whole * (1 - left)), left
            else:
                saved = round(whole * share)
            by_site[site.name] += saved
            if decision.rule is not None:
                by_rule[decision.rule] += saved
    return Forecast(total, by_site, by_rule)


def draw_forecast(outlook: Forecast, plan: Plan, work: Work, *, steps: int, most: Forecast | None = None) -> str:
    """Returns text: the share of each rule's sites in a call, what the rules skip, and the bound of the speed-up.

    Args:
        outlook: The FLOPs that are skipped.
        plan: The plan.
        work: The work of one call.
        steps: The number of steps.
        most: The FLOPs that are skipped at the most cost, where signals that are not known decide.
    """
    most = outlook if most is None else most
    total = f"{format_flops(outlook.total)} in {counted(steps, 'step')}"
    lines = [f"{format_flops(work.total)} a call, {total} without the policy"]
    for bound in plan.rules:
        if bound.sites:
            # A block and its attention may both be sites. The FLOPs of the block include those of the attention.
            outer = [index for index in bound.sites if not set(plan.sites[index].parents) & set(bound.sites)]
            held = work.of(name for index in outer for name in plan.sites[index].modules)
            skips = outlook.skipped_by_rule.get(bound.index, 0)
            lines.append(
                f"rule {bound.index + 1}: its sites are {percent(held, work.total)} of a call, "
                f"it skips {_span(most.skipped_by_rule.get(bound.index, 0), skips, outlook.total)} of the trajectory"
            )
    limit = f"at most {outlook.speed_up:.2f}x faster" if outlook.share < 1 else "nothing is left to compute"
    if most.skipped != outlook.skipped:
        limit = f"between at most {most.speed_up:.2f}x and {limit}"
    skipped = _span(most.skipped, outlook.skipped, outlook.total)
    return "\n".join([*lines, f"{skipped} of the FLOPs are skipped: {limit}"])


def _span(low: int, high: int, total: int) -> str:
    """Returns a share as text, or the range of two different ones: `0.0 % to 96.3 %`."""
    return percent(high, total) if low == high else f"{percent(low, total)} to {percent(high, total)}"


def format_flops(flops: float) -> str:
    """Returns FLOPs with a unit: `74.38 TFLOP`."""
    return _with_unit(flops, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"), 2)


def format_bytes(count: float, *, digits: int = 2) -> str:
    """Returns bytes with a unit: `1.50 GiB`."""
    return _with_unit(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), digits)


def _with_unit(value: float, factor: int, units: Sequence[str], digits: int) -> str:
    power = 0
    while value >= factor and power + 1 < len(units):
        value, power = value / factor, power + 1
    return f"{value:.{digits if power else 0}f} {units[power]}"


# --- the worth of a history ------------------------------------------------------------------------------
# It decides which sites keep a history under a memory limit, so it must be equal in every run and in every process:
# whole numbers computed from parameters, shapes and rules, and no measurements.


@dataclass(frozen=True, slots=True)
class Weight:
    """The number of parameters of a site, and the number of attention modules inside it."""

    parameters: int
    attentions: int


def operations(weight: Weight, shape: Sequence[int]) -> int:
    """Returns the approximate FLOPs of a site.

    Two for each parameter and token, and for each attention four for each pair of tokens and channel.

    Args:
        weight: The weight of the site.
        shape: Shape of its output: `(B, S, C)`, or `(B, C, ...)` with two or three sizes of a picture or video.
    """
    samples = shape[0] if shape else 1
    tokens, width = (math.prod(shape[2:]), shape[1]) if len(shape) > 3 else (math.prod(shape[1:-1]), (shape or [1])[-1])
    return samples * (2 * weight.parameters * tokens + 4 * weight.attentions * tokens * tokens * width)


def site_weights(plan: Plan, parameters: Mapping[str, int]) -> list[Weight]:
    """Returns the weight of each site of a plan.

    Args:
        plan: The plan.
        parameters: Number of parameters of each module, without those of its children.
    """
    attentions = {module.name for module in plan.skeleton.modules if "attention" in module.kinds}
    counts, inside = Counter[str](), Counter[str]()
    for name, count in parameters.items():
        for outer in (name, *ancestors(name)):
            counts[outer] += count
    for name in attentions:
        around = tuple(ancestors(name))
        if attentions.isdisjoint(around):
            inside.update((name, *around))
    return [
        Weight(sum(counts[name] for name in site.modules), sum(inside[name] for name in site.modules))
        for site in plan.sites
    ]


@dataclass(slots=True)
class Reuses:
    """Counts the reuses of each group of a program on one clock. Decisions that need a run count as reuses."""

    program: Program
    ahead: Ahead
    _counts: dict[tuple[str, int | None], list[int]] = field(default_factory=dict[tuple[str, int | None], list[int]])

    def of(self, group: int, tick: Tick) -> int:
        """Returns the number of reuses of a group of `program.alike` on the branch of `tick`."""
        key = (tick.branch, tick.steps)
        if key not in self._counts:
            self._counts[key] = self._counted(tick)
        return self._counts[key][group]

    def _counted(self, tick: Tick) -> list[int]:
        timesteps = self.ahead.timesteps
        if timesteps is None:
            timesteps = tuple(evenly(tick.steps or STEPS))
        ticks = [Tick(step, t, len(timesteps), None, tick.branch) for step, t in enumerate(timesteps)]
        schedule = replay(self.program.plan, ticks)
        outlooks = Outlooks(self.program, Ahead(timesteps), loose=True)
        counts = list[int]()
        for number, group in enumerate(self.program.alike.groups):
            if any(bound.rule.condition is not None or bound.rule.follow is not None for bound in group.rules):
                moments = [Moment(now, now.step, now.branch) for now in ticks]
                counts.append(
                    sum(any(event.reads for event in outlooks.of(number, moment, None)) for moment in moments)
                )
            else:
                counts.append(sum(decisions[group.sites[0]].verdict == "reuse" for _, decisions in schedule))
        return counts
