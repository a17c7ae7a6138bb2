"""Gradients through a model with a policy: bitwise those of the bare model, or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import cachepolicy
from cachepolicy.engine.options import RunOptions
from cachepolicy.errors import PolicyError
from cachepolicy.testing.models import Toy, ToyDiT

POLICIES = {
    "site": "match attention every 2 -> reuse",
    "span": "match blocks every 2 -> reuse residual",
    "predict": "match attention every 2 -> predict taylor(order: 1)",
    "model": "match model every 2 -> reuse",
    "signal": """\
signal drift = relative_l1(input(model), prev(input(model)))
match blocks while drift < 9 -> reuse residual
""",
}
COMPUTED, REUSED = 900.0, 800.0


@pytest.fixture
def model() -> ToyDiT:
    torch.manual_seed(0)
    return ToyDiT(Toy(blocks=2)).eval()


def inputs(model: ToyDiT) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = model.toy.width
    return torch.randn(1, 4, width, generator=generator), torch.randn(1, 3, width, generator=generator)


def call(model: nn.Module, x: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
    return model(x, torch.tensor([t]), y)


def gradient(model: ToyDiT, t: float) -> torch.Tensor:
    """The gradient of the latents."""
    x, y = inputs(model)
    x.requires_grad_()
    call(model, x, y, t).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("policy", POLICIES)
def test_a_computed_step_passes_the_gradients_of_the_bare_model(model: ToyDiT, policy: str) -> None:
    """At a step that computes everything, the gradient of the latents is bitwise the bare model's."""
    expected = gradient(model, COMPUTED)
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES[policy])):
        assert torch.equal(expected, gradient(model, COMPUTED))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_reuse_that_would_cut_a_gradient_is_refused(model: ToyDiT, policy: str) -> None:
    """E343: the latents require grad, and the step reuses."""
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES[policy])):
        gradient(model, COMPUTED)
        with pytest.raises(PolicyError, match="an input of `ToyDiT` requires grad") as caught:
            gradient(model, REUSED)
    assert "E343" == caught.value.diagnostics[0].code


def test_a_loop_on_its_own_outputs_is_not_refused(model: ToyDiT) -> None:
    """Latents that require grad only since they come from the model's own parameters are sampled on."""
    x, y = inputs(model)
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"])), pytest.warns(UserWarning, match="W605"):
        for t in (900.0, 800.0, 700.0, 600.0):
            x = x - 0.1 * call(model, x, y, t)
    assert x.requires_grad


def test_a_gradient_of_scaled_latents_is_refused(model: ToyDiT) -> None:
    """The tensor that requires grad may lie behind operations of the loop, and behind earlier steps."""
    x, y = inputs(model)
    x.requires_grad_()
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"])):
        first = x - 0.1 * call(model, x * 0.5, y, COMPUTED)
        with pytest.raises(PolicyError, match="E343"):
            call(model, first * 0.5, y, REUSED)


@pytest.mark.parametrize("options", [RunOptions(gradients="detach"), {"gradients": "detach"}])
def test_detach_treats_reused_results_as_constants(model: ToyDiT, options: Any) -> None:
    """Where that is said, a reusing step runs, and nothing warns."""
    with (
        warnings.catch_warnings(),
        cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"]), options=options),
    ):
        warnings.simplefilter("error")
        gradient(model, COMPUTED)
        assert not torch.equal(torch.zeros(1), gradient(model, REUSED))


def test_an_adapter_in_training_is_refused_and_one_in_use_is_not(model: ToyDiT) -> None:
    """Some trainable parameters in training mode are an adapter; in eval mode the model samples."""
    model.requires_grad_(requires_grad=False)
    model.out.requires_grad_()
    x, y = inputs(model)
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"])) as run:
        call(model, x, y, COMPUTED)
        with pytest.warns(UserWarning, match="W605"):
            call(model, x, y, REUSED)
        run.reset()
        model.train()
        call(model, x, y, COMPUTED)
        with pytest.raises(PolicyError, match="an adapter of `ToyDiT` is being trained"):
            call(model, x, y, REUSED)


def test_trainable_parameters_alone_warn_once(model: ToyDiT) -> None:
    """A model that is called without `no_grad` samples as before, with one warning."""
    x, y = inputs(model)
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"])), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in (900.0, 800.0, 700.0, 600.0):
            call(model, x, y, t)
    assert 1 == sum("W605" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_checked(model: ToyDiT, mode: type) -> None:
    """Under `no_grad` and inference mode, latents that require grad are no matter."""
    x, y = inputs(model)
    x.requires_grad_()
    with (
        warnings.catch_warnings(),
        mode(),
        cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"])) as run,
    ):
        warnings.simplefilter("error")
        call(model, x, y, COMPUTED)
        call(model, x, y, REUSED)
        assert run.trace is not None
        assert {"CR"} == {*run.trace.rows().values()}


def test_a_refused_call_leaves_no_history(model: ToyDiT) -> None:
    """After the error, the session begins anew, and the next call computes."""
    x, y = inputs(model)
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"])):
        gradient(model, COMPUTED)
        with pytest.raises(PolicyError, match="E343"):
            gradient(model, REUSED)
        with torch.no_grad():
            answered = call(model, x, y, 700.0)
    assert torch.equal(call(model, x, y, 700.0), answered)


WRONG = [({"gradient": "detach"}, "no `gradient`"), ({"gradients": "x"}, "gradients"), (3, "options")]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused(model: ToyDiT, options: Any, message: str) -> None:
    """E309 names the option and the nearest right one."""
    with pytest.raises(PolicyError, match=message) as caught:
        cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"]), options=options)
    assert "E309" == caught.value.diagnostics[0].code


def test_a_keyword_takes_precedence_over_options(model: ToyDiT) -> None:
    """`trace=False` beside other options keeps no trace."""
    options = RunOptions(gradients="detach")
    with cachepolicy.apply(model, cachepolicy.parse(POLICIES["site"]), trace=False, options=options) as run:
        assert run.trace is None
