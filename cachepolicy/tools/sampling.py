# diffusers comes without complete types: what it returns is not known in the strict sense.
# pyright: basic, reportPrivateImportUsage=false
"""A pipeline from a folder on disk, sampled with a policy and without: pictures or frames, and the seconds taken."""

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


@dataclass(frozen=True, slots=True)
class Sample:
    """What one call gave; `pictures` are n, channels, height, width numbers in [-1, 1], frames of a video in order."""

    pictures: torch.Tensor = field(repr=False)
    frames: bool
    seconds: float
    model_seconds: float = 0.0
    """Those in the calls of the denoisers."""


def open_pipeline(folder: str | os.PathLike[str], *, dtype: str = "float32", device: str = "cpu") -> Any:
    """The pipeline that was saved in a folder; nothing is fetched, and no code of the folder is run.

    Raises:
        PolicyError: E213, the folder holds no pipeline of diffusers, or it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    index = Path(folder) / "model_index.json"
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError.of(
            "E213",
            f"`{folder}` holds no pipeline",
            help="name a folder with a `model_index.json`, as diffusers saves it",
        ) from error
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise PolicyError.of("E213", f"`{dtype}` is no dtype of floats", help="`float32`, `bfloat16` or `float16`")
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=wanted,
            local_files_only=True,
            trust_remote_code=False,
            **_absent(Path(folder), described),
        )
        return pipe.to(device)
    except Exception as error:
        name = described.get("_class_name") if isinstance(described, dict) else None
        reason = str(error).partition("\n")[0]
        raise PolicyError.of("E213", f"`{folder}`: `{name}` cannot be loaded: {reason}") from error


def _absent(folder: Path, described: Any) -> dict[str, None]:
    """The components that the index names and the folder does not hold: a text encoder beside saved embeddings."""
    named = described.items() if isinstance(described, dict) else ()
    return {name: None for name, value in named if isinstance(value, list) and not (folder / name).exists()}


def read_tensors(path: str | os.PathLike[str], *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The named tensors of a file, such as saved `prompt_embeds`; no code of the file is run.

    Raises:
        PolicyError: E213, the file cannot be read or holds something else.
    """
    file = Path(path)
    if file.suffix not in TENSOR_FILES:
        raise PolicyError.of("E213", f"`{file}` is no file of tensors", help=f"one of {', '.join(TENSOR_FILES)}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file, device=device)
        else:
            found = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise PolicyError.of("E213", f"`{file}` cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise PolicyError.of("E213", f"`{file}` holds no tensors by name")
    return {str(name): tensor for name, tensor in found.items()}


def checked(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, if the pipeline's call takes them all.

    Raises:
        PolicyError: E213, it does not take one, with the nearest that it takes.
    """
    taken = list(inspect.signature(type(pipe).__call__).parameters)[1:]
    for name in arguments:
        if name not in taken:
            raise PolicyError.of(
                "E213", f"`{type(pipe).__name__}` takes no argument `{name}`", help=suggestion(name, taken)
            )
    return dict(arguments)


def sample_pipeline(pipe: Any, arguments: Mapping[str, Any], seed: int) -> Sample:
    """One call of the pipeline, its noise drawn on the CPU from `seed`.

    Raises:
        PolicyError: E213, the call failed, with the reason.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    started = time.perf_counter()
    try:
        with torch.no_grad(), _timed(denoisers(pipe).values()) as taken:
            result = pipe(**arguments, generator=generator, output_type="np")
    except PolicyError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise PolicyError.of("E213", f"`{type(pipe).__name__}` failed: {reason}") from error
    seconds = time.perf_counter() - started
    frames = not hasattr(result, "images") and hasattr(result, "frames")
    given = result.frames if frames else result.images if hasattr(result, "images") else result[0]
    return Sample(_pictures(given), frames, seconds, sum(taken))


@contextlib.contextmanager
def _timed(models: Iterable[torch.nn.Module]) -> Generator[list[float]]:
    """The seconds of each call of the models inside the `with`."""
    taken, began = list[float](), list[float]()

    def enter(*_: Any) -> None:
        began.append(time.perf_counter())

    def leave(*_: Any) -> None:
        taken.append(time.perf_counter() - began.pop())

    with contextlib.ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_pre_hook(enter).remove)
            stack.callback(model.register_forward_hook(leave, always_call=True).remove)
        yield taken


def _pictures(given: Any) -> torch.Tensor:
    """All pictures (or frames of all videos) as one batch with the channels in front, from [0, 1] to [-1, 1]."""
    import numpy as np

    batch = torch.from_numpy(np.ascontiguousarray(np.asarray(given)))
    batch = batch.reshape(-1, *batch.shape[-3:])
    return batch.permute(0, 3, 1, 2).float() * 2 - 1


def save_pictures(found: Sample, folder: Path, name: str) -> list[Path]:
    """Write the pictures as `name.png` (or `name-0.png`, ...), frames into a folder `name` and a moving `name.gif`.

    Raises:
        OSError: they cannot be written.
    """
    from PIL import Image

    levels = ((found.pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in levels]
    if found.frames:
        (folder / name).mkdir(parents=True, exist_ok=True)
        paths = [folder / name / f"{number:04}.png" for number in range(len(pictures))]
        moving = folder / f"{name}.gif"
        pictures[0].save(moving, save_all=True, append_images=pictures[1:], duration=1000 // 16, loop=0)
    else:
        paths = [
            folder / (f"{name}.png" if len(pictures) == 1 else f"{name}-{number}.png")
            for number, _ in enumerate(pictures)
        ]
        moving = None
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return [*paths, *([moving] if moving is not None else [])]
