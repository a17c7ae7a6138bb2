"""The interfaces of SGLang 0.5.23 that the plugin uses, as small stand-ins with the recorded names and signatures.

`tests/engines/test_recorded.py` compares them with the real ones.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from cachepolicy.testing.models import Toy, inputs
from tests.support.stand_ins import install

TOY = Toy(blocks=4)


class HookType(enum.Enum):
    """When a hook runs."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Hooks by the dotted path of their target."""

    _hooks: ClassVar[dict[str, list[tuple[HookType, Callable[..., Any]]]]] = defaultdict(list)

    @classmethod
    def register(
        cls, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER, *, source: Any = None
    ) -> None:
        cls._hooks[target].append((hook_type, hook))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hooks in cls._hooks.items():
            path, _, attribute = target.rpartition(".")
            module, _, name = path.rpartition(".")
            owner = getattr(sys.modules[module], name)
            for kind, hook in hooks:
                assert kind is HookType.AROUND
                setattr(owner, attribute, _around(getattr(owner, attribute), hook))


def _around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


def stage_class() -> type:
    """Make the stage that runs the denoising loop, with the arguments of SGLang's."""

    class DenoisingStage:
        def __init__(
            self, transformer: Any, scheduler: Any, pipeline: Any = None, transformer_2: Any = None, vae: Any = None
        ) -> None:
            self.transformer, self.scheduler, self.transformer_2 = transformer, scheduler, transformer_2
            self._cache_dit_enabled = False

        def _maybe_get_bcg_runner(self, current_model: Any) -> Any:
            return "a graph"

        def _run_denoising_loop(
            self, ctx: Any, batch: Any, server_args: Any, *, collect_trajectory: bool = True
        ) -> Any:
            x, positive = inputs(TOY, seed=batch.seed)
            for t in ctx.timesteps:
                predictions = [self.transformer(x, t[None], y) for y in (positive, 0.1 * positive)]
                prediction = predictions[1] + 4 * (predictions[0] - predictions[1])
                x = ctx.scheduler.step(model_output=prediction, timestep=t, sample=x, return_dict=False)[0]
            ctx.latents = x
            return ctx.timesteps

    return DenoisingStage


def request(said: Any = ..., *, seed: int = 0, **fields: Any) -> SimpleNamespace:
    """Make a request that says `said` under `cachepolicy`, or nothing."""
    extra = {} if said is ... else {"diffusers_kwargs": {"cachepolicy": said}}
    told = {"enable_teacache": False, "enable_spectrum": False, "request_id": "r"} | fields
    return SimpleNamespace(seed=seed, extra=extra, **told)


def context(steps: int = 8) -> SimpleNamespace:
    """Make the context of a loop. SGLang gives each request a scheduler of its own."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return SimpleNamespace(scheduler=scheduler, timesteps=scheduler.timesteps, latents=None)


def installed(patch: pytest.MonkeyPatch) -> Any:
    """Let the stand-ins be what `import sglang` finds, until the patch is undone; return the class of the stage."""
    stage = stage_class()
    HookRegistry._hooks.clear()
    denoising = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising"
    members: dict[str, dict[str, Any]] = {
        "sglang.multimodal_gen.runtime.platforms.plugins": {"HookRegistry": HookRegistry, "HookType": HookType},
        "sglang.multimodal_gen.runtime.distributed.parallel_state": {"_SP": None, "_TP": None},
        denoising: {"DenoisingStage": stage},
    }
    install(patch, members)
    return stage


def run(stage: Any, batch: Any, steps: int = 8) -> torch.Tensor:
    """Run the loop of a request and return its latents."""
    ctx = context(steps)
    with torch.no_grad():
        stage._run_denoising_loop(ctx, batch, None)
    return ctx.latents
