"""An overview of a model: its parts, and what each shipped policy would do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cachepolicy._resources import shipped_policies
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.language.linker import resolve
from cachepolicy.language.loader import SHIPPED, load
from cachepolicy.language.traversal import names_in
from cachepolicy.planning.bind import bind
from cachepolicy.planning.cost_model import Forecast, Work, forecast, format_flops
from cachepolicy.planning.guidance import without_uncond
from cachepolicy.planning.module_tree import Skeleton
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.simulation import simulate
from cachepolicy.planning.tally import Tally, percent, tally

_KINDS: tuple[ir.Kind, ...] = ("block", "attention", "self_attention", "cross_attention", "feedforward")


@dataclass(frozen=True, slots=True)
class Prospect:
    """What one policy would do on a model.

    Attributes:
        sites: Number of sites.
        counts: Counts of the site calls.
        signals: Names of the signals that it decides by. They are taken as 0, where it reuses as often as it can.
        flops: FLOPs that it skips, if the FLOPs of a call are known.
        refused: Why it does not fit the model.
    """

    sites: int = 0
    counts: Tally = field(default_factory=Tally)
    signals: tuple[str, ...] = ()
    flops: Forecast | None = None
    refused: str | None = None


def prospects(skeleton: Skeleton, work: Work | None, *, distilled: bool = False, **clock: Any) -> dict[str, Prospect]:
    """Simulates each shipped policy with its default settings.

    Args:
        skeleton: The module tree of the model.
        work: The FLOPs of one call.
        distilled: Whether the model has no unconditional half; policies with a param `distilled` then set it.
        clock: Arguments of `simulate`.
    """
    return {name: _prospect(load(f"{SHIPPED}{name}"), skeleton, work, distilled, clock) for name in shipped_policies()}


def _prospect(
    policy: ir.Policy, skeleton: Skeleton, work: Work | None, distilled: bool, clock: Mapping[str, Any]
) -> Prospect:
    params = {statement.name for statement in policy.statements if isinstance(statement, ir.Param)}
    try:
        settings = {"distilled": True} if distilled and "distilled" in params else {}
        plan = bind(resolve(policy, settings, model=skeleton.facts), skeleton)
        plan = without_uncond(plan) if distilled else plan
        signals = _numbers(plan)
        schedule = simulate(plan, signals=dict.fromkeys(signals, 0.0), **clock)
    except PolicyError as error:
        return Prospect(refused=error.diagnostics[0].message)
    if not plan.sites:
        return Prospect(refused="none of its rules takes anything here")
    flops = None if work is None else forecast(plan, schedule, work)
    return Prospect(len(plan.sites), tally(schedule), signals, flops)


def _numbers(plan: Plan) -> tuple[str, ...]:
    """Returns the signals and externals that rules compare with numbers."""
    conditions = [bound.rule.condition for bound in plan.rules if bound.rule.condition is not None]
    read = set[str]().union(*map(names_in, conditions))
    known = (*(signal.name for signal in plan.resolved.signals), *plan.resolved.externals)
    return tuple(name for name in known if name in read)


def draw_overview(skeleton: Skeleton, work: Work | None, by_policy: Mapping[str, Prospect], *, steps: int) -> str:
    """Returns text: the parts of the model with their share of the FLOPs, then a line for each policy."""
    lists = ", ".join(f"{name} {len(skeleton.elements[name])}" for name in skeleton.block_lists)
    lines = [f"{skeleton.name}: {counted(len(skeleton.modules), 'module')}, blocks in {lists or 'no list'}"]
    if work is not None:
        lines.append(f"{format_flops(work.total)} a call")
    lines += ["", *_parts(skeleton, work), ""]
    width = max(map(len, by_policy))
    flops = "  FLOPs skipped  at most" if work is not None else ""
    lines.append(f"{counted(steps, 'step'):<{width}}  sites  calls skipped{flops}")
    lines += [f"{name:<{width}}  {_cells(prospect)}" for name, prospect in by_policy.items()]
    return "\n".join(lines)


def _parts(skeleton: Skeleton, work: Work | None) -> Iterator[str]:
    for kind in _KINDS:
        names = [module.name for module in skeleton.modules if kind in module.kinds]
        if names:
            share = f"  {percent(work.of(names), work.total):>7} of the FLOPs" if work is not None else ""
            yield f"  {kind:<15}  {len(names):>4}{share}"


def _cells(prospect: Prospect) -> str:
    if prospect.refused is not None:
        return prospect.refused
    cells = f"{prospect.sites:>5}  {percent(prospect.counts.skipped, prospect.counts.total):>13}"
    if prospect.flops is not None:
        bound = f"{prospect.flops.speed_up:.2f}x" if prospect.flops.share < 1 else "all"
        cells += f"  {percent(prospect.flops.skipped, prospect.flops.total):>13}  {bound:>7}"
    if prospect.signals:
        cells += f"  if `{prospect.signals[0]}` always lets it reuse"
    return cells


def overview_to_json(skeleton: Skeleton, work: Work | None, by_policy: Mapping[str, Prospect]) -> dict[str, Any]:
    """Returns the overview as plain data."""
    return {
        "model": skeleton.name,
        "block_lists": {name: len(skeleton.elements[name]) for name in skeleton.block_lists},
        "flops": None if work is None else work.total,
        "policies": {
            name: {
                "sites": prospect.sites,
                "calls": prospect.counts.total,
                "skipped": prospect.counts.skipped,
                "signals": list(prospect.signals),
                "flops": None if prospect.flops is None else prospect.flops.to_json(),
                "refused": prospect.refused,
            }
            for name, prospect in by_policy.items()
        },
    }
