"""A denoiser of one linear map and diffusers' schedulers, for tests of the clock."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn


class Root(nn.Module):
    """A denoiser of one linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, x: Tensor, timestep: Any = None, y: Any = None) -> Tensor:
        return self.lin(x)


def scheduler_of(name: str, steps: int) -> Any:
    """The scheduler of diffusers with that name, with its timesteps set."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(steps)
    return scheduler
