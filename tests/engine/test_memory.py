"""What a run holds: nothing that no later step reads, and what is held is what the trace tells."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.engine.history_packing import opened, packed, packing_of
from cachepolicy.planning.liveness import Liveness
from cachepolicy.testing import checks, strategies
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
    "predict linear(weight: 1, feedback: true)", "predict taylor(order: 1)", "predict weights(of: [2, -1.5, 0.5])",
    'predict band(transform: "dct", cut: 0.3, low: taylor(order: 0), high: newton(order: 2)) of residual',
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
def counted(only_new_objects: None) -> Iterator[None]:
    """Nothing is collected, and what was there before is not looked at."""
    gc.disable()
    yield
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


FIRST_BLOCK = """signal head = residual("^blocks.0$")
signal drift = relative_l1(head, {}(head))
match blocks[1:] when step < 6 while drift < 9 at most 2 in a row -> reuse residual
"""


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("memory", "streams"), [("kept", "11111000"), ("prev", "11111000")])
def test_signals_are_remembered_where_they_are_read(memory: str, streams: str) -> None:
    """One tensor for `kept` or `prev`, none for the other; none once no rule can read them."""
    toy = Toy(blocks=3)
    model, scheduler, measured = toy.build(), Scheduler(), list[int]()
    with applied(model, FIRST_BLOCK.format(memory), scheduler) as attached:
        run_alone(model, scheduler, toy, lambda: measured.append(alive()))
        told = [call.held for call in attached.trace.last.calls]
    size = inputs(toy)[0].nbytes
    assert "CRRCRRCC" == attached.trace.rows()["blocks[1:3]"]
    residuals = "11011000"
    assert [size * (int(one) + int(other)) for one, other in zip(streams, residuals, strict=True)] == told
    # A magnitude, once it was asked for, is a number more.
    assert all(0 <= each - measured[-1] - held <= 4 for each, held in zip(measured, told, strict=True))


# --- how it is stored ------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Gives a chunk of something larger, as projections that are computed together do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8 * 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x).chunk(6, dim=-1)[0]


class FusedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Fused(), Fused()])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("text", ['match "^blocks" every 4 -> reuse', 'match "^blocks" every 4 -> reuse residual'])
def test_a_part_of_something_larger_is_copied(text: str) -> None:
    """A chunk that is kept does not keep the whole alive."""
    model, scheduler, toy = FusedModel().eval().requires_grad_(False), Scheduler(), Toy()
    measured = list[int]()
    with applied(model, text, scheduler):
        run_alone(model, scheduler, toy, lambda: measured.append(alive()))
    own = 2 * inputs(toy)[0].nbytes
    assert [own] * 3 + [0] + [own] * 3 + [0] == [each - measured[-1] for each in measured]


STORED = (
    "match attention every 4 -> reuse",
    "match attention every 4 -> predict linear(weight: 1, feedback: true)",
    "match attention every 3 -> predict taylor(order: 1)",
    "match block every 3 -> reuse residual",
    "match blocks every 3 -> predict taylor(order: 1) of residual",
    "match blocks every 3 -> reuse",
)
ERRORS = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-10, "float8_e4m3fn": 2**-3, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("text", STORED)
@pytest.mark.parametrize("dtype", ERRORS)
def test_a_history_in_another_dtype_is_nearly_the_same(text: str, dtype: Any) -> None:
    """The first answer differs by no more than the dtype's rounding allows, and what came before it by nothing."""
    model, toy = Toy(returns="tuple").build(), Toy(returns="tuple")
    with applied(model, text, Scheduler(TIMESTEPS[:2])):
        exact = run(model, Scheduler(TIMESTEPS[:2]), toy)
    with applied(model, text, None, history_dtype=dtype) as attached:
        stored = run(model, Scheduler(TIMESTEPS[:2]), toy)
        assert {"CR"} == set(attached.trace.rows().values())
    assert torch.equal(exact[0], stored[0])
    assert (exact[1] - stored[1]).abs().max() <= 4 * ERRORS[dtype] * exact[1].abs().max()
    assert (ERRORS[dtype] > 0) == (not torch.equal(exact[1], stored[1]))


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 2), ("float8_e4m3fn", 4)])
@pytest.mark.parametrize(
    "text", ["match attention every 4 -> reuse", "match each blocks[0:2] every 3 -> reuse residual"]
)
def test_a_smaller_dtype_takes_fewer_bytes(dtype: str, share: int, text: str) -> None:
    """What is alive shrinks with the dtype, but for a scale of four bytes a tensor of eight bits."""
    told = dict[str, list[int]]()
    for name in ("float32", dtype):
        model, scheduler, measured = Toy().build(), Scheduler(), list[int]()
        with applied(model, text, scheduler, history_dtype=name) as attached:
            run_alone(model, scheduler, Toy(), lambda measured=measured: measured.append(alive()))
            told[name] = [call.held for call in attached.trace.last.calls]
        assert [each - measured[-1] for each in measured] == told[name]
    scales = 2 * 4 if share == 4 else 0
    assert [each // share + (scales if each else 0) for each in told["float32"]] == told[dtype]


def test_what_has_no_fractions_keeps_its_dtype() -> None:
    """Whole numbers and truth values are stored and given back as they are."""
    packing = packing_of("float8_e4m3fn", None)
    output = (torch.arange(5), torch.tensor([True]), {"x": torch.tensor([1.5, -3.0])})
    back = opened(packed(packing, output))
    assert [torch.int64, torch.bool, torch.float32] == [back[0].dtype, back[1].dtype, back[2]["x"].dtype]
    assert torch.equal(output[0], back[0])
    assert torch.equal(output[1], back[1])


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    st.sampled_from(["float16", "float8_e4m3fn", "float8_e5m2"]),
)
def test_numbers_beyond_a_dtype_are_scaled(values: list[float], dtype: str) -> None:
    """Nothing becomes infinite or no number; all are right to the dtype's precision of the largest."""
    tensor = torch.tensor(values)
    back = packing_of(dtype, None).pack(tensor).opened()
    assert back.isfinite().all()
    smallest = 2**-24 if dtype == "float16" else 2**-100
    assert (back - tensor).abs().max() <= tensor.abs().max() * {"float16": 2**-10}.get(dtype, 2**-2) + smallest


def test_what_is_no_number_stays_so() -> None:
    """NaN and infinity survive in float16 as they are, and spoil nothing beside them."""
    tensor = torch.tensor([float("nan"), float("inf"), 2.0])
    back = packing_of("float16", None).pack(tensor).opened()
    assert back[0].isnan()
    assert 2.0 == back[2]


def test_a_history_on_another_device_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is moved there, what is used is moved back to where it was computed."""
    moves = list[tuple[str, str]]()
    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], torch.device):
            moves.append((self.device.type, args[0].type))
        return move(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    model, scheduler = Toy(blocks=1).build(), Scheduler(TIMESTEPS[:2])
    with applied(model, "match attention every 4 -> reuse", scheduler):
        expected = run(model, scheduler)
    with applied(model, "match attention every 4 -> reuse", scheduler, history_device="cpu"):
        assert all(map(torch.equal, expected, run(model, scheduler)))
    assert [("cpu", "cpu")] == moves
    assert torch.device("meta") == packing_of(None, "meta").pack(torch.ones(2)).tensor.device


def test_an_answer_is_nobody_elses() -> None:
    """Who writes into an answer from a stored copy spoils nothing."""
    toy = Toy(in_place=True)
    model = toy.build()
    rows = []
    for options in ({}, {"history_dtype": "float32"}):
        with applied(model, "match attention every 4 -> reuse", Scheduler(), **options) as attached:
            run(model, Scheduler(), toy)
            rows.append(set(attached.trace.rows().values()))
    assert {"CRRRCRRR"} == rows[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"history_dtype": "bfloat61"}, "bfloat16"),
        ({"history_dtype": "int8"}, "a torch dtype with fractions"),
        ({"history_dtype": 3}, "a torch dtype with fractions"),
        ({"history_device": "nowhere"}, "such as `cpu`"),
    ],
)
def test_nonsense_is_refused_before_anything_is_attached(options: dict[str, Any], said: str) -> None:
    """E309 says what is right, and the model is untouched."""
    model = Toy().build()
    with pytest.raises(cachepolicy.PolicyError, match="E309") as caught:
        applied(model, "match attention -> reuse", None, **options)
    assert said in str(caught.value)
    assert cachepolicy.engine.apply.run_of(model) is None


# --- the limit -------------------------------------------------------------------------------------------

EVERYTHING = "match attention or feedforward every 4 -> reuse"
SIZE = 4 * 8 * 4  # bytes of one output of the toy


def limited(
    limit: int | str | None, text: str = EVERYTHING, toy: Toy = Toy(blocks=3), **options: Any
) -> tuple[list[Tensor], Any]:
    """The predictions and the newest trajectory under a limit."""
    model, scheduler = toy.build(), Scheduler()
    with applied(model, text, scheduler, memory_limit=limit, **options) as attached:
        return run(model, scheduler, toy), attached.trace.last


@pytest.mark.parametrize("limit", [0, SIZE - 1, SIZE, 3 * SIZE + 5, 6 * SIZE, "1GiB"])
def test_over_the_limit_sites_compute(limit: int | str) -> None:
    """So many sites reuse as fit; the others compute and say why; the simulator agrees, and the probes too."""
    toy, scheduler = Toy(blocks=3), Scheduler()
    (trajectory,) = checks.engine_agrees(
        toy.build(), cachepolicy.parse(EVERYTHING), lambda model: run(model, scheduler, toy),
        scheduler=scheduler, memory_limit=limit,
    )  # fmt: skip
    fit = min(6, (2**30 if isinstance(limit, str) else limit) // SIZE)
    assert fit == sum(row == "CRRRCRRR" for row in trajectory.rows().values())
    assert 6 - fit == sum(row == "CCCCCCCC" for row in trajectory.rows().values())
    assert {"over the memory limit"} >= set(trajectory.facts.values())
    assert max(call.held for call in trajectory.calls) == fit * SIZE


def test_what_saves_least_for_its_bytes_computes() -> None:
    """Of equal outputs those of the heavier modules are kept, wherever they stand."""
    toy = Toy(blocks=3, width=16)
    rows = limited(3 * 2 * SIZE, toy=toy)[1].rows()
    reused = {site for site, row in rows.items() if "R" in row}
    assert {site for site in rows if site.endswith(".ff")} == reused


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    "text",
    [
        EVERYTHING,
        "match attention every 4 -> predict linear(weight: 1, feedback: true)",
        "match block every 3 -> reuse residual\nmatch attention every 2 -> reuse",
        "match each blocks[0:2] every 4 -> predict taylor(order: 1, feedback: true) of residual",
        FIRST_BLOCK.format("kept"),
        FIRST_BLOCK.format("prev"),
    ],
)
@pytest.mark.parametrize("limit", [100, 300, 500, 700])
def test_the_limit_is_never_exceeded(text: str, limit: int) -> None:
    """What is alive after a call is within the limit, whatever the actions, and what the trace tells."""
    toy, scheduler, measured = Toy(blocks=3), Scheduler(), list[int]()
    with applied(toy.build(), text, scheduler, memory_limit=limit) as attached:
        run_alone(attached.target, scheduler, toy, lambda: measured.append(alive()))
        told = [call.held for call in attached.trace.last.calls]
    checks.trace_agrees(attached.trace.last)
    assert all(each <= limit for each in told)
    assert all(0 <= each - measured[-1] - held <= 4 for each, held in zip(measured, told, strict=True))


def test_sites_inside_one_that_is_refused_may_reuse() -> None:
    """A large span that does not fit computes, and the attention in it is reused."""
    text = "match blocks every 4 -> predict taylor(order: 3) of residual\nmatch attention every 2 -> reuse"
    _, trajectory = limited(3 * SIZE, text)
    rows = trajectory.rows()
    assert "CCCCCCCC" == rows["blocks[0:3]"]
    assert {"CRCRCRCR"} == {row for site, row in rows.items() if site.endswith("attn")}


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    """Outputs and decisions are those without one."""
    (free, one), (bound, other) = limited(None), limited("1MB")
    assert all(map(torch.equal, free, bound))
    assert one.rows() == other.rows()


def test_a_limited_run_repeats() -> None:
    """The same sites do without in every run, and the predictions are the same to the last bit."""
    (first, one), (second, other) = limited(3 * SIZE), limited(3 * SIZE)
    assert one.facts == other.facts
    assert all(map(torch.equal, first, second))


def test_sessions_share_a_limit() -> None:
    """Two sessions in turn: together never more than the limit, each its fair share, and all of it once alone."""
    toy, limit = Toy(blocks=3), 6 * SIZE
    model, (x, y) = toy.build(), inputs(toy)
    held = list[int]()
    with torch.no_grad(), applied(model, EVERYTHING, None, steps=8, memory_limit=limit) as attached:
        for t in TIMESTEPS:
            for key in "ab":
                with attached.session(key):
                    model(x, torch.tensor(t), y)
                held.append(attached.memory.held)
        assert "over the memory limit" in str(attached.trace)
        first, second = attached.trace.trajectories
        assert 0 == attached.memory.held
        with attached.session("c"):
            for t in TIMESTEPS:
                model(x, torch.tensor(t), y)
        assert "CRRRCRRR" in set(attached.trace.rows().values())
        assert 1 == len(set(attached.trace.rows().values()))
    assert max(held) <= limit
    shares = [sum(row.count("R") > 2 for row in each.rows().values()) for each in (first, second)]
    assert [3, 3] == shares


def test_threads_share_a_limit() -> None:
    """Sessions at once hold no more than the limit at any time, and each prediction is that of its own facts."""
    toy, limit = Toy(blocks=3), 8 * SIZE
    model, (x, y) = toy.build(), inputs(toy)
    seen, errors = list[int](), list[BaseException]()

    def loop(attached: Any) -> None:
        try:
            with torch.no_grad():
                for t in TIMESTEPS * 4:
                    model(x, torch.tensor(t), y)
                    seen.append(attached._attachment.budget.held)
        except BaseException as error:  # noqa: BLE001 (it is looked at below)
            errors.append(error)

    with applied(model, EVERYTHING, None, steps=8, memory_limit=limit) as attached:
        threads = [threading.Thread(target=loop, args=(attached,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for trajectory in attached.trace.trajectories:
            checks.trace_agrees(trajectory)
        del threads, thread
        assert 0 == attached._attachment.budget.held
    assert [] == errors
    assert 6 * 32 == len(seen)
    assert max(seen) <= limit


def test_a_limit_counts_what_is_stored() -> None:
    """In half the bytes twice as many sites fit."""
    _, whole = limited(2 * SIZE)
    _, half = limited(4 * (SIZE // 2 + 4), history_dtype="bfloat16")
    assert 2 == sum("R" in row for row in whole.rows().values())
    assert 4 == sum("R" in row for row in half.rows().values())


def test_memory_says_what_is_held() -> None:
    """`run.memory` in numbers and in words."""
    toy = Toy(blocks=3)
    model, (x, y) = toy.build(), inputs(toy)
    with torch.no_grad(), applied(model, EVERYTHING, None, memory_limit="384B") as attached:
        model(x, torch.tensor(900.0), y)
        model(x, torch.tensor(800.0), y)
        assert (3 * SIZE, 3 * SIZE, 384) == (attached.memory.held, attached.memory.most, attached.memory.limit)
        assert (
            "384 B of 384 B held, 384 B by one session at most\nover the memory limit: blocks.1.ff and 2 more"
            == str(attached.memory)
        )
        assert "over the memory limit: 3 sites, which computed instead" in str(attached.trace)
    assert (0, ()) == (attached.memory.held, attached.memory.refused)


@pytest.mark.parametrize("limit", ["2 gigs", "", -1, True, 1.5, "1iB"])
def test_a_limit_that_is_no_size_is_refused(limit: Any) -> None:
    """E309 says how a size is written."""
    with pytest.raises(cachepolicy.PolicyError, match="E309") as caught:
        applied(Toy().build(), EVERYTHING, None, memory_limit=limit)
    assert "`512MiB`" in str(caught.value)


# --- real architectures ----------------------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {
    "pab": {"spatial_range": (-1, 1001), "cross_every": 3, "cross_range": (-1, 1001)},
    "fbc": {"threshold": 0.9},
    "fastercache": {"uncond_every": 2},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("policy", REAL)
@pytest.mark.parametrize("name", ["wan", "pixart", "flux", "unet2d_condition"])
def test_models_hold_what_the_trace_tells(name: str, policy: str) -> None:
    """The storage that is alive after each call, counted from outside, on models of diffusers."""
    zoo = pytest.importorskip("tests.support.zoo")
    if (name, policy) in {("flux", "fastercache"), ("unet2d_condition", "fbc")}:
        pytest.skip("its prediction's layout is not told, or it has no chain of blocks")
    model, entry, scheduler, batch = zoo.build(name), zoo.entry(name), Scheduler(), 1 + (policy == "fastercache")
    told = {"guidance": True} if policy == "fastercache" else {}
    measured = list[int]()
    with torch.no_grad():
        # What a model keeps for itself from its first call on is none of ours.
        model(**entry.inputs(batch=batch))
        with cachepolicy.apply(model, policy, scheduler=scheduler, **told, **REAL[policy]) as attached:
            for t in TIMESTEPS:
                model(**entry.inputs(batch=batch, t=t))
                scheduler.step()
                measured.append(alive())
            held = [call.held for call in attached.trace.last.calls]
    assert 0 < max(held)
    assert 0 == held[-1]
    # A magnitude of a signal is one number more.
    assert all(0 <= each - measured[-1] - own <= 8 for each, own in zip(measured, held, strict=True))
