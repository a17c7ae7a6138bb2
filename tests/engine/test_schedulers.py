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
from cachepolicy.diffusers.timestep_scaling import training_units
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from tests.support import zoo
from tests.support.linear_root import Root, scheduler_of
from tests.support.tiny_pipelines import (
    NO_ENCODERS,
    STEPS,
    Tiny,
    cosmos_text_to_world,
    cosmos_video_to_world,
    flux,
    normal,
    unet_sd,
)

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

EVERY_2 = "match attention when step > 0 every 2 -> reuse"
PAIR = 'match "lin" when t < 2000 every 2 -> reuse'


def clock_of(run: Any) -> list[list[tuple[int, float | None]]]:
    """Step and timestep of each call on the first branch, by trajectory."""
    return [[(call.tick.step, call.tick.t) for call in each.calls if call.tick.branch == ""] for each in run.trace]


# --- the unit and the number of the timesteps ------------------------------------------------------------


def looped(scheduler: Any, policy: str, *, last: int | None = None) -> Any:
    """The run of a loop over the scheduler's timesteps, up to `last`."""
    root, x = Root(), normal(1, 2)
    with torch.no_grad(), cachepolicy.apply(root, parse(policy), scheduler=scheduler) as run:
        for t in scheduler.timesteps[:last]:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            # Wuerstchen's has no index of its own, and wants a timestep for each sample.
            shown = t if hasattr(scheduler, "step_index") else t.expand(1)
            x = scheduler.step(root(scaled, t), shown, x, return_dict=False)[0]
    return run


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("DDPMWuerstchenScheduler", {}, {"num_inference_steps": 4}),
        ("IPNDMScheduler", {}, {"num_inference_steps": 4}),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1}, {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
    ],
)
def test_fractions_of_a_scheduler_are_in_training_units(name: str, settings: Any, told: Any) -> None:
    """A scheduler may count from 1 to 0; `t` is 1000 to 0 all the same, and the steps are found."""
    scheduler = getattr(diffusers.schedulers, name)(**settings)
    scheduler.set_timesteps(**told)
    expected = [(step, pytest.approx(1000.0 * float(t))) for step, t in enumerate(scheduler.timesteps[:-1])]
    assert [expected] == clock_of(looped(scheduler, PAIR, last=-1))
    assert 1000.0 == pytest.approx(expected[0][1].expected)


@pytest.mark.parametrize("training", [1, 1000])
def test_an_inverted_schedule_counts_the_picture(training: int) -> None:
    """Under `invert_sigmas`, as Mochi has it, the timesteps rise from noise; `t` falls from 1000."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=training, invert_sigmas=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert [[(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]] == [
        [(step, pytest.approx(t, abs=1e-3)) for step, t in each] for each in clock_of(looped(scheduler, PAIR))
    ]


def test_rising_fractions_count_the_picture_unless_the_noise_rises() -> None:
    """A schedule from 0 to 1 begins at noise, as MiniMax' has it; where its sigmas rise, it goes to the noise."""
    rising, noise = [0.0, 0.25, 0.5, 0.75], [1000.0, 750.0, 500.0, 250.0]
    assert noise == training_units(object, rising)
    assert noise == training_units(object, rising, [1.0, 0.75, 0.5, 0.25, 0.0])
    assert [0.0, 250.0, 500.0, 750.0] == training_units(object, rising, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert noise == training_units(object, rising, [0.0, 0.25, 0.5, 0.75, 1.0], inverted=True)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "CMStochasticIterativeScheduler"])
def test_timesteps_of_a_scheduler_in_no_unit_are_refused(name: str) -> None:
    """Logarithms of noise levels cannot be converted: a policy that reads `t` is refused, another one runs."""
    with pytest.raises(PolicyError, match="E321") as caught:
        looped(scheduler_of(name, 4), PAIR)
    assert "`sigma`" in (caught.value.diagnostics[0].help or "")
    run = looped(scheduler_of(name, 4), 'match "lin" every 2 -> reuse')
    assert [0, 1, 2, 3] == [step for step, _ in clock_of(run)[0]]


def _with_end(name: str) -> Any:
    scheduler = getattr(diffusers.schedulers, name)()
    told: dict[str, Any] = {
        "SCMScheduler": {"num_inference_steps": 4, "intermediate_timesteps": None},
        "DDPMWuerstchenScheduler": {"num_inference_steps": 4},
        "LTXEulerAncestralRFScheduler": {"sigmas": [1.0, 0.75, 0.5, 0.25, 0.0]},
    }[name]
    scheduler.set_timesteps(**told)
    return scheduler


@pytest.mark.parametrize("name", ["SCMScheduler", "DDPMWuerstchenScheduler", "LTXEulerAncestralRFScheduler"])
def test_the_end_of_the_last_step_is_no_step(name: str) -> None:
    """Schedulers that list the clean sample have one step less than timesteps, and the last step is the last."""
    run = looped(_with_end(name), 'match "lin" when step >= steps - 2 -> reuse', last=-1)
    calls = run.trace.last.calls
    assert [4] * 4 == [call.tick.steps for call in calls]
    assert ["compute", "compute", "reuse", "reuse"] == [call.decisions[0].verdict for call in calls]
    ts = [call.tick.t for call in calls]
    assert sorted(ts, reverse=True) == ts
    assert ts[0] == pytest.approx(1000.0, abs=1.0)
    assert ts[-1] == pytest.approx(250.0, abs=50.0)


def test_a_tuned_schedule_has_no_step_at_its_end() -> None:
    """A policy that was tuned over four steps knows a late start among four steps and five timesteps."""
    scheduler = _with_end("SCMScheduler")
    scheduler.set_begin_index(2)
    root, x = Root(), normal(1, 2)
    policy = 'match "lin" on {0, 1, 2} -> reuse\ntuned over 4 steps'
    with torch.no_grad(), cachepolicy.apply(root, parse(policy), scheduler=scheduler) as run:
        with pytest.warns(UserWarning, match="W615"):
            for t in scheduler.timesteps[2:-1]:
                x = scheduler.step(root(x, t), t, x, return_dict=False)[0]
        assert [(2, 4), (3, 4)] == [(call.tick.step, call.tick.steps) for call in run.trace.last.calls]


class LongVideo(diffusers.LTXI2VLongMultiPromptPipeline):
    """The pipeline without a text encoder."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return normal(1, 5, 16), torch.ones(1, 5), normal(1, 5, 16, seed=2), torch.ones(1, 5)


@pytest.mark.parametrize("sigmas", [None, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]], ids=["its own", "told"])
def test_a_long_video_leaves_out_the_last_timestep(sigmas: list[float] | None) -> None:
    """LTX's loop over windows calls the model at all timesteps but the last, whatever that one is."""
    scheduler = diffusers.schedulers.LTXEulerAncestralRFScheduler()
    pipe = LongVideo(transformer=zoo.build("ltx"), scheduler=scheduler, **NO_ENCODERS)
    told = {"prompt": "", "height": 32, "width": 32, "num_frames": 49, "temporal_tile_size": 32, "temporal_overlap": 8}
    tiny = Tiny(pipe, told)
    with cachepolicy.apply(tiny.pipe, parse("match blocks when step >= steps - 1 -> reuse residual")) as run:
        tiny(sigmas=sigmas)
        windows = [["".join("RC"[call.decisions[0].computes] for call in each.calls)] for each in run.trace]
        assert [["CCCCR"]] * 2 == windows
        assert {STEPS - 1} == {call.tick.steps for each in run.trace for call in each.calls}


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
