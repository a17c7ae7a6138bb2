# ruff: noqa: E402 - the imports below need diffusers, and the tests are skipped without it
"""The emoji pipeline is a real one."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import cachepolicy
from cachepolicy.reports import text as report_text
from cachepolicy.tools.emoji import NAMES, EmojiPipeline, load_pipeline
from cachepolicy.tools.flops import counting
from cachepolicy.tools.quality import psnr


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    options = {"num_inference_steps": 4, "seed": 0, "output_type": "pt"} | options
    return pipe(["grin", "tree"], **options).images


def test_the_model_draws_its_classes(pipe):
    """A picture is nearer to another of its own class than to one of another class."""
    one = pipe(["apple", "frog"], num_inference_steps=8, seed=0, output_type="pt").images
    other = pipe(["apple", "frog"], num_inference_steps=8, seed=1, output_type="pt").images
    distance = torch.cdist(one.flatten(1), other.flatten(1))
    assert [0, 1] == distance.argmin(1).tolist()


def test_sequential_guidance_draws_the_same(pipe):
    """Two calls a step give the pictures of one call on a batch, up to rounding."""
    assert torch.allclose(draw(pipe), draw(pipe, sequential_guidance=True), atol=1e-4)


def test_no_guidance_runs_the_conditional_half(pipe):
    """A guidance of 1 calls the model on single pictures."""
    with counting(pipe.transformer) as halved:
        alone = draw(pipe, guidance_scale=1.0)
    with counting(pipe.transformer) as full:
        assert not torch.equal(alone, draw(pipe))
    assert full.total == 2 * halved.total
    assert pipe.do_classifier_free_guidance


def test_a_seed_gives_each_picture_its_own_noise(pipe):
    """How many pictures are drawn changes none of them, and latents may be given instead."""
    noise = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.equal(draw(pipe), draw(pipe, seed=None, latents=noise))
    alone = pipe(["grin"], num_inference_steps=4, seed=0, output_type="pt").images
    assert torch.allclose(draw(pipe)[:1], alone, atol=1e-4)


def test_a_generator_is_taken(pipe):
    """One generator draws the noise of all pictures."""
    one = draw(pipe, seed=None, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, draw(pipe, seed=None, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(one, draw(pipe, seed=None, generator=torch.Generator().manual_seed(4)))


def test_the_pipeline_tells_where_it_is(pipe):
    """Step callbacks see the timestep, may change the latents, and afterwards no timestep is current."""
    seen = []

    def look(pipe, step, t, tensors):
        seen.append((step, float(t), float(pipe.current_timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

    pictures = draw(pipe, callback_on_step_end=look)
    assert [0, 1, 2, 3] == [step for step, _, _ in seen]
    assert all(t == current for _, t, current in seen)
    assert 0 == pictures.abs().max()
    assert pipe.current_timestep is None
    assert 4 == pipe.num_timesteps


def test_it_saves_and_loads_like_any_pipeline(pipe, tmp_path):
    """`save_pretrained` and `from_pretrained` of diffusers work on it."""
    pipe.save_pretrained(tmp_path)
    again = EmojiPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(again))
    assert {"transformer", "scheduler"} == set(pipe.components)


def test_pictures_come_as_pil_images(pipe):
    """The default output is a list of 32 by 32 images."""
    images = draw(pipe, output_type="pil")
    assert [(32, 32), (32, 32)] == [image.size for image in images]
    assert len(NAMES) == 36


def test_psnr_of_pictures_that_are_not_finite_is_the_worst():
    """A picture with NaN or infinite numbers is not taken for an equal one."""
    reference, broken = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    for value in (math.nan, math.inf, -math.inf):
        broken[1, 0, 0, 0] = value
        assert (-math.inf, -math.inf) == psnr(reference, broken)


def test_psnr_of_equal_pictures_is_infinite():
    """Equal pictures give infinity; those that differ are averaged without them."""
    one = torch.zeros(3, 3, 4, 4)
    other = one.clone()
    assert (math.inf, math.inf) == psnr(one, other)
    other[0] += 0.2
    other[1] += 0.02
    mean, worst = psnr(one, other)
    assert (pytest.approx(30, abs=1e-4), pytest.approx(20, abs=1e-4)) == (mean, worst)


def test_a_trace_is_drawn_as_the_schedule_is(pipe):
    """What happened on the real pipeline reads like what was simulated."""
    with cachepolicy.apply(pipe, "pab", spatial_every=3) as run:
        draw(pipe, num_inference_steps=10)
    trajectory = run.trace.last
    schedule = cachepolicy.simulate(run.plan, steps=10, timesteps=pipe.scheduler.timesteps.tolist())
    assert report_text.outcome_to_json(schedule)["rows"] == report_text.outcome_to_json(trajectory)["rows"]
    assert report_text.summary(schedule) == report_text.summary(trajectory)
    assert "transformer_blocks.0-7.attn1" in report_text.draw(trajectory)
