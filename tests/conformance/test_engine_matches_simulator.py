"""Given what a run measured and found, the simulator decides as the engine does, for the same reasons."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
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
from cachepolicy.language.parser import parse
from cachepolicy.planning.schedule import prepare
from cachepolicy.testing import checks, strategies
from cachepolicy.testing.models import Probes, Toy, inputs, redraw
from tests.support.guided_toy import GuidedToy

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")


class Experts:
    """A pipeline of two denoisers, the second of which takes over in mid-trajectory. A call runs in pieces."""

    def __init__(self, *models: GuidedToy) -> None:
        self.transformer, self.transformer_2 = models

    @property
    def components(self) -> dict[str, GuidedToy]:
        """The parts of the pipeline."""
        return {"transformer": self.transformer, "transformer_2": self.transformer_2}

    def __call__(self, loop: Loop, seed: int) -> Iterator[None]:
        """Run the loop, one root call at a time."""
        yield from calls(tuple(self.components.values()), loop, seed)


@dataclass(frozen=True, slots=True)
class Loop:
    """One sampling loop: its branches, and the steps at which all of them but the first are called.

    A batched loop makes one unnamed call for both halves. The second denoiser begins at the step `boundary`; with None
    there is one denoiser.
    """

    timesteps: Sequence[float]
    branches: tuple[str, ...]
    guided: range
    batched: bool = False
    boundary: int | None = None

    def branches_at(self, step: int) -> tuple[str, ...]:
        """Return the branches of a step, in the order of the calls."""
        return self.branches if step in self.guided else self.branches[:1]


MODES = (
    (),
    ("",),
    ("", ""),
    ("cond", "uncond"),
    ("cond", "uncond"),
    ("cond", "uncond"),
    ("uncond", "cond"),
    ("cond", "perturbed", "uncond"),
    ("a", "b"),
)
"""The branches of a step; none stands for a guidance batch."""


@st.composite
def loops(draw: st.DrawFn) -> Loop:
    timesteps, branches = draw(strategies.timesteps(2, 8)), draw(st.sampled_from(MODES))
    guided = range(draw(st.sampled_from([0, 0, 1, 3])), len(timesteps) - draw(st.sampled_from([0, 0, 1, 2])))
    boundary = draw(st.none() | st.none() | st.integers(1, len(timesteps) - 1))
    return Loop(timesteps, branches or ("",), guided, batched=not branches, boundary=boundary)


def calls(models: Sequence[GuidedToy], loop: Loop, seed: int) -> Iterator[None]:
    """Run a loop, one root call at a time."""
    x, y = inputs(Toy(), seed=seed)
    conditions = [torch.cat([-y, y])] if loop.batched else [y, -y, y + 1]
    for step, t in enumerate(loop.timesteps):
        model = models[loop.boundary is not None and step >= loop.boundary]
        predictions = list[Tensor]()
        for branch, condition in zip(loop.branches_at(step), conditions, strict=False):
            with model.cache_context(branch) if branch else contextlib.nullcontext():
                predictions.append(model(x.repeat(len(condition), 1, 1), torch.tensor(float(t)), condition))
            yield
        x = x - 0.1 * torch.cat(predictions).mean(0, keepdim=True)


def agree(
    policy: cachepolicy.Policy,
    loop: Loop,
    *,
    toy: Toy = Toy(),
    turns: Sequence[int] = (),
    rounds: int = 1,
    inference: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Run the loop in as many sessions as `turns` names, one root call of a session at each turn, and compare.

    Each session runs the loop `rounds` times, the later ones after all sessions have ended the first.
    """
    models = [GuidedToy(toy) for _ in range(1 if loop.boundary is None else 2)]
    for seed, model in enumerate(models):
        redraw(model.eval(), seed)
    probes = [Probes(model) for model in models]
    target = models[0] if loop.boundary is None else Experts(*models)
    keys = sorted({0, *turns})
    with (
        cachepolicy.apply(target, policy, guidance=loop.batched, **options) as run,
        torch.inference_mode(inference),
        torch.set_grad_enabled(False),
    ):
        for _ in range(rounds):
            loops = {key: calls(models, loop, key) if len(models) == 1 else target(loop, key) for key in keys}
            for key in [*turns, *(key for key in keys for _ in range(3 * len(loop.timesteps)))]:
                with run.session(key) if len(models) == 1 else contextlib.nullcontext():
                    next(loops[key], None)
        trajectories = run.trace.trajectories
        checks.saved_alike(run.trace)
    assert len(keys) * rounds * len(models) == len(trajectories)
    for trajectory in trajectories:
        checks.well_formed(trajectory)
        checks.trace_agrees(trajectory)
        assert {} == {
            key: fact
            for key, fact in trajectory.facts.items()
            if not _explained(trajectory, key, fact, loop, toy, options.get("memory_limit"))
        }
        if not trajectory.plan.probes and len(loop.guided) == len(loop.timesteps) and len(models) == 1:
            _simulates(trajectory, loop)
    if not _left_on_the_way(trajectories[0].plan):
        checks._executions_agree(trajectories, sum((Counter(each.take()) for each in probes), Counter()))
    return trajectories


def _left_on_the_way(plan: Any) -> bool:
    """Whether a site has to begin to run before it is decided, because a probe is inside it."""
    leads = [site.modules[0] for site in plan.sites if site.modules[0]]
    return any(place.modules[0].startswith(f"{lead}.") for place in plan.probes.values() for lead in leads)


def _explained(trajectory: Any, key: tuple[str, int, str], fact: str, loop: Loop, toy: Toy, limit: int | None) -> bool:
    """Whether the run has a cause for a fact; a history that was released too early has none."""
    name, step, branch = key
    site = next(site for site in trajectory.plan.sites if site.name == name)
    call = next(call for call in trajectory.calls if (call.tick.step, call.tick.branch) == (step, branch))
    if call.decisions[site.index].reason != fact:
        return True  # the site computed for another reason
    same_step = [call.tick.branch for call in trajectory.calls if call.tick.step == step]
    match fact:
        case "over the memory limit":
            return limit is not None
        case "the history was overwritten in place":
            return toy.in_place
        case "the site around it had to compute":
            return any(
                (trajectory.plan.sites[parent].name, step, branch) in trajectory.facts for parent in site.parents
            )
        case "it has no two halves to take the mean of":
            return not loop.batched
        case "there is no guidance":
            return name == "model" and not loop.batched and branch not in {"cond", "uncond"}
        case "no step has shown that it has one call":
            return name == "model" and loop.batched and step < 2
        case "the conditional call has not run in this step":
            return name == "model" and "cond" not in same_step[: same_step.index("uncond")]
        case "its first block had run before it was decided":
            return bool(trajectory.plan.probes)
        case "nothing is kept yet":
            before = [call for call in trajectory.calls if call.tick.branch == branch and call.tick.step < step]
            never = not any(call.decisions[site.index].computes for call in before)
            return never or limit is not None or (toy.in_place and name != "model")
        case _:
            return False


def _simulates(trajectory: Any, loop: Loop) -> None:
    """`simulate` needs the timesteps, the branches and the facts alone where nothing is measured."""
    if any(call.tick.steps is None for call in trajectory.calls):
        return
    schedule = cachepolicy.simulate(
        trajectory.plan,
        steps=len(loop.timesteps),
        timesteps=loop.timesteps,
        branches=trajectory.branches,
        signals={
            name: {
                branch: [
                    call.signals[trajectory.plan.sites[0].index][name]
                    for call in trajectory.calls
                    if call.tick.branch == branch
                ]
                for branch in trajectory.branches
            }
            for name in prepare(trajectory.plan).externals
        },
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
    "reuse mean",
    "predict linear(weight: 1 / (3 - gap))",
    "predict hermite(order: 1, scale: computes / age)",
    "predict newton(order: 2) of residual",
    'predict band(transform: "dct", cut: 0.3, low: taylor(order: 0), high: taylor(order: 1)) of residual',
    "predict chebyshev(order: 2, ridge: 0.1)",
    "predict weights(of: [2, -1, 0.5 / (3 - gap)])",
)
APPROXIMATIONS = (
    strategies.APPROXIMATION,
    strategies.APPROXIMATION,
    "approximate uncond copy",
    "approximate uncond delta",
    "approximate uncond affine(cond: [1, 0.5], uncond: [0.5, 1 / computes])",
)
TOYS = st.builds(
    Toy, blocks=st.integers(2, 3), returns=st.sampled_from(["tensor", "tuple", "dict"]), in_place=st.booleans()
)


@st.composite
def reusing(draw: st.DrawFn, follow: str | None, *, approximate: bool) -> cachepolicy.Policy:
    """Policies that reuse at most steps, so that branches, signals and guidance meet histories."""
    probe = draw(
        st.sampled_from(["input(model)", 'residual("^blocks.0.norm$")', "output(blocks[0])", "residual(blocks[0])"])
    )
    lines = [line.replace("input(model)", probe) for line in draw(strategies.signals())]
    lines += [
        "signal s = prev(residual(self)) + input(self)",
        "signal i = input(self)",
        f"signal seen = {probe}",
        "signal mine = relative_l1(input(self), kept(input(self)))",
    ]
    if approximate:
        schedule = draw(st.sampled_from(["every 2", "every 3", "every 4 since compute", "while drift < 3", ""]))
        lines.append(f"match model {schedule} -> {draw(st.sampled_from(APPROXIMATIONS))}")
    span = draw(st.sampled_from(["blocks", "blocks[1:]", "blocks[0:2]", "block"]))
    for selector in draw(st.lists(st.sampled_from([span, "attention", "feedforward"]), min_size=1, max_size=3)):
        clauses = [
            draw(
                st.sampled_from(
                    ["", "", "when uncond_skipped", "when step > 1"] if approximate else ["", "when t < 900"]
                )
            ),
            draw(st.sampled_from(["", "every 2", "every 3 since compute", "on {0, 3}", "every 2 from end"])),
            draw(st.sampled_from(["", "while drift < 3", "while sum(change) < 4", "while rate >= 0", "while age < 3"])),
            draw(st.sampled_from(["", "at most 2 in a row", "at most 3 in all"])),
        ]
        if not selector.startswith("blocks"):
            own = [
                "while mine < 3",
                "while mean(prev(mine) over attention) < 3",
                "while any(kept(mine) < 3 over block)",
            ]
            clauses[2] = draw(st.sampled_from([clauses[2], clauses[2], *own, "while l1(s, 2 * i) < 3"]))
        aligned = "predict align(probe: seen, clip: [0.5, 2]) of residual"
        action = draw(st.sampled_from([aligned, *(each for each in ACTIONS if each != "compute")]))
        followed = f"follow {follow}" if follow is not None and draw(st.booleans()) else ""
        lines.append(" ".join(["match optional", selector, *filter(None, clauses), f"-> {action}", followed]))
    return parse("\n".join(["policy drawn", *lines, ""]))


@st.composite
def drawn(draw: st.DrawFn, loop: Loop) -> cachepolicy.Policy:
    follow = draw(st.sampled_from([None, "cond", "uncond", loop.branches[0] or None]))
    guided = loop.batched or {"cond", "uncond"} <= set(loop.branches)
    approximate = draw(st.sampled_from([True, True, True, False] if guided else [False, False, True]))
    if draw(st.booleans()):
        return draw(reusing(follow, approximate=approximate))
    return draw(
        strategies.policies(
            steps=len(loop.timesteps),
            selectors=draw(st.sampled_from([strategies.SELECTORS, SPANS])),
            actions=draw(st.sampled_from([strategies.ACTIONS, ACTIONS])),
            follow=follow,
            measured=draw(st.booleans()),
            approximate=draw(st.sampled_from(APPROXIMATIONS)) if approximate else None,
        )
    )


@given(st.data())
def test_the_engine_decides_as_the_simulator(data: st.DataObject) -> None:
    """Follow, guidance, branches with and without names, signals, sessions, two denoisers, and memory limits."""
    loop = data.draw(loops(), label="loop")
    policy = data.draw(drawn(loop))
    note(cachepolicy.format(policy))
    rounds = data.draw(st.integers(1, 2))
    # The trace holds eight trajectories.
    last = 2 if rounds == 1 and loop.boundary is None else 1
    turns = data.draw(st.lists(st.integers(0, last), max_size=12))
    with refused():
        agree(
            policy,
            loop,
            toy=data.draw(TOYS),
            turns=turns,
            rounds=rounds,
            steps=data.draw(st.sampled_from([len(loop.timesteps)] * 3 + [None])),
            inference=data.draw(st.booleans()),
            memory_limit=data.draw(st.sampled_from([None] * 6 + [0, 500, 2000, 6000])),
        )


@given(st.data())
def test_what_the_caller_supplies_decides_as_in_the_simulator(data: st.DataObject) -> None:
    """An external in `while` is read once a call, and the simulator decides by the numbers of the trace."""
    loop = data.draw(loops(), label="loop")
    policy = data.draw(
        strategies.policies(
            steps=len(loop.timesteps),
            follow=data.draw(st.sampled_from([None, loop.branches[0] or None])),
            measured=data.draw(st.booleans()),
            external=True,
        )
    )
    note(cachepolicy.format(policy))
    numbers = itertools.cycle(data.draw(st.lists(st.sampled_from([0.0, 0.4, 1.0, 3.0, math.nan]), min_size=3)))
    asked = list[float]()

    def supply() -> float:
        asked.append(next(numbers))
        return asked[-1]

    with refused():
        trajectories = agree(policy, loop, load=supply, steps=len(loop.timesteps))
    if len(trajectories) == 1:
        reads = bool(prepare(trajectories[0].plan).externals)
        read = [call.signals[0][strategies.EXTERNAL] for call in trajectories[0].calls] if reads else []
        assert [repr(number) for number in asked] == [repr(number) for number in read]


REFUSED = {"E203", "E208", "E209", "E250", "E310", "E311"}
"""Codes of what the engine refuses: overlapping spans, late probes, misplaced actions, unknown words, broken chains."""


@contextlib.contextmanager
def refused() -> Generator[None]:
    """Leave out the examples that the engine refuses."""
    try:
        yield
    except PolicyError as error:
        assume(any(each.code not in REFUSED for each in error.diagnostics))
        raise


# --- differences that were found, as the smallest examples ------------------------------------------------


def test_sites_of_one_rule_part_where_the_branch_that_they_follow_parted() -> None:
    """The limit admits one of two sites on `cond` and both on `uncond`, where the other computes all the same."""
    loop = Loop((900.0, 800.0), ("cond", "uncond"), range(2))
    policy = parse("match attention -> reuse follow cond")
    *_, trajectory = agree(policy, loop, turns=(0, 1), memory_limit=400, steps=2)
    assert {"blocks.0.attn": "CR", "blocks.1.attn": "CC"} == trajectory.rows("cond")
    assert trajectory.rows("cond") == trajectory.rows("uncond")
    assert {"cond"} == {branch for _, _, branch in trajectory.facts}


@pytest.mark.parametrize("action", ["reuse", "reuse residual", "predict taylor(order: 1)"])
def test_a_model_that_approximates_at_some_steps_may_reuse_at_others(action: str) -> None:
    """A model that computes keeps its own result too where one rule approximates and another reuses."""
    policy = parse(f"match model when step % 3 == 2 -> {strategies.APPROXIMATION}\nmatch model every 3 -> {action}")
    for loop in (Loop(CLOCK, ("",), range(6), batched=True), Loop(CLOCK, ("cond", "uncond"), range(6))):
        (trajectory,) = agree(policy, loop, steps=6)
        assert {} == trajectory.facts
        assert "CRRCRR" == trajectory.rows(trajectory.branches[-1])["model"]


@pytest.mark.parametrize("selector", ["attention", "blocks", "each blocks"])
@pytest.mark.parametrize("action", ["reuse", "reuse residual", "predict taylor(order: 1)", "skip"])
def test_a_history_of_half_a_batch_does_not_answer_a_whole_one(action: str, selector: str) -> None:
    """Steps 1, 3 and 5 run half of the batch. The site computes at step 3, so it cannot answer at step 4."""
    policy = parse(f"match model every 2 -> {strategies.APPROXIMATION}\nmatch {selector} every 3 -> {action}")
    (trajectory,) = agree(policy, Loop(CLOCK, ("",), range(6), batched=True), steps=6)
    assert {} == trajectory.facts
    rows = trajectory.rows("")
    assert "CRCRCR" == rows.pop("model")
    assert {"CRRCRR" if action == "skip" else "CRRCCR"} == set(rows.values())


ALIGN = "predict align(probe: seen, clip: [0.5, 2]) of residual"
BAND = 'predict band(transform: "dct", cut: 0.3, low: taylor(order: 0), high: taylor(order: 1))'


@pytest.mark.parametrize("probe", ["input(model)", "residual(blocks[0])"])
@pytest.mark.parametrize("follow", ["", " follow cond"])
@pytest.mark.parametrize("selector", ["blocks[1:]", "each blocks[1:]", '"^blocks.1.attn$"'])
@pytest.mark.parametrize("action", [ALIGN, BAND])
def test_predictors_of_whole_batches_compute_in_halves(action: str, selector: str, follow: str, probe: str) -> None:
    """Steps 1, 3 and 5 run half of the batch, where they compute, so that the history at steps 2 and 4 holds halves."""
    rules = f"match model every 2 -> {strategies.APPROXIMATION}\nmatch {selector} -> {action}{follow}"
    policy = parse(f"signal seen = {probe}\n{rules}")
    (trajectory,) = agree(policy, Loop(CLOCK, ("",), range(6), batched=True), toy=Toy(blocks=3), steps=6)
    rows = trajectory.rows("")
    assert {} == trajectory.facts
    assert "CRCRCR" == rows.pop("model")
    assert {"CCCCCC"} == set(rows.values())


@pytest.mark.parametrize(
    ("action", "row"),
    [
        ("predict taylor(order: 2)", "CCCRRR"),
        ("predict weights(of: [2, -1])", "CCCCRR"),
        ("predict weights(of: [3, -3, 1])", "CCCCCR"),
        (BAND, "CCCCRR"),
        (BAND.replace("order: 1", "order: 2"), "CCCCCR"),
        (ALIGN, "CCCCRR"),
    ],
)
@pytest.mark.parametrize("selector", ["blocks[1:]", "attention"])
def test_the_half_behind_the_newest_result_counts_too(selector: str, action: str, row: str) -> None:
    """Step 1 runs half of the batch. What reads several results computes until its result is no longer among them."""
    model = f"match model on {{0, 2, 3, 4, 5}} -> {strategies.APPROXIMATION}"
    policy = parse(f"signal seen = input(model)\n{model}\nmatch {selector} on {{0, 1, 2}} -> {action}")
    (trajectory,) = agree(policy, Loop(CLOCK, ("",), range(6), batched=True), steps=6)
    rows = trajectory.rows("")
    assert {} == trajectory.facts
    assert "CRCCCC" == rows.pop("model")
    assert {row} == set(rows.values())


SIDE_BY_SIDE = (
    "reuse",
    "predict linear(weight: 0.5, feedback: true)",
    "predict taylor(order: 2)",
    "predict weights(of: [3, -3, 1])",
)


@pytest.mark.parametrize("selector", ["blocks", "attention"])
@pytest.mark.parametrize("action", SIDE_BY_SIDE)
def test_results_of_whole_batches_and_of_halves_are_kept_side_by_side(action: str, selector: str) -> None:
    """Steps 3 to 5 run half of the batch and are answered from the results of both, by sites and by spans."""
    model = f"match model on {{0, 2}} -> {strategies.APPROXIMATION}"
    policy = parse(f"{model}\nmatch {selector} on {{0, 1, 2}} -> {action}")
    (trajectory,) = agree(policy, Loop(CLOCK, ("",), range(6), batched=True), steps=6)
    rows = trajectory.rows("")
    assert {} == trajectory.facts
    assert "CRCRRR" == rows.pop("model")
    assert {"CCCRRR"} == set(rows.values())


@pytest.mark.parametrize("action", SIDE_BY_SIDE)
def test_a_span_predicts_from_both_what_its_last_block_predicts(action: str) -> None:
    """An answer that replaces the output of the last block is that of the whole span."""

    def predictions(selector: str) -> Tensor:
        model, (x, y) = GuidedToy(Toy()).eval(), inputs(Toy())
        redraw(model, 0)
        rules = f"match model on {{0, 2}} -> approximate uncond copy\nmatch {selector} on {{0, 1, 2}} -> {action}"
        with torch.no_grad(), cachepolicy.apply(model, parse(rules), guidance=True, steps=6):
            found = list[Tensor]()
            for t in CLOCK:
                found.append(model(x.repeat(2, 1, 1), torch.tensor(t), torch.cat([-y, y])))
                x = x - 0.1 * found[-1].mean(0, keepdim=True)
        return torch.stack(found)

    assert torch.equal(predictions('"^blocks.1$"'), predictions("blocks"))


def test_half_a_batch_has_no_mean() -> None:
    """Step 2 computes in half a batch, so that steps 3 and 5 have no two halves to take the mean of."""
    policy = parse(f"match model on {{0}} -> {strategies.APPROXIMATION}\nmatch attention every 2 -> reuse mean")
    (trajectory,) = agree(policy, Loop(CLOCK, ("",), range(6), batched=True), steps=6)
    assert {} == trajectory.facts
    rows = trajectory.rows("")
    assert "CRRRRR" == rows.pop("model")
    assert {"CRCCCC"} == set(rows.values())


def test_a_mean_of_a_guidance_batch_has_no_branch_to_follow() -> None:
    """A call without a name decides for itself, so that its history is kept for it."""
    policy = parse("match attention every 3 -> reuse mean follow cond")
    (trajectory,) = agree(policy, Loop(CLOCK, ("",), range(6), batched=True), steps=6)
    assert {} == trajectory.facts
    assert {"CRRCRR"} == set(trajectory.rows("").values())


CLOCK = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0)


def test_a_rule_without_sites_needs_no_numbers() -> None:
    """`simulate` does not ask for a signal that only a rule without sites reads: the engine does not measure it."""
    policy = parse(
        "signal x = l1(input(model))\nmatch attention -> reuse\nmatch optional cross_attention while x < 1 -> reuse"
    )
    (trajectory,) = agree(policy, Loop((900.0, 800.0), ("",), range(2)), steps=2)
    assert {"CR"} == set(trajectory.rows().values())
