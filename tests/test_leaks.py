"""What calls and sessions leave behind: counted, with the garbage collector off where references alone must do."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import cachepolicy
from cachepolicy.attached import RootCall
from cachepolicy.intercept import Frame
from cachepolicy.testing.models import Toy, inputs, sample
from cachepolicy.turn import Turn
from tests.soak import POLICIES, TIMESTEPS

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")


@pytest.fixture
def collected() -> Iterator[None]:
    """Nothing of other tests is counted, and nothing is collected while this one runs."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def alive(*kinds: type) -> Counter[str]:
    """How many objects of just these classes there are."""
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


@pytest.mark.usefixtures("collected")
def test_a_call_leaves_no_rubbish() -> None:
    """When a call has returned, everything of it but what is kept is gone, without the garbage collector."""
    model = Toy(blocks=3).build()
    x, y = inputs(Toy())
    for name, policy in POLICIES.items():
        with torch.no_grad(), cachepolicy.apply(model, policy, steps=len(TIMESTEPS)):
            for _ in sample(model, TIMESTEPS, x, y):
                assert Counter() == alive(Turn, Frame, RootCall), name
