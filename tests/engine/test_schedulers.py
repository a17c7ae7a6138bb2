"""The clock follows the scheduler wherever its loop takes it: set back, stepped by rows, replaced, started late."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cachepolicy
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.language.parser import parse
from tests.support.linear_root import Root, scheduler_of
from tests.support.tiny_pipelines import STEPS, Tiny, cosmos_text_to_world, cosmos_video_to_world, flux, normal, unet_sd

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

EVERY_2 = "match attention when step > 0 every 2 -> reuse"
PAIR = 'match "lin" when t < 2000 every 2 -> reuse'


def clock_of(run: Any) -> list[list[tuple[int, float | None]]]:
    """Step and timestep of each call on the first branch, by trajectory."""
    return [[(call.tick.step, call.tick.t) for call in each.calls if call.tick.branch == ""] for each in run.trace]


# --- stepped more than once for a timestep ---------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("make", [cosmos_text_to_world, cosmos_video_to_world])
def test_a_scheduler_that_is_set_back_is_at_its_own_step(make: Callable[[], Tiny], guided: bool) -> None:
    """Cosmos steps for the clean sample, sets `_step_index` back and steps again: one step, at the scheduler's t."""
    tiny = make()
    with cachepolicy.apply(tiny.pipe, parse(EVERY_2)) as run:
        tiny(guidance_scale=7.0 if guided else 1.0)
        expected = list(enumerate(tiny.timesteps))
        assert [expected] == clock_of(run)
        assert {STEPS} == {call.tick.steps for call in run.trace.last.calls}
        assert (2 if guided else 1) * STEPS == len(run.trace.last.calls)


INDEXED = ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
PLAIN = ["DDIMScheduler", "DDPMScheduler"]


@pytest.mark.parametrize("name", INDEXED + PLAIN)
@given(times=st.lists(st.integers(1, 3), min_size=1, max_size=6), told=st.booleans())
def test_a_timestep_is_one_step_however_often_it_is_stepped(name: str, times: list[int], told: bool) -> None:
    """A loop may step each row of its batch by itself, or step again after setting the scheduler back."""
    root, scheduler = Root(), scheduler_of(name, len(times))
    with torch.no_grad(), cachepolicy.apply(root, parse(PAIR), scheduler=scheduler) as run:
        for t, count in zip(scheduler.timesteps, times, strict=True):
            x = torch.zeros(3, 2)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            noise = root(x, t if told else None)
            for row in range(count):
                if row and hasattr(scheduler, "_step_index"):
                    scheduler._step_index -= 1
                scheduler.step(noise[row : row + 1], t, x[row : row + 1])
        assert [list(enumerate(scheduler.timesteps.tolist()))] == clock_of(run)


@pytest.mark.parametrize("name", INDEXED + PLAIN)
def test_a_loop_may_skip_the_scheduler_at_some_timesteps(name: str) -> None:
    """Rows that are finished are not stepped; the clock goes on with the timestep that the model is called with."""
    root, scheduler = Root(), scheduler_of(name, 6)
    x = torch.zeros(1, 2)
    with torch.no_grad(), cachepolicy.apply(root, parse(PAIR), scheduler=scheduler) as run:
        for step, t in enumerate(scheduler.timesteps):
            noise = root(x, t)
            if step not in {1, 3, 4}:
                scheduler.step(noise, t, x)
    assert list(range(6)) == [step for step, _ in clock_of(run)[0]]
    if name in PLAIN:
        assert [list(enumerate(scheduler.timesteps.tolist()))] == clock_of(run)


@pytest.mark.parametrize("name", [*INDEXED, "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_tiles_that_restore_the_scheduler_are_of_one_step(name: str) -> None:
    """A loop over tiles puts the scheduler's `__dict__` back before each tile, as panoramas do."""
    root, scheduler = Root(), scheduler_of(name, 4)
    tiles = torch.randn(3, 1, 32, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), cachepolicy.apply(root, parse(PAIR), scheduler=scheduler) as run:
        # The attached run is part of what is put back.
        status = [copy.deepcopy(scheduler.__dict__) for _ in tiles]
        for t in scheduler.timesteps:
            for place, tile in enumerate(tiles):
                scheduler.__dict__.update(status[place])
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(tile, t)
                scheduler.step(root(tile, t), t, tile)
                status[place] = copy.deepcopy(scheduler.__dict__)
        steps = [[call.tick.step for call in each.calls] for each in run.trace]
    assert [[step for step in range(len(scheduler.timesteps)) for _ in tiles]] == steps


# --- where a trajectory begins ---------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("name", INDEXED)
def test_a_late_start_is_found_from_the_scheduler(name: str, announced: bool) -> None:
    """Image to image without a timestep argument: the scheduler's first step tells where the loop began."""
    root, scheduler = Root(), scheduler_of(name, 10)
    late, x = scheduler.timesteps[6:], torch.zeros(1, 2)
    if announced:
        scheduler.set_begin_index(6)
    with torch.no_grad(), cachepolicy.apply(root, parse('match "lin" every 2 -> reuse'), scheduler=scheduler) as run:
        for t in late:
            x = scheduler.step(root(x), t, x).prev_sample
    known = list(enumerate(late.tolist()))
    assert known[not announced :] == clock_of(run)[0][not announced :]
    assert {4} == {call.tick.steps for call in run.trace.last.calls[1:]}


@pytest.mark.parametrize(
    "kind",
    [
        "DDIMScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("strength", [0.4, 0.8])
def test_image_to_image_counts_from_its_strength(kind: str, strength: float) -> None:
    """A real pipeline starts within the timesteps, first and second order: every model call has the t of its own."""
    tiny = unet_sd(getattr(diffusers, kind)())
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny.pipe.components, requires_safety_checker=False)
    arguments = {name: value for name, value in tiny.arguments.items() if name not in ("height", "width")}
    arguments |= {"image": normal(1, 4, 8, 8), "strength": strength, "num_inference_steps": 9}
    late, seen = Tiny(pipe, arguments), list[float]()
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    late()
    hook.remove()
    with cachepolicy.apply(pipe, parse(EVERY_2)) as run:
        late()
        late()
        assert [list(enumerate(seen))] * 2 == clock_of(run)
        assert {len(seen)} == {call.tick.steps for each in run.trace for call in each.calls}


def test_a_scheduler_that_goes_back_starts_a_trajectory() -> None:
    """A loop that is given up and run again on the same timesteps, without `set_timesteps`, is a new one."""
    root, scheduler = Root(), scheduler_of("EulerDiscreteScheduler", 6)
    x = torch.zeros(1, 2)
    with torch.no_grad(), cachepolicy.apply(root, parse('match "lin" every 2 -> reuse'), scheduler=scheduler) as run:
        for count in (4, 6):
            scheduler._step_index = None
            for t in itertools.islice(scheduler.timesteps, count):
                scheduler.scale_model_input(x, t)
                scheduler.step(root(x), t, x)
        assert [list(range(4)), list(range(6))] == [[step for step, _ in each] for each in clock_of(run)]
        assert ["CRCR", "CRCRCR"] == [each.rows()["lin"] for each in run.trace]


# --- a scheduler that is replaced ------------------------------------------------------------------------


def replaced(tiny: Tiny, at: int, make: Callable[[], Any]) -> tuple[list[Any], Tensor]:
    """Call a pipeline whose callback replaces the scheduler after step `at`. Returns the schedulers and the latents."""
    used = [tiny.pipe.scheduler]

    def callback(pipe: Any, step: int, t: Any, told: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            pipe.scheduler = make()
            used.append(pipe.scheduler)
        return {}

    return used, tiny(callback_on_step_end=callback)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_scheduler_of_the_same_timesteps_takes_over(at: int) -> None:
    """A callback swaps the solver in mid-call: the trajectory, its steps and its histories go on."""
    tiny = unet_sd(diffusers.DDIMScheduler())

    def other() -> Any:
        made = diffusers.DDIMParallelScheduler.from_config(tiny.pipe.scheduler.config)
        made.set_timesteps(STEPS)
        made.timesteps = tiny.pipe.scheduler.timesteps.clone()
        return made

    with cachepolicy.apply(tiny.pipe, parse(EVERY_2)) as run:
        tiny()
        expected, kind = clock_of(run)[-1], type(tiny.pipe.scheduler)
        (first, second), _ = replaced(tiny, at, other)
        assert expected == clock_of(run)[-1]
        assert 2 == len(run.trace)
    assert kind is not type(first)
    assert {"_cachepolicy"} & {*first.__dict__, *second.__dict__} == set()


def test_a_scheduler_of_other_timesteps_takes_over_where_they_meet() -> None:
    """The steps go on from where they were, and their number is that of both schedulers together."""
    tiny = unet_sd(diffusers.DDIMScheduler())

    def other() -> Any:
        made = diffusers.DDIMScheduler.from_config(tiny.pipe.scheduler.config)
        made.set_timesteps(2 * STEPS)
        # The loop goes on with the timesteps of the first scheduler.
        made.timesteps = torch.tensor([900, 800, *tiny.pipe.scheduler.timesteps.tolist()])
        return made

    with cachepolicy.apply(tiny.pipe, parse(EVERY_2)) as run:
        replaced(tiny, 2, other)
        assert [list(enumerate(tiny.timesteps[2:]))] == clock_of(run)
        assert {STEPS} == {call.tick.steps for call in run.trace.last.calls}


def test_a_scheduler_that_knows_nothing_of_the_present_timestep_is_told_of() -> None:
    """W603: the trajectory begins anew, and not silently."""
    tiny = unet_sd(diffusers.DDIMScheduler())

    def other() -> Any:
        made = diffusers.DDIMScheduler.from_config(tiny.pipe.scheduler.config)
        made.set_timesteps(2)
        made.timesteps = torch.tensor([999, 998])
        return made

    with cachepolicy.apply(tiny.pipe, parse(EVERY_2)) as run, pytest.warns(UserWarning, match="W603"):
        replaced(tiny, 2, other)
        assert 1 < len(run.trace)


def test_followers_never_share_a_generation() -> None:
    """Two schedulers that were restarted equally often are told apart."""
    one, two = SchedulerFollower(), SchedulerFollower()
    seen = {one.generation, two.generation}
    one.restart()
    two.restart()
    assert 4 == len(seen | {one.generation, two.generation})


def test_finding_the_timestep_reads_no_device() -> None:
    """An element of the scheduler's timesteps is known by its place in them, not by its value."""
    scheduler, follower = scheduler_of("DDIMScheduler", 8), SchedulerFollower()
    scheduler.timesteps = scheduler.timesteps.to("meta")
    follower._source, follower._numbers, follower.begin = scheduler.timesteps, ([float(n) for n in range(8)], None), 0
    for index, t in enumerate(scheduler.timesteps):
        follower.stepped(scheduler, t)
        follower.stepped(scheduler, t)
        assert (index + 1, True) == follower.index(scheduler)


def test_flux_with_a_replaced_scheduler_is_flux() -> None:
    """A new scheduler object of the same kind changes nothing, decisions and latents."""
    tiny = flux()

    def same() -> Any:
        made = copy.deepcopy(tiny.pipe.scheduler)
        assert "_cachepolicy" not in made.__dict__
        return made

    with cachepolicy.apply(tiny.pipe, parse(EVERY_2)) as run:
        expected = tiny()
        _, got = replaced(tiny, 2, same)
        rows = [each.rows() for each in run.trace]
        assert rows[0] == rows[1]
    assert torch.equal(expected, got)
