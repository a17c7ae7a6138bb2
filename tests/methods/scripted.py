"""A small model whose streams are given numbers, to compare policies with transcriptions on the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import cachepolicy


def tensor(vector: Sequence[float]) -> Tensor:
    """A stream of one token, in double precision."""
    return torch.tensor(vector, dtype=torch.float64).reshape(1, 1, -1)


class Norm(nn.Module):
    """Gives the probe of the present step, whatever goes in."""

    def __init__(self, probes: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.probes, self.step = probes, 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        return tensor(self.probes[self.step])


class FeedForward(nn.Sequential):
    """A module of a block that rules can select; the block does not read what it gives."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, hidden_states: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return hidden_states.clone()


class Block(nn.Module):
    """Adds the vector of the present step, and counts its calls."""

    def __init__(self, residuals: Sequence[Sequence[float]], probes: Sequence[Sequence[float]] | None) -> None:
        super().__init__()
        self.residuals, self.step, self.ran = residuals, 0, list[int]()
        self.ff = FeedForward()
        if probes is not None:
            self.norm1 = Norm(probes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hasattr(self, "norm1"):
            self.norm1(hidden_states)
        self.ff(hidden_states)
        self.ran.append(self.step)
        return hidden_states + tensor(self.residuals[self.step])


class Scripted(nn.Module):
    """A root with blocks; each call is the next step of the script.

    `residuals` has what each block adds, by block and step. `probes` is the output of the first block's norm.
    """

    def __init__(
        self, residuals: Sequence[Sequence[Sequence[float]]], probes: Sequence[Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            Block(stream, probes if number == 0 else None) for number, stream in enumerate(residuals)
        )

    def set_step(self, step: int) -> None:
        for module in self.modules():
            if isinstance(module, Norm | Block):
                module.step = step

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@torch.no_grad()
def run(
    model: Scripted, policy: Any, inputs: Sequence[Sequence[float]], **params: Any
) -> tuple[dict[str, str], list[Tensor]]:
    """Samples once with a policy. Returns the rows of the trace and the outputs."""
    steps = len(inputs)
    outputs = list[Tensor]()
    with cachepolicy.apply(model, policy, steps=steps, **params) as session:
        for step, vector in enumerate(inputs):
            model.set_step(step)
            outputs.append(model(tensor(vector), timestep=999 - 999 * step / max(1, steps - 1)))
        assert session.trace is not None
        rows = session.trace.rows()
    return rows, outputs


def letters(computed: Sequence[bool]) -> str:
    """A row of the trace."""
    return "".join("C" if full else "R" for full in computed)
