"""The cache of a prompt's keys and values changes nothing, and is that of diffusers on its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import cachepolicy  # noqa: E402
from cachepolicy.testing.models import Toy, inputs  # noqa: E402
from tests.support import zoo  # noqa: E402

TIMESTEPS = [900.0, 700.0, 500.0, 300.0, 100.0]


def sampled(model: Any, entry: zoo.Entry, prompts: Mapping[str, int]) -> Iterator[Any]:
    """The predictions of a loop that calls the model once for each prompt, with the same tensors at each step."""
    conditions = {branch: entry.inputs(batch=1, seed=seed) for branch, seed in prompts.items()}
    x = next(iter(conditions.values()))[entry.latent]
    with torch.no_grad():
        for t in TIMESTEPS:
            for branch, known in conditions.items():
                moment = entry.inputs(batch=1, t=t, seed=0, x=x)
                given = {key: known.get(key, value) if "text" in key or "encoder" in key else value
                         for key, value in moment.items()}  # fmt: skip
                with model.cache_context(branch) if branch else contextlib.nullcontext():
                    prediction = zoo.output(model(**given))
                yield prediction.clone()
            x = x - 0.1 * prediction if x.shape == prediction.shape else x * 0.9


@pytest.mark.skipif(not hasattr(diffusers, "TextKVCacheConfig"), reason="this diffusers has no cache of prompts")
@pytest.mark.parametrize("prompts", [{"": 0}, {"cond": 0, "uncond": 1}], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize("trusted", [False, True])
def test_diffusers(prompts: Mapping[str, int], trusted: bool) -> None:
    """On the model for which diffusers has it, the predictions are diffusers' and the bare model's, bit for bit."""
    entry = zoo.entry("nucleusmoe")
    bare = [*sampled(zoo.build("nucleusmoe"), entry, prompts)]
    cached = zoo.build("nucleusmoe")
    cached.enable_cache(diffusers.TextKVCacheConfig())
    theirs = [*sampled(cached, entry, prompts)]
    model = zoo.build("nucleusmoe")
    with cachepolicy.apply(model, "textkv", steps=len(TIMESTEPS), trusted=trusted) as run:
        ours = [*sampled(model, entry, prompts)]
        assert {"CRRRR"} == {row for branch in run.trace.last.branches for row in run.trace.rows(branch).values()}
    assert len(prompts) * len(TIMESTEPS) == len(ours)
    assert all(map(torch.equal, bare, ours))
    assert all(map(torch.equal, theirs, ours))


@pytest.mark.parametrize("name", ["unet2d_condition", "wan", "pixart", "sana"])
def test_cross_attention(name: str) -> None:
    """The projections of a prompt in cross-attention run once for each prompt; models with contexts have two."""
    entry, model = zoo.entry(name), zoo.build(name)
    prompts = {"cond": 0, "uncond": 1} if hasattr(model, "cache_context") else {"": 0}
    bare = [*sampled(zoo.build(name), entry, prompts)]
    with cachepolicy.apply(model, "textkv", steps=len(TIMESTEPS)) as run:
        ours = [*sampled(model, entry, prompts)]
        rows = {row for branch in run.trace.last.branches for row in run.trace.rows(branch).values()}
    assert {"CRRRR"} == rows
    assert all(map(torch.equal, bare, ours))


def test_what_changes_is_computed() -> None:
    """Where the second stream changes from step to step behind the first block, its projections run at every step."""
    toy = Toy(cross=True, returns="tuple")
    x, y = inputs(toy)
    model, answers = toy.build(), list[Any]()
    with torch.no_grad(), cachepolicy.apply(model, "textkv", steps=4) as run:
        for step in range(4):
            answers.append(model(x * (1 - 0.2 * step), torch.tensor(900.0 - 200 * step), y))
        rows = run.trace.rows()
    with torch.no_grad():
        for step, answer in enumerate(answers):
            bare = model(x * (1 - 0.2 * step), torch.tensor(900.0 - 200 * step), y)
            assert torch.equal(bare, answer)
    assert {"blocks.0.cross.to_k": "CRRR", "blocks.0.cross.to_v": "CRRR"} == {
        name: row for name, row in rows.items() if ".0." in name
    }
    assert {"CCCC"} == {row for name, row in rows.items() if ".1." in name}
