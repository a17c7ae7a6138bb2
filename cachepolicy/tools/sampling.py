# diffusers has no complete type annotations.
# pyright: basic, reportPrivateImportUsage=false
"""Load a pipeline from a folder, sample it and time the calls of its denoisers."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import time
import wave
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cachepolicy.engine.introspection import denoisers
from cachepolicy.errors import PolicyError, suggestion
from cachepolicy.tools.pictures import to_pil
from cachepolicy.tools.saved_pipeline import EMBEDS_HELP, absent_components, check_tensor_file, read_index

EMOJI_FLUX = "cachepolicy.tools.emoji_flux"

Progress = Callable[[int, int, str], None]
"""Called with the steps or runs done, their number in all, and a description of the present one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of one call of a pipeline.

    Attributes:
        pictures: The pictures, or the frames of all videos in order, `(N, C, H, W)` in [-1, 1]. Sound is a picture of
            one row, `(N, C, 1, T)`.
        frames: True if the pictures are frames of videos.
        seconds: The wall-clock seconds of the call.
        model_seconds: The wall-clock seconds in the calls of the denoisers.
        rate: The samples of a second of sound, None for pictures.
    """

    pictures: torch.Tensor = field(repr=False)
    frames: bool
    seconds: float
    model_seconds: float = 0.0
    rate: int | None = None


def open_pipeline(
    folder: str | os.PathLike[str], arguments: Mapping[str, Any], *, dtype: str = "float32", device: str = "cpu"
) -> Any:
    """Load a pipeline from a folder. Nothing is downloaded, and no code of the folder is run.

    Args:
        folder: The folder, with a `model_index.json`.
        arguments: Arguments of the call, which are checked before the weights are loaded.
        dtype: The name of the weights' dtype.
        device: The device of the pipeline.

    Raises:
        PolicyError: The folder holds no pipeline of diffusers, it cannot be loaded, or its call does not take an
            argument (E213).
    """
    import diffusers

    index = read_index(folder)
    if any(isinstance(value, list) and EMOJI_FLUX in value for value in index.values()):
        # diffusers takes components that are not its own from modules that are imported already.
        importlib.import_module(EMOJI_FLUX)
    name = index.get("_class_name")
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(pipeline_class, type):
        accepted = list(inspect.signature(pipeline_class.__call__).parameters)[1:]
        for argument in arguments:
            if argument not in accepted:
                message = f"`{name}` takes no argument `{argument}`"
                raise PolicyError.of("E213", message, help=suggestion(argument, accepted))
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            **dict.fromkeys(absent_components(folder, index)),
        )
        return pipe.to(device)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise PolicyError.of("E213", f"`{folder}`: `{name}` cannot be loaded: {reason}") from error


def read_tensors(path: str | os.PathLike[str], *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read tensors by argument name from a file. No code of the file is run.

    Returns:
        The tensors. A file that holds one tensor without a name is `prompt_embeds`.

    Raises:
        PolicyError: The file cannot be read or holds something else (E213).
    """
    file = Path(path)
    check_tensor_file(file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file, device=device)
        else:
            content = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise PolicyError.of("E213", f"`{file}` cannot be read: {str(error).partition(chr(10))[0]}") from error
    if isinstance(content, torch.Tensor):
        return {"prompt_embeds": content}
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise PolicyError.of("E213", f"`{file}` holds neither tensors by name nor one tensor")
    return {str(name): tensor for name, tensor in content.items()}


def sample_pipeline(pipe: Any, arguments: Mapping[str, Any], seed: int) -> Sample:
    """Call a pipeline once with noise from a seed.

    Args:
        pipe: The pipeline.
        arguments: The keyword arguments of the call, without `generator` and `output_type`.
        seed: The seed of the noise, which is drawn on the CPU.

    Returns:
        The pictures and the seconds.

    Raises:
        PolicyError: E213, the call failed; the message has the reason.
    """
    return call_pipeline(pipe, {**arguments, "generator": torch.Generator("cpu").manual_seed(seed)})


def call_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> Sample:
    """Call a pipeline once.

    Args:
        pipe: The pipeline.
        arguments: The keyword arguments of the call, without `output_type`.

    Returns:
        The pictures and the seconds.

    Raises:
        PolicyError: E213, the call failed; the message has the reason.
    """
    import numpy as np

    started = time.perf_counter()
    try:
        with torch.no_grad(), timed_calls(denoisers(pipe).values()) as model_seconds:
            result = pipe(**arguments, output_type="np")
    except PolicyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        encoders = [component for name, component in pipe.components.items() if name.startswith("text_encoder")]
        help = EMBEDS_HELP if None in encoders and not any(name.endswith("_embeds") for name in arguments) else None
        raise PolicyError.of("E213", f"`{type(pipe).__name__}` failed: {reason}", help=help) from error
    seconds = time.perf_counter() - started
    kind = next((name for name in ("images", "frames", "audios") if hasattr(result, name)), None)
    output = np.asarray(result[0] if kind is None else getattr(result, kind))
    batch = torch.from_numpy(np.ascontiguousarray(output)).float()
    if kind == "audios":
        sound = batch.reshape(len(batch), -1, 1, batch.shape[-1])
        return Sample(sound, frames=False, seconds=seconds, model_seconds=sum(model_seconds), rate=_sampling_rate(pipe))
    # All pictures, or the frames of all videos, as one batch with the channels in front.
    pictures = batch.reshape(-1, *batch.shape[-3:]).permute(0, 3, 1, 2) * 2 - 1
    return Sample(pictures, kind == "frames", seconds, sum(model_seconds))


def _sampling_rate(pipe: Any) -> int:
    """Return the samples of a second of a pipeline's sound, as its decoder states them."""
    configs = [getattr(part, "config", None) for part in pipe.components.values()]
    rates = [getattr(config, name, None) for config in configs for name in ("sampling_rate", "sample_rate")]
    return next((int(rate) for rate in rates if rate), 16_000)


@contextlib.contextmanager
def timed_calls(models: Iterable[torch.nn.Module]) -> Generator[list[float]]:
    """Measure the seconds of each call of the models inside the `with` block.

    Args:
        models: The models.

    Yields:
        A list that gets the wall-clock seconds of each call as it ends.
    """
    seconds, started = list[float](), list[float]()

    def enter(*_: Any) -> None:
        started.append(time.perf_counter())

    def leave(*_: Any) -> None:
        seconds.append(time.perf_counter() - started.pop())

    with contextlib.ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_pre_hook(enter).remove)
            stack.callback(model.register_forward_hook(leave, always_call=True).remove)
        yield seconds


def save_pictures(sample: Sample, folder: Path, name: str) -> list[Path]:
    """Write pictures as PNG files, the frames of videos as PNG files and one animated GIF, and sound as WAV files.

    Args:
        sample: The pictures.
        folder: The folder to write to.
        name: The stem of the files: `name.png` or `name.wav` for one sample, `name-0.png` and so on for several.
            Frames are in the folder `name`, and `name.gif` beside it.

    Returns:
        The paths of all files.

    Raises:
        OSError: A file cannot be written.
    """
    if sample.rate is not None:
        stems = [name] if len(sample.pictures) == 1 else [f"{name}-{number}" for number in range(len(sample.pictures))]
        return [
            _save_sound(sound, sample.rate, folder / f"{stem}.wav")
            for stem, sound in zip(stems, sample.pictures, strict=True)
        ]
    pictures = to_pil(sample.pictures)
    if sample.frames:
        (folder / name).mkdir(parents=True, exist_ok=True)
        paths = [folder / name / f"{number:04}.png" for number in range(len(pictures))]
    elif len(pictures) == 1:
        paths = [folder / f"{name}.png"]
    else:
        paths = [folder / f"{name}-{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    if sample.frames:
        paths.append(folder / f"{name}.gif")
        pictures[0].save(paths[-1], save_all=True, append_images=pictures[1:], duration=1000 // 16, loop=0)
    return paths


def _save_sound(sound: torch.Tensor, rate: int, path: Path) -> Path:
    """Write sound, `(C, 1, T)` in [-1, 1], in 16 bits."""
    levels = (sound[:, 0].T.clamp(-1, 1) * 32767).round().to(torch.int16).cpu().contiguous()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(levels.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(levels.numpy().astype("<i2").tobytes())
    return path
