"""Audited trajectories: they return what the bare model returns, and record how far each answer would have been off."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cachepolicy
from cachepolicy import RunOptions
from cachepolicy.engine.guidance_tensors import Frames, difference, rebuild
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing import checks, models, strategies
from cachepolicy.testing.models import Shared, Toy, ToyDiT, inputs, sample
from cachepolicy.tracing.trace import Trajectory, from_json
from tests.support.guided_toy import GuidedToy

pytestmark = pytest.mark.filterwarnings(
    "ignore:the policy reused nothing", "ignore:one forward of", "ignore:`ToyDiT` was called with"
)

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0, 350.0, 250.0)
ALL = RunOptions(audit=1.0)

toys = st.builds(
    Toy,
    blocks=st.integers(1, 3),
    returns=st.sampled_from(["tensor", "tuple", "list", "dict"]),
    in_place=st.booleans(),
    cross=st.booleans(),
    stages=st.integers(0, 2),
)


@torch.no_grad()
def run(model: nn.Module, toy: Toy, timesteps: Sequence[float] = TIMESTEPS, **options: Any) -> list[Tensor]:
    """All predictions of one loop; with `pair` there are two branches."""
    x, y = inputs(toy, seed=options.get("seed", 0), batch=options.get("batch", 1))
    return list(sample(model, timesteps, x, [y, -y] if options.get("pair") else y, still=options.get("still", False)))


def apply(*args: Any, **options: Any) -> Any:
    """`cachepolicy.apply`, of which the trace is always there here."""
    return cachepolicy.apply(*args, **options)


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def relative(answers: Sequence[Tensor], computed: Sequence[Tensor]) -> float:
    """The error as it is defined: the norm of the difference over the norm of what was computed."""
    off = sum(float((one - other).double().square().sum()) for one, other in zip(answers, computed, strict=True))
    return math.sqrt(off / sum(float(tensor.double().square().sum()) for tensor in computed))


# --- what is returned --------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.data())
def test_an_audited_run_returns_the_bare_models_tensors_and_records_the_policys_decisions(data: st.DataObject) -> None:
    """On any toy, policy and clock; each answer has an error, and nothing else has one."""
    toy, timesteps = data.draw(toys), data.draw(strategies.timesteps())
    actions = (*strategies.ACTIONS, "predict taylor(order: 1)", "predict linear(weight: 0.5, feedback: true)")
    policy = data.draw(strategies.policies(steps=len(timesteps), measured=data.draw(st.booleans()), actions=actions))
    pair = data.draw(st.booleans())
    with apply(toy.build(), policy, steps=len(timesteps), options=ALL) as attached:
        got = run(attached.target, toy, timesteps, pair=pair)
        trace = attached.trace
    assert same(run(toy.build(), toy, timesteps, pair=pair), got)
    checks.saved_alike(trace)
    for trajectory in trace:
        checks.well_formed(trajectory)
        checks.trace_agrees(trajectory)
        for call in trajectory.calls:
            reused = {site for site, decision in enumerate(call.decisions) if decision.verdict == "reuse"}
            assert reused == call.errors.keys()


@settings(max_examples=20)
@given(st.data())
def test_an_audited_guidance_batch_is_the_bare_models(data: st.DataObject) -> None:
    """Where the policy would run one half of a batch, both halves are computed, and the rebuilt half is compared."""
    toy = data.draw(toys)
    policy = data.draw(
        strategies.policies(steps=len(TIMESTEPS), approximate=strategies.APPROXIMATION, actions=["reuse", "compute"])
    )
    with apply(toy.build(), policy, guidance=True, steps=len(TIMESTEPS), options=ALL) as attached:
        got = run(attached.target, toy, batch=2)
        calls = attached.trace.last.calls
    assert same(run(toy.build(), toy, batch=2), got)
    for call in calls:
        reused = {site for site, decision in enumerate(call.decisions) if decision.verdict == "reuse"}
        assert reused == call.errors.keys()


WITHIN = """
signal size = l2(output("blocks.0.attn"))
signal drift = relative_l1(output("blocks.0.attn"), kept(output("blocks.0.attn")))
match blocks[0:] while drift <= 0.6 at most 3 in a row -> {}
match feedforward every 3 while size > 0 -> reuse
"""


@pytest.mark.parametrize("action", ["reuse residual", "reuse", "predict taylor(order: 1)"])
def test_a_span_that_is_decided_inside_its_first_block(action: str) -> None:
    """The block is not left, but nothing after the decision is measured or kept."""
    toy = Toy(blocks=3, returns="tuple")
    policy = parse(WITHIN.format(action))
    with apply(toy.build(), policy) as attached:
        answered = run(attached.target, toy, still=True)
        expected = attached.trace.last
    with apply(toy.build(), policy, options=ALL) as attached:
        got = run(attached.target, toy, still=True)
        trajectory = attached.trace.last
    bare = run(toy.build(), toy, still=True)
    assert same(bare, got)
    assert not same(bare, answered)
    # The latents stand still, so that the span receives the same tensors in both runs.
    assert expected.rows()["blocks[0:3]"] == trajectory.rows()["blocks[0:3]"]
    assert "R" in expected.rows()["blocks[0:3]"]
    checks.trace_agrees(trajectory)


def test_in_place_writes_do_not_reach_the_answers() -> None:
    """A model that writes into what its modules return is audited like any other."""
    toy = Toy(blocks=2, in_place=True)
    with apply(toy.build(), parse("match attention every 2 -> reuse"), options=ALL) as attached:
        got = run(attached.target, toy)
    assert same(run(toy.build(), toy), got)


def test_a_module_that_one_forward_calls_twice() -> None:
    """The policy would compute it from the second call on, and so does the audit."""
    model = Shared()
    bare = run(model, Toy(width=8))
    with apply(model, parse("match feedforward every 2 -> reuse"), options=ALL) as attached:
        assert same(bare, run(model, Toy(width=8)))
        assert {"C" * len(TIMESTEPS)} == set(attached.trace.rows().values())


# --- the errors --------------------------------------------------------------------------------------------


class Recorded:
    """The inputs and outputs of modules in each call of a bare model."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.inputs = {name: list[list[Tensor]]() for name in names}
        self.outputs = {name: list[list[Tensor]]() for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            self.inputs[name].append([tensor.clone() for tensor in args])
            outputs = [output] if isinstance(output, Tensor) else list(output)
            self.outputs[name].append([tensor.clone() for tensor in outputs])

        return record


def answers(action: str, computed: Sequence[int], step: int, recorded: Recorded, site: str) -> list[Tensor]:
    """What an action answers at a step, from the values at the computed steps before it."""
    blocks = site.split(" ")
    before, after = recorded.inputs[blocks[0]], recorded.outputs[blocks[-1]]
    newest = [at for at in computed if at < step][::-1]
    entering = before[step]
    if action == "skip":
        return entering[: len(after[step])]

    def kept(at: int, stream: int) -> Tensor:
        return after[at][stream] - before[at][stream] if "residual" in action else after[at][stream]

    result = list[Tensor]()
    for stream in range(len(after[step])):
        value = kept(newest[0], stream)
        if "taylor" in action and len(newest) > 1:
            slope = (value - kept(newest[1], stream)) / (newest[0] - newest[1])
            value = value + (step - newest[0]) * slope
        result.append(entering[stream] + value if "residual" in action else value)
    return result


@pytest.mark.parametrize("returns", ["tensor", "tuple"])
@pytest.mark.parametrize(
    "action",
    ["reuse", "reuse residual", "skip", "predict taylor(order: 1)", "predict taylor(order: 1) of residual"],
)
@pytest.mark.parametrize(("selector", "sites"), [
    ("blocks[1:3]", {"blocks[1:3]": "blocks.1 blocks.2"}),
    ("each blocks[0:]", {f"blocks.{index}": f"blocks.{index}" for index in range(3)}),
    ('"ff$"', {f"blocks.{index}.ff": f"blocks.{index}.ff" for index in range(3)}),
])  # fmt: skip
def test_the_error_is_that_of_an_answer_made_by_hand(
    selector: str, sites: dict[str, str], action: str, returns: Any
) -> None:
    """The norm of the difference over the norm of the computed output, on the inputs of the bare trajectory."""
    toy = Toy(blocks=3, returns=returns)
    bare = toy.build()
    recorded = Recorded(bare, sorted({name for modules in sites.values() for name in modules.split()}))
    run(bare, toy)
    with apply(toy.build(), parse(f"match {selector} every 3 -> {action}"), options=ALL) as attached:
        run(attached.target, toy)
        trajectory, summary = attached.trace.last, attached.audit
    for site, modules in sites.items():
        row, index = trajectory.rows()[site], next(one.index for one in trajectory.plan.sites if one.name == site)
        computed = [step for step, letter in enumerate(row) if letter == "C"]
        by_hand = {
            step: relative(
                answers(action, computed, step, recorded, modules), recorded.outputs[modules.split()[-1]][step]
            )
            for step, letter in enumerate(row)
            if letter == "R"
        }
        got = {step: call.errors[index] for step, call in enumerate(trajectory.calls) if index in call.errors}
        assert by_hand == pytest.approx(got, rel=1e-4)
        assert len(by_hand) == summary.errors[site].count
        assert max(by_hand.values()) == pytest.approx(summary.errors[site].worst, rel=1e-4)
        assert sum(by_hand.values()) / len(by_hand) == pytest.approx(summary.errors[site].mean, rel=1e-4)
        assert max(by_hand, key=lambda step: by_hand[step]) == summary.errors[site].step


def test_the_error_of_a_rebuilt_half_is_that_of_the_whole_prediction() -> None:
    """The stored difference is that of the last full step, and its factors compound."""
    toy = Toy(blocks=2)
    bare = run(toy.build(), toy, batch=2)
    text = f"match model every 3 -> {strategies.APPROXIMATION}"
    with apply(toy.build(), parse(text), guidance=True, options=ALL) as attached:
        run(attached.target, toy, batch=2)
        trajectory = attached.trace.last
    frames, bands = Frames("BSC", (1, 2, 2)), cast("Any", None)
    for output, call in zip(bare, trajectory.calls, strict=True):
        uncond, cond = output.chunk(2)
        if call.decisions[0].computes:
            bands = difference(frames.split(uncond), frames.split(cond))
            assert not call.errors
        else:
            rebuilt = frames.join(rebuild(bands, frames.split(cond), 1.1, 1.0), 1)
            assert relative([torch.cat([rebuilt, cond])], [output]) == pytest.approx(call.errors[0], rel=1e-3)
    assert "R" in trajectory.rows()["model"]


def guided(toy: Toy) -> ToyDiT:
    """The model of `toy.build()`, whose caller names the branch of a call."""
    model = toy.build()
    model.__class__ = GuidedToy
    return model


@torch.no_grad()
def two_calls(model: Any, toy: Toy) -> list[Tensor]:
    """The predictions of guidance in two calls a step: the conditional one, then the other."""
    x, y = inputs(toy)
    predictions = list[Tensor]()
    for t in TIMESTEPS:
        pair = list[Tensor]()
        for name, conditioning in (("cond", y), ("uncond", -y)):
            with model.cache_context(name):
                pair.append(model(x, torch.tensor(t), conditioning))
        predictions += pair
        x = x - 0.1 * (pair[1] + 2 * (pair[0] - pair[1]))
    return predictions


def test_an_unconditional_call_that_the_policy_would_answer_is_computed() -> None:
    """Guidance in two calls: the error is that of the unconditional prediction."""
    toy = Toy(blocks=2)
    bare = two_calls(guided(toy), toy)
    text = f'match model when branch == "uncond" every 3 -> {strategies.APPROXIMATION}'
    with apply(guided(toy), parse(text), options=ALL) as attached:
        assert same(bare, two_calls(attached.target, toy))
        trajectory = attached.trace.last
    assert "CRRCRRCR" == trajectory.rows("uncond")["model"]
    frames, bands = Frames("BSC", (1, 2, 2)), cast("Any", None)
    for cond, uncond, call in zip(bare[::2], bare[1::2], trajectory.calls[1::2], strict=True):
        if call.decisions[0].computes:
            bands = difference(frames.split(uncond), frames.split(cond))
        else:
            rebuilt = frames.join(rebuild(bands, frames.split(cond), 1.1, 1.0), 1)
            assert relative([rebuilt], [uncond]) == pytest.approx(call.errors[0], rel=1e-3)


def test_an_answer_to_zeros_is_infinitely_wrong_unless_it_is_zero() -> None:
    """An error is relative to what was computed."""
    from cachepolicy.engine.audit import Audit

    audit = Audit()
    audit.compare(0, torch.zeros(3), torch.zeros(3))
    audit.compare(1, torch.ones(3), torch.zeros(3))
    audit.compare(2, torch.full((3,), math.nan), torch.ones(3))
    audit.compare(3, (torch.ones(3), torch.tensor([7])), (torch.full((3,), 2.0), torch.tensor([8])))
    assert {0: 0.0, 1: math.inf, 2: math.inf, 3: 0.5} == audit.errors()


# --- which trajectories ------------------------------------------------------------------------------------


def audited(share: float, seed: int, count: int, **session: Any) -> list[bool]:
    """Which of some trajectories a run audits."""
    toy = Toy(blocks=1)
    options = RunOptions(audit=share, audit_seed=seed)
    with apply(toy.build(), parse("match attention every 2 -> reuse"), options=options) as attached:
        found = list[bool]()
        for number in range(count):
            with attached.session(number, **session):
                run(attached.target, toy, TIMESTEPS[:2])
            found.append(attached.trace.last.audited)
        assert (count, sum(found)) == (attached.audit.begun, attached.audit.audited)
        return found


@settings(max_examples=10)
@given(st.floats(0, 1), st.integers(0, 10))
def test_the_choice_is_that_of_the_documented_seed(share: float, seed: int) -> None:
    """Trajectory n is drawn by `random.Random` of a text with the seed and n."""
    draws = [random.Random(f"cachepolicy audit {seed} {number}").random() for number in range(12)]
    assert [share > draw for draw in draws] == audited(share, seed, 12)


def test_a_session_can_be_audited_for_certain() -> None:
    """Its own share takes the place of the run's."""
    assert [True, True] == audited(0.0, 0, 2, audit=1.0)
    assert [False, False] == audited(1.0, 0, 2, audit=0.0)


def test_without_audits_nothing_is_recorded_or_run_twice() -> None:
    """A share of 0 leaves the executions, the results and the record as they are."""
    toy = Toy(blocks=2)
    policy = parse("match attention every 2 -> reuse\nmatch feedforward every 3 -> reuse")
    checks.engine_agrees(toy.build(), policy, lambda model: run(model, toy), options=RunOptions(audit=0.0))
    with apply(toy.build(), policy, options=RunOptions(audit=0)) as attached:
        run(attached.target, toy)
        assert not attached.audit.errors
        assert attached.audit.worst is None
        assert not any(call.errors for call in attached.trace.last.calls)


def test_audited_sessions_in_threads_stay_apart() -> None:
    """Audited and other trajectories run at the same time; each returns what it returns alone."""
    toy, results = Toy(blocks=2), dict[int, list[Tensor]]()
    policy = parse("match attention every 2 -> reuse\nmatch blocks[1:] every 3 -> reuse residual")
    with apply(toy.build(), policy) as attached:
        alone = run(attached.target, toy)
    bare = run(toy.build(), toy)
    with apply(toy.build(), policy) as attached:

        def work(number: int) -> None:
            with attached.session(number, audit=float(number % 2)):
                results[number] = run(attached.target, toy)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 3 == attached.audit.audited
    for number, result in results.items():
        assert same(bare if number % 2 else alone, result)


@pytest.mark.parametrize("option", [{"audit": 1.5}, {"audit": -0.1}, {"audit": True}, {"audit_seed": 0.5}])
def test_a_share_is_between_0_and_1(option: dict[str, Any]) -> None:
    """Other values are refused by name."""
    with pytest.raises(PolicyError, match=r"E309.*`audit"):
        RunOptions(**option)


# --- what is held, saved and shown -------------------------------------------------------------------------


def test_an_audited_trajectory_holds_what_the_policy_would_hold() -> None:
    """Nothing is held from one call to the next but the histories of the policy, also under a memory limit."""
    toy = Toy(blocks=3)
    policy = parse("match attention every 2 -> reuse\nmatch feedforward every 3 -> predict taylor(order: 1)")

    def held(share: float, limit: int | None) -> list[int]:
        with apply(toy.build(), policy, memory_limit=limit, options=RunOptions(audit=share)) as attached:
            run(attached.target, toy)
            return [call.held for call in attached.trace.last.calls]

    for limit in (None, 300):
        assert held(0.0, limit) == held(1.0, limit)
    assert max(held(0.0, 300)) < max(held(0.0, None))


@pytest.mark.parametrize("where", ["model", "blocks"])
def test_compiled_models_are_audited_outside_their_graphs(where: str) -> None:
    """An audited trajectory returns what the model returns without the compiler; the others run in their graphs."""
    toy = Toy(blocks=2)
    model, compiled = toy.build(), list[Any]()

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for module in [model] if where == "model" else model.blocks:
        module.compile(backend=backend)
    policy = parse("match attention every 2 -> reuse\nmatch blocks[1:] every 3 -> reuse residual")
    with apply(model, policy, options=ALL) as attached:
        got = run(attached.target, toy, TIMESTEPS[:5])
        assert attached.audit.worst
    assert same(run(toy.build(), toy, TIMESTEPS[:5]), got)
    assert not compiled


def test_a_saved_trace_keeps_the_errors() -> None:
    """Infinite errors too; an error of no site is refused."""
    toy = Toy(blocks=1)
    with apply(toy.build(), parse("match attention every 2 -> reuse"), options=ALL) as attached:
        run(attached.target, toy)
        trace = attached.trace
    trace.last.calls[1] = replace(trace.last.calls[1], errors={0: math.inf})
    read = from_json(trace.to_json())
    assert isinstance(read.last, Trajectory)
    assert read.last.audited
    assert [call.errors for call in trace.last.calls] == [call.errors for call in read.last.calls]
    trace.last.calls[1] = replace(trace.last.calls[1], errors={7: 0.5})
    with pytest.raises(PolicyError, match="errors: there is no site 7"):
        from_json(trace.to_json())


def test_two_branches_and_inference_mode() -> None:
    """Inference tensors are audited as any others."""
    toy = Toy(blocks=2, returns="tuple")
    policy = parse("match blocks[1:] every 2 -> reuse residual\nmatch attention every 2 -> reuse")
    x, y = inputs(toy)
    with torch.inference_mode():
        bare = list(sample(toy.build(), TIMESTEPS, x, [y, -y]))
        with apply(toy.build(), policy, options=ALL) as attached:
            got = list(sample(attached.target, TIMESTEPS, x, [y, -y]))
            assert 2 == len(attached.trace.last.branches)
    assert same(bare, got)


def test_the_summary_names_the_worst_sites_first() -> None:
    """Its text gives the share of audited trajectories and the errors."""
    toy = Toy(blocks=6)
    policy = parse("match attention every 2 -> reuse\nmatch feedforward every 3 -> reuse")
    with apply(toy.build(), policy, options=ALL) as attached:
        models.redraw(attached.target, 1)
        run(attached.target, toy)
        summary = attached.audit
    lines = str(summary).splitlines()
    assert "1 of 1 trajectory audited" == lines[0]
    worst = [float(line.rsplit(" at ", 1)[0].split(", ")[-1].rstrip("%")) for line in lines[1:-1]]
    assert sorted(worst, reverse=True) == worst
    assert "  and 4 sites with smaller errors" == lines[-1]
