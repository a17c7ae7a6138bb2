"""Sessions, threads and branches: each goes its own way, as alone."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, inputs, sample
from tests.support.guided_toy import GuidedToy

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0)
POLICY = parse("match block when step > 1 every 3 -> reuse\nmatch attention every 2 -> reuse residual")


def alone(seed: int, timesteps: Sequence[float] = TIMESTEPS) -> list[Tensor]:
    """A run on a model of its own."""
    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, POLICY):
        return list(sample(model, timesteps, *inputs(Toy(), seed=seed)))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@given(st.lists(st.integers(0, 2), min_size=18, max_size=18), st.booleans())
def test_interleaved_sessions_are_each_as_alone(order: list[int], shapes: bool) -> None:
    """Calls of three sessions in any order, of other shapes too: each is what it is alone."""
    model, toy = Toy().build(), Toy()
    loops = [sample(model, TIMESTEPS, *inputs(toy, seed=key, batch=1 + key * shapes)) for key in range(3)]
    got: list[list[Tensor]] = [[], [], []]
    with torch.no_grad(), cachepolicy.apply(model, POLICY) as run:
        for key in [*order, *itertools.chain.from_iterable([[k] * 6 for k in range(3)])]:
            with run.session(key):
                got[key] += itertools.islice(loops[key], 1)
        assert 3 == len(run.trace)
    for key in range(3):
        expected_model = Toy().build()
        with torch.no_grad(), cachepolicy.apply(expected_model, POLICY):
            expected = list(sample(expected_model, TIMESTEPS, *inputs(toy, seed=key, batch=1 + key * shapes)))
        assert same(expected, got[key])


def test_threads_are_each_as_alone() -> None:
    """Four threads through one attached model, many times over, without a word of theirs."""
    model = Toy().build()

    def job(seed: int) -> list[Tensor]:
        with torch.no_grad():
            barrier.wait()
            return list(sample(model, TIMESTEPS, *inputs(Toy(), seed=seed)))

    barrier = threading.Barrier(4)
    with cachepolicy.apply(model, POLICY), ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for seed, got in enumerate(pool.map(job, range(4))):
                assert same(alone(seed), got)


def test_a_thread_may_join_a_session() -> None:
    """The same key means the same session, in whatever thread a call runs."""
    model, got = Toy().build(), list[Tensor]()
    loop = sample(model, TIMESTEPS, *inputs(Toy()))
    with cachepolicy.apply(model, POLICY) as run:

        def step() -> None:
            with torch.no_grad(), run.session("one"):
                got.append(next(loop))

        for _ in TIMESTEPS:
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
    assert same(alone(0), got)


def test_tasks_are_each_as_alone() -> None:
    """Coroutines that take turns on one thread have sessions of their own."""
    model = Toy().build()

    async def job(seed: int) -> list[Tensor]:
        got = []
        for prediction in sample(model, TIMESTEPS, *inputs(Toy(), seed=seed)):
            got.append(prediction)
            await asyncio.sleep(0)
        return got

    async def both() -> list[list[Tensor]]:
        return await asyncio.gather(job(0), job(1))

    with torch.no_grad(), cachepolicy.apply(model, POLICY):
        results = asyncio.run(both())
    assert same(alone(0), results[0])
    assert same(alone(1), results[1])


def test_leaving_a_session_does_not_end_it() -> None:
    """Its trajectory goes on where it was left; `reset` ends it; `reset` of another leaves it."""
    model = Toy().build()
    x, y = inputs(Toy())
    with torch.no_grad(), cachepolicy.apply(model, POLICY) as run:
        for t, other in zip(TIMESTEPS, "abcdef", strict=True):
            with run.session("one"):
                model(x, torch.tensor(t), y)
            run.reset(other)
        assert 6 == len(run.trace.rows()["blocks.0.attn"])
        run.reset("one")
        with run.session("one"):
            model(x, torch.tensor(400.0), y)
        assert "C" == run.trace.rows()["blocks.0.attn"]


def test_sessions_nest() -> None:
    """The inner key counts inside, the outer afterwards."""
    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, POLICY) as run, run.session("outer"):
        outer = sample(model, TIMESTEPS, *inputs(Toy()))
        got = [next(outer), next(outer)]
        with run.session("inner"):
            assert same(alone(3), list(sample(model, TIMESTEPS, *inputs(Toy(), seed=3))))
        got += outer
    assert same(alone(0), got)


def test_a_key_is_not_none() -> None:
    """None would mean no session at all."""
    with cachepolicy.apply(Toy().build(), POLICY) as run, pytest.raises(PolicyError, match="E304"):
        run.session(None)


def test_an_unhashable_key_is_an_error_before_anything_runs() -> None:
    """A list as a key fails at once and leaves no session set."""
    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, POLICY) as run:
        with pytest.raises((TypeError, PolicyError)), run.session(["a"]):  # type: ignore[arg-type]
            model(*_call())
        assert same(alone(0), list(sample(model, TIMESTEPS, *inputs(Toy()))))


def _call() -> tuple[Tensor, Tensor, Tensor]:
    x, y = inputs(Toy())
    return x, torch.tensor(900.0), y


def test_a_failure_in_one_session_leaves_the_others() -> None:
    """Only the session that failed starts anew."""
    model = Toy().build()
    fails = [False]

    def hook(*_: Any) -> None:
        if fails[0]:
            raise RuntimeError("no")

    model.out.register_forward_pre_hook(hook)
    loops = {key: sample(model, TIMESTEPS, *inputs(Toy(), seed=key)) for key in (0, 1)}
    got = list[Tensor]()
    with torch.no_grad(), cachepolicy.apply(model, POLICY) as run:
        for number in range(6):
            with run.session(0):
                got.append(next(loops[0]))
            fails[0] = number == 3
            if number <= 3:
                with run.session(1):
                    if fails[0]:
                        with pytest.raises(RuntimeError):
                            next(loops[1])
                    else:
                        next(loops[1])
            fails[0] = False
        with run.session(1):
            assert same(alone(1), list(sample(model, TIMESTEPS, *inputs(Toy(), seed=1))))
    assert same(alone(0), got)


def test_a_copied_context_is_a_session_of_its_thread() -> None:
    """A worker that runs in the caller's context joins the caller's session, as the context says."""
    model = Toy().build()
    loop, got = sample(model, TIMESTEPS, *inputs(Toy())), list[Tensor]()
    with torch.no_grad(), cachepolicy.apply(model, POLICY) as run, run.session("mine"), ThreadPoolExecutor(1) as pool:
        for number in range(6):
            context = contextvars.copy_context()

            def step() -> Tensor:
                with torch.no_grad():
                    return next(loop)

            got.append(pool.submit(context.run, step).result() if number % 2 else next(loop))
    assert same(alone(0), got)


# --- guidance in two calls -------------------------------------------------------------------------------


def guided(
    models: Sequence[nn.Module], timesteps: Sequence[float], order: Sequence[int], contexts: bool
) -> Iterator[Tensor]:
    """Sequential guidance; the branches run on one model or on two."""
    x, y = inputs(Toy())
    ys = [y, -y]
    for t in timesteps:
        halves = dict[int, Tensor]()
        for branch in order:
            model = models[branch % len(models)]
            if contexts and hasattr(model, "cache_context"):
                with model.cache_context(("cond", "uncond")[branch]):
                    halves[branch] = model(x, torch.tensor(t), ys[branch])
            else:
                halves[branch] = model(x, torch.tensor(t), ys[branch])
        prediction = halves[1] + 3 * (halves[0] - halves[1])
        yield prediction
        x = x - 0.1 * prediction


@given(st.permutations([0, 1]), st.booleans(), st.integers(1, 4))
def test_sequential_guidance_is_two_separate_models(order: list[int], contexts: bool, interval: int) -> None:
    """Two calls a step on one model give, to the last bit, what two models with a policy each give."""
    policy = parse(f"match attention when 100 < t < 900 every {interval} -> reuse")
    one = Toy().build()
    two = [Toy().build(), Toy().build()]
    if contexts:
        one.__class__ = GuidedToy
    with torch.no_grad():
        with cachepolicy.apply(one, policy) as run:
            got = list(guided([one], TIMESTEPS, order, contexts))
        with cachepolicy.apply(two[0], policy) as first, cachepolicy.apply(two[1], policy):
            expected = list(guided(two, TIMESTEPS, order, contexts=False))
    assert same(expected, got)
    for branch in run.trace.last.branches:
        assert first.trace.rows() == run.trace.rows(branch)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_guidance_that_ends_part_way_leaves_the_other_branch_as_it_was(stop: int) -> None:
    """After the uncond calls end, the cond branch goes on with its own history."""
    model, lone = Toy().build(), Toy().build()
    x, y = inputs(Toy())
    minus = -y
    got, expected = list[Tensor](), list[Tensor]()
    with torch.no_grad(), cachepolicy.apply(model, POLICY) as run, cachepolicy.apply(lone, POLICY) as reference:
        for step, t in enumerate(TIMESTEPS):
            got.append(model(x, torch.tensor(t), y))
            expected.append(lone(x, torch.tensor(t), y))
            if step < stop:
                model(x, torch.tensor(t), minus)
            x = x - 0.1 * got[-1]
    assert same(expected, got)
    assert reference.trace.rows() == run.trace.rows("")


def test_a_sessions_scheduler_is_followed_from_its_first_step() -> None:
    """Also in a loop that names `scheduler.step` before it calls the model: `scheduler.step(model(x, t), t, x)`."""
    schedulers = pytest.importorskip("diffusers").schedulers
    toy = Toy()
    model, (x, y) = toy.build(), inputs(toy)
    scheduler: Any = schedulers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(5)
    policy = parse("match blocks[1:] when t > 100 every 2 -> reuse residual\n")
    with torch.no_grad(), cachepolicy.apply(model, policy) as run, run.session("key", scheduler=scheduler):
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t[None], y), t, x, return_dict=False)[0]
        ticks = [(call.tick.step, call.tick.t) for call in run.trace.last.calls]
    assert list(enumerate(scheduler.timesteps.tolist())) == ticks
