"""What a model is made of, and what the shipped policies would do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cachepolicy._resources import shipped_policies
from cachepolicy.errors import PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.language.linker import resolve
from cachepolicy.language.loader import SHIPPED, load
from cachepolicy.language.traversal import names_in
from cachepolicy.planning.bind import bind
from cachepolicy.planning.cost_model import Forecast, Work, forecast, format_flops
from cachepolicy.planning.module_tree import Skeleton
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.simulation import simulate
from cachepolicy.reports.text import tally

_KINDS: tuple[ir.Kind, ...] = ("block", "attention", "self_attention", "cross_attention", "feedforward")


@dataclass(frozen=True, slots=True)
class Prospect:
    """One policy on the model: sites, site calls and those skipped, FLOPs where they are known.

    `signals` are those it decides by, all taken as 0 here, which reuses as often as the policy ever can; `refused` is
    why it does not fit the model.
    """

    sites: int = 0
    calls: int = 0
    skipped: int = 0
    signals: tuple[str, ...] = ()
    flops: Forecast | None = None
    refused: str | None = None


def prospects(skeleton: Skeleton, work: Work | None, **clock: Any) -> dict[str, Prospect]:
    """What each shipped policy would do, with its own defaults; `clock` is what `simulate` takes."""
    return {name: _prospect(f"{SHIPPED}{name}", skeleton, work, clock) for name in shipped_policies()}


def _prospect(name: str, skeleton: Skeleton, work: Work | None, clock: Mapping[str, Any]) -> Prospect:
    try:
        plan = bind(resolve(load(name), {}), skeleton)
        signals = _numbers(plan)
        schedule = simulate(plan, signals=dict.fromkeys(signals, 0.0), **clock)
    except PolicyError as error:
        return Prospect(refused=error.diagnostics[0].message)
    if not plan.sites:
        return Prospect(refused="none of its rules takes anything here")
    calls = tally(schedule).calls
    flops = None if work is None else forecast(plan, schedule, work)
    return Prospect(len(plan.sites), sum(calls.values()), calls["reuse"] + calls["hidden"], signals, flops)


def _numbers(plan: Plan) -> tuple[str, ...]:
    """The signals that rules compare with numbers."""
    conditions = [bound.rule.condition for bound in plan.rules if bound.rule.condition is not None]
    read = set[str]().union(*map(names_in, conditions))
    return tuple(signal.name for signal in plan.resolved.signals if signal.name in read)


# --- for a person ----------------------------------------------------------------------------------------


def draw_overview(skeleton: Skeleton, work: Work | None, found: Mapping[str, Prospect], *, steps: int) -> str:
    """The model's parts with their share of the FLOPs, then a line for each policy."""
    lists = ", ".join(f"{name} {len(skeleton.elements[name])}" for name in skeleton.block_lists)
    lines = [f"{skeleton.name}: {counted(len(skeleton.modules), 'module')}, blocks in {lists or 'no list'}"]
    if work is not None:
        lines.append(f"{format_flops(work.total)} a call")
    lines += ["", *_parts(skeleton, work), ""]
    width = max(map(len, found))
    flops = "  FLOPs skipped  at most" if work is not None else ""
    lines.append(f"{counted(steps, 'step'):<{width}}  sites  calls skipped{flops}")
    lines += [f"{name:<{width}}  {_cells(each)}" for name, each in found.items()]
    return "\n".join(lines)


def _parts(skeleton: Skeleton, work: Work | None) -> Iterator[str]:
    for kind in _KINDS:
        names = [each.name for each in skeleton.modules if kind in each.kinds]
        if names:
            share = f"  {100 * work.of(names) / work.total:5.1f} % of the FLOPs" if work is not None else ""
            yield f"  {kind:<15}  {len(names):>4}{share}"


def _cells(each: Prospect) -> str:
    if each.refused is not None:
        return each.refused
    cells = f"{each.sites:>5}  {100 * each.skipped / max(1, each.calls):>11.1f} %"
    if each.flops is not None:
        bound = f"{each.flops.speed_up:.2f}x" if each.flops.share < 1 else "all"
        cells += f"  {100 * each.flops.share:>11.1f} %  {bound:>7}"
    if each.signals:
        cells += f"  if `{each.signals[0]}` always lets it reuse"
    return cells


def overview_to_json(skeleton: Skeleton, work: Work | None, found: Mapping[str, Prospect]) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "model": skeleton.name,
        "block_lists": {name: len(skeleton.elements[name]) for name in skeleton.block_lists},
        "flops": None if work is None else work.total,
        "policies": {
            name: {
                "sites": each.sites,
                "calls": each.calls,
                "skipped": each.skipped,
                "signals": list(each.signals),
                "flops": None if each.flops is None else each.flops.to_json(),
                "refused": each.refused,
            }
            for name, each in found.items()
        },
    }
