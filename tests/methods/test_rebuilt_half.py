"""FasterCache rebuilds the unconditional half from its difference to the other, of which each band grows by itself."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from tests.methods.test_policies import SEEDS  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:the policy reused nothing")]

SIZE = 8
CHECKERS = torch.tensor([[(-1.0) ** (row + column) for column in range(SIZE)] for row in range(SIZE)]).double()
"""The highest frequency of the grid. A constant is the lowest."""


class Adds(nn.Module):
    """Adds the prompt to the latents."""

    def forward(self, hidden_states: Tensor, timestep: Any, encoder_hidden_states: Tensor) -> Tensor:
        return hidden_states + encoder_hidden_states


@given(SEEDS)
def test_fastercache(seed: int) -> None:
    """At each rebuilt step the kept low and high bands are multiplied by their factors, where the timestep is in their
    ranges, and once more at the next one."""
    draw = random.Random(seed)
    steps, every = draw.randint(4, 20), draw.randint(2, 6)
    ranges: dict[str, Any] = {
        name: (draw.uniform(-200, 600), draw.uniform(600, 1200)) for name in ("uncond_range", "low_range", "high_range")
    }
    factors: dict[str, Any] = {"low": draw.uniform(0.8, 1.4), "high": draw.uniform(0.8, 1.4)}
    flat, sharp = draw.uniform(-2, 2), draw.uniform(-2, 2)
    prompts = torch.stack([flat + sharp * CHECKERS, torch.zeros(SIZE, SIZE).double()])[:, None]

    def within(t: float, name: str) -> bool:
        return ranges[name][0] < t < ranges[name][1]

    model, bands = Adds(), {"low": flat, "high": sharp}
    with cachepolicy.apply(model, "fastercache", steps=steps, guidance=True, uncond_every=every, **ranges, **factors):
        for step in range(steps):
            t = 999 - 999 * step / (steps - 1)
            latents = torch.full((2, 1, SIZE, SIZE), draw.uniform(-1, 1)).double()
            found = model(hidden_states=latents, timestep=torch.tensor(t), encoder_hidden_states=prompts)
            if step == 0 or step % every == 0 or not within(t, "uncond_range"):
                bands = {"low": flat, "high": sharp}
            else:
                for band, factor in factors.items():
                    bands[band] *= factor if within(t, f"{band}_range") else 1
            torch.testing.assert_close(found[1], latents[1])
            expected = latents[0, 0] + bands["low"] + bands["high"] * CHECKERS
            # Spectra are in single precision.
            torch.testing.assert_close(found[0, 0], expected, rtol=1e-4, atol=1e-5)
