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
from tests.methods import transcriptions as reference
from tests.methods.scripted import letters
from tests.support import zoo

PRESETS = {
    name: found
    for name in shipped_policies()
    if (found := [each for each in cachepolicy.load(name).statements if isinstance(each, ir.Preset)])
}
ELSEWHERE = ["OpenSoraT2V", "STDiT3"]
"""Classes of models that diffusers does not have."""

CLASSES = sorted(
    name for name in dir(diffusers) if name.endswith(("Transformer2DModel", "Transformer3DModel", "2DConditionModel"))
)
MODELS = {
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "MochiTransformer3DModel": "mochi",
    "CosmosTransformer3DModel": "cosmos",
    "Lumina2Transformer2DModel": "lumina2",
    "CogVideoXTransformer3DModel": "cogvideox",
    "ConsisIDTransformer3DModel": "consisid",
    "WanTransformer3DModel": "wan",
    "LTXVideoTransformer3DModel": "ltx",
    "LatteTransformer3DModel": "latte",
    "HiDreamImageTransformer2DModel": "hidream",
}
"""Models of the zoo with the classes of TeaCache's presets."""


def names(policy: str, class_name: str, **config: Any) -> list[str]:
    """The presets that fit."""
    facts = ModelFacts(class_name, config=tuple(config.items()))
    return [preset.name for preset in PRESETS[policy] if fits(preset, facts)]


@pytest.mark.parametrize("policy", PRESETS)
def test_presets_are_for_one_class(policy: str) -> None:
    """The regex takes one class, of diffusers with two exceptions, or any where a preset is chosen by name alone."""
    for preset in PRESETS[policy]:
        if (preset.for_class, preset.when) == (".", ir.Boolean(value=False)):
            continue
        assert 1 == len([name for name in [*CLASSES, *ELSEWHERE] if searcher(preset.for_class)(name)]), preset.name


@pytest.mark.parametrize("policy", PRESETS)
def test_at_most_one_preset_fits(policy: str) -> None:
    """Whatever the configuration, no two presets of a policy fit."""
    values = {
        "num_layers": (2, 30, 40, 42),
        "in_channels": (16, 36, 48),
        "sample_height": (60, 300),
        "patch_size_t": (None, 2),
        "cross_attention_dim": (768, 2048),
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


@pytest.mark.parametrize(
    ("width", "expected"), [(768, ["stable_diffusion"]), (1024, ["stable_diffusion"]), (2048, ["sdxl"]), (512, [])]
)
def test_presets_of_u_nets(width: int, expected: list[str]) -> None:
    """The width of the prompt tells the published U-Nets apart."""
    assert expected == names("deepcache", "UNet2DConditionModel", cross_attention_dim=width)


@pytest.mark.parametrize("config", [{"num_layers": 40, "in_channels": 36}, {"num_layers": 30, "in_channels": 48}])
def test_models_without_a_polynomial_have_no_preset(config: dict[str, Any]) -> None:
    """Wan's I2V models cannot be told apart, and the 5B of Wan 2.2 is another model."""
    assert [] == names("teacache", "WanTransformer3DModel", **config)


@pytest.mark.parametrize(
    ("policy", "preset"),
    [
        pytest.param(policy, preset, id=preset.name)
        for policy in ("teacache", "teacache_inline")
        for preset in PRESETS[policy]
        if not any(map(searcher(preset.for_class), ELSEWHERE))
    ],
)
def test_probes_of_teacache_name_one_module(policy: str, preset: ir.Preset) -> None:
    """The probe of a preset, or the default, is one module of its class."""
    (class_name,) = (name for name in CLASSES if searcher(preset.for_class)(name))
    resolved = resolve(cachepolicy.load(policy), {"preset": preset.name})
    (probe,) = resolved.settings["probe"]  # pyright: ignore[reportGeneralTypeIssues]
    found = [name for name, _ in zoo.build(MODELS[class_name]).named_modules() if searcher(str(probe))(name)]
    assert 1 == len(found)


@pytest.mark.parametrize("name", ["ltx", "latte"])
def test_the_inline_probe_is_measured_before_the_blocks(name: str) -> None:
    """The input of the first attention is measured in its block, and no attention runs where the blocks are reused."""
    model = zoo.build(name)
    ran = list[int]()
    attention = model.get_submodule("transformer_blocks.0.attn1.to_q")
    attention.register_forward_hook(lambda *_: ran.append(1))
    with cachepolicy.apply(model, "teacache_inline", steps=6, coefficients=[0.0], threshold=1.0) as run:
        list(zoo.trajectory(name, model, [1000 - 150 * step for step in range(6)]))
        assert run.trace is not None
        (row,) = set(run.trace.rows().values())
    assert "CRRRRC" == row
    assert 2 == len(ran)


def test_hidream_is_planned_by_its_timesteps() -> None:
    """TeaCache by the timestep decides on a model as the authors' loop does."""
    times = [1000 * (1 - step / 24) ** 1.3 for step in range(24)]
    coefficients = [0.5, 1.0, 0.02]
    expected = letters(reference.teacache([[time] for time in times], coefficients, 0.3))
    model = zoo.build("hidream")
    with cachepolicy.apply(
        model, "teacache_timestep", steps=24, coefficients=coefficients, threshold=0.3, trace=True
    ) as run:
        list(zoo.trajectory("hidream", model, times))
        assert run.trace is not None
        (row,) = set(run.trace.rows().values())
    assert expected == row
    assert "R" in row
