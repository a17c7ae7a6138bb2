"""A model that is no one's but yours, with a policy on it: a DiT as in its paper's code, sampled by a plain loop.

    python examples/own_model.py [--policy FILE] [--steps 50]

Nothing of the model knows of the policy. The rows that are printed show what was computed (C) and what reused (R).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import cachepolicy

FIRST_BLOCK = """
policy first_block "Go on only where the first block has something new to say"
param threshold: float = 0.2 in [0, inf)

signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))

match blocks[1:] while drift <= threshold at most 4 in a row -> reuse residual
"""


class Attention(nn.Module):
    """Self-attention, as timm has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The attended tokens."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class DiTBlock(nn.Module):
    """Attention and MLP, shifted, scaled and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """The tokens after this block."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """A diffusion transformer that is called as `model(x, t, y)`, with classes for prompts."""

    def __init__(self, width: int = 32, depth: int = 6, heads: int = 4, channels: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.width, self.channels = width, channels
        self.x_embedder = nn.Conv2d(channels, width, kernel_size=2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_layer = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise at timestep `t` (1000 to 0) for classes `y`."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(self.frequencies(t)) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        patches = self.final_layer(tokens).reshape(len(x), height, width, 2, 2, self.channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, 2 * height, 2 * width)

    def frequencies(self, t: Tensor) -> Tensor:
        """Sines and cosines of the timestep."""
        rates = torch.exp(-math.log(10_000) * torch.arange(self.width // 2, device=t.device) / (self.width // 2))
        angles = t[:, None].float() * rates
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def build(seed: int = 0) -> DiT:
    """A model with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiT()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample(model: nn.Module, steps: int = 50, *, seed: int = 0, classes: tuple[int, ...] = (1, 7)) -> Iterator[Tensor]:
    """The latents after each step of a plain loop."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(len(classes), 4, 16, 16, generator=generator), torch.tensor(classes)
    for t in torch.linspace(999, 0, steps):
        x = x - model(x, t.expand(len(x)), y) / steps
        yield x


def main() -> None:
    """Sample without and with the policy, and say what it did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", help="a shipped name or a file; default: the policy in this file")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()

    model = build()
    *_, computed = sample(model, given.steps)
    policy = cachepolicy.load(given.policy) if given.policy else cachepolicy.parse(FIRST_BLOCK)
    with cachepolicy.apply(model, policy, steps=given.steps) as run:
        *_, cached = sample(model, given.steps)
        print(run.trace)
    print(f"relative difference of the result: {float((cached - computed).norm() / computed.norm()):.3g}")


if __name__ == "__main__":
    main()
