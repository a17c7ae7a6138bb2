"""DeepCache on U-Nets: the layers that its authors skip, and what the shallow part makes of the kept features."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import cachepolicy  # noqa: E402
from tests.methods import transcriptions as reference  # noqa: E402
from tests.support import zoo  # noqa: E402

TIMESTEPS = [900.0, 770.0, 640.0, 510.0, 380.0, 250.0, 120.0]
NETS: dict[str, dict[str, Any]] = {
    "stable_diffusion": {
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    },
    "sdxl": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    },
}
"""Tiny U-Nets with the blocks of the published ones."""


def built(preset: str) -> Any:
    return zoo.build("unet2d_condition", layers_per_block=2, sample_size=16, **NETS[preset])


@pytest.mark.parametrize("preset", NETS)
def test_the_cut_is_that_of_the_authors(preset: str) -> None:
    """The layers inside the sites are those below branch 0 of their helper."""
    model = built(preset)
    blocks = {kind: [len(block.resnets) for block in getattr(model, f"{kind}_blocks")] for kind in ("down", "up")}
    expected = reference.deepcache_modules(blocks["down"], blocks["up"], 0)
    with cachepolicy.apply(model, "deepcache", preset=preset) as run:
        inside = [module for site in run.plan.sites for module in site.modules]
    layers = [name for name, _ in model.named_modules() if name == "mid_block" or name.split(".")[-2:-1] == ["resnets"]]
    layers = [name for name in layers if name == "mid_block" or not name.startswith("mid_block")]
    skipped = [name for name in layers if any(name == site or name.startswith(f"{site}.") for site in inside)]
    assert expected == {name.replace(".resnets", "") for name in skipped}


@pytest.mark.parametrize("preset", NETS)
@pytest.mark.parametrize("guidance", ["none", "batched"])
def test_answers(preset: str, guidance: Any) -> None:
    """A U-Net that runs as a whole, and whose last layer is given the kept deep features, gives the same bits."""
    computed = reference.deepcache(len(TIMESTEPS), 3)
    model = built(preset)
    kept, width = list[Any](), list[int]()

    def deep(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        width[:] = width or [hidden.shape[1] - model.conv_in.out_channels]
        if computed[len(kept)]:
            kept.append(hidden[:, : width[0]])
        else:
            kept.append(kept[-1])
        return (torch.cat([kept[-1], hidden[:, width[0] :]], 1), *rest)

    with torch.no_grad():
        handle = model.up_blocks[-1].resnets[-1].register_forward_pre_hook(deep)
        expected = [each.clone() for each in zoo.trajectory("unet2d_condition", model, TIMESTEPS, guidance=guidance)]
        handle.remove()
        with cachepolicy.apply(model, "deepcache", preset=preset, steps=len(TIMESTEPS)) as run:
            answers = [each.clone() for each in zoo.trajectory("unet2d_condition", model, TIMESTEPS, guidance=guidance)]
            assert {"CRRCRRC"} == set(run.trace.rows().values())
    assert all(map(torch.equal, expected, answers))
