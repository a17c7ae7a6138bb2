"""Norms of tensors that are distributed over several processes.

Each process sums its part, the sums are added, and the norm is computed from the totals. The parts may have different
sizes. Rows are summed in float32 or wider and then in float64. The norm is rounded to the dtype of the tensor, so it
equals the norm of the whole tensor up to the summation error of one process.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The methods of DTensor have no type annotations.

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

MESSAGE_WIDTH = 6
"""Numbers per sample in a message: up to three sums, and the element count of each."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TINY = 1e-8  # the eps of torch's cosine_similarity


@dataclass(frozen=True, slots=True)
class Sum:
    """Sums of one term in float64, one per sample (or one in total), and the elements per sum."""

    sums: torch.Tensor
    count: float


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a norm that one process knows."""

    terms: Sequence[Sum]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """The number of samples with a sum of their own."""
        return len(self.terms[0].sums)

    @property
    def code(self) -> int:
        """The dtype as a number, equal on every process."""
        return _DTYPES.index(self.dtype) + 1 if self.dtype in _DTYPES else 0


def share(
    function: str, x: torch.Tensor, y: torch.Tensor | None, *, by_sample: bool, magnitude: Sum | None = None
) -> Share:
    """Return the share of `function(x)` or `function(x, y)`.

    Args:
        function: `"l1"`, `"l2"`, `"relative_l1"`, `"cosine"` or `"differing"`.
        x: The first tensor.
        y: The second tensor, or None.
        by_sample: Whether each sample is measured separately.
        magnitude: The sum of |y|, if it is known.
    """
    if y is None:
        return Share([summed(x.abs() if function == "l1" else x.square(), by_sample=by_sample)], x.dtype)
    if function == "cosine":
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(_wide(x.dtype)), y.to(_wide(y.dtype))
        return Share([summed(term, by_sample=by_sample) for term in (x * y, x.square(), y.square())], dtype)
    if function == "differing":
        return Share([summed(differing(x, y), by_sample=by_sample)], torch.float32)
    apart = x - y
    first = summed(apart.square() if function == "l2" else apart.abs(), by_sample=by_sample)
    if function != "relative_l1":
        return Share([first], apart.dtype)
    return Share([first, magnitude or summed(y.abs(), by_sample=by_sample)], apart.dtype)


def differing(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return 1 where two tensors differ, 0 where they are equal, and NaN where a number is not finite, in float32."""
    return (x != y).float() + 0 * (x.float() - y.float())


def summed(term: torch.Tensor, *, by_sample: bool) -> Sum:
    """Return the sums of a tensor `(B, ...)`, for a DTensor those of the whole tensor.

    Args:
        term: The tensor.
        by_sample: Whether each row has a sum of its own. Otherwise there is one sum.
    """
    if in_pieces(term):
        return _of_all(term, by_sample=by_sample)
    sums = _sums(term, by_sample=by_sample)
    return Sum(sums, term.numel() / max(1, len(sums)))


def in_pieces(tensor: torch.Tensor) -> bool:
    """Return True for a DTensor, for which `.item()` would return only the local value."""
    return type(tensor) is not torch.Tensor and hasattr(tensor, "device_mesh")


def _sums(term: torch.Tensor, *, by_sample: bool) -> torch.Tensor:
    samples = term if by_sample and term.ndim else term.unsqueeze(0)
    if samples.ndim > 1:
        # Summing every element in float64 is slow, so rows are summed first. A row is one token, which is never split.
        samples = samples.sum(-1, dtype=_wide(term.dtype))
    return samples.reshape(len(samples), -1).sum(1, dtype=torch.float64)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dtensors() -> Any:
    """Return the module of `DTensor`, which is public from torch 2.5 on."""
    public = importlib.import_module("torch.distributed.tensor")
    return public if hasattr(public, "DTensor") else importlib.import_module("torch.distributed._tensor")


def _of_all(term: Any, *, by_sample: bool) -> Sum:
    """Return the sums of a whole DTensor. Partial placements are reduced first."""
    kinds = _dtensors()
    whole = [
        kinds.Replicate() if cut.is_partial() or (by_sample and cut.is_shard(0)) else cut for cut in term.placements
    ]
    local = term.redistribute(placements=whole).to_local()
    sums = _sums(local, by_sample=by_sample)
    pieces = torch.cat([sums, sums.new_tensor([local.numel() / max(1, len(sums))])])
    pending = kinds.DTensor.from_local(
        pieces, term.device_mesh, [kinds.Partial()] * term.device_mesh.ndim, run_check=False
    )
    *_, count = (complete := pending.full_tensor())
    return Sum(complete[:-1], float(count))


# --- norms from the shares of all processes ---------------------------------------------------------------


def numbers_of(shares: Sequence[Share]) -> list[list[float]]:
    """Return each share as numbers, `MESSAGE_WIDTH` per sample, read from the device in one transfer."""
    if not shares:
        return []
    device = shares[0].terms[0].sums.device
    sums = iter(torch.cat([term.sums.to(device) for share in shares for term in share.terms]).tolist())
    return [_message_of(share, [[next(sums) for _ in range(share.rows)] for _ in share.terms]) for share in shares]


def _message_of(share: Share, columns: Sequence[Sequence[float]]) -> list[float]:
    counts = [term.count for term in share.terms]
    rest = [0.0] * (MESSAGE_WIDTH // 2 - len(counts))
    return [number for row in zip(*columns, strict=True) for number in (*row, *rest, *counts, *rest)]


def norm_of(function: str, numbers: Sequence[float], dtype: torch.dtype) -> float:
    """Return the largest norm over the samples, or the smallest cosine.

    Args:
        function: `"l1"`, `"l2"`, `"relative_l1"`, `"cosine"` or `"differing"`.
        numbers: The summed numbers of all processes, `MESSAGE_WIDTH` per sample.
        dtype: The dtype to which the norm is rounded.
    """
    rows = torch.tensor(numbers, dtype=torch.float64).reshape(-1, MESSAGE_WIDTH)
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
    """Return the dtype of a code, float64 if the processes have different dtypes."""
    return _DTYPES[int(code) - 1] if code in {1.0, 2.0, 3.0} else torch.float64


def norm_alone(function: str, x: torch.Tensor, y: torch.Tensor | None, *, by_sample: bool) -> float:
    """Return the norm of a DTensor, which is equal on all processes that hold it. Arguments as for `share`."""
    mine = share(function, x, y, by_sample=by_sample)
    return norm_of(function, numbers_of([mine])[0], mine.dtype)
