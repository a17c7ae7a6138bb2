"""Pipelines with loops of their own kind: told apart without names, they run as if every call had been named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch

import cachepolicy
from cachepolicy.engine import clock
from cachepolicy.engine.contexts import Context
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Probes
from tests.support import zoo
from tests.support.tiny_pipelines import (
    NO_ENCODERS,
    STEPS,
    Tiny,
    flux,
    flux_true_cfg,
    texts,
    unet_sd,
    unipc,
    vae_of,
    wan,
    wan22,
)

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

POLICIES = (
    "match attention when step > 0 every 2 -> reuse",
    "match attention when progress > 0.2 every 3 since compute -> reuse\nmatch feedforward every 2 -> reuse",
)


def lumina2(**told: Any) -> Tiny:
    pipe = diffusers.Lumina2Pipeline(
        transformer=zoo.build("lumina2"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **NO_ENCODERS
    )
    mask = torch.ones(1, 5, dtype=torch.bool)
    arguments = {
        **texts(),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask.clone(),
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, arguments | told)


def chroma() -> Tiny:
    pipe = diffusers.ChromaPipeline(
        transformer=zoo.build("chroma"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **NO_ENCODERS
    )
    return Tiny(pipe, {**texts(masked=True), "height": 64, "width": 64})


def flux_image_to_image() -> Tiny:
    tiny = flux_true_cfg()
    parts = {name: part for name, part in tiny.pipe.components.items() if name not in ("vae", "transformer")}
    # Four channels of latents, packed two by two.
    model = zoo.build("flux", in_channels=16)
    vae = vae_of()
    vae.register_to_config(shift_factor=0.0)
    pipe = diffusers.FluxImg2ImgPipeline(vae=vae, transformer=model, **parts)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    told = {"image": image, "strength": 0.6, "num_inference_steps": 10, "height": 32, "width": 32}
    return Tiny(pipe, tiny.arguments | told)


def panorama() -> Tiny:
    kind = diffusers.StableDiffusionPanoramaPipeline
    parts = unet_sd(diffusers.DDIMScheduler()).pipe.components
    pipe = kind(
        **{name: part for name, part in parts.items() if name != "image_encoder"}, requires_safety_checker=False
    )
    # three tiles, 64 wide, which are lower than they may be
    return Tiny(pipe, {**texts(8), "height": 64, "width": 640}, denoisers=("unet",))


def skyreels(**told: Any) -> Tiny:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        transformer=zoo.build("skyreels_v2"), scheduler=unipc(), **NO_ENCODERS
    )
    arguments = {
        "prompt": None,
        **texts(),
        "height": 64,
        "width": 64,
        "num_frames": 9,
    }
    return Tiny(pipe, arguments | told)


def halves(steps: int, *, guided: int | None = None) -> list[tuple[int, str]]:
    """Two calls a step, the conditional one first; after `guided` steps that one alone."""
    last = steps if guided is None else guided
    return [(step, half) for step in range(steps) for half in (["cond", "uncond"] if step < last else ["cond"])]


LOOPS: dict[str, tuple[Callable[[], Tiny], Sequence[tuple[int, str]]]] = {
    "lumina2": (lumina2, halves(STEPS)),
    "lumina2, guidance truncated": (lambda: lumina2(cfg_trunc_ratio=0.5), halves(STEPS, guided=3)),
    "chroma": (chroma, halves(STEPS)),
    "flux, image to image, true guidance": (flux_image_to_image, halves(6)),
    "panorama": (panorama, [(step, tile) for step in range(STEPS) for tile in ("a", "b", "c")]),
    "skyreels, frames at once": (skyreels, halves(STEPS)),
}
"""A pipeline, and the step and branch of each call of its denoiser."""


class Names:
    """Stands in for the context variable that `cache_context` sets: names the calls in their order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = iter(names)

    def get(self) -> Context:
        return Context(next(self._names))


@pytest.mark.parametrize("text", POLICIES, ids=["every 2", "since compute"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_understood(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are the scheduler's, each branch is one and the same, and latents are those of calls that were named."""
    make, expected = LOOPS[name]
    tiny = make()
    with cachepolicy.apply(tiny.pipe, parse(text)) as run:
        probes = Probes(getattr(tiny.pipe, tiny.denoisers[0]))
        got = tiny()
        assert torch.equal(got, tiny())
        counted = probes.take()
        probes.remove()
        ticks = [call.tick for call in run.trace.last.calls]
    assert [step for step, _ in expected] == [tick.step for tick in ticks]
    assert {len({step for step, _ in expected})} == {tick.steps for tick in ticks}
    pairs = {(branch, tick.branch) for (_, branch), tick in zip(expected, ticks, strict=True)}
    assert len(pairs) == len({branch for branch, _ in pairs}) == len({told for _, told in pairs})
    with cachepolicy.apply(tiny.pipe, parse(text)):
        monkeypatch.setattr(clock, "CONTEXT", Names([branch for _, branch in expected]))
        named = Probes(getattr(tiny.pipe, tiny.denoisers[0]))
        assert torch.equal(got, tiny())
        once = named.take()
        named.remove()
    assert {site: 2 * count for site, count in once.items()} == counted


def test_a_video_in_chunks_is_a_trajectory_for_each() -> None:
    """Long videos run the loop over and over inside one call; no chunk is answered from another."""
    tiny = skyreels(num_frames=25, base_num_frames=17, overlap_history=5)
    with cachepolicy.apply(tiny.pipe, parse(POLICIES[0])) as run:
        assert torch.equal(tiny(), tiny())
        steps = [[call.tick.step for call in each.calls if call.tick.branch == "cond"] for each in run.trace]
    assert [list(range(STEPS))] * 4 == steps


def test_frames_that_are_denoised_one_after_another_are_steps() -> None:
    """With `ar_step` each row of the matrix of timesteps is a step, though the noisiest frame's is the same."""
    tiny = skyreels(ar_step=2, causal_block_size=1)
    with cachepolicy.apply(tiny.pipe, parse("match attention every 2 -> reuse")) as run:
        tiny()
        (one,) = run.trace
    assert {"cond", "uncond"} == set(one.branches)
    assert list(range(len(one.calls) // 2)) == [call.tick.step for call in one.calls if call.tick.branch == "cond"]


@pytest.mark.parametrize("boundary", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("told", ["pipeline", "timestep"])
def test_two_experts_run_one_trajectory(boundary: float, told: str) -> None:
    """Wan 2.2: steps, their number and progress are the whole trajectory's on both, wherever the boundary lies."""
    tiny = wan22()
    tiny.pipe.register_to_config(boundary_ratio=boundary)
    options: dict[str, Any] = {}
    if told == "timestep":
        options = {"timestep": lambda: tiny.pipe.current_timestep, "steps": STEPS}
    with cachepolicy.apply(tiny.pipe, parse("match attention when progress < 1 every 2 -> reuse"), **options) as run:
        assert torch.equal(tiny(), tiny())
        calls = [call for each in run.trace for call in each.calls if call.tick.branch == "cond"][-STEPS:]
    assert list(range(STEPS)) == [call.tick.step for call in calls]
    assert {STEPS} == {call.tick.steps for call in calls}


def test_a_denoiser_that_is_called_outside_the_loop_is_no_step_of_it() -> None:
    """A call before the loop, as for a warm-up, leaves the loop's steps as they are."""
    tiny = flux()
    with cachepolicy.apply(tiny.pipe, parse(POLICIES[0])) as run:
        expected = tiny()
        model, seen = tiny.pipe.transformer, list[Any]()
        hook = model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
        tiny()
        hook.remove()
        with torch.no_grad():
            model(**seen[3])
        assert torch.equal(expected, tiny())
        assert [*range(STEPS)] == [call.tick.step for call in run.trace.last.calls]


def test_wan_without_a_scheduler_is_wan() -> None:
    """The bare denoiser in its pipeline: the argument tells as many steps."""
    tiny = wan()
    with cachepolicy.apply(tiny.pipe.transformer, parse("match attention every 2 -> reuse")) as run:
        tiny()
        assert [step for step in range(STEPS) for _ in range(2)] == [call.tick.step for call in run.trace.last.calls]
