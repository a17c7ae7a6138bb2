"""`skip` needs no history: it holds from the first call on, where a forward without weights shows what is returned."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.planning.facts import Fact
from cachepolicy.testing import checks
from cachepolicy.testing.models import Block, Probes, Returns, Toy, ToyDiT, inputs, redraw, sample

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

TIMESTEPS = (900.0, 600.0, 300.0)


def run(model: Any) -> None:
    """One loop under sequential guidance."""
    x, y = inputs(Toy())
    with torch.no_grad():
        list(sample(model, TIMESTEPS, x, [y, -y]))


class ValueReading(ToyDiT):
    """A model whose forward reads the value of a tensor, which the meta device does not have."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict, and refuse latents that are not finite."""
        assert bool(x.isfinite().all())
        return super().forward(x, t, y)


def compiled(model: Any, way: str) -> None:
    """Compile nothing, the model as a whole, or its blocks."""
    torch.compiler.reset()
    for module in {"eager": [], "whole": [model], "blocks": [*model.blocks]}[way]:
        module.compile(backend="eager")


@pytest.mark.parametrize("way", ["eager", "whole", "blocks"])
@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize("selector", ["blocks[1:]", "each blocks[1:]", '"^blocks.1.ff$"'])
def test_it_holds_from_the_first_call_on(selector: str, returns: Returns, way: str) -> None:
    """The simulator says the same without any fact of the run."""
    model = Toy(blocks=3, returns=returns).build()
    policy = parse(f"match {selector} -> skip")
    with cachepolicy.apply(model, policy, steps=len(TIMESTEPS)) as attached:
        compiled(model, way)
        run(model)
        run(model)
        assert attached.trace is not None
        for trajectory in attached.trace.trajectories:
            simulated = cachepolicy.simulate(
                trajectory.plan, steps=3, timesteps=TIMESTEPS, branches=trajectory.branches
            )
            assert {} == trajectory.facts
            for branch in trajectory.branches:
                assert {"RRR"} == set(trajectory.rows(branch).values())
                assert simulated.rows_of(branch) == trajectory.rows(branch)
            checks.trace_agrees(trajectory)


@pytest.mark.parametrize("way", ["eager", "whole", "blocks"])
@pytest.mark.parametrize("selector", ["blocks[1:]", "each blocks[1:]", '"^blocks.1.ff$"'])
def test_where_the_forward_needs_values_only_the_first_call_of_a_run_computes(selector: str, way: str) -> None:
    """That call shows what the skipped module returns; the simulator takes that as a fact."""
    model = ValueReading(Toy(blocks=3)).eval()
    with cachepolicy.apply(model, parse(f"match {selector} -> skip"), steps=len(TIMESTEPS)) as attached:
        compiled(model, way)
        run(model)
        run(model)
        assert attached.trace is not None
        first, second = attached.trace.trajectories
    one, other = first.branches
    assert {"CRR"} == set(first.rows(one).values())
    assert {"RRR"} == set(first.rows(other).values())
    assert {"RRR"} == {row for branch in (one, other) for row in second.rows(branch).values()}
    assert {Fact.UNKNOWN_FORM} == set(first.facts.values())
    assert {} == second.facts
    checks.trace_agrees(first)
    checks.trace_agrees(second)


def rows(model: nn.Module, policy: str) -> set[str]:
    """The rows of one run of a policy."""
    with cachepolicy.apply(model, parse(policy), steps=len(TIMESTEPS)) as attached:
        run(model)
        assert attached.trace is not None
        (trajectory,) = attached.trace.trajectories
    return {row for branch in trajectory.branches for row in trajectory.rows(branch).values()}


class Writing(Block):
    """A block that writes into its input."""

    def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
        """Add the output of the block to its input in place."""
        return x.add_(super().forward(x.clone(), context, step))


@pytest.mark.parametrize("whole", [True, False])
def test_blocks_that_write_into_their_input_are_skipped_from_the_first_call_on(whole: bool) -> None:
    """A block that is skipped writes nothing."""
    model = Toy(blocks=3).build()
    model.blocks = nn.ModuleList([*model.blocks[:1], Writing(Toy()), Writing(Toy())])
    assert {"RRR"} == rows(model.eval(), f"match {'' if whole else 'each '}blocks[1:] -> skip")


class Drawing(Block):
    """A block that draws random numbers, counts its calls and keeps a tensor."""

    def __init__(self, toy: Toy) -> None:
        super().__init__(toy)
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
        """Add noise to the output."""
        self.calls.append(x)
        return super().forward(x, context, step) + torch.rand(1)[0].item() + torch.rand_like(x)


@pytest.mark.parametrize("drawing", [False, True])
def test_the_model_notices_nothing(drawing: bool) -> None:
    """Hooks, attributes, gradients and the random state are as they were when no block has run."""
    model = Toy(blocks=3).build()
    if drawing:
        model.blocks = nn.ModuleList([Drawing(Toy()) for _ in range(3)])
    probes = Probes(model.eval())
    state = torch.get_rng_state()
    assert {"RRR"} == rows(model, "match blocks -> skip")
    assert torch.equal(state, torch.get_rng_state())
    counts = probes.take()
    assert 6 == counts["out"]
    assert {0} == {count for name, count in counts.items() if name.startswith("blocks.")}
    assert all("cpu" == tensor.device.type for tensor in model.state_dict().values())
    assert [] == [call for block in model.blocks for call in getattr(block, "calls", [])]


def test_a_model_whose_forward_was_replaced_is_not_followed() -> None:
    """Offloading replaces the forward of modules by one that moves their weights."""
    model = Toy(blocks=3).build()
    model.blocks[0].forward = functools.partial(model.blocks[0].forward)  # pyright: ignore[reportAttributeAccessIssue]
    assert {"CRR", "RRR"} == rows(model, "match blocks[1:] -> skip")


def test_threads_that_begin_together_all_skip() -> None:
    """One of them derives what the blocks return, and the others wait for it."""
    model = Toy(blocks=3).build()
    redraw(model, 1)
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        run(model)

    with cachepolicy.apply(model, parse("match blocks[1:] -> skip"), steps=len(TIMESTEPS)) as attached:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert attached.trace is not None
        trajectories = attached.trace.trajectories
    assert 4 == len(trajectories)
    assert {"RRR"} == {row for each in trajectories for branch in each.branches for row in each.rows(branch).values()}
