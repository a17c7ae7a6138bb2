"""Policies on diffusers' modular pipelines."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers.modular_pipelines")

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.flux.denoise import FluxDenoiseStep

import cachepolicy
from tests.support import zoo


def test_a_modular_pipeline_is_taken_as_others_are() -> None:
    """The policy is on the denoiser, and the scheduler tells the steps; from the end, every third one computes."""
    pipe: Any = FluxDenoiseStep().init_pipeline()
    pipe.update_components(transformer=zoo.build("flux"), scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    inputs = zoo.entry("flux").inputs(batch=1)
    with cachepolicy.apply(pipe, "fora") as run:
        pipe.scheduler.set_timesteps(6)
        pipe(
            latents=inputs["hidden_states"],
            prompt_embeds=inputs["encoder_hidden_states"],
            pooled_prompt_embeds=inputs["pooled_projections"],
            txt_ids=inputs["txt_ids"],
            img_ids=inputs["img_ids"],
            timesteps=pipe.scheduler.timesteps,
            num_inference_steps=6,
        )
        assert run.trace is not None
        assert {"CRCRRC"} == set(run.trace.rows().values())
