"""Several pipelines over one attached denoiser, as servers make them for each request."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch

import cachepolicy
from cachepolicy.engine.scheduler_hook import Weakly, follow, unfollow
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from tests.support.tiny_pipelines import Tiny, flux, normal, sd3, unet_sd, wan22

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

STEPPED = "param every_n: int = 3 in [1, inf)\nmatch attention when progress > 0 every every_n from end -> reuse"


def request(tiny: Tiny, number: int, run: Any = None) -> Tiny:
    """The same models in a pipeline of its own, with a scheduler of its own and another prompt."""
    scheduler = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config)
    if run is not None:
        pipe = run.share(scheduler=scheduler)
    else:
        pipe = type(tiny.pipe).from_pipe(tiny.pipe, scheduler=scheduler)
    prompt = {"prompt_embeds": normal(*tiny.arguments["prompt_embeds"].shape, seed=10 + number)}
    return Tiny(pipe, {**tiny.arguments, **prompt, "num_inference_steps": 4 + number}, tiny.branches, tiny.denoisers)


@pytest.mark.parametrize("make", [flux, sd3, wan22])
def test_pipelines_over_one_denoiser_run_at_once(make: Any) -> None:
    """Threads, each with a pipeline of its own, other steps and other params: each is as alone, with its own clock."""
    tiny = make()
    expected = list[torch.Tensor]()
    for number in range(3):
        mine = request(tiny, number)
        with cachepolicy.apply(mine.pipe, parse(STEPPED), every_n=2 + number):
            expected.append(mine())
    with cachepolicy.apply(tiny.pipe, parse(STEPPED)) as run, ThreadPoolExecutor(3) as pool:

        def serve(key: int) -> bool:
            number = key % 3
            with run.session(key, every_n=2 + number):
                return torch.equal(expected[number], request(tiny, number, run)())

        assert [True] * 9 == list(pool.map(serve, range(9)))
        steps = {(each.session % 3, call.tick.steps) for each in run.trace for call in each.calls}
        assert {(number, 4 + number) for number in range(3)} >= steps
        assert () == run._sessions.keys


def test_a_followed_pipeline_is_not_kept_alive() -> None:
    """Requests come and go: neither their pipelines nor their schedulers stay; those that do are given back."""
    tiny = flux()
    with cachepolicy.apply(tiny.pipe, parse(STEPPED)) as run:
        gone = list[Any]()
        for number in range(3):
            mine = request(tiny, number, run)
            mine()
            gone += [weakref.ref(mine.pipe), weakref.ref(mine.pipe.scheduler)]
            del mine
        gc.collect()
        assert [None] * 6 == [each() for each in gone]
        assert 2 >= len(run._attachment.pipelines._references)
        stays = request(tiny, 4, run)
        assert run.follow(stays.pipe) is stays.pipe
        stays()
    for each in (stays.pipe, stays.pipe.scheduler):
        assert "_cachepolicy" not in each.__dict__
    assert type(tiny.pipe) is type(stays.pipe)
    assert torch.equal(stays(), stays())


def test_pipelines_that_do_not_share_are_refused() -> None:
    """E315 without a denoiser of the run, E301 with another run, E300 for no pipeline, E303 once it was replaced."""
    tiny, other = flux(), flux()
    with cachepolicy.apply(tiny.pipe, parse(STEPPED)) as run:
        with pytest.raises(PolicyError, match="E315"):
            run.follow(other.pipe)
        with pytest.raises(PolicyError, match="E300"):
            run.follow(tiny.pipe.transformer)
        with cachepolicy.apply(other.pipe, parse(STEPPED)), pytest.raises(PolicyError, match="E301"):
            run.follow(other.pipe)
        mine = request(tiny, 0, run)
        mine.pipe.transformer = other.pipe.transformer
        with pytest.raises(PolicyError, match="E303"):
            mine()
    with pytest.raises(PolicyError, match="E302"):
        run.follow(mine.pipe)


def test_two_runs_may_follow_one_scheduler() -> None:
    """Two models attached by themselves: both read the scheduler that they share, and the last one gives it back."""
    one, two = unet_sd(), unet_sd()
    scheduler = one.pipe.scheduler
    kind = type(scheduler)
    two.pipe.scheduler = scheduler
    text = parse("match attention when progress > 0 every 2 -> reuse")
    first = cachepolicy.apply(one.pipe.unet, text, scheduler=scheduler)
    second = cachepolicy.apply(two.pipe.unet, text, scheduler=scheduler)
    one()
    two()
    first.remove()
    assert "_cachepolicy" in scheduler.__dict__
    two()
    rows = [next(iter(each.rows().values())) for each in second.trace]
    assert 2 == len(rows)
    assert rows[0] == rows[1]
    second.remove()
    assert kind is type(scheduler)
    assert "_cachepolicy" not in scheduler.__dict__


def test_a_shared_pipeline_may_be_of_another_class() -> None:
    """Image to image over the same UNet, with its scheduler as its clock; the models are neither cast nor moved."""
    import diffusers

    tiny = unet_sd(diffusers.DDIMScheduler())
    kind = diffusers.StableDiffusionImg2ImgPipeline
    told = {name: value for name, value in tiny.arguments.items() if name not in ("height", "width")}
    told |= {"image": normal(1, 4, 8, 8), "strength": 0.5, "num_inference_steps": 10}
    text = parse("match attention when progress > 0 every 2 -> reuse")
    alone = kind(**tiny.pipe.components, requires_safety_checker=False)
    with cachepolicy.apply(alone, text):
        expected = Tiny(alone, told)()
    tiny.pipe.vae.half()
    with cachepolicy.apply(tiny.pipe, text) as run:
        other = run.share(kind, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False)
        assert torch.float16 is other.vae.dtype
        tiny.pipe.vae.float()
        assert torch.equal(expected, Tiny(other, told)())
        assert {5} == {call.tick.steps for call in run.trace.last.calls}
        with pytest.raises(PolicyError, match="E315"):
            run.share(
                diffusers.StableDiffusionImg2ImgPipeline,
                unet=diffusers.UNet2DConditionModel(**{**tiny.pipe.unet.config, "sample_size": 8}),
            )
    with cachepolicy.apply(tiny.pipe.unet, text, steps=4) as run, pytest.raises(PolicyError, match="E300"):
        run.share()


class Item:
    """Something that others own."""


def test_what_threads_remember_at_once_is_all_remembered() -> None:
    """None gets lost, so that all are given back in the end."""
    items, remembered, barrier = [Item() for _ in range(400)], Weakly[Item](), threading.Barrier(8)

    def remember(place: int) -> None:
        barrier.wait()
        for item in items[place::8]:
            remembered.add(item)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(remember, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert set(items) == set(remembered)


@dataclass
class Stepped:
    prev_sample: torch.Tensor


class Owner:
    """What a follower keeps by weak reference."""


@pytest.mark.parametrize("form", [lambda latents: latents, lambda latents: (latents,), Stepped])
def test_samples_of_another_name_are_counted_from_the_result(form: Any) -> None:
    """A scheduler may call its samples as it likes: their number tells a batch of four parts from two halves."""

    class Own:
        timesteps = torch.tensor([9.0, 5.0])

        def step(self, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor) -> Any:
            return form(latents - prediction)

    scheduler = Own()
    user = Owner()
    follower = follow(scheduler, user)
    assert follower is not None
    scheduler.step(normal(3, 2), 9.0, normal(3, 2))
    assert 3 == follower.rows
    unfollow(scheduler, user)
    assert type(scheduler) is Own
