"""The plan in the form that the engine reads, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cachepolicy.engine.actions import Op
from cachepolicy.engine.signals import Signals, signals_of
from cachepolicy.language import ir
from cachepolicy.planning.history_spec import GuidanceKeeping, Keeping, keeping, kept_pairs
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.plan import Plan, Site
from cachepolicy.planning.possible_decisions import Ahead
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
        itself: The site number of the root model itself, or None.
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
    itself: int | None
    codes: dict[tuple[bool, tuple[Op, ...]], list[Op]] = field(
        default_factory=dict[tuple[bool, tuple[Op, ...]], list[Op]], repr=False, compare=False
    )
    """Cached operations of all sites, by those of their groups."""
    livenesses: dict[tuple[Ahead, bool], Liveness] = field(
        default_factory=dict[tuple[Ahead, bool], Liveness], repr=False, compare=False
    )
    """Cached liveness, by the forecast of the clock."""
    recall: Recall = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "recall", Recall(self.program))

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


class Recall:
    """Cache of decisions that depend only on the clock and the memories. They repeat in each trajectory.

    Memories are identified by object: the list that `decided` returns is passed to it at the next call.
    """

    _MOST = 4096

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[tuple[int, Tick], tuple[list[Memory], list[Decision], list[Memory]]] = {}
        self.start = program.coarse.start()

    def decided(self, memories: list[Memory], tick: Tick) -> tuple[list[Decision], list[Memory]]:
        """Return the decisions of the coarse partition and the memories after them. Do not modify either."""
        key = (id(memories), tick)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= self._MOST:
                self._known.clear()
            decisions, after = decide_all(self._program, self._program.coarse, memories, tick)
            # The stored reference keeps `memories` alive, so that its id stays unique.
            known = self._known[key] = (memories, decisions, after)
        return known[1], known[2]


def lay_out(plan: Plan) -> ExecutionPlan:
    """Compute the execution plan of a plan."""
    actions = [bound.rule.action for bound in plan.rules if bound.sites and not _never(bound.rule.when)]
    approximations = [action for action in actions if isinstance(action, ir.ApproximateUncond)]
    # The arguments of `spectral` tell how what it keeps is laid out.
    spectral = [action for action in approximations if action.method == "spectral"]
    approximation = next(iter(spectral + approximations), None)
    inside = {site.index: _inside(plan, site) for site in plan.sites}
    keepings = [
        keeping(
            [bound.rule for bound in plan.rules if site.index in bound.sites],
            span=len(site.modules) > 1 or bool(inside[site.index]),
            halves=approximation is not None,
        )
        for site in plan.sites
    ]
    return ExecutionPlan(
        plan,
        prepare(plan),
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
        next((site.index for site in plan.sites if site.modules == ("",)), None),
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
