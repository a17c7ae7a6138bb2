"""A hit on a repeated input gives what computing gives: nothing is lost, doubled or left out by a reuse.

Random weights make every such mistake visible: what stands between blocks, a stream that joins late, a control signal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.engine.introspection import describe  # noqa: E402
from tests.support import zoo  # noqa: E402
from tests.support.caching import set_cache_context  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EVERYWHERE = (-1, 1001)

PAB: dict[str, Any] = {
    f"{kind}_{what}": value
    for kind in ("spatial", "temporal", "cross")
    for what, value in (("every", 2), ("range", EVERYWHERE))
}

CHAINED = tuple(name for name in zoo.names() if not name.startswith("unet"))
"""Models with a chain of blocks."""

TOLERANCE = 1e-5


def _flat(prediction: Any) -> Tensor:
    parts = prediction if isinstance(prediction, (list, tuple)) else [prediction]
    return torch.cat([part.flatten() for part in parts])


def _repeat(
    model: nn.Module, arguments: Callable[[], dict[str, Any]], policy: Any, **params: Any
) -> tuple[list[Tensor], set[str]]:
    """The outputs of three steps that only the clock tells apart, and the rows of the trace."""
    timesteps = iter([700.0, 600.0, 500.0])
    outputs = list[Tensor]()
    with torch.no_grad(), cachepolicy.apply(model, policy, timestep=lambda: next(timesteps), **params) as run:
        for _ in range(3):
            outputs.append(_flat(zoo.output(model(**arguments()))).clone())
        assert run.trace is not None
        return outputs, set(run.trace.rows().values())


def _assert_hits_repeat(outputs: list[Tensor], computed: Tensor) -> None:
    scale = computed.abs().max()
    for output in outputs:
        assert (output - computed).abs().max() <= TOLERANCE * scale


@pytest.mark.parametrize("name", zoo.names())
def test_attention_that_is_reused_changes_nothing(name: str) -> None:
    """On every architecture, all attention answered from the step before gives the same prediction."""
    model, inputs = zoo.build(name), zoo.entry(name).inputs()
    outputs, rows = _repeat(model, lambda: inputs, "pab", **PAB)
    with torch.no_grad():
        _assert_hits_repeat(outputs, _flat(zoo.output(model(**inputs))))
    # flux3 has attention for further modes, which this call does not run.
    assert rows - ({"..."} if name == "flux3" else set()) == {"CRC"}


@pytest.mark.parametrize("name", CHAINED)
def test_blocks_that_are_reused_change_nothing(name: str) -> None:
    """On every architecture with a chain of blocks, the first block and the kept residuals give the same prediction."""
    model, inputs = zoo.build(name), zoo.entry(name).inputs()
    outputs, rows = _repeat(model, lambda: inputs, "fbc", threshold=1e9)
    with torch.no_grad():
        _assert_hits_repeat(outputs, _flat(zoo.output(model(**inputs))))
    assert rows == {"CRR"}


CONTROLLED = {
    "flux": ("controlnet_block_samples", "controlnet_single_block_samples"),
    "chroma": ("controlnet_block_samples", "controlnet_single_block_samples"),
    "bria": ("controlnet_block_samples",),
    "qwenimage": ("controlnet_block_samples",),
    "sd3": ("block_controlnet_hidden_states",),
    "sd35": ("block_controlnet_hidden_states",),
    "sana": ("controlnet_block_samples",),
    "sana_video": ("controlnet_block_samples",),
    "cosmos": ("block_controlnet_hidden_states",),
}
"""Models that add a signal between their blocks, and the arguments that bring it, one tensor a block."""


def _stream(model: nn.Module, block: str, inputs: dict[str, Any]) -> torch.Size:
    """The shape of the hidden states that go into a block."""
    seen = list[torch.Size]()

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"].shape if "hidden_states" in kwargs else args[0].shape)

    twin = copy.deepcopy(model)
    twin.get_submodule(block).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        twin(**inputs)
    return seen[0]


def _controls(name: str, model: nn.Module, inputs: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    skeleton = describe(model)
    generator = torch.Generator().manual_seed(7)
    controls = dict[str, list[Tensor]]()
    for argument, blocks in zip(CONTROLLED[name], skeleton.block_lists, strict=False):
        elements = skeleton.elements[blocks]
        of_picture = name == "chroma"  # added in place to the picture's part of the joint sequence
        shape = _stream(model, skeleton.elements[skeleton.block_lists[0]][0] if of_picture else elements[0], inputs)
        controls[argument] = [torch.randn(shape, generator=generator) for _ in elements]
    if name == "sana_video":
        controls = {key: value[:-1] for key, value in controls.items()}
    # Models pop from the lists that they are given.
    return lambda: {**inputs, **{key: [*value] for key, value in controls.items()}}


@pytest.mark.parametrize("policy", ["pab", "fbc"])
@pytest.mark.parametrize("name", CONTROLLED)
def test_control_signals_are_added_once(name: str, policy: str) -> None:
    """What a ControlNet adds between blocks is part of the computed result, and no more on a hit. diffusers' First
    Block Cache adds it a second time."""
    model = zoo.build(name)
    if name == "cosmos":
        model.register_to_config(controlnet_block_every_n=1)
    bare = zoo.entry(name).inputs()
    controlled = _controls(name, model, bare)
    params = PAB if policy == "pab" else {"threshold": 1e9}
    outputs, rows = _repeat(model, controlled, policy, **params)
    with torch.no_grad():
        computed = _flat(zoo.output(model(**controlled())))
        assert not torch.allclose(computed, _flat(zoo.output(model(**bare))), rtol=1e-2)
    _assert_hits_repeat(outputs, computed)
    assert any("R" in row for row in rows)


def _diffusers(name: str, inputs: Callable[[], dict[str, Any]]) -> float:
    """How far diffusers' hit on a repeated input is off, relative to the computed output."""
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    model = zoo.build(name)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e9))
    set_cache_context(model, "only")
    with torch.no_grad():
        computed, hit = (_flat(zoo.output(model(**inputs()))) for _ in range(2))
    return float((hit - computed).abs().max() / computed.abs().max())


@pytest.mark.parametrize("name", ["flux", "qwenimage", "wan_vace"])
def test_diffusers_adds_them_twice(name: str) -> None:
    """The difference that the tests above hold ours to be free of, where diffusers runs at all."""
    inputs = zoo.entry(name).inputs()
    controlled = _controls(name, zoo.build(name), inputs) if name in CONTROLLED else lambda: inputs
    assert _diffusers(name, controlled) > 0.01
    if name in CONTROLLED:
        assert _diffusers(name, lambda: inputs) < TOLERANCE
