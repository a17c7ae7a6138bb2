"""The plugin on SGLang's own registry of hooks and its own denoising loop, with a tiny FLUX of SGLang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.multimodal_gen")

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cachepolicy.integrations import sglang as plugin
from cachepolicy.testing.models import redraw
from tests.support import engine_models


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's stage with its own loop around a step that only calls the model and the scheduler."""
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
    from sglang.multimodal_gen.runtime.pipelines_core.stages import denoising
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry
    from sglang.multimodal_gen.runtime.server_args.server_args import get_global_server_args

    path = tmp_path / "some.cp"
    path.write_text(engine_models.POLICY)
    monkeypatch.setenv(plugin.CONFIG, json.dumps({"policy": str(path)}))
    hooked = ("__init__", "_run_denoising_loop", "_maybe_get_bcg_runner")
    kept = {name: vars(denoising.DenoisingStage)[name] for name in hooked}
    HookRegistry.reset()
    plugin.register()
    HookRegistry.apply_hooks()
    assert 3 == len(HookRegistry._patched)

    model = engine_models.BUILDERS["sglang", "flux"]()
    redraw(model, 0)
    turning = model.rotary_emb(engine_models.flux_positions())
    said = engine_models.prompts(32, 16)

    class Stage(denoising.DenoisingStage):
        def _before_denoising_loop(self, ctx: Any, batch: Any, server_args: Any) -> None:
            ctx.scheduler.set_begin_index(0)

        def _prepare_step_state(self, ctx: Any, batch: Any, server_args: Any, index: int, t: Any, times: Any) -> Any:
            return SimpleNamespace(step_index=index, t_device=ctx.timesteps[index], t_host=t)

        def _run_denoising_step(self, ctx: Any, step: Any, batch: Any, server_args: Any) -> None:
            predictions = list[Tensor]()
            for each in said:
                with set_forward_context(current_timestep=step.step_index, attn_metadata=None):
                    given = {"timestep": step.t_device[None], "guidance": None, "freqs_cis": turning, **each}
                    result = self.transformer(hidden_states=ctx.latents, **given)
                predictions.append(result[0] if isinstance(result, tuple) else result)
            prediction = predictions[1] + 2 * (predictions[0] - predictions[1])
            ctx.latents = ctx.scheduler.step(prediction, step.t_device, ctx.latents, return_dict=False)[0]

    made = Stage.__new__(Stage)
    made.server_args, made.transformer, made.transformer_2 = get_global_server_args(), model.eval(), None
    made._cache_dit_enabled = False
    yield made
    if made in plugin._served:
        plugin._served[made].stop()
    HookRegistry.reset()
    for name, value in kept.items():
        setattr(denoising.DenoisingStage, name, value)


def run(stage: Any, said: Any = ..., steps: int = 8) -> tuple[Tensor, dict[str, Any]]:
    """The latents of a request, and its record."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    ctx = SimpleNamespace(
        scheduler=scheduler,
        timesteps=scheduler.timesteps,
        latents=engine_models.draw(1, 16, 4),
        extra={},
        is_warmup=False,
        num_inference_steps=steps,
        num_warmup_steps=0,
        target_dtype=torch.float32,
        autocast_enabled=False,
    )
    batch = SimpleNamespace(
        extra={} if said is ... else {"diffusers_kwargs": {"cachepolicy": said}},
        metrics=None,
        perf_dump_path=None,
        return_trajectory_latents=False,
        is_warmup=False,
        request_id="r",
        enable_teacache=False,
        enable_spectrum=False,
    )
    with torch.no_grad():
        stage._run_denoising_loop(ctx, batch, stage.server_args)
    return ctx.latents, batch.extra.get("cachepolicy", {})


def test_requests_go_through_the_loop_of_sglang(stage: Any) -> None:
    """By the request's own scheduler, with its own params, without a policy, and refused where they are wrong."""
    first, record = run(stage)
    (row,) = record["rows"][0]["first"].values()
    assert "CRCRCRCC" == row
    other, record = run(stage, {"n": 4})
    assert 8 == record["steps"]
    bare, record = run(stage, False)
    assert record["policy"] is False
    with pytest.raises(ValueError, match="cachepolicy: E161"):
        run(stage, {"n": "x"})
    again, _ = run(stage)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, bare)
