"""The engine on toys: what runs is what the schedule says, to the last bit, and nothing is left when it goes wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
import warnings
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing import checks, strategies
from cachepolicy.testing.models import Probes, Returns, Shared, Toy, ToyDiT, failing, inputs, sample

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0, 350.0, 250.0)
EVERY_2 = "match attention every 2 -> reuse"

toys = st.builds(
    Toy,
    blocks=st.integers(1, 2),
    returns=st.sampled_from(["tensor", "tuple", "list", "dict"]),
    in_place=st.booleans(),
    cross=st.booleans(),
    stages=st.integers(0, 2),
)
plain_toys = st.builds(Toy, blocks=st.integers(1, 2), cross=st.booleans(), stages=st.integers(0, 2))


@torch.no_grad()
def run(model: nn.Module, toy: Toy = Toy(), timesteps: Sequence[float] = TIMESTEPS, **options: Any) -> list[Tensor]:
    """All predictions of one loop; with `seed` the inputs change, with `pair` there are two branches."""
    pair, seed, still = options.get("pair", False), options.get("seed", 0), options.get("still", False)
    x, y = inputs(toy, seed=seed, batch=options.get("batch", 1))
    return list(sample(model, timesteps, x, [y, -y] if pair else y, still=still))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def applied(model: nn.Module, text: str, **options: Any) -> Any:
    return cachepolicy.apply(model, parse(text), **options)


def snapshot(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """What an attach may not leave changed: classes and `__dict__`s."""
    return [(name, type(module), dict(module.__dict__)) for name, module in model.named_modules()]


def assert_untouched(model: nn.Module, before: list[tuple[str, type, dict[str, Any]]]) -> None:
    for (name, cls, attributes), module in zip(before, model.modules(), strict=True):
        assert cls is type(module), name
        assert attributes.keys() == module.__dict__.keys(), name
        assert all(attributes[key] is module.__dict__[key] for key in attributes), name


# --- the schedule is what runs ---------------------------------------------------------------------------


@given(st.data())
def test_the_trace_is_the_schedule_and_the_executions(data: st.DataObject) -> None:
    """On any toy, policy and clock the simulator agrees, and hooks below us count what the trace tells."""
    toy, timesteps = data.draw(plain_toys), data.draw(strategies.timesteps())
    policy = data.draw(strategies.policies(steps=len(timesteps), measured=data.draw(st.booleans())))
    pair = data.draw(st.booleans())
    trajectories = checks.engine_agrees(
        toy.build(), policy, lambda model: run(model, toy, timesteps, pair=pair), steps=len(timesteps)
    )
    assert [len(timesteps) * (1 + pair)] == [len(each.calls) for each in trajectories]


@given(st.data())
def test_the_trace_is_the_schedule_whatever_the_blocks_return(data: st.DataObject) -> None:
    """Tuples, lists and dicts as outputs, and blocks that write into what they were given."""
    toy, timesteps = data.draw(toys), data.draw(strategies.timesteps())
    policy = data.draw(strategies.policies(steps=len(timesteps), actions=["reuse", "compute"]))
    checks.engine_agrees(toy.build(), policy, lambda model: run(model, toy, timesteps), steps=len(timesteps))


@given(st.data())
def test_the_trace_tells_the_steps_of_the_simulator(data: st.DataObject) -> None:
    """Rows of the trace are the rows of `simulate` on the same timesteps where no fact of the run came between."""
    timesteps = data.draw(strategies.timesteps())
    policy = data.draw(strategies.policies(steps=len(timesteps), actions=["reuse", "reuse residual", "compute"]))
    model = Toy().build()
    with cachepolicy.apply(model, policy, steps=len(timesteps)) as attached:
        run(model, timesteps=timesteps)
    schedule = cachepolicy.simulate(attached.plan if attached.attached else policy, **_like(model, timesteps))
    assert schedule.rows == attached.trace.rows()


def _like(model: nn.Module, timesteps: Sequence[float]) -> dict[str, Any]:
    from cachepolicy.engine.introspection import describe

    return {"steps": len(timesteps), "timesteps": timesteps, "skeleton": describe(model)}


PREDICTORS = (
    "predict linear(weight: 0.5)", "predict taylor(order: 1)", "predict taylor(order: 2) of residual",
    "predict hermite(order: 2, scale: 0.5)", "predict linear(weight: 1) of residual",
)  # fmt: skip
SPANS = ("blocks", "blocks[1:]", "blocks[0:2]", "attention", "block", "model")

chains = st.builds(Toy, blocks=st.integers(2, 3), returns=st.sampled_from(["tensor", "tuple", "list", "dict"]))


@given(st.data(), st.sampled_from([("reuse residual", "skip", "compute"), PREDICTORS]))
def test_the_trace_is_the_schedule_for_spans_and_predictors(data: st.DataObject, actions: tuple[str, ...]) -> None:
    """Spans of blocks that are decided as one, and answers from more than one compute."""
    toy, timesteps = data.draw(chains), data.draw(strategies.timesteps())
    selectors = SPANS if actions is not PREDICTORS else ("attention", "feedforward", "block")
    policy = data.draw(strategies.policies(steps=len(timesteps), selectors=selectors, actions=actions))
    pair = data.draw(st.booleans())
    assume(not _overlaps(toy, policy))
    checks.engine_agrees(toy.build(), policy, lambda model: run(model, toy, timesteps, pair=pair), steps=len(timesteps))


def _overlaps(toy: Toy, policy: cachepolicy.Policy) -> bool:
    """Whether the drawn spans share blocks without nesting, which is refused."""
    try:
        cachepolicy.apply(toy.build(), policy).remove()
    except cachepolicy.PolicyError as error:
        return any(each.code == "E203" for each in error.diagnostics)
    return False


SIGNALS = """signal first = residual("^blocks.0.norm$")
signal drift = relative_l1(first, prev(first))
signal moved = relative_l1(first, kept(first))
match optional {} {} while {} {} -> {}
match optional "^blocks.1.*attn" every 3 -> reuse
"""


@given(st.data())
def test_the_trace_is_the_schedule_given_what_was_measured(data: st.DataObject) -> None:
    """Where signals decide, the simulator agrees with their numbers from the trace, on every site and branch."""
    toy, timesteps = data.draw(chains), data.draw(strategies.timesteps(2))
    limit = data.draw(st.sampled_from(["0.1", "1", "3", "30"]))
    clauses = ("drift < {0}", "moved <= {0}", "sum(drift) < {0}", "not moved > {0}", "sum(moved) < {0} and drift < 9")
    text = SIGNALS.format(
        data.draw(st.sampled_from(["blocks[1:]", "blocks[1:2]", '"^blocks.[12]$"', '"^blocks.[12].attn"'])),
        data.draw(st.sampled_from(["", "when step > 1", "when t < 500", "every 4"])),
        data.draw(st.sampled_from(clauses)).format(limit),
        data.draw(st.sampled_from(["", "at most 2 in a row", "at most 3 in all"])),
        data.draw(st.sampled_from(["reuse residual", "predict taylor(order: 1) of residual"])),
    )
    pair = data.draw(st.booleans())
    checks.engine_agrees(
        toy.build(), parse(text), lambda model: run(model, toy, timesteps, pair=pair), steps=len(timesteps)
    )


# --- exactness -------------------------------------------------------------------------------------------


@given(toys, st.sampled_from(["attention", "block", "model", "feedforward", '"."']))
def test_computing_everything_is_the_bare_model(toy: Toy, selector: str) -> None:
    """A policy that computes all, and one that was removed, give the bare model's outputs to the last bit."""
    model = toy.build()
    bare = run(model, toy)
    for rule in ("-> compute", "every 1 -> reuse", "when t < 0 -> reuse", "when step > 99 -> reuse residual"):
        if "residual" in rule and selector == '"."':
            continue
        with applied(model, f"match {selector} {rule}"):
            assert same(bare, run(model, toy))
        assert same(bare, run(model, toy))


@given(st.data())
def test_a_model_that_ignores_its_step_does_not_notice_reuse(data: st.DataObject) -> None:
    """`reuse` answers a blind model on still latents to the last bit, residuals and predictors within 1e-5."""
    toy = data.draw(toys.map(lambda toy: Toy(toy.blocks, 8, toy.returns, toy.in_place, True, toy.cross, toy.stages)))
    timesteps = data.draw(strategies.timesteps())
    model = toy.build()
    bare = run(model, toy, timesteps, still=True)
    exact = data.draw(strategies.policies(steps=len(timesteps), actions=["reuse", "compute"]))
    with cachepolicy.apply(model, exact, steps=len(timesteps)):
        assert same(bare, run(model, toy, timesteps, still=True))
    actions = ["reuse residual", "reuse", *([] if toy.in_place else PREDICTORS)]
    close = data.draw(strategies.policies(steps=len(timesteps), actions=actions))
    with cachepolicy.apply(model, close, steps=len(timesteps)):
        for expected, got in zip(bare, run(model, toy, timesteps, still=True), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["", "match attention when step == 1 -> compute\n"])
def test_predictors_survive_in_place_writers(text: str) -> None:
    """What was written into after it was kept is never extrapolated from."""
    toy = Toy(blind=True, in_place=True)
    model = toy.build()
    bare = run(model, toy, still=True)
    with applied(model, text + "match attention -> predict linear(weight: 0.5)"):
        for expected, got in zip(bare, run(model, toy, still=True), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selector", ["attention", "block"])
@pytest.mark.parametrize("first", ["reuse", "reuse residual"])
def test_rules_of_both_kinds_may_share_a_site(selector: str, first: str) -> None:
    """`reuse` and `reuse residual` on one site, in turn: a blind model on still latents notices neither."""
    toy = Toy(blind=True)
    model = toy.build()
    bare = run(model, toy, still=True)
    second = "reuse" if first == "reuse residual" else "reuse residual"
    with applied(model, f"match {selector} when step in {{1, 3}} -> {first}\nmatch {selector} -> {second}"):
        for expected, got in zip(bare, run(model, toy, still=True), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_reuse_gives_the_last_output() -> None:
    """An answered attention gives the output of its last compute; the modules after it run on."""
    toy = Toy(blocks=1)
    model = toy.build()
    x, y = inputs(toy)
    with applied(model, "match attention every 3 -> reuse") as attached:
        got, probes = run(model), Probes(model)
        run(model)
    assert same(by_hand(toy, x, y, attached.trace.rows(), residual=False), got)
    assert (3, 8) == (probes.counts["blocks.0.attn"], probes.counts["blocks.0.ff"])


def test_reuse_residual_adds_the_last_change_to_the_present_input() -> None:
    """The answer is input plus (last output minus its input), formed as they are written."""
    toy = Toy(blocks=1)
    model = toy.build()
    ins, outs = list[Tensor](), list[Tensor]()
    model.out.register_forward_pre_hook(lambda _, args: outs.append(args[0]))
    x, y = inputs(toy)
    with torch.no_grad(), applied(model, "match block every 2 -> reuse residual"):
        for t in (900.0, 800.0):
            ins.append(x)
            x = x - 0.1 * model(x, torch.tensor(t), y)
    assert torch.equal(ins[1] + (outs[0] - ins[0]), outs[1])


def test_skip_answers_with_the_input() -> None:
    """A skipped block is not there."""
    toy = Toy(blocks=1)
    model = toy.build()
    got = list[Tensor]()
    model.out.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    x, y = inputs(toy)
    with torch.no_grad(), applied(model, "match block when step > 0 -> skip"):
        model(x, torch.tensor(900.0), y)
        model(x, torch.tensor(800.0), y)
    assert torch.equal(x, got[1])


@pytest.mark.parametrize("action", ["reuse residual", "skip"])
def test_streams_in_a_dict_are_carried_or_refused(action: str) -> None:
    """A block that returns a dict is answered with a dict, or refused with E310; never with something else."""
    toy = Toy(returns="dict", blind=True)
    model = toy.build()
    before = snapshot(model)
    try:
        with applied(model, f"match block when step > 0 every 2 offset 1 -> {action}"):
            run(model, toy, still=True)
    except PolicyError as error:
        assert ["E310"] == [each.code for each in error.diagnostics]
        assert_untouched(model, before)


@pytest.mark.parametrize("action", ["reuse", "reuse residual"])
@pytest.mark.parametrize(("returns", "kind"), [("tensor", Tensor), ("tuple", tuple), ("list", list), ("dict", dict)])
def test_an_answer_has_the_structure_of_what_was_computed(action: str, returns: Returns, kind: type) -> None:
    """A tensor is answered with a tensor, a tuple, list or dict with one of as many."""
    toy = Toy(returns=returns, blocks=1)
    model, got = toy.build(), list[Any]()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            got.append(model.blocks[0](x, y, model.embed(t.reshape(1, 1) / 1000)))
            return x

    with applied(Outer(), f'match "blocks.0$" every 2 -> {action}') as attached:
        run(attached.target)
    assert "CRCRCRCR" == attached.trace.rows()["model.blocks.0"]
    assert [kind] * 8 == [kind if isinstance(each, kind) else type(each) for each in got]
    assert 1 == len({len(each) for each in got})


class WithNone(nn.Module):
    """A block whose output holds no tensor in its second place."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.lin(x), None


class WithNoneModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([WithNone(), WithNone()])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x, nothing = block(x)
            assert nothing is None
        return x


@pytest.mark.parametrize("action", ["reuse", "reuse residual", "skip"])
def test_a_none_in_an_output_stays(action: str) -> None:
    """`(hidden_states, None)` is answered with `(hidden_states, None)`."""
    model = WithNoneModel()
    with applied(model, f"match block when step > 0 -> {action}") as attached:
        assert all(each.isfinite().all() for each in run(model))
        assert "CRRRRRRR" == attached.trace.rows()["blocks.0"]


def test_a_module_that_is_called_twice_is_not_answered_with_one_call_for_the_other() -> None:
    """Where one forward calls a site twice, a blind model still does not notice reuse."""
    model = Shared()
    bare = run(model, still=True)
    with applied(model, "match feedforward every 2 -> reuse"):
        assert same(bare, run(model, still=True))


def test_nested_sites_keep_their_own_history() -> None:
    """While the outer site reuses the inner ones age; afterwards they go on with what they computed last."""
    text = "match block when step in {1, 2} -> reuse\nmatch attention when step > 0 every 5 -> reuse"
    model = Toy(blocks=1).build()
    with applied(model, text) as attached:
        run(model)
    assert ("CRRCCCCC", "C..RRCRR") == tuple(attached.trace.rows().values())


def test_keyword_arguments_are_as_good_as_positional_ones() -> None:
    """The clock and the sites read a call whichever way it is written."""
    toy = Toy()
    model = toy.build()
    x, y = inputs(toy)
    outputs = list[list[Tensor]]()
    for call in (lambda t: model(x, t, y), lambda t: model(y=y, t=t, x=x), lambda t: model(x, y=y, t=t)):
        with torch.no_grad(), applied(model, "match attention when 300 < t < 900 every 2 -> reuse") as attached:
            outputs.append([call(torch.tensor(t)) for t in TIMESTEPS])
            assert "CRCRCRCC" == attached.trace.rows()["blocks.0.attn"]
    assert same(outputs[0], outputs[1])
    assert same(outputs[0], outputs[2])


# --- modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("action", ["reuse", "reuse residual"])
@pytest.mark.parametrize("in_place", [False, True])
def test_modes_give_the_same(mode: Any, training: bool, action: str, in_place: bool) -> None:
    """inference_mode, no_grad, grad and train() change no number and no decision; in-place writers spoil nothing."""
    toy = Toy(in_place=in_place, returns="tuple")
    text = f"match attention every 2 -> {action}"
    model = toy.build().train(training)
    x, y = inputs(toy)

    def outputs() -> list[Tensor]:
        with mode():
            return [each.detach().clone() for each in sample(model, TIMESTEPS, x, y)]

    with applied(model, text) as attached:
        got = outputs()
        rows = attached.trace.rows()
        again = outputs()
    # Without in-place writers nothing but the schedule decides.
    assert in_place or {"CRCRCRCR"} == set(rows.values())
    expected = by_hand(toy, x, y, rows, residual=action == "reuse residual")
    assert same(expected, got)
    assert same(expected, again)


@torch.no_grad()
def by_hand(toy: Toy, x: Tensor, y: Tensor, rows: dict[str, str], *, residual: bool) -> list[Tensor]:
    """What rows of letters mean, with copies kept: the attentions' forwards are replaced, nothing is intercepted."""
    model, step = toy.build(), [0]
    for name, row in rows.items():
        attention = model.get_submodule(name)
        attention.forward = _kept(attention.forward, row, step, residual=residual)
    found = list[Tensor]()
    for step[0], t in enumerate(TIMESTEPS):
        found.append(model(x, torch.tensor(t), y))
        x = x - 0.1 * found[-1]
    return found


def _kept(forward: Any, row: str, step: list[int], *, residual: bool) -> Any:
    kept = [torch.empty(0)]

    def wrapped(x: Tensor, context: Tensor | None = None) -> Tensor:
        if row[step[0]] == "R":
            return x + kept[0] if residual else kept[0].clone()
        output = forward(x, context)
        kept[0] = output - x if residual else output.clone()
        return output

    return wrapped


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_caller_may_write_into_any_prediction_it_was_given(back: int) -> None:
    """An older prediction that was written into is not extrapolated from either."""
    model = Toy(blind=True).build()
    x, y = inputs(Toy())
    policy = parse("match model when step > 2 every 3 -> predict taylor(order: 2)")
    with torch.no_grad(), cachepolicy.apply(model, policy) as run:
        given = list[Tensor]()
        for step in range(12):
            given.append(model(x, torch.tensor(900.0 - 50 * step), y))
            assert given[-1].isfinite().all()
            if len(given) >= back:
                given[-back].fill_(float("nan"))
        assert any(call.decided[0].verdict == "reuse" for call in run.trace.last.calls)


def test_an_in_place_writer_costs_one_compute_and_then_copies() -> None:
    """Where somebody writes into an answer the site finds out, computes, and keeps copies from then on."""
    toy = Toy(in_place=True, blocks=1)
    model = toy.build()
    with applied(model, "match attention -> reuse") as attached:
        run(model, toy)
    assert "CCRRRRRR" == attached.trace.rows()["blocks.0.attn"]
    assert {("blocks.0.attn", 1, ""): "the history was overwritten in place"} == attached.trace.last.facts


def test_grad_flows_through_what_was_computed() -> None:
    """With grad on, a history holds no graph, and the gradients of the computed part are those of the bare model."""
    toy = Toy(blocks=1)
    model = toy.build()
    x, y = inputs(toy)
    model(x, torch.tensor(900.0), y).sum().backward()
    bare = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with applied(model, "match attention when step > 0 -> reuse"):
        model(x, torch.tensor(900.0), y).sum().backward()
        assert all(torch.equal(bare[name], parameter.grad) for name, parameter in model.named_parameters())
        model.zero_grad()
        model(x, torch.tensor(800.0), y).sum().backward()
    assert model.blocks[0].attn.to_q.weight.grad is None
    assert model.blocks[0].ff.up.weight.grad is not None


def test_gradient_checkpointing_under_a_policy_is_refused() -> None:
    """A backward would run answered sites again: it says so, and what is under `no_grad` or disabled just works."""
    bare = _gradients(checkpointed=False, disabled=True)
    checkpointed = _gradients(checkpointed=True, disabled=True)
    assert bare.keys() == checkpointed.keys()
    assert all(torch.equal(bare[name], checkpointed[name]) for name in bare)
    with pytest.raises(PolicyError, match=r"gradient checkpointing runs `.*attn` again in the backward pass") as caught:
        _gradients(checkpointed=True)
    assert ["E342"] == [each.code for each in caught.value.diagnostics]


def _gradients(*, checkpointed: bool, disabled: bool = False) -> dict[str, Tensor]:
    from torch.utils.checkpoint import checkpoint

    toy = Toy(blocks=2)
    model = toy.build()
    if checkpointed:
        original = ToyDiT.forward

        def forward(self: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            step = self.embed((t / 1000).reshape(1, 1))
            for block in self.blocks:
                x = checkpoint(block, x, y, step, use_reentrant=False)
            return self.out(x)

        assert original is not forward
        model.forward = forward.__get__(model)
    x, y = inputs(toy)
    with (
        applied(model, "match attention when step > 0 -> reuse") as attached,
        attached.disabled() if disabled else contextlib.nullcontext(),
    ):
        model(x, torch.tensor(900.0), y).sum().backward()
        model.zero_grad()
        model(x, torch.tensor(800.0), y).sum().backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


# --- failures and repetitions ----------------------------------------------------------------------------

WHOLE = "match block when step > 1 every 3 -> reuse\nmatch attention while sum(1) < 3 -> reuse"


def fresh(toy: Toy = Toy(), text: str = WHOLE, **options: Any) -> tuple[list[Tensor], dict[str, str]]:
    model = toy.build()
    with applied(model, text) as attached:
        return run(model, toy, **options), attached.trace.rows()


@given(st.integers(0, 7), st.sampled_from([RuntimeError("no"), KeyboardInterrupt(), MemoryError()]))
def test_after_a_failure_the_next_run_is_as_from_a_fresh_model(at: int, error: BaseException) -> None:
    """Whatever a forward raises, and at whatever step: it comes through, and nothing of the run is left."""
    model = failing(Toy().build(), [at], error)
    with applied(model, WHOLE) as attached:
        with pytest.raises(type(error)):
            run(model)
        assert 0 == len(attached.trace)
        outputs, rows = run(model), attached.trace.rows()
    expected, expected_rows = fresh()
    assert same(expected, outputs)
    assert expected_rows == rows


@given(st.integers(1, 7), st.booleans())
def test_after_an_aborted_run_the_next_is_as_from_a_fresh_model(calls: int, explicit: bool) -> None:
    """A sampling loop that is closed part-way, with or without a `reset` by the caller."""
    model = Toy().build()
    x, y = inputs(Toy())
    with torch.no_grad(), applied(model, WHOLE) as attached:
        loop = sample(model, TIMESTEPS, x, y)
        for _ in range(calls):
            next(loop)
        loop.close()
        if explicit:
            attached.reset()
        outputs = list(sample(model, TIMESTEPS, x, y))
        rows = attached.trace.rows()
    expected, expected_rows = fresh()
    assert same(expected, outputs)
    assert expected_rows == rows


@given(st.integers(1, 4), st.booleans())
def test_run_after_run_is_the_same(times: int, pair: bool) -> None:
    """The second run, and any other, is as the first."""
    model = Toy().build()
    expected, _ = fresh(pair=pair)
    with applied(model, WHOLE) as attached:
        for number in range(times):
            assert same(expected, run(model, pair=pair))
            assert number + 1 == len(attached.trace)


def test_another_shape_is_a_fresh_trajectory() -> None:
    """A run with another batch, and one with another dtype, are as from a fresh model; so is going back."""
    model = Toy().build()
    small, _ = fresh()
    large, _ = fresh(batch=3)
    with applied(model, WHOLE):
        assert same(small, run(model))
        assert same(large, run(model, batch=3))
        assert same(small, run(model))
    double = Toy().build().double()
    x, y = (each.double() for each in inputs(Toy()))
    with torch.no_grad(), applied(double, WHOLE):
        expected = list(sample(double, TIMESTEPS, x, y))
    model = Toy().build()
    with torch.no_grad(), applied(model, WHOLE):
        assert same(small, run(model))
        model.double()
        assert same(expected, list(sample(model, TIMESTEPS, x, y)))


@pytest.mark.parametrize("change", ["batch", "dtype", "meta"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_change_of_shape_dtype_or_device_part_way_is_as_a_fresh_start(change: str, at: int) -> None:
    """Nothing that was kept before the change answers after it, and the trace still is the schedule."""
    toy = Toy()

    def drive(model: nn.Module) -> None:
        x, y = inputs(toy)
        for number, t in enumerate(TIMESTEPS[:6]):
            moment = torch.tensor(t)
            if number == at:
                if change == "batch":
                    x, y = x.repeat(2, 1, 1), y.repeat(2, 1, 1)
                elif change == "dtype":
                    model.double()
                    x, y = x.double(), y.double()
                else:
                    model.to("meta")
                    x, y = x.to("meta"), y.to("meta")
            with torch.no_grad():
                out = model(x, moment, y)
            assert (x.shape, x.dtype, x.device) == (out.shape, out.dtype, out.device)

    model = toy.build()
    model.embed.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.device),))
    trajectories = checks.engine_agrees(model, parse("match attention every 4 -> reuse"), drive)
    rows = "".join(each.rows()["blocks.0.attn"] for each in trajectories)
    assert "C" == rows[at]


def test_a_failing_timestep_function_leaves_nothing() -> None:
    """What raises before the forward is a failure like any other: the next run is as from a fresh model."""
    model, now = Toy().build(), [0.0]

    def timestep() -> float:
        if now[0] < 0:
            raise ZeroDivisionError
        return now[0]

    x, y = inputs(Toy())

    def drive(timesteps: Sequence[float]) -> list[Tensor]:
        found, latents = [], x
        for t in timesteps:
            now[0] = t
            found.append(model(latents, torch.tensor(abs(t)), y))
            latents = latents - 0.1 * found[-1]
        return found

    with torch.no_grad(), applied(model, WHOLE, timestep=timestep) as attached:
        with pytest.raises(ZeroDivisionError):
            drive([900.0, 800.0, -1.0])
        got = drive([700.0, 600.0, 500.0])
        assert "C" == attached.trace.rows()["blocks.0.attn"][0]
    other = Toy().build()
    model = other
    with torch.no_grad(), applied(other, WHOLE, timestep=timestep):
        assert same(drive([700.0, 600.0, 500.0]), got)


# --- attach and remove -----------------------------------------------------------------------------------


@given(toys, st.sampled_from([EVERY_2, 'match "." -> reuse', "match block -> reuse\nmatch model -> compute", WHOLE]))
def test_remove_restores_identity(toy: Toy, text: str) -> None:
    """After `remove` every class and every `__dict__` is what it was, whether or not something ran."""
    model = toy.build()
    before = snapshot(model)
    attached = applied(model, text)
    attached.remove()
    assert_untouched(model, before)
    with applied(model, text):
        run(model, toy)
    assert_untouched(model, before)


def test_an_attached_module_still_is_of_its_class() -> None:
    """Name, qualified name, module, `isinstance` and repr stay those of the plain class."""
    model = Toy().build()
    plain = repr(model)
    with applied(model, EVERY_2):
        attention = model.blocks[0].attn
        assert ("Attention", "cachepolicy.testing.models") == (type(attention).__name__, type(attention).__module__)
        assert isinstance(model, ToyDiT)
        assert plain == repr(model)
        assert list(Toy().build().state_dict()) == list(model.state_dict())


def test_a_second_policy_is_refused() -> None:
    """On the model, on one that holds it, and on one inside it; the first stays as it was."""
    model = Toy().build()
    outer = nn.Sequential(model)
    with applied(model, EVERY_2) as attached:
        for target in (model, outer, model.blocks[0]):
            with pytest.raises(PolicyError, match="E301"):
                cachepolicy.apply(target, parse('match "attn" every 3 -> reuse'))
        run(model)
        assert "CRCRCRCR" == attached.trace.rows()["blocks.0.attn"]


class Unswappable(nn.Module):
    """A module whose class cannot be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("this class stays")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), Unswappable(), nn.Linear(8, 8)])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_attach_is_all_or_nothing() -> None:
    """Where one module in the middle cannot be intercepted, the others are as before."""
    model = Mixed()
    before = snapshot(model)
    with pytest.raises(TypeError, match="this class stays"):
        applied(model, r'match "^blocks\.\d$" -> reuse')
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('match "nothing" -> reuse', "E200"),
        ("match attention -> predict taylor(order: 1)", None),
        ("match attention every 2 from end -> reuse", None),
    ],
)
def test_what_is_refused_leaves_the_model_alone(text: str, code: str | None) -> None:
    """Bad selectors before the first hook, and what only the call can tell in it: the model is as before."""
    model = Toy().build()
    before = snapshot(model)
    try:
        with applied(model, text):
            run(model)
    except PolicyError as error:
        assert code in (None, error.diagnostics[0].code)
    assert_untouched(model, before)


def test_a_residual_without_an_input_takes_the_run_off() -> None:
    """What the model refutes in its first forward raises E310, and nothing is attached any more."""

    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(8, 5)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x + self.wide(x).mean()

    model = Widening()
    before = snapshot(model)
    attached = applied(model, 'match "wide" -> reuse residual')
    with pytest.raises(PolicyError, match="E310"):
        run(model)
    assert not attached.attached
    assert_untouched(model, before)
    run(model)


def test_remove_twice_is_harmless_and_remove_of_nothing_is_an_error() -> None:
    """A run that is off stays off; `cachepolicy.remove` on a bare model says so."""
    model = Toy().build()
    attached = applied(model, EVERY_2)
    cachepolicy.remove(model)
    attached.remove()
    with pytest.raises(PolicyError, match="E302"):
        cachepolicy.remove(model)


def test_apply_and_remove_inside_a_forward_are_refused() -> None:
    """Neither changes a model under the feet of a call."""
    model, codes = Toy().build(), list[str]()
    attached = applied(model, EVERY_2)

    def meddle(*_: Any) -> None:
        for call in (attached.remove, lambda: applied(model, EVERY_2)):
            with pytest.raises(PolicyError) as caught:
                call()
            codes.append(caught.value.diagnostics[0].code)

    model.blocks[0].register_forward_hook(meddle)
    run(model, timesteps=TIMESTEPS[:1])
    attached.remove()
    assert ["E305", "E301"] == codes


# --- copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "copy"])
def test_a_copy_is_a_bare_model_of_its_own(way: str, after: bool) -> None:
    """deepcopy, pickle and torch.save of an attached model give the plain class with its own weights and no policy."""
    model = Toy().build()
    bare = run(model)
    with applied(model, EVERY_2) as attached:
        if after:
            run(model, timesteps=TIMESTEPS[:3])
        twin = _copied(model, way)
        assert ToyDiT is type(twin)
        assert all("_cachepolicy" not in each.__dict__ for each in twin.modules()) or way == "copy"
        if way != "copy":
            assert same(bare, run(twin))
            with torch.no_grad():
                twin.blocks[0].attn.to_v.weight.zero_()
            assert not same(bare, run(twin))
            twin_run = applied(twin, EVERY_2)
            twin_run.remove()
        attached.reset()
        run(model)
        assert "CRCRCRCR" == attached.trace.rows()["blocks.0.attn"]
    assert same(bare, run(model))


def _copied(model: ToyDiT, way: str) -> ToyDiT:
    match way:
        case "deepcopy":
            return copy.deepcopy(model)
        case "copy":
            return copy.copy(model)
        case "pickle":
            return pickle.loads(pickle.dumps(model))
        case _:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("removed", [False, True])
def test_a_run_refuses_to_be_copied(copied: Any, removed: bool) -> None:
    """Also inside another object; the run, its model and its policy are as before."""
    model = Toy().build()
    attached = applied(model, EVERY_2)
    if removed:
        attached.remove()
    for thing in (attached, {"run": attached}) if copied is not copy.copy else (attached,):
        with pytest.raises(PolicyError, match="E316"):
            copied(thing)
    twin = copy.deepcopy(model)
    with cachepolicy.apply(twin, copy.deepcopy(attached.policy)) as other:
        run(twin)
        assert "CRCRCRCR" == other.trace.rows()["blocks.0.attn"]


class Uncopyable:
    """The key of a session, such as a request, that holds what cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_a_copy_of_a_trace_stays_as_it_was() -> None:
    """A deep copy has the trajectories of its moment, with the same keys, and records of its own."""
    model, key = Toy().build(), Uncopyable()
    with applied(model, EVERY_2) as attached:
        with attached.session(key):
            run(model, timesteps=TIMESTEPS[:2])
        twin, shallow = copy.deepcopy(attached.trace), copy.copy(attached.trace)
        text = twin.to_json()
        with attached.session(key):
            run(model, timesteps=TIMESTEPS[2:4])
        run(model)
    lengths = [[len(found.calls) for found in trace] for trace in (twin, shallow, attached.trace)]
    assert [[2], [4], [4, len(TIMESTEPS)]] == lengths
    assert key is twin.last.session
    assert (text, "CR") == (twin.to_json(), twin.rows()["blocks.0.attn"])
    twin.begin("another", attached.plan)
    assert (2, 2, 1) == (len(twin), len(attached.trace), len(shallow))


def test_a_trace_survives_pickling() -> None:
    """Another process reads the same trace, and can go on recording in it."""
    model = Toy().build()
    with applied(model, EVERY_2) as attached:
        run(model)
    twin = pickle.loads(pickle.dumps(attached.trace))
    assert attached.trace.to_json() == twin.to_json()
    assert attached.trace.latest[0].counts() == twin.latest[0].counts()
    twin.drop(twin.begin("another", attached.plan))
    assert 1 == len(twin)


def test_a_deepcopy_from_inside_a_block_is_bare_too() -> None:
    """A copied part of an attached model computes."""
    model = Toy().build()
    with applied(model, "match attention -> reuse"):
        run(model)
        attention = copy.deepcopy(model.blocks[0].attn)
        probes = Probes(attention)
        attention(torch.zeros(1, 4, 8))
        assert 1 == probes.take()[""]


def test_a_site_that_is_called_outside_its_root_computes() -> None:
    """Only calls of the root publish decisions: a block called by hand is the bare block."""
    model = Toy().build()
    x, y = inputs(Toy())
    with torch.no_grad():
        step = model.embed(torch.zeros(1, 1))
        bare = model.blocks[0](x, y, step)
        with applied(model, "match block -> reuse"):
            run(model, seed=5)
            with pytest.warns(UserWarning, match="W601"):
                assert torch.equal(bare, model.blocks[0](x, y, step))


# --- memory ----------------------------------------------------------------------------------------------


def test_a_session_is_bounded_in_number() -> None:
    """The least recently used session goes when there are too many, and nothing grows without end."""
    model = Toy(blocks=1).build()
    with applied(model, EVERY_2) as attached:
        for key in range(80):
            with attached.session(key):
                run(model, timesteps=[900.0])
        assert 64 == len(attached._sessions.keys)
        assert 8 == len(attached.trace)


def test_reset_releases_what_was_kept() -> None:
    """After `reset` no tensor of the run is alive."""
    import gc
    import weakref

    model, kept = Toy(blocks=1).build(), list[Any]()
    model.blocks[0].attn.register_forward_hook(lambda _, __, output: kept.append(weakref.ref(output)))
    with applied(model, "match attention -> reuse") as attached:
        run(model, timesteps=TIMESTEPS[:2])
        gc.collect()
        assert kept[0]() is not None
        attached.reset()
        gc.collect()
        assert kept[0]() is None


def test_an_unused_policy_is_told_of_once() -> None:
    """A finished trajectory in which nothing was reused warns once, with the reason and the timesteps."""
    model = Toy().build()
    with (
        pytest.warns(UserWarning, match="reused nothing in a trajectory of 8 calls") as caught,
        applied(model, "match attention when t < 0 -> reuse"),
    ):
        run(model)
        run(model)
        run(model)
    assert 1 == len(caught)


def test_without_a_trace_all_else_is_the_same() -> None:
    """`trace=False` keeps no record and changes no output."""
    model = Toy().build()
    with applied(model, WHOLE, trace=False) as attached:
        got = run(model)
    assert attached.trace is None
    assert same(fresh()[0], got)


def test_disabled_runs_the_bare_model_and_leaves_the_state() -> None:
    """Inside `disabled()` the model is bare; afterwards the trajectory goes on where it was."""
    model = Toy().build()
    bare = run(model)
    expected, rows = fresh()
    x, y = inputs(Toy())
    with torch.no_grad(), applied(model, WHOLE) as attached:
        loop, got = sample(model, TIMESTEPS, x, y), list[Tensor]()
        for number, prediction in enumerate(loop):
            got.append(prediction)
            if number == 3:
                with attached.disabled():
                    assert same(bare, run(model))
    assert same(expected, got)
    assert rows == attached.trace.rows()


# --- arguments that do not fit ---------------------------------------------------------------------------

PUSHED = "external push: float\nmatch attention every 2 -> predict linear(weight: push)"


@pytest.mark.parametrize("value", [None, "1", True, torch.ones(2)])
def test_an_external_that_is_no_number(value: Any) -> None:
    """What the function returns is checked where it is read."""
    model = Toy().build()
    with (
        cachepolicy.apply(model, cachepolicy.parse(PUSHED), steps=4, push=lambda: value),
        pytest.raises(cachepolicy.PolicyError, match=r"E307.*`push`"),
    ):
        run(model, timesteps=[900.0, 600.0, 300.0])


@pytest.mark.parametrize(
    ("push", "message", "help"),
    [
        (lambda step: step, "missing a required argument: 'step'", "it is called without arguments"),
        ("half", "`push` is `str`", "a number, or a function that returns one"),
    ],
)
def test_an_external_that_cannot_be_called(push: Any, message: str, help: str) -> None:
    """A function with other arguments is refused by `apply`, not in the middle of a run."""
    model = Toy().build()
    with pytest.raises(cachepolicy.PolicyError) as raised:
        cachepolicy.apply(model, cachepolicy.parse(PUSHED), steps=4, push=push)
    (found,) = raised.value.diagnostics
    assert ("E307", help) == (found.code, found.help)
    assert message in found.message
    with cachepolicy.apply(model, cachepolicy.parse(PUSHED), steps=4, push=lambda strength=0.5: strength):
        run(model, timesteps=[900.0, 600.0, 300.0])


def test_arguments_of_apply_that_are_swapped() -> None:
    """The policy before the model is an error that says so, and a policy text says how to parse it."""
    model = Toy().build()
    for target, policy, help in [
        ("pab.cp", model, "the model is the first argument, the policy the second: `apply(model, policy)`"),
        (model, "match attention every 2 -> reuse", "parse the text first: `cachepolicy.parse(text)`"),
    ]:
        with pytest.raises(cachepolicy.PolicyError) as raised:
            cachepolicy.apply(cast("Any", target), cast("Any", policy))
        assert [("E150", help)] == [(found.code, found.help) for found in raised.value.diagnostics]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("match attention every 1 -> reuse\nmatch feedforward every 2 -> reuse", "W513"),
        ("match attention every 2 -> reuse\nmatch attention every 3 -> reuse", "W510"),
        ('match attention when branch == "mine" every 2 -> reuse', None),
        ("match attention every 2 -> reuse", None),
    ],
)
def test_rules_that_never_act_are_warned_of_once_at_apply(text: str, code: str | None) -> None:
    """As `plan` and `check` warn; a bare model may name its branches as it likes."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        cachepolicy.apply(Toy().build(), parse(text)).remove()
    assert ([] if code is None else [code]) == [str(each.message)[8:12] for each in record]
