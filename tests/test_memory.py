"""What a run holds: nothing that no later step reads, and what is held is what the trace tells."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.liveness import Liveness
from cachepolicy.testing import strategies
from cachepolicy.testing.models import Probes, Toy, inputs, sample

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0, 350.0, 250.0)


class Scheduler:
    """As much of a scheduler as the clock follows: its timesteps, and a `step` that is called once a step."""

    def __init__(self, timesteps: Sequence[float] = TIMESTEPS) -> None:
        self.timesteps = torch.tensor(timesteps)

    def set_timesteps(self) -> None:
        """Begin anew."""

    def step(self) -> None:
        """One step."""


@torch.no_grad()
def run(
    model: nn.Module,
    scheduler: Scheduler,
    toy: Toy = Toy(),
    *,
    pair: bool = False,
) -> list[Tensor]:
    """The predictions of a loop along a scheduler; with `pair` there are two branches."""
    x, y = inputs(toy)
    predictions = list[Tensor]()
    scheduler.set_timesteps()
    count = 1 + pair
    for number, prediction in enumerate(sample(model, scheduler.timesteps.tolist(), x, [y, -y] if pair else y), 1):
        predictions.append(prediction)
        if number % count == 0:
            scheduler.step()
    return predictions


def applied(model: nn.Module, text: str, scheduler: Scheduler | None, **options: Any) -> Any:
    return cachepolicy.apply(model, cachepolicy.parse(text), scheduler=scheduler, **options)


SIGNALS = """signal first = residual("^blocks.0.norm$")
signal drift = relative_l1(first, prev(first))
signal moved = relative_l1(first, kept(first))
"""
ACTIONS = (
    "reuse", "reuse residual", "skip", "predict linear(weight: 0.5)", "predict taylor(order: 2) of residual",
    "predict linear(weight: 1, feedback: true)", "predict taylor(order: 1)",
)  # fmt: skip


@contextlib.contextmanager
def everything_kept() -> Iterator[None]:
    """Nothing is let go of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Liveness, "wanted", lambda self, group, *_: self.full[group])
        for name in ("measures", "approximates"):
            patch.setattr(Liveness, name, lambda *_, **__: True)
        yield


FED = """match optional attention when step != 2 -> predict linear(weight: 1, feedback: true)
match attention -> reuse residual
"""


def test_results_may_be_kept_in_different_forms() -> None:
    """An answer that was fed back is read as a residual although the result before it is not kept as one."""
    model, scheduler = Toy().build(), Scheduler(TIMESTEPS[:4])
    with applied(model, FED, scheduler):
        short = run(model, scheduler)
    with everything_kept(), applied(model, FED, scheduler):
        full = run(model, scheduler)
    assert all(map(torch.equal, full, short))


@given(st.data())
def test_letting_go_changes_nothing(data: st.DataObject) -> None:
    """On any policy of clock, counts and signals, outputs, decisions and executions are those of keeping everything."""
    toy = data.draw(st.builds(Toy, blocks=st.integers(2, 3), returns=st.sampled_from(["tensor", "tuple", "list"])))
    timesteps = data.draw(strategies.timesteps(2))
    selectors = ["attention", "feedforward", "block"]
    lines = data.draw(
        st.lists(strategies.rules(steps=len(timesteps), selectors=selectors, actions=ACTIONS), min_size=1, max_size=3)
    )
    clause = data.draw(st.sampled_from(["", "while drift < 0.5", "while moved < 2", "while sum(drift) < 1"]))
    when = data.draw(st.sampled_from(["", "when t < 600", "when step in {1, 2, 5}"]))
    lines.insert(data.draw(st.integers(0, len(lines))), f'match "^blocks.1.*attn" {when} {clause} -> reuse')
    policy = cachepolicy.parse(SIGNALS + "\n".join(lines) + "\n")
    pair, known = data.draw(st.booleans()), data.draw(st.booleans())
    results = list[tuple[list[Tensor], dict[str, int], list[list[str]]]]()
    for keeps in (True, False):
        model, scheduler = toy.build(), Scheduler(timesteps)
        probes = Probes(model)
        with everything_kept() if keeps else contextlib.nullcontext():
            options = {"scheduler": scheduler} if known else {"steps": len(timesteps)}
            with cachepolicy.apply(model, policy, **options) as attached:
                outputs = run(model, scheduler, toy, pair=pair)
                calls = [[decision.reason for decision in call.decisions] for call in attached.trace.last.calls]
        results.append((outputs, probes.take(), calls))
    (bare, executed, told), (outputs, ours, mine) = results
    assert executed == ours
    assert told == mine
    assert all(map(torch.equal, bare, outputs))


# --- what is held ----------------------------------------------------------------------------------------


@pytest.fixture
def counted() -> Iterator[None]:
    """Nothing is collected, and what was there before is not looked at."""
    gc.collect()
    gc.disable()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.enable()


def alive() -> int:
    """The bytes of all storage behind living tensors that were made since, each once."""
    storages = dict[int, int]()
    for each in gc.get_objects():
        if type(each) in {Tensor, nn.Parameter}:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


HELD = {
    "match attention every 2 -> reuse": "10101010",
    "match attention when t > 500 every 2 -> reuse": "10100000",
    "match attention when t < 500 every 3 offset 2 -> reuse": "00000110",
    "match attention every 4 -> predict linear(weight: 1)": "11112220",
    "match block every 3 -> reuse residual": "11011010",
    "match blocks every 3 -> reuse residual": "11011010",
    "match blocks every 3 -> predict taylor(order: 1) of residual": "11122120",
}


@pytest.mark.parametrize("text", HELD)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.usefixtures("counted")
def test_the_trace_tells_the_bytes_that_are_alive(text: str, inference: bool) -> None:
    """After every step, what the histories hold is what the process has more of, and nothing after the last one."""
    model, scheduler, toy = Toy().build(), Scheduler(), Toy()
    measured = list[int]()

    def look() -> None:
        measured.append(alive())

    with torch.inference_mode(inference), applied(model, text, scheduler) as attached:
        run_alone(model, scheduler, toy, look)
        told = [call.held for call in attached.trace.last.calls]
    unit = max(told) // int(max(HELD[text]))
    assert [int(each) * unit for each in HELD[text]] == told
    assert [each - measured[-1] for each in measured] == told


def run_alone(model: nn.Module, scheduler: Scheduler, toy: Toy, look: Callable[[], None]) -> None:
    """A loop that holds nothing but its latents when it looks."""
    x, y = inputs(toy)
    with torch.no_grad():
        for t in scheduler.timesteps.tolist():
            x = x - 0.1 * model(x, torch.tensor(t), y)
            scheduler.step()
            look()
