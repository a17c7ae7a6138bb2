"""Branches: whatever calls come and go, an answer is only ever given from a history of the same branch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.language.parser import parse

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

ALWAYS = parse("match attention -> reuse")
EVERY_2 = parse("match attention every 2 -> reuse")
WIDTH = 64


class Attention(nn.Module):
    """A site whose output says what it was computed from; `times` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Identity()
        self.times = 0

    def forward(self, seen: Tensor) -> Tensor:
        self.times += 1
        return seen.clone()


class Telling(nn.Module):
    """A denoiser that gives the conditioning, or the latents, that its attention was last computed from."""

    def __init__(self, *, by_latents: bool = False) -> None:
        super().__init__()
        self.attn = Attention()
        self.by_latents = by_latents

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        yield

    def forward(self, x: Tensor, timestep: Any = None, y: Any = None, **rest: Any) -> Tensor:
        return self.attn(x if self.by_latents else y)


def prompt(branch: int) -> Tensor:
    return torch.arange(WIDTH).reshape(1, WIDTH) / WIDTH + branch


def number(value: float) -> Tensor:
    """A time by another name."""
    return torch.full((1, WIDTH), float(value))


def noise(seed: int) -> Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))


def scheduler(name: str = "DDIMScheduler", steps: int = 6) -> Any:
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, name)()
    made.set_timesteps(steps)
    return made


STEPS = st.lists(st.lists(st.integers(0, 3), unique=True, max_size=4), min_size=1, max_size=8)
"""Which branches are called at each step, in which order."""

KINDS = ("same objects", "fresh", "fresh with changing")


def conditioning(kind: str, branch: int, prompts: Sequence[Tensor], step: int) -> dict[str, Any]:
    """The prompt as the same tensor at every step, as a new one, and with something beside it that changes."""
    given_prompt = prompts[branch] if kind == "same objects" else prompts[branch].clone()
    rest = {"extra": number(100.0 * step + branch)} if kind == "fresh with changing" else {}
    return {"y": given_prompt, **rest}


@given(STEPS, st.sampled_from(KINDS), st.booleans(), st.sampled_from(["argument", "scheduler"]))
def test_branches_that_come_and_go_never_mix(steps: list[list[int]], kind: str, named: bool, clock: str) -> None:
    """Guidance on intervals, in any order, with lasting and with fresh conditioning: no answer is another branch's."""
    model, prompts = Telling(), [prompt(branch) for branch in range(4)]
    own = scheduler(steps=len(steps)) if clock == "scheduler" else None
    timesteps = own.timesteps if own is not None else torch.linspace(950.0, 50.0, len(steps))
    x = noise(0)
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own):
        for step, (t, called) in enumerate(zip(timesteps, steps, strict=True)):
            for branch in called:
                with model.cache_context(str(branch)) if named else contextlib.nullcontext():
                    got = model(x, t, **conditioning(kind, branch, prompts, step))
                assert torch.equal(prompts[branch], got), (step, branch)
            if own is not None:
                own.step(x, t, x)


@given(st.lists(st.sampled_from([[0], [0, 1], [1, 0]]), min_size=1, max_size=8), st.booleans())
def test_branches_reuse_as_in_models_of_their_own(steps: list[list[int]], lasting: bool) -> None:
    """Guidance on any steps: each branch computes as often as in a model that has this branch alone."""
    model, alone = Telling(), [Telling(), Telling()]
    prompts = [prompt(0), prompt(1)]
    own = scheduler(steps=len(steps))
    x, expected = noise(0), 0
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(cachepolicy.apply(model, ALWAYS, scheduler=own))
        for each in alone:
            stack.enter_context(cachepolicy.apply(each, ALWAYS, scheduler=own))
        for t, called in zip(own.timesteps, steps, strict=True):
            for branch in called:
                y = prompts[branch] if lasting else prompts[branch].clone()
                alone[branch](x, t, prompts[branch])
                assert torch.equal(prompts[branch], model(x, t, y))
            own.step(x, t, x)
        expected = sum(each.attn.times for each in alone)
    assert expected == model.attn.times


@given(
    st.lists(st.lists(st.integers(0, 2), unique=True, max_size=3), min_size=1, max_size=8),
    st.sampled_from(["", "cond"]),
    st.sampled_from(["argument", "scheduler"]),
)
def test_tiles_that_come_and_go_never_mix(steps: list[list[int]], name: str, clock: str) -> None:
    """One conditioning, other latents: each tile is answered from itself, though some steps leave some out."""
    model, y = Telling(by_latents=True), prompt(0)
    tiles = [noise(seed) for seed in range(3)]
    own = scheduler(steps=len(steps)) if clock == "scheduler" else None
    timesteps = own.timesteps if own is not None else torch.linspace(950.0, 50.0, len(steps))
    seen = set[int]()
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own):
        for step, (t, called) in enumerate(zip(timesteps, steps, strict=True)):
            # A tile that was alone so far is taken for the one branch there is; nothing tells another from it.
            alone = len(seen) < 2
            first = seen if alone and called and called[0] not in seen else set[int]()
            for tile in dict.fromkeys([*first, *called]):
                with model.cache_context(name) if name else contextlib.nullcontext():
                    got = model(tiles[tile] + 0.01 * step, t, y)
                nearest = min(range(3), key=lambda other: float((got - tiles[other]).abs().mean()))
                assert tile == nearest, (step, tile)
                seen.add(tile)
            if own is not None:
                own.step(y, t, y)


def test_tiles_reuse_their_own_histories_on_a_bare_model() -> None:
    """Tiles of one step are told from the stages of a second-order sampler by their latents."""
    model, y = Telling(by_latents=True), prompt(0)
    tiles = [noise(seed) for seed in range(3)]
    with torch.no_grad(), cachepolicy.apply(model, EVERY_2) as run:
        for step in range(6):
            for tile in tiles:
                model(tile + 0.01 * step, 900.0 - 100 * step, y)
        assert ("", "1", "2") == run.trace.last.branches
        for branch in run.trace.last.branches:
            assert {"attn": "CRCRCR"} == run.trace.rows(branch)


def test_latents_that_do_not_tell_compute() -> None:
    """Two calls a step with the same conditioning and the same latents: nothing tells which is which."""
    model, y, own = Telling(), prompt(0), scheduler()
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own) as run:
        for t in own.timesteps:
            for _ in range(2):
                model(noise(0), t, y)
            own.step(noise(0), t, noise(0))
        assert 12 == model.attn.times
        facts = {fact for call in run.trace.last.calls for fact in call.facts.values()}
        assert facts == {"nothing tells which branch this is"}


@pytest.mark.parametrize("first", ["cond", "uncond"])
@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("interval", [range(6), range(1, 6), range(2, 6), range(3), range(2, 4), range(1)])
def test_a_guidance_interval_leaves_the_conditional_branch_alone(first: str, lasting: bool, interval: range) -> None:
    """Guidance that starts late, stops early or both: the conditional calls go as without it."""
    model, own, alone = Telling(), scheduler(), Telling()
    prompts = {"cond": prompt(1), "uncond": prompt(0)}
    order = ["cond", "uncond"] if first == "cond" else ["uncond", "cond"]
    x, row = noise(0), ""
    with (
        torch.no_grad(),
        cachepolicy.apply(model, EVERY_2, scheduler=own),
        cachepolicy.apply(alone, EVERY_2, scheduler=own) as reference,
    ):
        for step, t in enumerate(own.timesteps):
            alone(x, t, prompts["cond"])
            for half in order if step in interval else ["cond"]:
                before = model.attn.times
                y = prompts[half] if lasting else prompts[half].clone()
                assert torch.equal(prompts[half], model(x, t, y))
                if half == "cond":
                    row += "C" if model.attn.times > before else "R"
            own.step(x, t, x)
        assert reference.trace.rows()["attn"] == row


def test_a_change_of_prompt_part_way_computes() -> None:
    """What was kept of one prompt does not answer another, though it comes in its place."""
    model, own = Telling(), scheduler()
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own):
        for step, t in enumerate(own.timesteps):
            assert torch.equal(prompt(step // 3), model(noise(0), t, prompt(step // 3)))
            own.step(noise(0), t, noise(0))
    assert 2 == model.attn.times


def test_a_buffer_that_is_written_anew_for_each_branch() -> None:
    """The same tensor with other values in it is another conditioning; what it was before is not known any more."""
    model, own, buffer = Telling(), scheduler(), torch.zeros(1, WIDTH)
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own):
        for t in own.timesteps:
            for branch in (1, 2):
                buffer.copy_(prompt(branch))
                assert torch.equal(prompt(branch), model(noise(0), t, buffer))
            own.step(noise(0), t, noise(0))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("controlnet_block_samples", prompt, "CRRRRR"),  # known by its name to be made anew at each step
        ("log_snr", number, "CCRRRR"),  # a number that changes is a time, once that is seen
        ("guidance", float, "CCRRRR"),
        ("extra", prompt, "CCCCCC"),  # anything else could be what tells another branch
    ],
)
def test_what_changes_at_every_step(name: str, value: Any, expected: str) -> None:
    """It makes no branch of its own; a history is used where it is known to be one branch's."""
    model, own, y = Telling(), scheduler(), prompt(0)
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own) as run:
        for step, t in enumerate(own.timesteps):
            model(noise(0), t, y, **{name: value(step)})
            own.step(noise(0), t, noise(0))
        assert ("",) == run.trace.last.branches
        assert expected == run.trace.rows()["attn"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_prompts_that_take_turns_never_mix(order: list[int], lasting: bool, beside: bool) -> None:
    """One call a step, with one of several prompts and with something that is the same for all."""
    model, own, mask = Telling(), scheduler(steps=len(order)), torch.ones(1, WIDTH)
    prompts = [prompt(branch) for branch in range(4)]
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own):
        for t, branch in zip(own.timesteps, order, strict=True):
            y = prompts[branch] if lasting else prompts[branch].clone()
            got = model(noise(0), t, y, **({"mask": mask} if beside else {}))
            assert torch.equal(prompts[branch], got)
            own.step(noise(0), t, noise(0))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("kind", [prompt, number])
def test_conditioning_that_changes_altogether(named: bool, branches: int, kind: Any) -> None:
    """Of numbers one call a step is one branch; of anything else, and of two branches, only names tell."""
    model, own = Telling(), scheduler()
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS, scheduler=own) as run:
        for step, t in enumerate(own.timesteps):
            for branch in range(branches):
                with model.cache_context("ab"[branch]) if named else contextlib.nullcontext():
                    got = model(noise(0), t, kind(100 * branch + step))
                assert branch == got[0, 0] // 100
            own.step(noise(0), t, noise(0))
        row = "".join(call.decisions[0].letter for call in run.trace.last.calls)
    if named:
        assert "C" * branches + "R" * 5 * branches == row
    else:
        assert ("CCRRRR" if (kind, branches) == (number, 1) else "C" * 6 * branches) == row


def test_another_picture_without_a_clock_is_another_trajectory() -> None:
    """A model without a timestep: noise that has nothing to do with the last latents begins anew."""
    model, y = Telling(by_latents=True), prompt(0)
    with torch.no_grad(), cachepolicy.apply(model, ALWAYS) as run:
        for seed in range(3):
            for step in range(4):
                got = model(noise(seed) * (1 - 0.2 * step), None, y)
                assert torch.equal(noise(seed), got)
        assert [4, 4, 4] == [len(each.calls) for each in run.trace]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lasting", [True, False])
def test_samplers_that_call_twice_at_one_timestep(name: str, known: bool, lasting: bool) -> None:
    """Two branches under a second-order sampler, its scheduler known or not: the steps are the scheduler's."""
    own, model = scheduler(name), Telling()
    prompts = [prompt(0), prompt(1)]
    x = noise(0) * float(getattr(own, "init_noise_sigma", 1.0))
    with torch.no_grad(), cachepolicy.apply(model, EVERY_2, scheduler=own if known else None) as run:
        for t in own.timesteps:
            scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
            for branch in range(2):
                y = prompts[branch] if lasting else prompts[branch].clone()
                assert torch.equal(prompts[branch], model(scaled, t, y))
            x = own.step(0.1 * scaled, t, x).prev_sample
        calls = [(call.tick.step, call.tick.branch) for each in run.trace for call in each.calls]
    assert [(step, branch) for step in range(len(own.timesteps)) for branch in ("", "1")] == calls
