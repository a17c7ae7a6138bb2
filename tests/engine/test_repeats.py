"""Modules that one forward calls more than once: their sites compute, however late and in whatever order it happens."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.planning.facts import Fact
from cachepolicy.testing import checks
from cachepolicy.testing.models import Attention, Toy, ToyDiT, inputs, redraw
from cachepolicy.tracing.trace import Trajectory
from tests.support.plain_engine import PlainEngine, streams

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:warning.W604"),
]

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0, 350.0)
BLOCKS = 3

Order = Sequence[int]
"""The blocks that one forward calls, in order. A negative number -n calls block n - 1 on the batch taken twice."""


class Looped(ToyDiT):
    """A toy whose forward calls its blocks in another order at each timestep, and may run two branches in one forward.

    The order depends on nothing but the timestep, so that a forward that runs again runs the same.
    """

    def __init__(self, toy: Toy, orders: Sequence[Order], *, within: bool = False) -> None:
        super().__init__(toy)
        self.orders = dict(zip(TIMESTEPS, orders, strict=True))
        self.within = within
        redraw(self, 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction; with `within`, guided by a second pass over the blocks."""
        cond = self.once(x, t, y)
        return cond if not self.within else 2 * cond - self.once(x, t, -y)

    def once(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """One pass over the blocks."""
        step, context = self.embed((t / 1000).reshape(1, 1).expand(len(x), 1)), y
        for number in self.orders[float(t)]:
            if number >= 0:
                x, context = (*streams(self.blocks[number](x, context, step)), context)[:2]
            else:
                doubled = [torch.cat([each, each]) for each in (x, context, step)]
                x = streams(self.blocks[-number - 1](*doubled))[0][: len(x)]
        return self.out(x)


def run(model: nn.Module, *, seed: int = 0) -> list[Tensor]:
    """The predictions of one loop."""
    x, y = inputs(Toy(), seed=seed)
    predictions = list[Tensor]()
    with torch.no_grad():
        for t in TIMESTEPS:
            predictions.append(model(x, torch.tensor(t), y))
            x = x - 0.1 * predictions[-1]
    return predictions


def last(attached: cachepolicy.Run) -> Trajectory:
    """The trajectory that has just been."""
    assert attached.trace is not None
    assert attached.trace.last is not None
    return attached.trace.last


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Equal to the last bit; NaN is equal to nothing."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def reference(make: Callable[[], ToyDiT], trajectory: Trajectory, plan: Any) -> list[Tensor]:
    """What the decisions of a trajectory mean, by an engine with nothing in common with ours."""
    plain = PlainEngine(make(), plan)
    x, y = inputs(Toy())
    predictions = list[Tensor]()
    with torch.no_grad():
        for call, t in zip(trajectory.calls, TIMESTEPS, strict=True):
            predictions.append(plain.call(call.tick, call.decisions, call.facts, (x, torch.tensor(t), y)))
            x = x - 0.1 * predictions[-1]
    return predictions


# --- any loop, any policy --------------------------------------------------------------------------------


def _numbered(order: Order) -> Order:
    """Name blocks in the order in which they are first called, as models do; only a second call is a doubled one."""
    names, numbered = list[int](), list[int]()
    for number in order:
        block = abs(number)
        numbered.append(-names.index(block) - 1 if block in names and number < 0 else block)
        if block not in names:
            names.append(block)
            numbered[-1] = len(names) - 1
        elif number >= 0:
            numbered[-1] = names.index(block)
    return numbered


ONCE: Order = range(BLOCKS)
orders = st.lists(
    st.just(ONCE)
    | st.lists(st.integers(1 - BLOCKS, BLOCKS - 1), min_size=1, max_size=2 * BLOCKS).map(_numbered)
    | st.sampled_from([(0, 1, 2, 0, 1, 2), (0, 0, 1, 1, 2, 2), (0, 1, 2, 0), (0, 1, 2, 2), (0, 1, 0, 1, 2), (0, 1)]),
    min_size=len(TIMESTEPS),
    max_size=len(TIMESTEPS),
)

SIGNALS = """
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
signal moved = relative_l1(input("^blocks.1$"), prev(input("^blocks.1$")))
signal whole = l1(residual(blocks[1:3]))
"""
rules = st.builds(
    "match {} {} {} {} -> {}".format,
    st.sampled_from(
        [
            "blocks",
            "blocks[1:]",
            "blocks[0:2]",
            "each blocks",
            "blocks[2]",
            "attention",
            "feedforward",
            '"blocks.1.attn$"',
        ]
    ),
    st.sampled_from(["every 2", "every 3 offset 1", "on {0, 2, 3}", "when step >= 1", ""]),
    st.sampled_from(["", "", "while drift < 0.5", "while moved < 0.5", "while prev(whole) > 0.01"]),
    st.sampled_from(["", "at most 2 in a row"]),
    st.sampled_from(
        [
            "reuse",
            "reuse residual",
            "predict taylor(order: 1) of residual",
            "predict taylor(order: 2)",
            "predict linear(weight: 0.5, feedback: true) of residual",
            "skip",
        ]
    ),
)
policies = st.lists(rules, min_size=1, max_size=2).map(lambda each: SIGNALS + "\n".join(each) + "\n")
toys = st.sampled_from([Toy(blocks=BLOCKS), Toy(blocks=BLOCKS, returns="tuple"), Toy(blocks=BLOCKS, returns="dict")])


@given(toys, orders, st.booleans(), policies)
def test_what_is_answered_is_what_one_call_of_one_forward_gave(
    toy: Toy, each: Sequence[Order], within: bool, text: str
) -> None:
    """Whatever a forward calls twice, and when it begins to, every prediction is what the trace's decisions mean."""

    def make() -> Looped:
        return Looped(toy, each, within=within)

    try:
        attached = cachepolicy.apply(make(), parse(text))
    except cachepolicy.PolicyError:
        return
    with attached:
        predictions = run(attached.target)
        trajectory = last(attached)
    checks.trace_agrees(trajectory)
    assert same(reference(make, trajectory, attached.plan), predictions)
    for call, order in zip(trajectory.calls, each, strict=True):
        called = Counter[int]()
        for number in order:
            called[number if number >= 0 else -number - 1] += 1 + within
        for site, decision in zip(attached.plan.sites, call.decisions, strict=True):
            if any(called[int(name.split(".")[1])] > 1 for name in site.modules):
                assert decision.verdict != "reuse", (site.name, call.tick.step)


# --- the kinds that were reported ------------------------------------------------------------------------


class Step(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(8)

    def forward(self, x: Tensor) -> Tensor:
        """The moved tokens."""
        return x + torch.tanh(self.attn(x))


class Loop(nn.Module):
    """Two blocks that are looped twice in one forward, or so many times as `passes` says for a timestep."""

    def __init__(self, passes: Callable[[float], int] = lambda _: 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Step() for _ in range(2))
        self.passes = passes
        redraw(self, 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The looped blocks, moved by the time."""
        x = x + t / 1000 + y.mean()
        for _ in range(self.passes(float(t))):
            for block in self.blocks:
                x = block(x)
        return x


LATE = {"from the start": lambda _: 2, "late": lambda t: 1 + (t < 500), "now and then": lambda t: 1 + (t in {750, 450})}
_MOVED = 'signal d = relative_l1({0}("^blocks.0$"), prev({0}("^blocks.0$")))\n'
TEXTS = [
    "match blocks every 2 -> reuse residual",
    "match blocks every 3 -> reuse",
    "match each blocks every 2 -> reuse residual",
    "match blocks every 2 -> predict taylor(order: 1) of residual",
    "match each blocks every 3 -> predict taylor(order: 1)",
    'match "^blocks" every 3 -> reuse',
    _MOVED.format("residual") + "match blocks[1:] while d < 9 at most 2 in a row -> reuse residual",
    _MOVED.format("input") + 'match "^blocks.*attn$" while d < 9 at most 2 in a row -> reuse',
]


def _equal_from_the_first_loop(bare: Loop, model: Loop, when: str) -> None:
    """Run a trajectory: from the forward on that loops for the first time, both models give the same numbers."""
    x, y = inputs(Toy())
    looped = False
    for t in TIMESTEPS:
        looped |= LATE[when](t) > 1
        if looped:
            assert torch.equal(bare(x, torch.tensor(t), y), model(x, torch.tensor(t), y))
        else:
            model(x, torch.tensor(t), y)


@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize("text", TEXTS)
def test_looped_blocks_compute(text: str, when: str) -> None:
    """From the forward on that loops for the first time, the model is the bare one; before, it may reuse."""
    bare, model = Loop(LATE[when]), Loop(LATE[when])
    with torch.no_grad(), cachepolicy.apply(model, parse(text)):
        _equal_from_the_first_loop(bare, model, when)


def test_a_late_second_pass_is_told_as_a_fact() -> None:
    """The forward runs again with every site computing, and the simulator decides the same from the trace."""
    with cachepolicy.apply(Loop(LATE["late"]), parse("match blocks every 3 -> reuse residual")) as attached:
        run(attached.target)
        trajectory = last(attached)
    assert {"blocks[0:2]": "CRRCRCC"} == trajectory.rows()
    assert {("blocks[0:2]", step, ""): Fact.REPEATED for step in (5, 6)} == trajectory.facts
    checks.trace_agrees(trajectory)


TWICE = parse('match "attn$" every 2 -> reuse\nmatch "^other$" every 3 -> reuse')


class WithAnother(Loop):
    """A loop with a module that runs once."""

    def __init__(self) -> None:
        super().__init__(LATE["late"])
        self.other = Attention(8)
        redraw(self, 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The loop after the other module."""
        return super().forward(self.other(x), t, y)


def test_a_forward_that_runs_again_computes_every_site() -> None:
    """Sites that run once lose their history in that forward, and reuse again afterwards."""
    bare, model = WithAnother(), WithAnother()
    x, y = inputs(Toy())
    with torch.no_grad(), cachepolicy.apply(model, TWICE) as attached:
        for t in TIMESTEPS[:5]:
            model(x, torch.tensor(t), y)
        assert torch.equal(bare(x, torch.tensor(450.0), y), model(x, torch.tensor(450.0), y))
        trajectory = last(attached)
    assert {"blocks.0.attn": "CRCRCC", "blocks.1.attn": "CRCRCC", "other": "CRRCRC"} == trajectory.rows()
    assert Fact.RERUN == trajectory.facts["other", 5, ""]
    checks.trace_agrees(trajectory)


class WithReferences(WithAnother):
    """A loop whose tokens are those of a picture, then those of references, as `img_ids` tells."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, img_ids: Tensor | None = None) -> Tensor:
        """The loop over all tokens."""
        return super().forward(x, t, y)


def test_a_forward_that_runs_again_measures_the_same_tokens() -> None:
    """What it remembers for the next step is of the tokens of the picture, as in any other forward."""
    text = 'signal d = l1(prev(input(model, tokens: "latent")))\nmatch "attn$" every 2 -> reuse\n'
    model = WithReferences()
    x, y = torch.cat([torch.ones(1, 2, 8), torch.full((1, 2, 8), 9.0)], dim=1), inputs(Toy())[1]
    ids = torch.tensor([[0.0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
    with torch.no_grad(), cachepolicy.apply(model, parse(text + 'match "^other$" while d < 2 -> reuse')) as attached:
        for t in TIMESTEPS:
            model(x, torch.tensor(t), y, img_ids=ids)
        trajectory = last(attached)
    assert Fact.RERUN == trajectory.facts["other", 5, ""]
    other = next(site.index for site in trajectory.plan.sites if site.name == "other")
    assert 1.0 == trajectory.calls[-1].signals[other]["d"]
    assert "CRRRRCR" == trajectory.rows()["other"]
    checks.trace_agrees(trajectory)


class Writes(Loop):
    """A loop that writes into the latents it is given."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The looped blocks on latents that were moved in place."""
        return super().forward(x.add_(0.01), t, y)


def test_a_forward_that_wrote_into_its_arguments_cannot_run_again() -> None:
    """It raises and computes from then on."""
    bare, model = Writes(LATE["late"]), Writes(LATE["late"])
    x, y = inputs(Toy())
    with torch.no_grad(), cachepolicy.apply(model, parse("match blocks every 4 -> reuse residual")):
        for t in TIMESTEPS[:5]:
            model(x.clone(), torch.tensor(t), y)
        with pytest.raises(cachepolicy.PolicyError, match="cannot run again"):
            model(x.clone(), torch.tensor(450.0), y)
        assert torch.equal(bare(x.clone(), torch.tensor(350.0), y), model(x.clone(), torch.tensor(350.0), y))


def test_an_evaluation_of_the_caller_cannot_run_again() -> None:
    """`run.step` raises at its end; its session computes from then on."""
    model = Loop()
    x, _ = inputs(Toy())
    with torch.no_grad(), cachepolicy.apply(model, parse("match blocks every 4 -> reuse residual")) as attached:
        for t, loops in zip(TIMESTEPS, (1, 1, 2, 2), strict=False):
            refused = pytest.raises(cachepolicy.PolicyError, match="E342") if t == 750 else contextlib.nullcontext()
            with refused, attached.step(t=t):
                y = x
                for block in [*model.blocks] * loops:
                    y = block(y)
        assert {"blocks[0:2]": "C"} == last(attached).rows()


def test_guidance_inside_one_forward_keeps_its_strength() -> None:
    """Two branches that one forward runs over the same blocks compute, under First Block Cache too."""
    toy = Toy(blocks=BLOCKS)
    bare = run(Looped(toy, [ONCE] * len(TIMESTEPS), within=True))
    for policy in ("fbc", "pab"):
        model = Looped(toy, [ONCE] * len(TIMESTEPS), within=True)
        with cachepolicy.apply(model, policy):
            assert same(bare, run(model))


def test_one_warning_names_the_modules() -> None:
    """Once for a model, however many runs; a model whose modules run once warns of nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with cachepolicy.apply(Loop(), parse("match blocks every 2 -> reuse residual")) as attached:
            run(attached.target)
            run(attached.target, seed=1)
        with cachepolicy.apply(Loop(lambda _: 1), parse(TEXTS[-1])) as attached:
            run(attached.target)
    told = [str(each.message).partition(", and")[0] for each in caught if "W604" in str(each.message)]
    assert ["warning[W604]: one forward of `Loop` calls `blocks[0:2]` more than once"] == told


def test_a_signal_that_is_measured_twice_is_undefined() -> None:
    """A site that runs once computes from the forward on that runs the measured module twice."""
    text = 'signal d = l1(prev({}("^blocks.0$")))\nmatch "^other$" while d < 99 -> reuse'
    for stream in ("input", "output", "residual"):
        with cachepolicy.apply(WithAnother(), parse(text.format(stream))) as attached:
            run(attached.target)
            trajectory = last(attached)
        assert {"other": "CRRRRCC"} == trajectory.rows()
        checks.trace_agrees(trajectory)


# --- graphs ----------------------------------------------------------------------------------------------


class Told(Loop):
    """A loop whose caller says how often."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, loops: int = 1) -> Tensor:
        """The blocks so often."""
        x = x + t / 1000 + y.mean()
        for _ in range(loops):
            for block in self.blocks:
                x = block(x)
        return x


@pytest.mark.parametrize("text", [text for text in TEXTS if "signal" not in text])
def test_one_graph_notices_a_late_second_pass(text: str) -> None:
    """A graph without breaks that answers a site and reaches it again is run anew, outside of graphs."""
    bare, model = Told(), Told()
    x, y = inputs(Toy())
    torch.compiler.reset()
    with torch.no_grad(), cachepolicy.apply(model, parse(text)) as attached:
        model.compile(backend="eager", fullgraph=True)
        for t in TIMESTEPS[:4]:
            model(x, torch.tensor(t), y)
        assert any("R" in row for row in last(attached).rows().values())
        for t in TIMESTEPS[4:]:
            assert torch.equal(bare(x, torch.tensor(t), y, loops=2), model(x, torch.tensor(t), y, loops=2))


@pytest.mark.parametrize("way", ["whole", "blocks"])
@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize("text", TEXTS)
def test_looped_blocks_compute_in_graphs(text: str, when: str, way: str) -> None:
    """The same where the model or its blocks are compiled."""
    bare, model = Loop(LATE[when]), Loop(LATE[when])
    torch.compiler.reset()
    with torch.no_grad(), cachepolicy.apply(model, parse(text)):
        for module in [model] if way == "whole" else model.blocks:
            module.compile(backend="eager")
        _equal_from_the_first_loop(bare, model, when)
