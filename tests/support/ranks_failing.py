"""Checks on two processes of which one fails, stays silent or dies: the other is told, and does not wait for ever."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.testing.models import Toy, ToyDiT, failing, sample
from tests.support.ranks_toy import POLICIES, TIMESTEPS, given, run

POLICY = cachepolicy.parse(POLICIES["on the way"])


def going(model: ToyDiT, group: Any, **options: Any) -> dict[str, str]:
    with torch.no_grad(), cachepolicy.apply(model, POLICY, process_group=group, **options) as attached:
        list(sample(model, TIMESTEPS, *given()))
        return attached.trace.rows()


def well_again(group: Any) -> None:
    """Both run from the start as if nothing had been."""
    expected = run(Toy(blocks=3).build(), POLICIES["on the way"], *given(), process_group=False)[0]
    assert expected == going(Toy(blocks=3).build(), group)


class Doing:
    """A timestep function that does something else at one step."""

    def __init__(self, step: int, what: Any) -> None:
        self.times = iter(TIMESTEPS)
        self.step, self.what = step, what

    def __call__(self) -> float:
        t = next(self.times)
        if t == TIMESTEPS[self.step]:
            self.what()
        return t


def _raise() -> None:
    raise MemoryError


# --- checks ----------------------------------------------------------------------------------------------


def a_forward_that_raises_is_heard(rank: int) -> None:
    """At the next decision, by the number of the process that failed."""
    for step in (0, 3):
        model = failing(Toy(blocks=3).build(), [step] if rank else [])
        with pytest.raises(
            (PolicyError, RuntimeError), match="the forward failed" if rank else "E350.*process 1 failed"
        ):
            going(model, dist.group.WORLD)
        well_again(dist.group.WORLD)


def a_clock_that_raises_is_heard(rank: int) -> None:
    """Whether in the middle or before anything was decided."""
    for step in (4, 0):
        options = {"timestep": Doing(step, _raise)} if rank else {}
        with pytest.raises(MemoryError if rank else PolicyError) as caught:
            going(Toy(blocks=3).build(), dist.group.WORLD, **options)
        assert rank or caught.value.diagnostics[0].code == "E350"
        well_again(dist.group.WORLD)


def other_settings_are_noticed(rank: int) -> None:
    """Nobody decides by the other's numbers."""
    other = POLICIES["on the way"].replace("0.12", str(0.12 + rank))
    with pytest.raises(PolicyError) as caught:
        run(Toy(blocks=3).build(), other, *given(), process_group=dist.group.WORLD)
    assert caught.value.diagnostics[0].code == "E351"
    well_again(dist.group.WORLD)


def silence_ends_with_the_timeout_of_the_group(rank: int) -> None:
    """Both get an error, and a new trajectory makes a new group."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    options = {"timestep": Doing(3, lambda: time.sleep(3))} if rank else {}
    with pytest.raises(PolicyError, match="did not all answer") as caught:
        going(Toy(blocks=3).build(), group, **options)
    assert caught.value.diagnostics[0].code == "E352"
    dist.barrier()
    well_again(group)


def a_process_that_dies_is_noticed(rank: int) -> None:
    """It says nothing at all; its connections end with it. Comes last."""
    options = {"timestep": Doing(3, lambda: os._exit(0))} if rank else {}
    with pytest.raises(PolicyError) as caught:
        going(Toy(blocks=3).build(), dist.group.WORLD, **options)
    assert caught.value.diagnostics[0].code == "E352"
