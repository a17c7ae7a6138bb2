"""The zoo's models are usable: they run, they depend on the step and on nothing but the seed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from diffusers.models import ModelMixin, transformers, unets  # noqa: E402

from cachepolicy.diffusers.argument_names import TIMESTEP_NAMES  # noqa: E402
from cachepolicy.diffusers.timestep_scaling import scale_of  # noqa: E402
from cachepolicy.engine.introspection import describe  # noqa: E402
from tests.support import zoo  # noqa: E402


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


@pytest.mark.parametrize("name", zoo.names())
def test_cross_attention_is_told_from_the_live_model(name: str) -> None:
    """Attention whose keys come from elsewhere is known as such, and joint and self attention is not."""
    kinds = {each.name: each.kinds for each in describe(zoo.build(name)).modules if "attention" in each.kinds}
    cross = {path for path, labels in kinds.items() if "cross_attention" in labels}
    assert cross == {path for path in kinds if re.search(zoo.entry(name).cross, path)}


@pytest.mark.parametrize("name", zoo.names())
def test_timesteps_are_read_in_training_units(name: str) -> None:
    """The engine's table of scales undoes what a pipeline does to the timestep of each class."""
    feed, scale = zoo.entry(name).feed, scale_of(zoo.entry(name).model_class)
    if scale is None:
        pytest.skip("this class is called with what is no timestep")
    assert feed.argument in TIMESTEP_NAMES
    assert [scale.to_training(feed.value(t)) for t in (0.0, 250.0, 999.0)] == pytest.approx([0.0, 250.0, 999.0])


def test_every_denoiser_is_in_the_zoo_or_left_out_for_a_reason() -> None:
    """No class of diffusers' transformers and UNets is forgotten."""
    found = {name for module in (transformers, unets) for name, each in vars(module).items() if _is_model(each)}
    built = {zoo.entry(name).class_name for name in zoo.names()}
    assert found - built <= zoo.NOT_BUILT.keys()
    assert not built & zoo.NOT_BUILT.keys()


def _is_model(each: object) -> bool:
    return isinstance(each, type) and issubclass(each, ModelMixin)


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
    expectations: dict[zoo.Guidance, int] = {"none": 3, "batched": 3, "sequential": 6}
    for guidance, expected in expectations.items():
        calls.clear()
        outputs = list(zoo.trajectory(name, model, [900.0, 500.0, 100.0], guidance=guidance))
        assert (len(outputs), len(calls)) == (3, expected)


def test_importing_the_zoo_imports_no_torch() -> None:
    """The list of models can be read without the time that importing torch takes."""
    code = "import sys, tests.support.zoo; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0
