"""Refuses a reuse through which a gradient would have to pass: a reused result is a constant to autograd."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from cachepolicy.errors import PolicyError, warn

MOST_NODES = 10_000
"""Nodes of the autograd graph that are searched for what a gradient reaches, the nearest first."""


class GradientGuard:
    """Checks the forward passes of one root model that reuse while gradients are recorded."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._warned = False

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check a forward pass that has reused a result.

        Every model that is called without `torch.no_grad()` has parameters that require grad, which alone says little
        about the intent, so that gives a warning (W605), once.

        Args:
            args: Positional arguments of the root model.
            kwargs: Its keyword arguments.

        Raises:
            PolicyError: A tensor of the arguments requires grad, or an adapter is being trained (E343).
        """
        name = type(self._module).__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if inputs and _reaches_others(inputs, self._module):
            raise _refusal(f"an input of `{name}` requires grad")
        trained = [parameter.requires_grad for parameter in self._module.parameters()] if self._looks() else []
        if self._module.training and any(trained) and not all(trained):
            raise _refusal(f"an adapter of `{name}` is being trained")
        if any(trained) and not self._warned:
            self._warned = True
            warn(
                "W605",
                f"`{name}` reuses results while gradients are recorded, and no gradient passes through them",
                help="sample under `torch.no_grad()`, "
                'or say that it is meant: `options=RunOptions(gradients="detach")`',
            )

    def _looks(self) -> bool:
        """Return True if the parameters have to be read, which takes a millisecond for a large model."""
        return self._module.training or not self._warned


def _reaches_others(inputs: list[torch.Tensor], module: nn.Module) -> bool:
    """Return True if a gradient of the inputs goes to anything but the parameters of the model.

    Without `torch.no_grad()` the latents of a sampling loop require grad from the second step on, because the output of
    the first one depends on the parameters. That alone says nothing about the intent.
    """
    own = {id(parameter) for parameter in module.parameters()}
    if any(tensor.is_leaf and id(tensor) not in own for tensor in inputs):
        return True
    pending: deque[Any] = deque(tensor.grad_fn for tensor in inputs)
    seen = set[Any]()
    while pending and len(seen) < MOST_NODES:
        node = pending.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        # The node at a leaf holds the tensor that a gradient is accumulated in.
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return True
        pending.extend(following for following, _ in node.next_functions)
    return False


def _refusal(reason: str) -> PolicyError:
    return PolicyError.of(
        "E343",
        f"{reason}, and a reused result passes no gradient on",
        help="run this call under `torch.no_grad()` or `run.disabled()`, "
        'or pass `options=RunOptions(gradients="detach")` to treat reused results as constants',
    )
