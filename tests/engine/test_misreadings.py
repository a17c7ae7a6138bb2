"""What a run must not be fooled by: lost state, guidance in several calls, tiles, two leaders, wrong arguments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from tests.support import zoo

diffusers = pytest.importorskip("diffusers")

WINDOW = 'match "^attn" when t > 0 every 2 -> reuse'


class Small(nn.Module):
    """One attention-like module between a picture and its prediction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor | None = None) -> Tensor:
        """Add what the module makes of `x`."""
        return x + self.attn(x) + (0 if context is None else context.mean())


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_run_that_loses_its_state_keeps_the_time() -> None:
    """After a reset in the middle, as for a denoiser that takes over late, the step goes on from the scheduler's."""
    scheduler = diffusers.UniPCMultistepScheduler()
    first = Small()
    scheduler.set_timesteps(8)
    with cachepolicy.apply(first, cachepolicy.parse(WINDOW), scheduler=scheduler) as run:
        x = torch.randn(1, 8)
        for index, t in enumerate(scheduler.timesteps):
            if index == 3:
                run.reset()
            x = scheduler.step(first(x, t.expand(1)), t, x).prev_sample
        assert run.trace is not None
        seen = [(call.tick.step, call.tick.t) for trajectory in run.trace for call in trajectory.calls]
    assert seen == list(enumerate(float(t) for t in scheduler.timesteps))


def test_guidance_in_two_calls_without_names_is_no_guidance_batch() -> None:
    """Two prompts, two calls a step: nothing is halved, so that no picture is made from another."""
    name = "wan"
    model, one = zoo.build(name), zoo.entry(name)
    policy = cachepolicy.load("fastercache")
    rows = list[int]()
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    with cachepolicy.apply(model, policy, guidance=True):
        for t in (600.0, 500.0, 400.0, 300.0):
            for seed in (0, 1):
                model(**one.inputs(batch=2, t=t, seed=seed))
    assert rows == [2] * 8


def test_tiles_of_one_scheduler_step_keep_their_own_histories() -> None:
    """The same conditioning with other latents, before the scheduler has stepped, is a branch and not a step."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(6)
    model, context = Small(), torch.randn(1, 4)
    tiles = [torch.randn(1, 8), torch.randn(1, 8)]
    with cachepolicy.apply(model, cachepolicy.parse(WINDOW), scheduler=scheduler) as run:
        for t in scheduler.timesteps:
            for tile in tiles:
                out = model(tile, t.expand(1), context)
                kept = model.attn[0](tile).tanh()
                torch.testing.assert_close(out, tile + kept + context.mean())
            scheduler.step(out, t, tiles[-1])
        assert run.trace is not None
        assert run.trace.last is not None
        assert len(run.trace.last.branches) == 2


def test_a_late_leader_is_found_by_name() -> None:
    """Two rules may follow two branches."""
    policy = cachepolicy.parse(
        "match attention every 2 -> reuse follow a\nmatch feedforward every 2 -> reuse follow b\n"
    )
    rows = cachepolicy.simulate(policy, steps=4, branches=("a", "b", "c")).rows_of("c")
    assert set(rows.values()) == {"CRCR"}


@pytest.mark.parametrize(
    "wrong", [{"timestep": 5}, {"steps": 0}, {"steps": "x"}, {"guidance": "yes"}, {"samples": "all"}]
)
def test_arguments_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    """Before anything is attached."""
    model = Small()
    with pytest.raises(cachepolicy.PolicyError, match="E309"):
        cachepolicy.apply(model, cachepolicy.parse(WINDOW), **wrong)
    assert type(model) is Small


def test_a_batch_may_be_judged_by_its_worst_sample() -> None:
    """By default one still sample hides another that moves; with `samples="max"` it does not."""
    text = (
        'signal x = input(model)\nsignal drift = relative_l1(x, kept(x))\nmatch "^attn" while drift < 0.35 -> reuse\n'
    )
    still, moving = torch.ones(1, 8), torch.ones(1, 8)
    for samples, row in (("mean", "CRRR"), ("max", "CRCR")):
        with cachepolicy.apply(Small(), cachepolicy.parse(text), samples=samples) as run:
            for step in range(4):
                batch = torch.cat([still, moving * (1 + 0.2 * step)])
                run.target(batch, torch.tensor(900.0 - 100 * step))
            assert run.trace is not None
            assert run.trace.rows()["attn"] == row
