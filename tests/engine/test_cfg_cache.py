"""Guidance batches: the unconditional half is rebuilt where there is one, as the paper says, and never made up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from diffusers.models.modeling_outputs import Transformer2DModelOutput  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.engine.guidance_tensors import (  # noqa: E402
    Frames,
    conditional,
    difference,
    halves,
    predictions_of,
    rebuild,
    split_bands,
    whole,
    with_predictions,
)
from tests.support import zoo  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TIMESTEPS = (999.0, 900.0, 780.0, 650.0, 600.0, 520.0, 400.0, 300.0, 180.0, 90.0, 20.0, 10.0)


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- spectra and halves ----------------------------------------------------------------------------------

sizes = st.integers(1, 9)


@given(st.sampled_from(["BCHW", "BCFHW", "BFCHW", "BFHWC", "BSC"]), sizes, sizes, st.integers(1, 3), st.integers(1, 3))
def test_a_prediction_is_split_into_pictures_and_joined_again(
    layout: str, height: int, width: int, frames: int, batch: int
) -> None:
    """Each row of a split is one picture, channels first, and joining undoes splitting."""
    sides = {"B": batch, "C": 4, "F": frames, "H": height, "W": width, "S": frames * height * width}
    x = _randn(*(sides[letter] for letter in layout))
    form = Frames(layout, (frames, height, width))
    rows = form.split(x)
    pictures = batch if layout == "BCHW" else batch * frames
    assert rows.shape == (pictures, 4, height, width)
    assert torch.equal(form.join(rows, batch), x)


@given(sizes, sizes)
def test_the_bands_make_up_the_spectrum_and_the_low_one_holds_the_mean(height: int, width: int) -> None:
    """Every frequency is in one band; the mean, and of the rest only what is slow, in the low one."""
    x = _randn(2, 3, height, width)
    low, high = split_bands(x)
    spectrum = torch.fft.fft2(x)
    _close(torch.fft.ifftshift(low + high, dim=(-2, -1)), spectrum)
    assert not (low.abs() * high.abs()).any()
    _close(torch.fft.ifftshift(low, dim=(-2, -1))[..., 0, 0], spectrum[..., 0, 0])
    vertical = torch.fft.fftfreq(height) * height
    horizontal = torch.fft.fftfreq(width) * width
    inside = vertical[:, None] ** 2 + horizontal**2 <= (min(height, width) // 5) ** 2
    _close(torch.fft.ifftshift(low, dim=(-2, -1)), spectrum * inside)


@given(sizes, sizes)
def test_with_factors_of_one_the_same_conditional_half_gives_the_same_other_half(height: int, width: int) -> None:
    """Rebuilding undoes taking the difference."""
    uncond, cond = _randn(2, 3, height, width), _randn(2, 3, height, width, seed=1)
    _close(rebuild(difference(uncond, cond), cond, 1.0, 1.0), uncond)


def test_factors_compound() -> None:
    """A factor is multiplied into what is kept, so that a second skipped step has it squared."""
    uncond, cond = _randn(1, 2, 8, 8), _randn(1, 2, 8, 8, seed=1)
    kept = difference(uncond, cond)
    rebuild(kept, cond, 2.0, 1.0)
    twice = rebuild(kept, cond, 2.0, 1.0)
    _close(twice, rebuild(difference(uncond, cond), cond, 4.0, 1.0))


@pytest.mark.parametrize("layout", ["uncond first", "cond first"])
def test_halves_are_put_together_again(layout: str) -> None:
    """`whole` undoes `halves`, and the layout says which is which."""
    x = _randn(4, 3)
    uncond, cond = halves(x, layout)
    assert torch.equal(whole(uncond, cond, layout), x)
    assert torch.equal(cond, x[2:] if layout == "uncond first" else x[:2])


def test_batched_arguments_are_halved_and_others_left_whole() -> None:
    """Tensors, lists and dicts of tensors with a row a sample, and lists with an item a sample; nothing else."""
    batch = 4
    named = {
        "x": _randn(batch, 3),
        "prompts": ["", "", "a cat", "a dog"],
        "pair": (_randn(batch, 2), _randn(batch, 3)),
        "more": {"ids": torch.arange(batch), "scale": 2.0},
        "table": _randn(7, batch),
        "number": torch.tensor(3.0),
        "none": None,
        "flag": True,
    }
    got = conditional(named, batch, "uncond first", None)
    assert torch.equal(got["x"], named["x"][2:])
    assert got["prompts"] == ["a cat", "a dog"]
    assert [len(each) for each in got["pair"]] == [2, 2]
    assert got["more"]["ids"].tolist() == [2, 3]
    for name in ("table", "number", "none", "flag"):
        assert got[name] is named[name]
    only = conditional(named, batch, "uncond first", ["x"])
    assert only["prompts"] is named["prompts"]


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, "more"),
    "output class": lambda x: Transformer2DModelOutput(sample=x),
    "list of samples": lambda x: list(x.unbind(0)),
    "list in a tuple": lambda x: (list(x.unbind(0)), {}),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_a_prediction_is_replaced_in_any_output(form: str) -> None:
    """The type of the output stays, and so does what else it holds."""
    x, new = _randn(2, 3), _randn(4, 3)
    output = OUTPUTS[form](x)
    (found,) = predictions_of(output, 2)
    assert torch.equal(found, x)
    replaced = with_predictions(output, 2, [new])
    assert type(replaced) is type(output)
    assert torch.equal(predictions_of(replaced, 4)[0], new)
    if isinstance(output, tuple):
        assert replaced[1] == output[1]


def test_every_tensor_of_an_output_is_rebuilt() -> None:
    """A model of picture and sound predicts both, and both lose their unconditional half."""
    picture, sound, new = _randn(4, 3, 8, 8), _randn(4, 6, 5), (_randn(2, 3, 8, 8), _randn(2, 6, 5))
    output = (picture, sound, "said")
    assert [x.shape for x in predictions_of(output, 4)] == [picture.shape, sound.shape]
    replaced = with_predictions(output, 4, new)
    assert replaced == (new[0], new[1], "said")


def test_samples_of_different_shapes_are_refused() -> None:
    """A list of samples is a guidance batch only where they can be halved."""
    with pytest.raises(cachepolicy.PolicyError) as refusal:
        predictions_of([_randn(2, 3), _randn(2, 4)], 2)
    assert [each.code for each in refusal.value.diagnostics] == ["E332"]


# --- the paper's variant ---------------------------------------------------------------------------------


class Paper:
    """FasterCache as its paper has it (equations 5, 9 to 11), on a model whose attention is wrapped by hand."""

    def __init__(self, model: Any, clock: Clock, weight: float) -> None:
        self.model, self.clock, self.weight = model, clock, weight
        self.step, self.alone = -1, False
        for name, module in model.named_modules():
            if re.search(r"^(single_)?(transformer_)?blocks\.\d+\.(attn|attn1)$", name):
                module.forward = self.attention(module.forward)

    def attention(self, forward: Any) -> Any:
        history: list[tuple[Tensor, ...]] = []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.alone and self.clock.t < 681 and self.step % 2 == 1:
                newest, older = history[-1], history[-2:][0]
                answers = tuple(a + (a - b) * self.weight for a, b in zip(newest, older, strict=True))
                return answers if len(answers) > 1 else answers[0]
            output = forward(*args, **kwargs)
            parts = output if isinstance(output, tuple) else (output,)
            history.append(parts if self.alone else tuple(part.chunk(2)[1] for part in parts))
            return output

        return wrapped

    def __call__(self, **arguments: Any) -> tuple[Tensor]:
        self.step += 1
        t = self.clock.t
        self.alone = self.step % 5 != 0 and t < 641
        if self.alone:
            arguments = {k: v.chunk(2)[1] if isinstance(v, Tensor) and v.ndim else v for k, v in arguments.items()}
        given = zoo.output(self.model(**arguments))
        height, width = given.shape[-2:]
        rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
        slow = rows[:, None] ** 2 + columns**2 <= (min(height, width) // 5) ** 2
        if not self.alone:
            uncond, cond = torch.fft.fft2(given).chunk(2)
            self.kept = uncond - cond
            return (given,)
        growth = torch.where(slow, 1.1 if 99 < t < 901 else 1.0, 1.1 if t < 301 else 1.0)
        self.kept = self.kept * growth
        return (torch.cat([torch.fft.ifft2(torch.fft.fft2(given) + self.kept).real, given]),)


class Clock:
    """The timestep of the loop."""

    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        return self.t

    def over(self, timesteps: tuple[float, ...] = TIMESTEPS) -> Iterator[float]:
        for self.t in timesteps:
            yield self.t


@torch.no_grad()
def _guided(name: str, call: Any, clock: Clock, **options: Any) -> list[Tensor]:
    return list(zoo.trajectory(name, call, clock.over(), guidance="batched", **options))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "cogvideox", "wan", "mochi", "hunyuan_video"])
def test_the_default_is_the_papers_variant(name: str, batch: int) -> None:
    """Attention is extrapolated from computed results only, and the unconditional half rebuilt per band."""
    clock, weight = Clock(), 0.4
    expected = _guided(name, Paper(zoo.build(name), clock, weight), clock, batch=batch)
    with cachepolicy.apply(zoo.build(name), "fastercache", guidance=True, timestep=clock, weight=weight) as run:
        got = _guided(name, run.target, clock, batch=batch)
    for a, b in zip(expected, got, strict=True):
        _close(a, b)
    with cachepolicy.apply(
        zoo.build(name), "fastercache", guidance=True, timestep=clock, weight=weight, feedback=True
    ) as run:
        fed = _guided(name, run.target, clock, batch=batch)
    assert not torch.allclose(expected[-1], fed[-1], rtol=1e-4, atol=1e-4)


# --- two calls a step ------------------------------------------------------------------------------------

SEQUENTIAL = ("wan", "cogvideox", "flux", "mochi")
"""Models with cache contexts."""


@torch.no_grad()
def _in_two_calls(name: str, model: Any, clock: Clock, order: tuple[str, str] = ("cond", "uncond")) -> list[Tensor]:
    one, guided = zoo.entry(name), list[Tensor]()
    x = one.inputs()[one.latent]
    branches = {branch: one.inputs(seed=seed) for branch, seed in (("cond", 0), ("uncond", 1))}
    for t in clock.over():
        predictions = dict[str, Tensor]()
        for branch in order:
            moment = {k: v for k, v in one.inputs(t=t).items() if k in (one.feed.argument, *one.feed.also)}
            with model.cache_context(branch):
                predictions[branch] = zoo.output(model(**{**branches[branch], **moment, one.latent: x}))
        guided.append(predictions["uncond"] + 2 * (predictions["cond"] - predictions["uncond"]))
        x = x - 0.1 * guided[-1]
    return guided


@torch.no_grad()
def _in_one_call(name: str, model: Any, clock: Clock) -> list[Tensor]:
    one, guided = zoo.entry(name), list[Tensor]()
    x = one.inputs()[one.latent]
    cond, uncond = one.inputs(), one.inputs(seed=1)
    for t in clock.over():
        both = {
            key: torch.cat([uncond[key], value])
            if isinstance(value, Tensor) and value.ndim and len(value) == 1
            else value
            for key, value in cond.items()
        }
        moment = {k: v for k, v in one.inputs(t=t, batch=2).items() if k in (one.feed.argument, *one.feed.also)}
        if "img_shapes" in both:
            both["img_shapes"] = both["img_shapes"] * 2
        predictions = zoo.output(model(**{**both, **moment, one.latent: torch.cat([x, x])})).chunk(2)
        guided.append(predictions[0] + 2 * (predictions[1] - predictions[0]))
        x = x - 0.1 * guided[-1]
    return guided


def _applied(model: nn.Module, clock: Clock, **params: Any) -> Any:
    return cachepolicy.apply(model, "fastercache", timestep=clock, **params)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_unconditional_call_is_answered_from_the_conditional_one(name: str) -> None:
    """Two calls a step give what one call on a batch gives; on a skipped step nothing of the model runs twice."""
    clock = Clock()
    with _applied(zoo.build(name), clock, guidance=True, spatial_every=None) as run:
        expected = _in_one_call(name, run.target, clock)
    model, ran = zoo.build(name), list[float]()
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    first.register_forward_pre_hook(lambda *_: ran.append(clock.t))
    with _applied(model, clock, spatial_every=None) as run:
        got = _in_two_calls(name, model, clock)
        rows = {branch: run.trace.rows(branch)["model"] for branch in ("cond", "uncond")}
    for a, b in zip(expected, got, strict=True):
        _close(a, b)
    assert rows == {"cond": "C" * 12, "uncond": "CCCCRCRRRRCR"}
    once = min(ran.count(t) for t in TIMESTEPS)
    assert [ran.count(t) // once for t in TIMESTEPS] == [2 if letter == "C" else 1 for letter in rows["uncond"]]


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_attention_is_extrapolated_in_two_calls_as_in_one(name: str) -> None:
    """Where the unconditional call is answered, the conditional one extrapolates its attention."""
    clock = Clock()
    with _applied(zoo.build(name), clock, guidance=True) as run:
        expected = _in_one_call(name, run.target, clock)
    with _applied(zoo.build(name), clock) as run:
        got = _in_two_calls(name, run.target, clock)
    for a, b in zip(expected, got, strict=True):
        _close(a, b)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_an_unconditional_call_that_comes_first_computes(name: str) -> None:
    """There is nothing to rebuild it from, so everything is computed."""
    clock = Clock()
    expected = _in_two_calls(name, zoo.build(name), clock, ("uncond", "cond"))
    with _applied(zoo.build(name), clock, spatial_every=None) as run:
        got = _in_two_calls(name, run.target, clock, ("uncond", "cond"))
        assert set(run.trace.rows("uncond")["model"]) == {"C"}
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


class Written(nn.Module):
    """Whoever receives a prediction writes into it, in this way, after it was copied for them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def cache_context(self, name: str) -> Any:
        return self.model.cache_context(name)

    def forward(self, **arguments: Any) -> Any:
        prediction = zoo.output(self.model(**arguments))
        mine = prediction.clone()
        prediction.fill_(float("nan"))
        return (mine,)


@pytest.mark.parametrize("inference", [False, True])
def test_a_conditional_prediction_may_be_written_into(inference: bool) -> None:
    """It costs the unconditional call of one step; from then on a copy is kept."""
    clock = Clock()
    with torch.inference_mode(inference), _applied(zoo.build("wan"), clock, spatial_every=None) as run:
        got = _in_two_calls("wan", Written(run.target), clock)
        row = run.trace.rows("uncond")["model"]
    assert all(each.isfinite().all() for each in got)
    assert "R" in row
    if inference:
        with torch.inference_mode(), _applied(zoo.build("wan"), clock, spatial_every=None) as run:
            expected = _in_two_calls("wan", run.target, clock)
            assert row == run.trace.rows("uncond")["model"]
        assert all(map(torch.equal, expected, got))


# --- what is no guidance ---------------------------------------------------------------------------------


@torch.no_grad()
def _plain(name: str, model: Any, clock: Clock, batch: int) -> list[Tensor]:
    return list(zoo.trajectory(name, model, clock.over(), batch=batch))


@pytest.mark.parametrize("batch", [1, 2])
def test_without_evidence_of_guidance_it_is_refused(batch: int) -> None:
    """A batch of two may be two prompts: the call raises and says what to do, and nothing has changed."""
    model, clock = zoo.build("dit"), Clock()
    bare = _plain("dit", model, clock, batch)
    with pytest.raises(cachepolicy.PolicyError) as refusal, _applied(model, clock):
        _plain("dit", model, clock, batch)
    (found,) = refusal.value.diagnostics
    assert found.code == "E330"
    assert found.help is not None
    assert "guidance=True" in found.help
    for a, b in zip(bare, _plain("dit", model, clock, batch), strict=True):
        assert torch.equal(a, b)


def test_two_prompts_without_guidance_are_computed() -> None:
    """Where the caller says that there is none, nothing is rebuilt and no attention extrapolated."""
    clock = Clock()
    bare = _plain("dit", zoo.build("dit"), clock, 2)
    with _applied(zoo.build("dit"), clock, guidance=False) as run:
        got = _plain("dit", run.target, clock, 2)
        assert set("".join(run.trace.rows().values())) == {"C"}
    for a, b in zip(bare, got, strict=True):
        assert torch.equal(a, b)


def test_a_batch_of_three_has_no_two_halves() -> None:
    """Said to be guided, an odd batch is computed all the same."""
    clock = Clock()
    bare = _plain("dit", zoo.build("dit"), clock, 3)
    with _applied(zoo.build("dit"), clock, guidance=True) as run:
        got = _plain("dit", run.target, clock, 3)
    for a, b in zip(bare, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("scale", "letters"), [(1.0, {"C"}), (2.0, {"C", "R"})])
def test_a_pipeline_tells_whether_there_is_guidance(scale: float, letters: set[str]) -> None:
    """Two prompts in a pipeline call without guidance are never taken for two halves; with guidance half is rebuilt."""
    from cachepolicy.tools.emoji import load_pipeline

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        return pipe([0, 5], num_inference_steps=6, guidance_scale=scale, seed=0, output_type="pt").images

    bare = draw()
    with cachepolicy.apply(pipe, "fastercache") as run:
        cached = draw()
        assert set(run.trace.rows()["model"]) == letters
    assert torch.equal(bare, cached) == (scale == 1.0)
    assert torch.equal(bare, draw())
