"""The zoo's models are usable: they run, they depend on the step and on nothing but the seed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from cachepolicy.testing import zoo  # noqa: E402


def _flat(prediction: Any) -> Any:
    parts = prediction if isinstance(prediction, (list, tuple)) else [prediction]
    return torch.cat([part.flatten() for part in parts])


def _call(name: str, model: Any, t: float, *, batch: int = 1, seed: int = 0) -> Any:
    return _flat(zoo.output(model(**zoo.entry(name).inputs(batch=batch, t=t, seed=seed))))


@pytest.mark.parametrize("name", zoo.names())
def test_entry_runs_and_depends_on_its_step(name: str) -> None:
    """Every entry builds, and answers two timesteps with finite numbers that differ."""
    model = zoo.build(name)
    early, late = _call(name, model, 900.0), _call(name, model, 300.0)
    assert early.isfinite().all()
    assert late.isfinite().all()
    assert not torch.allclose(early, late, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", zoo.names())
def test_entry_depends_on_its_seed_only(name: str) -> None:
    """Two builds of one seed agree to the last bit, whatever the global generator; another seed gives another model."""
    first = _call(name, zoo.build(name, seed=1), 500.0)
    torch.rand(3)
    assert torch.equal(first, _call(name, zoo.build(name, seed=1), 500.0))
    assert not torch.equal(first, _call(name, zoo.build(name, seed=2), 500.0))


def test_building_leaves_the_global_generator_alone() -> None:
    """Building a model draws nothing from the caller's generator."""
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    zoo.build("dit")
    assert torch.equal(expected, torch.rand(2))


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_batched_and_sequential_guidance_cost_the_same_samples(name: str) -> None:
    """A batched trajectory makes one call a step, a sequential one two."""
    model = zoo.build(name)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for guidance, expected in (("none", 3), ("batched", 3), ("sequential", 6)):
        calls.clear()
        outputs = list(zoo.trajectory(name, model, [900.0, 500.0, 100.0], guidance=guidance))  # pyright: ignore
        assert (len(outputs), len(calls)) == (3, expected)


def test_importing_the_zoo_imports_no_torch() -> None:
    """The tools for testing can be imported where torch is slow to load or missing."""
    code = "import sys, cachepolicy.testing.zoo; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
