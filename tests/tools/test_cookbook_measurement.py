# ruff: noqa: E402 - the imports below need diffusers, and the tests are skipped without it
"""What the pages of the cookbook say of a policy is what was measured."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from PIL import Image

import cachepolicy
from cachepolicy.tools.demo import Sampling, measure, save
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tools.flops import count


def test_the_shares_are_those_of_what_ran(tmp_path):
    """Calls and FLOPs skipped agree with the schedule and with the FLOPs of one module, and both grids are saved."""
    sampling = Sampling(steps=5, pictures=2, pairs=1)
    demo = measure(cachepolicy.parse('match "attn1$" on {0} -> reuse'), sampling=sampling)
    one = count(
        load_pipeline().transformer,
        hidden_states=torch.zeros(2, 3, 32, 32),
        timestep=torch.zeros(2),
        class_labels=torch.zeros(2, dtype=torch.long),
    )
    attention = sum(one.modules[f"transformer_blocks.{block}.attn1"] for block in range(8))
    assert pytest.approx(1 / 5) == demo.policy.calls
    assert pytest.approx(1 - 4 / 5 * attention / one.total) == demo.policy.flops
    assert pytest.approx(demo.fewer_steps.steps / 5) == demo.fewer_steps.flops
    assert 5 < demo.policy.worst_psnr <= demo.policy.psnr < math.inf
    save(demo, tmp_path / "out.png", ("uncached", "cached"))
    with Image.open(tmp_path / "out.png") as sheet:
        left, right = (sheet.crop((x, 30, x + 198, 125)).tobytes() for x in (0, sheet.width - 399))
        assert left != right
