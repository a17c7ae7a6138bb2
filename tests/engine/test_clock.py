"""The clock: steps, branches and trajectories, whatever the caller tells."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.diffusers.argument_names import TIMESTEP_NAMES
from cachepolicy.diffusers.timestep_scaling import SCALES, listed_class, scale_of
from cachepolicy.engine.conditioning import Conditioning
from cachepolicy.engine.scheduler_hook import SchedulerFollower
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing import strategies
from cachepolicy.testing.models import Toy
from tests.support.linear_root import Root, scheduler_of

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

READS_T = 'match "lin" when t < -5 -> reuse'
BLIND = 'match "lin" when step < -5 -> reuse'


class Named(Root):
    """One with diffusers' way of naming branches."""

    @contextlib.contextmanager
    def cache_context(self, name: str, **told: Any) -> Iterator[None]:
        yield


def named_root(class_name: str) -> Root:
    """A root whose class has the module path and the name of one of diffusers."""
    path = next(key for key in SCALES if class_name in {key, key.rpartition(".")[2]})
    module, _, name = path.rpartition(".")
    return type(name, (Root,), {"__module__": module})()


X = torch.zeros(1, 2)


def ticks(run: Any) -> list[list[tuple[int, float | None, str]]]:
    """Step, timestep and branch of every call, by trajectory."""
    return [[(call.tick.step, call.tick.t, call.tick.branch) for call in each.calls] for each in run.trace]


def plain(run: Any) -> list[list[tuple[int, float | None]]]:
    """Step and timestep of every call, by trajectory."""
    return [[(step, t) for step, t, _ in each] for each in ticks(run)]


def drive(values: Sequence[Any], text: str = READS_T, model: Root | None = None, **options: Any) -> Any:
    """The run after one call for each timestep."""
    root = Root() if model is None else model
    y = torch.zeros(1)
    with cachepolicy.apply(root, parse(text), **options) as run:
        for value in values:
            root(X, value, y)
    return run


# --- the bare argument -----------------------------------------------------------------------------------


@given(strategies.timesteps(2), st.sampled_from(["float", "tensor", "batch", "int64"]), st.integers(1, 3))
def test_steps_follow_a_bare_timestep(timesteps: list[float], form: str, times: int) -> None:
    """Numbers, tensors and one value a sample; each run of falling timesteps is a trajectory of its own."""
    values = [float(int(t)) if form == "int64" else t for t in timesteps]
    values = list(dict.fromkeys(values))
    make = {
        "float": lambda t: t,
        "tensor": torch.tensor,
        "batch": lambda t: torch.full((3,), t),
        "int64": lambda t: torch.tensor(int(t)),
    }[form]
    run = drive([make(t) for t in values] * times)
    if len(values) > 1:
        expected = [(step, pytest.approx(t)) for step, t in enumerate(values)]
        assert [expected] * times == plain(run)


def test_a_timestep_in_bfloat16_is_near() -> None:
    """Rounding is the caller's; steps do not depend on it."""
    values = [torch.tensor(t, dtype=torch.bfloat16) for t in (999.0, 899.0, 799.0)]
    assert [[0, 1, 2]] == [[step for step, _ in each] for each in plain(drive(values))]


@pytest.mark.parametrize("class_name", [name for name, scale in SCALES.items() if scale is not None])
def test_a_listed_class_is_read_in_its_scale(class_name: str) -> None:
    """The argument of each listed class gives training units, from noise (1000) to picture (0)."""
    scale = SCALES[class_name]
    assert scale is not None
    given_values = [((1000 - t) if scale.reverse else t) / scale.factor for t in (1000.0, 750.0, 250.0, 0.0)]
    run = drive([torch.tensor([value]) for value in given_values], model=named_root(class_name))
    assert [(step, pytest.approx(t, abs=1e-3)) for step, t in enumerate((1000.0, 750.0, 250.0, 0.0))] == plain(run)[0]


@pytest.mark.parametrize("class_name", [name for name, scale in SCALES.items() if scale is None])
def test_a_class_in_no_unit_asks_for_another_clock(class_name: str) -> None:
    """Where the argument is no timestep the error names the two ways out; a policy that reads no `t` runs."""
    with pytest.raises(PolicyError, match="E321") as caught:
        drive([torch.tensor([0.3])], model=named_root(class_name))
    assert "scheduler=" in (caught.value.diagnostics[0].help or "")
    run = drive([0.9, 0.5, 0.1], BLIND, named_root(class_name))
    assert [0, 1, 2] == [step for step, _ in plain(run)[0]]


def test_only_the_classes_of_the_table_and_their_subclasses_are_listed() -> None:
    """A class of the same name in another module is not listed; a subclass of a listed class is."""
    listed = type(named_root("FluxTransformer2DModel"))
    for module in ("sglang.multimodal_gen.runtime.models.dits.flux", "diffusers.models", __name__):
        assert listed_class(type("FluxTransformer2DModel", (Root,), {"__module__": module})) is None
    key = listed_class(type("Mine", (listed,), {}))
    assert key is not None
    assert key.endswith(".FluxTransformer2DModel")


@pytest.mark.parametrize("value", [1500.0, -20.0, float("nan"), float("inf")])
def test_a_value_that_is_no_timestep_is_refused(value: float) -> None:
    """Out of 0..1000 nothing is guessed, where the policy reads `t`."""
    with pytest.raises(PolicyError, match="E321"):
        drive([value])


def test_one_value_a_token_counts_by_its_largest() -> None:
    """Clean tokens of conditioning frames have timestep 0; the step is that of the noisiest."""
    values = [torch.tensor([[0.0, t, t]]) for t in (900.0, 500.0, 100.0)]
    assert [[(0, 900.0), (1, 500.0), (2, 100.0)]] == plain(drive(values))
    values = [torch.tensor([[0.0, 999.0 - t, 1.0]]) / 1.0 for t in (0.0,)]
    reversed_one = named_root("MiniMaxH3Transformer3DModel")
    values = [torch.tensor([t, t, 1.0]) for t in (0.1, 0.5, 0.9)]
    run = drive(values, model=reversed_one)
    assert [(0, pytest.approx(900.0)), (1, pytest.approx(500.0)), (2, pytest.approx(100.0))] == plain(run)[0]


ROWS = torch.zeros(3, 2)


@pytest.mark.parametrize("text", [READS_T, BLIND], ids=["reads t", "blind"])
@pytest.mark.parametrize(
    "form",
    [torch.tensor, lambda rows: torch.tensor(rows)[:, None], list, tuple, lambda rows: [torch.tensor(t) for t in rows]],
)
def test_rows_at_different_timesteps_are_refused(form: Any, text: str) -> None:
    """One decision would be taken for rows of which each has a time of its own."""
    root = Root()
    with cachepolicy.apply(root, parse(text)) as run:
        root(ROWS, form([900.0, 900.0, 900.0]))
        with pytest.raises(PolicyError, match="E323") as error:
            root(ROWS, form([800.0, 700.0, 800.0]))
        assert "(800, 700)" in str(error.value)
        root(ROWS, form([900.0] * 3))
        root(ROWS, form([800.0] * 3))
        assert [(0, 900.0), (1, 800.0)] == plain(run)[-1]


@pytest.mark.parametrize("known", [True, False])
def test_rows_at_different_timesteps_are_refused_with_a_scheduler(known: bool) -> None:
    """The scheduler has one timestep; the rows would be elsewhere. `timestep=` says which time stands for all."""
    root, scheduler = Root(), scheduler_of("DDIMScheduler", 4)
    options: dict[str, Any] = {"timestep": lambda: 900.0} if known else {"scheduler": scheduler}
    refused = contextlib.nullcontext() if known else pytest.raises(PolicyError, match="E323")
    with cachepolicy.apply(root, parse(BLIND), **options), refused:
        root(ROWS, torch.tensor([900.0, 800.0, 900.0]))


@given(
    rows=st.integers(2, 4),
    tokens=st.integers(2, 5),
    data=st.data(),
)
def test_a_timestep_for_each_token_is_no_row(rows: int, tokens: int, data: st.DataObject) -> None:
    """Clean tokens differ from row to row; the noisiest tells the time."""
    values = st.lists(st.integers(0, 900), min_size=tokens, max_size=tokens)
    drawn = data.draw(st.lists(values, min_size=rows, max_size=rows))
    drawn[0][0] = data.draw(st.integers(500, 900))
    root = Root()
    with cachepolicy.apply(root, parse(READS_T)) as run:
        root(torch.zeros(rows, 2), torch.tensor(drawn, dtype=torch.float32))
        assert [[(0, float(max(map(max, drawn))))]] == plain(run)


def test_one_timestep_for_all_rows_is_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither branches nor the comparison with the step before read a batch of timesteps again."""
    reads, original = list[int](), torch.Tensor.tolist

    def counted(self: Tensor) -> Any:
        reads.append(self.numel())
        return original(self)

    root = Root()
    with cachepolicy.apply(root, parse(READS_T)) as run:
        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        for t in (900.0, 800.0, 700.0):
            root(ROWS, torch.full((3,), t), torch.zeros(1))
        assert [3, 3, 3] == reads
        root(ROWS, torch.tensor(600.0).expand(3), torch.zeros(1))
        assert [3, 3, 3] == reads
        assert [[(0, 900.0), (1, 800.0), (2, 700.0), (3, 600.0)]] == plain(run)


def test_without_any_timestep_steps_are_told_by_repetition() -> None:
    """A root that is called with latents and conditioning alone: the same conditioning again is the next step."""
    run = drive([None, None, None], BLIND)
    assert [[(0, None), (1, None), (2, None)]] == plain(run)


def test_a_policy_that_reads_t_says_what_it_misses() -> None:
    """No timestep anywhere and a policy with `t`: E250, with the way out, before anything is reused."""
    with pytest.raises(PolicyError, match="E250") as caught:
        drive([None])
    assert "timestep=" in (caught.value.diagnostics[0].help or "")


@pytest.mark.parametrize("name", TIMESTEP_NAMES)
def test_the_timestep_may_have_any_of_the_usual_names(name: str) -> None:
    """Found by name, positional or keyword."""
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, x, {name}, y=None):\n    return self.lin(x)", namespace)
    root = type("Other", (Root,), {"forward": namespace["forward"]})()
    with cachepolicy.apply(root, parse(READS_T)) as run:
        root(X, 900.0)
        root(X, **{name: 800.0})
    assert [[(0, 900.0), (1, 800.0)]] == plain(run)


# --- a function of the caller ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [float, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor(int(t))])
def test_a_timestep_function_tells_the_time(form: Any) -> None:
    """Numbers and tensors alike, in training units, whatever the model is called with."""
    now, root = [0.0], Root()
    with cachepolicy.apply(root, parse(READS_T), timestep=lambda: form(now[0])) as run:
        for now[0] in (900.0, 800.0, 700.0, 900.0, 800.0):
            root(X, 12345.0, None)
    assert [[(0, 900.0), (1, 800.0), (2, 700.0)], [(0, 900.0), (1, 800.0)]] == plain(run)


def test_a_rising_clock_runs_on_until_it_turns() -> None:
    """A caller's time may rise, as in flow matching from 0 to 1; a fall is then a new trajectory."""
    now, root = [0.0], Root()
    with cachepolicy.apply(root, parse(READS_T), timestep=lambda: now[0]) as run:
        for now[0] in (0.0, 0.1, 0.5, 0.9, 0.0, 0.4):
            root(X)
    assert [[0, 1, 2, 3], [0, 1]] == [[step for step, _ in each] for each in plain(run)]


def test_a_function_that_returns_none_is_an_error() -> None:
    """E320 tells what is expected."""
    root = Root()
    with cachepolicy.apply(root, parse(READS_T), timestep=lambda: None), pytest.raises(PolicyError, match="E320"):
        root(X)


# --- trajectories ----------------------------------------------------------------------------------------


def test_a_trajectory_starts_where_t_turns_back() -> None:
    """Also where it turns back by little, as after an image-to-image run of another strength."""
    run = drive([900.0, 600.0, 300.0, 500.0, 250.0, 0.0, 999.0])
    assert [[900.0, 600.0, 300.0], [500.0, 250.0, 0.0], [999.0]] == [[t for _, t in each] for each in plain(run)]


@given(st.integers(1, 6), st.integers(1, 15))
def test_a_budget_of_steps_ends_a_trajectory(steps: int, calls: int) -> None:
    """`steps=` is the length of a trajectory where nothing else tells its end."""
    run = drive([None] * calls, BLIND, steps=steps)
    got = [step for each in plain(run) for step, _ in each]
    assert [number % steps for number in range(calls)][-8 * steps :] == got[-8 * steps :]


def test_steps_and_progress_are_known_by_the_budget() -> None:
    """A policy that reads `progress` runs on a bare model with `steps=`, and says so without."""
    text = 'match "lin" when progress >= 0.5 -> reuse'
    run = drive([900.0, 600.0, 300.0], text, steps=3)
    assert "CRR" == run.trace.rows()["lin"]
    with pytest.raises(PolicyError, match="E250"):
        drive([900.0], text)


def test_a_table_is_read_without_the_number_of_steps_unless_its_index_is_scaled() -> None:
    """An index other than `step` itself counts from the start of the table."""
    text = 'table limits = [0, 1, 0]\nmatch "lin" when step > 0 and limits[{}] > 0 -> reuse'
    assert "CRC" == drive([900.0, 600.0, 300.0], text.format("step + 0")).trace.rows()["lin"]
    with pytest.raises(PolicyError, match="E250"):
        drive([900.0], text.format("step"))


def test_a_run_that_was_given_up_after_its_first_call_does_not_count() -> None:
    """The first timestep again is a new run: second-order samplers repeat all but the first."""
    assert [[(0, 900.0)], [(0, 900.0), (1, 800.0)]] == plain(drive([900.0, 900.0, 800.0]))


def test_a_repeated_timestep_is_the_next_step() -> None:
    """Heun calls twice at a timestep with the same conditioning: two steps of the scheduler."""
    run = drive([900.0, 800.0, 800.0, 700.0, 700.0])
    assert [[(0, 900.0), (1, 800.0), (2, 800.0), (3, 700.0), (4, 700.0)]] == plain(run)


# --- branches --------------------------------------------------------------------------------------------


@given(strategies.timesteps(2), st.integers(1, 3), st.data())
def test_branches_are_told_by_their_conditioning(timesteps: list[float], count: int, data: st.DataObject) -> None:
    """Two or three calls a step, in an order that may change from step to step: each keeps its name."""
    root, ys = Root(), [torch.full((1,), float(number)) for number in range(count)]
    order, names = list(range(count)), dict[int, set[str]]()
    with cachepolicy.apply(root, parse(READS_T)) as run:
        for step, t in enumerate(timesteps):
            if step > 0:
                order = data.draw(st.permutations(order))
            for number in order:
                root(X, torch.tensor(t), ys[number])
                assert run.trace is not None
                assert run.trace.last is not None
                names.setdefault(number, set()).add(run.trace.last.calls[-1].tick.branch)
    assert [{"" if number == 0 else str(number)} for number in range(count)] == [names[n] for n in range(count)]
    (one,) = ticks(run)
    assert [step for step in range(len(timesteps)) for _ in range(count)] == [step for step, _, _ in one]


def test_branches_without_lasting_conditioning_are_told_by_their_place() -> None:
    """Where every call brings new tensors, the first of a step is one branch and the second the other."""
    root = Root()
    with cachepolicy.apply(root, parse(READS_T)) as run:
        for t in (900.0, 800.0, 700.0):
            root(X, t, torch.zeros(1))
            root(X, t, torch.ones(1))
    assert [(0, ""), (0, "1"), (1, ""), (1, "1"), (2, ""), (2, "1")] == [(s, b) for s, _, b in ticks(run)[0]]


def test_guidance_that_is_switched_off_part_way_leaves_the_other_branch() -> None:
    """From two calls a step to one: the remaining branch goes on under its name, whichever remains."""
    for remaining in (0, 1):
        root, ys = Root(), [torch.zeros(1), torch.ones(1)]
        with cachepolicy.apply(root, parse(READS_T)) as run:
            for t in (900.0, 800.0):
                for y in ys:
                    root(X, t, y)
            for t in (700.0, 600.0):
                root(X, t, ys[remaining])
        name = ("", "1")[remaining]
        assert [(2, 700.0, name), (3, 600.0, name)] == ticks(run)[0][4:]


def test_guidance_that_is_switched_on_part_way_brings_a_branch() -> None:
    """From one call a step to two."""
    root, ys = Root(), [torch.zeros(1), torch.ones(1)]
    with cachepolicy.apply(root, parse(READS_T)) as run:
        for t in (900.0, 800.0):
            root(X, t, ys[0])
        for t in (700.0, 600.0):
            for y in ys:
                root(X, t, y)
    assert [(2, ""), (2, "1"), (3, ""), (3, "1")] == [(step, branch) for step, _, branch in ticks(run)[0][2:]]


def test_a_named_context_is_the_branch() -> None:
    """`cache_context` names what runs inside, in any order, also where conditioning is shared."""
    root, y = Named(), torch.zeros(1)
    with cachepolicy.apply(root, parse(READS_T)) as run:
        for t in (900.0, 800.0, 700.0):
            for name in ("uncond", "cond"):
                with root.cache_context(name):
                    root(X, t, y)
    expected = [(step, t, name) for step, t in enumerate((900.0, 800.0, 700.0)) for name in ("uncond", "cond")]
    assert [expected] == ticks(run)


def test_a_context_may_tell_the_step() -> None:
    """`step_index`, `num_inference_steps`, `timestep` and `sigma` of a context win over all guesses."""
    root = Named()
    text = 'match "lin" when sigma < 0.5 and steps == 4 and t < 600 -> reuse'
    with cachepolicy.apply(root, parse(text)) as run:
        for index in (0, 1, 3):
            told = {
                "step_index": index,
                "num_inference_steps": 4,
                "timestep": 900.0 - 200 * index,
                "sigma": 1 - index / 4,
            }
            with root.cache_context("cond", **told):
                root(X, 0.0)
    (one,) = run.trace
    assert [(0, 900.0, 4, 1.0), (1, 700.0, 4, 0.75), (3, 300.0, 4, 0.25)] == [
        (call.tick.step, call.tick.t, call.tick.steps, call.tick.sigma) for call in one.calls
    ]
    assert "CCR" == run.trace.rows()["lin"]


def test_a_context_whose_step_falls_starts_a_trajectory() -> None:
    """A step index that turns back is a new run."""
    root = Named()
    with cachepolicy.apply(root, parse(BLIND)) as run:
        for index in (0, 1, 2, 0, 1):
            with root.cache_context("cond", step_index=index):
                root(X)
    assert [[0, 1, 2], [0, 1]] == [[step for step, _, _ in each] for each in ticks(run)]


def test_conditioning_is_told_by_its_objects_and_by_their_values() -> None:
    """The same tensors are the same, others may be equal; plain values are by value; a written tensor is another."""
    a, b, c = torch.zeros(2), torch.zeros(2), torch.ones(2)

    def of(*values: Any) -> Conditioning:
        return Conditioning({f"y{number}": value for number, value in enumerate(values)})

    assert of(a, 1, "x").same(of(a, 1, "x"))
    assert not of(a).same(of(b))
    assert of(a).equal(of(b))
    assert not of(a).equal(of(c))
    assert not of(a, 1).equal(of(a, True))
    assert not of(a).equal(of(a, None))
    assert of({"k": [a, (b,)]}).same(of({"k": [a, (b,)]}))
    assert frozenset({("y1",), ("y2", "k", 0)}) == of(a, 1, {"k": [b]}).differing(of(b, 2, {"k": [c]}))
    noted = of(c)
    assert noted.same(of(c))
    c.add_(1)
    assert not noted.same(of(c))
    assert not noted.equal(of(torch.ones(2)))  # what it was is not known any more


def test_conditioning_keeps_no_graph() -> None:
    """What is noted of a tensor that needs gradients does not keep alive what it was computed from."""
    import gc
    import weakref

    leaf = torch.zeros(2, requires_grad=True)
    middle = leaf * 2
    noted, gone = Conditioning({"y": middle.square()}), weakref.ref(middle)
    del middle
    gc.collect()
    assert gone() is None
    assert noted.parts


class Prompt:
    """A conditioning that is no tensor, made anew for each call."""

    __slots__ = ("y",)

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Prompted(nn.Module):
    """A root that takes its conditioning wrapped up."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy().build()

    def forward(self, x: Tensor, t: Tensor, prompt: Any) -> Tensor:
        return self.toy(x, t, prompt.y)


@pytest.mark.parametrize("kind", [Prompt, type("Weak", (Prompt,), {})])
@pytest.mark.parametrize("lasting", [False, True])
def test_branches_are_told_apart_by_objects_of_any_kind(kind: Any, lasting: bool) -> None:
    """An object that is gone is not taken for the next one at its address."""
    model = Prompted()
    x, ys = torch.zeros(1, 4, 8), [torch.zeros(1, 3, 8), torch.ones(1, 3, 8)]
    prompts = [kind(y) for y in ys]
    with torch.no_grad(), cachepolicy.apply(model, parse("match attention every 2 -> reuse")) as run:
        for t in (900.0, 700.0, 500.0):
            for place, y in enumerate(ys):
                model(x, torch.tensor(t), prompts[place] if lasting else kind(y))
        assert [(0, ""), (0, "1"), (1, ""), (1, "1"), (2, ""), (2, "1")] == [
            (call.tick.step, call.tick.branch) for call in run.trace.last.calls
        ]


# --- schedulers ------------------------------------------------------------------------------------------

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "IPNDMScheduler",
    "CMStochasticIterativeScheduler",
)


def denoise(root: Root, scheduler: Any, branches: Sequence[Tensor], *, shown: Any = lambda t: t) -> None:
    """A loop as pipelines write it."""
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        noise = sum(root(scaled, shown(t), y) for y in branches)
        x = scheduler.step(noise, t, x).prev_sample


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_clock_follows_a_scheduler(name: str, branches: int) -> None:
    """Step numbers, timesteps and their count are the scheduler's, with one call a step and with two."""
    root, ys = Root(), [torch.zeros(1), torch.ones(1)][:branches]
    try:
        scheduler = scheduler_of(name, 5)
    except (TypeError, AttributeError, ImportError, ValueError) as error:
        pytest.skip(f"cannot be built bare: {error}")
    with torch.no_grad(), cachepolicy.apply(root, parse(BLIND), scheduler=scheduler) as run:
        for _ in range(2):
            scheduler.set_timesteps(5)
            denoise(root, scheduler, ys, shown=lambda t: float("nan"))
    timesteps = [float(t) * (1000.0 if name == "IPNDMScheduler" else 1.0) for t in scheduler.timesteps]
    expected = [(step, pytest.approx(t)) for step, t in enumerate(timesteps) for _ in range(branches)]
    assert [expected] * 2 == plain(run)
    assert {len(timesteps)} == {call.tick.steps for each in run.trace for call in each.calls}


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "KDPM2DiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_a_bare_timestep_counts_as_the_scheduler_does(name: str, branches: int) -> None:
    """Without the scheduler the argument gives the same steps, also where samplers repeat a timestep."""
    root, ys = Root(), [torch.zeros(1), torch.ones(1)][:branches]
    scheduler = scheduler_of(name, 5)
    with torch.no_grad(), cachepolicy.apply(root, parse(READS_T)) as run:
        for _ in range(2):
            scheduler.set_timesteps(5)
            denoise(root, scheduler, ys)
    expected = [(step, pytest.approx(float(t))) for step, t in enumerate(scheduler.timesteps) for _ in range(branches)]
    assert [expected] * 2 == plain(run)


def test_sigmas_are_the_schedulers() -> None:
    """`sigma` reads the scheduler's, step by step."""
    root, scheduler = Root(), scheduler_of("EulerDiscreteScheduler", 5)
    with (
        torch.no_grad(),
        cachepolicy.apply(root, parse('match "lin" when sigma < 3 -> reuse'), scheduler=scheduler) as run,
    ):
        denoise(root, scheduler, [torch.zeros(1)])
    (one,) = run.trace
    assert [float(each) for each in scheduler.sigmas[:5]] == [call.tick.sigma for call in one.calls]


def test_a_scheduler_that_starts_late_counts_from_there() -> None:
    """Image-to-image: the loop begins within the timesteps, and `steps` is what is left."""
    root, scheduler = Root(), scheduler_of("EulerDiscreteScheduler", 10)
    y, x = torch.zeros(1), torch.zeros(1, 2)
    late = scheduler.timesteps[6:]
    scheduler.set_begin_index(6)
    with torch.no_grad(), cachepolicy.apply(root, parse(READS_T), scheduler=scheduler) as run:
        for t in late:
            x = scheduler.step(root(x, t, y), t, x).prev_sample
    assert [[(step, float(t)) for step, t in enumerate(late)]] == plain(run)
    assert {4} == {call.tick.steps for call in run.trace.last.calls}


def test_a_run_that_is_given_up_part_way_ends_with_the_next_set_timesteps() -> None:
    """`set_timesteps` begins a trajectory, whatever came of the last."""
    root, scheduler = Root(), scheduler_of("DDIMScheduler", 6)
    y, x = torch.zeros(1), torch.zeros(1, 2)
    with torch.no_grad(), cachepolicy.apply(root, parse(READS_T), scheduler=scheduler) as run:
        for t in itertools.islice(scheduler.timesteps, 3):
            x = scheduler.step(root(x, t, y), t, x).prev_sample
        scheduler.set_timesteps(6)
        denoise(root, scheduler, [y])
    assert [3, 6] == [len(each) for each in plain(run)]


def test_a_follower_reads_the_device_once_a_trajectory() -> None:
    """The numbers are read when `timesteps` is another tensor, not once a step."""
    scheduler, follower = scheduler_of("DDIMScheduler", 4), SchedulerFollower()
    first = follower.numbers(scheduler)
    assert first is follower.numbers(scheduler)
    scheduler.set_timesteps(4)
    assert first is not follower.numbers(scheduler)


def test_removing_gives_the_scheduler_back() -> None:
    """The scheduler's class and `__dict__` are what they were."""
    scheduler = scheduler_of("DDIMScheduler", 4)
    cls, attributes = type(scheduler), set(scheduler.__dict__)
    with cachepolicy.apply(Root(), parse(READS_T), scheduler=scheduler):
        assert cls is not type(scheduler)
        assert cls.__name__ == type(scheduler).__name__
    assert cls is type(scheduler)
    assert attributes == set(scheduler.__dict__)


# --- real models -----------------------------------------------------------------------------------------

BARE = ("flux", "sd3", "cogvideox", "wan", "z_image", "lumina2", "mochi", "ltx", "pixart", "latte", "dit", "qwenimage")


@pytest.mark.parametrize("name", BARE)
def test_a_tiny_model_of_diffusers_is_read_in_training_units(name: str) -> None:
    """Called as its pipeline calls it, without scheduler or function, `t` is the training timestep."""
    pytest.importorskip("diffusers")
    from tests.support import zoo

    model, timesteps = zoo.build(name), (950.0, 600.0, 250.0)
    with torch.no_grad(), cachepolicy.apply(model, parse('match "." when t < -5 -> reuse')) as run:
        for _ in zoo.trajectory(name, model, timesteps):
            pass
    assert [[(step, pytest.approx(t, abs=0.5)) for step, t in enumerate(timesteps)]] == plain(run)


@pytest.mark.deep
def test_every_tiny_model_of_diffusers_is_read_in_training_units() -> None:
    """The same for the whole zoo; the classes that are called in no unit of timesteps ask for another clock."""
    pytest.importorskip("diffusers")
    from tests.support import zoo

    wrong = dict[str, str]()
    for name in zoo.names():
        try:
            test_a_tiny_model_of_diffusers_is_read_in_training_units(name)
        except PolicyError as error:
            if scale_of(zoo.entry(name).model_class) is not None:
                wrong[name] = error.diagnostics[0].message
        except AssertionError as error:
            wrong[name] = str(error).splitlines()[0]
    assert {} == wrong
