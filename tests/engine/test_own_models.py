"""Models that are not diffusers' at all: called in a way of their own, with skips, without a timestep."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.testing import checks, models  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:the policy reused nothing")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
STEPS = 12

PAB = "match attention when t in (100, 800) every 2 -> reuse\n"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


own = _example()


# --- a DiT in facebookresearch's manner ------------------------------------------------------------------


class ByHand:
    """The DiT with one answer for its attention or its blocks put in by hand."""

    def __init__(self, model: Any) -> None:
        self.model, self.step, self.t = model, -1, 0.0
        self.kept: dict[int, Tensor] = {}
        self.head: Tensor | None = None
        self.tail: Tensor | None = None
        self.row = ""

    def begin(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.step, self.t = self.step + 1, float(t.max())
        return (
            self.model.x_embedder(x).flatten(2).transpose(1, 2),
            self.model.t_embedder(self.model.frequencies(t)) + self.model.y_embedder(y),
        )

    def finish(self, tokens: Tensor, x: Tensor) -> Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        patches = self.model.final_layer(tokens).reshape(len(x), height, width, 2, 2, self.model.channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class PabByHand(ByHand):
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.begin(x, t, y)
        reuses = 100 < self.t < 800 and self.step % 2 == 1
        self.row += "R" if reuses else "C"
        for index, block in enumerate(self.model.blocks):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
            if not reuses:
                self.kept[index] = block.attn(block.norm1(tokens) * (1 + scale_a) + shift_a)
            tokens = tokens + gate_a * self.kept[index]
            tokens = tokens + gate_m * block.mlp(block.norm2(tokens) * (1 + scale_m) + shift_m)
        return self.finish(tokens, x)


class FirstBlockByHand(ByHand):
    threshold = 0.1

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.begin(x, t, y)
        first = self.model.blocks[0](tokens, c)
        head = first - tokens
        if self.head is not None and (head - self.head).abs().mean() / self.head.abs().mean() <= self.threshold:
            self.row += "R"
            return self.finish(first + self.tail, x)
        self.row, self.head, tokens = self.row + "C", head, first
        for block in self.model.blocks[1:]:
            tokens = block(tokens, c)
        self.tail = tokens - first
        return self.finish(tokens, x)


def _assert_equal(expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_attention_of_a_dit_is_broadcast_as_by_hand(seed: int) -> None:
    """Positional arguments, blocks that are modulated and gated: the same numbers to the last bit."""
    hand = PabByHand(own.build(seed))
    expected = list(own.sample(hand, STEPS, seed=seed))
    with cachepolicy.apply(own.build(seed), cachepolicy.parse(PAB)) as run:
        got = list(own.sample(run.target, STEPS, seed=seed))
        rows = run.trace.rows()
    _assert_equal(expected, got)
    assert rows == {f"blocks.{index}.attn": hand.row for index in range(6)}


@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.3, 1e9])
def test_first_block_cache_of_a_dit_is_as_by_hand(threshold: float) -> None:
    """The shipped policy finds the blocks, their stream and its residual."""
    hand = FirstBlockByHand(own.build())
    hand.threshold = threshold
    expected = list(own.sample(hand, STEPS))
    with cachepolicy.apply(own.build(), "fbc", threshold=threshold) as run:
        got = list(own.sample(run.target, STEPS))
        assert run.trace.rows() == {"blocks[1:6]": hand.row}
    _assert_equal(expected, got)


@pytest.mark.parametrize("policy", ["pab", "fora", "fbc"])
def test_shipped_policies_run_on_it(policy: str) -> None:
    """Trace, simulation and executions agree, and the model is the bare one afterwards."""
    model = own.build()
    before = list(own.sample(model, STEPS))

    def run(model: nn.Module) -> None:
        list(own.sample(model, STEPS))

    params = {"threshold": 0.2} if policy == "fbc" else {}
    (trajectory,) = checks.engine_agrees(model, policy, run, steps=STEPS, **params)
    assert "R" in "".join(trajectory.rows().values())
    _assert_equal(before, list(own.sample(own.build(), STEPS)))


def test_the_example_runs() -> None:
    """The program of the docs prints its rows and how far off the result is."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "8"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(EXAMPLE.parents[1]), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert "blocks[1:6]" in done.stdout
    assert "relative difference" in done.stdout


# --- a U-ViT ---------------------------------------------------------------------------------------------


class UViTBlock(nn.Module):
    """A block of U-ViT: its conditioning is tokens in the sequence; half of them join a skip."""

    def __init__(self, width: int, *, skip: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = own.Attention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """U-ViT (arXiv:2209.12152) without its convolutions."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.time_embed = nn.Linear(1, width)
        self.in_blocks = nn.ModuleList(UViTBlock(width, skip=False) for _ in range(depth))
        self.mid_block = UViTBlock(width, skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(width, skip=True) for _ in range(depth))
        self.decoder_pred = nn.Linear(width, width)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        time = self.time_embed(timesteps[:, None] / 1000)[:, None]
        x = torch.cat([time, x] if y is None else [time, y, x], dim=1)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.decoder_pred(x)[:, -9:]


def _uvit() -> UViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UViT().eval().requires_grad_(False)


def _tokens(seed: int = 0) -> Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("policy", "params"),
    [
        ("fbc", {"threshold": 1e9}),
        (PAB, {}),
        ("match each blocks every 8 -> reuse residual\n", {}),
        ("match blocks every 8 -> reuse residual\n", {}),
        pytest.param(
            'match blocks of "^in_blocks$" every 8 -> reuse residual\n',
            {},
            marks=pytest.mark.xfail(reason="skips that are read after a short span are not seen"),
        ),
        ('match blocks of "^out_blocks$" every 8 -> reuse residual\n', {}),
        ('match each blocks of "^out_blocks$" every 8 -> reuse\n', {}),
    ],
)
def test_a_hit_of_a_uvit_on_a_repeated_input_is_what_computing_gives(policy: str, params: dict[str, Any]) -> None:
    """What goes through a long skip is neither lost nor old."""
    model, x, t = _uvit(), _tokens(), torch.full((2,), 500.0)
    clock = iter([750.0, 650.0, 550.0, 450.0, 350.0])
    expected = model(x, t)
    loaded = cachepolicy.load(policy) if policy == "fbc" else cachepolicy.parse(policy)
    with cachepolicy.apply(model, loaded, timestep=lambda: next(clock), **params) as run:
        got = [model(x, t) for _ in range(5)]
        rows = "".join(run.trace.rows().values())
    for output in got:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert "R" in rows


def test_a_uvit_saves_blocks_on_a_hit() -> None:
    """First Block Cache leaves the first block and the one in the middle, which is in no list."""
    model, x = _uvit(), _tokens()
    ran = models.Probes(model)
    with cachepolicy.apply(model, "fbc", threshold=1e9) as run:
        for t in (900.0, 800.0, 700.0, 600.0):
            model(x, torch.full((2,), t))
        (row,) = run.trace.rows().values()
    counts = ran.take()
    assert row.endswith("RR")
    assert counts["in_blocks.0"] == counts["mid_block"] == 4
    assert counts["in_blocks.1"] == counts["out_blocks.2"] == row.count("C")


# --- without a timestep ----------------------------------------------------------------------------------


class Timeless(nn.Module):
    """A denoiser that is told its noise level in a way that no clock can read."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UViTBlock(width, skip=False) for _ in range(3))

    def forward(self, noisy: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        noisy = noisy + conditioning["level"]
        for block in self.blocks:
            noisy = block(noisy)
        return noisy


def _timeless() -> Timeless:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Timeless().eval().requires_grad_(False)


def test_a_function_tells_the_timestep() -> None:
    """`timestep=` is asked at each call, and may give a number or a tensor."""
    rows = []
    for form in (float, torch.tensor):
        now = [0.0]
        with cachepolicy.apply(
            _timeless(), cachepolicy.parse(PAB), timestep=lambda form=form, now=now: form(now[0])
        ) as run:
            for t in range(950, 0, -100):
                now[0] = float(t)
                run.target(_tokens(), {"level": torch.full((2, 1, 16), t / 1000)})
            rows.append(set(run.trace.rows().values()))
    assert rows == [{"CCCRCRCRCC"}] * 2


def test_without_one_a_policy_that_reads_it_is_refused() -> None:
    """The error names what is missing and how to say it; nothing was computed under the policy."""
    model = _timeless()
    with pytest.raises(cachepolicy.PolicyError) as refusal, cachepolicy.apply(model, cachepolicy.parse(PAB)):
        model(_tokens(), {"level": torch.zeros(2, 1, 16)})
    (found,) = refusal.value.diagnostics
    assert found.code == "E250"
    assert found.help is not None
    assert "timestep=" in found.help


@pytest.mark.parametrize("policy", ["match attention every 2 -> reuse\n", "fbc"])
def test_a_policy_that_reads_none_needs_none(policy: str) -> None:
    """Steps are told by conditioning that comes again."""
    model, level = _timeless(), {"level": torch.full((2, 1, 16), 0.1)}
    loaded = cachepolicy.load(policy) if policy == "fbc" else cachepolicy.parse(policy)
    x = _tokens()
    params = {"threshold": 1e9} if policy == "fbc" else {}
    with cachepolicy.apply(model, loaded, **params) as run:
        for _ in range(6):
            x = x - 0.1 * model(x, level)
        assert set(run.trace.rows().values()) == {"CRRRRR" if policy == "fbc" else "CRCRCR"}
