# pyright: basic
"""How near pictures are to others: PSNR, SSIM, and LPIPS where its package and weights are there."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Quality:
    """The distance of pictures to their references, as means over the pictures.

    `psnr` in dB, infinite where all are equal; `ssim` -1..1, 1 for equal ones; `lpips` from 0 up (AlexNet), None where
    it cannot be computed here. `worst_psnr` is that of the picture that differs most.
    """

    psnr: float
    worst_psnr: float
    ssim: float | None
    lpips: float | None

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data; infinity becomes None."""
        return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(self).items()}


def compare_pictures(reference: torch.Tensor, other: torch.Tensor) -> Quality:
    """The quality of pictures against references: both n, 3 (or 1), height, width, numbers in [-1, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"pictures of shape {tuple(other.shape)} against references of {tuple(reference.shape)}")
    each, worst = psnr(reference, other)
    return Quality(each, worst, ssim(reference, other), lpips(reference, other))


def psnr(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]: the mean over those that differ, and the worst.

    Both are infinite where no picture differs.
    """
    errors = (reference.double() - other.double()).square().flatten(1).mean(1)
    each = [10 * math.log10(4 / float(error)) for error in errors if error > 0]
    return (statistics.fmean(each), min(each)) if each else (math.inf, math.inf)


def ssim(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """Structural similarity (Wang et al. 2004, a Gaussian window of 11 pixels), None without torchmetrics."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    # A picture smaller than the window has no structure that it could compare.
    if min(reference.shape[-2:]) < 11:
        return None
    found: Any = structural_similarity_index_measure(other.float(), reference.float(), data_range=2.0)
    return float(found)


def lpips(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """Learned perceptual distance (Zhang et al. 2018), None where its package or its weights are not there."""
    try:
        import lpips as package  # pyright: ignore[reportMissingImports]

        network = package.LPIPS(net="alex", verbose=False)
    except (ImportError, OSError, RuntimeError):
        return None
    coloured = [each.float().expand(-1, 3, -1, -1) for each in (reference, other)]
    with torch.no_grad():
        return float(network(*coloured).mean())
