# pyright: basic
"""Quality metrics of pictures against references: PSNR, SSIM, and LPIPS where its package and weights exist."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of pictures against their references, as means over the pictures.

    Attributes:
        psnr: The peak signal-to-noise ratio in dB over the pictures that differ, infinite if none differs.
        worst_psnr: The smallest ratio of a picture.
        ssim: The structural similarity, -1 to 1 (equal), None if it cannot be computed.
        lpips: The learned perceptual distance (AlexNet), 0 (equal) and above, None if it cannot be computed.
    """

    psnr: float
    worst_psnr: float
    ssim: float | None
    lpips: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain data. Infinite numbers become None."""
        return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(self).items()}


def compare_pictures(reference: torch.Tensor, other: torch.Tensor) -> Quality:
    """Compute all metrics.

    Args:
        reference: The reference pictures, `(N, C, H, W)` in [-1, 1] with 1 or 3 channels.
        other: The pictures to compare, of the same shape.

    Returns:
        The metrics.

    Raises:
        ValueError: The shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"pictures of shape {tuple(other.shape)} against references of {tuple(reference.shape)}")
    mean, worst = psnr(reference, other)
    return Quality(mean, worst, ssim(reference, other), lpips(reference, other))


def psnr(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Compute the peak signal-to-noise ratio.

    Args:
        reference: The reference pictures, `(N, C, H, W)` in [-1, 1].
        other: The pictures to compare, of the same shape.

    Returns:
        The mean over the pictures that differ and the smallest ratio, in dB. Both are infinite if no picture differs. A
        picture with a number that is not finite has minus infinity.
    """
    ratios = [ratio for ratio in each_psnr(reference, other) if ratio != math.inf]
    return (statistics.fmean(ratios), min(ratios)) if ratios else (math.inf, math.inf)


def each_psnr(reference: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Compute the peak signal-to-noise ratio of each picture.

    Args:
        reference: The reference pictures, `(N, ...)` in [-1, 1].
        other: The pictures to compare, of the same shape.

    Returns:
        The ratios in dB: infinite for a picture that does not differ, minus infinity for one with a number that is not
        finite.
    """
    errors: list[float] = (reference.double() - other.double()).square().flatten(1).mean(1).tolist()
    return [
        math.inf if error == 0 else 10 * math.log10(4 / error) if math.isfinite(error) else -math.inf
        for error in errors
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` percent of all values do not exceed.

    Args:
        values: At least one number; they may be infinite.
        share: 0 to 100.
    """
    return sorted(values)[max(0, math.ceil(len(values) * share / 100) - 1)]


def ssim(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """Compute the mean structural similarity (Wang et al. 2004) with a Gaussian window of 11 pixels.

    Args:
        reference: The reference pictures, `(N, C, H, W)` in [-1, 1].
        other: The pictures to compare, of the same shape.

    Returns:
        The similarity, None if torchmetrics is not installed or the pictures are smaller than the window.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    if min(reference.shape[-2:]) < 11:
        return None
    similarity: Any = structural_similarity_index_measure(other.float(), reference.float(), data_range=2.0)
    return float(similarity)


def lpips(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """Compute the mean learned perceptual distance (Zhang et al. 2018) with AlexNet.

    Args:
        reference: The reference pictures, `(N, C, H, W)` in [-1, 1] with 1 or 3 channels.
        other: The pictures to compare, of the same shape.

    Returns:
        The distance, None if the package `lpips` or its weights are missing, or for sound, which has one row.
    """
    if reference.shape[-2] == 1:
        return None
    try:
        import lpips as package  # pyright: ignore[reportMissingImports]

        network = package.LPIPS(net="alex", verbose=False)
    except (ImportError, OSError, RuntimeError):
        return None
    with torch.no_grad():
        distances = network(reference.float().expand(-1, 3, -1, -1), other.float().expand(-1, 3, -1, -1))
        return float(distances.mean())
