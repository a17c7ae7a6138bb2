"""What a site's history saves: operations that need not be done, told from the model and the schedule alone.

It decides which sites keep theirs under a memory limit, so it must be the same in every run and on every process: it is
counted in whole numbers, from parameters, shapes and the rules, never measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cachepolicy.planning.plan import Plan
from cachepolicy.planning.possible_decisions import Ahead, Moment, Outlooks
from cachepolicy.planning.schedule import Program, Tick
from cachepolicy.planning.simulation import evenly, replay

STEPS = 50  # of a trajectory whose length nobody tells


@dataclass(frozen=True, slots=True)
class Weight:
    """The parameters of a site, and how many attention modules it holds."""

    parameters: int
    attentions: int


def operations(weight: Weight, shape: Sequence[int]) -> int:
    """Floating-point operations of a site with an output of that shape, roughly.

    Two a parameter and token, and for each attention inside four a pair of tokens and channel. Outputs are (batch,
    tokens, channels), or (batch, channels, and the sizes of a picture or video).
    """
    samples = shape[0] if shape else 1
    tokens, width = (math.prod(shape[2:]), shape[1]) if len(shape) > 3 else (math.prod(shape[1:-1]), (shape or [1])[-1])
    return samples * (2 * weight.parameters * tokens + 4 * weight.attentions * tokens * tokens * width)


def site_weights(plan: Plan, parameters: Mapping[str, int]) -> list[Weight]:
    """What each site of the plan weighs; `parameters` are those of each module itself, without its children's."""
    attentions = [module.name for module in plan.skeleton.modules if "attention" in module.kinds]
    outermost = [name for name in attentions if not any(name.startswith(f"{outer}.") for outer in attentions)]
    return [
        Weight(
            sum(count for name, count in parameters.items() if _inside(name, site.modules)),
            sum(1 for name in outermost if _inside(name, site.modules)),
        )
        for site in plan.sites
    ]


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == outer or not outer or name.startswith(f"{outer}.") for outer in modules)


@dataclass(slots=True)
class Reuses:
    """How often each group of a program reuses on one clock: as planned, or as often as it may where a run decides."""

    program: Program
    ahead: Ahead
    _found: dict[tuple[str, int | None], list[int]] = field(default_factory=dict[tuple[str, int | None], list[int]])

    def of(self, group: int, tick: Tick) -> int:
        """The reuses of a group of `program.alike` on the branch of `tick`."""
        key = (tick.branch, tick.steps)
        if key not in self._found:
            self._found[key] = self._counted(tick)
        return self._found[key][group]

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
                moments = [Moment(each, each.step, each.branch) for each in ticks]
                counts.append(sum(any(each.reads for each in outlooks.of(number, one, None)) for one in moments))
            else:
                counts.append(sum(decided[group.sites[0]].verdict == "reuse" for _, decided in schedule))
        return counts
