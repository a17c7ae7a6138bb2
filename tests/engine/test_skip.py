"""`skip` needs no history: after the first call of a run it holds in every trajectory and on every branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.planning.schedule import UNKNOWN_FORM
from cachepolicy.testing import checks
from cachepolicy.testing.models import Returns, Toy, inputs, sample

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

TIMESTEPS = (900.0, 600.0, 300.0)


def run(model: Any) -> None:
    """One loop under sequential guidance."""
    x, y = inputs(Toy())
    with torch.no_grad():
        list(sample(model, TIMESTEPS, x, [y, -y]))


@pytest.mark.parametrize("way", ["eager", "whole", "blocks"])
@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize("selector", ["blocks[1:]", "each blocks[1:]", '"^blocks.1.ff$"'])
def test_only_the_first_call_of_a_run_computes(selector: str, returns: Returns, way: str) -> None:
    """It shows what the skipped module returns; the simulator takes that as a fact."""
    model = Toy(blocks=3, returns=returns).build()
    torch.compiler.reset()
    with cachepolicy.apply(model, parse(f"match {selector} -> skip"), steps=len(TIMESTEPS)) as attached:
        for module in {"eager": [], "whole": [model], "blocks": [*model.blocks]}[way]:
            module.compile(backend="eager")
        run(model)
        run(model)
        assert attached.trace is not None
        first, second = attached.trace.trajectories
    one, other = first.branches
    assert {"CRR"} == set(first.rows(one).values())
    assert {"RRR"} == set(first.rows(other).values())
    assert {"RRR"} == {row for branch in (one, other) for row in second.rows(branch).values()}
    assert {UNKNOWN_FORM} == set(first.facts.values())
    assert {} == second.facts
    checks.trace_agrees(first)
    checks.trace_agrees(second)
