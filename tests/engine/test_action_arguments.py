"""Arguments of actions at run time: they read the site's own past, and one without a value makes the site compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cachepolicy
from cachepolicy.testing import checks, strategies
from cachepolicy.testing.models import Toy, ToyDiT, inputs, redraw

STEPS = 8
SITE = "blocks.0.attn"


def run(policy: str, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """Run a toy on one unchanging context, and return its outputs and the trajectory."""
    model = ToyDiT(Toy()).eval()
    redraw(model, 3)
    x, y = inputs(Toy(), seed=1)
    outputs = list[torch.Tensor]()
    with cachepolicy.apply(model, cachepolicy.parse(policy), steps=STEPS, **options) as applied, torch.no_grad():
        for step in range(STEPS):
            outputs.append(model(x * (1 + step), torch.tensor(900.0 - 100 * step), y))
        (trajectory,) = applied.trace.trajectories
    checks.trace_agrees(trajectory)
    return outputs, trajectory


@pytest.mark.parametrize(
    ("argument", "equal"),
    [
        # Computes at 0 to 3 and 6. At the steps 4, 5 and 7: age 1, 2, 1; gap 1, 1, 3; computes 4, 4, 5.
        ("age", "2 if step == 5 else 1"),
        ("gap", "3 if step == 7 else 1"),
        ("computes", "5 if step == 7 else 4"),
    ],
)
def test_arguments_read_the_past_of_the_site(argument: str, equal: str) -> None:
    """The same tensors as with the numbers written out."""
    rule = "match attention when step >= 3 every 3 -> predict linear(weight: {})"
    (one, _), (other, _) = run(rule.format(argument)), run(rule.format(equal))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("selector", ["attention", "blocks", "model"])
def test_an_undefined_argument_makes_the_site_compute(selector: str) -> None:
    """Of the clock, as the simulator says."""
    _, trajectory = run(f"match {selector} every 3 -> predict linear(weight: 1 / (3 - gap))")
    (row,) = set(trajectory.rows().values())
    assert "CCRCRRCC" == row
    assert {} == trajectory.facts


@pytest.mark.parametrize("selector", ["attention", "blocks", "model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_external_without_a_finite_number_makes_the_site_compute(selector: str, value: float) -> None:
    """The run finds it where the site would be answered, and the trace has the fact."""
    policy = f"external push: float\nmatch {selector} -> predict linear(weight: push)"
    _, trajectory = run(policy, push=lambda: value)
    assert {"C" * STEPS} == set(trajectory.rows().values())
    assert {"an argument of its action has no value"} == set(trajectory.facts.values())


def test_an_undefined_factor_makes_a_guidance_batch_compute() -> None:
    """A factor of `approximate uncond` that has no value leaves both halves to the model."""
    action = strategies.APPROXIMATION.replace("low: 1.1", "low: push")
    policy = f"external push: float\nmatch model -> {action}"
    values = iter([float("nan")] * 2 + [1.0] * STEPS)
    push: Callable[[], float] = lambda: next(values)  # noqa: E731
    model = ToyDiT(Toy()).eval()
    redraw(model, 3)
    x, y = inputs(Toy(), seed=1)
    options = {"steps": STEPS, "guidance": True, "push": push}
    with cachepolicy.apply(model, cachepolicy.parse(policy), **options) as applied, torch.no_grad():
        for step in range(STEPS):
            model(x.repeat(2, 1, 1), torch.tensor(900.0 - 100 * step), torch.cat([-y, y]))
        (trajectory,) = applied.trace.trajectories
    assert "CCCRRRRR" == trajectory.rows()["model"]
