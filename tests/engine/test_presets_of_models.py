"""Presets of a policy on live models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import cachepolicy
from cachepolicy.engine.introspection import describe
from cachepolicy.errors import PolicyError
from cachepolicy.planning.module_tree import tree_from_json, tree_to_json
from cachepolicy.testing.models import Toy, ToyDiT, inputs
from cachepolicy.tracing.trace import from_json

POLICY = """param interval: int
preset toy for class "^Toy" when {} with interval = 3
match attention every interval -> reuse
"""


def toy(config: Mapping[str, Any] | None = None) -> ToyDiT:
    model = ToyDiT(Toy(blocks=3)).eval()
    if config is not None:
        model.config = config  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def test_what_presets_ask_of_a_model() -> None:
    """Its class, the width of its stream, its blocks, and the scalars of its configuration."""
    facts = describe(toy({"a": 1, "b": True, "c": "x", "d": 0.5, "e": [1], "f": None, "g": float("nan")})).facts
    assert facts is not None
    width = inputs(Toy(blocks=3))[0].shape[-1]
    assert ("ToyDiT", width, 3) == (facts.class_name, facts.width, facts.depth)
    assert (("a", 1), ("b", True), ("c", "x"), ("d", 0.5)) == facts.config


def test_facts_are_saved_with_the_module_tree() -> None:
    """What is read back fits the same presets."""
    skeleton = describe(toy({"a": 1, "b": True, "d": 1.0}))
    assert skeleton == tree_from_json(tree_to_json(skeleton))


def test_apply_takes_the_preset_that_fits() -> None:
    """The plan, the trace and the text of the trace name it; a saved trace is read back with it."""
    model = toy({"kind": "a"})
    policy = cachepolicy.parse(POLICY.format('depth == 3 and kind == "a"'))
    x, y = inputs(Toy(blocks=3))
    with cachepolicy.apply(model, policy, steps=6) as run, torch.no_grad():
        for step in range(6):
            model(x, torch.tensor(900.0 - 100 * step), y)
        trace = run.trace
    assert trace is not None
    assert {"CRRCRR"} == set(trace.rows().values())
    assert "toy" == run.plan.resolved.preset
    assert "preset `toy`" in str(trace)
    assert "toy" == next(iter(from_json(trace.to_json()))).plan.resolved.preset


def test_apply_refuses_where_no_preset_fits() -> None:
    """Before any hook, with the list of presets; a param or the name of a preset is the way out."""
    policy, model = cachepolicy.parse(POLICY.format("depth == 4")), toy()
    with pytest.raises(PolicyError, match=r"E166"):
        cachepolicy.apply(model, policy)
    with cachepolicy.apply(model, policy, interval=2, steps=4) as run:
        assert {"interval": 2} == run.plan.resolved.settings
    with cachepolicy.apply(model, policy, preset="toy", steps=4) as run:
        assert {"interval": 3} == run.plan.resolved.settings
