"""Settings of other tools are converted to policies that decide what the tools decide, or refused by the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy import PolicyError  # noqa: E402
from cachepolicy.methods.of_cache_dit import NAMED, named_mask  # noqa: E402
from tests.methods.scripted import Scripted, letters, run, tensor  # noqa: E402
from tests.methods.test_policies import SEEDS, Draw, totals, zeros  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:the policy can never"),
]


def last(text: str) -> str:
    """The last statement of a policy, on one line."""
    return " ".join(text.rsplit("\n\n", maxsplit=1)[-1].split())


def refused(setting: Any) -> tuple[str, str]:
    """The code and the message of the error."""
    with pytest.raises(PolicyError) as error:
        cachepolicy.convert(setting)
    (found,) = error.value.diagnostics
    return found.code, found.message


# --- cache-dit


def decisions(config: Any, heads: list[list[float]]) -> str:
    """What the context manager of cache-dit decides at each step."""
    contexts = pytest.importorskip("cache_dit.caching.cache_contexts.cache_manager")
    manager = contexts.CachedContextManager()
    manager.set_context(manager.new_context("it", cache_config=config))
    row = list[bool]()
    for head in heads:
        manager.mark_step_begin()
        residual = tensor(head)
        reuses = manager.can_cache(residual) and any(row)
        if reuses:
            manager.add_cached_step()
        else:
            manager.set_Fn_buffer(residual)
        row.append(not reuses)
    return letters(row)


@given(SEEDS)
def test_dbcache_of_cache_dit(seed: int) -> None:
    """The converted policy runs the middle blocks at the steps at which cache-dit's context manager does."""
    cache_dit = pytest.importorskip("cache_dit")
    draw = Draw(seed)
    choose = draw.random
    streams = [draw.stream() for _ in range(4)]
    heads = totals(*streams[:2])
    mask = choose.choice([None, [1, *(choose.randint(0, 1) for _ in range(draw.steps - 1))]])
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=2,
        Bn_compute_blocks=1,
        residual_diff_threshold=choose.choice([choose.uniform(0.01, 0.4), 1.5]),
        max_warmup_steps=choose.randint(0, 6),
        warmup_interval=choose.randint(1, 3),
        max_cached_steps=choose.choice([-1, 3]),
        max_continuous_cached_steps=choose.choice([-1, 1, 2]),
        num_inference_steps=choose.choice([None, draw.steps]),
        steps_computation_mask=mask,
        steps_computation_policy=choose.choice(["dynamic", "static"]),
    )
    rows, _ = run(Scripted(streams), cachepolicy.parse(cachepolicy.convert(config)), zeros(draw.steps))
    assert {decisions(config, heads)} == set(rows.values())


def test_objects_and_files_of_cache_dit(tmp_path: Path) -> None:
    """Objects, what `load_configs` returns, nested and flat files give the same text."""
    cache_dit = pytest.importorskip("cache_dit")
    text = """cache_config:
  max_warmup_steps: 4
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  enable_encoder_taylorseer: true
  taylorseer_order: 2
parallelism_config:
  ulysses_size: 2
"""
    file = tmp_path / "cache.yaml"
    file.write_text(text)
    expected = "use dbcache with first = 1, threshold = 0.12, warmup = 4, streak = 2, order = 2"
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=4, max_continuous_cached_steps=2, residual_diff_threshold=0.12
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2)
    flat = {
        "max_warmup_steps": 4,
        "max_continuous_cached_steps": 2,
        "Fn_compute_blocks": 1,
        "residual_diff_threshold": 0.12,
        "enable_taylorseer": True,
        "enable_encoder_taylorseer": True,
        "taylorseer_order": 2,
    }
    pair = {"cache_config": config, "calibrator_config": calibrator}
    for setting in (file, (config, calibrator), pair, flat):
        assert expected == last(cachepolicy.convert(setting))
    prune = cache_dit.DBPruneConfig(Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.05)
    assert "use dbprune with first = 2, end = -1, threshold = 0.05, warmup = 8" == last(cachepolicy.convert(prune))


@pytest.mark.parametrize("name", NAMED)
def test_masks_of_cache_dit_by_name(name: str) -> None:
    """The named masks are cache-dit's at every number of steps, and missing where cache-dit has none."""
    interface = pytest.importorskip("cache_dit.caching.cache_interface")
    for steps in range(1, 90):
        try:
            expected = "".join(map(str, interface.steps_mask(total_steps=steps, mask_policy=name)))
        except AssertionError:
            expected = None
        assert expected == named_mask(name, steps), steps
    setting = {"Fn_compute_blocks": 1, "steps_computation_mask": name, "num_inference_steps": 28}
    assert f'steps_mask = "{named_mask(name, 28)}"' in cachepolicy.convert(setting)


@given(SEEDS)
def test_the_bound_of_all_changes_of_cache_dit(seed: int) -> None:
    """A bound of the sum of all changes ends the reuse where cache-dit's context manager ends it."""
    cache_dit = pytest.importorskip("cache_dit")
    draw = Draw(seed)
    streams = [draw.stream() for _ in range(3)]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        residual_diff_threshold=draw.random.uniform(0.05, 0.5),
        max_warmup_steps=draw.random.randint(1, 4),
        max_accumulated_residual_diff_threshold=draw.random.uniform(0.05, 1.0),
    )
    rows, _ = run(Scripted(streams), cachepolicy.parse(cachepolicy.convert(config)), zeros(draw.steps))
    assert {decisions(config, streams[0])} == set(rows.values())


def test_a_branch_that_shares_its_change_follows() -> None:
    """Without a change of its own, the unconditional call does what the conditional one did."""
    setting = {"Fn_compute_blocks": 1, "enable_separate_cfg": True, "cfg_diff_compute_separate": False}
    policy = cachepolicy.parse(cachepolicy.convert(setting))
    drift = {"cond": [0.0] * 8 + [0.01, 0.5, 0.01], "uncond": [0.0] * 8 + [0.5, 0.01, 0.5]}
    rows = cachepolicy.simulate(policy, steps=11, branches=("cond", "uncond"), signals={"drift": drift}).rows
    assert {"CCCCCCCCRCR"} == set(rows.values())
    code, message = refused({**setting, "cfg_compute_first": True})
    assert ("E168", True) == (code, "`cfg_compute_first`" in message)


def test_a_forecast_of_the_first_stream_alone() -> None:
    """It is the same as one of all streams unless blocks after the span read them."""
    setting = {"Fn_compute_blocks": 1, "enable_taylorseer": True}
    text = cachepolicy.convert(setting)
    assert text.startswith("# cache-dit forecasts the first stream of the blocks alone;")
    assert "use dbcache with first = 1, threshold = 0.08, warmup = 8, order = 1" == last(text)
    code, message = refused({**setting, "Bn_compute_blocks": 2})
    assert ("E168", True) == (code, "`enable_encoder_taylorseer`" in message)


def test_modifiers_and_kept_blocks_of_cache_dit() -> None:
    """A `ParamsModifier` is read as its configs, and blocks that are never pruned get rules of their own."""
    cache_dit = pytest.importorskip("cache_dit")
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2)
    modifier = cache_dit.ParamsModifier(cache_config=cache_dit.DBCacheConfig(), calibrator_config=calibrator)
    assert "use dbcache with first = 8, threshold = 0.08, warmup = 8, order = 2" == last(cachepolicy.convert(modifier))
    config = cache_dit.DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=0, non_prune_block_ids=[2])
    policy = cachepolicy.parse(cachepolicy.convert(config))
    rows = cachepolicy.simulate(policy, steps=3, signals={"drift": 0}).rows
    assert ["RR", "CC", "RR"] == [rows[f"transformer_blocks.{block}"][1:] for block in (1, 2, 3)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("force_refresh_step_hint", 10),
        ("downsample_factor", 4),
        ("important_condition_threshold", 0.1),
        ("max_cached_steps", 0),
        ("enable_encoder_taylorseer", True),
        ("enable_foca", True),
        ("enable_dmd", True),
        ("residual_diff_threshold", 0),
        ("steps_computation_mask", [2, 0]),
        ("colour", "blue"),
    ],
)
def test_what_no_policy_says_is_refused_by_its_field(field: str, value: Any) -> None:
    """The error names the field, and is of one code."""
    code, message = refused({"Fn_compute_blocks": 1, field: value})
    assert "E168" == code
    assert f"`{field}` of" in message


@pytest.mark.parametrize(
    "field",
    [
        "non_prune_block_ids",
        "enable_dynamic_prune_threshold",
        "max_cached_steps",
        "steps_computation_mask",
        "max_accumulated_residual_diff_threshold",
    ],
)
def test_what_dbprune_does_not_say(field: str) -> None:
    """DBPrune has fewer bounds than DBCache."""
    values = {"non_prune_block_ids": ["a"], "enable_dynamic_prune_threshold": True, "steps_computation_mask": [1, 0]}
    code, message = refused({"cache_type": "DBPrune", "Fn_compute_blocks": 1, field: values.get(field, 4)})
    assert "E168" == code
    assert f"`{field}`" in message


def test_wrong_values_are_refused_by_their_field() -> None:
    """A value of another type (E161) or outside what the field takes (E162)."""
    assert ("E161", "`Fn_compute_blocks` of the cache-dit setting takes a whole number, not `'1'`") == refused(
        {"Fn_compute_blocks": "1"}
    )
    assert "E162" == refused({"Fn_compute_blocks": 0})[0]
    assert "E162" == refused({"Fn_compute_blocks": 1, "steps_computation_policy": "static!"})[0]


def test_settings_of_no_known_tool() -> None:
    """Other objects and mappings are told apart from settings."""
    assert "E169" == refused(3)[0]
    assert "E169" == refused({})[0]
    assert "E169" == refused({"colour": "blue"})[0]
    assert "E152" == refused(Path("no such file.json"))[0]
    assert "E152" == refused("no such file.json")[0]
    assert "E169" == refused('--cache-mode dbcache "')[0]
    assert "E169" == refused({"1": {"class_type": "KSampler"}})[0]


# --- diffusers


def test_configs_of_diffusers_as_text() -> None:
    """Configs of both packages are converted; a callback is no text."""
    assert "use fbc with threshold = 0.1" == last(cachepolicy.convert(cachepolicy.FirstBlockCacheConfig(0.1)))
    config = cachepolicy.PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 0)
    assert "E168" == refused(config)[0]
    diffusers = pytest.importorskip("diffusers")
    text = cachepolicy.convert(diffusers.TaylorSeerCacheConfig())
    assert text.startswith("# diffusers rounds the differences to bfloat16;")
    assert last(text).startswith("use taylorseer with interval = 5, first = 3, order = 1, diffusers = true, names = [")
    config = diffusers.TaylorSeerCacheConfig(skip_predict_identifiers=["x"])
    assert "`skip_predict_identifiers`" in refused(config)[1]
    config = diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=[1, 1.1, 0.9, 0.97])
    assert "ratios = [1.0, 1.1, 0.9, 0.97]" in cachepolicy.convert(config)


# --- engines and programs: tables of what their documentation says


FLUX = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]
TABLE: list[tuple[Any, str]] = [
    # vLLM-Omni, DiffusionCacheConfig
    (
        {"cache_backend": "cache_dit", "cache_config": {}},
        "use dbcache with first = 1, threshold = 0.24, warmup = 4, streak = 3",
    ),
    (
        {"cache_backend": "cache_dit", "cache_config": {"Fn_compute_blocks": 8, "enable_taylorseer": True}},
        "use dbcache with first = 8, threshold = 0.24, warmup = 4, streak = 3, order = 1",
    ),
    # SGLang, environment variables
    (
        {"SGLANG_CACHE_DIT_TAYLORSEER": "1"},
        "use dbcache with first = 1, threshold = 0.24, warmup = 4, streak = 3, order = 1",
    ),
    ({"SGLANG_CACHE_DIT_ENABLED": "true"}, "use dbcache with first = 1, threshold = 0.24, warmup = 4, streak = 3"),
    (
        {"SGLANG_CACHE_DIT_RDT": "0.12", "SGLANG_CACHE_DIT_TAYLORSEER": "true", "SGLANG_CACHE_DIT_TS_ORDER": "2"},
        "use dbcache with first = 1, threshold = 0.12, warmup = 4, streak = 3, order = 2",
    ),
    (
        {"SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "3,2,1", "SGLANG_CACHE_DIT_SCM_CACHE_BINS": "1,2"},
        'use dbcache with first = 1, threshold = 0.24, warmup = 0, streak = 3, steps_mask = "111011001"',
    ),
    # stable-diffusion.cpp, docs/caching.md
    (
        'sd-cli -p "a cat" --cache-mode dbcache --cache-option "threshold=0.25,warmup=4"',
        "use dbcache with first = 8, threshold = 0.25, warmup = 4",
    ),
    (
        '--cache-mode cache-dit --cache-option "Fn=1,Bn=2" --scm-mask "1,1,0,1" --scm-policy dynamic',
        'use dbcache with first = 1, end = -2, threshold = 0.08, warmup = 8, order = 1, steps_mask = "1101"',
    ),
    (
        "--cache-mode=taylorseer --cache-option=fn=2,threshold=0.1",
        "use dbcache with first = 2, threshold = 0.1, warmup = 8, order = 1",
    ),
    (
        '--cache-mode ucache --cache-option "threshold=1.5,end=0.9,reset=1"',
        "use ucache with threshold = 1.5, last = 0.9",
    ),
    # vLLM-Omni's other caches
    (
        {"cache_backend": "mag_cache", "cache_config": {"mag_ratios": [1, 1.1], "num_inference_steps": 2}},
        "use magcache with threshold = 0.24, skips = 5, retention = 0.1, ratios = [1.0, 1.1]",
    ),
    # SGLang, the same numbers for both transformers
    (
        {"SGLANG_CACHE_DIT_FN": "2", "SGLANG_CACHE_DIT_SECONDARY_FN": "2"},
        "use dbcache with first = 2, threshold = 0.24, warmup = 4, streak = 3",
    ),
    # xDiT, cache_method and cache_config, and the arguments of its example for FLUX.1
    (
        {"cache_method": "dbcache", "cache_config": '{"residual_diff_threshold": 0.12, "scm_policy": null}'},
        "use dbcache with first = 8, threshold = 0.12, warmup = 8, order = 1",
    ),
    (
        {"cache_method": "dbcache", "cache_config": {"enable_taylorseer": False}, "num_inference_steps": 28},
        'use dbcache with first = 8, threshold = 0.08, warmup = 0, steps_mask = "1111110100010000100000100001"',
    ),
    (
        {"use_teacache": True, "use_fbcache": False, "rel_l1_thresh": 0.12, "num_steps": 28},
        f"use teacache with coefficients = {FLUX}, threshold = 0.12",
    ),
    # ComfyUI, WaveSpeed
    (
        {
            "38": {
                "class_type": "ApplyFBCacheOnModel",
                "inputs": {
                    "object_to_patch": "diffusion_model",
                    "residual_diff_threshold": 0.12,
                    "start": 0,
                    "end": 1,
                    "max_consecutive_cache_hits": 5,
                    "model": ["12", 0],
                },
            },
            "3": {"class_type": "KSampler", "inputs": {}},
        },
        "use fbc with threshold = 0.12, streak = 5",
    ),
]


@pytest.mark.parametrize(("setting", "statement"), TABLE)
def test_settings_of_engines_and_programs(setting: Any, statement: str) -> None:
    """The documented settings give these policies."""
    assert statement == last(cachepolicy.convert(setting))


def test_teacache_of_ports() -> None:
    """Ports add up positive changes, and force no last step."""
    node = {"1": {"class_type": "TeaCache", "inputs": {"model_type": "flux", "rel_l1_thresh": 0.5}}}
    config = {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 0.5, "coefficients": FLUX}}
    text = cachepolicy.convert(node)
    assert last(text) == last(cachepolicy.convert(config))
    assert "while sum(abs(change)) < threshold -> reuse residual" in last(text)
    policy = cachepolicy.parse(text)
    schedule = cachepolicy.simulate(policy, steps=6, signals={"change": [-0.2] * 6})
    assert {"CRRCRR"} == set(schedule.rows.values())


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.lists(st.integers(0, 1), min_size=12, max_size=12))
def test_smoothcache(first: list[int], second: list[int]) -> None:
    """Each component computes where its schedule has a 1."""
    attention, feedforward = [1, *first], [1, *second][: len(first) + 1]
    policy = cachepolicy.parse(cachepolicy.convert({"attn1": attention, "ff": feedforward}))
    rows = cachepolicy.simulate(policy, steps=len(attention)).rows
    computed = {letters([bool(letter) for letter in mask]) for mask in (attention, feedforward)}
    assert computed == {row for name, row in rows.items() if "attn1" in name or "ff" in name}


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"cache_backend": "mag_cache", "cache_config": {}}, "mag_ratios"),
        ({"cache_backend": "step_cache", "cache_config": {}}, "cache_backend"),
        ({"cache_method": "dbcache", "cache_config": {}}, "scm_policy"),
        ({"cache_method": "none"}, "cache_method"),
        ({"use_teacache": False}, "use_teacache"),
        ({"SGLANG_CACHE_DIT_SECONDARY_RDT": "0.1"}, "SGLANG_CACHE_DIT_SECONDARY_RDT"),
        ({"SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "3,1"}, "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS"),
        ("--cache-mode spectrum", "--cache-mode"),
        ("--cache-mode easycache --cache-option start=0.9,end=0.2", "start"),
        ("--cache-mode easycache --cache-option Fn=1", "Fn"),
        ({"cache_backend": "tea_cache", "cache_config": {}}, "coefficients"),
        ({"cache_backend": "cache_dit", "cache_config": {"colour": 1}}, "colour"),
        ({"SGLANG_CACHE_DIT_SCM_PRESET": "fast"}, "SGLANG_CACHE_DIT_SCM_PRESET"),
        ({"SGLANG_CACHE_DIT_COLOUR": "1"}, "SGLANG_CACHE_DIT_COLOUR"),
        ({"SGLANG_CACHE_DIT_TAYLORSEER": "maybe"}, "SGLANG_CACHE_DIT_TAYLORSEER"),
        ("--cache-mode ucache --cache-option reset=0", "reset"),
        ("--cache-mode dbcache --cache-option start=0.1", "start"),
        ({"1": {"class_type": "LazyCache", "inputs": {}}}, "class_type"),
        ({"1": {"class_type": "TeaCache", "inputs": {"start_percent": 0.1}}}, "start_percent"),
        ({"1": {"class_type": "MagCache", "inputs": {"model_type": "flux"}}}, "model_type"),
        ({"1": {"class_type": "MagCache", "inputs": {"magcache_K": 0}}}, "magcache_K"),
        ({"1": {"class_type": "ApplyFBCacheOnModel", "inputs": {}}}, "residual_diff_threshold"),
        ({"attn1": [1, 0], "layers": [1, 1]}, "layers"),
        ({"attn1": [0, 1]}, "attn1"),
        ({"use_fbcache": True}, "use_fbcache"),
    ],
)
def test_what_engines_and_programs_say_beyond(setting: Any, field: str) -> None:
    """What has no counterpart is refused by its name."""
    code, message = refused(setting)
    assert "E168" == code
    assert f"`{field}` of" in message


def test_seacache_of_diffusers_without_its_callback() -> None:
    """The written rules have diffusers' defaults; a callback is refused."""
    hooks = pytest.importorskip("diffusers.hooks.sea_cache")
    text = cachepolicy.convert(hooks.SeaCacheConfig())
    assert "param streak: int? = 2 in [1, inf)" in text
    assert "signal filtered = wiener(input(model), beta: beta)" in text
    assert "param streak: int? = off" in cachepolicy.convert(hooks.SeaCacheConfig(max_consecutive_cached=0))
    code, message = refused(hooks.SeaCacheConfig(raw_vision_callback=lambda *_: None))
    assert "E168" == code
    assert "`raw_vision_callback`" in message


KEYS = st.sampled_from(
    [
        "cache_backend",
        "cache_config",
        "class_type",
        "inputs",
        "model_type",
        "Fn_compute_blocks",
        "steps_computation_mask",
        "steps_computation_policy",
        "num_inference_steps",
        "residual_diff_threshold",
        "cache_type",
        "enable_taylorseer",
        "SGLANG_CACHE_DIT_FN",
        "SGLANG_CACHE_DIT_TAYLORSEER",
        "SGLANG_CACHE_DIT_TS_ORDER",
        "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS",
        "coefficients",
        "attn1",
        "use_fbcache",
        "use_teacache",
        "cache_method",
        "scm_policy",
        "num_steps",
        "path",
        "thres",
        "attn-1",
        "steps",
        "shift",
        "nodes",
        "type",
        "mode",
        "widgets_values",
        "magcache_K",
        "end_step",
        "start_percent",
        "mag_ratios",
        "non_prune_block_ids",
        "max_accumulated_residual_diff_threshold",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.floats()
    | st.sampled_from(
        [
            "cache_dit",
            "tea_cache",
            "DBPrune",
            "TeaCache",
            "ApplyFBCacheOnModel",
            "MagCache",
            "EasyCache",
            "ModelSamplingSD3",
            "mag_cache",
            "fast",
            "no.pt",
            "chroma",
            "flux",
            "static",
            "medium",
            "true",
            "1,2",
            "",
        ]
    )
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.integers(0, 3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5) | VALUES)
def test_any_setting_is_converted_or_refused(setting: Any) -> None:
    """The result is the text of a policy, or an error with a code; nothing else is raised."""
    try:
        text = cachepolicy.convert(setting)
    except PolicyError as error:
        assert {each.code for each in error.diagnostics} <= {"E152", "E161", "E162", "E168", "E169"}
    else:
        cachepolicy.parse(text)
