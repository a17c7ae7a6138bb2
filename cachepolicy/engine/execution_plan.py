"""A plan laid out for the engine: what of it a root's calls read, worked out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cachepolicy.engine.signals import Signals, signals_of
from cachepolicy.language import ir
from cachepolicy.planning.history_spec import Keeping, keeping
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import Ahead
from cachepolicy.planning.schedule import Decision, Memory, Program, Tick, decide_all, follows, prepare


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """A plan with all that follows from it.

    By site number: `keepings` are what its history has to hold, `names` its modules, `inside` the probes that stand
    inside its first block, so that it has to begin before it can be decided. `approximation` is the action that
    rebuilds the unconditional half, where there is one; `itself` is the number of the root's own site.
    """

    plan: Plan
    program: Program
    followed: frozenset[str]
    signals: Signals
    keepings: Sequence[Keeping]
    names: Mapping[int, Sequence[str]]
    inside: Mapping[int, frozenset[ir.Probe]]
    approximation: ir.ApproximateUncond | None
    itself: int | None
    codes: dict[tuple[bool, tuple[str, ...]], list[str]] = field(
        default_factory=dict[tuple[bool, tuple[str, ...]], list[str]], repr=False, compare=False
    )
    """What frames hold, by the decisions that they were made from."""
    livenesses: dict[tuple[Ahead, bool], Liveness] = field(
        default_factory=dict[tuple[Ahead, bool], Liveness], repr=False, compare=False
    )
    """What may be read later, by what is known of the clock."""
    recall: Recall = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "recall", Recall(self.program))

    def liveness(self, ahead: Ahead, *, loose: bool) -> Liveness:
        """What may be read later on this clock; `loose` where a site always computes that its rules may reuse."""
        found = self.livenesses.get((ahead, loose))
        if found is None:
            if len(self.livenesses) >= _MOST_CLOCKS:
                self.livenesses.clear()
            found = self.livenesses[ahead, loose] = Liveness(self.program, ahead, loose=loose)
        return found


_MOST_CLOCKS = 32  # distinct clocks whose answers are kept


class Recall:
    """What was decided where nothing but the clock and the past decide: the same at the same step of every run.

    A past is known by its object: what `decided` gives as the memories after a call is given back to it at the next.
    """

    _MOST = 4096

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[tuple[int, Tick], tuple[list[Memory], list[Decision], list[Memory]]] = {}
        self.start = program.coarse.start()

    def decided(self, memories: list[Memory], tick: Tick) -> tuple[list[Decision], list[Memory]]:
        """The decisions by group of the coarse partition, and the memories after them; neither may be changed."""
        key = (id(memories), tick)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= self._MOST:
                self._known.clear()
            decisions, after = decide_all(self._program, self._program.coarse, memories, tick)
            # The first entry keeps the past alive, so that its number stays its own.
            known = self._known[key] = (memories, decisions, after)
        return known[1], known[2]


def lay_out(plan: Plan) -> ExecutionPlan:
    """Work out what the engine reads of a plan."""
    actions = [bound.rule.action for bound in plan.rules if bound.sites and not _never(bound.rule.when)]
    approximation = next((each for each in actions if isinstance(each, ir.ApproximateUncond)), None)
    inside = {site.index: _inside(plan, site.modules) for site in plan.sites}
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
        inside,
        approximation,
        next((site.index for site in plan.sites if site.modules == ("",)), None),
    )


def _never(when: ir.Expression | None) -> bool:
    """True where a `when` is false whatever the clock: its constants alone make it so."""
    match when:
        case ir.Boolean():
            return not when.value
        case ir.Negation(operand=ir.Boolean(value=value)):
            return value
        case ir.Both():
            return any(_never(operand) for operand in when.operands)
        case _:
            return False


def _inside(plan: Plan, modules: Sequence[str]) -> frozenset[ir.Probe]:
    lead = modules[0]
    if not lead:
        return frozenset()
    return frozenset(probe for probe, place in plan.probes.items() if place.modules[0].startswith(f"{lead}."))
