"""Policies of the cache settings of serving engines and programs: vLLM-Omni, SGLang, stable-diffusion.cpp, ComfyUI.

The names and defaults of fields are those that the tools' documentation had in August 2026.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from cachepolicy.errors import PolicyError
from cachepolicy.methods.of_cache_dit import dbcache
from cachepolicy.methods.settings import Conversion, Fields, params, shipped, using, written

_TEACACHE = """policy teacache "TeaCache"
source "arXiv:2411.19108"
param threshold: float = 0.2 in [0, inf)
param coefficients: list = [1]
param probe: list = ["^(transformer_)?blocks\\.0\\.norm1$"]
signal modulated = output(probe)
signal change = poly(coefficients, relative_l1(modulated, prev(modulated)))
match blocks while sum(abs(change)) < threshold -> reuse residual
"""
"""The form of ports that make each term positive and compute no step without need."""

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
SGLANG = "SGLANG_CACHE_DIT_"
"""What the names of SGLang's environment variables start with."""

OPTION = "--cache-mode"
"""The option by which a command line of stable-diffusion.cpp is recognised."""

_COMPONENTS = {"attn1": "self_attention", "attn2": "cross_attention", "ff": "feedforward"}
"""SmoothCache's components, and the selectors of a policy."""


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
        policy = dbcache(setting, order, first=1, warmup=4, threshold=0.24)
    elif backend in {"tea_cache", "teacache"}:
        if "coefficients" not in setting:
            setting.refuse("coefficients", "vLLM-Omni chooses a model's polynomial by itself; give it")
        given = {"threshold": setting.number("rel_l1_thresh", 0.2, low=0)}
        policy = written(_TEACACHE, {**given, "coefficients": setting.numbers("coefficients")})
    else:
        outer.refuse("cache_backend", "`cache_dit` and `tea_cache` are expressed")
    setting.finish()
    return Conversion(policy)


def of_sglang(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of SGLang's environment variables for cache-dit."""
    named = {name: value for name, value in values.items() if name.startswith(SGLANG)}
    outer = Fields("the SGLang setting", named)
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
    if not computed:
        return None
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


def of_command_line(text: str) -> Conversion:
    """Returns the policy of the options of stable-diffusion.cpp: `--cache-mode` and those that belong to it."""
    owner = "the command line"
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise PolicyError.of("E169", f"{owner} cannot be split into words: {error}") from error
    options = {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}
    outer = Fields(owner, options)
    mode = str(outer.get(OPTION))
    if mode not in {"dbcache", "cache-dit"}:
        outer.refuse(OPTION, "`dbcache` and `cache-dit` are expressed")
    inner: dict[str, Any] = {}
    for pair in str(outer.get("--cache-option", "")).split(","):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name:
            inner[_CACHE_DIT.get(name, name)] = _plain(value)
    inner["steps_computation_mask"] = outer.get("--scm-mask")
    inner["steps_computation_policy"] = outer.get("--scm-policy")
    setting = Fields("`--cache-option`", {name: value for name, value in inner.items() if value is not None})
    policy = dbcache(setting, 1 if mode == "cache-dit" else 0)
    setting.finish()
    return Conversion(policy)


def of_workflow(nodes: Mapping[str, Any]) -> Conversion:
    """Returns the policy of the cache node in a workflow of ComfyUI (API format).

    Raises:
        PolicyError: There is no known node or there are several (E169), or no policy expresses a field (E168).
    """
    found = [
        (str(node["class_type"]), _inputs(node))
        for node in (cast("Mapping[str, Any]", each) for each in nodes.values() if isinstance(each, Mapping))
        if str(node.get("class_type")) in _NODES
    ]
    if len(found) != 1:
        known = ", ".join(f"`{name}`" for name in _NODES)
        message = f"the workflow has {len(found)} cache nodes that are known, not one"
        raise PolicyError.of("E169", message, help=f"known are {known}")
    ((kind, inputs),) = found
    setting = Fields(f"the node `{kind}`", inputs)
    setting.ignore("model")
    conversion = _NODES[kind](setting)
    setting.finish()
    return conversion


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return cast("Mapping[str, Any]", inputs) if isinstance(inputs, Mapping) else {}


def _first_block_cache(node: Fields) -> Conversion:
    node.only("object_to_patch", "diffusion_model", why="the policy is for the denoiser")
    _whole_range(node, "start", "end")
    values = {
        "threshold": node.number("residual_diff_threshold", 0, low=0),
        "streak": node.limit("max_consecutive_cache_hits"),
    }
    return Conversion(using("fbc", values, ("threshold",)))


def _teacache_node(node: Fields) -> Conversion:
    node.only("model_type", "flux", why="the polynomials of other models are inside the node; write the policy by hand")
    _whole_range(node, "start_percent", "end_percent")
    node.ignore("cache_device")
    default = params(shipped("teacache"))["coefficients"].default
    threshold = node.number("rel_l1_thresh", 0.4, low=0)
    return Conversion(written(_TEACACHE, {"threshold": threshold, "coefficients": default}))


def _whole_range(node: Fields, start: str, end: str) -> None:
    why = "the node measures its range by the noise of its own model, so that only the whole range is expressed"
    node.only(start, 0, why=why)
    node.only(end, 1, why=why)


def _inside(reason: str) -> Callable[[Fields], Conversion]:
    def refuse(node: Fields) -> Conversion:
        node.refuse("class_type", reason)

    return refuse


_NODES: dict[str, Callable[[Fields], Conversion]] = {
    "ApplyFBCacheOnModel": _first_block_cache,
    "TeaCache": _teacache_node,
    "MagCache": _inside("the ratios of the models are inside the node; `use magcache with ratios = [...]` takes them"),
    "EasyCache": _inside("the node adds up changes since the last computed step; `easycache` follows the authors"),
    "LazyCache": _inside("the node caches what guidance gives, which no rule reaches"),
}


def is_workflow(values: Mapping[str, Any]) -> bool:
    """Returns whether a mapping is a workflow of ComfyUI."""
    return any(isinstance(node, Mapping) and "class_type" in node for node in values.values())


def is_smoothcache(values: Mapping[str, Any]) -> bool:
    """Returns whether a mapping has a list of 0 and 1 for SmoothCache's components."""
    return (
        bool(values) and all(isinstance(mask, list) for mask in values.values()) and bool(_COMPONENTS.keys() & values)
    )


def of_smoothcache(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of SmoothCache's schedule: a 1 for each step at which a component computes."""
    setting = Fields("the SmoothCache schedule", values)
    rules = list[str]()
    for component, selector in _COMPONENTS.items():
        if component not in setting:
            continue
        mask = setting.get(component)
        if not mask or mask[0] != 1 or any(letter not in (0, 1) for letter in mask):
            setting.refuse(component, "it takes a 1 or a 0 for each step, with a 1 first")
        rules.append(f'match {selector} mask "{"".join(str(int(letter)) for letter in mask)}" -> reuse\n')
    setting.finish()
    return Conversion(written('policy smoothcache "SmoothCache"\nsource "arXiv:2411.10510"\n' + "".join(rules), {}))


def of_xdit(values: Mapping[str, Any]) -> NoReturn:
    """Refuses the cache setting of xDiT.

    Raises:
        PolicyError: Always (E168).
    """
    setting = Fields("the xDiT setting", values)
    name = next(name for name in XDIT if name in values)
    setting.refuse(name, "xDiT compares with another step than the last computed one; `fbc` and `teacache` do not")


XDIT = ("use_fbcache", "use_teacache")
"""Keys by which a setting of xDiT is recognised."""
