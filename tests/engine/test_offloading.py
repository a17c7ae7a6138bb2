"""Weights that come and go: offloading, layerwise casting, device maps. What is answered does not bring them in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, inputs, sample
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

hooks = pytest.importorskip("diffusers.hooks")
accelerate = pytest.importorskip("accelerate")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0)
TOY = Toy(blocks=5)
TEXTS = {
    "first block": 'match "^blocks.0$" every 2 -> reuse',
    "last of a group": 'match "^blocks.1$" every 2 -> reuse',
    "alternating": 'match "^blocks.[024]$" every 2 -> reuse\nmatch block every 3 -> reuse',
    "all blocks": "match block every 2 -> reuse",
    "span": "match blocks[1:] every 2 -> reuse residual",
    "attention": "match attention every 2 -> reuse",
    "leaf": 'match "to_q$|ff.up$" every 2 -> reuse',
    "model": "match model every 2 -> reuse",
    "decided inside": (
        'signal inner = input("^blocks.0.attn$")\nsignal change = relative_l1(inner, prev(inner))\n'
        "match blocks while sum(change) < 0.3 -> reuse residual"
    ),
}


FBC = "match blocks[1:] every 2 -> reuse residual"


@torch.no_grad()
def run(model: nn.Module, toy: Toy = TOY) -> list[Tensor]:
    x, y = inputs(toy)
    return list(sample(model, TIMESTEPS, x, y))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def wanted(text: str) -> list[Tensor]:
    model = TOY.build()
    with cachepolicy.apply(model, parse(text)):
        return run(model)


def offload(model: nn.Module, **options: Any) -> None:
    """Group offloading between the CPU and itself; weights that are not loaded are made useless by `Loads`."""
    options = {"offload_type": "block_level", "num_blocks_per_group": 2} | options
    hooks.apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **options
    )


def groups(model: nn.Module) -> list[Any]:
    found = [hook.group for module in model.modules() for hook in _offloading(module)]
    return list({id(each): each for each in found}.values())


def _offloading(module: nn.Module) -> Iterator[Any]:
    registry = module.__dict__.get("_diffusers_hook")
    hook = registry.hooks.get("group_offloading") if registry is not None else None
    if hook is not None:
        yield hook


class Loads:
    """How often groups were brought in and put away; what is away is not a number."""

    def __init__(self, model: nn.Module, *, hide: bool = True) -> None:
        self.hide = hide
        self.onloads, self.offloads = 0, 0
        self.away = dict[int, list[Tensor]]()
        for group in groups(model):
            self._watch(group)

    def _watch(self, group: Any) -> None:
        onload, put_away = group.onload_, group.offload_
        weights = [each for module in group.modules for each in module.parameters()] + group.parameters

        def onload_() -> None:
            self.onloads += 1
            kept = self.away.pop(id(group), ())
            for weight, data in zip(weights, kept, strict=False) if self.hide else ():
                weight.data = data
            onload()

        def offload_() -> None:
            self.offloads += 1
            put_away()
            self._hide(group, weights)

        group.onload_, group.offload_ = onload_, offload_
        self._hide(group, weights)

    def _hide(self, group: Any, weights: list[nn.Parameter]) -> None:
        if id(group) not in self.away:
            self.away[id(group)] = [each.data for each in weights]
            for each in weights if self.hide else ():
                each.data = torch.full_like(each.data, torch.nan)


@pytest.mark.parametrize("first", ["neighbour", "policy"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_groups_of_blocks_are_loaded_for_whoever_computes(text: str, size: int, first: str) -> None:
    """Whichever of a group is answered, the others find their weights; nothing stays loaded, and it comes off."""
    model = TOY.build()
    if first == "neighbour":
        offload(model, num_blocks_per_group=size)
        attached = cachepolicy.apply(model, parse(text))
    else:
        attached = cachepolicy.apply(model, parse(text))
        offload(model, num_blocks_per_group=size)
    loads = Loads(model)
    everything = len(groups(model))
    for _ in range(2):
        assert same(wanted(text), run(model))
        assert everything == len(loads.away)
    attached.remove()
    assert same(run(TOY.build()), run(model))
    assert everything == len(loads.away)


def test_a_group_that_is_answered_whole_is_not_loaded() -> None:
    """Five blocks in groups of two, answered every second step: three groups load at three steps, the rest at six."""
    model = TOY.build()
    offload(model)
    loads = Loads(model)
    with cachepolicy.apply(model, parse("match block every 2 -> reuse")):
        run(model)
    assert 3 * 3 + 6 == loads.onloads == loads.offloads


def test_a_group_is_loaded_once_where_only_its_middle_computes() -> None:
    """The first and the last of three answer: the middle one loads the group, the last puts it away."""
    model = TOY.build()
    offload(model, num_blocks_per_group=3)
    loads = Loads(model)
    text = 'match "^blocks.[02]$" every 6 -> reuse\nmatch block every 2 -> reuse'
    with cachepolicy.apply(model, parse(text)):
        assert same(wanted(text), run(model))
    assert loads.onloads == loads.offloads
    assert 6 + 3 + 3 == loads.onloads  # the rest at each step, each of both groups at each second one


@pytest.mark.parametrize("first", ["neighbour", "policy"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_leaves_are_loaded_for_whoever_computes(text: str, first: str) -> None:
    """Offloading leaf by leaf gives the same, whichever was first."""
    model = TOY.build()
    if first == "neighbour":
        offload(model, offload_type="leaf_level", num_blocks_per_group=None)
    with cachepolicy.apply(model, parse(text)):
        if first == "policy":
            offload(model, offload_type="leaf_level", num_blocks_per_group=None)
        Loads(model)
        for _ in range(2):
            assert same(wanted(text), run(model))


class Stream:
    """Stands for a stream of an accelerator on a machine that has none."""

    def synchronize(self) -> None:
        """Everything has happened already."""


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_stream_of_groups_loads_ahead(text: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stream each group is loaded by the one before it: the chain holds, and what was loaded is put away."""
    offloading = pytest.importorskip("diffusers.hooks.group_offloading")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())
    monkeypatch.setattr(offloading, "TorchDeviceBackend", lambda _: _Backend())
    cpu = torch.device("cpu")
    model = TOY.build()
    config = offloading.GroupOffloadingConfig(
        onload_device=cpu, offload_device=cpu, offload_type=offloading.GroupOffloadingType(level), non_blocking=False,
        record_stream=False, low_cpu_mem_usage=False, num_blocks_per_group=1, stream=Stream(),
    )  # fmt: skip
    offloading._apply_group_offloading(model, config)
    loads = Loads(model, hide=False)
    with cachepolicy.apply(model, parse(text)):
        for _ in range(2):
            assert same(wanted(text), run(model))
        if level == "block_level" and "model" not in text:
            assert len(groups(model)) == len(loads.away)


class _Backend:
    def stream(self, _: Any) -> Any:
        return torch.no_grad()

    def current_stream(self) -> Stream:
        return Stream()


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox"])
def test_real_models_offload_in_groups(name: str) -> None:
    """Tiny models of diffusers, two blocks a group on disk, under three kinds of policy: the same predictions."""
    for text in ("match attention every 2 -> reuse", 'match "blocks.0$" every 2 -> reuse', FBC):
        results = list[list[Tensor]]()
        for offloaded in (False, True):
            model = zoo.build(name)
            if offloaded:
                offload(model)
                Loads(model)
            with torch.no_grad(), cachepolicy.apply(model, parse(text)):
                results.append(list(zoo.trajectory(name, model, TIMESTEPS)))
        assert same(*results)


# --- accelerate ------------------------------------------------------------------------------------------


def _dispatch(model: nn.Module, folder: Path) -> None:
    """A device map with some blocks on disk, as `device_map=` gives one."""
    devices = {"embed": "cpu", "out": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk"}
    devices |= {"blocks.3": "cpu", "blocks.4": "disk"}
    accelerate.dispatch_model(model, device_map=devices, main_device="cpu", offload_dir=str(folder), force_hooks=True)


ACCELERATE = {
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "cpu_offload with hook": lambda model, _: accelerate.cpu_offload_with_hook(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), torch.device("cpu")),
    "device_map": _dispatch,
}


@pytest.mark.parametrize("order", list(itertools.product(["put", "apply"], ["take", "remove"])), ids="-".join)
@pytest.mark.parametrize("text", ["attention", "leaf", "decided inside"])
@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_comes_and_goes_in_any_order(name: str, text: str, order: tuple[str, str], tmp_path: Path) -> None:
    """Weights on the CPU or on disk that are brought in for a call: the same outputs, in both orders on and off."""
    text, model = TEXTS[text], TOY.build()
    if order[0] == "put":
        ACCELERATE[name](model, tmp_path)
        attached = cachepolicy.apply(model, parse(text))
    else:
        attached = cachepolicy.apply(model, parse(text))
        ACCELERATE[name](model, tmp_path)
    for _ in range(2):
        assert same(wanted(text), run(model))
    if order[1] == "take":
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        if name != "cpu_offload with hook" and any(each.device.type == "meta" for each in model.parameters()):
            return  # accelerate leaves the weights of a disk where they are
        assert same(wanted(text), run(model))
        attached.remove()
    else:
        attached.remove()
        assert same(run(TOY.build()), run(model))
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any("_cachepolicy" in each.__dict__ for each in model.modules())


def test_what_is_left_half_way_is_put_away(tmp_path: Path) -> None:
    """A span that is decided inside its first block leaves that block: its own weights are put away as after a call."""

    class Owning(type(TOY.build().blocks[0])):
        def __init__(self, toy: Toy) -> None:
            super().__init__(toy)
            self.shift = nn.Parameter(torch.zeros(toy.width))

        def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
            return super().forward(x + self.shift, context, step)

    model = TOY.build()
    model.blocks[0] = Owning(TOY).eval()
    accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    with cachepolicy.apply(model, parse(TEXTS["decided inside"])) as attached:
        run(model)
        assert "RR" in attached.trace.rows()["blocks[0:5]"] or "R" in "".join(attached.trace.rows().values())
    assert "meta" == model.blocks[0].shift.device.type


# --- casting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["neighbour", "policy"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_layerwise_casting_gives_the_same(text: str, first: str) -> None:
    """Weights kept in eight bits between calls: outputs are those of the policy on a model that was cast alike."""

    def outputs(order: str | None) -> list[Tensor]:
        model = TOY.build().to(torch.bfloat16)
        if order != "policy":
            _cast(model)
        with cachepolicy.apply(model, parse(text)), torch.no_grad():
            if order == "policy":
                _cast(model)
            x, y = (each.bfloat16() for each in inputs(TOY))
            return list(sample(model, TIMESTEPS, x, y))

    rounded = TOY.build().to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if "norm" not in name:
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
        x, y = (each.bfloat16() for each in inputs(TOY))
        with cachepolicy.apply(rounded, parse(text)):
            expected = list(sample(rounded, TIMESTEPS, x, y))
    assert same(expected, outputs(first))


def _cast(model: nn.Module) -> None:
    hooks.apply_layerwise_casting(
        model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16, skip_modules_pattern=("norm",)
    )


def test_a_pipeline_is_offloaded_as_diffusers_does_it() -> None:
    """Hooks that a pipeline's end takes off and puts on again: every call is that of the policy alone."""
    from tests.support import tiny_pipelines

    text = "match attention every 2 -> reuse"
    alone = tiny_pipelines.flux()
    with cachepolicy.apply(alone.pipe, parse(text)):
        wanted = alone()
    for first in ("neighbour", "policy"):
        tiny = tiny_pipelines.flux()
        if first == "neighbour":
            _offloaded(tiny.pipe)
        with cachepolicy.apply(tiny.pipe, parse(text)) as attached:
            if first == "policy":
                _offloaded(tiny.pipe)
            for _ in range(2):
                assert torch.equal(wanted, tiny())
                accelerate.hooks.remove_hook_from_module(tiny.pipe.transformer, recurse=True)
                _offloaded(tiny.pipe)
            assert "R" in "".join(attached.trace.rows().values())


def _offloaded(pipe: Any) -> None:
    """What `enable_model_cpu_offload` does, which itself asks for an accelerator."""
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    pipe._all_hooks = [hook]
