"""The stand-ins of the fast tests have the names and signatures of the engines."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest

pytest.importorskip("vllm_omni")

from tests.support import recorded_sglang, recorded_vllm_omni

OMNI = "vllm_omni.diffusion."
PLACES = {
    "CacheBackend": "cache.base",
    "DiffusionCacheConfig": "data",
    "DiffusionOutput": "data",
    "OmniDiffusionRequest": "request",
    "DiffusionRequestBatch": "worker.request_batch",
    "RequestBatchSamplingParamsKey": "sched.interface",
    "ForwardContext": "forward_context",
    "get_cache_backend": "cache.selector",
    "build_request_batch_sampling_params_key": "sched.request_scheduler",
    "format_diffusion_outputs": "output_formatter",
}


def members(kind: type) -> set[str]:
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set[str]()
    return fields | {name for name in vars(kind) if not name.startswith("__")}


@pytest.mark.parametrize("name", PLACES)
def test_vllm_omni_has_what_the_stand_in_has(name: str) -> None:
    """Every field and method of a class, every parameter of a function, in the module where the plugin looks."""
    real: Any = getattr(importlib.import_module(OMNI + PLACES[name]), name)
    real = inspect.unwrap(real)
    recorded = getattr(recorded_vllm_omni, name)
    if inspect.isclass(recorded):
        assert members(recorded) - {"_extra_params"} <= members(real)
    else:
        assert list(inspect.signature(recorded).parameters) == list(inspect.signature(real).parameters)


def test_the_runner_and_the_engine_import_by_name() -> None:
    """The plugin replaces the names that they have imported."""
    runner = importlib.import_module(f"{OMNI}worker.diffusion_model_runner")
    assert runner.get_cache_backend is importlib.import_module(f"{OMNI}cache.selector").get_cache_backend
    engine = importlib.import_module(f"{OMNI}diffusion_engine")
    formatter = importlib.import_module(f"{OMNI}output_formatter")
    assert engine.format_diffusion_outputs is formatter.format_diffusion_outputs


def test_sglang_has_what_the_stand_in_has() -> None:
    """The hooks, and the methods of the stage with their parameters."""
    pytest.importorskip("sglang.multimodal_gen")
    plugins = importlib.import_module("sglang.multimodal_gen.runtime.platforms.plugins")
    recorded: Any = recorded_sglang
    assert list(inspect.signature(recorded.HookRegistry.register).parameters) == list(
        inspect.signature(plugins.HookRegistry.register).parameters
    )
    assert {each.name: each.value for each in recorded.HookType} == {each.name: each.value for each in plugins.HookType}
    real = importlib.import_module("sglang.multimodal_gen.runtime.pipelines_core.stages.denoising").DenoisingStage
    stage = recorded.stage_class()
    for name in ("__init__", "_maybe_get_bcg_runner", "_run_denoising_loop"):
        expected, got = (inspect.signature(inspect.unwrap(getattr(kind, name))) for kind in (stage, real))
        assert list(expected.parameters) == list(got.parameters), name
