"""What a schedule saves, told before anything runs: FLOPs by rule and by site, and the speed-up they bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachepolicy.language import ir
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import UNCOND_BRANCHES, Decision, Tick


@dataclass(frozen=True, slots=True)
class Work:
    """One call of a model: its FLOPs in `total` and by module name, what runs inside it included.

    `outputs` are the bytes of each tensor that a module gives, where they were looked at.
    """

    total: int
    modules: Mapping[str, int] = field(repr=False)
    outputs: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]], repr=False)

    def of(self, modules: Iterable[str]) -> int:
        """The FLOPs of some modules, none of which stands in another."""
        return sum(self.total if name == "" else self.modules.get(name, 0) for name in modules)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The FLOPs of a trajectory without the policy, and those that it skips, by site and by rule number.

    Element-wise work and memory traffic are no FLOPs: what a clock gains may be less, and never is much more.
    """

    total: int
    skipped_by_site: Mapping[str, int]
    skipped_by_rule: Mapping[int, int]

    @property
    def skipped(self) -> int:
        """The FLOPs that are skipped in all."""
        return sum(self.skipped_by_site.values())

    @property
    def share(self) -> float:
        """The skipped share, 0..1."""
        return self.skipped / self.total if self.total else 0.0

    @property
    def speed_up(self) -> float:
        """The bound on the speed-up of the model's calls: infinite where nothing is left to compute."""
        left = self.total - self.skipped
        return self.total / left if left else float("inf")

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; rules are counted from 1, as in the policy's text."""
        return {
            "flops": self.total,
            "skipped": self.skipped,
            "share": self.share,
            "speed_up": self.speed_up if self.share < 1 else None,
            "sites": dict(self.skipped_by_site),
            "rules": {str(rule + 1): flops for rule, flops in self.skipped_by_rule.items()},
        }


def forecast(plan: Plan, calls: Iterable[tuple[Tick, Sequence[Decision]]], work: Work) -> Forecast:
    """What the calls of a schedule, simulated or traced, skip on a model that does `work` at each.

    A guidance batch whose unconditional half is rebuilt runs half of everything; an unconditional call that is answered
    runs nothing.
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


def draw_forecast(outlook: Forecast, plan: Plan, work: Work, *, steps: int) -> str:
    """What each rule's sites are of a call, what they skip over the trajectory, and the bound that follows."""
    lines = [f"{format_flops(work.total)} a call, {format_flops(outlook.total)} in {steps} steps without the policy"]
    for bound in plan.rules:
        if bound.sites:
            # Of a block and its attention both may be sites; the inner one is counted in the outer one.
            outer = [index for index in bound.sites if not set(plan.sites[index].parents) & set(bound.sites)]
            held = work.of(name for index in outer for name in plan.sites[index].modules)
            skips = outlook.skipped_by_rule.get(bound.index, 0)
            lines.append(
                f"rule {bound.index + 1}: its sites are {_percent(held, work.total)} of a call, "
                f"it skips {_percent(skips, outlook.total)} of the trajectory"
            )
    bound = f"at most {outlook.speed_up:.2f}x faster" if outlook.share < 1 else "nothing is left to compute"
    return "\n".join([*lines, f"{_percent(outlook.skipped, outlook.total)} of the FLOPs are skipped: {bound}"])


def format_flops(flops: float) -> str:
    """FLOPs with the unit that fits: `74.38 TFLOP`."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if flops < 1000:
            return f"{flops:.2f} {unit}" if unit != "FLOP" else f"{flops:.0f} {unit}"
        flops /= 1000
    return f"{flops:.2f} PFLOP"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def format_bytes(count: float) -> str:
    """Bytes with the unit that fits: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.2f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} TiB"
