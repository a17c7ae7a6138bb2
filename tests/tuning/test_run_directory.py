# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false
"""Run directories: a tuning that is ended goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from cachepolicy.engine.apply import run_of
from cachepolicy.errors import PolicyError
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tuning.recording import record
from cachepolicy.tuning.run_directory import fingerprint, pack_records, settings_of, unpack_records
from cachepolicy.tuning.sampling import Sampler
from cachepolicy.tuning.solver import solver_weights
from cachepolicy.tuning.tuner import Tuning, tune

STEPS = 6
COUNT = 4


def emoji() -> Any:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls() -> list[dict[str, Any]]:
    return [
        {"class_labels": [seed], "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)}
        for seed in range(COUNT)
    ]


def tuned(pipe: Any, folder: Path | None, **more: Any) -> Tuning:
    return tune(pipe, calls(), **{"cost": 0.5, "run_dir": folder, "keep_scheduler": True, **more})


def counted(pipe: Any, work: Callable[[], object], *, until: int | None = None) -> int:
    """Count the forward passes of a function. `until` of them end with an interruption."""
    passes = 0

    def hook(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == until:
            raise KeyboardInterrupt

    # The engine answers skipped calls before hooks of the blocks inside run.
    handle = pipe.transformer.transformer_blocks[0].register_forward_hook(hook)
    try:
        work()
    finally:
        handle.remove()
    return passes


@pytest.fixture(scope="module")
def whole() -> tuple[int, Tuning]:
    """The forward passes and the result of a tuning that is not interrupted."""
    pipe, results = emoji(), list[Tuning]()
    return counted(pipe, lambda: results.append(tuned(pipe, None))), results[0]


def test_a_finished_tuning_is_repeated_without_a_call(whole: tuple[int, Tuning], tmp_path: Path) -> None:
    """The second time nothing is sampled, and the result is the same; another target samples its schedule only."""
    pipe = emoji()
    assert whole[0] == counted(pipe, lambda: tuned(pipe, tmp_path))
    again = list[Tuning]()
    assert 0 == counted(pipe, lambda: again.append(tuned(pipe, tmp_path)))
    assert whole[1].text == again[0].text
    assert whole[1].evaluations == again[0].evaluations
    # One held-out call with 4 of 6 steps, and the choices.
    assert 4 <= counted(pipe, lambda: tuned(pipe, tmp_path, cost=0.7)) <= STEPS * 64


@pytest.mark.parametrize("where", ["recording", "measurement"])
def test_an_interrupted_tuning_goes_on(whole: tuple[int, Tuning], tmp_path: Path, where: str) -> None:
    """After Ctrl-C in a recording or a measurement, only that one is sampled again, and the model has no policy."""
    pipe, until = emoji(), 2 * STEPS + 1 if where == "recording" else whole[0]
    with pytest.raises(KeyboardInterrupt):
        counted(pipe, lambda: tuned(pipe, tmp_path), until=until)
    assert run_of(pipe) is None
    results = list[Tuning]()
    passes = counted(pipe, lambda: results.append(tuned(pipe, tmp_path)))
    assert whole[0] < passes + until <= whole[0] + STEPS
    assert whole[1].text == results[0].text


def test_a_killed_tuning_goes_on(whole: tuple[int, Tuning], tmp_path: Path) -> None:
    """A process that is killed in its third recording leaves two of them."""
    program = f"""
import os, signal
from tests.tuning.test_run_directory import STEPS, Path, emoji, tuned

pipe, passes = emoji(), []

def hook(*_):
    passes.append(1)
    if len(passes) == 2 * STEPS + 2:
        os.kill(os.getpid(), signal.SIGKILL)

pipe.transformer.register_forward_hook(hook)
tuned(pipe, Path({str(tmp_path)!r}))
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert -signal.SIGKILL == ended.returncode
    pipe = emoji()
    assert whole[0] - 2 * STEPS == counted(pipe, lambda: tuned(pipe, tmp_path))


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    """E405 names what differs."""
    pipe = emoji()
    tuned(pipe, tmp_path)
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias[0] += 1
    with pytest.raises(PolicyError, match="weights") as caught:
        tuned(pipe, tmp_path)
    assert "E405" == caught.value.diagnostics[0].code


def test_a_broken_file_is_sampled_again(whole: tuple[int, Tuning], tmp_path: Path) -> None:
    """A file that cannot be read counts as absent."""
    pipe = emoji()
    tuned(pipe, tmp_path)
    next(tmp_path.glob("recording-*.pt")).write_bytes(b"junk")
    assert STEPS == counted(pipe, lambda: tuned(pipe, tmp_path))
    assert not list(tmp_path.glob("*.part"))


def test_an_argument_that_is_not_recognised_is_refused(tmp_path: Path) -> None:
    """E406 names its type; without a run directory it may be given."""
    with pytest.raises(PolicyError, match="object") as caught:
        tune(emoji(), [{**call, "note": object()} for call in calls()], cost=0.5, run_dir=tmp_path)
    assert "E406" == caught.value.diagnostics[0].code


def test_offloaded_weights_are_told_by_their_shapes() -> None:
    """Parameters on the meta device have no values."""
    settings = [settings_of([torch.nn.Linear(size, 2, device="meta")], print) for size in (3, 3, 4)]
    assert settings[0] == settings[1] != settings[2]


def test_values_are_told_apart() -> None:
    """Equal values have one fingerprint; another type, value, shape, state or place has another."""
    values = [
        None, 1, 1.0, True, "1", [1], (1,), {"a": 1}, {"b": 1}, [[1], 2], [[1, 2]],
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.ones(2),
        torch.Generator().manual_seed(1), torch.Generator().manual_seed(2),
    ]  # fmt: skip
    assert len(values) == len({fingerprint(value) for value in values})
    assert fingerprint({"a": torch.ones(2)}) == fingerprint({"a": torch.ones(2)})


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.FlowMatchEulerDiscreteScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.FlowMatchHeunDiscreteScheduler,
    ],
)
def test_a_kept_recording_gives_the_same_weights(tmp_path: Path, kind: Any) -> None:
    """A scheduler is restored with what its steps need."""
    pipe = emoji()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe.scheduler = kind() if "Match" in kind.__name__ else kind(**flow)
    sampler = Sampler(pipe)
    records = record(lambda: sampler(calls()[0]), sampler.schedulers, sampler.models)
    torch.save(pack_records(records), tmp_path / "records.pt")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    kept = unpack_records(torch.load(tmp_path / "records.pt", weights_only=True), sampler.schedulers)
    assert [solver_weights(each.solver) for each in records] == [solver_weights(each.solver) for each in kept]
    for one, other in zip(records, kept, strict=True):
        assert (one.scale, one.elements, one.models, one.timesteps) == (
            other.scale,
            other.elements,
            other.models,
            other.timesteps,
        )
        assert torch.equal(one.gram, other.gram)
