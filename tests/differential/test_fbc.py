"""`fbc.cp` gives, to the last bit and block by block, what diffusers' First Block Cache gives where that one runs.

Where diffusers raises, ours runs; where there is no chain of blocks, ours says so and leaves the model as it was.
"""

from __future__ import annotations

import copy
import math
from itertools import accumulate
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from blocks import TIMESTEPS, applied, blocks, drifts, run_bare, run_diffusers, run_ours, sample
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from harness import difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import cachepolicy
from cachepolicy.engine.apply import run_of
from cachepolicy.engine.introspection import describe
from cachepolicy.testing import models
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EQUAL = (
    "flux",
    "qwenimage",
    "dit",
    "pixart",
    "cogview4",
    "hunyuan_image",
    "prior",
    "cogvideox",
    "cogvideox15",
    "hunyuan_video",
    "hunyuan_video_token_replace",
    "hunyuan_framepack",
    "ltx",
    "mochi",
    "wan",
    "wan_i2v",
    "motif_video",
)
"""The models on which diffusers' First Block Cache runs and is right."""

CORE = ("flux", "dit", "wan", "cogvideox")
"""One tensor, two streams in either order, and a joint head with a single-stream tail."""

CHAINLESS = tuple(name for name in zoo.names() if name.startswith("unet"))
"""Models whose blocks hand on more than the streams they are given."""

TWICE = ("wan_vace",)
"""Models to which diffusers adds what stands between its blocks twice on a hit."""

RAISES = tuple(name for name in zoo.names() if name not in {*EQUAL, *CHAINLESS, *TWICE})
"""Models on which diffusers raises."""

NO_BF16 = ("hunyuan_image",)
"""Models that, here, mix dtypes by themselves."""

ALWAYS = 1e9
"""A threshold above every drift."""

ANYWHERE = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _boundaries(measured: list[float]) -> list[float]:
    """The drifts below all before them: with such a threshold all steps up to its own compute, so it is met."""
    before = [math.inf, *accumulate(measured, min)]
    return [drift for drift, least in zip(measured, before, strict=False) if drift < least]


def _assert_boundaries_agree(name: str, dtype: torch.dtype, *, most: int, seed: int = 0) -> None:
    model = zoo.build(name, seed).to(dtype)
    thresholds = _boundaries(drifts(name, model, dtype=dtype))
    assert thresholds
    for at in thresholds[-most:]:
        below, above = math.nextafter(at, 0.0), math.nextafter(at, math.inf)
        ours = {each: run_ours(name, model, each, dtype=dtype) for each in (below, at, above)}
        for each, run in ours.items():
            assert difference(run_diffusers(name, model, each, dtype=dtype), run) is None
        # Equality is a hit.
        assert ours[at].computed == ours[above].computed != ours[below].computed


@pytest.mark.parametrize("name", EQUAL)
def test_a_drift_that_equals_the_threshold_is_a_hit_as_in_diffusers(name: str) -> None:
    """At a recorded drift and one ulp to either side the same blocks run and the outputs are equal."""
    _assert_boundaries_agree(name, torch.float32, most=1)


@pytest.mark.parametrize("name", CORE)
def test_the_same_in_bfloat16(name: str) -> None:
    """The norms are formed in the model's own dtype, as diffusers forms them."""
    _assert_boundaries_agree(name, torch.bfloat16, most=1)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", EQUAL)
def test_every_boundary_agrees(name: str, dtype: torch.dtype, seed: int) -> None:
    """All recorded drifts, in both dtypes, on models of several seeds."""
    if dtype is torch.bfloat16 and name in NO_BF16:
        pytest.skip("this model mixes dtypes by itself")
    _assert_boundaries_agree(name, dtype, most=len(TIMESTEPS), seed=seed)


def _agrees_anywhere(name: str, data: st.DataObject) -> None:
    threshold = data.draw(st.one_of(st.floats(0.0, 2.5), st.just(ALWAYS)))
    options: dict[str, Any] = {
        "seed": data.draw(st.integers(0, 3)),
        "batch": data.draw(st.integers(1, 2)) if zoo.entry(name).batches else 1,
    }
    if zoo.entry(name).batches:
        options["guidance"] = data.draw(st.sampled_from(["none", "batched"]))
    model = zoo.build(name, data.draw(st.integers(0, 3)))
    theirs, ours = (run(name, model, threshold, **options) for run in (run_diffusers, run_ours))
    assert difference(theirs, ours) is None


@pytest.mark.parametrize("name", CORE)
@ANYWHERE
@given(data=st.data())
def test_any_threshold_agrees(name: str, data: st.DataObject) -> None:
    """Whatever the threshold, the weights and the inputs, with one sample or more, with batched guidance or none."""
    _agrees_anywhere(name, data)


@pytest.mark.deep
@pytest.mark.parametrize("name", EQUAL)
@settings(ANYWHERE, max_examples=40)
@given(data=st.data())
def test_any_threshold_agrees_on_every_architecture(name: str, data: st.DataObject) -> None:
    """The same on all models that diffusers runs, with more examples."""
    _agrees_anywhere(name, data)


def test_the_change_is_that_of_what_is_generated() -> None:
    """Cosmos 3's blocks take the prompt's stream first, which is the same at each step; the other one is measured."""
    model = zoo.build("cosmos3")
    assert min(drifts("cosmos3", model)) > 0.01
    assert difference(run_bare("cosmos3", model), run_ours("cosmos3", model, 0.01)) is None


class Named:
    """A model, called in turn within the cache contexts of a pipeline."""

    def __init__(self, model: Any, *contexts: str) -> None:
        self._model, self._contexts, self._calls = model, contexts, 0

    def __call__(self, **arguments: Any) -> Any:
        """The model's answer, in the context whose turn it is."""
        name = self._contexts[self._calls % len(self._contexts)]
        self._calls += 1
        with self._model.cache_context(name):
            return self._model(**arguments)


@pytest.mark.parametrize("threshold", [0.3, 0.8, ALWAYS])
@pytest.mark.parametrize("name", CORE)
def test_each_branch_has_a_residual_of_its_own(name: str, threshold: float) -> None:
    """Two calls a step within cache contexts are decided apart, as in diffusers; bare calls are told apart, too."""
    model = zoo.build(name)
    if not hasattr(model, "cache_context"):
        pytest.skip("this model has no cache contexts")
    options = {"guidance": "sequential"}
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=threshold))
    expected = sample(name, theirs, call=Named(theirs, "cond", "uncond"), **options)
    with applied(ours, threshold):
        named = sample(name, ours, call=Named(ours, "cond", "uncond"), **options)
    assert difference(expected, named) is None
    assert difference(expected, run_ours(name, model, threshold, **options)) is None


def _silent_head(model: nn.Module) -> nn.Module:
    """The model with a first block that adds nothing."""
    head = model.transformer_blocks[0]
    for linear in (head.attn1.to_out[0], head.ff.net[2]):
        linear.weight.zero_()
        linear.bias.zero_()
    return model


def test_a_first_block_that_adds_nothing_computes() -> None:
    """A change relative to nothing is no number, so ours computes. diffusers compares NaN with the threshold, finds it
    not above, and reuses the first step's residual for ever."""
    model = _silent_head(zoo.build("dit"))
    bare = run_bare("dit", model)
    ours, theirs = run_ours("dit", model, 0.5), run_diffusers("dit", model, 0.5)
    assert difference(bare, ours) is None
    assert [len(step) for step in theirs.computed[1:]] == [1] * (len(TIMESTEPS) - 1)


def test_a_first_block_that_gives_nan_computes() -> None:
    """What is not finite is no reason to reuse: at any threshold every block runs at every step."""
    model = zoo.build("dit")
    model.transformer_blocks[0].ff.net[2].bias.fill_(math.nan)
    ours, theirs = run_ours("dit", model, ALWAYS), run_diffusers("dit", model, ALWAYS)
    assert {len(step) for step in ours.computed} == {len(blocks(model))}
    assert {len(step) for step in theirs.computed[1:]} == {1}


def test_blocks_that_write_into_their_inputs_are_measured_all_the_same() -> None:
    """A model that works in place drifts as its twin does that does not."""
    toys = [models.Toy(blocks=3, in_place=in_place) for in_place in (False, True)]
    rows = []
    for toy in toys:
        x, y = models.inputs(toy)
        with applied(toy.build(), 0.2) as run:
            list(models.sample(run.target, TIMESTEPS, x, y))
            rows.append(run.trace.rows())
    assert rows[0] == rows[1]
    assert set("".join(rows[0].values())) == {"C", "R"}


@pytest.mark.parametrize("name", RAISES)
def test_it_runs_where_diffusers_raises(name: str) -> None:
    """Unregistered blocks, other names, two streams in one, work between blocks: a hit runs the first block alone, and
    a model that has had its run is the bare one again."""
    model = zoo.build(name)
    before, chain = type(model), _chain(model)
    steps = TIMESTEPS[:3]
    expected = run_bare(name, model, timesteps=steps)
    with applied(model, ALWAYS):
        got = sample(name, model, steps)
    assert got.outputs[0].equal(expected.outputs[0])
    # Where all conditioning is made anew at each call, the second one may be another branch, and computes.
    for computed in got.computed[2 if name == "cosmos3" else 1 :]:
        ran = sorted(computed & chain)
        assert len(ran) == 1, ran
    assert type(model) is before
    assert difference(expected, run_bare(name, model, timesteps=steps)) is None


def _chain(model: nn.Module) -> set[str]:
    skeleton = describe(model)
    return {block for each in skeleton.block_lists for block in skeleton.elements[each]}


@pytest.mark.parametrize("name", RAISES)
def test_diffusers_still_raises_there(name: str) -> None:
    """What the list of models above says about diffusers is so."""
    with pytest.raises(Exception):  # noqa: B017, PT011 (any of five kinds)
        run_diffusers(name, zoo.build(name), ALWAYS, timesteps=TIMESTEPS[:3])


@pytest.mark.parametrize("name", CHAINLESS)
def test_a_model_without_a_chain_is_refused_and_left_bare(name: str) -> None:
    """A UNet's blocks hand on skip connections: the error says so, at the latest when the first call has shown it."""
    model = zoo.build(name)
    before = type(model)
    with pytest.raises(cachepolicy.PolicyError) as refusal, applied(model, 0.5):
        sample(name, model, TIMESTEPS[:3])
    (found,) = refusal.value.diagnostics
    assert found.code in {"E206", "E310", "E311"}
    assert found.help is None or found.help
    assert run_of(model) is None
    assert type(model) is before
    assert all(not type(each).__module__.startswith("cachepolicy") for each in model.modules())
    run_bare(name, model, timesteps=TIMESTEPS[:1])
