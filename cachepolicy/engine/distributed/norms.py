"""Norms of tensors that several processes hold pieces of: each sums up its share, the sums add up, a norm comes out.

The pieces may be of any size. Sums are made in float64 over rows that were summed in float32 at least; the norm is
then rounded as the tensor's own dtype rounds it, so that it is what one process would get of the whole tensor, but for
the last bits of its own summation.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# A DTensor's own methods have no types.

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

TERMS = {"l1": 1, "l2": 1, "relative_l1": 2, "cosine": 3}
"""How many sums each norm is made of."""
WIDTH = 6
"""Numbers of one sample in a message: up to three sums, and how many elements went into each."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TINY = 1e-8  # as torch's cosine_similarity has it


@dataclass(frozen=True, slots=True)
class Sum:
    """The sums of one term, a sample each (or one in all), in float64, and the number of elements of each."""

    sums: torch.Tensor
    count: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one process knows of a norm."""

    terms: Sequence[Sum]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """How many samples are measured by themselves."""
        return len(self.terms[0].sums)

    @property
    def code(self) -> int:
        """The dtype as a number, the same on every process."""
        return _DTYPES.index(self.dtype) + 1 if self.dtype in _DTYPES else 0


def share(
    function: str, x: torch.Tensor, y: torch.Tensor | None, *, by_sample: bool, magnitude: Sum | None = None
) -> Share:
    """The share of `function(x)` or `function(x, y)`; `magnitude` is the sum of |y| where it is known already."""
    if y is None:
        return Share([summed(x.abs() if function == "l1" else x.square(), by_sample=by_sample)], x.dtype)
    if function == "cosine":
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(_wide(x.dtype)), y.to(_wide(y.dtype))
        return Share([summed(each, by_sample=by_sample) for each in (x * y, x.square(), y.square())], dtype)
    apart = x - y
    first = summed(apart.square() if function == "l2" else apart.abs(), by_sample=by_sample)
    if function != "relative_l1":
        return Share([first], apart.dtype)
    return Share([first, magnitude or summed(y.abs(), by_sample=by_sample)], apart.dtype)


def summed(term: torch.Tensor, *, by_sample: bool) -> Sum:
    """The sums of a tensor; those of a DTensor are of all of it, whoever holds its pieces."""
    if in_pieces(term):
        return _of_all(term, by_sample=by_sample)
    sums = _sums(term, by_sample=by_sample)
    return Sum(sums, term.numel() / max(1, len(sums)))


def in_pieces(tensor: torch.Tensor) -> bool:
    """True for a DTensor: what `.item()` reads of one is each process' own."""
    return type(tensor) is not torch.Tensor and hasattr(tensor, "device_mesh")


def _sums(term: torch.Tensor, *, by_sample: bool) -> torch.Tensor:
    samples = term if by_sample and term.ndim else term.unsqueeze(0)
    if samples.ndim > 1:
        # Float64 over every element is slow; a row of one token is short, and never split.
        samples = samples.sum(-1, dtype=_wide(term.dtype))
    return samples.reshape(len(samples), -1).sum(1, dtype=torch.float64)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dtensors() -> Any:
    """Where torch has `DTensor`: a public place from 2.5 on."""
    public = importlib.import_module("torch.distributed.tensor")
    return public if hasattr(public, "DTensor") else importlib.import_module("torch.distributed._tensor")


def _of_all(term: Any, *, by_sample: bool) -> Sum:
    """The sums over all pieces of a DTensor: pieces that are pending sums themselves are added up first."""
    kinds = _dtensors()
    whole = [
        kinds.Replicate() if each.is_partial() or (by_sample and each.is_shard(0)) else each for each in term.placements
    ]
    local = term.redistribute(placements=whole).to_local()
    sums = _sums(local, by_sample=by_sample)
    pieces = torch.cat([sums, sums.new_tensor([local.numel() / max(1, len(sums))])])
    pending = kinds.DTensor.from_local(
        pieces, term.device_mesh, [kinds.Partial()] * term.device_mesh.ndim, run_check=False
    )
    *_, count = (complete := pending.full_tensor())
    return Sum(complete[:-1], float(count))


# --- what comes of all shares ----------------------------------------------------------------------------


def numbers_of(shares: Sequence[Share]) -> list[list[float]]:
    """Each share as numbers that add up, `WIDTH` a sample; read from the device at once."""
    if not shares:
        return []
    device = shares[0].terms[0].sums.device
    sums = iter(torch.cat([term.sums.to(device) for each in shares for term in each.terms]).tolist())
    return [_laid_out(each, [[next(sums) for _ in range(each.rows)] for _ in each.terms]) for each in shares]


def _laid_out(share: Share, columns: Sequence[Sequence[float]]) -> list[float]:
    counts = [term.count for term in share.terms]
    rest = [0.0] * (WIDTH // 2 - len(counts))
    return [number for row in zip(*columns, strict=True) for number in (*row, *rest, *counts, *rest)]


def norm_of(function: str, numbers: Sequence[float], dtype: torch.dtype) -> float:
    """The norm from the added numbers of all shares: of several samples the largest one (the smallest cosine)."""
    rows = torch.tensor(numbers, dtype=torch.float64).reshape(-1, WIDTH)
    first, second, third = (rows[:, :3] / rows[:, 3:]).unbind(1)
    match function:
        case "l2":
            norms = first.to(dtype).sqrt()
        case "relative_l1":
            norms = first.to(dtype) / second.to(dtype)
        case "cosine":
            lengths = second.sqrt().clamp_min(_TINY) * third.sqrt().clamp_min(_TINY)
            norms = (first / lengths).to(dtype)
        case _:
            norms = first.to(dtype)
    return float(norms.min() if function == "cosine" else norms.max())


def dtype_of(code: float) -> torch.dtype:
    """The dtype of a code; float64 where processes have different ones."""
    return _DTYPES[int(code) - 1] if code in {1.0, 2.0, 3.0} else torch.float64


def norm_alone(function: str, x: torch.Tensor, y: torch.Tensor | None, *, by_sample: bool) -> float:
    """The norm of a DTensor in one process of those that hold it: all of them get the same."""
    mine = share(function, x, y, by_sample=by_sample)
    return norm_of(function, numbers_of([mine])[0], mine.dtype)
