"""Given what a run measured and found, the simulator decides as the engine does, for the same reasons."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, note
from hypothesis import strategies as st
from torch import Tensor

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.testing import checks, strategies
from cachepolicy.testing.models import Probes, Toy, ToyDiT, inputs, redraw

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")


class GuidedToy(ToyDiT):
    """A toy whose caller names the branch of a call, as the pipelines of diffusers do."""

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Generator[None]:
        """Name the branch of the calls inside."""
        yield


@dataclass(frozen=True, slots=True)
class Loop:
    """One sampling loop: its branches, and the steps at which all of them but the first are called.

    A batched loop makes one unnamed call for both halves.
    """

    timesteps: Sequence[float]
    branches: tuple[str, ...]
    guided: range
    batched: bool = False

    def branches_at(self, step: int) -> tuple[str, ...]:
        """Return the branches of a step, in the order of the calls."""
        return self.branches if step in self.guided else self.branches[:1]


MODES = ((), ("",), ("", ""), ("cond", "uncond"), ("uncond", "cond"), ("cond", "perturbed", "uncond"), ("a", "b"))
"""The branches of a step; none stands for a guidance batch."""


@st.composite
def loops(draw: st.DrawFn) -> Loop:
    timesteps, branches = draw(strategies.timesteps(2, 8)), draw(st.sampled_from(MODES))
    guided = range(draw(st.sampled_from([0, 0, 1, 3])), len(timesteps) - draw(st.sampled_from([0, 0, 1, 2])))
    return Loop(timesteps, branches or ("",), guided, batched=not branches)


def calls(model: GuidedToy, loop: Loop, seed: int) -> Iterator[None]:
    """Run a loop, one root call at a time."""
    x, y = inputs(Toy(), seed=seed, batch=2 if loop.batched else 1)
    conditions = [y, -y, y + 1]
    for step, t in enumerate(loop.timesteps):
        predictions = list[Tensor]()
        for branch, condition in zip(loop.branches_at(step), conditions, strict=False):
            with model.cache_context(branch) if branch else contextlib.nullcontext():
                predictions.append(model(x, torch.tensor(float(t)), condition))
            yield
        x = x - 0.1 * torch.stack(predictions).mean(0)


def agree(
    policy: cachepolicy.Policy,
    loop: Loop,
    *,
    toy: Toy = Toy(),
    turns: Sequence[int] = (),
    inference: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Run the loop in as many sessions as `turns` names, one root call of a session at each turn, and compare."""
    model = GuidedToy(toy)
    redraw(model, 0)
    probes = Probes(model.eval())
    with cachepolicy.apply(model, policy, steps=len(loop.timesteps), guidance=loop.batched, **options) as run:
        sessions = {key: calls(model, loop, key) for key in sorted({0, *turns})}
        queue = [*turns, *(key for key in sessions for _ in range(3 * len(loop.timesteps)))]
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            for key in queue:
                with run.session(key):
                    next(sessions[key], None)
        trajectories = run.trace.trajectories
        checks.saved_alike(run.trace)
    assert len(sessions) == len(trajectories)
    for trajectory in trajectories:
        checks.well_formed(trajectory)
        checks.trace_agrees(trajectory)
        if not trajectory.plan.probes and len(loop.guided) == len(loop.timesteps):
            _simulates(trajectory, loop)
    checks._executions_agree(trajectories, probes.take())
    return trajectories


def _simulates(trajectory: Any, loop: Loop) -> None:
    """`simulate` needs the timesteps, the branches and the facts alone where nothing is measured."""
    schedule = cachepolicy.simulate(
        trajectory.plan,
        steps=len(loop.timesteps),
        timesteps=loop.timesteps,
        branches=trajectory.branches,
        facts=trajectory.facts,
    )
    for (tick, decisions), call in zip(schedule, trajectory.calls, strict=True):
        assert [(each.verdict, each.rule, each.reason) for each in decisions] == [
            (each.verdict, each.rule, each.reason) for each in call.decisions
        ], tick


SPANS = ("blocks", "blocks[1:]", "blocks[0:2]", "attention", "block", "model")
ACTIONS = (
    "reuse",
    "reuse residual",
    "skip",
    "compute",
    "predict taylor(order: 1)",
    "predict linear(weight: 0.5, feedback: true)",
)
TOYS = st.builds(
    Toy, blocks=st.integers(2, 3), returns=st.sampled_from(["tensor", "tuple", "dict"]), in_place=st.booleans()
)


@given(st.data())
def test_the_engine_decides_as_the_simulator(data: st.DataObject) -> None:
    """Follow, approximated guidance, named and unnamed branches, signals in any order, sessions and memory limits."""
    loop = data.draw(loops(), label="loop")
    approximate = data.draw(st.booleans())
    policy = data.draw(
        strategies.policies(
            steps=len(loop.timesteps),
            selectors=data.draw(st.sampled_from([strategies.SELECTORS, SPANS])),
            actions=data.draw(st.sampled_from([strategies.ACTIONS, ACTIONS])),
            follow=data.draw(st.sampled_from([None, "cond", "uncond", loop.branches[0] or None])),
            measured=data.draw(st.booleans()),
            approximate=strategies.APPROXIMATION if approximate else None,
        )
    )
    note(cachepolicy.format(policy))
    turns = data.draw(st.lists(st.integers(0, 2), max_size=12))
    limit = data.draw(st.sampled_from([None, None, None, 0, 500, 2000, 6000]))
    with refused():
        agree(
            policy,
            loop,
            toy=data.draw(TOYS),
            turns=turns,
            inference=data.draw(st.booleans()),
            memory_limit=limit,
        )


REFUSED = {"E203", "E310", "E311"}
"""Codes of policies that the engine refuses: spans that overlap, and spans of blocks without a chain."""


@contextlib.contextmanager
def refused() -> Generator[None]:
    """Leave out the examples that the engine refuses."""
    try:
        yield
    except PolicyError as error:
        assume(any(each.code not in REFUSED for each in error.diagnostics))
        raise
