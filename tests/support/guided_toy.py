"""A toy model whose caller names the branch of a call."""

from __future__ import annotations

import contextlib

from cachepolicy.testing.models import ToyDiT


class GuidedToy(ToyDiT):
    """A toy with the `cache_context` by which the pipelines of diffusers name the branch of a call."""

    def cache_context(self, name: str) -> contextlib.AbstractContextManager[str]:
        """Name the branch of the calls inside. The context itself does nothing, because the engine reads the name."""
        return contextlib.nullcontext(name)
