"""The bytes of history that a schedule will hold, told before anything runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cachepolicy.engine.execution_plan import ExecutionPlan, lay_out
from cachepolicy.language import ir
from cachepolicy.planning.cost_model import Work
from cachepolicy.planning.history_spec import feedback
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import COND_BRANCHES, Decision, Tick

_FLOAT, _COMPLEX = 4, 8  # bytes of a number as sizes are counted, and as guidance keeps it: a spectrum in two bands


@dataclass(slots=True)
class _Branch:
    """What one branch has computed: the steps of each site's results, the newest first."""

    results: dict[int, list[int]] = field(default_factory=lambda: defaultdict[int, list[int]](list))
    held: int = 0


def holdings(plan: Plan, calls: Iterable[tuple[Tick, Sequence[Decision]]], work: Work) -> list[int]:
    """The bytes that are held after each call of a trajectory, simulated or traced, whose every step is known.

    `work` says how large each module's outputs are. Where a model works between the blocks of a span without changing
    the sizes of what they hand on, the span keeps more than is told here.
    """
    trajectory = list(calls)
    layout = lay_out(plan)
    timesteps = {tick.step: tick.t for tick, _ in trajectory}
    known = tuple(t for _, t in sorted(timesteps.items()) if t is not None)
    ahead = Ahead(known if len(known) == len(timesteps) else None)
    liveness = layout.liveness(ahead, loose=False)
    branches, guided, found = defaultdict[str, _Branch](_Branch), 0, list[int]()
    last = max(timesteps, default=0)
    for tick, decisions in trajectory:
        branch = branches[tick.branch]
        for site, decision in enumerate(decisions):
            if decision.computes or (decision.verdict == "reuse" and feedback(decision.action)):
                branch.results[site].insert(0, tick.step)
        branch.held = _histories(layout, branch, tick, liveness, work) + _streams(layout, branch, tick, liveness, work)
        if layout.approximation is not None and tick.branch not in COND_BRANCHES:
            computed = layout.itself is not None and decisions[layout.itself].computes
            wanted = liveness.approximates(tick, now=False)
            guided = (_guidance(work, tick) if computed else guided) if wanted else 0
        if tick.step == last:
            branch.held = 0
        found.append(guided + sum(each.held for each in branches.values()))
    return found


def _histories(layout: ExecutionPlan, branch: _Branch, tick: Tick, liveness: Liveness, work: Work) -> int:
    """What sites keep of their results: as many, in either form, as a later step may read."""
    held = 0
    for site in layout.plan.sites:
        results = branch.results[site.index]
        if results:
            reads = liveness.wanted(layout.program.alike.group_of[site.index], tick, results[0])
            held += (min(reads.outputs, len(results)) + min(reads.residuals, len(results))) * _streamed(
                site.modules, work
            )
    return held


def _streamed(modules: Sequence[str], work: Work) -> int:
    """The bytes of what a site hands on: a module's outputs; of a span those of the last block of each stretch.

    Where blocks give other streams than those before them, the model has worked in between.
    """
    stretches = list[tuple[int, ...]]()
    for name in modules:
        given = tuple(work.outputs.get(name, ()))
        if not stretches or sorted(stretches[-1]) != sorted(given):
            stretches.append(given)
    return sum(map(sum, stretches))


def _streams(layout: ExecutionPlan, branch: _Branch, tick: Tick, liveness: Liveness, work: Work) -> int:
    """What `prev` and `kept` remember of probed tensors: that of this step, and those of the computes."""
    signals = layout.signals
    if not liveness.measures(tick, now=False):
        return 0
    held = 0
    for expression in dict.fromkeys([*signals.kept, *signals.previous]):
        if isinstance(expression, ir.Probe):
            place = layout.plan.probes[expression]
            sites = [site for site in layout.plan.sites if site.index in branch.results]
            depth = signals.kept.get(expression, 0)
            steps = {step for site in sites for step in branch.results[site.index][:depth]}
            steps |= {tick.step} if expression in signals.previous else set()
            # Of several outputs the hidden states are the largest.
            held += len(steps) * max(work.outputs.get(place.modules[-1], ()), default=0)
    return held


def _guidance(work: Work, tick: Tick) -> int:
    """Two bands of the difference of both halves' predictions, which are half of a batch or a call of their own."""
    numbers = sum(work.outputs.get("", ())) // _FLOAT
    return 2 * _COMPLEX * (numbers if tick.branch else numbers // 2)
