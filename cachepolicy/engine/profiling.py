"""Measures each site call of a profiled run, in a separate override, so that other runs pay nothing."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from cachepolicy.engine.class_swap import ATTRIBUTE, Method, Override
from cachepolicy.engine.hooks import LOCAL, SiteHandle
from cachepolicy.tracing.trace import Slice


def now() -> float:
    """Return `time.perf_counter` after CUDA has finished all queued work."""
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def timed(override: Override) -> Override:
    """Wrap an override so that it records the time of each call in the frame. Compiled calls are not timed."""

    def timed_override(original: Method) -> Method:
        intercepted = override(original)

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            frame = LOCAL.frame
            site: SiteHandle | None = self.__dict__.get(ATTRIBUTE)
            if frame is None or site is None or frame.owner is not site.owner or torch.compiler.is_compiling():
                return intercepted(self, *args, **kwargs)
            began = now()
            try:
                return intercepted(self, *args, **kwargs)
            finally:
                frame.profile.append(Slice(site.name, began, now() - began))

        return __call__

    return timed_override
