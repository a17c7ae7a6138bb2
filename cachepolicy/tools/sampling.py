# diffusers has no complete type annotations.
# pyright: basic, reportPrivateImportUsage=false
"""Load a pipeline from a folder, sample it and time the calls of its denoisers."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cachepolicy.engine.introspection import denoisers
from cachepolicy.errors import PolicyError, suggestion

TENSOR_FILES = (".safetensors", ".pt", ".pth")
"""The suffixes of the files that `read_tensors` reads."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of one call of a pipeline.

    Attributes:
        pictures: The pictures, or the frames of all videos in order, `(N, C, H, W)` in [-1, 1].
        frames: True if the pictures are frames of videos.
        seconds: The wall-clock seconds of the call.
        model_seconds: The wall-clock seconds in the calls of the denoisers.
    """

    pictures: torch.Tensor = field(repr=False)
    frames: bool
    seconds: float
    model_seconds: float = 0.0


def open_pipeline(folder: str | os.PathLike[str], *, dtype: str = "float32", device: str = "cpu") -> Any:
    """Load a saved pipeline. Nothing is downloaded and no code of the folder is run.

    Components that the index names and the folder does not hold are left out, such as a text encoder where the caller
    has saved embeddings.

    Args:
        folder: The folder, with a `model_index.json`.
        dtype: The name of a floating-point dtype of torch.
        device: The device to load to.

    Returns:
        The pipeline.

    Raises:
        PolicyError: E213, the folder holds no pipeline of diffusers, it cannot be loaded, or the dtype is unknown.
    """
    from diffusers import DiffusionPipeline

    index = Path(folder) / "model_index.json"
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError.of(
            "E213",
            f"`{folder}` holds no pipeline",
            help="name a folder with a `model_index.json`, as diffusers saves it",
        ) from error
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise PolicyError.of("E213", f"`{dtype}` is no dtype of floats", help="`float32`, `bfloat16` or `float16`")
    if not isinstance(components, dict):
        components = {}
    absent = {
        name: None
        for name, value in components.items()
        if isinstance(value, list) and not (Path(folder) / name).exists()
    }
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=wanted,
            local_files_only=True,
            trust_remote_code=False,
            **absent,
        )
        return pipe.to(device)
    except Exception as error:
        name = components.get("_class_name")
        reason = str(error).partition("\n")[0]
        raise PolicyError.of("E213", f"`{folder}`: `{name}` cannot be loaded: {reason}") from error


def read_tensors(path: str | os.PathLike[str], *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read the named tensors of a file, such as saved `prompt_embeds`. No code of the file is run.

    Args:
        path: A file with a suffix of `TENSOR_FILES`.
        device: The device to load to.

    Returns:
        The tensors by name.

    Raises:
        PolicyError: E213, the file cannot be read or is no mapping of names to tensors.
    """
    file = Path(path)
    if file.suffix not in TENSOR_FILES:
        raise PolicyError.of("E213", f"`{file}` is no file of tensors", help=f"one of {', '.join(TENSOR_FILES)}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: Any = load_file(file, device=device)
        else:
            tensors = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise PolicyError.of("E213", f"`{file}` cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise PolicyError.of("E213", f"`{file}` holds no tensors by name")
    return {str(name): tensor for name, tensor in tensors.items()}


def checked(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of the arguments of a pipeline's call.

    Args:
        pipe: The pipeline.
        arguments: The keyword arguments by name.

    Returns:
        A copy of the arguments.

    Raises:
        PolicyError: E213, the pipeline takes no argument of a name; the help names the nearest one.
    """
    parameters = list(inspect.signature(type(pipe).__call__).parameters)[1:]
    for name in arguments:
        if name not in parameters:
            raise PolicyError.of(
                "E213", f"`{type(pipe).__name__}` takes no argument `{name}`", help=suggestion(name, parameters)
            )
    return dict(arguments)


def sample_pipeline(pipe: Any, arguments: Mapping[str, Any], seed: int) -> Sample:
    """Call a pipeline once.

    Args:
        pipe: The pipeline.
        arguments: The keyword arguments of the call, without `generator` and `output_type`.
        seed: The seed of the noise, which is drawn on the CPU.

    Returns:
        The pictures and the seconds.

    Raises:
        PolicyError: E213, the call failed; the message has the reason.
    """
    import numpy as np

    generator = torch.Generator("cpu").manual_seed(seed)
    started = time.perf_counter()
    try:
        with torch.no_grad(), _timed(denoisers(pipe).values()) as model_seconds:
            result = pipe(**arguments, generator=generator, output_type="np")
    except PolicyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise PolicyError.of("E213", f"`{type(pipe).__name__}` failed: {reason}") from error
    seconds = time.perf_counter() - started
    frames = not hasattr(result, "images") and hasattr(result, "frames")
    output = result.frames if frames else result.images if hasattr(result, "images") else result[0]
    # All pictures, or the frames of all videos, as one batch with the channels in front.
    batch = torch.from_numpy(np.ascontiguousarray(np.asarray(output)))
    pictures = batch.reshape(-1, *batch.shape[-3:]).permute(0, 3, 1, 2).float() * 2 - 1
    return Sample(pictures, frames, seconds, sum(model_seconds))


@contextlib.contextmanager
def _timed(models: Iterable[torch.nn.Module]) -> Generator[list[float]]:
    """Measure the seconds of each call of the models inside the `with` block."""
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
    """Write pictures as PNG files, and the frames of videos as PNG files and one animated GIF.

    Args:
        sample: The pictures.
        folder: The folder to write to.
        name: The stem of the files: `name.png` for one picture, `name-0.png` and so on for several. Frames are in
            the folder `name`, and `name.gif` beside it.

    Returns:
        The paths of all files.

    Raises:
        OSError: A file cannot be written.
    """
    from PIL import Image

    levels = ((sample.pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(level.squeeze(-1) if level.shape[-1] == 1 else level) for level in levels]
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
