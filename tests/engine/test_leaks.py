"""What calls and sessions leave behind: counted, with the garbage collector off where references alone must do."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepolicy
from cachepolicy.engine.forward_pass import ForwardPass
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.span_run import SpanRun
from cachepolicy.testing.models import Toy, ToyDiT, inputs, sample
from tests.support.soak import POLICIES, TIMESTEPS

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

STATE = {"Branch", "Chain", "Owner", "Slot", "State", "_Token"}
"""Our classes that stand for a session or for what it keeps."""
SESSIONS = 250  # of each kind


@pytest.fixture
def uncollected(only_new_objects: None) -> Iterator[None]:
    """Nothing is collected while the test runs."""
    gc.disable()
    yield
    gc.enable()


def alive(*kinds: type) -> Counter[str]:
    """How many objects of just these classes there are."""
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


def held() -> Counter[str]:
    """How many tensors there are, and objects that stand for sessions."""
    names = (type(each) for each in gc.get_objects())
    ours = (each for each in names if each is Tensor or each.__module__.startswith("cachepolicy."))
    return Counter(each.__name__ for each in ours if each is Tensor or each.__name__ in STATE)


@pytest.mark.usefixtures("uncollected")
def test_a_call_leaves_no_rubbish() -> None:
    """When a call has returned, everything of it but what is kept is gone, without the garbage collector."""
    model = Toy(blocks=3).build()
    x, y = inputs(Toy())
    for name, policy in POLICIES.items():
        with torch.no_grad(), cachepolicy.apply(model, policy, steps=len(TIMESTEPS)):
            for _ in sample(model, TIMESTEPS, x, y):
                assert Counter() == alive(ForwardPass, Ledger, SpanRun), name


# --- a thousand sessions ---------------------------------------------------------------------------------


def some_steps(model: ToyDiT, number: int) -> int:
    """A trajectory that is given up after some steps, or runs to its end; how many there were."""
    steps = random.Random(number).choice([1, 3, len(TIMESTEPS)])
    with torch.no_grad():
        return len(list(itertools.islice(sample(model, TIMESTEPS, *inputs(Toy(), seed=number)), steps)))


def in_threads(model: ToyDiT, _run: Any) -> None:
    """A thread for each."""
    for number in range(SESSIONS):
        thread = threading.Thread(target=some_steps, args=(model, number))
        thread.start()
        thread.join()


def in_threads_at_once(model: ToyDiT, _run: Any) -> None:
    """Threads that run at the same time, each with several trajectories after one another."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: some_steps(model, number), range(SESSIONS)))


def in_tasks(model: ToyDiT, _run: Any) -> None:
    """A task for each, many at once; some are cancelled."""

    async def one(number: int) -> None:
        with torch.no_grad():
            for _ in sample(model, TIMESTEPS, *inputs(Toy(), seed=number)):
                await asyncio.sleep(0)

    async def all_of_them() -> None:
        started = [asyncio.create_task(one(number)) for number in range(SESSIONS)]
        for _ in range(3):
            await asyncio.sleep(0)
        for each in started[::3]:
            each.cancel()
        await asyncio.gather(*started, return_exceptions=True)

    asyncio.run(all_of_them())


def by_key(model: ToyDiT, run: Any) -> None:
    """A key for each, which is reset when its request is over, however it went."""
    for number in range(SESSIONS):
        with run.session(number):
            some_steps(model, number)
        run.reset(number)


def failing(model: ToyDiT, run: Any) -> None:
    """A key for each, nobody resets any, and the last call of each raises."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("enough")

    for number in range(SESSIONS):
        with run.session(number):
            some_steps(model, number)
            handle = model.out.register_forward_hook(refuse)
            with pytest.raises(RuntimeError):
                some_steps(model, number)
            handle.remove()


KINDS: list[Callable[[ToyDiT, Any], None]] = [in_threads, in_threads_at_once, in_tasks, by_key, failing]


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("policy", ["tail", "first block", "taylor"])
def test_sessions_leave_nothing(kind: Callable[[ToyDiT, Any], None], policy: str) -> None:
    """When hundreds of sessions are over, no tensor and no object of theirs is left, and the run goes on."""
    model = Toy(blocks=3).build()
    with cachepolicy.apply(model, POLICIES[policy], steps=len(TIMESTEPS)) as run:
        some_steps(model, 0)
        run.reset()
        gc.collect()
        before = held()
        kind(model, run)
        gc.collect()
        assert before == held()
