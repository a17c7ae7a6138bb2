"""The public surface as a type checker sees it; checked by pyright, never run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import cachepolicy

if TYPE_CHECKING:
    from torch import nn

    from cachepolicy.planning.plan import Plan
    from cachepolicy.planning.simulation import Schedule
    from cachepolicy.reports.explanation import Explanation


def policies() -> None:
    """Reading, writing and judging need no casts."""
    policy = assert_type(cachepolicy.load("pab"), cachepolicy.Policy)
    assert_type(cachepolicy.load(Path("mine.cp")), cachepolicy.Policy)
    assert_type(cachepolicy.parse("match attention every 2 -> reuse\n"), cachepolicy.Policy)
    assert_type(cachepolicy.format(policy), str)
    assert_type(cachepolicy.__version__, str)


def schedules() -> None:
    """What a simulation gives is typed through to the letters."""
    schedule: Schedule = cachepolicy.simulate("pab", steps=20, spatial_every=3)
    assert_type(schedule.rows, dict[str, str])
    plan: Plan = cachepolicy.plan("pab", spatial_range=(100, 800))
    assert_type(plan.sites[0].name, str)
    explanation: Explanation = cachepolicy.explain("pab", "transformer_blocks.0.attn1@3", steps=20)
    assert_type(explanation.step, int)


def runs(model: nn.Module) -> None:
    """A run is a context manager of itself."""
    with cachepolicy.apply(model, "pab", steps=20, timestep=lambda: 500.0, spatial_every=3) as run:
        assert_type(run, cachepolicy.Run)
        run.reset()
        with run.session("mine"), run.disabled():
            pass
        assert_type(str(run.trace), str)
    cachepolicy.remove(model)


def errors() -> None:
    """Whatever is wrong with a policy is one exception, with diagnostics."""
    try:
        cachepolicy.load("no such policy")
    except cachepolicy.PolicyError as error:
        assert_type(error.diagnostics[0].code, str)
        assert_type(error.diagnostics[0].help, str | None)
