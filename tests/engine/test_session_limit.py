"""More sessions than `max_sessions`: those that lose a trajectory are counted and told of, others are not."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, inputs, sample

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

TIMES = (900.0, 800.0, 700.0, 600.0)
POLICY = parse("match attention every 2 -> reuse")


def loops(model: Any, count: int) -> list[Iterator[Tensor]]:
    return [sample(model, TIMES, *inputs(Toy(), seed=key)) for key in range(count)]


def drive(run: Any, model: Any, order: Sequence[int], count: int) -> list[str]:
    """Advance the sessions in this order. Returns the warnings of the limit."""
    each = loops(model, count)
    with torch.no_grad(), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for key in order:
            with run.session(f"request {key}"):
                next(each[key], None)
    return [str(one.message) for one in record if "W602" in str(one.message)]


@given(st.lists(st.integers(0, 3), max_size=16), st.integers(1, 4))
def test_lost_trajectories_are_counted(order: list[int], most: int) -> None:
    """Against a model of the least recently used: a count for each session that goes on after it was dropped."""
    model = Toy().build()
    held, begun, expected = list[int](), [0] * 4, 0
    for key in order:
        if begun[key] == len(TIMES):
            continue
        expected += begun[key] > 0 and key not in held
        begun[key] += 1
        held = [each for each in held if each != key][-most + 1 :] if most > 1 else []
        held.append(key)
    steps = [key for place, key in enumerate(order) if order[:place].count(key) < len(TIMES)]
    with cachepolicy.apply(model, POLICY, max_sessions=most) as run:
        told = drive(run, model, steps, 4)
        assert expected == run.memory.continued
        assert min(1, expected) == len(told)


def test_the_warning_names_the_limit_and_the_session() -> None:
    """Three requests in turn with room for two: nothing is reused, and the reason is told once."""
    model = Toy().build()
    with cachepolicy.apply(model, POLICY, max_sessions=2) as run:
        (message,) = drive(run, model, [0, 1, 2] * 4, 3)
        assert "`max_sessions=2`" in message
        assert "`request 0`" in message
        assert 9 == run.memory.continued
        assert "max_sessions=2: 9 times a session went on" in str(run.memory)
        assert "R" not in "".join(row for each in run.trace for row in each.rows().values())


def test_enough_room_is_not_told_of() -> None:
    """As many sessions as there is room for."""
    model = Toy().build()
    with cachepolicy.apply(model, POLICY, max_sessions=3) as run:
        assert [] == drive(run, model, [0, 1, 2] * 4, 3)
        assert 0 == run.memory.continued
        assert "max_sessions" not in str(run.memory)


@pytest.mark.parametrize("steps", [None, len(TIMES)])
def test_requests_that_are_done_or_given_up_are_not_told_of(steps: int | None) -> None:
    """A session that is dropped and never goes on, or begins anew under its key, has lost nothing."""
    model = Toy().build()
    with cachepolicy.apply(model, POLICY, max_sessions=1, steps=steps) as run:
        done = [key for key in range(3) for _ in TIMES]
        assert [] == drive(run, model, done, 3)
        assert [] == drive(run, model, done, 3)
        assert [] == drive(run, model, [0, 0, 1, 1], 3)
        assert [] == drive(run, model, [0, 0, 1, 1], 3)


def test_a_session_that_was_reset_has_lost_nothing() -> None:
    """After `run.reset(key)` the next call begins a trajectory, whatever its timestep."""
    model = Toy().build()
    with cachepolicy.apply(model, POLICY, max_sessions=1) as run:
        each = loops(model, 2)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            for key in (0, 1, 0):
                run.reset(f"request {key}")
                with run.session(f"request {key}"):
                    next(each[key])
        assert 0 == run.memory.continued


def test_threads_are_sessions_too() -> None:
    """Two threads in turn with room for one."""
    model = Toy().build()
    turns, got = threading.Barrier(2), list[int]()
    with cachepolicy.apply(model, POLICY, max_sessions=1) as run, pytest.warns(UserWarning, match="W602"):

        def serve(place: int) -> None:
            loop = loops(model, 1)[0]
            for turn in range(2 * len(TIMES)):
                if turn % 2 == place:
                    with torch.no_grad():
                        next(loop)
                turns.wait()
            got.append(place)

        threads = [threading.Thread(target=serve, args=(place,)) for place in (0, 1)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert 2 == len(got)
        assert 2 * len(TIMES) - 2 == run.memory.continued


def test_pipelines_that_share_a_scheduler_kind_are_counted_by_their_steps() -> None:
    """Two pipelines in turn over one denoiser, step by step, with room for one."""
    pytest.importorskip("diffusers")
    from tests.support.tiny_pipelines import STEPS, flux

    tiny = flux()
    with cachepolicy.apply(tiny.pipe, POLICY, max_sessions=1) as run:
        scheduler = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config)
        other = run.share(scheduler=scheduler)

        def between(pipe: Any, step: int, t: Any, told: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                tiny.pipe = other
                tiny(num_inference_steps=2)
            return {}

        with pytest.warns(UserWarning, match="W602"):
            tiny(callback_on_step_end=between)
        assert 1 == run.memory.continued
        assert STEPS == sum(call.tick.steps == STEPS for each in run.trace for call in each.calls)
