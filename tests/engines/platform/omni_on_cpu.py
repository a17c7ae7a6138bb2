"""For tests: vLLM-Omni has no platform for CPUs. This one suffices for tiny models."""

from __future__ import annotations

import functools
from typing import Any


def register() -> str:
    """The entry point of the platform."""
    return "omni_on_cpu.CpuOmniPlatform"


def run_outputs_without_a_stream() -> None:
    """Let the worker processes send their results without the side stream of an accelerator, which a CPU has not."""
    import vllm_omni.diffusion.worker.diffusion_worker as worker

    def loop(self: Any) -> None:
        while (item := self._async_output_queue.get()) is not None:
            output, key, _event = item
            try:
                worker.pack_diffusion_output_shm(output)
                ready = worker.AsyncOutputKind.OUTPUT_READY
                self._enqueue_result(worker.AsyncDiffusionOutput(kind=ready, async_output_id=key, output=output))
            finally:
                with self._async_output_done:
                    self._async_output_pending = max(0, self._async_output_pending - 1)
                    self._async_output_done.notify_all()

    if hasattr(worker, "WorkerProc"):
        worker.WorkerProc._async_output_loop = loop


@functools.cache
def _made(name: str) -> type:
    """The classes are made when they are asked for: vLLM-Omni imports its plugins while it is itself being imported."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    if name == "CpuSDPABackend":
        from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl

        class CpuSDPAImpl(SDPAImpl):
            forward = SDPAImpl.forward_cuda  # nothing of it needs CUDA

        class CpuSDPABackend(SDPABackend):
            @staticmethod
            def get_impl_cls() -> type:
                return CpuSDPAImpl

        return CpuSDPABackend

    answers = {
        "get_diffusion_attn_backend_cls": "omni_on_cpu.CpuSDPABackend",
        "supports_torch_inductor": True,
        "get_torch_device": torch.device("cpu"),
        "set_device": None,
        "current_device": 0,
        "is_initialized": True,
        "get_device_count": 2,
        "get_device_version": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_reserved": 0,
        "max_memory_allocated": 0,
        "get_free_memory": 8 << 30,
        "get_device_memory": (8 << 30, 16 << 30),
    }

    def answering(answer: Any) -> classmethod:
        return classmethod(lambda cls, *args, **kwargs: answer)

    members = {name: answering(answer) for name, answer in answers.items()}
    members |= {"_omni_enum": OmniPlatformEnum.OOT, "dist_backend": "gloo", "__module__": __name__}
    return type("CpuOmniPlatform", (OmniPlatform, CpuPlatform), members)


def __getattr__(name: str) -> Any:
    if name not in {"CpuOmniPlatform", "CpuSDPABackend"}:
        raise AttributeError(name)
    return _made(name)
