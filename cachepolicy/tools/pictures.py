# Pillow's methods are partly untyped.
# pyright: basic
"""Sheets of pictures: rows of samples with their differences from a reference."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

GAIN = 8
"""By how much a difference is enlarged."""

SMALL, LARGE = 96, 256
"""Height in pixels to which small pictures are enlarged, and to which large ones are reduced."""

_GAP, _HEAD = 2, 18


@dataclass(frozen=True, slots=True)
class Strip:
    """A row of pictures.

    Attributes:
        heading: The text above it.
        pictures: The pictures, `(N, C, H, W)` in [-1, 1].
        differences: What is shown below them, of the same shape, None for nothing.
    """

    heading: str
    pictures: torch.Tensor = field(repr=False)
    differences: torch.Tensor | None = field(default=None, repr=False)


def to_pil(pictures: torch.Tensor) -> list[Any]:
    """Convert a tensor `(N, C, H, W)` in [-1, 1] with 1 or 3 channels to Pillow images."""
    from PIL import Image

    levels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level.squeeze(-1) if level.shape[-1] == 1 else level) for level in levels]


def difference(reference: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures of the absolute differences, `GAIN` times enlarged, black where there is none."""
    return (GAIN * (reference - pictures).abs() - 1).clamp(-1, 1)


def line(pictures: torch.Tensor, scale: int | None = None) -> Any:
    """Return one image with the pictures side by side.

    Args:
        pictures: The pictures, `(N, C, H, W)` in [-1, 1].
        scale: How much they are enlarged. By default, small ones are enlarged to about `SMALL` pixels of height, and
            large ones are reduced to `LARGE`.
    """
    from PIL import Image

    tiles = [tile.convert("RGB") for tile in to_pil(pictures)]
    height = tiles[0].height
    if scale is None and height > LARGE:
        size = (max(1, round(tiles[0].width * LARGE / height)), LARGE)
        tiles = [tile.resize(size, Image.Resampling.LANCZOS) for tile in tiles]
    else:
        factor = scale or max(1, round(SMALL / height))
        size = (tiles[0].width * factor, height * factor)
        tiles = [tile.resize(size, Image.Resampling.NEAREST) for tile in tiles]
    image = Image.new("RGB", (len(tiles) * (size[0] + _GAP) - _GAP, size[1]), "white")
    for number, tile in enumerate(tiles):
        image.paste(tile, (number * (size[0] + _GAP), 0))
    return image


def contact_sheet(strips: Sequence[Strip], scale: int | None = None) -> Any:
    """Return one image with all rows below each other, each with its heading above and its differences below."""
    from PIL import Image, ImageDraw, ImageFont

    lines = [
        (strip.heading, [line(part, scale) for part in (strip.pictures, strip.differences) if part is not None])
        for strip in strips
    ]
    font = ImageFont.load_default(13)
    widths = [image.width for _, images in lines for image in images]
    width = max(*widths, *(int(font.getlength(heading)) for heading, _ in lines))
    height = sum(_HEAD + sum(image.height + _GAP for image in images) + 3 * _GAP for _, images in lines)
    sheet = Image.new("RGB", (width + 2 * _GAP, height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for heading, images in lines:
        draw.text((_GAP, top), heading, fill="black", font=font)
        top += _HEAD
        for image in images:
            sheet.paste(image, (_GAP, top))
            top += image.height + _GAP
        top += 3 * _GAP
    return sheet


def png(image: Any) -> bytes:
    """Return a Pillow image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return file.getvalue()


_SMALL = 256


def thumbnail(picture: torch.Tensor) -> tuple[str, bytes]:
    """Encode a picture for a report: as PNG, or if it is larger than 256 pixels as JPEG of at most 512 pixels.

    Args:
        picture: The picture, `(1, C, H, W)` in [-1, 1].

    Returns:
        The media type, and the bytes of the file.
    """
    image = to_pil(picture)[0]
    if max(image.size) <= _SMALL:
        return "image/png", png(image)
    image.thumbnail((2 * _SMALL, 2 * _SMALL))
    file = io.BytesIO()
    image.save(file, format="jpeg", quality=92)
    return "image/jpeg", file.getvalue()
