"""Predict the bytes of history that a schedule holds, before anything runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cachepolicy.diffusers.guidance import COND_BRANCHES
from cachepolicy.engine.execution_plan import ExecutionPlan, lay_out
from cachepolicy.language import ir
from cachepolicy.language.traversal import is_stream, walk
from cachepolicy.planning.cost_model import Work
from cachepolicy.planning.history_spec import feedback
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import Decision, Tick

# Bytes of a number in the model's outputs, and of one that `approximate uncond` keeps: complex numbers of a spectrum.
_FLOAT, _COMPLEX = 4, 8


@dataclass(slots=True)
class _Branch:
    """The results of one branch: the steps of each site's results, the newest first, and the bytes held."""

    results: dict[int, list[int]] = field(default_factory=lambda: defaultdict[int, list[int]](list))
    held: int = 0


def holdings(plan: Plan, calls: Iterable[tuple[Tick, Sequence[Decision]]], work: Work) -> list[int]:
    """Compute the bytes that are held after each call of a trajectory, simulated or traced.

    The result is too small for a span between whose blocks the model does other work on the streams, if that work
    keeps the sizes of the tensors.

    Args:
        plan: The plan of the trajectory.
        calls: The calls in order, each with its tick and one decision for each site. All steps must be there.
        work: The sizes of the outputs of each module.

    Returns:
        The bytes after each call.
    """
    trajectory = list(calls)
    execution_plan = lay_out(plan)
    timesteps = {tick.step: tick.t for tick, _ in trajectory}
    known = tuple(t for _, t in sorted(timesteps.items()) if t is not None)
    ahead = Ahead(known if len(known) == len(timesteps) else None)
    liveness = execution_plan.liveness(ahead, loose=False)
    branches, guidance, held = defaultdict[str, _Branch](_Branch), 0, list[int]()
    last = max(timesteps, default=0)
    for tick, decisions in trajectory:
        branch = branches[tick.branch]
        for site, decision in enumerate(decisions):
            if decision.computes or (decision.verdict == "reuse" and feedback(decision.action)):
                branch.results[site].insert(0, tick.step)
        branch.held = _histories(execution_plan, branch, tick, liveness, work)
        branch.held += _probed(execution_plan, branch, tick, liveness, work)
        if execution_plan.approximation is not None and tick.branch not in COND_BRANCHES:
            root = execution_plan.itself
            if not liveness.approximates(tick, now=False):
                guidance = 0
            elif root is not None and decisions[root].computes:
                # The halves are one batch, or one call each.
                size, keeps = sum(work.outputs.get("", ())), execution_plan.guidance
                numbers = size // _FLOAT
                # Two bands of the difference of both halves, and pairs of predictions.
                guidance = keeps.bands * 2 * _COMPLEX * (numbers if tick.branch else numbers // 2)
                count = min(keeps.pairs, len(branch.results[root]))
                guidance += count * size * (2 if tick.branch else 1)
        if tick.step == last:
            branch.held = 0
        held.append(guidance + sum(branch.held for branch in branches.values()))
    return held


def _histories(execution_plan: ExecutionPlan, branch: _Branch, tick: Tick, liveness: Liveness, work: Work) -> int:
    """Return the bytes of the results of all sites: as many outputs and residuals as a later step may read."""
    held = 0
    for site in execution_plan.plan.sites:
        results = branch.results[site.index]
        if results:
            reads = liveness.wanted(execution_plan.program.alike.group_of[site.index], tick, results[0])
            count = min(reads.outputs, len(results)) + min(reads.residuals, len(results))
            held += count * _result_size(site.modules, work)
    return held


def _result_size(modules: Sequence[str], work: Work) -> int:
    """Return the bytes of one result of a site: the outputs of its module, or of the last block of each segment.

    A new segment of a span begins where the outputs of a block have other sizes than those of the block before.
    """
    segments = list[tuple[int, ...]]()
    for name in modules:
        sizes = tuple(work.outputs.get(name, ()))
        if not segments or sorted(segments[-1]) != sorted(sizes):
            segments.append(sizes)
    return sum(map(sum, segments))


def _probed(execution_plan: ExecutionPlan, branch: _Branch, tick: Tick, liveness: Liveness, work: Work) -> int:
    """Return the bytes of the probed tensors that `prev` (of the last step) and `kept` (of computed steps) remember."""
    signals = execution_plan.signals
    if not signals.crossed and not liveness.measures(tick, now=False):
        return 0
    plan, held = execution_plan.plan, 0
    for expression in dict.fromkeys(signals.lasting):
        probe = next((node for node in walk(expression) if isinstance(node, ir.Probe)), None)
        if probe is None or not is_stream(expression):
            continue
        depth = signals.kept.get(expression, 0)
        last = {tick.step} if expression in signals.previous else set[int]()
        # Other branches read the last two steps.
        last |= {tick.step, tick.step - 1} if expression in signals.crossed and tick.branch else set[int]()
        if isinstance(probe.selector, ir.Itself):
            for site in plan.sites:
                named = plan.own.get((probe, site.modules[0]))
                if named is not None:
                    held += len({*branch.results.get(site.index, ())[:depth]} | last) * _stream_size(plan, named, work)
        else:
            results = [branch.results[site.index] for site in plan.sites if site.index in branch.results]
            held += len({step for steps in results for step in steps[:depth]} | last) * _stream_size(plan, probe, work)
    return held


def _stream_size(plan: Plan, probe: ir.Probe, work: Work) -> int:
    """Return the bytes of a probed tensor: the hidden states, the largest of several outputs."""
    return max(work.outputs.get(plan.probes[probe].modules[-1], ()), default=0)
