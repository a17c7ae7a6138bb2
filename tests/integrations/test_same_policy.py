"""One policy text selects the corresponding modules of a model in diffusers, vLLM-Omni, SGLang and DiffSynth.

The trees of the engines are recorded; `tests/engines` compares them with live models.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

pytest.importorskip("diffusers")

from cachepolicy.diffusers.timestep_scaling import RAW_SCALE, SCALES
from cachepolicy.engine.introspection import describe
from cachepolicy.errors import PolicyError
from cachepolicy.language.linker import load, resolve
from cachepolicy.language.parser import parse
from cachepolicy.planning.bind import bind
from cachepolicy.planning.module_tree import Skeleton, tree_from_json
from tests.support import engine_models, zoo

DIFFUSERS = {"flux": "flux", "wan": "wan", "qwen_image": "qwenimage", "sd3": "sd3", "z_image": "z_image"}
"""The model of the zoo of each family."""

TEXTS = {
    "attention": "match attention every 2 -> reuse",
    "self_attention": "match self_attention every 2 -> reuse",
    "cross_attention": "match cross_attention every 2 -> reuse",
    "feedforward": "match feedforward every 2 -> reuse",
    "first block": "match blocks[0] every 2 -> reuse",
    "all but the first block": "match blocks[1:] every 2 -> reuse residual",
    "each of the last blocks": "match each blocks[-2:] every 2 -> reuse residual",
    "model": "match model every 2 -> predict taylor(order: 1)",
    "attention of the other blocks": "match attention within blocks[1:] every 2 -> reuse",
    "fbc": "use fbc\n",
    "pab": "use pab\n",
    "fora": "use fora\n",
}

RECORDED = engine_models.recorded()


@functools.cache
def tree(engine: str, family: str) -> Skeleton:
    if engine == "diffusers":
        return describe(zoo.build(DIFFUSERS[family]))
    return tree_from_json(RECORDED[engine, family][1])


def selected(text: str, skeleton: Skeleton) -> list[tuple[str, int, int]] | str:
    """How many modules of which kind the text takes in each block, by the block's number; -1 stands outside.

    Or the code of the error, where it takes nothing.
    """
    policy = load(text.split()[1]) if text.startswith("use") else parse(text)
    try:
        plan = bind(resolve(policy, {}, model=skeleton.facts), skeleton)
    except PolicyError as error:
        return error.diagnostics[0].code
    found = Counter[tuple[str, int]]()
    for site in plan.sites:
        for name in site.modules:
            around = [number for block, number in skeleton.block_order.items() if f"{name}.".startswith(f"{block}.")]
            kinds = skeleton[name].kinds - {"self_attention", "cross_attention"}
            kind = "block" if name in skeleton.block_order else ",".join(sorted(kinds))
            found[kind, around[0] if around else -1] += 1
    return sorted((kind, number, count) for (kind, number), count in found.items())


def without_single(found: list[tuple[str, int, int]] | str) -> list[tuple[str, int, int]] | str:
    """What is selected but for the attention of the blocks from number 2 on."""
    if isinstance(found, str):
        return found
    return [each for each in found if each[0] != "attention" or each[1] < 2]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(("engine", "family"), sorted(RECORDED))
def test_the_same_text_selects_the_corresponding_modules(engine: str, family: str, name: str) -> None:
    """In every block the same number of modules of the same kind as in diffusers, and the same error elsewhere.

    The single blocks of DiffSynth's FLUX compute their attention themselves and have no module for it.
    """
    expected, got = (selected(TEXTS[name], tree(each, family)) for each in ("diffusers", engine))
    if (engine, family) == ("diffsynth", "flux"):
        expected = without_single(expected)
    assert expected == got


@pytest.mark.parametrize("family", engine_models.FAMILIES)
def test_the_table_compares_something(family: str) -> None:
    """Each text takes modules of the models of diffusers, but for cross-attention where there is none."""
    for name, text in TEXTS.items():
        found = selected(text, tree("diffusers", family))
        assert isinstance(found, str) == (name == "cross_attention" and family != "wan"), (name, found)


def test_every_engine_is_recorded() -> None:
    """Every family of every engine, but for Stable Diffusion 3 in DiffSynth, which has none."""
    every = {(engine, family) for engine in engine_models.ENGINES for family in engine_models.FAMILIES}
    assert every - {("diffsynth", "sd3")} == set(RECORDED)


FRACTIONS = {"flux": (1000.0, False), "qwen_image": (1000.0, False), "z_image": (1000.0, True)}


@pytest.mark.parametrize(("engine", "family"), sorted(RECORDED))
def test_the_clock_of_each_class_is_right(engine: str, family: str) -> None:
    """vLLM-Omni calls three of its models with fractions, as diffusers does; SGLang and DiffSynth call none so."""
    scale = SCALES.get(RECORDED[engine, family][0], RAW_SCALE)
    assert scale is not None
    expected = FRACTIONS.get(family, (1.0, False)) if engine == "vllm_omni" else (1.0, False)
    assert expected == (scale.factor, scale.reverse)
