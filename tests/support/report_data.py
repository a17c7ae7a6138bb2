"""Runs to report: a schedule of many sites, and traces with signals, memory and times, made without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cachepolicy
from cachepolicy.language.linker import resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.module_tree import builtin, sites_skeleton
from cachepolicy.planning.schedule import prepare
from cachepolicy.planning.simulation import Schedule, simulate
from cachepolicy.tracing.trace import CallRecord, Trace

FLUX = [
    *(f"transformer_blocks.{block}.{part}" for block in range(19) for part in ("attn", "ff", "ff_context")),
    *(f"single_transformer_blocks.{block}.attn" for block in range(38)),
    *(f"single_transformer_blocks.{block}" for block in range(38, 57)),
]
"""114 sites."""

HOSTILE = '</script><img src=x onerror="window.caught=1">&lt;b&gt;'
POLICY = f"""cachepolicy 1
policy hostile 'a title with {HOSTILE}'
source '{HOSTILE}'
# A note with <script>window.caught = 2</script> in it.
param n: int = 2 in [1, inf) '{HOSTILE}'
match "^single_transformer_blocks[.][0-9]+$" when t in (100, 300) every 3 -> reuse residual
match attention when t in (100, 800) every n -> reuse
match feedforward when branch == "cond" and t in (200, 700) every 4 at most 2 in a row -> reuse
match optional "nowhere" -> skip
"""
DRIFTING = """cachepolicy 1
policy drifting
param threshold: float = 0.1
signal drift = relative_l1(residual(blocks[0]), kept(residual(blocks[0])))
match blocks[1:] while drift <= threshold -> reuse residual
use fora
"""
DRIFTS = [0.0, 0.05, 0.2, 0.05, 0.01, 0.3, 5.0, 0.02]


def as_trace(schedule: Schedule, signals: Mapping[int, Mapping[str, Sequence[float]]] | None = None) -> Trace:
    """The trace of a run that went as the schedule says; `signals` are numbers by site number, name and step."""
    trace = Trace()
    trajectory = trace.begin(("session", "mine"), schedule.plan)
    fine = prepare(schedule.plan).fine
    for number, (tick, decisions) in enumerate(schedule):
        order = [decisions[group.sites[0]] for group in fine.groups]
        measured = {
            site: {name: values[tick.step] for name, values in each.items()} for site, each in (signals or {}).items()
        }
        seconds = 0.5 if all(each.computes for each in decisions) else 0.125
        call = CallRecord(tick, fine, order, {}, seconds, measured, held=1024 * (number + 1), began=10.0 + number)
        trajectory.calls.append(call)
    return trace


def flux(steps: int = 50) -> Schedule:
    """114 sites, two branches, and texts that would break out of a page that let them."""
    names = [*FLUX[:-1], f"single_transformer_blocks.56<script>window{chr(0x2028)}{'x' * 80}.attn"]
    return simulate(cachepolicy.parse(POLICY), steps=steps, skeleton=sites_skeleton(names), branches=("cond", "uncond"))


def drifting() -> Trace:
    """A run that decides by what it measured, at a limit."""
    policy = cachepolicy.parse(DRIFTING)
    schedule = simulate(policy, steps=len(DRIFTS), signals={"drift": DRIFTS})
    bound = bind(resolve(policy, {}), builtin())
    first = bound.rules[0].sites[0]
    return as_trace(Schedule(bound, schedule.ticks, schedule.decisions), {first: {"drift": DRIFTS}})
