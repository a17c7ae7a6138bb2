"""The `publish` command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cachepolicy._resources import shipped
from cachepolicy.cli.commands import main

FAST = """policy fast "Attention of every third step"
source "arXiv:0000.00000"
param every_n: int = 3 in [1, inf) "a | b"
match attention every every_n -> reuse
expect attention over 6 steps: C R R C R R
"""


def publish(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["publish", str(folder), *options])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fast.cp").write_text(FAST)
    return tmp_path


def test_a_card_says_what_a_policy_is_and_how_to_use_it(folder: Path) -> None:
    """Title, source, params, schedule, text, and the name that loads it with its digest."""
    done = publish(folder, "--repo", "acme/policies", "--license", "mit", "--steps", "6")
    assert (0, True) == (done.exit_code, "1 policy" in done.output)
    text = (folder / "README.md").read_text()
    digest = hashlib.sha256(FAST.encode()).hexdigest()
    assert text.startswith("---\n")
    assert "license: mit" in text
    for part in (
        "Attention of every third step",
        "arXiv:0000.00000",
        r"| `every_n` | `3` | a \| b |",
        "CRRCRR",
        FAST,
        'cachepolicy.apply(pipe, "hf:acme/policies:fast.cp")',
        f"hf:acme/policies:fast.cp@COMMIT#sha256={digest}",
    ):
        assert part in text
    assert digest in done.output


def test_a_tuned_policy_shows_what_it_was_tuned_for(folder: Path) -> None:
    """Its provenance, and the schedule of as many steps; a saved comparison becomes a table."""
    (folder / "tuned.cp").write_bytes((Path(str(shipped("data"))) / "emoji-dit" / "tuned.cp").read_bytes())
    far = {"mean": 48.25, "p10": 43.5, "each": []}
    row = {"name": "tuned", "cost": 0.28, "psnr_uncached": far, "psnr_converged": None, "call_speedup": 2.5}
    (folder / "comparison.json").write_text(json.dumps({"samples": 8, "rows": [row]}))
    assert 0 == publish(folder).exit_code
    text = (folder / "README.md").read_text()
    assert "Tuned for schedules of 50 steps" in text
    assert '| denoiser | "DiTTransformer2DModel" |' in text
    assert "| sigmas | 50 values |" in text
    assert "50 steps, 1 site: 36 of 50 site calls skipped (72.0 %)" in text
    assert "| tuned | 0.280 | 48.2, 43.5 |  | 2.50x |" in text


def test_nothing_faulty_is_published(folder: Path) -> None:
    """An error in a policy, or an expectation that does not hold, is reported, and no card is written."""
    for text in ("match attention every -> reuse\n", FAST.replace("C R R C R R", "C R C R C R")):
        (folder / "faulty.cp").write_text(text)
        done = publish(folder)
        assert (1, True) == (done.exit_code, "faulty.cp" in done.output)
        assert not (folder / "README.md").exists()


def test_a_readme_of_the_author_is_kept(folder: Path) -> None:
    """What the command wrote it replaces; what it did not write it replaces on demand only."""
    assert 0 == publish(folder).exit_code
    assert 0 == publish(folder).exit_code
    (folder / "README.md").write_text("mine\n")
    assert 2 == publish(folder).exit_code
    assert "mine\n" == (folder / "README.md").read_text()
    assert 0 == publish(folder, "--force").exit_code
    assert "mine\n" != (folder / "README.md").read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"samples": 1}', '{"samples": 1, "rows": [{"name": "x"}]}'])
def test_a_file_that_is_no_comparison_is_named(folder: Path, content: str) -> None:
    """Its name and that it is not what `compare --json` prints."""
    (folder / "comparison.json").write_text(content)
    done = publish(folder)
    assert 0 != done.exit_code
    assert "comparison.json" in done.output
    assert not (folder / "README.md").exists()


def test_a_folder_without_policies_is_refused(tmp_path: Path) -> None:
    """There is nothing to publish."""
    assert (2, True) == ((done := publish(tmp_path)).exit_code, "E150" in done.output)


def test_a_card_knows_that_a_distilled_model_has_no_unconditional_half(folder: Path, tmp_path: Path) -> None:
    """Its schedules are those of `plan`: `approximate uncond` computes."""
    pytest.importorskip("diffusers")
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    config = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "num_layers": 1, "num_single_layers": 1}
    (model / "transformer" / "config.json").write_text(json.dumps(config))
    (model / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (folder / "fast.cp").write_text("match model every 2 -> approximate uncond delta\n")
    options = ("--model", str(model), "--steps", "4")
    assert "CCCC" in CliRunner().invoke(main, ["plan", str(folder / "fast.cp"), *options]).output
    assert 0 == publish(folder, *options).exit_code
    assert "CCCC" in (folder / "README.md").read_text()
