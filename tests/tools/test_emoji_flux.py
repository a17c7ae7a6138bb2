# ruff: noqa: E402 - the imports below need diffusers, and the tests are skipped without it
"""The emoji-flux pipeline is diffusers' own, also when it is loaded from its folder."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from cachepolicy.tools.emoji import NAMES
from cachepolicy.tools.emoji_flux import PixelAutoencoder, call_arguments, load_pipeline, shipped_folder
from cachepolicy.tools.sampling import open_pipeline


@pytest.fixture(scope="module")
def pipe():
    return quiet(load_pipeline())


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, seed=0, **options):
    """Pictures as a tensor, in four steps."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    options = call_arguments(prompts) | {"num_inference_steps": 4} | options
    return pipe(**options, generator=generators, output_type="pt").images


def test_the_model_draws_its_prompts(pipe):
    """A picture is nearer to another one of its own prompt than to one of another prompt."""
    one, other = draw(pipe, ["apple", "frog"]), draw(pipe, ["apple", "frog"], seed=5)
    assert [0, 1] == torch.cdist(one.flatten(1), other.flatten(1)).argmin(1).tolist()


def test_the_shipped_folder_is_a_pipeline(pipe, monkeypatch):
    """Opened as any folder, in a process that has not imported its classes, it draws the same pictures."""
    monkeypatch.delitem(sys.modules, "cachepolicy.tools.emoji_flux")
    opened = quiet(open_pipeline(shipped_folder(), call_arguments(["star"])))
    assert type(opened) is diffusers.FluxPipeline
    assert torch.allclose(draw(pipe, ["star"]), draw(opened, ["star"]), atol=1e-5)


def test_it_saves_and_loads_like_any_pipeline(pipe, tmp_path):
    """`save_pretrained` writes a folder that `from_pretrained` of diffusers reads."""
    pipe.save_pretrained(tmp_path)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.allclose(draw(pipe, ["star"]), draw(again, ["star"]), atol=1e-5)


def test_guidance_calls_the_model_twice(pipe):
    """True guidance runs the conditional and the unconditional branch, a scale of 1 the conditional one."""
    branches = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: branches.append(bool(kwargs["pooled_projections"].any())), with_kwargs=True
    )
    try:
        draw(pipe, ["star"])
        assert [True, False] * 4 == branches
        branches.clear()
        draw(pipe, ["star"], true_cfg_scale=1.0)
        assert [True] * 4 == branches
    finally:
        handle.remove()


@pytest.mark.parametrize(("text", "same"), [("a photo of a PANDA", "panda"), ("red heart", "red_heart"), ("of a", "")])
def test_words_without_a_vector_are_left_out(pipe, text, same):
    """Prompts are encoded as the trained words in them."""
    for one, other in zip(pipe.encode_prompt(text)[:2], pipe.encode_prompt(same)[:2], strict=True):
        assert torch.equal(one, other)


def test_encoded_prompts_are_as_long_as_in_training(pipe):
    """Every prompt has four tokens, and the empty one is all zeros."""
    sequence, pooled, _ = pipe.encode_prompt([*NAMES, ""])
    assert ((37, 4, 32), (37, 32)) == (tuple(sequence.shape), tuple(pooled.shape))
    assert 36 == len({tuple(vector) for vector in pooled[:-1].tolist()})
    assert 0 == sequence[-1].abs().max() == pooled[-1].abs().max()


def test_the_autoencoder_loses_nothing():
    """A picture that is encoded and decoded is bitwise the picture."""
    pictures, vae = torch.rand(2, 3, 32, 32), PixelAutoencoder()
    latents = vae.encode(pictures).latents
    assert (2, 12, 16, 16) == tuple(latents.shape)
    assert torch.equal(pictures, vae.decode(latents).sample)
