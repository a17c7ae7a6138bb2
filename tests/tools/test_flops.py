"""FLOPs by module are those of what really ran, on every device."""

from __future__ import annotations

import torch
from torch import nn

import cachepolicy
from cachepolicy.tools.flops import count, counting


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.heads = _Heads()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(*self.first(x).chunk(3, dim=-1))


class _Heads(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


LINEAR = 2 * 3 * 16 * 8 * 24
ATTENTION = 2 * 3 * 16 * 16 * (8 + 8)


def test_attention_counts_on_the_cpu():
    """The CPU's attention kernel counts two products a head, as the formula says."""
    flops = count(_Attends(), torch.randn(3, 16, 8))
    assert LINEAR + ATTENTION == flops.total
    assert {"": LINEAR + ATTENTION, "first": LINEAR, "heads": ATTENTION} == dict(flops.modules)
    assert {"": 1, "first": 1, "heads": 1} == dict(flops.calls)


def test_cpu_and_meta_agree():
    """A forward on the meta device, which computes nothing, counts the same."""
    with torch.device("meta"):
        flops = count(_Attends(), torch.empty(3, 16, 8))
    assert LINEAR + ATTENTION == flops.total


def test_inference_mode_counts_the_same():
    """Modes that pass operations on undecomposed change nothing."""
    model, x = _Attends(), torch.randn(3, 16, 8)
    with torch.inference_mode(), counting(model) as flops:
        model(x)
    assert LINEAR + ATTENTION == flops.total


def test_several_calls_add_up():
    """Everything inside the `with` counts."""
    model, x = _Attends(), torch.randn(3, 16, 8)
    with torch.no_grad(), counting(model) as flops:
        model(x)
        model(x)
    assert 2 * (LINEAR + ATTENTION) == flops.total
    assert 2 == flops.calls["heads"]


def test_a_failing_module_leaves_the_books_in_order():
    """After an error inside a module the next count is right, and no hook stays behind."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 9))
    x = torch.randn(2, 8)
    with torch.no_grad(), counting(model) as flops:
        try:
            model(x)
        except RuntimeError:
            model[0](x)
    assert 2 * (2 * 2 * 8 * 8) == flops.modules["0"]
    before = flops.total
    model[0](x)
    assert before == flops.total


def test_an_answered_module_counts_nothing():
    """What a policy answers from its history has not run."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    policy = cachepolicy.parse('match "^1$" every 2 -> reuse')
    x = torch.randn(2, 8)
    with cachepolicy.apply(model, policy), torch.no_grad(), counting(model) as flops:
        for _ in range(4):
            model(x)
    assert {"": 4, "0": 4, "1": 2} == dict(flops.calls)
    assert 6 * (2 * 2 * 8 * 8) == flops.total
