"""`pab.cp` gives, to the last bit and module by module, what diffusers' Pyramid Attention Broadcast gives.

Where diffusers is wrong ours is right instead; each such difference is a test of what is right.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.hooks import apply_pyramid_attention_broadcast
from harness import Clock, Knobs, Run, attentions, difference, flat, run_bare, run_diffusers_pab, run_ours, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import cachepolicy
from cachepolicy.diffusers.timestep_scaling import scale_of
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CORE = ("flux", "cogvideox", "latte", "wan", "sd3", "hunyuan_video", "pixart", "unet2d_condition")
"""The architectures of the fast tier."""

UNMARKED_CROSS = (
    "ltx",
    "ltx2",
    "anyflow",
    "kandinsky5",
    "longcat_audio",
    "bria_fibo2",
    "kandinsky6",
    "motif_video",
    "stable_audio3",
)
"""Models whose cross attention carries no `is_cross_attention`."""

APART = {"latte", "unet_spatiotemporal", "omnigen", *UNMARKED_CROSS}
"""Models on which diffusers takes one kind of attention for another; each has a test of its own."""

OTHERS = tuple(name for name in zoo.names() if name not in {*CORE, *APART})

WHOLE = [*CORE, *(pytest.param(name, marks=pytest.mark.deep) for name in OTHERS)]
"""Every model on which both agree; all but the core in the deep tier."""

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0, 350.0, 250.0, 150.0, 50.0)

ANCHORED = Knobs(spatial_names=("^transformer_blocks",), temporal_names=("^temporal_transformer_blocks",))
"""The names by which diffusers tells Latte's two lists of blocks apart."""

WINDOWS = {"inside": (100.0, 800.0), "everywhere": (-1.0, 1001.0), "outside": (955.0, 990.0), "edges": (250.0, 750.0)}

FAST = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DEEP = settings(FAST, max_examples=25)


def _knobs(name: str) -> Knobs:
    match name:
        case "latte":
            return ANCHORED
        case "unet_kandinsky3":
            return Knobs(cross=2)  # all its attention calls itself cross attention
        case _:
            return Knobs()


def _assert_same(
    name: str, knobs: Knobs, timesteps: Sequence[float] = TIMESTEPS, seed: int = 0, **options: Any
) -> None:
    model = zoo.build(name, seed)
    expected = run_diffusers_pab(name, model, knobs, timesteps, **options)
    try:
        ours = run_ours(name, model, knobs, timesteps, **options)
    except cachepolicy.PolicyError as error:
        # A setting that selects no module is refused, where diffusers goes on without a word and without a cache.
        assert [each.code for each in error.diagnostics] == ["E308"]
        assert difference(expected, run_bare(name, model, timesteps, **options)) is None
    else:
        assert difference(expected, ours) is None


@pytest.mark.parametrize("name", CORE)
def test_probes_see_every_attention_of_an_uncached_step(name: str) -> None:
    """The measure of what was computed misses no module, so that equal sets mean equal work."""
    model = zoo.build(name)
    run = run_bare(name, model, TIMESTEPS[:2])
    assert run.computed == [frozenset(attentions(model))] * 2


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("every", [2, 3, 5])
@pytest.mark.parametrize("name", CORE)
def test_skip_ranges_and_windows_agree(name: str, every: int, window: str) -> None:
    """Spatial, temporal and cross attention are computed on the same steps, at skip ranges 2, 3, 5 and any window."""
    edges = WINDOWS[window]
    kinds = {"spatial": every, "temporal": every + 1, "cross": every + 2}
    windows = {"spatial_window": edges, "temporal_window": edges, "cross_window": edges}
    _assert_same(name, replace(_knobs(name), **kinds, **windows))


@pytest.mark.parametrize("name", WHOLE)
def test_batched_guidance_agrees(name: str) -> None:
    """Both branches in one batch are one branch: they are kept and reused together."""
    if not zoo.entry(name).batches:
        pytest.skip("this model takes one sample a call")
    _assert_same(name, replace(_knobs(name), spatial=3, temporal=2, cross=5), guidance="batched", batch=2)


@pytest.mark.parametrize("kind", ["spatial", "temporal", "cross"])
@pytest.mark.parametrize("name", ["latte", "wan", "pixart", "unet2d_condition"])
def test_each_kind_alone_agrees(name: str, kind: str) -> None:
    """A kind that is off is computed at every step, whatever the other kinds do."""
    _assert_same(name, replace(_knobs(name), **{"spatial": None, kind: 3}))


@pytest.mark.parametrize("name", CORE)
def test_reuse_changes_the_picture_and_saves_work(name: str) -> None:
    """The comparison is not of two runs that both do nothing."""
    model = zoo.build(name)
    bare, ours = run_bare(name, model, TIMESTEPS), run_ours(name, model, _knobs(name), TIMESTEPS)
    assert ours.executions < bare.executions
    assert not torch.equal(ours.outputs[-1], bare.outputs[-1])


skip_ranges = st.none() | st.integers(1, 7)
windows = st.tuples(st.integers(-10, 1010), st.integers(-10, 1010)).map(
    lambda edges: (min(edges) - 1.0, max(edges) + 0.0)
)
descents = st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True).map(lambda ts: sorted(ts, reverse=True))


@st.composite
def knobs(draw: st.DrawFn, name: str) -> Knobs:
    """Any setting in which some kind is on; with none on, diffusers turns spatial attention on by itself."""
    every = draw(st.tuples(skip_ranges, skip_ranges, skip_ranges).filter(any))
    edges = [draw(windows) for _ in range(3)]
    kinds = dict(zip(("spatial", "temporal", "cross"), every, strict=True))
    spans = dict(zip(("spatial_window", "temporal_window", "cross_window"), edges, strict=True))
    return replace(_knobs(name), **kinds, **spans)


def _agrees_on_any_setting(name: str, data: st.DataObject) -> None:
    chosen = data.draw(knobs(name))
    timesteps = [float(t) for t in data.draw(descents)]
    guidance = data.draw(st.sampled_from(["none", "batched"] if zoo.entry(name).batches else ["none"]))
    _assert_same(name, chosen, timesteps, seed=data.draw(st.integers(0, 3)), guidance=guidance)


@pytest.mark.parametrize("name", CORE)
@FAST
@given(data=st.data())
def test_any_setting_agrees(name: str, data: st.DataObject) -> None:
    """Whatever the skip ranges, windows, timesteps and seed, with batched guidance or none."""
    _agrees_on_any_setting(name, data)


@pytest.mark.deep
@pytest.mark.parametrize("name", [*CORE, *OTHERS])
@DEEP
@given(data=st.data())
def test_any_setting_agrees_on_every_architecture(name: str, data: st.DataObject) -> None:
    """The same on the whole zoo, with more examples."""
    _agrees_on_any_setting(name, data)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_architectures_agree(name: str) -> None:
    """Every model of the zoo, once with all kinds on."""
    _assert_same(name, Knobs(spatial=3, temporal=2, cross=5))


@pytest.mark.parametrize("name", WHOLE)
def test_the_models_own_timestep_serves_as_well_as_the_callback(name: str) -> None:
    """Without a callback the clock reads the argument of the call in the model's scale; decisions are the same."""
    if scale_of(zoo.entry(name).model_class) is None:
        pytest.skip("this class is called with what is no timestep")
    model, chosen = zoo.build(name), _knobs(name)
    expected = run_diffusers_pab(name, model, chosen, TIMESTEPS)
    twin = copy.deepcopy(model)
    with cachepolicy.apply(twin, "pab.cp", **chosen.params()):
        assert difference(expected, sample(name, twin, TIMESTEPS, Clock())) is None


def test_latte_keeps_a_range_for_temporal_attention_of_its_own() -> None:
    """Default names suffice on Latte: in diffusers the spatial ones match inside `temporal_transformer_blocks` first,
    so that a temporal range is never used there; right is what anchored names give."""
    model = zoo.build("latte")
    both = {"spatial": 2, "temporal": 4, "cross": 3}
    ours = run_ours("latte", model, Knobs(**both), TIMESTEPS)
    assert difference(run_diffusers_pab("latte", model, replace(ANCHORED, **both), TIMESTEPS), ours) is None
    assert difference(run_diffusers_pab("latte", model, Knobs(**both), TIMESTEPS), ours) is not None


def test_video_unet_keeps_a_range_for_temporal_attention_of_its_own() -> None:
    """The same on the UNet whose temporal blocks lie deep inside: right is what names give that tell them apart."""
    name, both = "unet_spatiotemporal", {"spatial": 2, "temporal": 4, "cross": 3}
    apart = Knobs(**both, spatial_names=(r"\.transformer_blocks",), cross_names=("transformer_blocks",))
    model = zoo.build(name)
    ours = run_ours(name, model, Knobs(**both), TIMESTEPS)
    assert difference(run_diffusers_pab(name, model, apart, TIMESTEPS), ours) is None
    assert difference(run_diffusers_pab(name, model, Knobs(**both), TIMESTEPS), ours) is not None


def test_self_attention_that_calls_itself_cross_gets_the_spatial_range() -> None:
    """OmniGen gives its self attention a cross dimension, so that diffusers' spatial range does nothing there."""
    model = zoo.build("omnigen")
    ours = run_ours("omnigen", model, Knobs(spatial=2, cross=4), TIMESTEPS)
    marked = copy.deepcopy(model)
    for module in attentions(marked).values():
        module.is_cross_attention = False
    assert difference(run_diffusers_pab("omnigen", marked, Knobs(spatial=2, cross=4), TIMESTEPS), ours) is None
    assert ours.executions < run_diffusers_pab("omnigen", model, Knobs(spatial=2), TIMESTEPS).executions


@pytest.mark.parametrize("name", UNMARKED_CROSS)
def test_cross_attention_is_known_where_the_module_does_not_say_so(name: str) -> None:
    """Cross attention without `is_cross_attention` gets the cross range, as it would in diffusers with that mark;
    without it diffusers gives it the spatial range."""
    model, chosen = zoo.build(name), Knobs(spatial=2, cross=4)
    ours = run_ours(name, model, chosen, TIMESTEPS)
    marked = copy.deepcopy(model)
    for path, module in attentions(marked).items():
        module.is_cross_attention = bool(re.search(zoo.entry(name).cross, path))
    assert any(module.is_cross_attention for module in attentions(marked).values())
    assert difference(run_diffusers_pab(name, marked, chosen, TIMESTEPS), ours) is None
    assert difference(run_diffusers_pab(name, model, chosen, TIMESTEPS), ours) is not None


class Turns:
    """Two models that answer in turn, as one: the reference for guidance in two calls a step."""

    def __init__(self, *models: nn.Module) -> None:
        self._turns = itertools.cycle(models)

    def __call__(self, **arguments: Any) -> Any:
        """The answer of the model whose turn it is."""
        return next(self._turns)(**arguments)


class Named:
    """One model, called in turn within the cache contexts of a pipeline."""

    def __init__(self, model: Any, *contexts: str) -> None:
        self._model, self._contexts = model, itertools.cycle(contexts)

    def __call__(self, **arguments: Any) -> Any:
        """The model's answer, in the context whose turn it is."""
        with self._model.cache_context(next(self._contexts)):
            return self._model(**arguments)


def _outputs(name: str, call: Any, clock: Clock) -> Run:
    predictions = zoo.trajectory(name, call, clock.over(TIMESTEPS), guidance="sequential")
    return Run([flat(each) for each in predictions], [frozenset[str]()] * len(TIMESTEPS))


def _separate(name: str, model: nn.Module, chosen: Knobs) -> Run:
    clock, models = Clock(), (copy.deepcopy(model), copy.deepcopy(model))
    for each in models:
        apply_pyramid_attention_broadcast(each, chosen.config(clock))
    return _outputs(name, Turns(*models), clock)


@pytest.mark.parametrize("context", [False, True], ids=["bare calls", "cache contexts"])
@pytest.mark.parametrize("name", WHOLE)
def test_guidance_in_two_calls_equals_two_models(name: str, context: bool) -> None:
    """Each branch has its own count and history: as if each had a model of its own. In diffusers they share both, so
    that with a skip range of 2 the second branch always gets the first one's attention."""
    model, chosen = zoo.build(name), replace(_knobs(name), temporal=3, cross=3)
    if context and not hasattr(model, "cache_context"):
        pytest.skip("this model has no cache contexts")
    if name == "unet2d":
        pytest.skip("without conditioning nothing tells a second branch from a step that is repeated")
    clock, twin = Clock(), copy.deepcopy(model)
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(cachepolicy.apply(twin, "pab.cp", timestep=clock, **chosen.params()))
        ours = _outputs(name, Named(twin, "cond", "uncond") if context else twin, clock)
        expected = _separate(name, model, chosen)
        mixed = run_diffusers_pab(name, model, chosen, TIMESTEPS, guidance="sequential")
    assert difference(expected, ours) is None
    assert not torch.equal(mixed.outputs[3], expected.outputs[3])


def test_two_calls_a_step_cost_each_branch_its_own_schedule() -> None:
    """Per branch the same steps are computed as without guidance."""
    model = zoo.build("wan")
    alone = run_ours("wan", model, Knobs(), TIMESTEPS)
    guided = run_ours("wan", model, Knobs(), TIMESTEPS, guidance="sequential")
    assert alone.computed == guided.computed
