"""The engine through anything that may come: each caller gets what it would get alone, and nothing stays behind."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import cachepolicy
from cachepolicy.language import ir
from cachepolicy.testing import checks
from cachepolicy.testing.models import Probes, Toy, ToyDiT
from cachepolicy.tracing.trace import CallRecord
from tests.support.soak import (
    MODES,
    POLICIES,
    TIMESTEPS,
    Bombs,
    Lane,
    Mode,
    Place,
    StopNow,
    Tasks,
    Twin,
    built,
    same,
    threaded,
)

toys = st.builds(
    Toy,
    blocks=st.just(3),
    width=st.just(4),
    returns=st.sampled_from(["tensor", "tuple", "list", "dict"]),
    in_place=st.booleans(),
)
MOST_LANES = 4
Got = tuple[Tensor | None, BaseException | None]


class Soak(RuleBasedStateMachine):
    """One model under one policy after another, and lanes of calls through it, each with a twin of its own."""

    @initialize(
        toy=toys,
        policy=st.sampled_from(sorted(POLICIES)),
        places=st.lists(st.sampled_from(["key", "key", "thread", "task"]), min_size=1, max_size=3),
        branches=st.sampled_from([1, 1, 2, 3]),
        named=st.booleans(),
    )
    def start(self, toy: Toy, policy: str, places: list[Place], branches: int, named: bool) -> None:
        """A model with a policy, and a few callers."""
        self.toy = toy
        self.dtype = torch.float32
        self.model, self.bare = built(toy, self.dtype), built(toy, self.dtype)
        self.untouched = snapshot(self.model)
        self.probes, self.bombs = Probes(self.model), Bombs(self.model)
        self.names = [name for name, _ in self.model.named_modules()]
        self.run: Any = None
        self.policy: Any = None
        self.lanes = list[Lane]()
        self.tasks = Tasks()
        self.made = 0
        self.attach(policy)
        for place in places:
            self.open(place, branches, named)

    # --- what comes and goes -----------------------------------------------------------------------------

    @rule(name=st.sampled_from(sorted(POLICIES)))
    def attach(self, name: str) -> None:
        """Put a policy on, in place of the one that is on."""
        if self.run is not None:
            self.run.remove()
        self.policy = POLICIES[name]
        self.run = cachepolicy.apply(self.model, self.policy, steps=len(TIMESTEPS))
        for lane in self.lanes:
            self._anew(lane)

    @rule()
    def remove(self) -> None:
        """Take it off: what is left is the bare model."""
        if self.run is None:
            return
        self.run.remove()
        self.run = None
        for lane in self.lanes:
            self._anew(lane)
        assert_untouched(self.model, self.untouched)

    @rule(
        place=st.sampled_from(["key", "thread", "task"]),
        branches=st.sampled_from([1, 1, 2, 3]),
        named=st.booleans(),
    )
    def open(self, place: Place, branches: int, named: bool) -> None:
        """Another caller: under a key, in a thread, in a task."""
        if len(self.lanes) == MOST_LANES:
            self.close(0)
        lane = Lane(self.made, place, branches, named and branches == 2, None)
        self.made += 1
        if place == "thread":
            threaded(lane)
        elif place == "task":
            lane.carry = self.tasks.open()
        lane.draw(self.toy.width, self.dtype)
        self._anew(lane)
        self.lanes.append(lane)

    @rule(which=st.integers(0, MOST_LANES - 1))
    def close(self, which: int) -> None:
        """A caller goes, its key's session with it."""
        lane = self._lane(which)
        if lane is None:
            return
        self.lanes.remove(lane)
        if lane.place == "key" and self.run is not None:
            self.run.reset(lane.number)
        self._close(lane)

    def _close(self, lane: Lane) -> None:
        lane.close()
        if lane.twin is not None:
            lane.twin.close()

    def _anew(self, lane: Lane) -> None:
        """A lane whose past does not count any more, at the step where it is."""
        if lane.twin is not None:
            lane.twin.close()
        lane.twin = None if self.run is None else Twin(self.toy, self.dtype, self.policy)

    def _lane(self, which: int) -> Lane | None:
        return self.lanes[which % len(self.lanes)] if self.lanes else None

    # --- calls -------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, MOST_LANES - 1), steps=st.integers(1, 4), scribble=st.booleans())
    def advance(self, which: int, steps: int, scribble: bool) -> None:
        """A few steps of a lane; it may write into what it was given, and go on with that."""
        lane = self._lane(which)
        for _ in range(steps if lane is not None else 0):
            if not self._step(lane, scribble=scribble):
                break

    @rule(order=st.lists(st.integers(0, MOST_LANES - 1), min_size=2, max_size=8))
    def take_turns(self, order: list[int]) -> None:
        """Steps of several lanes, as they come."""
        for which in order:
            lane = self._lane(which)
            if lane is not None:
                self._step(lane)

    @invariant()
    def everybody_goes_on(self) -> None:
        """Whatever came, each lane takes a step."""
        for lane in list(getattr(self, "lanes", ())):
            self._step(lane)

    @rule(
        which=st.integers(0, MOST_LANES - 1),
        number=st.integers(0, 99),
        error=st.sampled_from([RuntimeError, StopNow, KeyboardInterrupt]),
        goes_on=st.booleans(),
    )
    def fail(self, which: int, number: int, error: type[BaseException], goes_on: bool) -> None:
        """A module raises, where it runs: what the lane kept is gone, as if its trajectory had not been.

        It begins anew, or tries the same step again.
        """
        lane = self._lane(which)
        if lane is None:
            return
        name = self.names[number % len(self.names)]
        before = self._held()
        with self.bombs.arm(name, error()):
            if lane.twin is not None:
                lane.twin.bombs.armed = self.bombs.armed
            went = self._step(lane)
            if lane.twin is not None:
                lane.twin.bombs.armed = None
        if not went:
            if not goes_on:
                lane.begin()
            self._anew(lane)
            self._let_go(before)

    def _step(self, lane: Lane, *, scribble: bool = False) -> bool:
        """One step of a lane, all its branches; False where a call raised."""
        if lane.step == len(TIMESTEPS):
            lane.begin()
        t = torch.tensor(TIMESTEPS[lane.step], dtype=self.dtype)
        predictions, everybodys = list[Tensor](), list[Tensor]()
        for branch in range(lane.branches):
            got, error = self._call(lane, (lane.x, t, lane.ys[branch]), branch)
            if error is not None or got is None:
                return False
            predictions.append(got)
            everybodys += [got, *self.wanted]
        kept = [prediction.detach().clone() for prediction in predictions]
        if scribble:
            for each in everybodys:
                with torch.inference_mode(each.is_inference()), torch.no_grad():
                    each.mul_(0.5)
        lane.x = (lane.x - 0.1 * torch.stack(kept).mean(0)).detach().clone()
        lane.step += 1
        return True

    def _call(self, lane: Lane, args: tuple[Any, ...], branch: int) -> Got:
        """One call of the model, held to the lane's twin, to the plain engine and to what was executed."""
        self.wanted = list[Tensor]()
        self.probes.take()
        got, error = tried(lambda: lane.carry(lambda: self._called(self.model, self.run, lane, args, branch)))
        executed = self.probes.take()
        if lane.twin is None:
            wanted, expected = tried(lambda: self._called(self.bare, None, lane, args, branch))
            if error is None:
                assert_same(wanted, got)
            return got, error
        wanted, expected = tried(lambda: self._called(lane.twin.model, None, lane, args, branch))
        assert type(expected) is type(error), f"alone {expected!r}, here {error!r}"
        if error is not None:
            return got, error
        assert_same(wanted, got)
        self.wanted += [wanted]
        call = lane.twin.last()
        checks.trace_agrees(lane.twin.run.trace.last)
        checks.well_formed(lane.twin.run.trace.last)
        assert_executed(lane.twin, call, executed)
        if len(lane.twin.run.trace.last.calls) == 1:
            lane.twin.plain.forget()
        if self.toy.in_place and predicts_outputs(self.policy):
            return got, None  # an output that was written into is no history any more, and the order is lower then
        with torch.no_grad():
            plain = lane.twin.plain.call(call.tick, call.decisions, call.facts, args)
        assert_same(plain, got)
        return got, None

    def _called(self, model: ToyDiT, run: Any, lane: Lane, args: tuple[Any, ...], branch: int) -> Tensor:
        with contextlib.ExitStack() as stack:
            if run is not None and lane.place == "key":
                stack.enter_context(run.session(lane.number))
            if lane.named:
                stack.enter_context(model.cache_context(("cond", "uncond")[branch]))
            with MODES[lane.mode]():
                return model(*args)

    # --- what changes under way --------------------------------------------------------------------------

    @rule(which=st.integers(0, MOST_LANES - 1))
    def change_prompt(self, which: int) -> None:
        """Other conditioning, in the middle of a trajectory."""
        if (lane := self._lane(which)) is not None:
            lane.draw(self.toy.width, self.dtype, latents=False)

    @rule(which=st.integers(0, MOST_LANES - 1), batch=st.integers(1, 2), tokens=st.sampled_from([2, 4, 5]))
    def reshape(self, which: int, batch: int, tokens: int) -> None:
        """Another batch, or another picture's size."""
        if (lane := self._lane(which)) is not None:
            lane.batch, lane.tokens = batch, tokens
            lane.draw(self.toy.width, self.dtype)

    @rule(which=st.integers(0, MOST_LANES - 1), mode=st.sampled_from(sorted(MODES)))
    def change_mode(self, which: int, mode: Mode) -> None:
        """Gradients on or off, or inference mode."""
        if (lane := self._lane(which)) is not None:
            lane.mode = mode

    @rule()
    def recast(self) -> None:
        """Everything in another dtype, in the middle of all trajectories."""
        self.dtype = torch.float64 if self.dtype is torch.float32 else torch.float32
        for model in (self.model, self.bare):
            model.to(self.dtype)
        for lane in self.lanes:
            lane.x, lane.ys = lane.x.to(self.dtype), [each.to(self.dtype) for each in lane.ys]
            if lane.twin is not None:
                lane.twin.model.to(self.dtype)
                lane.twin.plain.model.to(self.dtype)

    @rule(which=st.integers(0, MOST_LANES - 1))
    def give_up(self, which: int) -> None:
        """A trajectory is left where it is, and another one begins."""
        lane = self._lane(which)
        if lane is not None and lane.step > 1:
            lane.begin()
            lane.draw(self.toy.width, self.dtype)

    @rule(which=st.integers(0, MOST_LANES - 1))
    def spoil(self, which: int) -> None:
        """A number of the latents is none."""
        if (lane := self._lane(which)) is not None:
            lane.x[0, 0, 0] = torch.nan

    @rule(which=st.integers(0, MOST_LANES - 1))
    def write_latents(self, which: int) -> None:
        """The latents are written into where they lie."""
        if (lane := self._lane(which)) is not None:
            lane.x.mul_(0.9)

    @rule(which=st.integers(0, MOST_LANES - 1))
    def reset(self, which: int) -> None:
        """A session is ended by its key."""
        lane = self._lane(which)
        if lane is None or self.run is None or lane.place != "key":
            return
        before = self._held()
        self.run.reset(lane.number)
        self._anew(lane)
        self._let_go(before)

    @rule()
    def reset_all(self) -> None:
        """All sessions are ended: nothing is kept at all."""
        if self.run is not None:
            before = self._held()
            self.run.reset()
            assert {} == self._held()
            self._let_go(before)
            for lane in self.lanes:
                self._anew(lane)

    @rule(which=st.integers(0, MOST_LANES - 1))
    def call_bare(self, which: int) -> None:
        """Inside `disabled` the model is bare, and nothing of the lane moves on."""
        lane = self._lane(which)
        if lane is None or self.run is None:
            return

        def job() -> Tensor:
            with self.run.disabled():
                return self._called(self.model, self.run, lane, (lane.x, torch.tensor(5.0), lane.ys[0]), 0)

        got = lane.carry(job)
        assert_same(self._called(self.bare, None, lane, (lane.x, torch.tensor(5.0), lane.ys[0]), 0), got)

    # --- what is kept ------------------------------------------------------------------------------------

    def _held(self) -> dict[int, weakref.ref[Tensor]]:
        """Every tensor that is reached from the run, without those that the lanes hold."""
        mine = [each for lane in self.lanes for each in (lane.x, *lane.ys)]
        return {} if self.run is None else {id(each): weakref.ref(each) for each in tensors_of(self.run, besides=mine)}

    def _let_go(self, before: dict[int, weakref.ref[Tensor]]) -> None:
        """What the run does not reach any more is not alive."""
        now = self._held()
        assert [] == [name for name, each in before.items() if name not in now and each() is not None]

    def teardown(self) -> None:
        """The end: everything off, everything gone."""
        if not hasattr(self, "model"):
            return
        while self.lanes:
            self.close(0)
        self.remove()
        self.tasks.close()
        for hooks in (self.probes, self.bombs):
            hooks.remove()


def predicts_outputs(policy: cachepolicy.Policy) -> bool:
    """Whether a rule extrapolates what modules gave, rather than what they added."""
    actions = (each.action for each in policy.statements if isinstance(each, ir.Rule))
    return any(isinstance(action, ir.Predict) and not action.residual for action in actions)


def tried(job: Callable[[], Tensor]) -> Got:
    """What a job gives, or what it raises."""
    try:
        return job(), None
    except (RuntimeError, StopNow, KeyboardInterrupt) as error:
        error.__traceback__ = None
        return None, error


def assert_same(expected: Tensor | None, got: Tensor | None) -> None:
    assert expected is not None
    assert got is not None
    assert same(expected, got), f"off by {(expected - got).abs().max()}"


def assert_executed(twin: Twin, call: CallRecord, executed: dict[str, int]) -> None:
    """What ran below the interception is what the trace tells; of a span's first block the begin may be told apart."""
    for site in twin.run.plan.sites:
        runs = int(call.decisions[site.index].verdict == "compute")
        for name in site.modules if len(site.modules) == 1 else site.modules[1:]:
            assert runs == executed[name], f"`{name}` ran {executed[name]} times"


def snapshot(model: ToyDiT) -> list[tuple[type, set[str]]]:
    return [(type(module), set(module.__dict__)) for module in model.modules()]


def assert_untouched(model: ToyDiT, before: list[tuple[type, set[str]]]) -> None:
    assert before == snapshot(model)


def tensors_of(root: object, besides: list[Tensor]) -> Iterator[Tensor]:
    """Every tensor that is reached from an object of ours, without those that the caller holds."""
    seen, queue = {id(each) for each in besides}, [root]
    while queue:
        each = queue.pop()
        if id(each) in seen or isinstance(each, type | torch.nn.Module):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if each.ndim > 0:  # a number is a timestep, and the caller's
                yield each
        elif type(each).__module__.startswith("cachepolicy") or isinstance(each, dict | list | tuple | set):
            queue += gc.get_referents(each)


FAST = settings(max_examples=25, stateful_step_count=20)
DEEP = settings(max_examples=400, stateful_step_count=50)


def _soak(profile: settings) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the policy reused nothing")
        run_state_machine_as_test(Soak, settings=profile)


def test_soak() -> None:
    """A few dozen lives of a model; whatever comes between, each caller gets what it would get alone."""
    _soak(FAST)


@pytest.mark.deep
def test_soak_for_long() -> None:
    """Thousands of lives."""
    _soak(DEEP)
