"""A policy works with compilers, adapters, offloading and quantisation, whichever is put on the model first."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.engine.apply import run_of
from cachepolicy.engine.hooks import parameters_of
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from tests.support import zoo

pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:the policy reused nothing", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

TIMESTEPS = (950.0, 850.0, 750.0, 650.0)
COMPUTES = parse("match attention -> compute")
CACHES = parse("match attention every 2 -> reuse")
SIZES = {"flux": {"num_layers": 1, "num_single_layers": 1}, "wan": {"num_layers": 1}}


def build(name: str) -> nn.Module:
    """A model of diffusers with one block of each kind, since compilers take seconds for each block."""
    entry = zoo.entry(name)
    return replace(entry, config={**entry.config, **SIZES[name]}).build(0)


@torch.no_grad()
def run(name: str, model: nn.Module) -> list[Tensor]:
    return [*zoo.trajectory(name, model, TIMESTEPS)]  # pyright: ignore[reportReturnType]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def is_bare(model: nn.Module) -> bool:
    return all(
        "_cachepolicy" not in module.__dict__ and not hasattr(type(module), "_cachepolicy_class")
        for module in model.modules()
    )


# --- what changes a model --------------------------------------------------------------------------------


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _compiled_blocks(model: Any) -> nn.Module:
    model.compile_repeated_blocks(backend="eager")
    return model


def _lora_config() -> Any:
    return pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def _drawn(model: nn.Module) -> nn.Module:
    """Draw the weights of the adapters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def _lora(model: Any) -> nn.Module:
    model.add_adapter(_lora_config())
    return _drawn(model)


def _peft_model(model: Any) -> nn.Module:
    return _drawn(pytest.importorskip("peft").get_peft_model(model, _lora_config()))


def _offloaded(model: nn.Module) -> nn.Module:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def _torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    wide = lambda module, _: isinstance(module, nn.Linear) and module.in_features > 1  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=wide)
    return model


def _quanto(model: nn.Module) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "torch.compile": _compiled,
    "model.compile": _compiled_in_place,
    "compiled blocks": _compiled_blocks,
    "LoRA": _lora,
    "PeftModel": _peft_model,
    "cpu_offload": _offloaded,
    "torchao": _torchao,
    "quanto": _quanto,
}
GROUPS = [{"torch.compile", "model.compile", "compiled blocks"}, {"LoRA", "PeftModel"}, {"torchao", "quanto"}]
"""Of each group, one is on a model."""
FAILS = {("cpu_offload", other) for other in ("torchao", "quanto", "LoRA", "PeftModel")} | {("quanto", "cpu_offload")}
"""Orders that do not work without a policy: accelerate keeps offloaded weights on the meta device, where there is
nothing to quantise, and where peft creates the weights of an adapter."""
PAIRS = [
    pair
    for pair in itertools.permutations(CHANGES, 2)
    if pair not in FAILS and not any(set(pair) <= group for group in GROUPS)
]
SLOW = [pair for pair in PAIRS if GROUPS[0] & set(pair)]


def stack(name: str, changes: Sequence[str], policy: Any = None, position: int = 0) -> tuple[Any, Any]:
    """Change a model in this order, with the policy attached before the change at `position`."""
    torch.compiler.reset()
    model, attached = build(name), None
    for number, change in enumerate([*changes, None]):
        if policy is not None and number == position:
            attached = cachepolicy.apply(model, policy)
        if change is not None:
            model = CHANGES[change](model)
    return model, attached


@functools.cache
def decisions_of(name: str) -> dict[str, str]:
    """Return what the policy that reuses decides on the plain model."""
    model, attached = stack(name, (), CACHES)
    run(name, model)
    return attached.trace.rows()


def holds(name: str, changes: Sequence[str], positions: Iterable[int]) -> None:
    """Compare the stack with the same stack without a policy, and its decisions with those on the plain model."""
    uncached = run(name, stack(name, changes)[0])
    for position in positions:
        model, attached = stack(name, changes, COMPUTES, position)
        assert attached is run_of(model)
        assert same(uncached, run(name, model))
        model, attached = stack(name, changes, CACHES, position)
        assert attached is run_of(model)
        assert not same(uncached, run(name, model))
        assert decisions_of(name) == attached.trace.rows()
        cachepolicy.remove(model)
        assert is_bare(model)
        assert same(uncached, run(name, model))


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in GROUPS[0]])
@pytest.mark.parametrize("name", SIZES)
def test_a_change_before_and_after_the_policy(name: str, change: str) -> None:
    """If all is computed, outputs are those of the stack without a policy. Decisions are those on a plain model."""
    holds(name, [change], range(2))


@pytest.mark.parametrize(
    "change",
    ["torch.compile", *(pytest.param(each, marks=pytest.mark.deep) for each in ("model.compile", "compiled blocks"))],
)
def test_a_compiler_before_and_after_the_policy(change: str) -> None:
    """The same with compilers, also where `torch.compile(model)` came before the policy."""
    holds("flux", [change], range(2))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in SLOW], ids=", ".join)
def test_two_changes_and_a_policy_in_any_order(pair: tuple[str, str]) -> None:
    """Every order of two changes, and the policy before, between and after them."""
    holds("flux", pair, range(3))


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "pair"),
    [("flux", pair) for pair in SLOW] + [("wan", pair) for pair in PAIRS],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_two_changes_and_a_policy_in_any_order_deep(name: str, pair: tuple[str, str]) -> None:
    """The same with compilers, and on another model.

    Under a compiler each offloaded module takes graphs of its own, so that a position takes half a minute; on the other
    model the policy is put on between the two only.
    """
    holds(name, pair, [1] if name == "wan" and pair in SLOW and "cpu_offload" in pair else range(3))


# --- wrappers --------------------------------------------------------------------------------------------


def test_an_earlier_compiled_wrapper_runs_under_a_policy_of_the_model() -> None:
    """`torch.compile(model)` keeps the `__call__` that the model had then; its calls are decided all the same."""
    torch.compiler.reset()
    model = build("flux")
    compiled: Any = torch.compile(model, backend="eager")
    uncached = run("flux", compiled)
    with cachepolicy.apply(model, CACHES) as attached:
        cached = run("flux", compiled)
        assert {"CRCR"} == set(attached.trace.rows().values())
        assert same(cached, run("flux", model))
        with attached.disabled():
            assert same(uncached, run("flux", compiled))
    assert same(uncached, run("flux", compiled))
    assert not same(uncached, cached)


def test_compiled_children_keep_their_paths() -> None:
    """Blocks that were replaced by `torch.compile(block)` are selected as the blocks that they wrap."""
    plain, model = build("flux"), build("flux")
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        blocks[0] = torch.compile(blocks[0], backend="eager")
    for text in ("match attention every 2 -> reuse", 'match "^transformer_blocks.0$" every 2 -> reuse'):
        torch.compiler.reset()
        with cachepolicy.apply(plain, parse(text)) as one, cachepolicy.apply(model, parse(text)) as other:
            assert same(run("flux", plain), run("flux", model))
            assert one.trace.rows() == other.trace.rows()
    assert is_bare(model)


@pytest.mark.parametrize("name", SIZES)
def test_the_parameters_of_a_compiled_block_are_those_of_the_block(name: str) -> None:
    """Spans and probes bind the arguments of a compiled block to the same names as those of the block."""
    model = build(name)
    blocks = [module for path, module in model.named_modules() if path.endswith("blocks.0")]
    assert blocks
    for block in blocks:
        assert parameters_of(block) == parameters_of(torch.compile(block, backend="eager"))


def test_a_wrapper_has_the_policy_of_its_model() -> None:
    """A second policy is refused, whether the wrapper or the model has the first; `remove` takes either."""
    model = build("flux")
    compiled: Any = torch.compile(model, backend="eager")
    for first, second in itertools.product((model, compiled), repeat=2):
        attached = cachepolicy.apply(first, CACHES)
        assert attached is run_of(second)
        with pytest.raises(PolicyError, match="E301"):
            cachepolicy.apply(second, CACHES)
        cachepolicy.remove(second)
        assert is_bare(model)
        assert run_of(first) is None


@pytest.mark.parametrize("position", ["before", "after"])
def test_the_transformer_of_a_pipeline_may_be_compiled(position: str) -> None:
    """`pipe.transformer = torch.compile(pipe.transformer)`, before and after the policy is on the pipeline."""
    from tests.support.tiny_pipelines import flux

    tiny = flux()
    pipe: Any = tiny.pipe
    with cachepolicy.apply(pipe, CACHES) as attached:
        expected = tiny()
        decisions = attached.trace.rows()
    if position == "before":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with cachepolicy.apply(pipe, CACHES) as attached:
        if position == "after":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        assert torch.equal(expected, tiny())
        assert decisions == attached.trace.rows()
    assert is_bare(pipe.transformer)
