"""`fastercache.cp` with `feedback` gives, to the last bit and module by module, what diffusers' FasterCache gives.

Where diffusers is wrong ours is right instead; each such difference is a test of what is right. The paper's variant is
held to a reference of its own in `tests/test_guidance.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from diffusers.hooks import apply_faster_cache
from halves import FIVE, TIMESTEPS, UNMARKED, Knobs, batched, layout_of, ours_on, run_diffusers, run_ours, sample
from harness import Clock, attentions, difference, run_bare
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cachepolicy
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EQUAL = (
    "sd3",
    "sd35",
    "auraflow",
    "lumina2",
    "dit",
    "pixart",
    "sana",
    "cogview4",
    "lumina_next",
    "bria_fibo2",
    "hunyuan_dit",
    "omnigen",
    "prx",
    "cogview3plus",
    "glm_image",
    "hunyuan_image",
    "joyimage",
    "cogvideox",
    "cogvideox15",
    "latte",
    "hunyuan_video",
    "hunyuan_video_token_replace",
    "hunyuan_video15",
    "mochi",
    "allegro",
    "cosmos",
    "easyanimate",
    "sana_video",
    "wan",
    "wan_i2v",
    "wan_vace",
    "wan_animate",
    "skyreels_v2",
    "chronoedit",
    "helios",
    "hidream",
    "hunyuan_framepack",
)
"""The models on which diffusers' FasterCache runs and is right, once it is told the names of all batched inputs."""

TOLD = ("hidream", "hunyuan_framepack")
"""Models some inputs of which are as long as the batch by chance: ours has to be told the names, too."""

CORE = ("dit", "pixart", "sd3", "cogvideox", "wan", "mochi")
"""Pictures and video in two layouts; attention that returns one tensor, and two."""

FULL = Knobs(weight=0.3, temporal=3)

FAST = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


def _extra(name: str) -> dict[str, Any]:
    return {"inputs": batched(name)} if name in TOLD else {}


def _assert_same(
    name: str, knobs: Knobs, timesteps: Sequence[float] = TIMESTEPS, model: Any = None, **options: Any
) -> None:
    model = zoo.build(name) if model is None else model
    expected = run_diffusers(name, model, knobs, timesteps, **options)
    ours = run_ours(name, model, knobs, timesteps, extra=_extra(name), **options)
    assert difference(expected, ours) is None


@pytest.mark.parametrize("name", EQUAL)
def test_batched_guidance_agrees(name: str) -> None:
    """At each step the same modules run, and the guided predictions are equal."""
    _assert_same(name, FULL)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", CORE)
def test_any_batch_agrees(name: str, batch: int) -> None:
    """A guidance batch of several samples is halved as a whole."""
    _assert_same(name, FULL, batch=batch)


@pytest.mark.parametrize("name", CORE)
def test_it_changes_the_picture_and_saves_work(name: str) -> None:
    """The comparison is not of two runs that both do nothing."""
    model = zoo.build(name)
    bare = run_bare(name, model, TIMESTEPS, guidance="batched")
    ours = run_ours(name, model, FULL)
    assert ours.executions < bare.executions
    assert not torch.equal(ours.outputs[-1], bare.outputs[-1])


windows = st.tuples(st.integers(-10, 1010), st.integers(-10, 1010)).map(lambda pair: (min(pair) - 1.0, max(pair) + 0.0))
descents = st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True).map(lambda ts: sorted(ts, reverse=True))
factors = st.sampled_from([0.0, 0.5, 1.0, 1.1, 1.7])


@st.composite
def knobs(draw: st.DrawFn) -> Knobs:
    """Any setting."""
    return Knobs(
        spatial=draw(st.none() | st.integers(1, 5)),
        temporal=draw(st.none() | st.integers(1, 5)),
        uncond=draw(st.integers(1, 6)),
        spatial_window=draw(windows),
        temporal_window=draw(windows),
        uncond_window=draw(windows),
        low=draw(factors),
        high=draw(factors),
        low_window=draw(windows),
        high_window=draw(windows),
        weight=draw(st.sampled_from([-0.5, 0.0, 0.3, 0.5, 1.0])),
    )


def _agrees_on_any_setting(name: str, data: st.DataObject) -> None:
    timesteps = [float(t) for t in data.draw(descents)]
    model = zoo.build(name, data.draw(st.integers(0, 3)))
    options = {"batch": data.draw(st.integers(1, 3)), "seed": data.draw(st.integers(0, 3))}
    _assert_same(name, data.draw(knobs()), timesteps, model, **options)


@pytest.mark.parametrize("name", CORE)
@FAST
@given(data=st.data())
def test_any_setting_agrees(name: str, data: st.DataObject) -> None:
    """Whatever the ranges, windows, factors, weight, batch, timesteps and seeds."""
    _agrees_on_any_setting(name, data)


@pytest.mark.deep
@pytest.mark.parametrize("name", EQUAL)
@settings(FAST, max_examples=40)
@given(data=st.data())
def test_any_setting_agrees_on_every_architecture(name: str, data: st.DataObject) -> None:
    """The same on all models that diffusers runs, with more examples."""
    _agrees_on_any_setting(name, data)


@pytest.mark.parametrize("every", [3, 4])
def test_answers_may_follow_answers(every: int) -> None:
    """With attention computed at every third step or less, answers are extrapolated from answers."""
    _assert_same("wan", replace(FULL, spatial=every, spatial_window=(-1, 1001), uncond_window=(-1, 1001)))


@pytest.mark.parametrize("name", CORE)
def test_half_precision_agrees(name: str) -> None:
    """Spectra are formed in fp32 and the rebuilt half is rounded to the model's dtype, as in diffusers."""
    _assert_same(name, FULL, model=zoo.build(name).to(torch.bfloat16), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["sana", "wan", "mochi"])
def test_latents_that_are_not_square_agree(name: str) -> None:
    """The bands of a picture are those of its shorter side."""

    def wide(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=-1)

    _assert_same(name, FULL, latents=wide)


@pytest.mark.parametrize("name", ["wan", "pixart", "mochi"])
def test_a_tuple_agrees(name: str) -> None:
    """With `return_dict=False` the prediction is replaced within the tuple."""
    _assert_same(name, FULL, more={"return_dict": False})


class TensorPixArt(diffusers.PixArtTransformer2DModel):
    """PixArt that returns the prediction itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs, return_dict=False)[0]


def test_a_bare_tensor_agrees() -> None:
    """A model that returns no output object is rebuilt all the same."""
    model = zoo.build("pixart")
    model.__class__ = TensorPixArt
    _assert_same("pixart", FULL, model=model, call_of=lambda twin: lambda **arguments: (twin(**arguments),))


@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "wan", "qwenimage", "dit"])
def test_a_distilled_model_agrees(name: str) -> None:
    """Without an unconditional half attention alone is extrapolated, by the calls' own count."""
    _assert_same(name, replace(FULL, distilled=True), guidance="none", batch=2)


def test_a_distilled_model_may_start_inside_the_window() -> None:
    """The first step computes, as nothing is kept yet. diffusers reads the history that is not there."""
    knobs, model = replace(FULL, distilled=True), zoo.build("flux")
    timesteps = TIMESTEPS[4:]
    with pytest.raises(TypeError):
        run_diffusers("flux", model, knobs, timesteps, guidance="none")
    ours = run_ours("flux", model, knobs, timesteps, guidance="none")
    assert ours.computed[0] == frozenset(attentions(model))
    assert ours.computed[1] == frozenset()


class Swapped:
    """A model that is called with the conditional half first, behind a loop that thinks the unconditional one is."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **arguments: Any) -> Any:
        """The prediction, with its halves in the loop's order."""
        swapped = {key: self._swap(value) for key, value in arguments.items()}
        return (self._swap(zoo.output(self._model(**swapped))),)

    @staticmethod
    def _swap(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return torch.cat(value.chunk(2)[::-1]) if len(value) == 2 else value


@pytest.mark.parametrize("name", ["lumina_next", "pixart", "sana"])
def test_the_conditional_half_may_come_first(name: str) -> None:
    """Which half is which is all that the layout says: swapped halves give swapped predictions."""
    model = zoo.build(name)
    expected = run_diffusers(name, model, FULL)
    ours = run_ours(name, model, FULL, extra={"layout": "cond first"}, call_of=Swapped)
    assert expected.computed == ours.computed
    for a, b in zip(expected.outputs, ours.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNMARKED)
def test_cross_attention_is_computed_where_the_module_does_not_say_so(name: str) -> None:
    """FasterCache extrapolates self-attention. diffusers takes cross attention without a mark for that, too; right is
    what it gives with the mark."""
    model = zoo.build(name)
    ours = run_ours(name, model, FULL)
    marked = copy.deepcopy(model)
    for path, module in attentions(marked).items():
        module.is_cross_attention = bool(re.search(zoo.entry(name).cross, path))
    assert difference(run_diffusers(name, marked, FULL), ours) is None
    assert difference(run_diffusers(name, model, FULL), ours) is not None


@pytest.mark.parametrize("name", ["sd3", "dit", "cogview3plus"])
def test_batched_inputs_are_found(name: str) -> None:
    """All inputs with a row a sample are halved. diffusers halves five names, and returns four samples for two."""
    twin, clock = zoo.build(name), Clock()
    apply_faster_cache(twin, FULL.config(clock, layout_of(name), FIVE))
    theirs = sample(name, twin, TIMESTEPS, clock)
    ours = run_ours(name, zoo.build(name), FULL)
    assert len({len(output) for output in theirs.outputs}) == 2
    assert len({len(output) for output in ours.outputs}) == 1


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("hunyuan_framepack", 1),
        ("hunyuan_framepack", 2),
        ("hidream", 2),
        pytest.param("hidream", 1, marks=pytest.mark.xfail(reason="two layers are taken for two samples")),
    ],
)
def test_inputs_that_only_look_batched_are_left_whole(name: str, batch: int) -> None:
    """Positions and layers may be as many as there are samples."""
    model = zoo.build(name)
    expected = run_diffusers(name, model, FULL, batch=batch)
    assert difference(expected, run_ours(name, model, FULL, batch=batch)) is None


UNETS = [name for name in zoo.names() if name.startswith("unet")]


@pytest.mark.parametrize("name", UNETS)
def test_unets_run(name: str) -> None:
    """Diffusers knows no output class but one; ours replaces the prediction in any."""
    model = zoo.build(name)
    with pytest.raises(UnboundLocalError):
        run_diffusers(name, model, FULL)
    twin, clock = copy.deepcopy(model), Clock()
    # The motion UNet's text has a row a frame, which no size tells.
    named = {"inputs": ["sample", "timestep", "encoder_hidden_states"]} if name == "unet_motion" else {}
    with ours_on(twin, clock, FULL, **named) as run:
        got = sample(name, twin, TIMESTEPS, clock)
        assert run.trace.rows()["model"] == "CCCCRCRRRRCR"
    bare = run_bare(name, model, TIMESTEPS, guidance="batched")
    for a, b in zip(bare.outputs[:4], got.outputs[:4], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(bare.outputs[4], got.outputs[4])


@pytest.mark.parametrize("name", ["flux", "qwenimage", "ltx"])
def test_token_sequences_run(name: str) -> None:
    """The grid of a sequence is found from the call's arguments, or given; both are the same."""
    model, one = zoo.build(name), zoo.entry(name)
    inputs = one.inputs()
    tokens = inputs[one.latent].shape[1]
    grid = [inputs.get("num_frames", 1), inputs.get("height", 4), inputs.get("width", 4)]
    assert grid[0] * grid[1] * grid[2] == tokens
    found = run_ours(name, model, FULL)
    given = run_ours(name, model, FULL, extra={"format": "BSC", "grid": grid})
    assert difference(found, given) is None
    assert not torch.equal(found.outputs[4], run_bare(name, model, TIMESTEPS, guidance="batched").outputs[4])


def test_a_layout_that_is_not_clear_is_refused() -> None:
    """Where neither the call nor the model tells how tokens lie on a grid, the error asks for it."""
    with pytest.raises(cachepolicy.PolicyError) as refusal:
        run_ours("krea2", zoo.build("krea2"), FULL)
    assert [each.code for each in refusal.value.diagnostics] == ["E331"]
