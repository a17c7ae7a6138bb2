"""DiffSynth's Wan, whose pipelines loop over `dit.blocks` and never call the model. Needs `diffsynth`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffsynth")

import torch
from diffsynth.models.wan_video_dit import WanModel  # pyright: ignore[reportMissingImports]
from diffsynth.pipelines.wan_video import model_fn_wan_video  # pyright: ignore[reportMissingImports]
from torch import Tensor

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import redraw

TIMES = [900.0, 800.0, 600.0, 500.0, 300.0, 100.0]
LATENTS = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = {
    name: torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(("cond", "uncond"), 1)
}


class Called(WanModel):
    """The same model, with the function of the pipeline as its `forward`."""

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return evaluate(self, latents, timestep, context)


def evaluate(dit: Any, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    return model_fn_wan_video(dit, latents=latents, timestep=timestep, context=context)


def build(kind: type) -> Any:
    sizes = {"dim": 24, "in_dim": 4, "ffn_dim": 32, "out_dim": 4, "text_dim": 16, "freq_dim": 16}
    model = kind(**sizes, eps=1e-6, patch_size=(1, 2, 2), num_heads=2, num_layers=4, has_image_input=False)
    redraw(model, 0)
    return model.eval()


def called(dit: Any, run: Any, x: Tensor, t: float, name: str) -> Tensor:
    return dit(x, torch.tensor([t]), PROMPTS[name])


def stepped(dit: Any, run: Any, x: Tensor, t: float, name: str) -> Tensor:
    with run.step(t=t, branch=name):
        return evaluate(dit, x, torch.tensor([t]), PROMPTS[name])


def sample(call: Callable[..., Tensor], dit: Any, run: Any) -> Tensor:
    x = LATENTS
    for t in TIMES:
        cond, uncond = (call(dit, run, x, t, name) for name in ("cond", "uncond"))
        x = x - 0.1 * (uncond + 4 * (cond - uncond))
    return x


@pytest.mark.parametrize(
    "text",
    [
        'match "_attn$" every 2 -> reuse',
        "match blocks[1:] every 3 -> reuse residual",
        "match each blocks when step > 1 every 2 -> predict taylor(order: 1)",
    ],
)
def test_a_step_context_is_a_call_of_the_model(text: str) -> None:
    """The same decisions and latents as the same function called as the model's `forward`."""
    results = list[Any]()
    for call, kind in ((called, Called), (stepped, WanModel)):
        dit = build(kind)
        with torch.no_grad(), cachepolicy.apply(dit, parse(text)) as run:
            latents = sample(call, dit, run)
            results.append((latents, [run.trace.rows(name) for name in run.trace.last.branches]))
    (expected, rows), (got, rows_too) = results
    assert torch.equal(expected, got)
    assert rows == rows_too
    assert "R" in "".join(rows[0].values())


def test_the_example_of_the_documents_follows_a_pipeline() -> None:
    """A pipeline calls its `model_fn` with the prompt, then with the negative prompt, at each timestep."""
    page = (Path(__file__).parents[2] / "docs" / "engines" / "diffsynth.md").read_text("utf-8")
    example = re.search(r"^```text\n(import cachepolicy\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert example is not None
    text = example[1].replace('"fbc", threshold=0.1', "policy")
    policy = parse('match "_attn$" every 2 -> reuse')
    pipe = SimpleNamespace(dit=build(WanModel), model_fn=model_fn_wan_video)
    names: dict[str, Any] = {"pipe": pipe, "policy": policy}
    exec(text, names)
    dit = build(WanModel)
    with torch.no_grad(), cachepolicy.apply(dit, policy) as run:
        expected = sample(stepped, dit, run)
        rows = [run.trace.rows(name) for name in ("cond", "uncond")]
        for _ in range(2):  # the second picture is a trajectory of its own
            got = sample(
                lambda dit, run, x, t, name: pipe.model_fn(
                    dit=pipe.dit, latents=x, timestep=torch.tensor([t]), context=PROMPTS[name]
                ),
                pipe.dit,
                None,
            )
            assert torch.equal(expected, got)
            assert rows == [names["run"].trace.rows(name) for name in ("cond", "uncond")]
    assert "R" in "".join(rows[0].values())
