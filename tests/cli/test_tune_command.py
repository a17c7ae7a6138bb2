"""`cachepolicy tune`: from a folder and a target to a policy file."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from cachepolicy.cli.commands import main
from cachepolicy.testing.models import redraw
from cachepolicy.tuning.calls import Calls
from cachepolicy.tuning.sampling import Sampler
from tests.support import zoo
from tests.support.tiny_pipelines import flux_pipeline, latte, normal, texts, vae_of

STEPS = 6
Saved = tuple[Any, dict[str, torch.Tensor], list[str]]
"""A pipeline, its embeddings, and further options of the command."""


def images() -> Saved:
    vae = vae_of()
    vae.register_to_config(shift_factor=0.1)
    redraw(vae, 1)
    embeds = {"prompt_embeds": normal(1, 5, 16), "pooled_prompt_embeds": normal(1, 16)}
    sizes = ["--argument", "height=32", "--argument", "width=32"]
    return flux_pipeline(zoo.build("flux", in_channels=16), vae), embeds, sizes


def videos() -> Saved:
    tiny = latte()
    numbers = {name: value for name, value in tiny.arguments.items() if isinstance(value, int) or value is None}
    return tiny.pipe, texts(), [
        word for name, value in numbers.items() for word in ("--argument", f"{name}={json.dumps(value)}")
    ]  # fmt: skip


def sounds() -> Saved:
    model = zoo.build("stable_audio", global_states_input_dim=16)
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2],
        channel_multiples=[1],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=16,
    )
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    pipe = diffusers.StableAudioPipeline(
        vae=vae.eval(),
        projection_model=diffusers.StableAudioProjectionModel(8, 8, 0, 512),  # pyright: ignore[reportAttributeAccessIssue]
        transformer=model,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
        **parts,
    )
    masks = {"attention_mask": torch.ones(1, 5).long(), "negative_attention_mask": torch.ones(1, 5).long()}
    return pipe, texts(8) | masks, ["--argument", "audio_end_in_s=1"]


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Runs the command on a saved pipeline, by default that of images."""
    root, known = tmp_path_factory.mktemp("saved"), dict[str, list[str]]()

    def run(*options: Any, kind: Callable[[], Saved] = images, command: str = "tune") -> Result:
        name = kind.__name__
        if name not in known:
            pipe, embeds, further = kind()
            pipe.save_pretrained(root / name)
            save_file(embeds, root / f"{name}.safetensors")
            known[name] = [str(root / name), "--embeds", str(root / f"{name}.safetensors"), *further]
        arguments = [command, *known[name], *([] if "--steps" in options else ["--steps", STEPS]), *options]
        return CliRunner().invoke(main, [str(each) for each in arguments])

    return run


@pytest.mark.parametrize("kind", [images, videos, sounds])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_saved_pipeline_gets_a_policy(tune: Callable[..., Result], tmp_path: Path, kind: Callable[[], Saved]) -> None:
    """The file passes `check`, `test` and `fmt --check`, and computes the share of the calls that was asked for."""
    path = tmp_path / "mine.cp"
    result = tune("--cost", 0.5, "--samples", 2, "--held-out", 1, "--out", path, "--json", kind=kind)
    assert 0 == result.exit_code, result.output
    told = json.loads(result.stdout)
    assert (3, 0.5) == (len(told["chosen"]["steps"]), told["chosen"]["cost"])
    assert path.read_text("utf-8") == told["policy"]
    for command in (["check"], ["test"], ["fmt", "--check"]):
        assert 0 == CliRunner().invoke(main, [*command, str(path)]).exit_code


def test_numbers_without_end_are_null_in_json(tune: Callable[..., Result], tmp_path: Path) -> None:
    """Where every call is computed nothing differs, and JSON has no infinite numbers."""
    target = ("--cost", 1, "--keep-scheduler", "--samples", 1, "--held-out", 1)
    result = tune(*target, "--out", tmp_path / "all.cp", "--json")
    assert 0 == result.exit_code, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)["chosen"]
    assert (None, None, None) == (found["forecast"], found["psnr"], found["psnr_p10"])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_sound_is_written_as_such(tune: Callable[..., Result], tmp_path: Path) -> None:
    """`run` writes the sound of a pipeline with the rate of its decoder."""
    result = tune("--output", tmp_path, kind=sounds, command="run")
    assert 0 == result.exit_code, result.output
    with wave.open(str(tmp_path / "seed-0-uncached.wav")) as file:
        assert (2, 16, 16) == (file.getnchannels(), file.getframerate(), file.getnframes())


def test_prompts_take_turns_and_every_call_has_a_seed() -> None:
    """Recorded and further calls go through the prompts and the seeds in one order."""
    recorded, further = Calls({"height": 8}, ["a", "b"], samples=3, held_out=2, seed=7).split()
    calls = [*recorded, *further]
    assert (3, 2) == (len(recorded), len(further))
    assert ["a", "b", "a", "b", "a"] == [call["prompt"] for call in calls]
    assert [7, 8, 9, 10, 11] == [call["generator"].initial_seed() for call in calls]
    assert {8} == {call["height"] for call in calls}


def test_an_interrupted_command_goes_on(
    tune: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is exit code 130 and names the folder; the same command samples only what is missing."""
    original, calls = Sampler.__call__, list[int]()

    def counted(self: Sampler, call: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, call)

    monkeypatch.setattr(Sampler, "__call__", counted)
    options = [
        "--cost",
        0.5,
        "--samples",
        2,
        "--held-out",
        1,
        "--out",
        tmp_path / "a.cp",
        "--run-dir",
        tmp_path / "run",
    ]
    result = tune(*options)
    assert 130 == result.exit_code
    assert f"`{tmp_path / 'run'}` has what was sampled" in result.stderr
    before = len(calls)
    assert 0 == tune(*options).exit_code
    assert 2 == len(list((tmp_path / "run").glob("recording-*")))
    assert 1 == len(list((tmp_path / "run").glob("reference-*")))
    # Four further calls, which end before the model runs, show how the pipeline prepares each scheduler.
    assert len(calls) - before == 1 + 4 + len(list((tmp_path / "run").glob("measured-*")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give one of --cost, --speedup, --psnr, --psnr-p10 and --levels"),
        (["--cost", 0.5, "--levels", "1,2"], "give one of --cost"),
        (["--cost", 0.5, "--steps", "8,few"], "is not a number of steps"),
        (["--policy", "fbc", "--levels", "1,2"], "--policy takes one target"),
        (["--cost", 0.5, "--psnr", 40], "give one of --cost"),
        (["--cost", 0.5, "--prompts", "nowhere.txt"], "the prompts in `nowhere.txt` cannot be read"),
        (["--cost", 0.5, "--out", "nowhere/a.cp"], "there is no folder `nowhere`"),
        (["--cost", 1.5], "is not in the range"),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(
    tune: Callable[..., Result], options: list[Any], said: str
) -> None:
    """The exit code is 2."""
    result = tune(*options)
    assert 2 == result.exit_code, result.output
    assert said in result.stderr


def test_a_target_out_of_reach_says_what_is_reachable(tune: Callable[..., Result], tmp_path: Path) -> None:
    """E404 names the best that was measured; no file is written."""
    result = tune("--speedup", 1000, "--samples", 1, "--held-out", 1, "--out", tmp_path / "a.cp")
    assert 1 == result.exit_code
    assert "E404" in result.stderr
    assert "the denoiser takes" in result.stderr
    assert not (tmp_path / "a.cp").exists()


def test_calibration_of_a_saved_pipeline(tune: Callable[..., Result], tmp_path: Path) -> None:
    """The file is the method with the measured constants."""
    path = tmp_path / "mine.cp"
    options = ["--method", "magcache", "--samples", 1, "--out", path]
    result = tune(*options, command="calibrate")
    assert 0 == result.exit_code, result.output
    assert "magcache with a threshold of" in result.stdout
    assert "table ratios" in path.read_text("utf-8")
    for command in (["check"], ["test"], ["fmt", "--check"]):
        assert 0 == CliRunner().invoke(main, [*command, str(path)]).exit_code
    told = json.loads(tune(*options, "--json", command="calibrate").stdout)
    assert told["policy"] == path.read_text("utf-8")


def test_the_threshold_of_a_policy_is_tuned(tune: Callable[..., Result], tmp_path: Path) -> None:
    """The file is the policy with another default; a policy without a threshold is refused."""
    path = tmp_path / "mine.cp"
    options = ["--samples", 1, "--held-out", 1, "--out", path]
    result = tune("--policy", "fbc", "--cost", 0.7, *options, "--report", tmp_path / "a.html")
    assert 0 == result.exit_code, result.output
    assert "`threshold`" in result.stdout
    assert "param threshold" in (tmp_path / "a.html").read_text("utf-8")
    assert "policy first_block_cache" in path.read_text("utf-8")
    for command in (["check"], ["test"], ["fmt", "--check"]):
        assert 0 == CliRunner().invoke(main, [*command, str(path)]).exit_code
    refused = tune("--policy", "fora", "--cost", 0.7, *options)
    assert (2, True) == (refused.exit_code, "E408" in refused.stderr)
    assert 2 == tune("--param", "threshold", "--cost", 0.7).exit_code


def test_several_numbers_of_steps_give_one_policy(tune: Callable[..., Result], tmp_path: Path) -> None:
    """The file has a rule for each number of steps, and the JSON form has what was found for each."""
    path = tmp_path / "mine.cp"
    options = ["--samples", 1, "--held-out", 1, "--out", path, "--report", tmp_path / "a.html", "--json"]
    result = tune("--steps", "4,6", "--cost", 0.5, *options)
    assert 0 == result.exit_code, result.output
    assert ["a-4.html", "a-6.html"] == sorted(file.name for file in tmp_path.glob("*.html"))
    told = json.loads(result.stdout)
    assert [(4, 0.5), (6, 0.5)] == [(each["steps"], each["level"]) for each in told["results"]]
    assert "when steps == 6 and level == 0.5" in path.read_text("utf-8")
    for command in (["check"], ["test"], ["fmt", "--check"]):
        assert 0 == CliRunner().invoke(main, [*command, str(path)]).exit_code


def test_the_scheduler_is_kept_where_that_is_said(tune: Callable[..., Result], tmp_path: Path) -> None:
    """Without the option the result may ask for another one, and says how to set it."""
    options = ["--cost", 0.5, "--samples", 1, "--held-out", 1, "--out", tmp_path / "a.cp", "--json"]
    kept = json.loads(tune(*options, "--keep-scheduler").stdout)
    assert ("FlowMatchEulerDiscreteScheduler", {}, "own") == (kept["scheduler"], kept["arguments"], kept["reference"])
    assert "converged" == json.loads(tune(*options).stdout)["reference"]
