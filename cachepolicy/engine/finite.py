"""Checks that an answer is finite: before it is made, from the weights of its predictor, or from its numbers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from cachepolicy.engine.history_packing import Packed, leaves
from cachepolicy.planning.predictors import Weights, amplification


def is_too_large(numbers: Weights, history: Any) -> bool:
    """Return True if a prediction from a history would overflow for all but small values.

    Args:
        numbers: The coefficients of the prediction.
        history: Stored outputs. Only their dtypes are read.

    The result depends on the weights and the dtype only, so it needs no synchronization with the device, and it is the
    same on all processes that hold parts of one sample.
    """
    dtypes = [tensor.dtype for tensor in leaves(history, (torch.Tensor, Packed)) if tensor.dtype.is_floating_point]
    limit = min((torch.finfo(dtype).max ** _LIMIT for dtype in dtypes), default=math.inf)
    return not amplification(numbers) <= limit


# The exponent leaves values up to 8e7 in bfloat16 and float32, and up to 9 in float16, with weights at the limit: 4e30
# and 7000. Predictors of use have weights below 1000.
_LIMIT = 0.8


def is_finite(value: Any) -> bool:
    """Return True if all numbers in an output are finite. Only tensors on the CPU are read.

    Reading a tensor of another device would wait for that device. Subclasses of `Tensor` may hold no numbers.
    """
    # A loop and a sum, because this runs for every prediction. A sum is finite only if all its terms are, and takes a
    # tenth of the time of `isfinite`; it may also overflow by itself.
    for tensor in cast("list[Any]", value) if type(value) is list else leaves(value):
        if type(tensor) is torch.Tensor and tensor.is_cpu and tensor.is_floating_point():
            total = tensor.sum(dtype=torch.float32) if tensor.element_size() == 2 else tensor.sum()
            if not math.isfinite(total.item()) and not tensor.isfinite().all():
                return False
    return True
