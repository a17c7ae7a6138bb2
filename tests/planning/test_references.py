"""Thresholds that count the tokens of reference pictures get a warning on pipelines for editing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from click.testing import CliRunner

import cachepolicy
from cachepolicy.cli.commands import main
from cachepolicy.language.linker import resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.references import with_references
from cachepolicy.tools.meta_model import Blueprint, read_model
from tests.support import zoo

LATENT = """signal head = residual(blocks[0], tokens: "latent")
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= 0.05 -> reuse residual
"""


def folder(root: Path, name: str, pipeline: str | None) -> Path:
    """The folder of a pipeline with a small denoiser."""
    model: Any = zoo.entry(name)
    (root / "transformer").mkdir()
    config = {"_class_name": model.class_name, **model.config}
    (root / "transformer" / "config.json").write_text(json.dumps(config))
    if pipeline is not None:
        (root / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return root


def warned(blueprint: Blueprint, policy: str) -> list[str]:
    """The codes of the warnings about references."""
    loaded = cachepolicy.parse(policy) if "\n" in policy else cachepolicy.load(policy)
    plan = bind(resolve(loaded, model=blueprint.skeleton.facts), blueprint.skeleton)
    return [each.code for each in with_references(plan, blueprint.references).warnings if each.code == "W517"]


@pytest.mark.parametrize(
    ("name", "pipeline", "edits"),
    [
        ("flux", "FluxKontextPipeline", True),
        ("flux", "FluxKontextInpaintPipeline", True),
        ("flux", "FluxPipeline", False),
        ("flux", "FluxControlPipeline", False),
        ("flux", None, False),
        ("flux", "NoPipeline", False),
        ("qwenimage", "QwenImageEditPipeline", True),
        ("qwenimage", "QwenImageEditPlusPipeline", True),
        ("qwenimage", "QwenImagePipeline", False),
        ("flux2", "Flux2Pipeline", True),
        ("flux2", "Flux2KleinPipeline", True),
        ("wan_vace", "WanVACEPipeline", True),
        ("wan", "WanImageToVideoPipeline", False),
    ],
)
def test_pipelines_for_editing_are_recognised(name: str, pipeline: str | None, edits: bool, tmp_path: Path) -> None:
    """By the source of the pipeline, or by the class of the model."""
    assert edits == (read_model(folder(tmp_path, name, pipeline)).references is not None)


def test_rules_that_measure_all_tokens_are_named(tmp_path: Path) -> None:
    """Tokens of the picture, embeddings of the timestep and tables need no warning."""
    kontext = read_model(folder(tmp_path, "flux", "FluxKontextPipeline"))
    assert ["W517"] == warned(kontext, "fbc")
    assert ["W517"] == warned(kontext, "teacache")
    assert ["W517"] == warned(kontext, "easycache")
    assert [] == warned(kontext, "fbc_edit")
    assert [] == warned(kontext, LATENT)
    assert [] == warned(kontext, "magcache")
    assert [] == warned(kontext, "fora")


def test_an_embedding_has_no_tokens(tmp_path: Path) -> None:
    """TeaCache on Wan's timestep embedding needs no warning on VACE, First Block Cache does."""
    vace = read_model(folder(tmp_path, "wan_vace", None))
    embedding = """signal e = output("^condition_embedder\\.time_embedder$")
match blocks while sum(relative_l1(e, prev(e))) < 0.1 -> reuse residual
"""
    assert [] == warned(vace, embedding)
    assert ["W517"] == warned(vace, "fbc")


def test_check_and_plan_warn(tmp_path: Path) -> None:
    """Both commands show the warning with what to write; another pipeline gives none."""
    path = str(folder(tmp_path, "flux", "FluxKontextPipeline"))
    checked = CliRunner().invoke(main, ["check", "fbc", "--model", path])
    assert "warning[W517]: rule 1 measures the tokens of reference pictures too" in checked.stdout
    assert 'help: measure `residual(blocks[0], tokens: "latent")`' in checked.stdout
    planned = CliRunner().invoke(main, ["plan", "fbc", "--model", path, "--steps", "4", "--signal", "drift=0"])
    assert "W517" in planned.stderr
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    checked = CliRunner().invoke(main, ["check", "fbc", "--model", path])
    assert ("fbc: fine\n", 0) == (checked.stdout, checked.exit_code)
