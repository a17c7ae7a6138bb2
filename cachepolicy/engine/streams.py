"""Probed tensors and the operators on them: norms, tokens, halves of a guidance batch, and spectral filters.

The norms use the same torch operations in the same dtype as the caches of diffusers, so that equal streams give
bit-identical numbers.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The methods of `torch.fft` and `tolist` have no types.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.diffusers.argument_names import GRID_IDS, GRID_SHAPES, GRID_SIZES
from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.engine.distributed.norms import Sum, differing, summed
from cachepolicy.engine.history_packing import is_whole
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined

_SEQUENCE = 3  # dimensions of a batch of token sequences (B, S, C)


class Stream:
    """A probed tensor with its `_version`. The mean magnitude is computed on demand.

    Args:
        tensor: The tensor.
        shared: Whether other code may have it, and write into it.
    """

    __slots__ = ("_magnitude", "_sum", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor, *, shared: bool = True) -> None:
        if shared:
            # Inference tensors have no `_version`, so in-place writes cannot be detected. Small views are copied as
            # well, because they would keep a large storage alive.
            shared = not tensor.is_inference() and is_whole([tensor])
            self._tensor = tensor.detach() if shared else tensor.detach().clone()
        else:
            self._tensor = tensor.detach() if tensor.requires_grad else tensor
        self._version = tensor._version if shared else None
        self._magnitude: torch.Tensor | None = None
        self._sum: Sum | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it was probed.

        Raises:
            Undefined: The tensor was modified in place.
        """
        if self._version is not None and self._tensor._version != self._version:
            raise Undefined("a probed tensor was overwritten in place")
        return self._tensor

    @property
    def held(self) -> torch.Tensor:
        """The stored tensor, even if it was modified in place."""
        return self._tensor

    @property
    def magnitude(self) -> torch.Tensor:
        """mean(|x|), computed once."""
        if self._magnitude is None:
            self._magnitude = self.tensor.abs().mean()
        return self._magnitude

    def sum(self, *, by_sample: bool) -> Sum:
        """Return the sum of |x|, computed once."""
        if self._sum is None:
            self._sum = summed(self.tensor.abs(), by_sample=by_sample)
        return self._sum


SignalValue = Stream | float


@dataclass(frozen=True, slots=True)
class Layout:
    """What the arguments of a root call tell of its token sequences.

    Attributes:
        picture: Number of tokens of the picture, without reference tokens that follow it; None if the call has none.
        total: Number of tokens of the picture and the references.
        grids: Grids (frames, height, width) that the tokens may have.
    """

    picture: int | None = None
    total: int | None = None
    grids: tuple[tuple[int, ...], ...] = ()

    def grid_of(self, tokens: int) -> tuple[int, ...] | None:
        """Return the grid of a sequence of this many tokens, or None if nothing tells it."""
        return next((grid for grid in self.grids if math.prod(grid) == tokens), None)


NO_LAYOUT = Layout()
"""Stands for calls that tell nothing of their tokens."""


def layout_of(named: Mapping[str, Any], latents: Any, patch: Any) -> Layout:
    """Return the layout of the token sequences of a root call.

    Args:
        named: The arguments of the call by name.
        latents: The latents of the call.
        patch: The patch size in the configuration of the model: a number, one for each axis, or None.
    """
    grids = list[tuple[int, ...]]()
    stated = stated_grid(named)
    if stated is not None:
        grids.append(stated)
    picture, total = None, None
    shapes = _shapes(named.get(GRID_SHAPES))
    ids = named.get(GRID_IDS)
    if shapes:
        grids.append(shapes[0])
        picture, total = math.prod(shapes[0]), sum(map(math.prod, shapes))
    elif isinstance(ids, torch.Tensor) and ids.ndim >= 2:
        rows = ids.reshape(-1, ids.shape[-2], ids.shape[-1])[0]
        # References have other numbers in the first column than the picture, which comes first.
        same = (rows[:, 0] == rows[0, 0]).tolist()
        picture, total = (same.index(False) if False in same else len(same)), len(same)
        if rows.shape[-1] == _SEQUENCE:
            own = rows[:picture]
            grids.append(tuple(int(size) + 1 for size in (own.max(dim=0).values - own.min(dim=0).values).tolist()))
    if isinstance(latents, torch.Tensor) and latents.ndim > _SEQUENCE:
        sizes = tuple(latents.shape[2:])
        patches = _patches(patch, len(sizes))
        grids.append(tuple(size // cut for size, cut in zip(sizes, patches, strict=True)))
    return Layout(picture, total, tuple(grids))


def stated_grid(named: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the grid (frames, height, width) that a root call is given as numbers, or None."""
    frames, height, width = (named.get(name) for name in GRID_SIZES)
    if isinstance(height, int) and isinstance(width, int):
        return (frames if isinstance(frames, int) else 1, height, width)
    return None


def _shapes(value: Any) -> list[tuple[int, ...]]:
    """Return the grids of the images of one sample, as QwenImage is given them."""
    while isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    if isinstance(value, list) and all(isinstance(each, tuple) for each in value):
        return [tuple(int(size) for size in each) for each in value]
    return []


def _patches(patch: Any, axes: int) -> Sequence[int]:
    if isinstance(patch, int) and patch > 0:
        return [1] * (axes - 2) + [patch] * min(axes, 2)
    if isinstance(patch, list | tuple) and len(patch) == axes:
        return [int(each) for each in patch]
    return [1] * axes


def of_tokens(tokens: ir.Tokens, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the tokens of a sequence `(B, S, C)` that a probe reads.

    Raises:
        Undefined: The tensor is no batch of sequences, or nothing tells which of its tokens are the picture's.
    """
    if x.ndim != _SEQUENCE:
        raise Undefined(f"a tensor of shape {tuple(x.shape)} is no batch of token sequences")
    if not tokens.latent:
        start, stop = (int(end.value) if isinstance(end, ir.Number) else None for end in (tokens.start, tokens.stop))
        part = x[:, start:stop]
        if part.shape[1] == 0:
            raise Undefined(f"the slice of {x.shape[1]} tokens is empty")
        return part
    if layout.picture is None:
        return x
    if x.shape[1] == layout.picture:
        return x
    if x.shape[1] == layout.total:
        return x[:, : layout.picture]
    raise Undefined(f"nothing tells which of {x.shape[1]} tokens are the picture's")


def half_of(branch: str, x: torch.Tensor, rows: int, cond: int) -> torch.Tensor:
    """Return the part of a tensor that belongs to one branch of a guidance batch.

    Args:
        branch: The name of the branch.
        x: A tensor of the whole batch or, where only the conditional half ran, of that half.
        rows: The number of rows of the whole batch.
        cond: Whether the conditional half comes first (0) or second (1).

    Raises:
        Undefined: The tensor holds no such part.
    """
    if branch not in COND_BRANCHES | UNCOND_BRANCHES:
        raise Undefined(f"a guidance batch has no part `{branch}`")
    conditional = branch in COND_BRANCHES
    if x.ndim > 0 and x.shape[0] == rows:
        return x.chunk(2, dim=0)[cond if conditional else 1 - cond]
    if conditional and x.ndim > 0 and x.shape[0] == rows // 2:
        return x
    raise Undefined(f"`{branch}` has not run in this step")


def wiener(x: torch.Tensor, beta: float, sigma: float, layout: Layout) -> torch.Tensor:
    """Return SeaCache's filtered tensor (arXiv:2602.18993, equations 5 to 7).

    With the signal scale a = 1 - sigma and the noise scale b = sigma, the gain along an axis is
    a S / (a^2 S + b^2) for S = |f|^-beta. The gains of the axes are multiplied and divided by their mean.

    Args:
        x: Latents `(B, C, H, W)` or `(B, C, F, H, W)`, or tokens `(B, S, C)` on a grid of the layout.
        beta: The exponent of the spectrum.
        sigma: The noise level, 0 to 1.
        layout: The layout of the root call.

    Raises:
        Undefined: The axes of the tensor are not known.
    """
    if x.ndim == _SEQUENCE:
        grid = layout.grid_of(x.shape[1])
        if grid is None:
            raise Undefined(f"nothing tells the grid of {x.shape[1]} tokens")
        return _filtered(x.unflatten(1, grid), beta, sigma).flatten(1, len(grid))
    if x.ndim > _SEQUENCE:
        # The channels last, as in diffusers, so that equal latents give equal numbers.
        return _filtered(x.movedim(1, -1), beta, sigma).movedim(-1, 1)
    raise Undefined(f"a tensor of shape {tuple(x.shape)} has no spatial axes")


def _filtered(x: torch.Tensor, beta: float, sigma: float) -> torch.Tensor:
    """Filter a tensor `(B, axes..., C)` along its axes."""
    axes = tuple(range(1, x.ndim - 1))
    values = x.contiguous().float()
    spectrum = torch.fft.fftn(values, dim=axes)
    noise = max(1e-6, min(1.0 - 1e-6, sigma))
    signal = 1.0 - noise
    gain: torch.Tensor | None = None
    for axis in axes:
        frequencies = torch.fft.fftfreq(values.shape[axis], device=values.device, dtype=torch.float32)
        power = 1.0 / (frequencies.abs().pow(beta) + 1e-16)
        along = signal * power / (signal**2 * power + noise**2 + 1e-16)
        shape = [1] * values.ndim
        shape[axis] = along.shape[0]
        gain = along.reshape(shape) if gain is None else gain * along.reshape(shape)
    assert gain is not None
    return torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=axes).real.to(x.dtype)


def norm_of(function: str, streams: Sequence[Stream]) -> torch.Tensor:
    """Return a norm of one tensor, or of the difference of two, as a scalar tensor.

    Raises:
        Undefined: The function is not a norm, or a tensor was modified in place.
    """
    x = streams[0].tensor
    if len(streams) == 1:
        return streams[0].magnitude if function == "l1" else x.square().mean().sqrt()
    y = streams[1].tensor
    match function:
        case "l1":
            return (x - y).abs().mean()
        case "l2":
            return (x - y).square().mean().sqrt()
        case "relative_l1":
            return (x - y).abs().mean() / streams[1].magnitude
        case "cosine":
            return torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
        case "differing":
            return differing(x, y).mean()
        case _:
            raise Undefined(f"`{function}(...)` is not a norm")


def worst_norm(function: str, streams: Sequence[Stream]) -> torch.Tensor:
    """Return the largest norm over the samples (the smallest cosine)."""
    samples = [[Stream(sample) for sample in stream.tensor] for stream in streams]
    norms = torch.stack([norm_of(function, sample) for sample in zip(*samples, strict=True)])
    return norms.min() if function == "cosine" else norms.max()


def low_band(x: torch.Tensor, transform: str, cut: float, layout: Layout) -> torch.Tensor:
    """Return the low frequencies of a tensor, up to a share of the highest one, as FreqCa does (arXiv:2510.08669).

    Args:
        x: Tokens `(B, S, C)`, or latents `(B, C, H, W)` or `(B, C, F, H, W)`. Other tensors have no frequency but 0.
        transform: `"dct"` of the grid of the tokens, or of their sequence where nothing tells the grid; `"fft"` of the
            sequence of the tokens. Latents are transformed along all axes of the picture.
        cut: The share, 0 to 1.
        layout: The layout of the root call.
    """
    if x.ndim < _SEQUENCE:
        return x
    grid = (layout.grid_of(x.shape[1]) if transform == "dct" else None) or (x.shape[1],)
    values = x.unflatten(1, grid) if x.ndim == _SEQUENCE else x.movedim(1, -1)
    values = values if values.element_size() > 2 else values.float()
    low = _low_cosines(values, cut) if transform == "dct" else _low_waves(values, cut)
    low = low.to(x.dtype)
    return low.flatten(1, len(grid)) if x.ndim == _SEQUENCE else low.movedim(-1, 1)


def _low_cosines(x: torch.Tensor, cut: float) -> torch.Tensor:
    """Return the part of `(B, axes..., C)` whose cosines have a frequency up to a share of the highest one."""
    axes = range(1, x.ndim - 1)
    limit = cut * math.sqrt(sum((x.shape[axis] - 1) ** 2 for axis in axes))
    square: Any = 0
    waves = list[torch.Tensor]()
    for axis in axes:
        size = x.shape[axis]
        count = min(size, int(limit + 1e-9) + 1)  # of the frequencies that can be within the limit
        frequencies = torch.arange(count, device=x.device, dtype=x.dtype)
        places = torch.arange(size, device=x.device, dtype=x.dtype) + 0.5
        wave = torch.cos(math.pi / size * frequencies[:, None] * places) * math.sqrt(2 / size)
        wave[0] = math.sqrt(1 / size)
        waves.append(wave)
        shape = [1] * x.ndim
        shape[axis] = count
        square = square + frequencies.reshape(shape) ** 2
    for axis, wave in zip(axes, waves, strict=True):
        x = torch.einsum("kn,n...->k...", wave, x.movedim(axis, 0)).movedim(0, axis)
    x = x * (torch.sqrt(square) <= limit + 1e-9)
    for axis, wave in zip(axes, waves, strict=True):
        x = torch.einsum("kn,k...->n...", wave, x.movedim(axis, 0)).movedim(0, axis)
    return x


def _low_waves(x: torch.Tensor, cut: float) -> torch.Tensor:
    """Return the part of `(B, axes..., C)` whose waves have a frequency up to a share of the highest one."""
    axes = tuple(range(1, x.ndim - 1))
    square: Any = 0
    for axis in axes:
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        square = square + torch.fft.fftfreq(x.shape[axis], device=x.device, dtype=torch.float64).reshape(shape) ** 2
    magnitude = torch.sqrt(square)
    kept = magnitude <= cut * magnitude.max() + 1e-12
    return torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * kept, dim=axes).real
