"""What the trace costs: the same run untraced, traced, and with the time of every site, side by side.

    python -m benchmarks.tracing

Two models of 60 blocks: one whose blocks compute (two matrix products over some tokens each), and one whose blocks take
no time, so that nothing hides what is done around them. Each has a policy that decides by the clock and one that
decides at every site by what it measures. The goal is that the trace takes less than 2 % of a run that computes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import cachepolicy
from benchmarks._measure import one_thread, over, rounds, table, timed

POLICIES = {
    "by the clock": 'match "^blocks" every 2 -> reuse\n',
    "by a signal": "signal drift = relative_l1(input(blocks[0]), kept(input(blocks[0])))\n"
    'match "^blocks[.][1-9]" while drift < 0.5 at most 1 in a row -> reuse\n',
}
WAYS: dict[str, Any] = {"untraced": False, "traced": True, "profiled": "profile"}


class Block(nn.Module):
    """Two matrix products, or nothing where the width is 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width) if width else nn.Identity()
        self.down = nn.Linear(4 * width, width) if width else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The hidden states, changed."""
        return hidden_states + self.down(torch.relu(self.up(hidden_states)))


class Blocks(nn.Module):
    """A root with so many blocks."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:  # noqa: ARG002 - the clock reads it
        """Call every block."""
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def run(model: nn.Module, policy: str, states: Tensor, steps: int, trace: Any) -> float:
    """CPU seconds of one trajectory; putting the policy on and taking it off are not counted."""
    with cachepolicy.apply(model, cachepolicy.parse(policy), trace=trace):

        def sample() -> None:
            for t in torch.linspace(1000, 1, steps).tolist():
                model(states, t)

        return timed(sample)[0].cpu


def ways(model: nn.Module, policy: str, states: Tensor, steps: int) -> dict[str, Callable[[], float]]:
    """Every way to trace, and each once more to tell how far equal runs differ."""
    return {
        f"{name}{again}": lambda trace=trace: run(model, policy, states, steps, trace)
        for again in ("", " again")
        for name, trace in WAYS.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--width", type=int, default=64, help="of the blocks that compute")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    one_thread()
    warnings.simplefilter("ignore")
    print(f"{given.blocks} blocks, {given.steps} steps; median [quartiles] of ratios within {given.rounds} rounds.\n")
    for title, width in (("blocks that compute", given.width), ("blocks that take no time", 0)):
        rows = dict[str, list[object]]()
        for name, policy in POLICIES.items():
            model, states = Blocks(given.blocks, width).eval(), torch.randn(1, given.tokens if width else 1, width or 4)
            with torch.no_grad():
                measured = rounds(ways(model, policy, states, given.steps), given.rounds)
            ratio = {
                way: over(measured, lambda each, way=way: 100 * (each[way] / each["untraced"] - 1))
                for way in measured[0]
            }
            milliseconds = over(measured, lambda each: 1e3 * each["untraced"] / given.steps)
            rows[name] = [
                f"{milliseconds:.2f}",
                *(f"{ratio[way]:.1f}" for way in ("untraced again", "traced", "profiled")),
            ]
        heads = ["ms a call", "untraced again, %", "traced, %", "profiled, %"]
        print(table(title, heads, rows) + "\n")


if __name__ == "__main__":
    main()
