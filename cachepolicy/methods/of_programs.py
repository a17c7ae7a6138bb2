"""Policies of the cache settings of serving engines and programs.

The names and defaults of fields are those of vLLM-Omni, SGLang, xDiT 175e0bf and stable-diffusion.cpp 97d2990 in August
2026, and of SmoothCache edeb4ed. None of them was run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, cast

from cachepolicy.errors import PolicyError
from cachepolicy.methods.of_cache_dit import dbcache
from cachepolicy.methods.of_comfyui import EASYCACHE, NORM, teacache
from cachepolicy.methods.of_diffusers import seacache
from cachepolicy.methods.settings import Conversion, Fields, preset_values, using, written

_CACHE_DIT = {
    "threshold": "residual_diff_threshold",
    "warmup": "max_warmup_steps",
    "Fn": "Fn_compute_blocks",
    "Bn": "Bn_compute_blocks",
}
"""Names of stable-diffusion.cpp, and cache-dit's names."""

_SGLANG = {
    "FN": "Fn_compute_blocks",
    "BN": "Bn_compute_blocks",
    "WARMUP": "max_warmup_steps",
    "RDT": "residual_diff_threshold",
    "MC": "max_continuous_cached_steps",
    "SCM_POLICY": "steps_computation_policy",
}
_SECOND = ("FN", "BN", "WARMUP", "RDT", "MC", "TAYLORSEER", "TS_ORDER")
"""What SGLang has a second time, for the second of two transformers."""

SGLANG = "SGLANG_CACHE_DIT_"
"""What the names of SGLang's environment variables start with."""

OPTION = "--cache-mode"
"""The option by which a command line of stable-diffusion.cpp is recognised."""


def of_vllm_omni(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of `cache_backend` and `cache_config` of vLLM-Omni."""
    outer = Fields("the vLLM-Omni setting", values)
    backend = str(outer.get("cache_backend"))
    config = outer.get("cache_config", {})
    if not isinstance(config, Mapping):
        outer.refuse("cache_config", "it is a mapping")
    outer.finish()
    setting = Fields("`cache_config`", cast("Mapping[str, Any]", config))
    if backend == "cache_dit":
        order = setting.whole("taylorseer_order", 1) if setting.switch("enable_taylorseer", default=False) else 0
        renamed = {"steps_computation_mask": "scm_steps_mask_policy", "steps_computation_policy": "scm_steps_policy"}
        setting.rename(renamed)
        setting.default("max_continuous_cached_steps", 3)
        conversion = Conversion(dbcache(setting, order, first=1, warmup=4, threshold=0.24))
    elif backend in {"tea_cache", "teacache"}:
        if "coefficients" not in setting:
            setting.refuse("coefficients", "vLLM-Omni chooses a model's polynomial by itself; give it")
        threshold = setting.number("rel_l1_thresh", 0.2, low=0)
        conversion = Conversion(teacache(threshold, setting.numbers("coefficients"), NORM, positive=True))
    elif backend == "mag_cache":
        if "mag_ratios" not in setting:
            setting.refuse("mag_ratios", "vLLM-Omni chooses a model's ratios by itself; give them")
        setting.only("mag_calibrate", False, why="`cachepolicy calibrate` measures a model's ratios")
        given = {
            "threshold": setting.number("mag_threshold", 0.24, low=0),
            "skips": setting.most("mag_max_skip_steps", 5),
            "retention": setting.number("mag_retention_ratio", 0.1, low=0, high=1),
            "ratios": setting.numbers("mag_ratios"),
        }
        steps = setting.whole("num_inference_steps", 28, low=1)
        note = f"The setting is for {steps} steps."
        conversion = Conversion(using("magcache", given, tuple(given)), (note,), steps)
    elif backend == "sea_cache":
        named = {
            "threshold": "sea_threshold",
            "residual_order": "sea_residual_order",
            "max_consecutive_cached": "sea_max_consecutive_cached",
            "power_exp": "sea_power_exp",
        }
        setting.rename(named)
        setting.ignore("num_inference_steps")
        conversion = seacache(setting)
    else:
        outer.refuse("cache_backend", "`cache_dit`, `tea_cache`, `mag_cache` and `sea_cache` are expressed")
    setting.finish()
    return conversion


def of_sglang(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of SGLang's environment variables for cache-dit."""
    named = {name: value for name, value in values.items() if name.startswith(SGLANG)}
    outer = Fields("the SGLang setting", named)
    for name in _SECOND:
        first, second = outer.get(SGLANG + name), outer.get(f"{SGLANG}SECONDARY_{name}")
        if second is not None and second != first:
            outer.refuse(f"{SGLANG}SECONDARY_{name}", "the second transformer gets a policy of its own")
    for name in ("SCM_PRESET", "TS_ORDER", "TAYLORSEER", "ENABLED", "SCM_COMPUTE_BINS", "SCM_CACHE_BINS", *_SGLANG):
        outer.ignore(SGLANG + name)
    outer.finish()
    outer.only(f"{SGLANG}SCM_PRESET", "none", "", why="give the bins of the mask in place of its name")
    inner: dict[str, Any] = {"max_continuous_cached_steps": 3}
    for name, field in _SGLANG.items():
        if SGLANG + name in outer:
            inner[field] = _plain(outer.get(SGLANG + name))
    inner["steps_computation_mask"] = _bins(outer)
    on = _plain(outer.get(f"{SGLANG}TAYLORSEER", False))
    if on not in (True, False):
        outer.refuse(f"{SGLANG}TAYLORSEER", "it is `true` or `1`, or `false` or `0`")
    inner["order"] = _plain(outer.get(f"{SGLANG}TS_ORDER", 1)) if on else 0
    setting = Fields("the SGLang setting", inner)
    order = setting.whole("order", 0)
    policy = dbcache(setting, order, first=1, warmup=4, threshold=0.24)
    setting.finish()
    return Conversion(policy)


def _bins(setting: Fields) -> str | None:
    computed, cached = (setting.get(f"{SGLANG}SCM_{kind}_BINS", "") for kind in ("COMPUTE", "CACHE"))
    if not computed and not cached:
        return None
    if not computed or not cached:
        alone = "CACHE" if cached else "COMPUTE"
        setting.refuse(f"{SGLANG}SCM_{alone}_BINS", "SGLang takes both kinds of bins or none")
    try:
        ones, zeros = ([int(number) for number in str(bins).split(",") if number] for bins in (computed, cached))
    except ValueError:
        setting.refuse(f"{SGLANG}SCM_COMPUTE_BINS", "bins are whole numbers with commas between them")
    gaps = zeros + [0] * (len(ones) - len(zeros))
    return "".join("1" * one + "0" * zero for one, zero in zip(ones, gaps, strict=False))


def _plain(value: Any) -> Any:
    """Returns the number or truth value of a text."""
    if not isinstance(value, str):
        return value
    if value.lower() in {"true", "false"}:
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


_UNLIKE_ITS_DOCUMENTS = (
    "This is DBCache as its documents have it. The program at 97d2990 compares the model's input, reuses the model",
    "between 15 and 95 % of the steps, and its warm-up and mask have no effect.",
)

_MODES = {"dbcache": 0, "taylorseer": 1, "cache-dit": 1}
"""Modes that are documented as DBCache, and the order of their forecasts."""


def of_command_line(text: str) -> Conversion:
    """Returns the policy of the options of stable-diffusion.cpp: `--cache-mode` and those that belong to it."""
    owner = "the command line"
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise PolicyError.of("E169", f"{owner} cannot be split into words: {error}") from error
    pairs = (word.partition("=") if word.startswith("--") else (word, "", "") for word in words)
    following = [*words[1:], ""]
    options = {
        name: value if equals else after
        for (name, equals, value), after in zip(pairs, following, strict=True)
        if name.startswith("--")
    }
    outer = Fields(owner, options)
    mode = str(outer.get(OPTION))
    given: dict[str, Any] = {}
    for pair in str(outer.get("--cache-option", "")).split(","):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name:
            given[{"fn": "Fn", "bn": "Bn"}.get(name, name)] = _plain(value)
    setting = Fields("`--cache-option`", given)
    if mode == "easycache":
        conversion = _easycache(setting)
    elif mode == "ucache":
        conversion = _ucache(setting)
    elif mode in _MODES:
        setting.rename({field: name for name, field in _CACHE_DIT.items()})
        for field, option in (("steps_computation_mask", "--scm-mask"), ("steps_computation_policy", "--scm-policy")):
            if (value := outer.get(option)) is not None:
                setting.default(field, value)
        conversion = Conversion(dbcache(setting, _MODES[mode], both=True), _UNLIKE_ITS_DOCUMENTS)
    else:
        outer.refuse(OPTION, _REFUSED_MODES.get(mode, "it is no mode that is known"))
    setting.finish()
    return conversion


_REFUSED_MODES = {
    "spectrum": "it forecasts what the sampler made of the guided prediction, which no rule reaches",
    "disabled": "it is the bare model",
}


def _easycache(setting: Fields) -> Conversion:
    threshold = setting.number("threshold", 0.2, low=0)
    start, end = setting.window(("start", "end"), (0.15, 0.95))
    notes = ("The range is one of noise levels. `shift` is that of the model's; 1 is a model without a shift.",)
    return Conversion(written(EASYCACHE, {"threshold": threshold, "start": start, "end": end}), notes)


def _ucache(setting: Fields) -> Conversion:
    setting.only("relative", 1, True, why="the threshold is relative to the size of the output")
    setting.only("reset", 1, True, why="a compute starts the sum of a rule anew")
    threshold = setting.number("threshold", 1.0, low=0)
    first, last = setting.window(("start", "end"), (0.15, 0.95))
    decay = setting.number("decay", 1.0, low=0, high=1)
    values = {"threshold": threshold, "first": first, "last": last, "decay": decay}
    return Conversion(using("ucache", values, ("threshold",)))


# --- SmoothCache -----------------------------------------------------------------------------------------------

_COMPONENTS = {
    "attn": "attention",
    "attn1": "self_attention",
    "attn2": "cross_attention",
    "mlp": "feedforward",
    "ff": "feedforward",
}
"""SmoothCache's components, and the selectors of a policy."""


def _component(name: object) -> tuple[str, int | None]:
    component, _, block = str(name).partition("-")
    return component, int(block) if block.isascii() and block.isdigit() else None


def is_smoothcache(values: Mapping[str, Any]) -> bool:
    """Returns whether a mapping has a list of 0 and 1 for SmoothCache's components."""
    return (
        bool(values)
        and all(isinstance(mask, list) for mask in values.values())
        and any(_component(name)[0] in _COMPONENTS for name in values)
    )


def of_smoothcache(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of SmoothCache's schedule: a 1 for each step at which a component computes.

    A component is `attn1`, or `attn1-3` for that of one block; the latter goes before the former.
    """
    setting = Fields("the SmoothCache schedule", values)
    rules: dict[str, tuple[list[str], list[str]]] = {}
    for name in values:
        component, block = _component(name)
        if component not in _COMPONENTS or (block is None and "-" in name):
            continue
        mask = _mask(setting, name)
        selector = _COMPONENTS[component]
        alone, general = rules.setdefault(component, ([], []))
        if block is None:
            general.append(f'match {selector} mask "{mask}" -> reuse\n')
        else:
            alone.append(f'match {selector} within blocks[{block}] mask "{mask}" -> reuse\n')
    setting.finish()
    text = "".join(rule for alone, general in rules.values() for rule in (*alone, *general))
    return Conversion(written('policy smoothcache "SmoothCache"\nsource "arXiv:2411.10510"\n' + text, {}))


def _mask(setting: Fields, name: str) -> str:
    mask = setting.get(name)
    if not mask or mask[0] != 1 or any(letter not in (0, 1) for letter in mask):
        setting.refuse(name, "it takes a 1 or a 0 for each step, with a 1 first")
    return "".join(str(int(letter)) for letter in mask)


# --- xDiT ------------------------------------------------------------------------------------------------------

XDIT = ("use_fbcache", "use_teacache", "cache_method", "scm_policy")
"""Keys by which a setting of xDiT is recognised."""


def of_xdit(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of xDiT's `cache_args` of FLUX.1, or of its `cache_method` and `cache_config`.

    Raises:
        PolicyError: No policy expresses a field (E168).
    """
    setting = Fields("the xDiT setting", values)
    if "use_fbcache" in values or "use_teacache" in values:
        return _xdit_teacache(setting)
    method = setting.choice("cache_method", "dbcache", ("dbcache", "none"))
    if method == "none":
        setting.refuse("cache_method", "it is the bare model")
    config = setting.get("cache_config", {})
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError):
            setting.refuse("cache_config", "it is no JSON")
    if not isinstance(config, Mapping):
        setting.refuse("cache_config", "it is an object of JSON")
    steps = setting.get("num_inference_steps")
    if config:
        setting.finish()
    flat = cast("Mapping[str, Any]", config) or values
    inner = {name: value for name, value in flat.items() if name not in {"cache_method", "cache_config"}}
    fields = Fields("`cache_config`", inner)
    fields.default("num_inference_steps", steps)
    policy_name = inner.get("scm_policy", "fast")  # None is no mask
    fields.ignore("scm_policy")
    if "steps_computation_mask" not in fields and policy_name is not None:
        if "num_inference_steps" not in fields:
            fields.refuse("scm_policy", "its mask depends on `num_inference_steps`, which is missing")
        fields.default("steps_computation_mask", policy_name)
    order = 1 if fields.switch("enable_taylorseer", default=True) else 0
    if not fields.switch("enable_encoder_calibrator", default=True) and order and fields.whole("Bn_compute_blocks", 0):
        fields.refuse("enable_encoder_calibrator", "all streams of a block are forecast, and the last blocks read them")
    policy = dbcache(fields, order)
    fields.finish()
    return Conversion(policy, ("Fields that are not given have the defaults of xDiT, not those of its models.",))


def _xdit_teacache(setting: Fields) -> Conversion:
    if setting.switch("use_fbcache", default=False):
        why = "xDiT adds the residual of the later blocks to the input of the first one, whose own residual is lost"
        setting.refuse("use_fbcache", why)
    if not setting.switch("use_teacache", default=False):
        setting.refuse("use_teacache", "no cache is on, which is the bare model")
    setting.ignore("num_steps", "return_hidden_states_first")
    setting.only("use_cache", "Tea", why="`use_teacache` is expressed")
    values = {**preset_values("teacache", "flux"), "threshold": setting.number("rel_l1_thresh", 0.12, low=0)}
    setting.finish()
    return Conversion(using("teacache", values, tuple(values)))
