"""Modules whose inputs are split by a hook before their forward: residuals are of what the forward was given."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from diffusers.hooks.context_parallel import ContextParallelSplitHook  # noqa: E402
from diffusers.hooks.hooks import HookRegistry  # noqa: E402
from diffusers.models._modeling_parallel import ContextParallelInput  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.engine.compat import split_arguments  # noqa: E402
from cachepolicy.testing.models import Probes, Toy, ToyDiT, inputs, sample  # noqa: E402

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0)

POLICIES = {
    "one span of all blocks": "match blocks every 2 -> reuse residual",
    "a decision on the way": """
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift < 0.2 -> reuse residual
""",
    "a probe before the first block": """
signal x = input(blocks[0])
signal change = l1(x, prev(x)) + 0.1
match blocks while sum(change) < 0.3 -> reuse residual
""",
    "each block by itself": "match each blocks every 2 -> reuse residual",
    "attention inside": "match attention every 3 -> reuse",
    "a predictor": "match blocks every 3 -> predict taylor(order: 1) of residual",
}


class FirstHalf(ContextParallelSplitHook):
    """The split hook as on the first of two ranks, without any processes."""

    def _prepare_cp_input(self, x: Any, cp_input: Any) -> Any:
        return x.chunk(2, dim=cp_input.split_dim)[0]


def split(model: ToyDiT) -> None:
    """Let the first block take the first half of the tokens, as diffusers' plan for Wan does."""
    hook = FirstHalf({"x": ContextParallelInput(split_dim=1, expected_dims=3)}, None)
    HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(hook, "cp_input---blocks.0")


def run(policy: str, *, first: str | None) -> tuple[list[Any], dict[str, str], dict[str, int]]:
    """Outputs, rows and executions; `first` says what came first, None halves the tokens without any hook."""
    model = Toy(blocks=3).build()
    x, y = inputs(Toy())
    if first == "hook":
        split(model)
    with torch.no_grad(), cachepolicy.apply(model, cachepolicy.parse(policy)) as run:
        if first == "policy":
            split(model)
        probes = Probes(model)
        start = x if first else x[:, :2]
        outputs = list(sample(model, TIMESTEPS, start, y, still=True))
        return outputs, run.trace.rows(), probes.take()


@pytest.mark.parametrize("first", ["hook", "policy"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_split_input_gives_what_split_tokens_give(name: str, first: str) -> None:
    """Bitwise the outputs, decisions and executions of a model that is given the half without a hook, in both orders
    of hook and policy."""
    expected, rows, counts = run(POLICIES[name], first=None)
    got, its_rows, its_counts = run(POLICIES[name], first=first)
    assert rows == its_rows
    assert counts == its_counts
    assert "R" in "".join(rows.values())
    assert all(map(torch.equal, expected, got))


def test_modules_without_such_a_hook_are_given_what_they_are_called_with() -> None:
    """Neither a module without hooks nor one with others is asked for anything."""
    model = Toy().build()
    args, kwargs = (torch.zeros(1),), {"y": 1}
    assert (args, kwargs) == split_arguments(model, args, kwargs)
    HookRegistry.check_if_exists_or_initialize(model)
    assert (args, kwargs) == split_arguments(model, args, kwargs)
