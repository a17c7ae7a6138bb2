"""Checks on two processes with diffusers' context parallelism: tokens split by its hooks, on Flux and on Wan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import nn

import cachepolicy
from cachepolicy.engine.distributed import groups
from cachepolicy.engine.distributed.groups import peers_of
from cachepolicy.testing.models import Probes
from tests.support import zoo
from tests.support.ranks import gathered

diffusers.utils.logging.set_verbosity_error()
# On a CPU there are no accelerators, and diffusers counts processes by them.
torch.accelerator.device_count = lambda: 1

TIMESTEPS = (950.0, 880.0, 780.0, 720.0, 650.0, 520.0, 400.0, 300.0)
TEACACHE = r"""
signal modulated = output("^(transformer_)?blocks\.0\.norm1$")
signal change = relative_l1(modulated, prev(modulated))
match blocks when 0 < step while sum(change) < {} -> reuse residual
"""


def split(model: Any, *, anything: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=anything))


def predictions(name: str, model: Any, *, text: int) -> list[Any]:
    """A trajectory; `text` is the number of text tokens, which has to be even where all processes get as many."""
    one = zoo.entry(name)
    x, found = one.inputs()[one.latent], []
    for t in TIMESTEPS:
        arguments = one.inputs(t=t, x=x)
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :text]
        if "txt_ids" in arguments:
            arguments["txt_ids"] = arguments["txt_ids"][:text]
        found.append(zoo.output(model(**arguments, return_dict=False)))
        x = x - 0.1 * found[-1]
    return found


def run(
    name: str,
    policy: Any,
    spread: Callable[[Any], None] | None,
    *,
    first: str = "model",
    text: int = 4,
    **options: Any,
) -> Any:
    """Rows, predictions and executions of a trajectory, on a model that is spread over the processes or not."""
    model: Any = zoo.build(name)
    if spread is not None and first == "model":
        spread(model)
    with torch.no_grad(), cachepolicy.apply(model, policy, **options) as attached:
        if spread is not None and first == "policy":
            spread(model)
        probes = Probes(model)
        found = predictions(name, model, text=text)
        return attached.trace.rows(), found, probes.take(), attached.trace.last


def same(expected: Any, got: Any) -> None:
    assert expected[0] == got[0], (expected[0], got[0])
    assert expected[2] == got[2]
    for whole, mine in zip(expected[1], got[1], strict=True):
        torch.testing.assert_close(whole, mine, rtol=1e-4, atol=1e-4)
    assert gathered(got[0]) == [got[0]] * 2


def _both(name: str, policy: Any, spread: Callable[[Any], None] = split, **options: Any) -> None:
    expected = run(name, policy, None, process_group=False, **options)
    assert {"C", "R"} <= set("".join(expected[0].values())), expected[0]
    for first in ("model", "policy"):
        same(expected, run(name, policy, spread, first=first, **options))


# --- checks ----------------------------------------------------------------------------------------------


def first_block_cache_decides_as_alone(rank: int) -> None:
    """Decisions, executions and predictions of one process, whichever came first; the group is found. Each half of the
    tokens would have decided otherwise."""
    for name, threshold in (("flux", 0.9), ("wan", 0.25)):
        _both(name, "fbc", threshold=threshold)


def a_norm_inside_the_first_block_decides_as_alone(rank: int) -> None:
    """Wan splits the tokens at the door of this very block: what the span adds is of the split tokens."""
    for name, threshold in (("flux", 0.5), ("wan", 0.3)):
        _both(name, cachepolicy.parse(TEACACHE.format(threshold)))


def static_policies_say_nothing(rank: int) -> None:
    """They need no group, and none is made for them."""
    before = len(groups._all)
    for text in ("match attention every 2 -> reuse", "match blocks every 2 -> reuse residual"):
        for name in ("flux", "wan"):
            _both(name, cachepolicy.parse(text))
    assert before == len(groups._all)


def uneven_tokens_decide_as_alone(rank: int) -> None:
    """With `ulysses_anything` the processes hold different numbers of tokens."""
    _both("flux", "fbc", lambda model: split(model, anything=True), text=5, threshold=0.9)


def compiled_blocks_decide_as_alone(rank: int) -> None:
    """The message goes between the graphs."""

    def compiled(model: Any) -> None:
        split(model)
        model.compile_repeated_blocks(backend="eager")

    _both("wan", "fbc", compiled, threshold=0.25)


def the_group_is_found_where_it_is(rank: int) -> None:
    """On the model, inside a wrapper, and not before it is spread; a list of ranks for each of its forms."""

    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    model: Any = zoo.build("flux")
    assert peers_of(None, model) is None
    split(model)
    found = peers_of(None, model)
    assert found is not None
    assert found.ranks == (0, 1)
    assert found is peers_of(None, Wrapper(model))
    assert found is peers_of(model._parallel_config.context_parallel_config._flattened_mesh, nn.Identity())
    assert found is peers_of(dist.group.WORLD, nn.Identity())
    assert peers_of(False, model) is None
    assert peers_of(dist.new_group([rank], use_local_synchronization=True), model) is None
