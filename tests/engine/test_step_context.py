"""`run.step`: loops that call the blocks of a model themselves run as if they had called the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
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
from cachepolicy.planning.schedule import NOT_CALLED
from cachepolicy.planning.tally import tally
from cachepolicy.testing import checks
from cachepolicy.testing.models import Probes, Toy, ToyDiT

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "error:.*W601")

POLICIES = (
    "match attention every 2 -> reuse",
    "match attention when t in (150, 850) every 3 since compute -> reuse\nmatch feedforward every 2 -> reuse",
    "match blocks[1:] every 3 -> reuse residual",
    "match each blocks when step > 1 every 2 -> predict taylor(order: 1)",
    (
        "signal head = residual(blocks[0])\nsignal drift = relative_l1(head, kept(head))\n"
        "match blocks[1:] while drift <= 0.5 -> reuse residual"
    ),
)
TIMES = [900.0, 700.0, 500.0, 300.0, 100.0, 50.0]
LATENTS = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
CONDITIONS = {
    name: torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(("cond", "uncond"), 1)
}


def evaluate(dit: ToyDiT, x: Tensor, t: float, y: Tensor) -> Tensor:
    """A function that drives the blocks, as `model_fn_wan_video` of DiffSynth does; it never calls the model."""
    time = torch.full((len(x), 1), t / 1000)
    step = dit.embed(time)
    context = y
    for block in dit.blocks:
        x = block(x, context, step)
    return dit.out(x)


def by_model(dit: ToyDiT, run: Any, x: Tensor, t: float, name: str, **told: Any) -> Tensor:
    return dit(x, torch.tensor([t]), CONDITIONS[name])


def by_blocks(dit: ToyDiT, run: Any, x: Tensor, t: float, name: str, **told: Any) -> Tensor:
    with run.step(branch=name, **{"t": t, **told}):
        return evaluate(dit, x, t, CONDITIONS[name])


def sample(call: Callable[..., Tensor], dit: ToyDiT, run: Any, names: tuple[str, ...] = ("cond", "uncond")) -> Tensor:
    """A loop of a sampler with guidance in one call or two."""
    x = LATENTS
    for index, t in enumerate(TIMES):
        first, *rest = [call(dit, run, x, t, name, step=index, steps=len(TIMES)) for name in names]
        x = x - 0.1 * (first + sum(2.0 * (first - each) for each in rest))
    return x


def decisions(run: Any) -> list[list[tuple[int, float | None, str]]]:
    """Step, t and decisions of every call, by trajectory."""
    return [
        [(call.tick.step, call.tick.t, "".join(each.verdict[0] for each in call.decided)) for call in one.calls]
        for one in run.trace
    ]


@pytest.mark.parametrize("names", [("cond",), ("cond", "uncond")], ids=["alone", "guided"])
@pytest.mark.parametrize("text", POLICIES)
def test_a_loop_over_the_blocks_is_the_model(text: str, names: tuple[str, ...]) -> None:
    """The same decisions, computes and tensors, over two trajectories, as the model that is called."""
    results = dict[Any, Any]()
    for call in (by_model, by_blocks):
        dit = Toy(blocks=4).build()
        with torch.no_grad(), cachepolicy.apply(dit, parse(text), steps=len(TIMES)) as run:
            probes = Probes(dit)
            latents = [sample(call, dit, run, names) for _ in range(2)]
            counts = probes.take()
            probes.remove()
            results[call] = latents, {name: count for name, count in counts.items() if name}, decisions(run)
    (expected, executed, decided), (got, executed_too, decided_too) = results[by_model], results[by_blocks]
    assert all(map(torch.equal, expected, got))
    assert executed == executed_too
    assert decided == decided_too
    assert "r" in {verdict for one in decided for _, _, verdicts in one for verdict in verdicts}


@pytest.mark.parametrize("text", POLICIES[:2])
def test_compiled_blocks_run_as_eager_ones(text: str) -> None:
    """Blocks that are compiled one by one take their decisions from the context."""
    results = list[Any]()
    for compiled in (False, True):
        dit = Toy(blocks=3).build()
        if compiled:
            torch._dynamo.reset()
            for block in dit.blocks:
                block.compile(backend="eager")
        with torch.no_grad(), cachepolicy.apply(dit, parse(text), steps=len(TIMES)) as run:
            results.append((sample(by_blocks, dit, run), decisions(run)))
    (expected, decided), (got, decided_too) = results
    assert torch.equal(expected, got)
    assert decided == decided_too


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "cogvideox", "hunyuan_video", "unet2d_condition"])
def test_forward_in_a_context_is_the_model_of_diffusers(name: str) -> None:
    """Every architecture: its `forward`, called past the model, decides and answers as the model does."""
    pytest.importorskip("diffusers")
    from tests.support import zoo

    text = "match attention every 2 -> reuse\nmatch feedforward every 3 -> reuse"
    results = list[Any]()
    for own in (False, True):
        model: Any = zoo.build(name)
        with torch.no_grad(), cachepolicy.apply(model, parse(text)) as run:
            clock = ((t, branch) for t in TIMES[:4] for branch in ("cond", "uncond"))

            def call(*args: Any, model: Any = model, run: Any = run, clock: Any = clock, **kwargs: Any) -> Any:
                t, branch = next(clock)
                with run.step(t=t, branch=branch):
                    return model.forward(*args, **kwargs)

            kept = zoo.trajectory(name, call if own else model, TIMES[:4], guidance="sequential")
            results.append((list(kept), [verdicts for one in decisions(run) for _, _, verdicts in one]))
    (expected, decided), (got, decided_too) = results
    assert decided == decided_too
    assert all(torch.equal(one, two) for one, two in zip(expected, got, strict=True))
    assert "r" in "".join(decided)


@given(
    times=st.lists(st.integers(1, 999), min_size=1, max_size=6, unique=True),
    branches=st.integers(1, 3),
    tells=st.sampled_from(["t", "step", "both", "neither"]),
)
def test_what_tells_the_step_is_enough(times: list[int], branches: int, tells: str) -> None:
    """`t`, `step`, both, or nothing but the branches: the steps are those of the loop."""
    dit = Toy(blocks=1).build()
    times = sorted(times, reverse=True)
    with torch.no_grad(), cachepolicy.apply(dit, parse("match attention every 2 -> reuse")) as run:
        for index, t in enumerate(times):
            told = {"t": float(t)} if tells == "t" else {"step": index} if tells == "step" else {}
            if tells == "both":
                told = {"t": float(t), "step": index}
            for branch in range(branches):
                with run.step(branch=f"part {branch}", **told):
                    evaluate(dit, LATENTS, t, CONDITIONS["cond"])
        (one,) = run.trace
        got = [(call.tick.step, call.tick.t, call.tick.branch) for call in one.calls]
    shown = [float(t) if tells in {"t", "both"} else None for t in times]
    assert [(index, t, f"part {branch}") for index, t in enumerate(shown) for branch in range(branches)] == got


def test_the_words_of_the_clock_are_what_is_told() -> None:
    """`sigma`, `steps` and `progress`, and a tensor for `t`."""
    dit = Toy(blocks=1).build()
    text = "match attention when sigma < 3 and progress > 0.5 -> reuse"
    with torch.no_grad(), cachepolicy.apply(dit, parse(text)) as run:
        for index, sigma in enumerate([5.0, 4.0, 2.0, 1.0]):
            with run.step(t=torch.tensor(900.0 - index), step=index, steps=4, sigma=sigma):
                evaluate(dit, LATENTS, 500.0, CONDITIONS["cond"])
        assert ["CCRR"] == list(run.trace.rows().values())
        assert [(4, 5.0, 900.0), (4, 4.0, 899.0), (4, 2.0, 898.0), (4, 1.0, 897.0)] == [
            (call.tick.steps, call.tick.sigma, call.tick.t) for call in run.trace.last.calls
        ]


def test_a_step_that_repeats_a_timestep_is_the_next() -> None:
    """Second-order samplers evaluate a timestep twice: told by `t`, both are steps of the branch."""
    dit = Toy(blocks=1).build()
    with torch.no_grad(), cachepolicy.apply(dit, parse("match attention every 2 -> reuse")) as run:
        for t in (900, 700, 700, 400, 400):
            with run.step(t=t):
                evaluate(dit, LATENTS, t, CONDITIONS["cond"])
        assert ["CRCRC"] == list(run.trace.rows().values())


def test_a_policy_that_reads_t_asks_for_it() -> None:
    """Where only the step is told, the error names what is missing."""
    dit = Toy(blocks=1).build()
    policy = parse("match attention when t < 500 every 2 -> reuse")
    with cachepolicy.apply(dit, policy) as run, pytest.raises(PolicyError, match="`t`"), run.step(step=0):
        pass


def test_a_scheduler_tells_what_is_left_out() -> None:
    """With `scheduler=` the context needs no more than the branch."""
    diffusers = pytest.importorskip("diffusers")
    dit, scheduler = Toy(blocks=1).build(), diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    policy = parse("match attention when progress > 0 every 2 -> reuse")
    with torch.no_grad(), cachepolicy.apply(dit, policy, scheduler=scheduler) as run:
        x = LATENTS
        for t in scheduler.timesteps:
            with run.step(branch="cond"):
                noise = evaluate(dit, x, float(t), CONDITIONS["cond"])
            x = scheduler.step(noise, t, x).prev_sample
        got = [(call.tick.step, call.tick.t) for call in run.trace.last.calls]
    assert list(enumerate(scheduler.timesteps.tolist())) == got


def test_a_call_of_the_model_inside_is_part_of_the_step() -> None:
    """Whoever wraps a call of the model decides once, by what the context tells."""
    dit = Toy(blocks=2).build()
    with torch.no_grad(), cachepolicy.apply(dit, parse(POLICIES[0])) as run:
        for index in range(4):
            with run.step(t=900 - index, branch="mine"):
                dit(LATENTS, torch.tensor([5.0]), CONDITIONS["cond"])
        (one,) = run.trace
        assert [(index, 900.0 - index, "mine") for index in range(4)] == [
            (call.tick.step, call.tick.t, call.tick.branch) for call in one.calls
        ]
        assert {"CRCR"} == set(one.rows().values())


def test_an_error_inside_ends_the_session() -> None:
    """A step that fails leaves the session as if its trajectory had not been; the next one starts anew."""
    dit = Toy(blocks=1).build()
    with torch.no_grad(), cachepolicy.apply(dit, parse(POLICIES[0])) as run:
        by_blocks(dit, run, LATENTS, 900.0, "cond")
        with pytest.raises(ZeroDivisionError), run.step(t=800):
            _ = 1 / 0
        by_blocks(dit, run, LATENTS, 700.0, "cond")
        by_blocks(dit, run, LATENTS, 600.0, "cond")
        assert ["CR"] == list(run.trace.rows().values())
        run.remove()


def test_sessions_and_threads_are_apart() -> None:
    """Each thread and each keyed session has its own clock and histories."""
    dit = Toy(blocks=2).build()
    with torch.no_grad(), cachepolicy.apply(dit, parse(POLICIES[0]), steps=len(TIMES)) as run:
        expected = sample(by_blocks, dit, run)

        def serve(key: int) -> bool:
            with torch.no_grad(), run.session(key):
                return torch.equal(expected, sample(by_blocks, dit, run))

        with ThreadPoolExecutor(3) as pool:
            assert [True] * 6 == list(pool.map(serve, range(6)))


def test_a_step_that_ends_in_another_thread_leaves_the_calls_there_alone() -> None:
    """A loop that is given up inside a step is closed wherever the collector runs, also during a call of the model."""
    dit = Toy(blocks=2).build()
    with torch.no_grad(), cachepolicy.apply(dit, parse(POLICIES[0]), steps=len(TIMES)) as run:
        expected = sample(by_model, dit, run)

        def loop() -> Iterator[None]:
            with run.step(t=900):
                yield

        given_up = loop()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(next, given_up).result()
            dit.blocks[0].register_forward_pre_hook(lambda *_: given_up.close())
            assert torch.equal(expected, sample(by_model, dit, run))
            # The call is over in its own thread too.
            assert torch.equal(expected, pool.submit(torch.no_grad()(sample), by_model, dit, run).result())


def test_disabled_and_removed_runs_let_the_loop_run_bare() -> None:
    """The context stays in the loop; without the policy it does nothing."""
    dit = Toy(blocks=2).build()
    bare = evaluate(dit, LATENTS, 500.0, CONDITIONS["cond"])
    run = cachepolicy.apply(dit, parse(POLICIES[0]))
    for _ in range(3):
        with run.disabled(), run.step(t=500):
            assert torch.equal(bare, evaluate(dit, LATENTS, 500.0, CONDITIONS["cond"]))
    assert 0 == len(run.trace)
    run.remove()
    with run.step(t=500):
        assert torch.equal(bare, evaluate(dit, LATENTS, 500.0, CONDITIONS["cond"]))


@pytest.mark.parametrize(
    "told",
    [
        {"t": "900"},
        {"t": float("nan")},
        {"t": True},
        {"t": torch.zeros(2)},
        {"step": -1},
        {"step": 1.0},
        {"step": True},
        {"steps": 0},
        {"step": 4, "steps": 4},
        {"sigma": "high"},
        {"branch": 1},
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_refused(told: dict[str, Any]) -> None:
    """E324 names the argument, before anything runs."""
    name = next(iter(told))
    with cachepolicy.apply(Toy().build(), parse(POLICIES[0])) as run, pytest.raises(PolicyError, match="E324") as error:
        run.step(**told)
    assert f"`{name}`" in str(error.value)


@pytest.mark.parametrize("t", [-5, 1500.0, torch.tensor(5e4)])
def test_a_timestep_in_other_units_is_refused(t: Any) -> None:
    """E321 where the policy reads `t`; others only need to see it change."""
    for text, refused in ((POLICIES[1], pytest.raises(PolicyError, match="E321")), (POLICIES[0], None)):
        with cachepolicy.apply(Toy().build(), parse(text)) as run, refused or contextlib.nullcontext(), run.step(t=t):
            pass


@pytest.mark.parametrize(
    "text",
    [
        "match model every 2 -> reuse",
        (
            "signal x = input(model)\nsignal drift = relative_l1(x, kept(x))\n"
            "match blocks[1:] while drift <= 0.5 -> reuse residual"
        ),
    ],
)
def test_rules_on_the_model_itself_are_refused(text: str) -> None:
    """A context can neither answer a call that is not made nor see its inputs."""
    with (
        cachepolicy.apply(Toy(blocks=3).build(), parse(text)) as run,
        pytest.raises(PolicyError, match="E324"),
        run.step(t=900),
    ):
        pass


def test_steps_do_not_nest() -> None:
    """Two evaluations of one model cannot be open at once."""
    dit = Toy().build()
    with (
        cachepolicy.apply(dit, parse(POLICIES[0])) as run,
        pytest.raises(PolicyError, match="E324"),
        run.step(t=900),
        run.step(t=900),
    ):
        pass


class Pair(nn.Module):
    """Two experts, as a pipeline holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Toy().build(), Toy().build(seed=1)


def test_two_runs_may_be_open_at_once() -> None:
    """Each answers for its own model."""
    pair = Pair()
    with (
        torch.no_grad(),
        cachepolicy.apply(pair.first, parse(POLICIES[0])) as one,
        cachepolicy.apply(pair.second, parse("match feedforward every 2 -> reuse")) as two,
    ):
        for t in (900, 800):
            with one.step(t=t):
                evaluate(pair.first, LATENTS, t, CONDITIONS["cond"])
                with two.step(t=t):
                    evaluate(pair.second, LATENTS, t, CONDITIONS["cond"])
        assert {"CR"} == set(one.trace.rows().values()) == set(two.trace.rows().values())


def test_the_denoiser_is_named_where_there_are_two() -> None:
    """Wan 2.2 has two experts: without a name E324 lists them, and a name or the module chooses."""
    pytest.importorskip("diffusers")
    from tests.support.tiny_pipelines import wan22

    pipe = wan22().pipe
    with cachepolicy.apply(pipe, parse("match attention every 2 -> reuse")) as run:
        for given_name in (None, "transformer_3"):
            with pytest.raises(PolicyError, match="`transformer` and `transformer_2`"):
                run.step(given_name, t=900)
        with run.step("transformer", t=900):
            pass
        with run.step(pipe.transformer_2, t=800):
            pass


# --- sites that run outside any call ---------------------------------------------------------------------


def told(record: Any) -> list[str]:
    return [str(each.message) for each in record if "W601" in str(each.message)]


@pytest.fixture
def record() -> Iterator[Any]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield record


def test_blocks_outside_any_call_are_told_of_once(record: Any) -> None:
    """W601 names the class and the way out; the loop itself is bare."""
    dit = Toy(blocks=2).build()
    bare = evaluate(dit, LATENTS, 500.0, CONDITIONS["cond"])
    with cachepolicy.apply(dit, parse(POLICIES[0])):
        for _ in range(3):
            assert torch.equal(bare, evaluate(dit, LATENTS, 500.0, CONDITIONS["cond"]))
    (message,) = told(record)
    assert "`ToyDiT`" in message
    assert "run.step" in message


def test_calls_of_forward_are_told_of(record: Any) -> None:
    """`model.forward(...)` goes past the model's `__call__`, where the policy is."""
    dit = Toy().build()
    with torch.no_grad(), cachepolicy.apply(dit, parse(POLICIES[2])):
        dit.forward(LATENTS, torch.tensor([500.0]), CONDITIONS["cond"])
    assert 1 == len(told(record))


def test_runs_that_are_followed_are_not_told_of(record: Any) -> None:
    """Neither calls of the model, nor a disabled run, nor step contexts, nor modules that no rule takes."""
    dit = Toy(blocks=2).build()
    with cachepolicy.apply(dit, parse("match blocks[1:] every 2 -> reuse residual")) as run:
        sample(by_model, dit, run)
        sample(by_blocks, dit, run)
        with run.disabled():
            evaluate(dit, LATENTS, 500.0, CONDITIONS["cond"])
            dit(LATENTS, torch.tensor([5.0]), CONDITIONS["cond"])
        dit.embed(torch.zeros(1, 1))
    assert [] == told(record)


def test_recomputed_blocks_are_not_told_of(record: Any) -> None:
    """Gradient checkpointing inside a bare model runs blocks again in the backward pass."""
    dit = Toy(blocks=1).build()
    with cachepolicy.apply(dit, parse(POLICIES[0])) as run, run.disabled():
        x = LATENTS.clone().requires_grad_()
        step = dit.embed(torch.zeros(1, 1))
        out = torch.utils.checkpoint.checkpoint(dit.blocks[0], x, CONDITIONS["cond"], step, use_reentrant=False)
        out.sum().backward()
    assert [] == told(record)


@pytest.mark.parametrize("told", [True, False], ids=["told", "counted"])
@pytest.mark.parametrize("empty", [[0], [1], [0, 1], [3, 3], [5]])
def test_an_evaluation_in_which_nothing_runs_is_no_step(empty: list[int], told: bool) -> None:
    """The trajectory goes on as if the context had not been entered."""
    results = list[Any]()
    for skipped in ([], empty):
        dit = Toy(blocks=3).build()
        with torch.no_grad(), cachepolicy.apply(dit, parse(POLICIES[2]), steps=len(TIMES)) as run:
            x = LATENTS
            for index, t in enumerate(TIMES):
                where: dict[str, Any] = {"t": t, "step": index} if told else {}
                for _ in range(skipped.count(index)):
                    with run.step(branch="cond", **where):
                        pass
                with run.step(branch="cond", **where):
                    x = x - 0.1 * evaluate(dit, x, t, CONDITIONS["cond"])
            results.append((x, decisions(run)))
    (expected, decided), (got, decided_too) = results
    assert torch.equal(expected, got)
    assert decided == decided_too
    assert 1 == len(decided)


class Sparse(ToyDiT):
    """A model that leaves a block out below a timestep."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict without the second block where `t` is below 600, and with it again below 200."""
        step = self.embed((t / 1000).reshape(1, 1))
        for index, block in enumerate(self.blocks):
            if index != 1 or t >= 600 or t < 200:
                x = block(x, y, step)
        return self.out(x)


@pytest.mark.parametrize("whole", [True, False])
def test_a_site_that_the_model_leaves_out_neither_computes_nor_reuses(whole: bool) -> None:
    """It is hidden with its reason, in the trace as in the simulator, and no skipped call is claimed for it."""
    dit = Sparse(Toy(blocks=3)).eval()
    selector = "blocks[1]" if whole else "attention"
    name = "blocks.1" if whole else "blocks.1.attn"
    action = "reuse residual" if whole else "reuse"
    with torch.no_grad(), cachepolicy.apply(dit, parse(f"match {selector} every 2 -> {action}"), steps=6) as run:
        for t in TIMES:
            dit(LATENTS, torch.tensor(t), CONDITIONS["cond"])
        assert run.trace is not None
        trajectory = run.trace.last
    assert trajectory is not None
    assert "CR..CR" == trajectory.rows("")[name]
    assert {(name, 2, ""): NOT_CALLED, (name, 3, ""): NOT_CALLED} == trajectory.facts
    assert (2 if whole else 8) == tally(trajectory).skipped
    checks.trace_agrees(trajectory)
    checks.well_formed(trajectory)


def test_a_call_that_runs_while_the_policy_is_attached_gives_no_warning() -> None:
    """Its blocks run inside a call of the model, which began bare and ends bare."""
    dit = Toy(blocks=3).build()
    runs = list[Any]()
    handle = dit.embed.register_forward_hook(
        lambda *_: runs or runs.append(cachepolicy.apply(dit, parse(POLICIES[0]), steps=2))
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        bare = dit(LATENTS, torch.tensor(900.0), CONDITIONS["cond"])
        handle.remove()
        assert torch.equal(bare, dit(LATENTS, torch.tensor(900.0), CONDITIONS["cond"]))
        dit(LATENTS, torch.tensor(500.0), CONDITIONS["cond"])
    assert [(0, 900.0), (1, 500.0)] == [(step, t) for one in decisions(runs[0]) for step, t, _ in one]
    with pytest.warns(UserWarning, match="W601"):
        evaluate(dit, LATENTS, 300.0, CONDITIONS["cond"])
    runs[0].remove()
