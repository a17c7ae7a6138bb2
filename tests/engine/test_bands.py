# pyright: reportOptionalMemberAccess=false
"""`band` and `align`: the split by frequency, and the calls in which they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cachepolicy
from cachepolicy.engine.distributed import meeting
from cachepolicy.engine.streams import Layout, low_band
from cachepolicy.planning.facts import Fact
from cachepolicy.testing import checks
from cachepolicy.testing.models import Toy, inputs
from tests.support.exchange import Exchange, Thread

SHAPES = [(1, 12, 3), (2, 7, 2), (1, 2, 4, 6), (2, 3, 2, 3, 4)]
BAND = 'predict band(transform: "dct", cut: 0.3, low: taylor(order: 0), high: taylor(order: 1))'
ALIGN = "predict align(probe: head, clip: [0.5, 2]) of residual"
STEPS = 9


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.sampled_from(SHAPES), st.sampled_from(["dct", "fft"]), st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_the_low_band_is_a_projection(
    shape: tuple[int, ...], transform: str, cut: float, seed: int, grid: bool
) -> None:
    """It is linear, its low band is itself, a constant is low, and with a cut of 1 all is low."""
    layout = Layout(grids=((1, 3, 4),)) if grid else Layout()
    x, y = drawn(shape, seed), drawn(shape, seed + 1)

    def low(value: Tensor, share: float = cut) -> Tensor:
        return low_band(value, transform, share, layout)

    assert torch.allclose(low(x), low(low(x)), atol=1e-9)
    assert torch.allclose(low(x) - 2 * low(y), low(x - 2 * y), atol=1e-9)
    assert torch.allclose(torch.ones_like(x), low(torch.ones_like(x)), atol=1e-9)
    assert torch.allclose(x, low(x, 1), atol=1e-9)
    assert float((low(x) * (x - low(x))).sum()) == pytest.approx(0, abs=1e-9)


def test_a_tensor_without_places_is_low() -> None:
    """A vector for each sample, such as an embedding of the timestep, has no frequency but 0."""
    x = drawn((2, 5), 0)
    assert x is low_band(x, "dct", 0.1, Layout())


def test_half_precision_keeps_its_dtype() -> None:
    """The transform runs in single precision."""
    x = drawn((1, 12, 3), 0).to(torch.bfloat16)
    found = low_band(x, "fft", 0.5, Layout())
    assert torch.bfloat16 == found.dtype
    assert torch.allclose(low_band(x.float(), "fft", 0.5, Layout()), found.float(), atol=1e-2)


def run(policy: str, *, guided: bool = False, **options: Any) -> Any:
    """The trajectory of a toy. Guided, each call is a batch of two halves."""
    model, (x, y) = Toy(blocks=3).build(), inputs(Toy())
    text = f"signal head = residual(blocks[0])\n{policy}"
    with torch.no_grad(), cachepolicy.apply(model, cachepolicy.parse(text), steps=STEPS, **options) as applied:
        for step in range(STEPS):
            now, t = x * (1 + 0.1 * step) + 0.01 * step * step, torch.tensor(999.0 - 100 * step)
            _ = model(now.repeat(2, 1, 1), t, torch.cat([-y, y])) if guided else model(now, t, y)
        (trajectory,) = applied.trace.trajectories
    checks.trace_agrees(trajectory)
    return trajectory


@pytest.mark.parametrize("action", [BAND, ALIGN])
def test_they_answer_in_calls_of_whole_batches(action: str) -> None:
    """Also where such a call is a guidance batch."""
    for guided in (False, True):
        trajectory = run(f"match blocks[1:] every 3 -> {action}", guided=guided)
        assert "CRRCRRCRR" == trajectory.rows()["blocks[1:3]"]


@pytest.mark.parametrize("action", [BAND, ALIGN])
def test_they_compute_in_calls_of_half_a_batch(action: str) -> None:
    """After two results, where another predictor would be given their conditional halves."""
    rules = f"match model on {{0, 1, 2}} -> approximate uncond copy\nmatch blocks[1:] on {{0, 1, 2}} -> {action}"
    trajectory = run(rules, guided=True, guidance=True)
    assert "CCC" + "R" * 6 == trajectory.rows()["model"]
    assert "C" * STEPS == trajectory.rows()["blocks[1:3]"]


def test_an_alike_probe_has_no_scale() -> None:
    """Its two values at the computes are equal, so that nothing tells how far it moved, and the site computes."""
    model, (x, y) = Toy(blocks=3).build(), inputs(Toy())
    text = f"signal head = input(model)\nmatch blocks[1:] every 2 -> {ALIGN}"
    with torch.no_grad(), cachepolicy.apply(model, cachepolicy.parse(text), steps=6) as applied:
        for step in range(6):
            model(x, torch.tensor(900.0 - 100 * step), y)
        (trajectory,) = applied.trace.trajectories
    assert "CRCCCC" == trajectory.rows()["blocks[1:3]"]


@pytest.mark.filterwarnings("ignore:the policy reused nothing")
@pytest.mark.parametrize(("action", "fact"), [(BAND, Fact.SPREAD), (ALIGN, "an argument of its action has no value")])
def test_they_compute_where_processes_share_a_sample(action: str, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process knows all tokens, and the scale is not known before the processes have decided."""
    monkeypatch.setattr(meeting, "peers_of", lambda *_, **__: Thread(Exchange(1), 0))
    trajectory = run(f"match blocks[1:] on {{0, 1, 2}} -> {action}")
    assert "C" * STEPS == trajectory.rows()["blocks[1:3]"]
    assert {fact} == set(trajectory.facts.values())
