"""Tensors of a guidance batch: its halves, and FasterCache's difference of both in two bands of the spectrum."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Inputs and outputs of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.diffusers.argument_names import GRID_IDS, GRID_SHAPES, POSITIONS
from cachepolicy.engine.streams import stated_grid
from cachepolicy.errors import PolicyError


@dataclass(slots=True)
class Bands:
    """The stored difference, unconditional minus conditional, in two bands of the shifted spectra."""

    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True, slots=True)
class Frames:
    """Layout of a prediction: images, frames, or `BSC` tokens on a (frames, height, width) grid."""

    layout: str
    grid: tuple[int, int, int] | None = None

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return the images as `(N, C, H, W)`, one per row."""
        if self.layout == "BSC":
            _, height, width = self.grid or (1, 1, x.shape[1])
            return x.reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)
        return x.permute(_FRAMES_SECOND[self.layout][0]).flatten(0, 1) if self.layout in _FRAMES_SECOND else x

    def join(self, rows: torch.Tensor, batch: int) -> torch.Tensor:
        """Invert `split` for a batch of size `batch`."""
        if self.layout == "BSC":
            return rows.permute(0, 2, 3, 1).reshape(batch, -1, rows.shape[1])
        layout = _FRAMES_SECOND.get(self.layout)
        return rows if layout is None else rows.unflatten(0, (batch, -1)).permute(layout[1])


_FRAMES_SECOND = {
    "BCFHW": ((0, 2, 1, 3, 4), (0, 2, 1, 3, 4)),
    "BFCHW": ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
    "BFHWC": ((0, 1, 4, 2, 3), (0, 1, 3, 4, 2)),
}
"""Axes that bring the frames of a layout to the second place, and back."""


def frames_of(
    prediction: torch.Tensor,
    named: Mapping[str, Any],
    latents: torch.Tensor | None,
    channels: int | None,
    arguments: Mapping[str, Any],
) -> Frames:
    """Determine the layout of a prediction from the policy, the shape and the arguments of the call.

    Args:
        prediction: The prediction of the root model.
        named: The arguments of the call by name.
        latents: The input latents, or None.
        channels: The number of channels of the prediction, or None.
        arguments: The arguments of the action (`format`, `grid`).

    Raises:
        PolicyError: The layout is ambiguous or does not fit the shape (E331).
    """
    layout = arguments.get("format", "found")
    grid = tuple(arguments.get("grid", ())) or _grid(named)
    if layout not in {"found", "BSC"}:
        if len(layout) != prediction.ndim:
            raise PolicyError.of(
                "E331", f"a prediction of shape {tuple(prediction.shape)} is not laid out as `{layout}`", help=_FORMATS
            )
        return Frames(layout)
    match prediction.ndim:
        case 4:
            return Frames("BCHW")
        case 5:
            axes = [axis for axis in (1, 2, 4) if prediction.shape[axis] == channels]
            if len(axes) > 1 and latents is not None:
                # The prediction has the sizes of the latents except for the channels.
                axes = [axis for axis in axes if _without(prediction, axis) == _without(latents, axis)]
            if len(axes) == 1:
                return Frames({1: "BCFHW", 2: "BFCHW", 4: "BFHWC"}[axes[0]])
        case 3 if grid is not None and len(grid) == 3 and math.prod(grid) == prediction.shape[1]:
            return Frames("BSC", grid)
        case _:
            pass
    raise PolicyError.of(
        "E331",
        f"a prediction of shape {tuple(prediction.shape)} could be laid out in more than one way",
        help=_FORMATS,
    )


_FORMATS = 'say it: `format: "BCFHW"`, `"BFCHW"`, `"BFHWC"`, `"BCHW"` or `"BSC"` with `grid: [frames, height, width]`'


def _without(tensor: torch.Tensor, axis: int) -> tuple[int, ...]:
    return tuple(tensor.shape[:axis]) + tuple(tensor.shape[axis + 1 :])


def _grid(named: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the latent grid of a token sequence from the call's arguments, or None."""
    stated = stated_grid(named)
    if stated is not None:
        return stated
    ids = named.get(GRID_IDS)
    if isinstance(ids, torch.Tensor) and ids.shape[-1] == 3:
        last = ids.reshape(-1, 3)
        frames, height, width = (int(column) + 1 for column in last.max(dim=0).values - last.min(dim=0).values)
        return (frames, height, width)
    shapes = named.get(GRID_SHAPES)
    while isinstance(shapes, list) and shapes:
        shapes = shapes[0]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(shapes, tuple) and len(shapes) == 3:  # pyright: ignore[reportUnknownArgumentType]
        return shapes  # pyright: ignore[reportUnknownVariableType, reportReturnType]
    return None


def split_bands(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the shifted spectrum of images `(N, C, H, W)` by a disc of radius min(H, W) // 5.

    Returns:
        The spectrum inside the disc (low band) and outside (high band).
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    height, width = x.shape[-2:]
    radius = min(height, width) // 5
    rows = torch.arange(height, device=x.device).unsqueeze(1) - height // 2
    columns = torch.arange(width, device=x.device).unsqueeze(0) - width // 2
    mask = rows**2 + columns**2 <= radius**2
    return spectrum * mask, spectrum * ~mask


def difference(uncond: torch.Tensor, cond: torch.Tensor) -> Bands:
    """Return the stored difference of a step that ran both halves.

    Args:
        uncond: Images `(N, C, H, W)` of the unconditional half.
        cond: Images `(N, C, H, W)` of the conditional half.
    """
    low_uncond, high_uncond = split_bands(uncond.float())
    low_cond, high_cond = split_bands(cond.float())
    return Bands(low_uncond - low_cond, high_uncond - high_cond)


def rebuild(bands: Bands, cond: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return the unconditional images of a skipped step.

    The factors are applied to `bands` in place, so they compound over skipped steps.

    Args:
        bands: The stored difference.
        cond: Images `(N, C, H, W)` of the conditional half.
        low: Factor of the low band.
        high: Factor of the high band.
    """
    bands.low = bands.low * low
    bands.high = bands.high * high
    low_cond, high_cond = split_bands(cond.float())
    spectrum = (bands.low + low_cond) + (bands.high + high_cond)
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


# --- halves of a batch -----------------------------------------------------------------------------------


def halves(x: torch.Tensor, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unconditional and the conditional half of a batch.

    Args:
        x: A tensor with an even number of rows.
        order: `"uncond first"` or the other order.
    """
    first, second = x.chunk(2, dim=0)
    return (first, second) if order == "uncond first" else (second, first)


def whole(uncond: torch.Tensor, cond: torch.Tensor, order: str) -> torch.Tensor:
    """Return the batch of both halves, the inverse of `halves`."""
    return torch.cat([uncond, cond] if order == "uncond first" else [cond, uncond], dim=0)


def conditional(
    named: Mapping[str, Any], batch: int, order: str, only: Sequence[str] | None, *, lists: bool = False
) -> dict[str, Any]:
    """Return the arguments of a call with the conditional half of all batched values.

    Args:
        named: The arguments by name.
        batch: The size of the full batch.
        order: `"uncond first"` or the other order.
        only: Names of the arguments to halve. By default all values with `batch` rows or items.
        lists: Whether batches are lists of samples, as the latents of Z-Image are.
    """
    if only is not None:
        return {
            name: _half(value, None, order, lists=lists) if name in only else value for name, value in named.items()
        }
    return {
        name: value if _holds_positions(name, value) else _half(value, batch, order, lists=lists)
        for name, value in named.items()
    }


def _holds_positions(name: str, value: Any) -> bool:
    """Return True for a 1-d integer tensor of positions, whose length may equal the batch size by chance."""
    row = isinstance(value, torch.Tensor) and value.ndim == 1 and not value.is_floating_point()
    return row and POSITIONS.search(name) is not None


def _half(value: Any, batch: int | None, order: str, *, lists: bool) -> Any:
    """Return the conditional half of a value with `batch` rows (None: any even number), or the value."""
    if isinstance(value, torch.Tensor):
        rows = value.shape[0] if value.ndim > 0 else 1
        return halves(value, order)[1] if rows == batch or (batch is None and rows % 2 == 0) else value
    if isinstance(value, dict):
        return {key: _half(item, batch, order, lists=lists) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(value, list | tuple) or not value:
        return value
    items: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
    # Either all items of a sequence are batched, or the sequence itself is the batch. Samples in a list may have as
    # many channels as there are samples.
    samples = lists and len(items) == batch
    if not samples and all(
        isinstance(item, torch.Tensor) and item.ndim > 1 and item.shape[0] == batch for item in items
    ):
        return type(value)(_half(item, batch, order, lists=lists) for item in items)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list) and (len(items) == batch or batch is None):
        middle = len(items) // 2
        return items[middle:] if order == "uncond first" else items[:middle]
    return value


def predictions_of(output: Any, rows: int) -> list[torch.Tensor]:
    """Return the batched tensors of an output in order. A list of samples is stacked.

    Raises:
        PolicyError: The samples of a list have different shapes.
    """
    return [_stacked(value) for value in _values(output) if _is_batch(value, rows)]


def with_predictions(output: Any, rows: int, predictions: Sequence[torch.Tensor]) -> Any:
    """Return `output` with its batched tensors replaced.

    Args:
        output: The output of the root model.
        rows: The number of rows of its batched tensors.
        predictions: The new tensors, in the order of `predictions_of`.
    """
    rest = iter(predictions)
    values = [_like(value, next(rest)) if _is_batch(value, rows) else value for value in _values(output)]
    if isinstance(output, dict):
        items = dict(zip(output, values, strict=True))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return items if type(output) is dict else type(output)(**items)  # pyright: ignore[reportUnknownArgumentType]
    return type(output)(values) if isinstance(output, tuple) else values[0]  # pyright: ignore[reportUnknownVariableType]


def _values(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return list(output.values())  # pyright: ignore[reportUnknownArgumentType]
    return list(output) if isinstance(output, tuple) else [output]  # pyright: ignore[reportUnknownArgumentType]


def _is_batch(value: Any, rows: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and value.shape[0] == rows
    return isinstance(value, list) and len(value) == rows and all(isinstance(sample, torch.Tensor) for sample in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _stacked(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if len({sample.shape for sample in value}) != 1:
        raise PolicyError.of("E332", "the samples of a guidance batch have different shapes")
    return torch.stack(value)


def _like(value: Any, prediction: torch.Tensor) -> Any:
    return prediction if isinstance(value, torch.Tensor) else list(prediction.unbind(0))
