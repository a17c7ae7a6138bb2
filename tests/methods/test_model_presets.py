"""The presets of shipped policies are for models of diffusers that exist, and at most one is for a model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers

import cachepolicy
from cachepolicy._resources import shipped_policies
from cachepolicy.language import ir
from cachepolicy.language.linker import resolve
from cachepolicy.language.patterns import searcher
from cachepolicy.language.presets import ModelFacts, fits
from tests.support import zoo

PRESETS = {
    name: found
    for name in shipped_policies()
    if (found := [each for each in cachepolicy.load(name).statements if isinstance(each, ir.Preset)])
}
CLASSES = sorted(name for name in dir(diffusers) if name.endswith(("Transformer2DModel", "Transformer3DModel")))
MODELS = {
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "MochiTransformer3DModel": "mochi",
    "CosmosTransformer3DModel": "cosmos",
    "Lumina2Transformer2DModel": "lumina2",
    "CogVideoXTransformer3DModel": "cogvideox",
    "ConsisIDTransformer3DModel": "consisid",
    "WanTransformer3DModel": "wan",
}
"""Models of the zoo with the classes of TeaCache's presets."""


def names(policy: str, class_name: str, **config: Any) -> list[str]:
    """The presets that fit."""
    facts = ModelFacts(class_name, config=tuple(config.items()))
    return [preset.name for preset in PRESETS[policy] if fits(preset, facts)]


@pytest.mark.parametrize("policy", PRESETS)
def test_presets_are_for_one_class_of_diffusers(policy: str) -> None:
    """The regex of a preset takes exactly one class of diffusers."""
    for preset in PRESETS[policy]:
        assert 1 == len([name for name in CLASSES if searcher(preset.for_class)(name)]), preset.name


@pytest.mark.parametrize("policy", PRESETS)
def test_at_most_one_preset_fits(policy: str) -> None:
    """Whatever the configuration, no two presets of a policy fit."""
    values = {
        "num_layers": (2, 30, 40, 42),
        "in_channels": (16, 36, 48),
        "sample_height": (60, 300),
        "patch_size_t": (None, 2),
    }
    for class_name in CLASSES:
        for drawn in itertools.product(*values.values()):
            config = {key: value for key, value in zip(values, drawn, strict=True) if value is not None}
            assert len(names(policy, class_name, **config)) <= 1


@pytest.mark.parametrize(
    ("class_name", "config", "preset"),
    [
        ("FluxTransformer2DModel", {"num_layers": 19}, "flux"),
        ("WanTransformer3DModel", {"num_layers": 30, "in_channels": 16}, "wan_t2v_1_3b"),
        ("WanTransformer3DModel", {"num_layers": 40, "in_channels": 16}, "wan_t2v_14b"),
        ("CogVideoXTransformer3DModel", {"num_layers": 30, "sample_height": 60}, "cogvideox_2b"),
        ("CogVideoXTransformer3DModel", {"num_layers": 42, "sample_height": 60}, "cogvideox_5b"),
        (
            "CogVideoXTransformer3DModel",
            {"num_layers": 42, "sample_height": 300, "patch_size_t": 2},
            "cogvideox_1_5_5b",
        ),
    ],
)
def test_presets_of_published_configurations(class_name: str, config: dict[str, Any], preset: str) -> None:
    """The published configurations get the polynomial of their model."""
    assert [preset] == names("teacache", class_name, **config)


@pytest.mark.parametrize("config", [{"num_layers": 40, "in_channels": 36}, {"num_layers": 30, "in_channels": 48}])
def test_models_without_a_polynomial_have_no_preset(config: dict[str, Any]) -> None:
    """Wan's I2V models cannot be told apart, and the 5B of Wan 2.2 is another model."""
    assert [] == names("teacache", "WanTransformer3DModel", **config)


@pytest.mark.parametrize("preset", PRESETS["teacache"], ids=lambda preset: preset.name)
def test_probes_of_teacache_name_one_module(preset: ir.Preset) -> None:
    """The probe of a preset, or the default, is one module of its class."""
    (class_name,) = (name for name in CLASSES if searcher(preset.for_class)(name))
    resolved = resolve(cachepolicy.load("teacache"), {"preset": preset.name})
    (probe,) = resolved.settings["probe"]  # pyright: ignore[reportGeneralTypeIssues]
    found = [name for name, _ in zoo.build(MODELS[class_name]).named_modules() if searcher(str(probe))(name)]
    assert 1 == len(found)
