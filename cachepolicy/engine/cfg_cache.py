"""Guidance batches: runs the conditional half and rebuilds the unconditional half from stored differences.

This is FasterCache's CFG-cache (arXiv:2410.19355, equations 9 to 11): per frame, the difference of both halves changes
slowly in a low and a high frequency band. On a skipped step it is added to the spectrum of the conditional half.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Inputs and outputs of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.diffusers.argument_names import GRID_IDS, GRID_SHAPES, POSITIONS
from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.engine.actions import cloned, versions
from cachepolicy.engine.clock import CallArguments
from cachepolicy.engine.guidance_batch import GuidanceSource, rows_of
from cachepolicy.engine.streams import stated_grid
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import GuidanceKeeping, needed_results
from cachepolicy.planning.schedule import Tick


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
        match self.layout:
            case "BCFHW":
                return x.permute(0, 2, 1, 3, 4).flatten(0, 1)
            case "BFCHW":
                return x.flatten(0, 1)
            case "BFHWC":
                return x.permute(0, 1, 4, 2, 3).flatten(0, 1)
            case "BSC":
                _, height, width = self.grid or (1, 1, x.shape[1])
                return x.reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)
            case _:
                return x

    def join(self, rows: torch.Tensor, batch: int) -> torch.Tensor:
        """Invert `split` for a batch of size `batch`."""
        match self.layout:
            case "BCFHW":
                return rows.unflatten(0, (batch, -1)).permute(0, 2, 1, 3, 4)
            case "BFCHW":
                return rows.unflatten(0, (batch, -1))
            case "BFHWC":
                return rows.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)
            case "BSC":
                return rows.permute(0, 2, 3, 1).reshape(batch, -1, rows.shape[1])
            case _:
                return rows


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


# --- the guidance of one trajectory ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an unconditional half cannot be rebuilt. `final` if the call is no guidance batch at all."""

    reason: str
    final: bool


class Guide:
    """Guidance state of one trajectory: the stored difference, and the conditional prediction of this step.

    The conditional prediction is stored only if the halves run in separate calls.

    Attributes:
        over_limit: Whether the memory limit did not admit the stored difference, or the prediction of this step.
    """

    __slots__ = (
        "_alone",
        "_apart",
        "_called",
        "_clones",
        "_cond",
        "_examined",
        "_kept",
        "_pairs",
        "_rows",
        "_step",
        "_versions",
        "over_limit",
    )

    def __init__(self) -> None:
        self._kept: list[tuple[Bands, Frames]] = []
        self._pairs: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._cond: Any = None
        self._versions: tuple[int, ...] | None = None
        self._clones = False
        self._rows = 0
        self._step = -1
        self._called: tuple[int, int] = (-1, 0)
        self._alone = False
        self._apart = False
        self.over_limit = False
        self._examined: tuple[object, str | None] | None = None

    def release(self, *, kept: bool, cond: bool) -> None:
        """Release the stored difference (`kept`) or the conditional prediction (`cond`)."""
        if kept:
            self._kept, self._pairs = [], []
        if cond:
            self._cond = None

    def limit(self, *, admitted: bool) -> None:
        """Release everything that the memory limit does not admit."""
        if not admitted:
            self.release(kept=True, cond=True)
        if not admitted or self._kept or self._pairs:
            self.over_limit = not admitted

    @property
    def held(self) -> list[torch.Tensor]:
        """The stored tensors."""
        outputs = predictions_of(self._cond, self._rows) if self._cond is not None else []
        pairs = [tensor for step in self._pairs for pair in step for tensor in pair]
        return [*outputs, *pairs, *(band for bands, _ in self._kept for band in (bands.low, bands.high))]

    def named(self, branch: str) -> bool:
        """Return True if the name of the branch tells which half it is."""
        return branch in COND_BRANCHES or branch in UNCOND_BRANCHES

    def problem(
        self,
        tick: Tick,
        arguments: CallArguments,
        source: GuidanceSource,
        model: torch.nn.Module,
        *,
        calls: int,
        action: ir.ApproximateUncond,
    ) -> Problem | None:
        """Return why this call cannot be approximated, or None.

        Args:
            tick: Step and branch of the call.
            arguments: The arguments of the call.
            source: What is known of the guidance.
            model: The root model.
            calls: The number of calls in this step, with this one.
            action: The action that rebuilds the unconditional half.
        """
        if self.named(tick.branch):
            if tick.branch in UNCOND_BRANCHES and (self._cond is None or self._step != tick.step):
                missing = "the conditional call has not run in this step"
                return Problem(Fact.OVER_LIMIT if self.over_limit and self._step == tick.step else missing, final=True)
            if tick.branch in UNCOND_BRANCHES and self._overwritten():
                # Other code modifies the predictions in place, so copies are stored from now on.
                self._clones, self._cond = True, None
                return Problem("the conditional prediction was overwritten in place", final=True)
        elif not source.guided:
            return Problem("there is no guidance", final=True)
        elif self._several_calls(tick.step, calls):
            self.release(kept=True, cond=False)
            return Problem("guidance runs in several calls", final=True)
        elif _batch(arguments) % 2:
            return Problem("the batch has no two halves", final=True)
        if not self.named(tick.branch):
            if not self._alone:
                return Problem("no step has shown that it has one call", final=False)
            doubt = self._doubt(arguments, source, model)
            if doubt is not None:
                self.release(kept=True, cond=False)
                return Problem(doubt, final=True)
        holds = bool(self._kept) if action.method == "spectral" else len(self._pairs) >= needed_results(action)
        return None if holds else Problem(Fact.OVER_LIMIT if self.over_limit else Fact.NO_HISTORY, final=False)

    def rows(self, arguments: CallArguments, source: GuidanceSource, model: torch.nn.Module) -> int | None:
        """Return the number of rows of a guidance batch, or None if the call is not known to be one."""
        rows = _batch(arguments)
        guided = source.guided is True and rows % 2 == 0
        return rows if guided and self._doubt(arguments, source, model) is None else None

    def _doubt(self, arguments: CallArguments, source: GuidanceSource, model: torch.nn.Module) -> str | None:
        """Return why the batch may not have two halves, or None. Batches of equal size are examined once."""
        key = (_batch(arguments), source.samples)
        if self._examined is None or self._examined[0] != key:
            self._examined = (key, source.problem(arguments.named.get(arguments.latents or ""), model))
        return self._examined[1]

    def _several_calls(self, step: int, calls: int) -> bool:
        """Return whether a step has had more than one call. Also record a completed step with a single call."""
        before, last = self._called
        self._apart |= calls > 1
        self._alone |= step != before and last == 1
        self._called = (step, calls)
        return self._apart

    def halved(
        self, arguments: CallArguments, args: tuple[Any, ...], settings: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the root model with the conditional half of all batched values."""
        only, lists = settings.get("inputs") or None, isinstance(arguments.named.get(arguments.latents or ""), list)
        named = conditional(arguments.named, _batch(arguments), settings["layout"], only, lists=lists)
        names = list(named)
        positional = tuple(named[name] for name in names[: len(args)])
        return positional, {name: named[name] for name in names[len(args) :]}

    def answered(self, method: str, settings: Mapping[str, Any]) -> Any:
        """Return the answer of the unconditional call from the conditional call of this step."""
        output, rows = self._cond, self._rows
        return with_predictions(output, rows, self._rebuilt(predictions_of(output, rows), method, settings))

    def ended(
        self,
        tick: Tick,
        arguments: CallArguments,
        settings: Mapping[str, Any],
        output: Any,
        channels: int | None,
        *,
        halved: str | None,
        keeping: GuidanceKeeping,
    ) -> Any:
        """Store what later steps read of a full call, or complete the output of half a batch (by `halved`)."""
        rows = _batch(arguments)
        if tick.branch in COND_BRANCHES:
            self._keep(output, tick.step, rows)
            return output
        order = settings["layout"]
        if halved is not None:
            conds = predictions_of(output, rows // 2)
            unconds = self._rebuilt(conds, halved, settings)
            both = [whole(uncond, cond, order) for uncond, cond in zip(unconds, conds, strict=True)]
            return with_predictions(output, rows // 2, both)
        predictions = predictions_of(output, rows)
        if tick.branch in UNCOND_BRANCHES:
            pairs = list(zip(predictions, predictions_of(self._cond, rows), strict=True))
        else:
            pairs = [halves(prediction, order) for prediction in predictions]
        if keeping.pairs:
            # Copies, because the caller may modify the predictions in place.
            step = [(uncond.detach().clone(), cond.detach().clone()) for uncond, cond in pairs]
            self._pairs = [step, *self._pairs][: keeping.pairs]
        self._kept = []
        if not keeping.bands:
            return output
        latents = arguments.named.get(arguments.latents or "")
        latents = latents if isinstance(latents, torch.Tensor) else None
        for number, (prediction, (uncond, cond)) in enumerate(zip(predictions, pairs, strict=True)):
            if number > 0 and prediction.ndim == _SEQUENCE:
                frames = Frames("BSC", (1, 1, prediction.shape[1]))  # a second stream, such as audio
            else:
                frames = frames_of(prediction, arguments.named, latents, channels, settings)
            self._kept.append((difference(frames.split(uncond), frames.split(cond)), frames))
        return output

    def _keep(self, output: Any, step: int, rows: int) -> None:
        """Store the conditional prediction, as a copy if in-place writes cannot be detected or have occurred."""
        tensors = predictions_of(output, rows)
        clones = self._clones or any(tensor.is_inference() for tensor in tensors)
        self._cond, self._step, self._rows = cloned(output) if clones else output, step, rows
        self._versions = None if clones else versions(output)

    def _overwritten(self) -> bool:
        return self._versions is not None and versions(self._cond) != self._versions

    def _rebuilt(self, conds: Sequence[torch.Tensor], method: str, settings: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the unconditional predictions of a step that ran the conditional ones only."""
        match method:
            case "copy":
                return [cond.clone() for cond in conds]
            case "delta":
                return [cond - (kept - uncond) for cond, (uncond, kept) in zip(conds, self._pairs[0], strict=True)]
            case "affine":
                return [self._combined(number, cond, settings) for number, cond in enumerate(conds)]
            case _:
                return self._by_bands(conds, settings)

    def _combined(self, number: int, cond: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
        """Return LinearAG's sum of conditional and unconditional predictions (arXiv:2312.12487)."""
        first, *others = settings["cond"]
        answer = cond * first
        for factor, step in zip(others, self._pairs, strict=False):
            answer = answer + step[number][1] * factor
        for factor, step in zip(settings.get("uncond", ()), self._pairs, strict=False):
            answer = answer + step[number][0] * factor
        return answer

    def _by_bands(self, conds: Sequence[torch.Tensor], settings: Mapping[str, Any]) -> list[torch.Tensor]:
        rebuilt = list[torch.Tensor]()
        for cond, (bands, frames) in zip(conds, self._kept, strict=True):
            rows = rebuild(bands, frames.split(cond), settings["low"], settings["high"])
            rebuilt.append(frames.join(rows, cond.shape[0]).to(cond.dtype))
        return rebuilt


_SEQUENCE = 3  # dimensions of a batch of token sequences (B, S, C)


def _batch(arguments: CallArguments) -> int:
    return rows_of(arguments.named.get(arguments.latents or ""))
