"""Spans of blocks answer what plain arithmetic on their blocks gives, whatever form the streams have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.testing import checks, models  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:the policy reused nothing")]

TIMESTEPS = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0)
STEPS = len(TIMESTEPS)

FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)

Streams = tuple[Tensor, Tensor]
Plan = Callable[[int, Streams, Callable[[Sequence[int], Streams], Streams]], Streams]


def _two(output: Any, context: Tensor) -> Streams:
    if isinstance(output, Tensor):
        return output, context
    return tuple(output.values()) if isinstance(output, dict) else tuple(output)  # type: ignore[return-value]


@torch.no_grad()
def _by_hand(toy: models.Toy, plan: Plan) -> list[Tensor]:
    """The toy's loop with its blocks called by `plan(step, streams, run)`, `run` being blocks one after another."""
    model = toy.build()
    x, y = models.inputs(toy)
    predictions = list[Tensor]()
    for number, t in enumerate(TIMESTEPS):
        moment = model.embed(torch.tensor([[t / 1000]]).expand(len(x), 1))

        def run(indices: Sequence[int], streams: Streams, moment: Tensor = moment) -> Streams:
            for index in indices:
                streams = _two(model.blocks[index](*streams, moment), streams[1])
            return streams

        predictions.append(model.out(plan(number, (x.clone(), y.clone()), run)[0]))
        x = x - 0.1 * predictions[-1]
    return predictions


@torch.no_grad()
def _by_policy(toy: models.Toy, text: str) -> tuple[list[Tensor], dict[str, str], dict[str, int]]:
    model = toy.build()
    x, y = models.inputs(toy)
    ran = models.Probes(model)
    with cachepolicy.apply(model, cachepolicy.parse(text)) as run:
        predictions = list(models.sample(model, TIMESTEPS, x, y))
        (trajectory,) = run.trace
    checks.well_formed(trajectory)
    checks.trace_agrees(trajectory)
    return predictions, trajectory.rows(), ran.take()


def _close(expected: Sequence[Tensor], got: Sequence[Tensor], *, tolerance: float = 1e-5) -> None:
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, s=step: f"step {s}: {m}")


class Residual:
    """By hand: a span that is computed at every second step, and else adds what it added then to both streams."""

    def __init__(self, span: Sequence[int], count: int, *, every: int = 2) -> None:
        self.before = [index for index in range(count) if index < span[0]]
        self.span, self.every = span, every
        self.after = [index for index in range(count) if index > span[-1]]
        self.kept: Streams | None = None

    def __call__(self, step: int, streams: Streams, run: Any) -> Streams:
        return run(self.after, self.answer(step, run(self.before, streams), run))

    def answer(self, step: int, streams: Streams, run: Any) -> Streams:
        if step % self.every == 0:
            given = (streams[0].clone(), streams[1].clone())
            streams = run(self.span, streams)
            self.kept = (streams[0] - given[0], streams[1] - given[1])
            return streams
        assert self.kept is not None
        return streams[0] + self.kept[0], streams[1] + self.kept[1]


toys = st.builds(
    models.Toy,
    blocks=st.integers(2, 5),
    returns=st.sampled_from(["tensor", "tuple", "list", "dict"]),
    in_place=st.booleans(),
    cross=st.booleans(),
)


@FEW
@given(toy=toys, data=st.data())
def test_any_slice_of_blocks_answers_its_residual(toy: models.Toy, data: st.DataObject) -> None:
    """Both streams go on with what the span added to them when it last ran; blocks around it run at every step."""
    first = data.draw(st.integers(0, toy.blocks - 1))
    last = data.draw(st.integers(first + 1, toy.blocks))
    every = data.draw(st.integers(2, 4))
    expected = _by_hand(toy, Residual(range(first, last), toy.blocks, every=every))
    got, rows, ran = _by_policy(toy, f"match blocks[{first}:{last}] every {every} -> reuse residual\n")
    _close(expected, got)
    (row,) = rows.values()
    assert row == "".join("C" if step % every == 0 else "R" for step in range(STEPS))
    for index in range(toy.blocks):
        inside = first <= index < last
        assert ran[f"blocks.{index}"] == (row.count("C") if inside else STEPS)


@pytest.mark.parametrize("text", ["blocks", "blocks[:]", "blocks[0:3]", "blocks[-3:]", "blocks[:99]"])
def test_slices_clip_as_pythons_do(text: str) -> None:
    """All of these are the whole list."""
    expected = _by_hand(models.Toy(blocks=3), Residual(range(3), 3))
    _close(expected, _by_policy(models.Toy(blocks=3), f"match {text} every 2 -> reuse residual\n")[0])


@pytest.mark.parametrize("index", [0, 1, -1])
def test_one_block_is_a_span_of_one(index: int) -> None:
    """`blocks[i]` takes one block, counted from either end."""
    number = index % 3
    expected = _by_hand(models.Toy(blocks=3), Residual([number], 3))
    got, rows, _ = _by_policy(models.Toy(blocks=3), f"match blocks[{index}] every 2 -> reuse residual\n")
    _close(expected, got)
    assert set(rows) == {f"blocks.{number}"}


@pytest.mark.parametrize("returns", ["tensor", "tuple", "dict"])
def test_each_block_is_a_site_of_its_own(returns: Any) -> None:
    """`each` gives every block a history and a decision of its own."""
    toy = models.Toy(blocks=4, returns=returns)
    sites = [Residual([index], 4) for index in range(4)]

    def plan(step: int, streams: Streams, run: Any) -> Streams:
        for index in range(4):
            streams = sites[index].answer(step, streams, run) if 1 <= index < 3 else run([index], streams)
        return streams

    got, rows, _ = _by_policy(toy, "match each blocks[1:3] every 2 -> reuse residual\n")
    _close(_by_hand(toy, plan), got)
    assert rows == {"blocks.1": "CRCRCRCR", "blocks.2": "CRCRCRCR"}


@pytest.mark.parametrize("returns", ["tensor", "tuple", "list", "dict"])
def test_a_span_may_answer_its_last_output(returns: Any) -> None:
    """`reuse` without `residual` gives the streams as they left the span."""
    toy = models.Toy(blocks=3, returns=returns)
    kept: list[Streams] = []

    def plan(step: int, streams: Streams, run: Any) -> Streams:
        if step % 2 == 0:
            kept[:] = [run([1, 2], run([0], streams))]
        else:
            run([0], streams)
        # A block of one stream hands on the other as it came in.
        return kept[0] if returns != "tensor" else (kept[0][0], streams[1])

    got, _, ran = _by_policy(toy, "match blocks[1:] every 2 -> reuse\n")
    _close(_by_hand(toy, plan), got)
    assert ran["blocks.0"] == STEPS
    assert ran["blocks.2"] == STEPS // 2


@pytest.mark.parametrize("returns", ["tensor", "tuple", "list", "dict"])
def test_blocks_are_skipped(returns: Any) -> None:
    """`skip` answers with the input, once the form of the output is known."""
    toy = models.Toy(blocks=3, returns=returns)

    def plan(step: int, streams: Streams, run: Any) -> Streams:
        return run([0, 1, 2] if step == 0 else [0, 2], streams)

    got, rows, ran = _by_policy(toy, "match blocks[1] when step > 0 -> skip\n")
    _close(_by_hand(toy, plan), got)
    assert rows == {"blocks.1": "CRRRRRRR"}
    assert ran["blocks.1"] == 1


def test_spans_may_lie_in_spans() -> None:
    """The inner one answers where the outer one computes, and is hidden where that one answers."""
    toy = models.Toy(blocks=4)
    text = """
match blocks every 4 -> reuse residual
match blocks[1:3] every 2 -> reuse residual
match "attn" every 3 -> reuse
"""
    _, rows, ran = _by_policy(toy, text)
    spans = {name: row for name, row in rows.items() if "attn" not in name}
    assert spans == {"blocks[0:4]": "CRRRCRRR", "blocks[1:3]": "C...C..."}
    assert rows["blocks.0.attn"] == "C...R..."
    assert ran["blocks.2"] == 2


def test_an_inner_span_answers_where_the_outer_one_computes() -> None:
    """What the outer span keeps then is what came out, answers of the inner one included."""
    toy = models.Toy(blocks=4)
    inner = Residual([1, 2], 4, every=4)
    outer: list[Streams] = []

    def plan(step: int, streams: Streams, run: Any) -> Streams:
        if step % 2 == 0:
            given = (streams[0].clone(), streams[1].clone())
            out = run([3], inner.answer(step, run([0], streams), run))
            outer[:] = [(out[0] - given[0], out[1] - given[1])]
            return out
        return streams[0] + outer[0][0], streams[1] + outer[0][1]

    text = "match blocks every 2 -> reuse residual\nmatch blocks[1:3] every 4 -> reuse residual\n"
    got, rows, _ = _by_policy(toy, text)
    _close(_by_hand(toy, plan), got)
    assert rows == {"blocks[0:4]": "CRCRCRCR", "blocks[1:3]": "C.R.C.R."}


def test_spans_that_overlap_are_refused() -> None:
    """Neither inside the other: there would be two answers for one block."""
    text = "match blocks[0:2] every 2 -> reuse residual\nmatch blocks[1:3] every 3 -> reuse residual\n"
    with pytest.raises(cachepolicy.PolicyError):
        cachepolicy.apply(models.Toy(blocks=3).build(), cachepolicy.parse(text))


# --- prediction ------------------------------------------------------------------------------------------


class Growing(nn.Module):
    """Adds to its stream what grows linearly with the step, and to another what falls."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([rate, 0.5, -rate]))
        self.norm = nn.Identity()  # what has no parts is no block

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x) + self.rate * (1000 - t) / 100, y - self.rate * (1000 - t) / 200


class GrowingModel(nn.Module):
    """Blocks that grow, and attention-like modules whose whole output does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Growing(rate) for rate in (1.0, -0.5, 2.0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for block in self.blocks:
            x, y = block(x, t, y)
        return x + 3 * y


@pytest.mark.parametrize("of", ["", " of residual"])
@pytest.mark.parametrize("predictor", ["taylor(order: 1)", "taylor(order: 2)", "linear(weight: 1.0)"])
def test_what_grows_linearly_is_predicted_exactly(predictor: str, of: str) -> None:
    """Once two computes are known, both streams; `linear` with weight 1 is exact one step on."""
    text = f"match blocks[1:] when step >= 2 every 2 -> predict {predictor}{of}\n"
    if predictor.startswith("linear"):
        text = text.replace("step >= 2", "step == 2").replace(" every 2", "")
    model, x = GrowingModel(), torch.tensor([[1.0, 2.0, 3.0]])
    with cachepolicy.apply(model, cachepolicy.parse(text)) as run, torch.no_grad():
        got = [model(x, torch.tensor(t)) for t in TIMESTEPS]
        rows = run.trace.rows()
    expected = [model(x, torch.tensor(t)) for t in TIMESTEPS]
    _close(expected, got, tolerance=1e-4)
    assert "R" in "".join(rows.values())


# --- what stands between blocks --------------------------------------------------------------------------


class Mixing(nn.Module):
    """A block of one stream, or of two that it returns in either order."""

    def __init__(self, two: bool, *, flipped: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two, self.flipped = two, flipped

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Any:
        if not self.two or encoder_hidden_states is None:
            return hidden_states + torch.tanh(self.a(hidden_states))
        mean = encoder_hidden_states.mean(1, keepdim=True)
        out = hidden_states + torch.tanh(self.a(hidden_states + mean))
        text = encoder_hidden_states + torch.tanh(self.b(encoder_hidden_states)) * hidden_states.mean(1, keepdim=True)
        return (text, out) if self.flipped else (out, text)


class Joined(nn.Module):
    """Double blocks, then single ones on both streams in one sequence, as in Flux and HunyuanVideo."""

    def __init__(self, *, flipped: bool) -> None:
        super().__init__()
        self.flipped = flipped
        self.double_blocks = nn.ModuleList(Mixing(two=True, flipped=flipped) for _ in range(2))
        self.single_blocks = nn.ModuleList(Mixing(two=False) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = x * (1 + t / 1000)
        for block in self.double_blocks:
            first, second = block(hidden_states=x, encoder_hidden_states=text)
            x, text = (second, first) if self.flipped else (first, second)
        both = torch.cat([text, x], dim=1)
        for block in self.single_blocks:
            both = block(both)
        return both[:, text.shape[1] :]


class Between(nn.Module):
    """Something is added between its blocks at every step, as a ControlNet's residuals are."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixing(two=False) for _ in range(3))
        self.in_place = in_place

    def forward(self, x: Tensor, t: Tensor, control: Tensor) -> Tensor:
        x = x * (1 + t / 1000)
        for block in self.blocks:
            x = block(x)
            if self.in_place:
                x += control
            else:
                x = x + control
        return x


class JoinsLate(nn.Module):
    """Text runs through blocks of its own before the picture joins it, as in Flux 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first_blocks = nn.ModuleList(Mixing(two=False) for _ in range(2))
        self.joint_blocks = nn.ModuleList(Mixing(two=True, flipped=True) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        text = text * (1 + t / 1000)
        for block in self.first_blocks:
            text = block(text)
        for block in self.joint_blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text)
        return x


class InTurn(nn.Module):
    """Two lists of blocks that run in turn, with a reshape between, as Latte's do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixing(two=False) for _ in range(2))
        self.temporal_blocks = nn.ModuleList(Mixing(two=False) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        x = x * (1 + t / 1000)
        for spatial, temporal in zip(self.blocks, self.temporal_blocks, strict=True):
            x = temporal(spatial(x).transpose(0, 1)).transpose(0, 1)
        return x


class LastGivesNone(nn.Module):
    """Its last block has no text to return, as SD3's has none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixing(two=True, flipped=True) for _ in range(3))
        self.blocks[-1].forward = self._last(self.blocks[-1].forward)

    @staticmethod
    def _last(forward: Any) -> Any:
        def forward_without_text(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Any:
            return None, forward(hidden_states, encoder_hidden_states)[1]

        return forward_without_text

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = x * (1 + t / 1000)
        for block in self.blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text)
        return x


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Without attention inside, its lists are told by their names."""
    return [each for each in model.modules() if isinstance(each, Mixing)]


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "double to single": lambda: Joined(flipped=False),
    "double to single, flipped": lambda: Joined(flipped=True),
    "added between": lambda: Between(in_place=False),
    "added between, in place": lambda: Between(in_place=True),
    "a stream joins late": JoinsLate,
    "lists in turn": InTurn,
    "the last gives none": LastGivesNone,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("span", ["blocks", "blocks[1:]"])
def test_a_hit_on_a_repeated_input_is_what_computing_gives(shape: str, span: str) -> None:
    """Whatever the model does between its blocks is done once: neither lost on a hit nor counted twice."""
    torch.manual_seed(0)
    model = SHAPES[shape]()
    x, text, t = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.tensor(500.0)
    control = torch.randn(2, 5, 4) if shape.startswith("added") else text
    clock = iter(TIMESTEPS)
    ran = [0]
    for block in _blocks(model):
        block.a.register_forward_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    with torch.no_grad():
        expected = model(x, t, control)
        policy = cachepolicy.parse(f"match {span} every 8 -> reuse residual\n")
        ran[0] = 0
        with cachepolicy.apply(model, policy, timestep=lambda: next(clock)) as run:
            got = [model(x, t, control) for _ in TIMESTEPS]
            (row,) = run.trace.rows().values()
    _close([expected] * STEPS, got)
    # Writing into what blocks return is found out on the way, so that the next step or two compute as well.
    assert re.fullmatch("C{1,3}R+" if shape.endswith("in place") else "CR+", row)
    assert ran[0] == row.count("C") * len(_blocks(model)) + row.count("R") * (span == "blocks[1:]")


def test_a_change_of_shape_computes() -> None:
    """A history fits only calls with inputs like those that it is of."""
    toy = models.Toy(blocks=3)
    model = toy.build()
    x, y = models.inputs(toy, batch=2)
    with (
        cachepolicy.apply(model, cachepolicy.parse("match blocks every 8 -> reuse residual\n")) as run,
        torch.no_grad(),
    ):
        for step, t in enumerate(TIMESTEPS):
            rows = slice(None) if step < 3 else slice(0, 1)
            model(x[rows], torch.tensor(t), y[rows])
        assert run.trace.rows() == {"blocks[0:3]": "CRRCRRRR"}


def test_a_span_is_left_while_gradients_flow() -> None:
    """What is kept holds no graph; what is computed does."""
    toy = models.Toy(blocks=3)
    model = toy.build().requires_grad_(True)
    x, y = models.inputs(toy)
    with cachepolicy.apply(model, cachepolicy.parse("match blocks[1:] every 2 -> reuse residual\n")):
        first = model(x, torch.tensor(900.0), y)
        second = model(x, torch.tensor(800.0), y)
        second.sum().backward()
        first.sum().backward()
    assert model.blocks[0].ff.up.weight.grad is not None
    assert model.blocks[2].ff.up.weight.grad is not None


def test_inference_mode_gives_the_same() -> None:
    """Inference tensors have no write counters; copies are kept instead."""
    toy = replace(models.Toy(blocks=3), in_place=True)
    text = "match blocks[1:] every 2 -> reuse residual\n"
    expected, rows, _ = _by_policy(toy, text)
    model = toy.build()
    x, y = models.inputs(toy)
    with torch.inference_mode(), cachepolicy.apply(model, cachepolicy.parse(text)) as run:
        got = list(models.sample(model, TIMESTEPS, x, y))
        assert run.trace.rows() == rows
    _close(expected, got)


# --- any rules -------------------------------------------------------------------------------------------

SIGNALS = """
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
signal size = l1(output(model))
"""

selectors = st.sampled_from(
    [
        "blocks",
        "blocks[1:]",
        "blocks[0]",
        "blocks[1:3]",
        "each blocks",
        "each blocks[1:]",
        "attention",
        "feedforward",
        "cross_attention",
        r'"blocks\.1\.attn"',
        "model",
    ]
)
schedules = st.sampled_from(
    ["", "every 2", "every 3", "every 3 offset 1", "on {0, 1, 4}", "every 4 since compute", 'mask "11010010"']
)
whiles = st.sampled_from(["", "", "while drift < 0.2", "while sum(drift) < 0.5", "while kept(size) > 0.1"])
answers = st.sampled_from(
    [
        "reuse",
        "reuse residual",
        "predict taylor(order: 1)",
        "predict taylor(order: 2) of residual",
        "predict linear(weight: 0.5)",
        "predict linear(weight: 0.5, feedback: true)",
        "predict linear(weight: 0.5, feedback: true) of residual",
        "predict hermite(order: 1, scale: 0.5)",
    ]
)
rules = st.builds(
    "match optional {} {} {} {} {} -> {}".format,
    selectors,
    st.sampled_from(["", "when step >= 2"]),
    schedules,
    whiles,
    st.sampled_from(["", "at most 2 in a row"]),
    answers,
)


def _unmixed(each: Sequence[str]) -> bool:
    """False where answers are fed back and residuals read: see `test_fed_back_answers_serve_both_kinds_of_rules`."""
    return not (any("feedback" in rule for rule in each) and any("residual" in rule for rule in each))


policies = st.lists(rules, min_size=1, max_size=3).filter(_unmixed).map(lambda each: SIGNALS + "\n".join(each) + "\n")


def _agrees(toy: models.Toy, text: str) -> None:
    """On latents that never move and a model that ignores its step, whatever is answered is what was computed."""
    model = replace(toy, blind=True).build()
    x, y = models.inputs(toy)
    predictions = list[Tensor]()

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            predictions.extend(models.sample(model, TIMESTEPS, x, y, still=True))

    try:
        checks.engine_agrees(model, cachepolicy.parse(text), run)
    except cachepolicy.PolicyError:
        return
    _close([predictions[0]] * len(predictions), predictions, tolerance=1e-4)


@FEW
@given(toy=toys, text=policies)
def test_any_rules_answer_what_was_computed(toy: models.Toy, text: str) -> None:
    """Spans in spans, sites in spans, all actions, signals: a repeated input gives the same prediction at every step,
    the simulator decides what the engine did, and what it says was computed was executed."""
    _agrees(replace(toy, in_place=False), text)


@pytest.mark.deep
@settings(FEW, max_examples=1500)
@given(toy=toys, text=policies)
def test_many_rules_answer_what_was_computed(toy: models.Toy, text: str) -> None:
    """The same, with more examples."""
    _agrees(replace(toy, in_place=False), text)


@pytest.mark.parametrize("predictor", ["taylor(order: 1)", "hermite(order: 1, scale: 0.5)"])
def test_no_prediction_is_made_from_what_was_overwritten(predictor: str) -> None:
    """A result that the model wrote into is forgotten, also as the one before the newest."""
    _agrees(models.Toy(in_place=True), f"match attention every 4 since compute -> predict {predictor}\n")


@pytest.mark.parametrize("answer", ["reuse residual", "predict taylor(order: 1) of residual"])
def test_fed_back_answers_serve_both_kinds_of_rules(answer: str) -> None:
    """An answer in the history has an output and a residual, whichever made it."""
    text = (
        f"match blocks[1] when step >= 2 -> {answer}\nmatch blocks[1] -> predict linear(weight: 0.5, feedback: true)\n"
    )
    _agrees(models.Toy(), text)


def test_a_site_that_waits_inside_what_is_skipped_is_hidden() -> None:
    """Its signals come in, but nobody asks it."""
    text = """
match blocks[1:] at most 2 in a row -> skip
match feedforward every 3 while kept(size) > 0.1 at most 2 in a row -> predict linear(weight: 0.5)
"""
    toy = models.Toy(blocks=3, returns="dict")
    x, y = models.inputs(toy)

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            list(models.sample(model, TIMESTEPS, x, y))

    checks.engine_agrees(toy.build(), cachepolicy.parse(SIGNALS + text), run)


# --- later computes --------------------------------------------------------------------------------------


class Turning(models.ToyDiT):
    """A model that works between its blocks from one call on."""

    def __init__(self, toy: models.Toy, at: int, work: Any) -> None:
        super().__init__(toy)
        self.at, self.work, self.calls = at, work, 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        step = self.embed((t / 1000).reshape(-1, 1).expand(len(x), 1))
        for block in self.blocks:
            x, y = block(x, y, step)
            if self.calls >= self.at:
                x = self.work(x)
        self.calls += 1
        return self.out(x)


@pytest.mark.parametrize("work", [lambda x: x + 1, lambda x: x.add_(1)], ids=["another tensor", "in place"])
@pytest.mark.parametrize("action", ["reuse", "reuse residual", "predict taylor(order: 1)"])
def test_a_model_that_turns_to_something_else_is_noticed(work: Any, action: str) -> None:
    """What a compute keeps of a model that does not go on as before is not reused; the next call computes."""
    toy = models.Toy(blocks=3, returns="tuple")
    model = Turning(toy, 6, work)
    models.redraw(model, 0)
    probes = models.Probes(model)
    with (
        cachepolicy.apply(model, cachepolicy.parse(f"match blocks[0:] every 3 -> {action}")) as attached,
        torch.no_grad(),
    ):
        x, y = models.inputs(toy)
        list(models.sample(model, [1000.0 - 50 * step for step in range(12)], x, y))
        row = attached.trace.rows()["blocks[0:3]"]
    assert "CRRCRRCC" == row[:8]
    assert row.count("C") == probes.take()["blocks.2"]


@pytest.mark.parametrize("returns", ["tensor", "tuple", "list", "dict"])
@pytest.mark.parametrize("action", ["reuse", "reuse residual", "predict taylor(order: 2) of residual"])
def test_later_computes_keep_what_the_first_would(
    monkeypatch: pytest.MonkeyPatch, returns: models.Returns, action: str
) -> None:
    """A compute that is looked at in its ends alone leaves the same history, to the bit."""
    toy, text = models.Toy(blocks=4, returns=returns), f"match blocks[1:] every 3 -> {action}"
    with torch.no_grad():
        x, y = models.inputs(toy)
        timesteps = [1000.0 - 50 * step for step in range(14)]
        model = toy.build()
        with cachepolicy.apply(model, cachepolicy.parse(text)):
            tracked = list(models.sample(model, timesteps, x, y))
        monkeypatch.setattr("cachepolicy.engine.span_run.is_trackable", lambda *_: False)
        model = toy.build()
        with cachepolicy.apply(model, cachepolicy.parse(text)):
            recorded = list(models.sample(model, timesteps, x, y))
    assert all(map(torch.equal, recorded, tracked))


@pytest.mark.parametrize("action", ["reuse residual", "reuse", "predict taylor(order: 1)"])
@pytest.mark.parametrize("returns", ["tensor", "tuple"])
def test_a_conditioning_may_come_from_inference_mode(returns: Any, action: str) -> None:
    """Prompts are often encoded so, and the loop runs without: nothing changes."""
    toy = models.Toy(blocks=3, returns=returns)
    got = list[list[Tensor]]()
    for encoded in (False, True):
        model = toy.build()
        x, y = models.inputs(toy)
        with torch.inference_mode():
            y = y.clone() if encoded else y
        with torch.no_grad(), cachepolicy.apply(model, cachepolicy.parse(f"match blocks every 2 -> {action}")) as run:
            got.append(list(models.sample(model, (900.0, 800.0, 700.0, 600.0, 500.0, 400.0), x, y)))
            assert ["CRCRCR"] == list(run.trace.rows("").values())
    assert all(map(torch.equal, *got))
