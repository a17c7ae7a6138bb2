"""What settings of programs are converted to decides what plain transcriptions of the programs' loops decide."""

from __future__ import annotations

import argparse
import math
import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy import PolicyError  # noqa: E402
from cachepolicy.engine.introspection import describe  # noqa: E402
from cachepolicy.methods.settings import preset_values  # noqa: E402
from tests.methods import transcriptions as reference  # noqa: E402
from tests.methods.scripted import Scripted, letters, run  # noqa: E402
from tests.methods.test_policies import SEEDS, Draw, totals  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:the policy can never"),
    pytest.mark.filterwarnings("ignore:warning"),
]


def workflow(kind: str, steps: int | None = None, **inputs: Any) -> dict[str, Any]:
    """A workflow with one cache node, and a sampler if it has a number of steps."""
    nodes: dict[str, Any] = {"1": {"class_type": kind, "inputs": inputs}}
    if steps is not None:
        nodes["2"] = {"class_type": "KSampler", "inputs": {"steps": steps, "denoise": 1.0}}
    return nodes


def converted(setting: Any) -> Any:
    return cachepolicy.parse(cachepolicy.convert(setting))


def only(rows: dict[str, str]) -> str:
    (row,) = set(rows.values())
    return row


@cache
def skeleton_of(name: str) -> Any:
    from tests.support import zoo

    return describe(zoo.build(name))


# --- ComfyUI-TeaCache


@given(SEEDS)
def test_teacache_node(seed: int) -> None:
    """Terms are positive for FLUX alone, the last step is not forced, and the sum goes on before the range."""
    choose = random.Random(seed)
    kind, model = choose.choice(
        [("flux", "flux"), ("flux-kontext", "flux"), ("wan2.1_t2v_14B_ret_mode", "wan"), ("hidream_i1_fast", "hidream")]
    )
    threshold, end = choose.uniform(0.05, 0.6), choose.choice([1.0, choose.uniform(0.3, 1)])
    changes = [choose.uniform(-0.05, 0.25) for _ in range(choose.randint(2, 30))]
    start = choose.choice([0, choose.uniform(0, min(0.3, 7 / len(changes)))])
    row, total = "", 0.0
    for step, change in enumerate(changes):
        computes = True
        if step:
            total += abs(change) if kind.startswith("flux") else change
            if total < threshold:
                computes = False
            else:
                total = 0.0
        row += "R" if not computes and start <= step / len(changes) <= end else "C"
    inputs = {"model_type": kind, "rel_l1_thresh": threshold, "start_percent": start, "end_percent": end}
    policy = converted(workflow("TeaCache", len(changes), **inputs))
    rows = cachepolicy.simulate(
        policy, steps=len(changes), signals={"change": changes}, skeleton=skeleton_of(model)
    ).rows
    assert row == only(rows)


def test_teacache_node_by_the_timestep() -> None:
    """For HiDream-I1-Full nothing is measured: the relative change of the timestep is the probe."""
    times = [1000 * (1 - step / 30) ** 1.2 for step in range(30)]
    polynomial = [-31360.5009, -712.425503, 49.1363285, 8.26515490, 0.108053901]
    row, total = "C", 0.0
    for before, now in pairwise(times):
        change = abs(now - before) / before
        total += sum(factor * change ** (4 - place) for place, factor in enumerate(polynomial))
        if total >= 0.6:
            row, total = row + "C", 0.0
        else:
            row += "R"
    policy = converted(workflow("TeaCache", model_type="hidream_i1_full", rel_l1_thresh=0.6))
    assert row == only(cachepolicy.simulate(policy, steps=30, timesteps=times).rows)
    assert "R" in row[:10]


# --- ComfyUI-MagCache


@given(SEEDS)
def test_magcache_node(seed: int) -> None:
    """The table is read by the rounded-down share of the steps, within the range, and FLUX has a step left out."""
    choose = random.Random(seed)
    kind, preset = choose.choice(
        [
            ("flux", "flux"),
            ("flux_kontext", "flux_kontext_20"),
            ("hunyuan_video", "hunyuan_video"),
            ("wan2.1_t2v_14B", "wan_t2v_14b"),
            ("wan2.1_vace_1.3B", "wan_vace_1_3b"),
        ]
    )
    values: Any = preset_values("magcache", preset)["ratios"]
    ratios = [item.value for item in values.items]
    steps = choose.choice([len(ratios), choose.randint(12, 70)])
    threshold, most = choose.uniform(0.02, 0.3), choose.randint(1, 6)
    share, start, end = choose.uniform(0.1, 0.3), choose.choice([0, 5]), choose.choice([-1, -4, steps - 3])
    final = steps + end if end < 0 else end
    row, ratio, error, skipped = "", 1.0, 0.0, 0
    for step in range(steps):
        place = step if steps == len(ratios) else int(step * ((len(ratios) - 1) / (steps - 1)))
        skips = False
        left_out = kind.startswith("flux") and place == 11
        if step >= int(steps * share) and start <= step <= final and not left_out:
            ratio, skipped = ratio * ratios[place], skipped + 1
            error += abs(1 - ratio)
            below = error <= threshold if kind.startswith("wan") else error < threshold
            skips = below and skipped <= most
            if not skips:
                ratio, error, skipped = 1.0, 0.0, 0
        row += "R" if skips else "C"
    policy = converted(
        workflow(
            "MagCache",
            steps,
            model_type=kind,
            magcache_thresh=threshold,
            retention_ratio=share,
            magcache_K=most,
            start_step=start,
            end_step=end,
        )
    )
    assert row == only(cachepolicy.simulate(policy, steps=steps).rows)


# --- EasyCache of ComfyUI and stable-diffusion.cpp


@given(SEEDS)
def test_easycache_of_programs(seed: int) -> None:
    """In the range of noise levels the first two steps compute, and changes are those from the last computed step."""
    draw = Draw(seed)
    inputs, added = draw.stream(), draw.stream()
    outputs = totals(inputs, added)
    threshold, start, end = draw.random.uniform(0.01, 0.6), draw.random.uniform(0, 0.4), draw.random.uniform(0.6, 1)
    row, kept, rate, total = "", None, None, 0.0
    for step, (x, v) in enumerate(zip(inputs, outputs, strict=True)):
        t = 999 - 999 * step / max(1, draw.steps - 1)
        computes = True
        if 1000 * (1 - end) < t <= 1000 * (1 - start):
            change = None if kept is None else reference.mean_abs(reference.minus(x, kept[0]))
            if kept is not None and rate is not None and change is not None:
                total += rate * change / reference.mean_abs(kept[1])
                computes = total >= threshold
            if computes:
                if kept is not None and change:
                    rate = reference.mean_abs(reference.minus(v, kept[1])) / change
                kept, total = (x, v), 0.0
        row += "C" if computes else "R"
    option = f"threshold={threshold!r},start={start!r},end={end!r}"
    policy = converted(f'--cache-mode easycache --cache-option "{option}"')
    rows, _ = run(Scripted([added]), policy, inputs)
    assert row == only(rows)
    node = workflow("EasyCache", reuse_threshold=threshold, start_percent=start, end_percent=end, verbose=False)
    assert row == only(run(Scripted([added]), converted(node), inputs)[0])


@pytest.mark.parametrize(
    ("node", "inputs", "shift"),
    [
        ("ModelSamplingSD3", {"shift": 3.0}, 3.0),
        ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024}, math.exp(1.15)),
    ],
)
def test_a_range_of_noise_levels_is_that_of_the_workflow(node: str, inputs: dict[str, Any], shift: float) -> None:
    """A node that shifts the noise levels of the model moves the range; a share p is the level s(1 - p) / (1 + ...)."""
    nodes = workflow("ApplyFBCacheOnModel", residual_diff_threshold=0.1, start=0.2, end=0.7)
    nodes["7"] = {"class_type": node, "inputs": inputs}
    text = cachepolicy.convert(nodes)
    assert "# The range" not in text
    times = [1000 - 10 * step for step in range(100)]
    levels = [shift * share / (1 + (shift - 1) * share) * 1000 for share in (0.8, 0.3)]
    row = "".join("R" if step and levels[1] <= t <= levels[0] else "C" for step, t in enumerate(times))
    assert row == only(
        cachepolicy.simulate(cachepolicy.parse(text), steps=100, timesteps=times, signals={"drift": 0}).rows
    )


@pytest.mark.parametrize(
    ("kind", "widgets", "inputs"),
    [
        ("TeaCache", ["flux", 0.4, 0, 1, "cuda"], {"model_type": "flux", "rel_l1_thresh": 0.4}),
        ("ApplyFBCacheOnModel", ["diffusion_model", 0.1], {"residual_diff_threshold": 0.1}),
        (
            "ApplyFBCacheOnModel",
            ["diffusion_model", 0.12, 0.1, 1, -1],
            {"residual_diff_threshold": 0.12, "start": 0.1},
        ),
        (
            "MagCache",
            ["flux_kontext", 0.05, 0.2, 4, 0, -1],
            {"model_type": "flux_kontext", "magcache_thresh": 0.05, "retention_ratio": 0.2, "magcache_K": 4},
        ),
        ("EasyCache", [0.2, 0.15, 0.95, False], {"reuse_threshold": 0.2}),
    ],
)
def test_workflows_that_the_editor_saved(kind: str, widgets: list[Any], inputs: dict[str, Any]) -> None:
    """Values in a list are those of the inputs in their order; a node that is muted or bypassed is left out."""
    nodes = [
        {"id": 1, "type": kind, "mode": 0, "widgets_values": widgets},
        {"id": 2, "type": kind, "mode": 4, "widgets_values": widgets},
        {"id": 3, "type": "KSampler", "mode": 0, "widgets_values": [7, "fixed", 20, 1, "euler", "simple", 1]},
        {"id": 4, "type": "ModelSamplingSD3", "mode": 0, "widgets_values": [3.0]},
        {"id": 5, "type": "Note", "mode": 0, "widgets_values": ["a note"]},
    ]
    api = workflow(kind, 20, **inputs)
    api["4"] = {"class_type": "ModelSamplingSD3", "inputs": {"shift": 3.0}}
    assert cachepolicy.convert(api) == cachepolicy.convert({"last_node_id": 5, "nodes": nodes, "links": []})
    nodes[0]["widgets_values"] = [*widgets, *[0] * 7]
    with pytest.raises(PolicyError, match=r"E168"):
        cachepolicy.convert({"nodes": nodes})


# --- SmoothCache by block


@given(SEEDS)
def test_smoothcache_by_block(seed: int) -> None:
    """A component of one block has its own schedule, the others that of the component."""
    choose = random.Random(seed)
    steps = choose.randint(2, 12)
    masks = {
        name: [1, *(choose.randint(0, 1) for _ in range(steps - 1))]
        for name in ("attn1", "attn1-2", "attn1-0", "ff-1", "attn2")
    }
    rows = cachepolicy.simulate(converted(masks), steps=steps).rows
    for name, row in rows.items():
        kind, _, place, component = f".{name}".split(".")
        assert kind == ""
        if not name.startswith("transformer_blocks."):
            continue
        mask = masks.get(f"{component}-{place}", masks.get(component))
        assert (letters([bool(letter) for letter in mask]) if mask else "C" * steps) == row, name


# --- Learning-to-Cache


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("steps", [6, 9, 20])
def test_routers_of_learning_to_cache(suffix: str, steps: int, tmp_path: Path) -> None:
    """At every other step counted from the end, modules with a score up to the threshold are reused."""
    blocks = 3
    generator = torch.Generator().manual_seed(steps)
    scores = {f"{left}.prob": torch.randn(2 * blocks, generator=generator) for left in range(steps)}
    path = tmp_path / f"router.{suffix}"
    if suffix == "pt":
        torch.save({"routers": scores, "args": argparse.Namespace(lr=0.1)}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(scores, path)
    expected = {}
    for place, component in enumerate(("attn1", "ff")):
        for block in range(blocks):
            logits = [float(scores[f"{left}.prob"][2 * block + place]) for left in range(steps)]
            module = [1 / (1 + math.exp(-logit)) for logit in logits]
            (row,) = reference.learning_to_cache([module], 0.6, alternate=True)
            expected[f"transformer_blocks.{block}.{component}"] = letters(row)
    policy = converted({"path": str(path), "thres": 0.6})
    assert expected == dict(cachepolicy.simulate(policy, steps=steps, skeleton=skeleton_of("dit")).rows)
    assert cachepolicy.convert(path).startswith(
        f"# The routers are for {steps} steps and 3 blocks; the threshold is 0.1."
    )


class Harm:
    """An object whose loading would run a program."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_routers_are_loaded_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that would run something, or holds other tensors, is refused, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    torch.save({"routers": Harm()}, tmp_path / "harm.pt")
    torch.save({"0.prob": torch.zeros(4)}, tmp_path / "other.pt")  # as for U-ViT
    (tmp_path / "text.pt").write_text("no tensors")
    for name, code in (("harm.pt", "E169"), ("other.pt", "E169"), ("text.pt", "E169"), ("missing.pt", "E152")):
        with pytest.raises(PolicyError) as error:
            cachepolicy.convert(tmp_path / name)
        assert [code] == [each.code for each in error.value.diagnostics]
    assert not (tmp_path / "harmed").exists()
