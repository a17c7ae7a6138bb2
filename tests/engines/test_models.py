"""Policies on tiny models as vLLM-Omni, SGLang and DiffSynth build them, without the rest of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm_omni")

import torch
from torch import Tensor

import cachepolicy
from cachepolicy.engine.introspection import describe
from cachepolicy.integrations.vllm_omni import unpack
from cachepolicy.planning.module_tree import tree_from_json
from cachepolicy.testing.models import redraw
from tests.support import engine_models
from tests.support.engine_models import draw

TIMES = [999.0, 850.0, 700.0, 550.0, 400.0, 250.0, 120.0, 60.0]


def built(family: str) -> tuple[Any, Callable[[Tensor, float, int], Tensor], Tensor]:
    """A model of vLLM-Omni, its call as the pipeline makes it, and the first latents."""
    model = engine_models.BUILDERS["vllm_omni", family]()
    redraw(model, 0)
    for module in model.modules():  # vLLM prepares the weights of its layers when they are loaded
        method = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)
    model.eval()
    unpack(model)  # as the plugin does
    if family == "sd3":
        said = engine_models.prompts(16, 16)

        def call(x: Tensor, t: float, branch: int) -> Tensor:
            return model(hidden_states=x, timestep=torch.tensor([t]), return_dict=False, **said[branch])[0]

        return model, call, draw(1, 4, 16, 16)
    if family == "flux":
        said = engine_models.prompts(32, 32)
        words, places = engine_models.flux_positions().split((5, 16))

        def call(x: Tensor, t: float, branch: int) -> Tensor:
            given = {"img_ids": places, "txt_ids": words, "return_dict": False, **said[branch]}
            return model(hidden_states=x, timestep=torch.tensor([t / 1000]), **given)[0]

        return model, call, draw(1, 16, 4)
    if family == "qwen_image":
        mask = torch.ones(1, 5, dtype=torch.long)
        said = [{"encoder_hidden_states": draw(1, 5, 16, seed=n), "encoder_hidden_states_mask": mask} for n in (0, 1)]

        def call(x: Tensor, t: float, branch: int) -> Tensor:
            given = {"img_shapes": [[(1, 4, 4)]], "txt_seq_lens": [5], "return_dict": False, **said[branch]}
            return model(hidden_states=x, timestep=torch.tensor([t / 1000]), **given)[0]

        return model, call, draw(1, 16, 16)
    if family == "wan":
        said = [{"encoder_hidden_states": draw(1, 5, 16, seed=n)} for n in (0, 1)]

        def call(x: Tensor, t: float, branch: int) -> Tensor:
            return model(hidden_states=x, timestep=torch.tensor([t]), return_dict=False, **said[branch])[0]

        return model, call, draw(1, 4, 3, 8, 8)
    prompts = [[draw(32, 16, seed=n)] for n in (0, 1)]

    def call(x: Tensor, t: float, branch: int) -> Tensor:
        result = model([x[0]], torch.tensor([1 - t / 1000]), prompts[branch])[0]
        return (result[0] if isinstance(result, list | tuple) else result)[None]

    return model, call, draw(1, 4, 1, 16, 16)


@torch.no_grad()
def sampled(call: Callable[[Tensor, float, int], Tensor], x: Tensor, branches: int) -> Tensor:
    for t in TIMES:
        prediction = sum(call(x, t, branch) for branch in range(branches)) / branches
        x = x - 0.05 * prediction / prediction.abs().mean()
    return x


POLICIES = {
    "match feedforward every 2 -> reuse\n": "CRCRCRCR",
    "match attention when 100 < t < 800 every 2 -> reuse\n": "CCCRCRCC",
    "match each blocks every 2 -> reuse residual\n": "CRCRCRCR",
    "match blocks[1:] when 100 < t < 950 every 2 -> reuse residual\n": "CRCRCRCC",
    "match model on {0, 1, 2, 4, 6} -> predict taylor(order: 1)\n": "CCCRCRCR",
    "use fbc with threshold = 50.0\n": "CRRRRRRR",
}


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("family", engine_models.FAMILIES)
def test_a_policy_acts_on_a_model_of_vllm_omni(family: str, branches: int) -> None:
    """Every kind of rule decides as the policy says, by the clock of the timestep argument; then the model is bare."""
    model, call, x = built(family)
    bare = sampled(call, x, branches)
    for text, row in POLICIES.items():
        with cachepolicy.apply(model, cachepolicy.parse(text)) as run:
            latents = sampled(call, x, branches)
            branch_names = run.trace.last.branches
            rows = [row for name in branch_names for row in run.trace.rows(name).values()]
        assert branches == len(branch_names)
        assert {row} == set(rows), text
        assert latents.isfinite().all()
        assert not torch.equal(bare, latents)
        assert torch.equal(bare, sampled(call, x, branches))


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_compiled_before_apply_is_as_apply_alone(family: str) -> None:
    """vLLM-Omni compiles the blocks when it loads a model, and attaches its cache afterwards."""
    from vllm_omni.diffusion.compile import regionally_compile

    policy = cachepolicy.parse("match blocks[1:] when 100 < t < 950 every 2 -> reuse residual\n")
    model, call, x = built(family)
    with cachepolicy.apply(model, policy):
        expected = sampled(call, x, 2)
    model, call, x = built(family)
    compiled = regionally_compile(model, backend="eager")
    assert compiled is model
    with cachepolicy.apply(model, policy) as run:
        assert torch.equal(expected, sampled(call, x, 2))
        assert {"CRCRCRCC"} == set(run.trace.rows().values())


@pytest.mark.parametrize(("engine", "family"), sorted(engine_models.BUILDERS))
def test_the_recorded_tree_is_that_of_the_model(engine: str, family: str) -> None:
    """The fast tests compare what a policy selects in these trees."""
    try:
        model = engine_models.BUILDERS[engine, family]()
    except ImportError:
        pytest.skip(f"{engine} is not installed")
    path, text = engine_models.recorded()[engine, family]
    assert path == engine_models.path_of(model)
    assert tree_from_json(text) == describe(model)
