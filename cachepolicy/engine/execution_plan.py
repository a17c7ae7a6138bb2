"""The plan in the form that the engine reads, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cachepolicy.engine.actions import Op
from cachepolicy.engine.signals import Signals, signals_of
from cachepolicy.language import ir
from cachepolicy.planning.history_spec import GuidanceKeeping, Keeping, is_mean, keeping, kept_pairs
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.lowered import Lowering
from cachepolicy.planning.plan import Plan, Site
from cachepolicy.planning.possible_decisions import Ahead, Reads
from cachepolicy.planning.schedule import Decision, Memory, Program, Tick, decide_all, follows, prepare


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """A plan and everything derived from it.

    Attributes:
        keepings: What the history of each site has to hold, by site number.
        names: The modules of each site.
        skipped: The modules of the sites that a rule may skip, by site number.
        inside: The probes inside the first block of each site. The block has to begin before the site is decided.
        approximation: The action that rebuilds the unconditional half, or None.
        guidance: What the rules that rebuild it keep of steps that computed both halves.
        reads_grid: Whether a predictor reads the grid of the tokens.
        takes_mean: Whether a rule answers with the mean of both halves of a guidance batch.
        itself: The site number of the root model itself, or None.
        within: The numbers of the sites inside each site that has any.
    """

    plan: Plan
    program: Program
    followed: frozenset[str]
    signals: Signals
    keepings: Sequence[Keeping]
    names: Mapping[int, Sequence[str]]
    skipped: Mapping[int, Sequence[str]]
    inside: Mapping[int, frozenset[ir.Probe]]
    approximation: ir.ApproximateUncond | None
    guidance: GuidanceKeeping
    reads_grid: bool
    takes_mean: bool
    itself: int | None
    within: Mapping[int, Sequence[int]]
    livenesses: dict[tuple[Ahead, bool], Liveness] = field(
        default_factory=dict[tuple[Ahead, bool], Liveness], repr=False, compare=False
    )
    """Cached liveness, by the forecast of the clock."""
    recall: Recall = field(init=False, repr=False, compare=False)
    is_static: bool = field(init=False, repr=False, compare=False)
    """Whether all decisions depend only on the clock, the memories and the facts of the run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "recall", Recall(self.program))
        object.__setattr__(self, "is_static", not (self.followed or self.program.measured or self.program.externals))

    def liveness(self, ahead: Ahead, *, loose: bool) -> Liveness:
        """Return what later steps may read.

        Args:
            ahead: The forecast of the clock.
            loose: Whether sites may compute although their rules allow a reuse.
        """
        liveness = self.livenesses.get((ahead, loose))
        if liveness is None:
            if len(self.livenesses) >= _MOST_CLOCKS:
                self.livenesses.clear()
            liveness = self.livenesses[ahead, loose] = Liveness(self.program, ahead, loose=loose)
        return liveness


_MOST_CLOCKS = 32  # number of cached clock forecasts


@dataclass(slots=True, eq=False)
class Trims:
    """What a call releases: the sites of each group with less to read than before, and whether held bytes change."""

    releases: Sequence[tuple[Sequence[int], Reads]]
    changed: bool


UNKNOWN_TRIMS = Trims((), changed=False)
"""Stands for releases that depend on more than the clock and the memories."""


@dataclass(slots=True, eq=False)
class StepTable:
    """Decisions of one call that depend only on the clock and the memories, and all that follows from them.

    Attributes:
        memories: The memories before the call. They stay alive with the table, so that their `id` stays unique.
        decisions: The decisions, by group of the coarse partition. Do not modify them.
        after: The memories after the call.
        reuses: Whether a site reuses.
        codes: The operations of all sites, by what later steps may read and by how results are stored.
        trims: What the call releases, by what later steps may read and by the trims of the call before.
    """

    memories: list[Memory]
    decisions: list[Decision]
    after: list[Memory]
    reuses: bool
    codes: dict[tuple[Liveness, Op], list[Op]] = field(default_factory=dict[tuple[Liveness, Op], list[Op]])
    trims: dict[tuple[Liveness, Trims | None], Trims] = field(
        default_factory=dict[tuple[Liveness, "Trims | None"], Trims]
    )


class Recall:
    """The tables of calls whose decisions depend only on the clock and the memories. They repeat in each trajectory.

    Memories are identified by object: the list that a table has `after` its call is passed at the next call.
    """

    _MOST = 4096

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[tuple[int, Tick], StepTable] = {}
        self.start = program.coarse.start()

    def table(self, memories: list[Memory], tick: Tick) -> StepTable:
        """Return the table of a call."""
        key = (id(memories), tick)
        table = self._known.get(key)
        if table is None:
            if len(self._known) >= self._MOST:
                self._known.clear()
            decisions, after = decide_all(self._program, self._program.coarse, memories, tick)
            reuses = any(decision.verdict == "reuse" for decision in decisions)
            table = self._known[key] = StepTable(memories, decisions, after, reuses)
        return table


def lay_out(plan: Plan) -> ExecutionPlan:
    """Compute the execution plan of a plan."""
    actions = [bound.rule.action for bound in plan.rules if bound.sites and not _never(bound.rule.when)]
    approximations = [action for action in actions if isinstance(action, ir.ApproximateUncond)]
    # The arguments of `spectral` tell how what it keeps is laid out.
    spectral = [action for action in approximations if action.method == "spectral"]
    approximation = next(iter(spectral + approximations), None)
    inside = {site.index: _inside(plan, site) for site in plan.sites}
    within = dict[int, list[int]]()
    for site in plan.sites:
        for outer in site.parents:
            within.setdefault(outer, []).append(site.index)
    kept = dict[tuple[int, bool], Keeping]()
    keepings = list[Keeping]()
    for site in plan.sites:
        key = group, span = plan.groups.group_of[site.index], len(site.modules) > 1 or bool(inside[site.index])
        if key not in kept:
            rules = [bound.rule for bound in plan.groups.rules[group]]
            kept[key] = keeping(rules, span=span, halves=approximation is not None)
        keepings.append(kept[key])
    return ExecutionPlan(
        plan,
        prepare(plan, Lowering(plan.resolved.tables)),
        follows(plan),
        signals_of(plan),
        keepings,
        {site.index: site.modules for site in plan.sites},
        {
            site: plan.sites[site].modules
            for bound in plan.rules
            if isinstance(bound.rule.action, ir.Skip) and not _never(bound.rule.when)
            for site in bound.sites
        },
        inside,
        approximation,
        GuidanceKeeping(bool(spectral), max(map(kept_pairs, approximations), default=0)),
        any(isinstance(action, ir.Predict) and action.predictor == "band" for action in actions),
        any(map(is_mean, actions)),
        next((site.index for site in plan.sites if site.modules == ("",)), None),
        within,
    )


def _never(when: ir.Expression | None) -> bool:
    """Return True if a `when` is false at any time because of its constants."""
    match when:
        case ir.Boolean():
            return not when.value
        case ir.Negation(operand=ir.Boolean(value=value)):
            return value
        case ir.Both():
            return any(_never(operand) for operand in when.operands)
        case _:
            return False


def _inside(plan: Plan, site: Site) -> frozenset[ir.Probe]:
    """Return the probes that stand inside the first module of a site and that its rules read before they decide it."""
    lead = site.modules[0]
    if not lead:
        return frozenset()
    read = plan.read_now.get(site.index, frozenset[ir.Probe]())
    return frozenset(probe for probe in read if plan.probes[probe].modules[0].startswith(f"{lead}."))
