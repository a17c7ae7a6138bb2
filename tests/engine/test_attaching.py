"""Attaching and removing from several threads at once: one run at a time is on a model, and all of it or nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.engine.apply import run_of
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, inputs, sample

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")

TRIES = 60
TIMESTEPS = (950.0, 850.0, 750.0, 650.0)
POLICY = parse("match attention every 2 -> reuse\nmatch feedforward every 2 -> reuse")


@pytest.fixture(autouse=True)
def _fast_switches() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual, so that races show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls on threads that start together, and return their results or their exceptions."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def work(number: int, call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[number] = call()
        except Exception as error:  # noqa: BLE001 (it is looked at afterwards)
            results[number] = error

    threads = [threading.Thread(target=work, args=(number, call)) for number, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def code(error: object) -> str:
    assert isinstance(error, PolicyError), error
    return error.diagnostics[0].code


def is_bare(model: nn.Module) -> bool:
    return all(
        "_cachepolicy" not in module.__dict__ and not hasattr(type(module), "_cachepolicy_class")
        for module in model.modules()
    )


@torch.no_grad()
def run(model: nn.Module) -> list[Tensor]:
    x, y = inputs(Toy())
    return list(sample(model, TIMESTEPS, x, y))


def works(model: nn.Module, attached: Any) -> bool:
    """Return whether the run is the one on the model, and every site of it reuses at every second step."""
    run(model)
    return run_of(model) is attached and {"CRCR"} == set(attached.trace.rows().values())


def test_of_two_applies_one_succeeds() -> None:
    """One thread gets a run that works, the other the usual error, whichever model class is hooked the first time."""
    for _ in range(TRIES):
        model = Toy().build()
        results = at_once(*[lambda model=model: cachepolicy.apply(model, POLICY)] * 2)
        attached = [result for result in results if not isinstance(result, Exception)]
        assert 1 == len(attached), results
        assert ["E301"] == [code(result) for result in results if isinstance(result, Exception)]
        assert works(model, attached[0])
        attached[0].remove()
        assert is_bare(model)


def test_two_models_at_once() -> None:
    """Runs on two models do not disturb each other while they are attached and removed."""
    for _ in range(TRIES):
        models = Toy().build(), Toy().build()
        runs = at_once(*(lambda model=model: cachepolicy.apply(model, POLICY) for model in models))
        assert all(works(model, attached) for model, attached in zip(models, runs, strict=True))
        assert type(models[0]) is type(models[1])
        assert [None, None] == at_once(*(attached.remove for attached in runs))
        assert all(map(is_bare, models))


def test_two_removals_at_once() -> None:
    """The hooks are removed once, and the second removal has no effect or finds no policy."""
    for _ in range(TRIES):
        model = Toy().build()
        attached = cachepolicy.apply(model, POLICY)
        results = at_once(attached.remove, lambda model=model: cachepolicy.remove(model))
        assert [] == [result for result in results if result is not None and code(result) != "E302"]
        assert is_bare(model)


def test_a_removal_and_an_apply_at_once() -> None:
    """The new run is refused or works as a whole, and nothing of the old run stays."""
    outcomes = set[bool]()
    for number in range(TRIES):
        model = Toy().build()
        old = cachepolicy.apply(model, POLICY)
        calls = [old.remove, lambda model=model: cachepolicy.apply(model, POLICY)]
        results = dict(zip(("remove", "apply"), at_once(*calls), strict=True))
        assert results["remove"] is None
        new = results["apply"]
        outcomes.add(isinstance(new, Exception))
        if isinstance(new, Exception):
            assert "E301" == code(new)
            new = cachepolicy.apply(model, POLICY)
        assert works(model, new), number
        old.remove()
        assert works(model, new)
        new.remove()
        assert is_bare(model)
    assert outcomes


def test_a_removal_and_calls_at_once() -> None:
    """A removal is refused while a call runs; afterwards it leaves nothing. Calls give what they give alone."""
    bare = run(Toy().build())
    model = Toy().build()
    with cachepolicy.apply(model, POLICY):
        cached = run(model)
    for _ in range(TRIES):
        attached = cachepolicy.apply(model, POLICY)
        outputs, removed = at_once(lambda: run(model), attached.remove)
        assert len(TIMESTEPS) == len(outputs)
        if removed is not None:
            assert "E305" == code(removed)
            assert all(map(torch.equal, cached, outputs))
            attached.remove()
        assert is_bare(model)
        assert all(map(torch.equal, bare, run(model)))
