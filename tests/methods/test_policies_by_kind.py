"""Policies of the whole model, of guidance and of kinds of modules decide and answer what their transcriptions do."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.testing import models  # noqa: E402
from tests.methods import transcriptions as reference  # noqa: E402
from tests.methods.scripted import Scripted, letters, run, tensor  # noqa: E402
from tests.methods.test_policies import SEEDS, Draw, Stream, row, totals  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:the policy can never"),
]


class Guided(nn.Module):
    """A model with given predictions: of both halves of a batch, the unconditional one first, or of a branch."""

    def __init__(self, cond: Stream, uncond: Stream) -> None:
        super().__init__()
        self.cond, self.uncond, self.step = cond, uncond, 0
        self.branch = "cond"
        self.guided = set[int]()
        self.inner = nn.Identity()

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Generator[None]:
        """The context by which pipelines of diffusers name a branch."""
        self.branch = name
        yield

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
        cond, uncond = self.inner(tensor(self.cond[self.step])), tensor(self.uncond[self.step])
        if len(hidden_states) == 2 or self.branch == "uncond":
            self.guided.add(self.step)
        if len(hidden_states) == 2:
            return torch.cat([uncond, cond])
        return uncond if self.branch == "uncond" else cond


class Attention(models.Attention):
    """Gives what it is said to, for each half of a guidance batch; the conditional half alone if called so."""

    def __init__(self, halves: tuple[Stream, Stream]) -> None:
        super().__init__(4)
        self.halves, self.step = halves, 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat([tensor(half[self.step]) for half in self.halves[-len(x) :]])


class CrossAttention(Attention):
    """Its class name marks it as cross-attention."""


class Attentive(nn.Module):
    """A model whose prediction is what its two attentions gave."""

    def __init__(self, own: tuple[Stream, Stream], other: tuple[Stream, Stream]) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(own), CrossAttention(other)

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
        return torch.cat([self.attn1(hidden_states), self.attn2(hidden_states)], -1)


@torch.no_grad()
def guided(
    policy: str, cond: Stream, uncond: Stream, *, batched: bool, **params: Any
) -> tuple[list[bool], list[Tensor]]:
    """At which steps both predictions were computed, and what was answered, the unconditional prediction first."""
    model, steps = Guided(cond, uncond), len(cond)
    answers = list[Tensor]()
    with cachepolicy.apply(model, policy, steps=steps, guidance=batched, **params):
        for step in range(steps):
            model.step = step
            states, t = torch.ones(1, 1, 4, dtype=torch.float64), 999 - 9 * step
            if batched:
                answers.append(model(states.repeat(2, 1, 1), timestep=t))
                continue
            called = list[Tensor]()
            for branch in ("cond", "uncond"):
                with model.cache_context(branch):
                    called.insert(0, model(states, timestep=t))
            answers.append(torch.cat(called))
    return [step in model.guided for step in range(steps)], answers


def simulated(policy: str, sites: list[str], steps: int, **settings: Any) -> list[str]:
    return [*cachepolicy.simulate(policy, sites=sites, steps=steps, **settings).rows.values()]


@given(SEEDS)
def test_ucache(seed: int) -> None:
    """UCache sums what EasyCache estimates, with penalties, in a window with thresholds that depend on the computes."""
    draw = Draw(seed)
    choose = draw.random
    draw.steps = choose.randint(6, 30)
    size = choose.choice([1, 1, 1, 1e-7])
    inputs, *streams = (
        [[number * size for number in vector] for vector in draw.stream(choose.choice([0.15, 0.6]))] for _ in range(3)
    )
    window = choose.choice([(0.15, 0.95), (choose.uniform(0, 0.3), choose.uniform(0.6, 1)), (0.0, 1.0)])
    settings = {"decay": choose.choice([1, choose.uniform(0, 1)]), "gain": choose.uniform(1, 3)}
    multipliers = choose.choice([(0.5, 1.5), (choose.uniform(0.1, 3), choose.uniform(2, 90))])
    threshold = 10 ** choose.uniform(-1.5, 0.7) * (1 if size == 1 else choose.choice([0.01, 0.1]))
    expected = reference.ucache(
        inputs, totals(inputs, *streams), threshold, window=window, multipliers=multipliers, **settings
    )
    params = {"threshold": threshold, "first": window[0], "last": window[1], **settings}
    params |= {"early": multipliers[0], "late": multipliers[1]}
    assert letters(expected) == row(Scripted(streams), "ucache", inputs, **params)


@given(SEEDS)
def test_dicache(seed: int) -> None:
    """DiCache adds up the changes of its probe, and moves residuals on as far as the probe's residual has moved."""
    draw = Draw(seed)
    choose = draw.random
    inputs, probes, rest = draw.stream(), draw.stream(choose.choice([0.15, 0.6])), draw.stream()
    retention, late, last = choose.uniform(0, 0.5), choose.randint(0, 2), choose.randint(0, 2)
    threshold, most, difference = choose.uniform(0.02, 0.8), choose.uniform(1, 3), choose.choice([False, True])
    outputs = totals(inputs, probes)
    full = int(retention * draw.steps) + late
    expected = reference.dicache(inputs, outputs, threshold, full=full, last=last, difference=difference)
    params = {"retention": retention, "late": late, "last": last, "threshold": threshold, "most": most}
    rows, answers = run(Scripted([probes, rest]), "dicache", inputs, minus=difference, **params)
    assert {letters(expected)} == set(rows.values())
    values = totals(outputs, [*map(list, reference.dicache_values(probes, rest, expected, most))])
    for value, answer in zip(values, answers, strict=True):
        torch.testing.assert_close(tensor(value), answer)


@given(SEEDS)
def test_adaptive_guidance(seed: int) -> None:
    """Adaptive Guidance ends for good where both predictions are alike; the conditional one then stands for both."""
    draw = Draw(seed)
    cond = draw.stream()
    uncond = [
        [number * (1 + draw.random.uniform(-1, 1) * rate) for number in vector]
        for vector, rate in ((vector, draw.random.choice([0.01, 0.1, 0.3, 1])) for vector in cond)
    ]
    gamma = draw.random.choice([0.99, draw.random.uniform(0.8, 1)])
    expected = reference.adaptive_guidance(cond, uncond, gamma)
    ran, answers = guided("adaptive_guidance", cond, uncond, gamma=gamma, batched=draw.random.choice([True, False]))
    assert expected == ran
    for step, answer in enumerate(answers):
        both = [uncond[step] if expected[step] else cond[step], cond[step]]
        assert torch.equal(torch.cat([tensor(vector) for vector in both]), answer)


@given(SEEDS)
def test_limited_guidance(seed: int) -> None:
    """Guidance in an interval of steps, and in a share of them as by the guiders of diffusers."""
    draw = Draw(seed)
    cond, uncond = draw.stream(), draw.stream()
    first, last = draw.random.randint(0, 6), draw.random.randint(0, draw.steps)
    start, stop = draw.random.uniform(0, 0.6), draw.random.uniform(0.3, 1)
    batched = draw.random.choice([True, False])
    for expected, limits in (
        (reference.guidance_interval(draw.steps, first, last), {"first": first, "last": last}),
        (reference.guider_window(draw.steps, start, stop), {"start": start, "stop": stop}),
    ):
        # A batch computes both halves at the first step, before it is known that a step has one call.
        both = [True, *expected[1:]] if batched else expected
        assert both == guided("adaptive_guidance", cond, uncond, batched=batched, gamma=2, **limits)[0]


@given(SEEDS)
def test_tgate(seed: int) -> None:
    """T-GATE reuses self-attention before the gate, and the mean of both halves of cross-attention after it."""
    draw = Draw(seed)
    choose = draw.random
    gate, warmup, interval = choose.randint(2, 14), choose.randint(0, 5), choose.randint(1, 6)
    late = choose.choice([1, choose.randint(2, 5)])
    expected = reference.tgate(draw.steps, gate, warmup, interval, late)
    params = {"gate": gate, "warmup": warmup, "interval": interval, "late_interval": None if late == 1 else late}
    rows = cachepolicy.simulate("tgate", steps=draw.steps, **params).rows
    found = (rows["model"], rows["transformer_blocks.0.attn1"], rows["transformer_blocks.0.attn2"])
    assert tuple(map(letters, expected)) == found
    own, other = (draw.stream(), draw.stream()), (draw.stream(), draw.stream())
    model = Attentive(own, other)
    values = reference.tgate_values(own, other, gate, warmup, interval, late)
    with torch.no_grad(), cachepolicy.apply(model, "tgate", steps=draw.steps, guidance=True, **params):
        for step in range(draw.steps):
            for attention in (model.attn1, model.attn2):
                attention.step = step
            answer = model(torch.ones(2, 1, 4, dtype=torch.float64), 999 - 9 * step)[1]
            torch.testing.assert_close(torch.cat([tensor(stream[step])[0] for stream in values], -1), answer)


@given(SEEDS)
def test_smoothcache(seed: int) -> None:
    """SmoothCache takes a schedule for each kind of module."""
    draw = Draw(seed)
    kinds = {"attn1": "self_attention_mask", "attn2": "cross_attention_mask", "ff": "feedforward_mask"}
    limit = draw.random.uniform(0, 1)
    masks = dict[str, str]()
    for kind in kinds:
        errors = [sorted(draw.random.uniform(0, 1) for _ in range(3)) for _ in range(draw.steps)]
        masks[kind] = letters(reference.smoothcache(errors, limit))
    params = {name: masks[kind].replace("C", "1").replace("R", "0") for kind, name in kinds.items()}
    sites = [f"transformer_blocks.{number}.{kind}" for number in range(2) for kind in kinds]
    assert [masks[name.rsplit(".")[-1]] for name in sites] == simulated("smoothcache", sites, draw.steps, **params)


@given(SEEDS)
def test_learning_to_cache(seed: int) -> None:
    """Learning-to-Cache asks a router for each module and step; HarmoniCa does so at every step."""
    draw = Draw(seed)
    kinds, threshold = ("attn", "ff"), draw.random.uniform(0, 1)
    scores = {
        f"blocks.{number}.{kind}": [draw.random.uniform(0, 1) for _ in range(draw.steps)]
        for number in range(2)
        for kind in kinds
    }
    alternate = draw.random.choice([True, False])
    expected = reference.learning_to_cache([*scores.values()], threshold, alternate=alternate)
    masks = {
        kind: [
            "".join("1" if score > threshold else "0" for score in reversed(numbers))
            for name, numbers in scores.items()
            if name.endswith(kind)
        ]
        for kind in kinds
    }
    params = {"attention_masks": masks["attn"], "feedforward_masks": masks["ff"], "alternate": alternate}
    assert [letters(each) for each in expected] == simulated("l2c", [*scores], draw.steps, **params)


@given(SEEDS)
def test_deepcache(seed: int) -> None:
    """DeepCache runs the deep part at every Nth step, or at given ones."""
    draw = Draw(seed)
    interval = draw.random.randint(1, 6)
    expected = letters(reference.deepcache(draw.steps, interval))
    assert [expected] == simulated("deepcache", ["mid_block"], draw.steps, interval=interval)
    steps = {0, *draw.random.sample(range(draw.steps), draw.steps // 2)}
    expected = letters([step in steps for step in range(draw.steps)])
    assert [expected] == simulated("deepcache", ["mid_block"], draw.steps, steps_on=[*steps], interval=interval)
