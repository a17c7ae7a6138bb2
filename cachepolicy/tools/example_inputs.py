"""Arguments of one denoiser call on the meta device, for a picture of a given size, to count FLOPs and bytes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from cachepolicy.diffusers.call_forms import FORMS, ArgumentForm, ModelConfig, Shape, Size
from cachepolicy.errors import PolicyError


@dataclass(frozen=True, slots=True)
class Picture:
    """The size of what is sampled.

    Attributes:
        height: The height in pixels.
        width: The width in pixels.
        frames: The frames of a video; models of pictures ignore it.
        batch: The number of samples.
        text: The number of text tokens; None is the number that the pipeline of the class passes.
    """

    height: int = 1024
    width: int = 1024
    frames: int = 81
    batch: int = 1
    text: int | None = None


def example_arguments(class_name: str, config: ModelConfig, picture: Picture) -> dict[str, Any]:
    """Make the keyword arguments of one call.

    Args:
        class_name: The class of diffusers.
        config: Its configuration.
        picture: The size of the picture or video.

    Returns:
        The arguments by name, with tensors on the meta device.

    Raises:
        PolicyError: E212, the call of the class is not known.
    """
    form = FORMS.get(class_name)
    if form is None:
        raise PolicyError.of(
            "E212",
            f"how `{class_name}` is called is not known, so its FLOPs and bytes cannot be counted",
            help='give the shapes of its arguments: `--arguments FILE`, JSON such as {"hidden_states": [1, 4096, 64]}',
        )
    frames = 1 if form.frames is None else (picture.frames - 1) // form.frames + 1
    text = form.tokens if picture.text is None else picture.text
    size = Size(picture.batch, frames, picture.height // form.pixels, picture.width // form.pixels, text)
    arguments: dict[str, Any] = {form.timestep: _empty(size.batch)}
    if form.latents:
        arguments[form.latents] = _latents(form, config, size)
    if form.text is not None:
        arguments["encoder_hidden_states"] = _empty(size.batch, size.text, config[form.text])
    return arguments if form.more is None else {**arguments, **_tensors(form.more(config, size))}


def arguments_from(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Make the keyword arguments of one call from shapes.

    Args:
        shapes: The arguments by name. A list of integers is the shape of a tensor; any other value is passed as it is.

    Returns:
        The arguments by name, with tensors on the meta device.

    Raises:
        PolicyError: E212, a size is negative.
    """
    return {name: _tensor(name, value) for name, value in shapes.items()}


def _tensor(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    sizes = cast("list[Any]", value)
    if not all(type(size) is int for size in sizes):
        return sizes
    if any(size < 0 for size in sizes):
        raise PolicyError.of("E212", f"`{name}` has a negative size: {sizes}")
    return _empty(*sizes)


def _latents(form: ArgumentForm, config: ModelConfig, size: Size) -> torch.Tensor:
    sizes = {
        "B": size.batch,
        "C": config["in_channels"],
        "F": size.frames,
        "H": size.height,
        "W": size.width,
        "S": size.cells,
    }
    return _empty(*(sizes[dimension] for dimension in form.layout))


def _empty(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _tensors(value: Any) -> Any:
    """Replace the shapes in nested dicts, lists and tuples by tensors."""
    match value:
        case Shape():
            return _empty(*value.sizes, dtype=getattr(torch, value.dtype))
        case dict():
            return {key: _tensors(item) for key, item in cast("dict[str, Any]", value).items()}
        case list():
            return [_tensors(item) for item in cast("list[Any]", value)]
        case tuple():
            return tuple(_tensors(item) for item in cast("tuple[Any, ...]", value))
        case _:
            return value
