"""Evidence about a guidance batch: whether it has two halves, and which of them comes first.

`do_classifier_free_guidance` of a pipeline only says that guidance is on. A batch of two prompts with three parts also
has an even number of rows. So two halves are believed if the batch has twice as many rows as the samples that the
scheduler steps, or if both halves have the same latents.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Inputs of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from cachepolicy.diffusers.guidance import (
    BATCH_CONTEXT,
    COND_FIRST_MODELS,
    GUIDANCE_PROPERTY,
    PERTURBED_PROPERTY,
    UNCOND_FIRST,
    Order,
    orders_of,
)
from cachepolicy.engine.contexts import CONTEXT
from cachepolicy.engine.introspection import is_one_of
from cachepolicy.errors import PolicyError

PERTURBED: Order = ("uncond", "cond", "perturbed")


@dataclass(frozen=True, slots=True)
class GuidanceSource:
    """What is known of the guidance of a root call before it runs.

    Attributes:
        stated: The `guidance` argument of the caller, or None.
        pipeline: The running pipeline, or None.
        samples: The number of samples that the scheduler stepped last, or None.
    """

    stated: bool | None = None
    pipeline: Any = None
    samples: int | None = None

    @property
    def guided(self) -> bool | None:
        """Whether batches contain several parts, or None if nothing tells."""
        context = CONTEXT.get()
        if context is not None and context.name == BATCH_CONTEXT:
            return True
        if self.stated is not None or self.pipeline is None:
            return self.stated
        guided = getattr(self.pipeline, GUIDANCE_PROPERTY, None)
        return guided if isinstance(guided, bool) else None

    @property
    def orders(self) -> tuple[Order, ...] | None:
        """The orders of parts that a batch may have, or None if the pipeline is unknown."""
        if self.pipeline is None:
            return None
        if getattr(self.pipeline, PERTURBED_PROPERTY, False) is True:
            return (PERTURBED,)
        return orders_of(type(self.pipeline))

    def require(self) -> bool:
        """Return whether batches have two halves, as far as the kind of guidance tells.

        Raises:
            PolicyError: Nothing tells whether there is guidance (E330), or a batch always has more than two parts
                (E333).
        """
        guided, orders = self.guided, self.orders
        name = type(self.pipeline).__name__
        if guided is not False and orders is not None and all(len(order) > 2 for order in orders):
            raise PolicyError.of(
                "E333",
                f"the guidance batch of `{name}` has the parts {', '.join(orders[0])}, not two halves",
                help="`approximate uncond` needs an unconditional and a conditional half; use a policy without it",
            )
        if guided is None:
            subject = "nothing tells" if self.pipeline is None else f"`{name}` does not tell"
            start = "apply the policy to the pipeline, or " if self.pipeline is None else ""
            raise PolicyError.of(
                "E330",
                f"{subject} whether this batch holds both halves of guidance",
                help=f"{start}say `guidance=True` to `apply` if every batch holds an unconditional and a conditional "
                "half and no third part, else `guidance=False`",
            )
        return guided

    def problem(self, latents: Any, model: torch.nn.Module) -> str | None:
        """Return why a batch is not believed to have two halves, or None. This may read from the device.

        Args:
            latents: The latents of the call, a tensor or a list of samples.
            model: The root model.
        """
        rows = rows_of(latents)
        if rows % 2:
            return "the batch has no two halves"
        parts = rows / self.samples if self.samples else None
        several = [order for order in self.orders or () if len(order) > 2]
        pairs = any(order[:4] == UNCOND_FIRST * 2 for order in several)
        if parts == 2 and not (pairs and rows > 2):
            return None
        if parts is not None and parts > 2:
            return f"the batch has {parts:g} parts for each sample"
        if several and rows > 2:
            return f"`{type(self.pipeline).__name__}` may have more than two parts in a batch"
        if _equal_parts(latents, 2, model):
            return None
        if self.stated and parts is None and self.pipeline is None:
            # Only the `guidance` argument says that there are two halves. Three equal parts would contradict it.
            odd = (number for number in range(3, rows + 1, 2) if rows % number == 0)
            count = next((number for number in odd if _equal_parts(latents, number, model)), None)
            return None if count is None else f"the batch has {count} parts with the same latents"
        return "the halves of the batch have different latents"

    def layout(self, stated: str, model: torch.nn.Module) -> str:
        """Return which half comes first: as the policy says, as in the pipeline, else the unconditional half.

        Args:
            stated: The `layout` of the policy, `"found"` if it leaves it open.
            model: The root model.
        """
        if stated != "found":
            return stated
        orders = self.orders
        if orders is not None:
            return "uncond first" if orders[0].index("uncond") == 0 else "cond first"
        if is_one_of(model, COND_FIRST_MODELS) and model not in _warned:
            _warned[model] = True
            warnings.warn(
                f"the unconditional half of the batch is assumed to come first, but diffusers' pipelines call "
                f'`{type(model).__name__}` with the conditional half first: say `layout: "cond first"` or '
                '`"uncond first"` in the policy, or apply it to the pipeline',
                UserWarning,
                stacklevel=2,
            )
        return "uncond first"


_warned: Any = WeakIdKeyDictionary()
"""The models that were warned about."""


def rows_of(latents: Any) -> int:
    """Return the number of rows of latents, a tensor or a list of samples."""
    if isinstance(latents, torch.Tensor):
        return latents.shape[0] if latents.ndim > 0 else 1
    return len(latents) if isinstance(latents, list) else 1


def _equal_parts(latents: Any, number: int, model: torch.nn.Module) -> bool:
    """Return True if this number of parts of a batch have equal latents.

    Further input channels are not compared, because pipelines append images and masks, which differ between parts.
    """
    last = len(latents) - len(latents) // number
    pairs = [(latents[:last], latents[len(latents) - last :])]
    if isinstance(latents, list):
        pairs = list(zip(*pairs[0], strict=True))
    config = getattr(model, "config", None)
    in_channels, out_channels = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    more = isinstance(in_channels, int) and isinstance(out_channels, int) and in_channels > out_channels
    return all(_equal(one, other, in_channels if more else None, out_channels) for one, other in pairs)


def _equal(one: Any, other: Any, in_channels: int | None, out_channels: Any) -> bool:
    """Return True if two tensors are equal, comparing the first `out_channels` of a dimension of size `in_channels`."""
    if not isinstance(one, torch.Tensor) or one.shape != other.shape or one.device.type == "meta":
        return False
    dims = [dim for dim, size in enumerate(one.shape) if dim > 0 and size == in_channels]
    cuts = [(one, other), *((one.narrow(dim, 0, out_channels), other.narrow(dim, 0, out_channels)) for dim in dims)]
    return any(torch.equal(*cut) for cut in cuts)
