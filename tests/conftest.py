"""One thread a worker, no downloads, and how many examples hypothesis draws: `HYPOTHESIS_PROFILE=dev|ci|deep`.

In the profile `deep` the number depends on what an example costs, see `DEEP`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow]  # a loaded machine is not a bad strategy

settings.register_profile("dev", max_examples=20, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", max_examples=50, deadline=None, suppress_health_check=_SLOW, derandomize=True)
settings.register_profile("deep", max_examples=200, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

DEEP = {"language": 1000, "planning": 1000, "conformance": 300, "methods": 300}
"""The examples that each property of a folder gets in the profile `deep`, where these are not as many as everywhere."""
for _folder, _examples in DEEP.items():
    settings.register_profile(f"deep {_folder}", settings.get_profile("deep"), max_examples=_examples)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Load the profile of a module's folder; properties take the profile that holds when their module is imported."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "deep" and isinstance(collector, pytest.Module):
        folder = collector.path.parent.name
        settings.load_profile(f"deep {folder}" if folder in DEEP else "deep")


@pytest.fixture(autouse=True)
def _gradients_as_they_were() -> Iterator[None]:
    """A loop that is given up inside `torch.no_grad()` leaves gradients off in its thread; the next test is not its."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_grad_enabled(True)


@pytest.fixture(autouse=True)
def _attention_backend_as_it_was() -> Iterator[None]:
    """No test leaves a backend behind for all models of the process, as `model.set_attention_backend` does.

    `_native_math` and its like enter `torch.nn.attention.sdpa_kernel`, whose flags are those of the process. A thread
    that leaves it changes the kernel of the others, so that even the bare model computes other bits than alone.
    """
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        active, _ = dispatch._AttentionBackendRegistry.get_active_backend()
        assert dispatch.DIFFUSERS_ATTN_BACKEND == active


@pytest.fixture(scope="module")
def _thawed() -> Iterator[None]:
    """Let the collector look at everything again after the tests of a module."""
    yield
    gc.unfreeze()


@pytest.fixture
def only_new_objects(_thawed: None) -> None:
    """The collector looks only at objects that the test makes: it takes no time, and nothing of other tests counts."""
    gc.collect()
    gc.freeze()
