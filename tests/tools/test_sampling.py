"""`cachepolicy run`: a pipeline from disk, with a policy and without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cachepolicy.cli.commands import main
from cachepolicy.errors import PolicyError
from cachepolicy.testing.models import redraw
from cachepolicy.tools import quality
from cachepolicy.tools.sampling import read_tensors
from tests.support import zoo
from tests.support.tiny_pipelines import flux_pipeline, normal, vae_of

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux pipeline with a decoder and without text encoders, and embeddings for it."""
    path = tmp_path_factory.mktemp("pipeline")
    vae = vae_of()
    vae.register_to_config(shift_factor=0.1)
    redraw(vae, 1)
    pipe = flux_pipeline(zoo.build("flux", in_channels=16), vae)
    pipe.save_pretrained(path / "flux")
    save_file({"prompt_embeds": normal(1, 5, 16), "pooled_prompt_embeds": normal(1, 16)}, path / "prompt.safetensors")
    return path


def run(folder: Path, *arguments: Any) -> Any:
    call = ["run", folder / "flux", "--embeds", folder / "prompt.safetensors", "--steps", 6]
    call += ["--argument", "height=32", "--argument", "width=32", *arguments]
    return CliRunner().invoke(main, [str(each) for each in call])


def test_pictures_trace_and_metrics_against_the_uncached_run(folder: Path, tmp_path: Path) -> None:
    """Both pictures of each seed, the trace, and how far they are apart."""
    result = run(folder, "--policy", "fora", "--seed", 1, "--seed", 2, "--output", tmp_path / "out")
    assert 0 == result.exit_code, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "seed-1.png",
        "seed-1-uncached.png",
        "seed-2.png",
        "seed-2-uncached.png",
        "trace.json",
        "report.html",
    } <= names
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "against the uncached run" in report
    assert "seeds 1, 2, decided alike" in report
    assert "FLOPs skipped" in report
    assert "about as many FLOPs in the model as with the policy" in result.stdout
    fewer = {path.name for path in (tmp_path / "out").glob("seed-*-steps.png")}
    assert 2 == len(fewer)
    assert all(f"seed {seed}, {name}" in report for seed in (1, 2) for name in ("uncached", "with the policy"))
    assert 2 * 5 == report.count("<img src=")
    assert "PSNR" in result.stdout
    assert "SSIM" in result.stdout
    assert "x as fast" in result.stdout
    told = CliRunner().invoke(
        main, ["explain", "transformer_blocks.0.attn@1", "--trace", str(tmp_path / "out" / "trace.json")]
    )
    assert "transformer_blocks.0.attn" in told.stdout


def test_a_policy_that_computes_everything_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    """The numbers of the JSON form say so."""
    (tmp_path / "all.cp").write_text("match attention -> compute\n")
    result = run(folder, "--policy", tmp_path / "all.cp", "--output", tmp_path / "out", "--json")
    data = json.loads(result.stdout)
    assert 0 == result.exit_code
    assert data["seeds"][0]["quality"]["psnr"] is None
    assert 1.0 == pytest.approx(data["seeds"][0]["quality"]["ssim"])
    assert (tmp_path / "out" / "seed-0.png").read_bytes() == (tmp_path / "out" / "seed-0-uncached.png").read_bytes()


def test_without_a_policy_the_bare_pipeline_is_sampled(folder: Path, tmp_path: Path) -> None:
    """One picture, no trace, no metrics."""
    result = run(folder, "--output", tmp_path / "out", "--json")
    data = json.loads(result.stdout)
    assert data["seeds"][0]["quality"] is None
    assert ["seed-0-uncached.png"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_the_variable_that_disables_policies_samples_the_bare_pipeline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture, no trace, no speed-up, and a note that says why."""
    monkeypatch.setenv("CACHEPOLICY_DISABLE", "1")
    result = run(folder, "--policy", "fora", "--output", tmp_path / "out", "--json")
    assert "CACHEPOLICY_DISABLE" in result.stderr
    assert json.loads(result.stdout)["speed_up"] is None
    assert ["seed-0-uncached.png"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_no_comparison_samples_once(folder: Path, tmp_path: Path) -> None:
    """Only the policy's picture is there."""
    result = run(folder, "--policy", "fora", "--no-compare", "--output", tmp_path / "out")
    assert 0 == result.exit_code
    assert not (tmp_path / "out" / "seed-0-uncached.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--argument", "heigth=32"], "did you mean `height`"),
        (["--argument", "height"], "is not NAME=VALUE"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--policy", "pap"], "did you mean `pab`"),
        (["--argument", 'height="tall"'], "`FluxPipeline` failed: TypeError"),
    ],
)
def test_mistakes_are_named_with_the_right_word(folder: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    """An argument the call does not take, a broken one, a dtype, a policy."""
    result = run(folder, *arguments, "--output", tmp_path / "out")
    assert 0 != result.exit_code
    assert said in result.stderr


def test_what_is_no_pipeline_is_an_error(tmp_path: Path) -> None:
    """An empty folder, an index of a class that is none, embeddings that are none."""
    result = CliRunner().invoke(main, ["run", str(tmp_path)])
    assert "E213" in result.stderr
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "os.system"}))
    result = CliRunner().invoke(main, ["run", str(tmp_path)])
    assert "E213" in result.stderr
    (tmp_path / "embeds.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    result = CliRunner().invoke(main, ["run", str(tmp_path), "--embeds", str(tmp_path / "embeds.pt")])
    assert "E213" in result.stderr


def test_a_prompt_needs_a_text_encoder(folder: Path, tmp_path: Path) -> None:
    """A pipeline that was saved without its text encoders is asked to be given embeddings, before it is loaded."""
    result = CliRunner().invoke(main, ["run", str(folder / "flux"), "--prompt", "a cat"])
    assert 2 == result.exit_code
    assert "was saved without its text encoder, so it cannot encode the prompt" in result.stderr
    assert "`--embeds FILE`" in result.stderr


def test_embeddings_from_a_pt_file(folder: Path, tmp_path: Path) -> None:
    """Tensors by name in a .pt file give the same pictures as those of a safetensors file."""
    torch.save(load_file(folder / "prompt.safetensors"), tmp_path / "prompt.pt")
    assert 0 == run(folder, "--output", tmp_path / "a").exit_code
    assert 0 == run(folder, "--embeds", tmp_path / "prompt.pt", "--output", tmp_path / "b").exit_code
    a, b = (tmp_path / name / "seed-0-uncached.png" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_one_tensor_without_a_name_is_the_prompt(tmp_path: Path) -> None:
    """A .pt file with one tensor is `prompt_embeds`; anything else without names is refused."""
    embeds = normal(1, 5, 16)
    torch.save(embeds, tmp_path / "one.pt")
    tensors = read_tensors(tmp_path / "one.pt")
    assert ["prompt_embeds"] == list(tensors)
    assert torch.equal(embeds, tensors["prompt_embeds"])
    torch.save([embeds], tmp_path / "list.pt")
    with pytest.raises(PolicyError, match="neither tensors by name nor one tensor"):
        read_tensors(tmp_path / "list.pt")


def test_quality_of_equal_and_of_opposite_pictures() -> None:
    """Equal ones are infinitely near; noise makes both numbers worse."""
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = quality.compare_pictures(picture, picture.clone())
    assert (math.inf, math.inf) == (same.psnr, same.worst_psnr)
    assert 1.0 == pytest.approx(same.ssim)
    little, much = (quality.compare_pictures(picture, (picture + noise).clamp(-1, 1)) for noise in (0.01, 0.3))
    assert little.psnr > much.psnr
    assert little.ssim > much.ssim
    with pytest.raises(ValueError, match="against references"):
        quality.compare_pictures(picture, picture[:1])


def test_frames_of_a_video_are_written_one_by_one_and_moving(tmp_path: Path) -> None:
    """A folder of numbered frames and one animated file."""
    from cachepolicy.tools.sampling import Sample, save_pictures

    frames = torch.linspace(-1, 1, 5 * 3 * 8 * 8).reshape(5, 3, 8, 8)
    written = save_pictures(Sample(frames, frames=True, seconds=0.0), tmp_path, "clip")
    assert [f"{number:04}.png" for number in range(5)] + ["clip.gif"] == [path.name for path in written]
    assert all(path.is_file() for path in written)
