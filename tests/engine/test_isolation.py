"""Requests through one attached model at once: each is bitwise what it is alone, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.engine.actions import Slot
from cachepolicy.engine.session_state import Session, State
from cachepolicy.engine.sessions import Owner
from cachepolicy.engine.step_context import Branch
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, inputs, sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.usefixtures("only_new_objects"),
]

INTERVALS = """
param every_block: int = 3 in [1, inf)
param threshold: float = 0.05 in [0, inf)
signal moved = relative_l1(input(blocks[0]), prev(input(blocks[0])))
match block when step > 1 every every_block while moved < threshold -> reuse
match attention every 2 -> reuse residual
"""
"""A policy whose decisions depend on what each request measures and on its own params."""

STREAMS = (
    "param threshold: float = 0.4\nsignal moved = relative_l1(input(blocks[0]), kept(input(blocks[0])))\n"
    "match blocks[0:3] while moved < threshold -> reuse residual"
)
PREDICTED = "match block when step > 1 every 3 -> predict taylor(order: 1)"


def alone(text: str, seed: int, timesteps: Sequence[float], **params: Any) -> list[Tensor]:
    """The request on a model of its own."""
    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, parse(text), **params):
        return list(sample(model, timesteps, *inputs(Toy(), seed=seed)))


def falling(steps: int) -> tuple[float, ...]:
    return tuple(950.0 - 900.0 * step / steps for step in range(steps))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# --- each as alone ---------------------------------------------------------------------------------------

REQUESTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (5, {}),
    (8, {"threshold": 0.5}),
    (3, {"every_block": 2}),
    (6, {"every_block": 4, "threshold": 0.02}),
)
"""How many steps each request has, and its own params."""


@given(st.lists(st.integers(0, len(REQUESTS) - 1), max_size=24), st.booleans())
def test_interleaved_requests_with_params_and_step_counts_of_their_own(order: list[int], again: bool) -> None:
    """Steps of four requests on one thread in any order: each is what it is alone, with what it was told."""
    model = Toy().build()
    loops = [sample(model, falling(steps), *inputs(Toy(), seed=key)) for key, (steps, _) in enumerate(REQUESTS)]
    rest = itertools.chain.from_iterable([key] * steps for key, (steps, _) in enumerate(REQUESTS))
    got: list[list[Tensor]] = [[] for _ in REQUESTS]
    entered = set[int]()
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)) as run:
        for key in [*order, *rest]:
            params = {} if key in entered and not again else REQUESTS[key][1]
            entered.add(key)
            with run.session(key, **params):
                got[key] += itertools.islice(loops[key], 1)
        for trajectory in run.trace:
            expected = {"threshold": 0.05, "every_block": 3} | REQUESTS[trajectory.session][1]
            assert expected == dict(trajectory.plan.resolved.settings)
    for key, (steps, params) in enumerate(REQUESTS):
        assert same(alone(INTERVALS, key, falling(steps), **params), got[key])


@pytest.mark.parametrize("text", [INTERVALS, STREAMS, PREDICTED])
def test_threads_with_step_counts_of_their_own(text: str) -> None:
    """Six threads from a pool of three, several times over: whatever ran in a thread before, each is as alone."""
    model = Toy().build()
    expected = [alone(text, seed, falling(4 + seed % 3)) for seed in range(6)]

    def job(seed: int) -> bool:
        with torch.no_grad():
            return same(expected[seed], list(sample(model, falling(4 + seed % 3), *inputs(Toy(), seed=seed))))

    with cachepolicy.apply(model, parse(text)), ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            assert [True] * 6 == list(pool.map(job, range(6)))


def test_tasks_hand_their_steps_to_threads() -> None:
    """With a key, the steps of a task may run anywhere: `to_thread` takes the session along, an executor enters it."""
    model = Toy().build()

    async def job(seed: int, pool: ThreadPoolExecutor | None) -> list[Tensor]:
        got, loop = list[Tensor](), sample(model, falling(6), *inputs(Toy(), seed=seed))

        def step() -> Tensor:
            with torch.no_grad(), run.session(seed):
                return next(loop)

        for _ in range(6):
            if pool is not None:
                got.append(await asyncio.get_running_loop().run_in_executor(pool, step))
            else:
                with run.session(seed):
                    got.append(await asyncio.to_thread(lambda: next(loop)))
        return got

    async def all_of_them(pool: ThreadPoolExecutor | None) -> list[list[Tensor]]:
        return await asyncio.gather(*(job(seed, pool) for seed in range(4)))

    with cachepolicy.apply(model, parse(INTERVALS)) as run, ThreadPoolExecutor(2) as pool:
        for where in (None, pool):
            for seed, got in enumerate(asyncio.run(all_of_them(where))):
                assert same(alone(INTERVALS, seed, falling(6)), got)
            run.reset()


def test_runs_of_two_models_have_sessions_of_their_own() -> None:
    """Keys of one run say nothing of another's, and keep it apart where it has none."""
    models = [Toy().build(), Toy().build(seed=1)]
    loops = [[sample(model, falling(6), *inputs(Toy(), seed=seed)) for seed in range(2)] for model in models]
    got: list[list[list[Tensor]]] = [[[], []], [[], []]]
    with (
        torch.no_grad(),
        cachepolicy.apply(models[0], parse(INTERVALS)) as first,
        cachepolicy.apply(models[1], parse(INTERVALS)) as second,
    ):
        for _, seed in itertools.product(range(6), range(2)):
            with first.session(seed, threshold=0.3), second.session(1 - seed):
                for which in range(2):
                    got[which][seed].append(next(loops[which][seed]))
        assert {0, 1} == {each.session for each in first.trace}
    for seed in range(2):
        assert same(alone(INTERVALS, seed, falling(6), threshold=0.3), got[0][seed])
        model = Toy().build(seed=1)
        with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)):
            assert same(list(sample(model, falling(6), *inputs(Toy(), seed=seed))), got[1][seed])


# --- params ----------------------------------------------------------------------------------------------


def stepping(model: nn.Module, seed: int = 0) -> Iterator[Tensor]:
    return sample(model, falling(6), *inputs(Toy(), seed=seed))


def test_params_stay_until_the_session_ends() -> None:
    """Left out they are the session's; after its end, the run's again."""
    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)) as run:
        for reset in (False, True, True):
            loop = stepping(model)
            if not reset:
                with run.session("a", every_block=2):
                    next(loop)
            with run.session("a"):
                list(loop)
            if reset:
                assert 3 == run.trace.last.plan.resolved.settings["every_block"]
            else:
                assert 2 == run.trace.last.plan.resolved.settings["every_block"]
            run.reset("a")


def test_other_params_for_a_trajectory_under_way_are_refused() -> None:
    """E313 says what to do, and the trajectory goes on; the same ones, or none, are taken."""
    model = Toy().build()
    loop, got = stepping(model), list[Tensor]()
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)) as run:
        with run.session("a", threshold=0.5):
            got.append(next(loop))
        with pytest.raises(PolicyError, match=r"run\.reset\('a'\)") as caught, run.session("a", threshold=0.1):
            pass
        assert "E313" == caught.value.diagnostics[0].code
        with run.session("a", threshold=0.5):
            got += loop
        assert same(alone(INTERVALS, 0, falling(6), threshold=0.5), got)
        run.reset("a")
        with run.session("a", threshold=0.1):
            assert same(alone(INTERVALS, 0, falling(6), threshold=0.1), list(stepping(model)))


def test_the_same_params_are_the_same_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Params that have to be bound anew, because others came between, are no other ones."""
    monkeypatch.setattr("cachepolicy.engine.session_config.MOST_EXECUTIONS", 2)
    model = Toy().build()
    loops, got = [stepping(model, key) for key in range(5)], [list[Tensor]() for _ in range(5)]
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)) as run:
        for _ in range(6):
            for key in range(5):
                with run.session(key, threshold=0.1 + key):
                    got[key].append(next(loops[key]))
        assert 5 == len(run.trace)
    for key in range(5):
        assert same(alone(INTERVALS, key, falling(6), threshold=0.1 + key), got[key])


def test_a_known_end_lets_other_params_in() -> None:
    """With the number of steps known the session ends by itself, and the next one may have other params."""
    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)) as run:
        for threshold in (0.5, 0.1, 0.3):
            with run.session("a", threshold=threshold, steps=6):
                assert same(alone(INTERVALS, 0, falling(6), threshold=threshold), list(stepping(model)))


@pytest.mark.parametrize(
    ("params", "code", "words"),
    [
        ({"thresold": 0.1}, "E160", "threshold"),
        ({"threshold": "wide"}, "E161", "threshold"),
        ({"threshold": -1.0}, "E162", "threshold"),
        ({"every_block": None}, "E161", "every_block"),
        ({"steps": 0}, "E309", "steps"),
    ],
)
def test_params_are_verified_before_anything_runs(params: dict[str, Any], code: str, words: str) -> None:
    """What `apply` would say of them, and the session is not there."""
    with cachepolicy.apply(Toy().build(), parse(INTERVALS)) as run:
        with pytest.raises(PolicyError, match=words) as caught:
            run.session("a", **params)
        assert code == caught.value.diagnostics[0].code
        assert () == run._sessions.keys


WIDE = """
param place: string = "blocks[.]0[.]attn"
param attn_every: int? = 2 in [1, inf)
param order: int = 1 in [1, 4]
match place every attn_every -> reuse
match "blocks[.]1[.]attn" every 2 -> predict taylor(order: order)
"""


@pytest.mark.parametrize(
    ("params", "change"),
    [
        ({"place": r"blocks\.0\.ff"}, "`place` cannot differ from session to session: it changes which modules"),
        ({"attn_every": None}, "`attn_every` cannot differ from session to session: it changes which modules"),
        ({"order": 2}, "`order` cannot differ from session to session: it changes what `blocks.1.attn` keeps"),
        ({"attn_every": 3, "order": 2}, "`order` cannot differ"),
    ],
)
def test_params_that_change_what_is_attached_are_refused(params: dict[str, Any], change: str) -> None:
    """The error names the param and what it changes."""
    with cachepolicy.apply(Toy().build(), parse(WIDE)) as run:
        with pytest.raises(PolicyError) as caught:
            run.session("a", **params)
        assert "E314" == caught.value.diagnostics[0].code
        assert change in str(caught.value)
        run.session("a", attn_every=3)


def test_externals_are_a_sessions_own() -> None:
    """Each session's function is asked for its answers; a new one replaces it, also under way."""
    text = "external weight: float\nmatch attention every 2 -> predict linear(weight: weight)"
    model, loops = Toy().build(), [stepping(Toy().build()) for _ in range(2)]
    loops = [stepping(model) for _ in range(2)]
    got: list[list[Tensor]] = [[], []]
    with torch.no_grad(), cachepolicy.apply(model, parse(text), weight=0.5) as run:
        for _ in range(6):
            with run.session("a"):
                got[0].append(next(loops[0]))
            with run.session("b", weight=lambda: 0.25):
                got[1].append(next(loops[1]))
    assert same(alone(text, 0, falling(6), weight=0.5), got[0])
    assert same(alone(text, 0, falling(6), weight=0.25), got[1])
    assert not same(got[0], got[1])


def test_params_are_bound_once() -> None:
    """The same params again, in whatever order, are the same execution plan; few are kept."""
    with cachepolicy.apply(Toy().build(), parse(INTERVALS)) as run:
        first = run._attachment.bound.depart({}, {"threshold": 0.1, "every_block": 2}).executions
        assert first is run._attachment.bound.depart({"steps": 3}, {"every_block": 2, "threshold": 0.1}).executions
        assert first is not run._attachment.bound.depart({}, {"threshold": 0.2}).executions
        assert (
            run._attachment.session_config.executions
            is run._attachment.bound.depart({}, {"threshold": 0.05}).executions
        )
        for number in range(100):
            run._attachment.bound.depart({}, {"threshold": 1.0 + number})
        assert 64 == len(run._attachment.bound._executions)


def test_a_session_has_a_scheduler_of_its_own() -> None:
    """Requests that step schedulers of their own, of different lengths, on one thread."""
    diffusers = pytest.importorskip("diffusers")
    model, text = Toy().build(), "match attention when progress < 0.9 every 2 -> reuse"

    def loop(scheduler: Any, seed: int) -> Iterator[Tensor]:
        x, y = inputs(Toy(), seed=seed)
        for t in scheduler.timesteps:
            noise = model(x, t.expand(1), y)
            x = scheduler.step(noise, t, x).prev_sample
            yield x

    def scheduler(steps: int) -> Any:
        made = diffusers.DDIMScheduler()
        made.set_timesteps(steps)
        return made

    expected = list[list[Tensor]]()
    for seed, steps in enumerate((4, 7)):
        mine = scheduler(steps)
        with torch.no_grad(), cachepolicy.apply(model, parse(text), scheduler=mine):
            expected.append(list(loop(mine, seed)))
    schedulers = [scheduler(4), scheduler(7)]
    loops, got = [loop(each, seed) for seed, each in enumerate(schedulers)], [list[Tensor](), list[Tensor]()]
    with torch.no_grad(), cachepolicy.apply(model, parse(text)) as run:
        for _, which in itertools.product(range(7), range(2)):
            with run.session(which, scheduler=schedulers[which]):
                got[which] += itertools.islice(loops[which], 1)
        gone = weakref.ref(schedulers.pop())
        loops.clear()
        run.reset()
        gc.collect()
        assert gone() is None
    assert all(map(same, expected, got))
    assert diffusers.DDIMScheduler is type(schedulers[0])


# --- nothing is left -------------------------------------------------------------------------------------


FEW = (
    "param threshold: float = 0.05\nsignal moved = relative_l1(input(blocks[0]), prev(input(blocks[0])))\n"
    "match attention while moved < threshold -> reuse"
)


def left() -> dict[str, int]:
    """How many objects of ours that belong to sessions are alive, besides those of the tests before."""
    gc.collect()
    kinds = (State, Slot, Branch, Session, Owner)
    found = Counter(type(each) for each in gc.get_objects())
    return {kind.__name__: found[kind] for kind in kinds}


def tensors() -> int:
    gc.collect()
    return sum(1 for each in gc.get_objects() if isinstance(each, Tensor))


def in_threads(run: Any, model: nn.Module, times: int) -> None:
    for _ in range(times):
        thread = threading.Thread(target=lambda: [None for _ in _some(model)])
        thread.start()
        thread.join()


def in_tasks(run: Any, model: nn.Module, times: int) -> None:
    async def job() -> None:
        for _ in _some(model):
            await asyncio.sleep(0)

    async def jobs() -> list[Any]:
        tasks = [asyncio.create_task(job()) for _ in range(times)]
        await asyncio.gather(*tasks)
        return tasks

    before = left()
    kept = asyncio.run(jobs())  # whoever keeps a task for its result keeps none of its histories
    assert before | {"Session": 0, "Owner": 0} == left() | {"Session": 0, "Owner": 0}
    del kept


def in_keys(run: Any, model: nn.Module, times: int) -> None:
    for key in range(times):
        with run.session(("request", key), threshold=0.1 + key % 3):
            for _ in _some(model):
                pass
        run.reset(("request", key))


def in_keys_that_end(run: Any, model: nn.Module, times: int) -> None:
    before = _full()
    for key in range(times):
        with run.session(key, steps=2):
            for _ in _some(model):
                pass
    assert before == _full()
    run.reset()


def _full() -> int:
    """Slots that hold something."""
    gc.collect()
    return len([each for each in gc.get_objects() if type(each) is Slot and each.output is not None])


def _some(model: nn.Module) -> Iterator[Tensor]:
    """The beginning of a trajectory, which is then given up; gradients are off while it runs, not while it waits."""
    toy = Toy(blocks=1, width=4)
    loop = sample(model, falling(6), *inputs(toy))
    for _ in range(2):
        with torch.no_grad():
            got = next(loop)
        yield got


@pytest.mark.parametrize("way", [in_threads, in_tasks, in_keys, in_keys_that_end])
def test_a_thousand_sessions_leave_nothing(way: Callable[[Any, nn.Module, int], None]) -> None:
    """Counted by the collector: no state, slot, tensor or owner is left of sessions that are over."""
    model = Toy(blocks=1, width=4).build()
    before = left()
    with cachepolicy.apply(model, parse(FEW), trace=False) as run:
        way(run, model, 3)
        some, held = left(), tensors()
        way(run, model, 1000)
        assert some == left()
        assert held == tensors()
        assert before["State"] == some["State"]
        assert before["Slot"] == some["Slot"]
    assert before == left() | {"Owner": before["Owner"]}


def test_the_trace_keeps_no_session_alive() -> None:
    """What is recorded of a thread's trajectory is no history."""
    model = Toy(blocks=1, width=4).build()
    before = left()["Slot"]
    with cachepolicy.apply(model, parse(FEW)) as run:
        in_threads(run, model, 3)
        assert 3 == len(run.trace)
        assert before == left()["Slot"]


def test_few_sessions_hold_something() -> None:
    """Beyond `max_sessions` the one that was used longest ago ends, and its next call starts anew."""
    model = Toy().build()
    loops = [stepping(model, seed) for seed in range(4)]
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS), max_sessions=3) as run:
        for seed in (0, 1, 2, 0, 3):
            with run.session(seed):
                next(loops[seed])
        assert (2, 0, 3) == run._sessions.keys
        with pytest.warns(UserWarning, match="W602"):
            for seed in (1, 2):
                with run.session(seed):
                    next(loops[seed])
        assert {0, 1, 2, 3} == {each.session for each in run.trace}
        assert 6 == len(run.trace)


def test_the_last_step_releases_the_histories() -> None:
    """Where the number of steps is known nothing is kept beyond the last, and the next trajectory starts."""
    model, kept = Toy().build(), list[Any]()
    model.blocks[0].attn.register_forward_hook(lambda *call: kept.append(weakref.ref(call[2])) or None)
    with torch.no_grad(), cachepolicy.apply(model, parse("match attention every 2 -> reuse"), steps=6) as run:
        for _ in range(2):
            for number, _ in enumerate(stepping(model)):
                if number < 4:
                    continue
                gc.collect()
                assert (number < 5) == any(each() is not None for each in kept)
        assert [6, 6] == [len(each.calls) for each in run.trace]


# --- aborted ---------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Neither an Exception nor anything that a model would catch."""


ERRORS = (RuntimeError, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, Interrupted)


@given(st.integers(0, 40), st.sampled_from(ERRORS), st.booleans())
def test_an_abort_at_any_point_leaves_nothing(at: int, error: type[BaseException], keyed: bool) -> None:
    """Whichever call of a module raises whatever: the next run is as from a fresh model, the others go on."""
    model, count = Toy().build(), itertools.count()
    armed = [True]

    def hook(*_: Any) -> None:
        if armed[0] and next(count) == at:
            raise error

    for module in model.modules():
        module.register_forward_pre_hook(hook)
    other = stepping(model, seed=1)
    got = list[Tensor]()
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)) as run:
        armed[0] = False
        with run.session("other"):
            got += itertools.islice(other, 3)
        armed[0] = True
        try:
            if keyed:
                with run.session("a", threshold=0.9):
                    list(stepping(model))
            else:
                list(stepping(model))
        except error:
            assert ("other",) == run._sessions.keys
            assert [("other",)] == [(each.session,) for each in run.trace]
        armed[0] = False
        run.reset("a")
        with run.session("a"):
            assert same(alone(INTERVALS, 0, falling(6)), list(stepping(model)))
        with run.session("other"):
            got += other
        assert same(alone(INTERVALS, 1, falling(6)), got)
        assert not any(session.busy for session in run._sessions.alive())


def test_what_a_run_asks_may_raise() -> None:
    """A timestep function that fails is an abort like any other."""
    model, numbers = Toy().build(), iter([900.0, 800.0, None, 900.0, 800.0])
    x, y = inputs(Toy())
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS), timestep=lambda: next(numbers)) as run:
        for _ in range(2):
            model(x, torch.tensor(1.0), y)
        with pytest.raises(PolicyError, match="E320"):
            model(x, torch.tensor(1.0), y)
        assert () == run._sessions.keys
        for _ in range(2):
            model(x, torch.tensor(1.0), y)
        assert [2] == [len(each.calls) for each in run.trace]


# --- two threads in one session --------------------------------------------------------------------------


def test_two_threads_in_one_session_at_the_same_time_are_refused() -> None:
    """The second is told so; the first one's call and trajectory go on as if nothing had been."""
    model, got = Toy().build(), list[Tensor]()
    inside, released = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if not released.is_set():
            inside.set()
            released.wait(10)

    model.out.register_forward_pre_hook(wait)
    with cachepolicy.apply(model, parse(INTERVALS)) as run:

        def first() -> None:
            with torch.no_grad(), run.session("one"):
                got.extend(stepping(model))

        thread = threading.Thread(target=first)
        thread.start()
        inside.wait(10)
        try:
            with torch.no_grad(), run.session("one"), pytest.raises(PolicyError, match="E312") as caught:
                next(stepping(model))
        finally:
            released.set()
            thread.join()
        assert "`one`" in str(caught.value)
        assert same(alone(INTERVALS, 0, falling(6)), got)
        with torch.no_grad(), run.session("one"):
            assert same(alone(INTERVALS, 0, falling(6)), list(stepping(model)))


def test_a_run_is_not_removed_while_a_call_is_being_decided() -> None:
    """Another thread's `remove` is refused from a call's very beginning; the call is as ever, and later calls too."""
    model, codes = Toy().build(), list[str]()
    x, y = inputs(Toy())

    def remove() -> None:
        with pytest.raises(PolicyError) as caught:
            run.remove()
        codes.append(caught.value.diagnostics[0].code)

    def timestep() -> float:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(remove).result()
        return 900.0 - 100.0 * len(codes)

    with torch.no_grad():
        run = cachepolicy.apply(model, parse("match attention every 2 -> reuse"), timestep=timestep)
        for _ in range(4):
            model(x, torch.tensor(500.0), y)
    assert ["E305"] * 4 == codes
    assert "CRCR" == run.trace.rows("")["blocks.0.attn"]
    run.remove()
    assert not hasattr(model, "_cachepolicy")


def test_a_context_that_outlives_a_session_is_in_none() -> None:
    """A context that was copied inside `with run.session` stays in it; no history is kept by the context alone."""
    model, before = Toy().build(), left()["Slot"]
    with torch.no_grad(), cachepolicy.apply(model, parse(INTERVALS)) as run:
        with run.session("a"):
            context = contextvars.copy_context()
            next(stepping(model))
        run.reset("a")
        assert before == left()["Slot"]
        assert same(alone(INTERVALS, 0, falling(6)), context.run(lambda: list(stepping(model))))
        assert "a" == run.trace.last.session


def test_a_collected_generator_takes_no_lock() -> None:
    """A call that is given up while somebody holds the sessions' lock, as a collector may do, does not hang."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Generating(Toy().build())
        with torch.no_grad(), cachepolicy.apply(pipe, parse(INTERVALS)) as run:
            call = pipe(0)
            next(call)
            with run._sessions._lock:
                del call
                gc.collect()
            assert () == run._sessions.keys


# --- pipelines in pieces ---------------------------------------------------------------------------------


class Pipe:
    """A pipeline with a denoiser and no scheduler."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def loop(self, seed: int) -> Iterator[Tensor]:
        yield from sample(self.transformer, falling(6), *inputs(Toy(), seed=seed))


class Generating(Pipe):
    """One that yields its previews, and takes a word on the way."""

    def __call__(self, seed: int) -> Any:
        said = list[Any]()
        try:
            for preview in self.loop(seed):
                try:
                    said.append((yield preview))
                except ValueError as error:
                    said.append(str(error))
        finally:
            self.closed = True
        return said


class Decorated(Generating):
    """The same under `no_grad`, as pipelines are."""

    __call__ = torch.no_grad()(Generating.__call__)


class Awaited(Pipe):
    """One that is awaited."""

    async def __call__(self, seed: int) -> list[Tensor]:
        got = []
        for preview in self.loop(seed):
            got.append(preview)
            await asyncio.sleep(0)
        return got


class Streaming(Pipe):
    """One that is iterated over asynchronously."""

    async def __call__(self, seed: int) -> Any:
        for preview in self.loop(seed):
            await asyncio.sleep(0)
            yield preview


class Lazy(Pipe):
    """A plain function that returns a generator."""

    def __call__(self, seed: int) -> Any:
        return self.loop(seed)


@pytest.mark.parametrize("kind", [Generating, Decorated, Lazy])
def test_pipelines_that_generate_are_each_as_alone(kind: type[Pipe]) -> None:
    """Calls whose pieces take turns on one thread; between the pieces the thread is in no session."""
    pipe = kind(Toy().build())
    with torch.no_grad(), cachepolicy.apply(pipe, parse(INTERVALS)) as run:
        calls = [pipe(seed) for seed in range(3)]
        got: list[list[Tensor]] = [[], [], []]
        bare = stepping(pipe.transformer, seed=3)
        between = list[Tensor]()
        for _, seed in itertools.product(range(6), range(3)):
            got[seed].append(next(calls[seed]))
            between += itertools.islice(bare, 1)
        for call in calls:
            with pytest.raises(StopIteration):
                next(call)
        run.reset()
        assert 0 == left()["Slot"]
    for seed in range(3):
        assert same(alone(INTERVALS, seed, falling(6)), got[seed])
    assert same(alone(INTERVALS, 3, falling(6)), between)


def test_a_generating_pipeline_is_talked_to() -> None:
    """What is sent, thrown and returned goes through; closing it ends its session and runs its `finally`."""
    pipe = Generating(Toy().build())
    with torch.no_grad(), cachepolicy.apply(pipe, parse(INTERVALS)) as run:
        call = pipe(0)
        next(call)
        call.send("on")
        call.throw(ValueError("no"))
        said = None
        try:
            while True:
                call.send(1)
        except StopIteration as stop:
            said = stop.value
        assert ["on", "no", 1, 1, 1, 1] == said
        call = pipe(0)
        next(call)
        assert 1 == len(run._sessions.keys)
        pipe.closed = False
        call.close()
        assert pipe.closed
        assert () == run._sessions.keys
        call = pipe(0)
        next(call)
        with pytest.raises(KeyError):
            call.throw(KeyError("x"))
        assert () == run._sessions.keys


def test_awaited_and_streaming_pipelines_are_each_as_alone() -> None:
    """Coroutines and asynchronous generators of several requests in one task, and one that is cancelled."""
    awaited, streaming = Awaited(Toy().build()), Streaming(Toy().build())

    async def interleaved() -> list[list[Tensor]]:
        streams, got = [streaming(seed) for seed in range(3)], [list[Tensor](), list[Tensor](), list[Tensor]()]
        for _, seed in itertools.product(range(6), range(3)):
            got[seed].append(await anext(streams[seed]))
        rest = streaming(4)
        await anext(rest)
        await rest.aclose()
        for stream in streams:
            assert [] == [item async for item in stream]
        return got

    async def cancelled() -> list[list[Tensor]]:
        lost = asyncio.create_task(awaited(9))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        lost.cancel()
        results = await asyncio.gather(*(awaited(seed) for seed in range(3)))
        with pytest.raises(asyncio.CancelledError):
            await lost
        return results

    with torch.no_grad():
        for pipe, work in ((streaming, interleaved), (awaited, cancelled)):
            with cachepolicy.apply(pipe, parse(INTERVALS)) as run:
                for seed, got in enumerate(asyncio.run(work())):
                    assert same(alone(INTERVALS, seed, falling(6)), got)
                assert () == run._sessions.keys
                assert 0 == left()["Slot"]


def test_a_call_in_pieces_that_is_never_begun_does_nothing() -> None:
    """A generator that nobody runs opens no session and ends none."""
    pipe = Generating(Toy().build())
    with torch.no_grad(), cachepolicy.apply(pipe, parse(INTERVALS)) as run:
        with run.session("a"):
            first = pipe(0)
            next(first)
            pipe(1).close()
            assert ("a",) == run._sessions.keys
        del first
