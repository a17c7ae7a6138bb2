"""diffusers' cache API over policies: its names, fields and defaults, its numbers, and configs that are checked."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from diffusers import hooks as theirs
from diffusers.models.cache_utils import CacheMixin as TheirMixin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cachepolicy
import cachepolicy.diffusers as ours
from cachepolicy import PolicyError
from cachepolicy.diffusers.configs import config_of
from cachepolicy.language.linker import resolve
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONFIGS = {"PyramidAttentionBroadcastConfig": 10, "FasterCacheConfig": 19, "FirstBlockCacheConfig": 1}
"""The configs, and how many fields each has."""

FUNCTIONS = ("apply_pyramid_attention_broadcast", "apply_faster_cache", "apply_first_block_cache")
TIMESTEPS = (999.0, 900.0, 780.0, 650.0, 600.0, 520.0, 400.0, 300.0, 180.0, 90.0, 20.0)


class Clock:
    """The timestep that a pipeline would show: set by the loop, read by the callback."""

    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        return self.t

    def over(self, timesteps: Sequence[float]) -> Iterator[float]:
        for self.t in timesteps:
            yield self.t


def sample(name: str, model: nn.Module, clock: Clock, **options: Any) -> list[torch.Tensor]:
    """The predictions of a sampling loop."""
    with torch.no_grad():
        return list(zoo.trajectory(name, model, clock.over(TIMESTEPS), **options))


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def text(config: Any) -> str:
    """The last statement of the policy that a config stands for, on one line."""
    return " ".join(cachepolicy.format(config.policy()).split("\n\n")[-1].split())


# --- names


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_have_the_fields_defaults_and_order_of_diffusers(name: str) -> None:
    """Each parameter of a config has diffusers' name, place, kind and default."""
    own, their = (inspect.signature(getattr(module, name)).parameters for module in (ours, diffusers))
    assert [(each.name, each.kind, each.default) for each in their.values()] == [
        (each.name, each.kind, each.default) for each in own.values()
    ]
    assert {"PyramidAttentionBroadcastConfig": 10, "FasterCacheConfig": 19, "FirstBlockCacheConfig": 1}[name] == len(
        own
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_parameters_of_diffusers(name: str) -> None:
    """The functions are called as diffusers' are."""
    own, their = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert [(each.name, each.kind, each.default) for each in their.values()] == [
        (each.name, each.kind, each.default) for each in own.values()
    ]


KNOWS_STEPS = "kwargs" in inspect.signature(TheirMixin.cache_context).parameters
"""Whether a context of diffusers takes more than a name: 0.42 and later."""


@pytest.mark.parametrize(
    "name",
    [
        "enable_cache",
        "disable_cache",
        pytest.param("cache_context", marks=pytest.mark.skipif(not KNOWS_STEPS, reason="an older signature")),
        "_reset_stateful_cache",
    ],
)
def test_the_mixin_has_the_methods_of_diffusers(name: str) -> None:
    """Methods have the same parameters."""
    own, their = (inspect.signature(getattr(each, name)).parameters for each in (ours.CacheMixin, TheirMixin))
    assert [(each.name, each.kind, each.default) for each in their.values()] == [
        (each.name, each.kind, each.default) for each in own.values()
    ]


def test_the_mixin_has_the_property_of_diffusers() -> None:
    """`is_cache_enabled` is read, not called."""
    assert isinstance(inspect.getattr_static(ours.CacheMixin, "is_cache_enabled"), property)


@pytest.mark.parametrize("name", ours.__all__)
def test_every_name_is_also_the_packages(name: str) -> None:
    """What `cachepolicy.diffusers` has is importable from `cachepolicy`."""
    assert getattr(ours, name) is getattr(cachepolicy, name)


# --- configs as data


def test_configs_are_dataclasses() -> None:
    """Positional use, `replace`, `asdict`, equality and setting of fields work as with diffusers' configs."""
    config = ours.PyramidAttentionBroadcastConfig(2, None, 5, (100, 700))
    assert 5 == config.cross_attention_block_skip_range
    other = dataclasses.replace(config, temporal_attention_block_skip_range=3)
    assert 3 == other.temporal_attention_block_skip_range
    assert dataclasses.asdict(config) | {"temporal_attention_block_skip_range": 3} == dataclasses.asdict(other)
    other.temporal_attention_block_skip_range = None
    assert other == config


BAD = [
    ("PyramidAttentionBroadcastConfig", "spatial_attention_block_skip_range", 0),
    ("PyramidAttentionBroadcastConfig", "temporal_attention_block_skip_range", -2),
    ("PyramidAttentionBroadcastConfig", "cross_attention_block_skip_range", 2.5),
    ("PyramidAttentionBroadcastConfig", "cross_attention_block_skip_range", True),
    ("PyramidAttentionBroadcastConfig", "spatial_attention_timestep_skip_range", (800, 100)),
    ("PyramidAttentionBroadcastConfig", "spatial_attention_timestep_skip_range", (100, 100)),
    ("PyramidAttentionBroadcastConfig", "temporal_attention_timestep_skip_range", ("a", 1)),
    ("PyramidAttentionBroadcastConfig", "cross_attention_timestep_skip_range", (1, 2, 3)),
    ("PyramidAttentionBroadcastConfig", "cross_attention_timestep_skip_range", (math.nan, 2)),
    ("PyramidAttentionBroadcastConfig", "spatial_attention_block_identifiers", "blocks"),
    ("PyramidAttentionBroadcastConfig", "spatial_attention_block_identifiers", (1,)),
    ("PyramidAttentionBroadcastConfig", "temporal_attention_block_identifiers", ("(?<!x)blocks",)),
    ("PyramidAttentionBroadcastConfig", "cross_attention_block_identifiers", (r"(a)\1",)),
    ("PyramidAttentionBroadcastConfig", "current_timestep_callback", 500),
    ("FasterCacheConfig", "unconditional_batch_skip_range", "5"),
    ("FasterCacheConfig", "unconditional_batch_timestep_skip_range", None),
    ("FasterCacheConfig", "alpha_low_frequency", math.inf),
    ("FasterCacheConfig", "alpha_high_frequency", "1.1"),
    ("FasterCacheConfig", "spatial_attention_block_identifiers", ("(",)),
    ("FasterCacheConfig", "attention_weight_callback", 0.5),
    ("FasterCacheConfig", "tensor_format", "BHWC"),
    ("FasterCacheConfig", "is_guidance_distilled", 1),
    ("FasterCacheConfig", "_unconditional_conditional_input_kwargs_identifiers", "timestep"),
    *(("FirstBlockCacheConfig", "threshold", bad) for bad in (math.nan, math.inf, -1, "0.1", None, True)),
]


@pytest.mark.parametrize(("name", "field", "bad"), BAD)
def test_a_field_that_holds_what_it_cannot_is_named(name: str, field: str, bad: Any) -> None:
    """Making a config, replacing in it and setting a field of it are all refused, by the field's name."""
    config = getattr(ours, name)
    tries: list[Callable[[], Any]] = [
        lambda: config(**{field: bad}),
        lambda: dataclasses.replace(config(), **{field: bad}),
        lambda: setattr(config(), field, bad),
    ]
    for each in tries:
        with pytest.raises(PolicyError, match=f"`{field}`"):
            each()


def test_a_field_that_does_not_exist_is_refused() -> None:
    """A misspelt field is not dropped silently."""
    with pytest.raises(ValueError, match="treshold"):
        ours.FirstBlockCacheConfig(treshold=0.1)


# --- as policies


TEXTS = [
    (ours.FirstBlockCacheConfig(0.2), "use fbc with threshold = 0.2"),
    (
        ours.PyramidAttentionBroadcastConfig(2, cross_attention_block_skip_range=6),
        "use pab with spatial_every = 2, temporal_every = off, cross_every = 6",
    ),
    (
        ours.PyramidAttentionBroadcastConfig(
            temporal_attention_block_skip_range=3,
            temporal_attention_timestep_skip_range=(50, 950),
            temporal_attention_block_identifiers=["t"],
        ),
        """use pab with spatial_every = off, temporal_every = 3, cross_every = off, temporal_range = (50, 950),
        temporal_names = ["t"]""",
    ),
    (
        ours.FasterCacheConfig(),
        """use fastercache with spatial_every = 2, temporal_every = off, uncond_every = 5, feedback = true,
        format = "BCFHW\"""",
    ),
    (
        ours.FasterCacheConfig(
            3,
            alpha_low_frequency=1.3,
            tensor_format="BSC",
            is_guidance_distilled=True,
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "pooled"],
        ),
        """use fastercache with spatial_every = 3, temporal_every = off, uncond_every = 5, low = 1.3,
        feedback = true, format = "BSC", inputs = ["hidden_states", "pooled"], distilled = true""",
    ),
]


@pytest.mark.parametrize(("config", "expected"), TEXTS)
def test_a_config_is_the_shipped_policy_with_its_parameters_set(config: Any, expected: str) -> None:
    """The text says what is set, and reads back as the same policy."""
    assert " ".join(expected.split()) == text(config)
    assert resolve(cachepolicy.parse(cachepolicy.format(config.policy()))).digest == resolve(config.policy()).digest


def test_weight_callbacks_become_externals() -> None:
    """With callbacks the policy is the shipped one's rules, with an external in the place of each weight."""
    config = ours.FasterCacheConfig(
        attention_weight_callback=lambda _: 0.3, low_frequency_weight_callback=lambda _: 1.2
    )
    shown = cachepolicy.format(config.policy())
    assert "external attention_weight: float" in shown
    assert "low: low_frequency_weight, high: high if t in high_range else 1" in shown
    assert "predict linear(weight: attention_weight, feedback: feedback)" in shown
    assert resolve(cachepolicy.parse(shown)).digest == resolve(config.policy()).digest
    assert {"attention_weight", "low_frequency_weight", "guidance"} == set(config.arguments())


def test_constant_weight_callbacks_mean_what_the_numbers_mean() -> None:
    """The written-out rules and the shipped policy simulate alike."""
    plain, asked = ours.FasterCacheConfig(), ours.FasterCacheConfig(attention_weight_callback=lambda _: 0.5)
    external = {"attention_weight": 0.5}
    assert cachepolicy.simulate(plain.policy(), steps=12).rows == (
        cachepolicy.simulate(asked.policy(), steps=12, signals=external).rows
    )


def test_no_skip_range_means_spatial_attention_at_two() -> None:
    """As in diffusers, with a warning; but the config is left as it was given."""
    config = ours.PyramidAttentionBroadcastConfig()
    with pytest.warns(UserWarning, match="spatial_attention_block_skip_range"):
        assert "use pab with spatial_every = 2, temporal_every = off, cross_every = off" == text(config)
    assert ours.PyramidAttentionBroadcastConfig() == config


positive = st.none() | st.integers(1, 9)
windows = st.tuples(st.integers(-5, 1000), st.integers(-5, 1000)).filter(lambda pair: pair[0] < pair[1])


@given(st.tuples(positive, positive, positive).filter(any), windows, windows, windows)
def test_any_config_of_diffusers_is_read_as_ours(every: Any, first: Any, second: Any, third: Any) -> None:
    """The objects of diffusers itself stand for the same policy as ours with the same fields."""
    fields = (*every, first, second, third)
    their, own = (module.PyramidAttentionBroadcastConfig(*fields) for module in (diffusers, ours))
    converted = config_of(their)
    assert own == converted
    assert resolve(own.policy()).digest == resolve(converted.policy()).digest


def test_other_caches_of_diffusers_are_refused_by_name() -> None:
    """A config for a cache that has no policy here does not do nothing."""
    with pytest.raises(PolicyError, match=r"E168.*`calibrate` of `MagCacheConfig`"):
        cachepolicy.apply(zoo.build("flux"), theirs.MagCacheConfig(num_inference_steps=4, calibrate=True))
    with pytest.raises(PolicyError, match="E200"):
        ours.enable_cache(zoo.build("dit"), theirs.TextKVCacheConfig())
    with pytest.raises(PolicyError, match="`dict`"):
        ours.enable_cache(zoo.build("flux"), {})


# --- the same numbers


@pytest.mark.parametrize("name", ["flux", "cogvideox", "wan", "pixart"])
def test_pyramid_attention_broadcast_gives_what_diffusers_gives(name: str) -> None:
    """Equal to the last bit at every step, with ours and with diffusers' config object."""
    model, clock = zoo.build(name), Clock()
    fields: dict[str, Any] = {
        "spatial_attention_block_skip_range": 2,
        "cross_attention_block_skip_range": 3,
        "spatial_attention_timestep_skip_range": (50, 850),
        "current_timestep_callback": clock,
    }
    twin = copy.deepcopy(model)
    diffusers.apply_pyramid_attention_broadcast(twin, diffusers.PyramidAttentionBroadcastConfig(**fields))
    expected = sample(name, twin, clock)
    assert not same(expected, sample(name, model, clock))
    for module in ours, diffusers:
        with ours.apply_pyramid_attention_broadcast(model, module.PyramidAttentionBroadcastConfig(**fields)):
            assert same(expected, sample(name, model, clock))


FRAMES = {"cogvideox": "BFCHW", "wan": "BCFHW", "mochi": "BCFHW", "pixart": "BCHW", "sd3": "BCHW"}


def batched(name: str) -> list[str]:
    """The arguments that hold a row for each sample: diffusers has to be told them."""
    given = zoo.entry(name).inputs(batch=2, t=500.0, seed=0)
    return [key for key, value in given.items() if torch.is_tensor(value) and value.ndim and value.shape[0] == 2]


@pytest.mark.parametrize("callbacks", [False, True], ids=["formulas", "callbacks"])
@pytest.mark.parametrize("name", FRAMES)
def test_fastercache_gives_what_diffusers_gives(name: str, callbacks: bool) -> None:
    """Equal to the last bit at every step, with the default formulas and with callbacks that follow the clock."""
    model, clock = zoo.build(name), Clock()
    fields: dict[str, Any] = {"current_timestep_callback": clock, "tensor_format": FRAMES[name]}
    if callbacks:
        fields["attention_weight_callback"] = lambda _: 1 - clock.t / 1000
        fields["low_frequency_weight_callback"] = lambda _: 1 + clock.t / 5000
        fields["high_frequency_weight_callback"] = lambda _: 0.9
    twin = copy.deepcopy(model)
    told = {**fields, "_unconditional_conditional_input_kwargs_identifiers": batched(name)}
    diffusers.apply_faster_cache(twin, diffusers.FasterCacheConfig(**told))
    expected = sample(name, twin, clock, guidance="batched")
    assert not same(expected, sample(name, model, clock, guidance="batched"))
    for config in (
        ours.FasterCacheConfig(**fields),
        ours.FasterCacheConfig(**told),
        diffusers.FasterCacheConfig(**fields),
    ):
        with ours.apply_faster_cache(model, config):
            assert same(expected, sample(name, model, clock, guidance="batched"))


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_fastercache_of_a_distilled_model_gives_what_diffusers_gives(name: str) -> None:
    """Attention alone is extrapolated; the first computed step stands outside the window, where diffusers runs too."""
    model, clock = zoo.build(name), Clock()
    fields: dict[str, Any] = {"current_timestep_callback": clock, "is_guidance_distilled": True}
    twin = copy.deepcopy(model)
    diffusers.apply_faster_cache(twin, diffusers.FasterCacheConfig(**fields))
    expected = sample(name, twin, clock)
    with ours.apply_faster_cache(model, ours.FasterCacheConfig(**fields)):
        assert same(expected, sample(name, model, clock))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("name", ["flux", "cogvideox", "hunyuan_video", "wan"])
def test_first_block_cache_gives_what_diffusers_gives(name: str, threshold: float) -> None:
    """Equal to the last bit at every step."""
    model, clock = zoo.build(name), Clock()
    twin: Any = copy.deepcopy(model)
    diffusers.apply_first_block_cache(twin, diffusers.FirstBlockCacheConfig(threshold))
    with twin.cache_context("cond"):
        expected = sample(name, twin, clock)
    with ours.apply_first_block_cache(model, ours.FirstBlockCacheConfig(threshold)) as run:
        assert same(expected, sample(name, model, clock))
    assert (threshold == 0.8) <= any("R" in row for row in run.trace.rows().values())


# --- callbacks


def test_weight_callbacks_are_asked_with_their_module_once_an_answer() -> None:
    """The attention callback gets each answered module, the frequency callbacks the model, once a rebuilt step."""
    name, clock = "cogvideox", Clock()
    model = zoo.build(name)
    asked: dict[str, list[Any]] = {"attention": [], "low": [], "high": []}

    def note(kind: str, number: float) -> Callable[[Any], float]:
        return lambda module: asked[kind].append(module) or number

    config = ours.FasterCacheConfig(
        attention_weight_callback=note("attention", 0.4),
        low_frequency_weight_callback=note("low", 1.1),
        high_frequency_weight_callback=note("high", 1.0),
        tensor_format="BFCHW",
        current_timestep_callback=clock,
    )
    with ours.apply_faster_cache(model, config) as run:
        sample(name, model, clock, guidance="batched")
        rows = run.trace.rows()
    rebuilt = rows.pop("model").count("R")
    assert rebuilt
    assert [model] * rebuilt == asked["low"] == asked["high"]
    answered = {name: row.count("R") for name, row in rows.items()}
    assert answered == {name: asked["attention"].count(model.get_submodule(name)) for name in rows}


def test_a_given_config_is_never_changed() -> None:
    """Applying fills in nothing, so that a config with one field replaced means what it says."""
    model, own = zoo.build("wan"), ours.FasterCacheConfig()
    for config in own, diffusers.FasterCacheConfig():
        before = dataclasses.asdict(config)
        cachepolicy.enable_cache(model, config)
        cachepolicy.disable_cache(model)
        assert before == dataclasses.asdict(config)
    assert "low = 3" in text(dataclasses.replace(own, alpha_low_frequency=3.0))


def test_the_callers_own_words_come_before_the_configs() -> None:
    """`timestep=` and `guidance=` of `apply` are not overruled by a config."""
    model, clock = zoo.build("cogvideox"), Clock()
    config = ours.FasterCacheConfig(tensor_format="BFCHW", current_timestep_callback=lambda: 1 / 0)
    with cachepolicy.apply(model, config, timestep=clock, guidance=False) as run:
        sample("cogvideox", model, clock, batch=2)
        assert {"C" * len(TIMESTEPS)} == set(run.trace.rows().values())


# --- switching on and off


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x + self.attn(x, x, x, need_weights=False)[0])


class Own(nn.Module, ours.CacheMixin):
    """A model that is not diffusers' at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        x = x + timestep / 1000
        for block in self.blocks:
            x = block(x)
        return x


def run_own(model: Own, *names: str) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 32).reshape(1, 4, 8)
    outputs = list[torch.Tensor]()
    with torch.no_grad():
        for t in (900.0, 700.0, 600.0, 500.0, 400.0):
            for name in names or ("",):
                with model.cache_context(name or "cond"):
                    outputs.append(model(x, t))
    return outputs


def test_a_model_of_ones_own_can_switch_caches_on_and_off() -> None:
    """The mixin works on any module: on, once more is refused, off, and nothing is left."""
    model = Own()
    plain, before = run_own(model), [dict(each.__dict__) for each in model.modules()]
    assert not model.is_cache_enabled
    model.enable_cache(ours.PyramidAttentionBroadcastConfig(2))
    assert model.is_cache_enabled
    with pytest.raises(PolicyError, match="has a policy already"):
        model.enable_cache(ours.FirstBlockCacheConfig())
    cached = run_own(model)
    assert not same(plain, cached)
    model._reset_stateful_cache()
    assert same(cached, run_own(model))
    model.disable_cache()
    assert not model.is_cache_enabled
    assert same(plain, run_own(model))
    assert before == [dict(each.__dict__) for each in model.modules()]
    with pytest.warns(UserWarning, match="nothing to disable"):
        model.disable_cache()


def test_branches_of_a_model_of_ones_own_are_told_by_its_contexts() -> None:
    """Each context has a history of its own, contexts nest, and a wrong word in one is refused."""
    model = Own()
    with model.enable_cache(ours.FirstBlockCacheConfig(0.5)) as run:
        run_own(model, "cond", "uncond")
        assert {"cond", "uncond"} == set(run.trace.last.branches)
    with pytest.raises(TypeError), model.cache_context("cond", stepindex=3):
        pass


@pytest.mark.parametrize("name", ["pixart", "unet2d_condition"])
def test_an_instance_of_any_class_can_have_its_cache_switched(name: str) -> None:
    """The functions do not ask for a mixin, which these classes lack."""
    model, clock = zoo.build(name), Clock()
    assert not hasattr(model, "enable_cache")
    plain = sample(name, model, clock)
    run = ours.enable_cache(model, ours.PyramidAttentionBroadcastConfig(2, current_timestep_callback=clock))
    assert ours.is_cache_enabled(model)
    assert run.attached
    cached = sample(name, model, clock)
    ours.reset_stateful_cache(model)
    assert same(cached, sample(name, model, clock))
    assert not same(plain, cached)
    ours.disable_cache(model)
    assert not ours.is_cache_enabled(model)
    assert same(plain, sample(name, model, clock))


def test_a_config_for_another_cache_is_refused_by_each_function() -> None:
    """`apply_first_block_cache` with PAB's config is a mistake, not PAB."""
    with pytest.raises(PolicyError, match="FirstBlockCacheConfig"):
        ours.apply_first_block_cache(zoo.build("wan"), ours.PyramidAttentionBroadcastConfig(2))
