"""The interfaces of vLLM-Omni 0.30.0 that the plugin uses, as small stand-ins with the recorded names and signatures.

`tests/engines/test_recorded.py` compares them with the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from cachepolicy.testing.models import Toy, inputs
from tests.support.stand_ins import install


class CacheBackend:
    """Base class of caches."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.enabled = False

    def is_enabled(self) -> bool:
        return self.enabled


@dataclass
class DiffusionCacheConfig:
    """The cache config; keys that it does not know are kept apart."""

    rel_l1_thresh: float | None = None
    _extra_params: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DiffusionCacheConfig:
        known = {key: value for key, value in data.items() if key == "rel_l1_thresh"}
        return cls(**known, _extra_params={key: value for key, value in data.items() if key not in known})

    def __getattr__(self, item: str) -> Any:
        if item.startswith("__"):
            raise AttributeError(item)
        return self._extra_params.get(item)


@dataclass
class DiffusionOutput:
    """What a pipeline returns for a request."""

    output: Any = None
    error: str | None = None
    error_status_code: int | None = None
    error_type: str | None = None
    finished: bool = True


@dataclass
class OmniDiffusionSamplingParams:
    """What a request says of the sampling."""

    num_inference_steps: int | None = None
    seed: int | None = None
    extra_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class OmniDiffusionRequest:
    """A request."""

    prompt: Any
    sampling_params: OmniDiffusionSamplingParams
    request_id: str
    batch_compatibility_key: tuple[Any, ...] | None = None


@dataclass
class DiffusionRequestBatch:
    """The requests that the runner hands to `forward`."""

    requests: list[OmniDiffusionRequest]

    @property
    def request_ids(self) -> list[str]:
        return [request.request_id for request in self.requests]

    @property
    def request_id(self) -> str:
        return self.requests[0].request_id

    @property
    def sampling_params_list(self) -> list[OmniDiffusionSamplingParams]:
        return [request.sampling_params for request in self.requests]

    def is_dummy_run(self) -> bool:
        return self.request_id == "dummy_req_id"


@dataclass(frozen=True)
class RequestBatchSamplingParamsKey:
    """Requests with equal keys may share a batch."""

    num_inference_steps: int | None = None
    condition_key: tuple[Any, ...] | None = None


@dataclass
class OmniRequestOutput:
    """What the caller of the engine gets."""

    request_id: str
    images: list[Any]
    custom_output: dict[str, Any] = field(default_factory=dict)


@dataclass
class ForwardContext:
    """What the runner sets around a forward."""

    paged_kv_runtime: Any = None


def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
    if cache_backend in {None, "none"}:
        return None
    raise ValueError(f"Unsupported cache backend: {cache_backend}.")


def build_request_batch_sampling_params_key(request: OmniDiffusionRequest) -> RequestBatchSamplingParamsKey:
    steps = request.sampling_params.num_inference_steps
    return RequestBatchSamplingParamsKey(steps, request.batch_compatibility_key)


def format_diffusion_outputs(
    *, request: Any, od_config: Any, diffusion_output: Any, output_data: Any, postprocess_output: Any
) -> list[OmniRequestOutput]:
    return [OmniRequestOutput(request.request_id, [diffusion_output.output])]


_MODULES: dict[str, dict[str, Any]] = {
    "vllm.distributed.parallel_state": {"_TP": None},
    "vllm_omni.diffusion.cache.base": {"CacheBackend": CacheBackend},
    "vllm_omni.diffusion.cache.selector": {"get_cache_backend": get_cache_backend},
    "vllm_omni.diffusion.data": {"DiffusionOutput": DiffusionOutput, "DiffusionCacheConfig": DiffusionCacheConfig},
    "vllm_omni.diffusion.distributed.parallel_state": {"_SP": None},
    "vllm_omni.diffusion.worker.diffusion_model_runner": {"get_cache_backend": get_cache_backend},
    "vllm_omni.diffusion.diffusion_engine": {"format_diffusion_outputs": format_diffusion_outputs},
    "vllm_omni.diffusion.output_formatter": {"format_diffusion_outputs": format_diffusion_outputs},
    "vllm_omni.diffusion.sched.request_scheduler": {
        "build_request_batch_sampling_params_key": build_request_batch_sampling_params_key
    },
}


def installed(patch: pytest.MonkeyPatch, context: ForwardContext | None = None) -> None:
    """Let the stand-ins be what `import vllm_omni` finds, until the patch is undone."""
    shown = context or ForwardContext()
    install(patch, {**_MODULES, "vllm_omni.diffusion.forward_context": {"get_forward_context": lambda: shown}})


# --- a pipeline and its runner ---------------------------------------------------------------------------

TOY = Toy(blocks=4)
TIMES = [999.0, 850.0, 700.0, 550.0, 400.0, 250.0, 120.0, 60.0]


class TinyPipeline(nn.Module):
    """A pipeline for batches of requests, which calls its denoiser once for each branch of guidance."""

    supports_request_batch = True

    def __init__(self) -> None:
        super().__init__()
        self.transformer = TOY.build()
        self.batches: list[list[str]] = []

    def denoiser(self) -> nn.Module:
        return self.transformer

    def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
        self.batches.append(req.request_ids)
        params = req.sampling_params_list
        x = torch.cat([inputs(TOY, seed=each.seed or 0)[0] for each in params])
        branches = [torch.cat([inputs(TOY, seed=9)[1] for _ in params]) * weight for weight in (1.0, 0.1)]
        for time in TIMES[: params[0].num_inference_steps or len(TIMES)]:
            positive, negative = (self.denoiser()(x, torch.tensor([time]), y) for y in branches)
            x = x - 0.1 * (negative + 4 * (positive - negative))
        return [DiffusionOutput(output=row[None]) for row in x]


def request(name: str, said: Any = ..., *, seed: int = 0, steps: int | None = None) -> OmniDiffusionRequest:
    """Make a request that says `said` under `cachepolicy`, or nothing."""
    extra = {} if said is ... else {"cachepolicy": said}
    return OmniDiffusionRequest("a cat", OmniDiffusionSamplingParams(steps or len(TIMES), seed, extra), name)


class Runner:
    """What the runner of vLLM-Omni does with a pipeline and its cache."""

    def __init__(self, config: Any, pipeline: nn.Module | None = None) -> None:
        module = sys.modules["vllm_omni.diffusion.worker.diffusion_model_runner"]
        self.pipeline: Any = TinyPipeline() if pipeline is None else pipeline
        config = DiffusionCacheConfig.from_dict(config) if isinstance(config, dict) else config
        self.cache_backend = module.get_cache_backend("cachepolicy", config)
        self.cache_backend.enable(self.pipeline)

    def run(self, requests: Sequence[OmniDiffusionRequest]) -> list[DiffusionOutput]:
        self.cache_backend.refresh(self.pipeline, 8)
        with torch.inference_mode():
            outputs = self.pipeline.forward(DiffusionRequestBatch(list(requests)))
        assert isinstance(outputs, list)
        assert len(outputs) == len(requests)
        assert all(isinstance(output, DiffusionOutput) for output in outputs)
        return outputs
