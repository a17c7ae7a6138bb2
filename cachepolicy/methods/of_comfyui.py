"""Policies of the cache nodes in workflows of ComfyUI, as the API takes them or as the editor saves them.

The nodes are those of Comfy-WaveSpeed 8253745, ComfyUI-TeaCache 91dff8e, ComfyUI-MagCache 47bdd2a, and of ComfyUI
itself in August 2026. None of them was run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.methods.settings import Conversion, Fields, preset_values, using, written

_WIDGETS = {
    "ApplyFBCacheOnModel": (
        "object_to_patch",
        "residual_diff_threshold",
        "start",
        "end",
        "max_consecutive_cache_hits",
    ),
    "TeaCache": ("model_type", "rel_l1_thresh", "start_percent", "end_percent", "cache_device"),
    "MagCache": ("model_type", "magcache_thresh", "retention_ratio", "magcache_K", "start_step", "end_step"),
    "EasyCache": ("reuse_threshold", "start_percent", "end_percent", "verbose"),
    "LazyCache": ("reuse_threshold", "start_percent", "end_percent", "verbose"),
    "KSampler": ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "control_after_generate", "steps"),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "LTXVScheduler": ("steps",),
    "ModelSamplingSD3": ("shift",),
    "ModelSamplingAuraFlow": ("shift",),
    "ModelSamplingFlux": ("max_shift", "base_shift", "width", "height"),
}
"""The names of the values that the editor saves as a list."""

_OFF = (2, 4)
"""Modes of nodes that are muted or bypassed in the editor."""


def _mappings(value: object) -> list[Mapping[str, Any]]:
    """Returns the mappings of a list."""
    items = cast("list[Any]", value) if isinstance(value, list) else list[Any]()
    return [cast("Mapping[str, Any]", item) for item in items if isinstance(item, Mapping)]


def _saved(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns class and inputs of the nodes that the editor saved and that are on."""
    definitions: Any = values.get("definitions")
    named = cast("Mapping[str, Any]", definitions) if isinstance(definitions, Mapping) else dict[str, Any]()
    inner = _mappings(named.get("subgraphs"))
    found = list[tuple[str, Mapping[str, Any]]]()
    for node in (node for graph in (values, *inner) for node in _mappings(graph.get("nodes"))):
        kind, given = str(node.get("type")), node.get("widgets_values")
        if kind not in _WIDGETS or node.get("mode") in _OFF:
            continue
        names = _WIDGETS[kind]
        if isinstance(given, Mapping):
            found.append((kind, dict(cast("Mapping[str, Any]", given))))
            continue
        items = cast("list[Any]", given) if isinstance(given, list) else list[Any]()
        more = {f"widgets_values[{place}]": value for place, value in enumerate(items) if place >= len(names)}
        of_cache = kind in _NODES
        found.append((kind, {**dict(zip(names, items, strict=False)), **(more if of_cache else {})}))
    return found


class Workflow:
    """The nodes of a workflow by their class."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self._nodes = _saved(nodes) + [
            (str(node["class_type"]), _inputs(node))
            for node in (cast("Mapping[str, Any]", each) for each in nodes.values() if isinstance(each, Mapping))
            if "class_type" in node
        ]

    def of(self, *classes: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Returns class and inputs of the nodes of these classes."""
        return [(name, inputs) for name, inputs in self._nodes if name in classes]

    def steps(self) -> int | None:
        """Returns the number of steps, if all samplers and schedulers name the same."""
        found = {
            inputs["steps"]
            for _, inputs in self._nodes
            if isinstance(inputs.get("steps"), int)
            and not isinstance(inputs["steps"], bool)
            and inputs.get("denoise", 1) == 1
        }
        return found.pop() if len(found) == 1 else None

    def shift(self) -> float | None:
        """Returns the shift of the noise levels, if one node sets it for the model."""
        found = [
            value
            for name, inputs in self._nodes
            if name.startswith("ModelSampling")
            for value in [_flux_shift(inputs) if name == "ModelSamplingFlux" else inputs.get("shift")]
        ]
        (value,) = found if len(found) == 1 else (None,)
        return float(value) if isinstance(value, int | float) and 0 < value < math.inf else None


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return cast("Mapping[str, Any]", inputs) if isinstance(inputs, Mapping) else {}


def _flux_shift(inputs: Mapping[str, Any]) -> float | None:
    """Returns the shift of a `ModelSamplingFlux` node: a line through two numbers of tokens, 256 and 4096."""
    values = [inputs.get(name) for name in ("base_shift", "max_shift", "width", "height")]
    if not all(isinstance(value, int | float) for value in values):
        return None
    base, most, width, height = cast("list[float]", values)
    tokens = width * height / (8 * 8 * 2 * 2)
    exponent = base + (most - base) / (4096 - 256) * (tokens - 256)
    return math.exp(exponent) if abs(exponent) < 50 else None


def is_workflow(values: Mapping[str, Any]) -> bool:
    """Returns whether a mapping is a workflow of ComfyUI."""
    of_api = any(isinstance(node, Mapping) and "class_type" in node for node in values.values())
    return of_api or any("type" in node for node in _mappings(values.get("nodes")))


def of_workflow(nodes: Mapping[str, Any]) -> Conversion:
    """Returns the policy of the cache node in a workflow of ComfyUI.

    Raises:
        PolicyError: There is no known node or there are several (E169), or no policy expresses a field (E168).
    """
    workflow = Workflow(nodes)
    found = workflow.of(*_NODES)
    if len(found) != 1:
        known = ", ".join(f"`{name}`" for name in _NODES)
        message = f"the workflow has {len(found)} cache nodes that are known, not one"
        raise PolicyError.of("E169", message, help=f"known are {known}")
    ((kind, inputs),) = found
    setting = Fields(f"the node `{kind}`", inputs)
    setting.ignore("model")
    conversion = _NODES[kind](setting, workflow)
    setting.finish()
    return conversion


# --- a range of the sampling, by its noise ---------------------------------------------------------------------

RANGE = """param start: float = 0 in [0, 1]
param end: float = 1 in [0, 1]
param shift: float = 1 in (0, inf) "shift of the noise levels"
let first_t = 1000 * shift * (1 - start) / (1 + (shift - 1) * (1 - start))
let final_t = 1000 * shift * (1 - end) / (1 + (shift - 1) * (1 - end))
"""
"""Timesteps of two shares of the training range, which a flow model shifts."""

_UNKNOWN_SHIFT = (
    "The range is one of noise levels. `shift` is that of the model's noise levels, which the workflow does not tell;",
    "1 is a model without a shift.",
)


def _window(
    node: Fields, workflow: Workflow, names: tuple[str, str], defaults: tuple[float, float]
) -> dict[str, float]:
    start, end = node.window(names, defaults)
    return {"start": start, "end": end, "shift": workflow.shift() or 1.0}


def _notes(window: Mapping[str, float], workflow: Workflow) -> tuple[str, ...]:
    whole = window["start"] <= 0 and window["end"] >= 1
    return () if whole or workflow.shift() is not None else _UNKNOWN_SHIFT


# --- Comfy-WaveSpeed --------------------------------------------------------------------------------------------

_FBC = f"""policy first_block_cache "First Block Cache"
source "github.com/chengzeyi/Comfy-WaveSpeed"
param threshold: float = 0.12 in [0, inf)
param streak: int? = off in [1, inf)
{RANGE}signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] when final_t <= t <= first_t
  while drift < threshold at most streak in a row -> reuse residual
"""


def _first_block_cache(node: Fields, workflow: Workflow) -> Conversion:
    node.only("object_to_patch", "diffusion_model", why="the policy is for the denoiser")
    threshold = node.threshold("residual_diff_threshold", 0)
    values = {"threshold": threshold, "streak": node.limit("max_consecutive_cache_hits")}
    window = _window(node, workflow, ("start", "end"), (0, 1))
    if window["start"] <= 0 and window["end"] >= 1:
        return Conversion(using("fbc", values, ("threshold",)))
    return Conversion(written(_FBC, {**values, **window}), _notes(window, workflow))


# --- ComfyUI-TeaCache -------------------------------------------------------------------------------------------

NORM = 'output("^(transformer_)?blocks\\.0\\.norm1$")'
"""The modulated input of the first block, where a module gives it."""

_TEACACHE_MODELS = {
    "flux": ("teacache", "flux", NORM),
    "flux-kontext": ("teacache", "flux_kontext", NORM),
    "ltxv": ("teacache_inline", "ltx_video", 'input("^transformer_blocks\\.0\\.attn1$")'),
    "lumina_2": ("teacache", "lumina2_timestep", 'output("^time_caption_embed\\.timestep_embedder$")'),
    "hunyuan_video": ("teacache", "hunyuan_video", NORM),
    "hidream_i1_full": ("teacache_timestep", "hidream_full", ""),
    "hidream_i1_dev": ("teacache", "hidream_dev", 'output("^x_embedder$")'),
    "hidream_i1_fast": ("teacache", "hidream_fast", 'output("^x_embedder$")'),
    **{
        f"wan2.1_{model}{mode}": (
            "teacache",
            f"wan_{preset}{'_ret' if mode else ''}",
            f'output("^condition_embedder\\.{"time_proj" if mode else "time_embedder"}$")',
        )
        for model, preset in (
            ("t2v_1.3B", "t2v_1_3b"),
            ("t2v_14B", "t2v_14b"),
            ("i2v_480p_14B", "i2v_480"),
            ("i2v_720p_14B", "i2v_720"),
        )
        for mode in ("", "_ret_mode")
    },
}
"""The policy and the preset that have the polynomial of a model type, and the probe; none is the timestep."""

_PER_HALF = ("ltxv", "hidream_i1_dev", "hidream_i1_fast")


def teacache(
    threshold: float, coefficients: object, probe: str, *, positive: bool, first: int = 0, end: float = 1
) -> ir.Policy:
    """Returns the policy of a port of TeaCache that computes no step without need.

    Args:
        threshold: The smallest sum of changes that computes.
        coefficients: The polynomial, highest power first.
        probe: The expression of the tensor whose change is measured; empty for the timestep.
        positive: Whether each term is made positive.
        first: The first step that may reuse. The sum goes on before it, and starts anew where it reaches the threshold.
        end: The share of the steps after which all compute.
    """
    measured = (
        f"signal modulated = {probe}\nsignal change = poly(coefficients, relative_l1(modulated, prev(modulated)))\n"
        if probe
        else ""
    )
    change = "change" if probe else "poly(coefficients, abs(t - prev(t)) / prev(t))"
    term = f"abs({change})" if positive else change
    total = f"sum({term}) < threshold"
    if first > 1:
        # All steps before the first one compute, and with each the sum of the rule starts anew.
        before = _sum_at(first - 1, term)
        total = f"step >= {first} and sum({term}) + ({before} if computes == {first} else 0) < threshold"
    guard = "" if end >= 1 else " when step / steps <= end"
    ends = "" if end >= 1 else "param end: float = 1\n"
    text = (
        'policy teacache "TeaCache"\nsource "arXiv:2411.19108"\n'
        "param threshold: float = 0.2 in [0, inf)\nparam coefficients: list = [1]\n"
        f"{ends}{measured}match blocks{guard} while {total} -> reuse residual\n"
    )
    values: dict[str, object] = {"threshold": threshold, "coefficients": coefficients}
    return written(text, values if end >= 1 else {**values, "end": end})


def _sum_at(step: int, term: str) -> str:
    """Returns the sum that starts anew where it reaches the threshold, as an expression of the terms up to a step."""
    total = f"at_step({step}, {term})" if step == 1 else f"{_sum_at(step - 1, term)} + at_step({step}, {term})"
    return f"({total} if {total} < threshold else 0)"


_LONGEST = 7
"""Steps before the range at most, since each doubles the expression of their sum."""


def _first(node: Fields, workflow: Workflow) -> int:
    """Returns the first step of the node's range."""
    share = node.number("start_percent", 0, low=0, high=1)
    steps = workflow.steps()
    if share <= 0:
        return 0
    if steps is None:
        why = "the sum of the changes before the range depends on the number of steps, which the workflow does not tell"
        node.refuse("start_percent", why)
    first = next((step for step in range(steps) if share <= step / steps), steps)
    if first > _LONGEST:
        node.refuse("start_percent", f"more than {_LONGEST} steps before the range make a rule too long")
    return first


def _teacache_node(node: Fields, workflow: Workflow) -> Conversion:
    kind = node.choice("model_type", "flux", tuple(_TEACACHE_MODELS))
    threshold = node.threshold("rel_l1_thresh", 0.4)
    first = _first(node, workflow)
    end = node.number("end_percent", 1, low=0, high=1)
    node.ignore("cache_device")
    name, preset, probe = _TEACACHE_MODELS[kind]
    coefficients = preset_values(name, preset)["coefficients"]
    policy = teacache(threshold, coefficients, probe, positive=kind.startswith("flux"), first=first, end=end)
    notes = ("In a batch with both halves of guidance the node measures each half.",) if kind in _PER_HALF else ()
    if first > 1:
        steps = workflow.steps()
        return Conversion(policy, (*notes, f"The first step of the range is that of {steps} steps."), steps)
    return Conversion(policy, notes)


# --- ComfyUI-MagCache -------------------------------------------------------------------------------------------

_MAGCACHE_MODELS = {
    "flux": "flux",
    "flux_kontext": "flux_kontext_20",
    "chroma": "chroma",
    "qwen_image": "qwen_image_40",
    "hunyuan_video": "hunyuan_video",
    "hunyuan_video1.5": "hunyuan_video_1_5",
    "wan2.1_t2v_1.3B": "wan_t2v_1_3b",
    "wan2.1_t2v_14B": "wan_t2v_14b",
    "wan2.1_i2v_480p_14B": "wan_i2v_480",
    "wan2.1_i2v_720p_14B": "wan_i2v_720",
    "wan2.1_vace_1.3B": "wan_vace_1_3b",
    "wan2.1_vace_14B": "wan_vace_14b",
}
"""The presets of `magcache` that have the node's ratios."""

_LEFT_OUT = 11
"""The position in FLUX.1's tables at which the node computes, and goes on with its sums."""

_COUNTED = ("chroma", "qwen_image")
"""Model types whose ratios are read by the number of calls, whatever the number of steps."""


def _magcache_node(node: Fields, workflow: Workflow) -> Conversion:
    kind = node.choice("model_type", "wan2.1_t2v_1.3B", tuple(_MAGCACHE_MODELS))
    threshold = node.threshold("magcache_thresh", 0.06)
    most = node.most("magcache_K", 2)
    share = node.number("retention_ratio", 0.2, low=0, high=1)
    start, end = node.whole("start_step", 0), node.whole("end_step", -1, low=-(10**6))
    steps = workflow.steps()
    preset = _MAGCACHE_MODELS[kind]
    if kind == "hunyuan_video1.5":
        if steps is None:
            node.refuse("model_type", "the ratios depend on the number of steps, which the workflow does not tell")
        preset = "hunyuan_video_1_5_40" if steps > 20 else preset
    ratios = _ratios(preset)
    if kind in {"flux", "flux_kontext"}:
        if steps is None:
            why = "the node computes one step without a new start of its sums; a workflow with `steps` gives a mask"
            node.refuse("model_type", why)
        mask = _flux_mask(steps, ratios, threshold, most, share, start, end)
        text = f'policy magcache "MagCache"\nsource "arXiv:2506.09045"\nmatch blocks mask "{mask}" -> reuse residual\n'
        return Conversion(written(text, {}), (f"The mask is that of {steps} steps.",), steps)
    guard = "floor(steps * retention) <= step"
    guard += f" and step >= {start}" if start else ""
    guard += "" if end == -1 else f" and step <= {end if end >= 0 else f'steps - {-end}'}"
    index = "step + 0" if kind in _COUNTED else f"floor(step * ({len(ratios) - 1} / (steps - 1)))"
    below = "<=" if kind.startswith("wan") else "<"
    text = f"""policy magcache "MagCache"
source "arXiv:2506.09045"
param threshold: float = 0.06 in [0, inf)
param skips: int = 2 in [1, inf)
param retention: float = 0.2 in [0, 1]
param ratios: list = [1]
match blocks when {guard}
  while sum(abs(1 - product(ratios[{index}]))) {below} threshold at most skips in a row -> reuse residual
"""
    values = {"threshold": threshold, "skips": most, "retention": share, "ratios": ratios}
    notes = (
        ()
        if kind == "hunyuan_video"
        else ("The node has ratios for each half of guidance; these are those of the conditional one.",)
    )
    return Conversion(written(text, values), notes)


def _ratios(preset: str) -> list[float]:
    listed = preset_values("magcache", preset)["ratios"]
    items = listed.items if isinstance(listed, ir.ListOf) else ()
    return [item.value for item in items if isinstance(item, ir.Number)]


def _flux_mask(steps: int, ratios: list[float], threshold: float, most: int, share: float, start: int, end: int) -> str:
    """Returns the node's decisions for FLUX.1, which depend on nothing but the number of steps."""
    final = end if end >= 0 else steps + end
    letters = list[str]()
    ratio, error, streak = 1.0, 0.0, 0
    for step in range(steps):
        same = steps == len(ratios)
        place = step if same else int(step * ((len(ratios) - 1) / (steps - 1))) if steps > 1 else 0
        skips = False
        if step >= int(steps * share) and start <= step <= final and place != _LEFT_OUT:
            ratio *= ratios[place]
            streak += 1
            error += abs(1 - ratio)
            skips = error < threshold and streak <= most
            if not skips:
                ratio, error, streak = 1.0, 0.0, 0
        letters.append("0" if skips else "1")
    return "".join(letters)


# --- ComfyUI -----------------------------------------------------------------------------------------------------

EASYCACHE = f"""policy easycache "EasyCache"
source "arXiv:2507.02860"
param threshold: float = 0.2 in [0, inf)
{RANGE}signal x = input(model)
signal v = output(model)
signal rate = l1(kept(v), kept(v, 2)) / l1(kept(x), kept(x, 2))
signal change = rate * l1(x, kept(x)) / l1(kept(v))
match model when final_t < t <= first_t
  while total(1) > 2 and sum(change) < threshold -> reuse residual follow cond
"""
"""ComfyUI's form: changes are measured from the last computed step, and the first two steps of the range compute."""


def _easycache_node(node: Fields, workflow: Workflow) -> Conversion:
    values = {"threshold": node.number("reuse_threshold", 0.2, low=0)}
    window = _window(node, workflow, ("start_percent", "end_percent"), (0.15, 0.95))
    node.ignore("verbose")
    notes = (
        "The node measures changes of each eighth row and column of the latents; here all count.",
        *_notes(window, workflow),
    )
    return Conversion(written(EASYCACHE, {**values, **window}), notes)


def _lazycache_node(node: Fields, _workflow: Workflow) -> Conversion:
    node.refuse("class_type", "the node caches what guidance gives, which no rule reaches")


_NODES: dict[str, Callable[[Fields, Workflow], Conversion]] = {
    "ApplyFBCacheOnModel": _first_block_cache,
    "TeaCache": _teacache_node,
    "MagCache": _magcache_node,
    "EasyCache": _easycache_node,
    "LazyCache": _lazycache_node,
}
