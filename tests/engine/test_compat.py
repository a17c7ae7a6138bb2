"""What else sits on a model: offloading, compilers, hooks, adapters, torch's own transformations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Probes, Toy, inputs, sample

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0)
EVERY_2 = "match attention every 2 -> reuse"
BLOCKS = "match block every 3 -> reuse\nmatch attention every 2 -> reuse residual"


@torch.no_grad()
def run(model: nn.Module, toy: Toy = Toy(), **options: Any) -> list[Tensor]:
    x, y = inputs(toy, **options)
    return list(sample(model, TIMESTEPS, x, y))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def expected(text: str, toy: Toy = Toy()) -> list[Tensor]:
    model = toy.build()
    with cachepolicy.apply(model, parse(text)):
        return run(model, toy)


# --- forward overrides and hooks -------------------------------------------------------------------------


class Neighbour:
    """Something that is put on a model and taken off."""

    def __init__(self, put: Any, take: Any) -> None:
        self.put, self.take = put, take


def _diffusers_hook() -> Neighbour:
    pytest.importorskip("diffusers")
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

    def put(model: nn.Module) -> None:
        for block in model.blocks:
            HookRegistry.check_if_exists_or_initialize(block.attn).register_hook(Counting(), "counting")

    def take(model: nn.Module) -> None:
        for block in model.blocks:
            HookRegistry.check_if_exists_or_initialize(block.attn).remove_hook("counting")

    return Neighbour(put, take)


def _accelerate_offload() -> Neighbour:
    accelerate = pytest.importorskip("accelerate")

    def put(model: nn.Module) -> None:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    def take(model: nn.Module) -> None:
        accelerate.hooks.remove_hook_from_module(model, recurse=True)

    return Neighbour(put, take)


def _group_offload() -> Neighbour:
    hooks = pytest.importorskip("diffusers.hooks")

    def put(model: nn.Module) -> None:
        hooks.apply_group_offloading(
            model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1,
        )  # fmt: skip

    def take(model: nn.Module) -> None:
        for module in model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None:
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)

    return Neighbour(put, take)


def _layerwise() -> Neighbour:
    hooks = pytest.importorskip("diffusers.hooks")

    def put(model: nn.Module) -> None:
        hooks.apply_layerwise_casting(model, storage_dtype=torch.float64, compute_dtype=torch.float32)

    return Neighbour(put, lambda model: None)


def _torch_hooks() -> Neighbour:
    handles = list[Any]()

    def put(model: nn.Module) -> None:
        for block in model.blocks:
            handles.append(block.attn.register_forward_hook(lambda *_: None))
            handles.append(block.attn.register_forward_pre_hook(lambda *_: None))

    def take(model: nn.Module) -> None:
        for handle in handles:
            handle.remove()

    return Neighbour(put, take)


NEIGHBOURS = {
    "diffusers hook": _diffusers_hook,
    "accelerate cpu_offload": _accelerate_offload,
    "group offloading": _group_offload,
    "torch hooks": _torch_hooks,
}


@pytest.mark.parametrize("text", [EVERY_2, BLOCKS, "match model every 2 -> reuse"])
@pytest.mark.parametrize("first", ["neighbour", "policy"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_come_and_go_in_any_order(name: str, first: str, text: str) -> None:
    """With a neighbour put on before or after us outputs are the same; both can be taken off in either order."""
    wanted, bare = expected(text), run(Toy().build())
    for last in ("neighbour", "policy"):
        model, neighbour = Toy().build(), NEIGHBOURS[name]()
        if first == "neighbour":
            neighbour.put(model)
            attached = cachepolicy.apply(model, parse(text))
        else:
            attached = cachepolicy.apply(model, parse(text))
            neighbour.put(model)
        assert same(wanted, run(model))
        assert same(wanted, run(model))
        if last == "neighbour":
            attached.remove()
            assert same(bare, run(model))
            neighbour.take(model)
        else:
            neighbour.take(model)
            assert same(wanted, run(model))
            attached.remove()
        assert same(bare, run(model))
        assert not any("_cachepolicy" in each.__dict__ for each in model.modules())


def test_group_offloading_of_diffusers_models_gives_the_same() -> None:
    """Block-level offloading with one block a group, on a real model: the same predictions."""
    hooks = pytest.importorskip("diffusers.hooks")
    from tests.support import zoo

    def latents(*, offloaded: bool, text: str) -> list[Tensor]:
        model = zoo.build("cogvideox")
        if offloaded:
            hooks.apply_group_offloading(
                model,
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
            )
        with torch.no_grad(), cachepolicy.apply(model, parse(text)):
            return list(zoo.trajectory("cogvideox", model, TIMESTEPS))

    for text in (EVERY_2, "match block every 2 -> reuse"):
        assert same(latents(offloaded=False, text=text), latents(offloaded=True, text=text))


def test_layerwise_casting_gives_the_same() -> None:
    """Weights that are stored in another dtype between calls change no decision and no number."""
    model = Toy().build()
    _layerwise().put(model)
    with cachepolicy.apply(model, parse(EVERY_2)) as attached:
        assert same(expected(EVERY_2), run(model))
        assert "CRCRCR" == attached.trace.rows()["blocks.0.attn"]


def test_accelerate_does_not_load_what_is_skipped() -> None:
    """A reused attention's weights are not brought in from where they are offloaded to."""
    accelerate = pytest.importorskip("accelerate")
    model = Toy().build()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    loads = [0]
    hook = model.blocks[0].attn.to_q._hf_hook
    original = hook.pre_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads[0] += 1
        return original(*args, **kwargs)

    hook.pre_forward = counted
    with cachepolicy.apply(model, parse(EVERY_2)):
        run(model)
    assert len(TIMESTEPS) // 2 == loads[0]


# --- adapters and wrappers -------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with a low-rank change, as LoRA puts in the place of one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * x


def test_modules_inside_a_site_may_be_replaced() -> None:
    """Adapters put in or taken out below a site while a policy is on: the site goes on, with what is there."""
    model, other = Toy().build(), Toy().build()
    other.blocks[0].attn.to_v = Adapted(other.blocks[0].attn.to_v)
    with cachepolicy.apply(other, parse(EVERY_2)):
        wanted = run(other)
    with cachepolicy.apply(model, parse(EVERY_2)):
        base = model.blocks[0].attn.to_v
        model.blocks[0].attn.to_v = Adapted(base)
        assert same(wanted, run(model))
        model.blocks[0].attn.to_v = base
        assert same(expected(EVERY_2), run(model))


def test_a_wrapped_root_runs_under_its_policy() -> None:
    """A model inside another that calls it is a root all the same."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Tensor:
            return self.inner(*args)

    model = Toy().build()
    with cachepolicy.apply(model, parse(EVERY_2)):
        assert same(expected(EVERY_2), run(Outer(model)))


def test_two_models_with_policies_may_call_each_other() -> None:
    """A root inside another root's forward keeps to its own frame and gives the outer one back."""
    inner, outer = Toy().build(), Toy().build()
    lone_inner, lone_outer = Toy().build(), Toy().build()

    def call(first: nn.Module, second: nn.Module) -> list[Tensor]:
        second.blocks[0].register_forward_pre_hook(lambda *_: got.append(first(x, now[0], y)))
        got.extend(run(second))
        return got

    x, y = inputs(Toy(), seed=4)
    now = [torch.tensor(0.0)]

    def timed(model: nn.Module) -> None:
        model.register_forward_pre_hook(lambda _, args: now.__setitem__(0, args[1]))

    results = list[list[Tensor]]()
    for one, two, nested in ((inner, outer, True), (lone_inner, lone_outer, False)):
        got = list[Tensor]()
        timed(two)
        with cachepolicy.apply(two, parse(EVERY_2)), cachepolicy.apply(one, parse("match block every 3 -> reuse")):
            if nested:
                call(one, two)
            else:
                with torch.no_grad():
                    for t in TIMESTEPS:
                        got.append(one(x, torch.tensor(t), y))
                got.extend(run(two))
        results.append(got)
    assert same(results[1], results[0])


def test_functional_call_uses_the_given_weights() -> None:
    """torch.func.functional_call of an attached model computes with the weights it is given."""
    from torch.func import functional_call

    model = Toy().build()
    x, y = inputs(Toy())
    weights = {name: 2 * value.detach() for name, value in model.named_parameters()}
    with torch.no_grad():
        wanted = functional_call(model, weights, (x, torch.tensor(900.0), y))
        with cachepolicy.apply(model, parse(EVERY_2)):
            assert torch.equal(wanted, functional_call(model, weights, (x, torch.tensor(900.0), y)))


def test_autocast_is_part_of_the_call() -> None:
    """Under autocast outputs are what they are under autocast, run after run."""
    model, other = Toy().build(), Toy().build()
    with torch.autocast("cpu", torch.bfloat16):
        with cachepolicy.apply(other, parse(EVERY_2)):
            wanted = run(other)
        with cachepolicy.apply(model, parse(EVERY_2)) as attached:
            assert same(wanted, run(model))
            assert same(wanted, run(model))
            assert "CRCRCR" == attached.trace.rows()["blocks.0.attn"]


def test_a_change_of_weights_between_runs_is_seen() -> None:
    """Histories never outlive a trajectory, so new weights take effect in the next run."""
    model, other = Toy().build(), Toy().build(seed=9)
    with cachepolicy.apply(other, parse(BLOCKS)):
        wanted = run(other)
    with cachepolicy.apply(model, parse(BLOCKS)):
        run(model)
        model.load_state_dict(other.state_dict())
        assert same(wanted, run(model))


def test_the_model_may_move_while_a_policy_is_on() -> None:
    """`.double()` and back, `.to`, `.half()`-like changes between runs."""
    model = Toy().build()
    with cachepolicy.apply(model, parse(BLOCKS)):
        run(model)
        model.double()
        x, y = (each.double() for each in inputs(Toy()))
        with torch.no_grad():
            assert torch.float64 == next(iter(sample(model, TIMESTEPS, x, y))).dtype
        model.float()
        assert same(expected(BLOCKS), run(model))


def test_data_parallel_style_replicas_do_not_answer_for_each_other() -> None:
    """Replicas made by copying, run in threads: each is bare, since only the original has the policy."""
    import copy
    from concurrent.futures import ThreadPoolExecutor

    model = Toy().build()
    bare = run(model)
    with cachepolicy.apply(model, parse(EVERY_2)):
        run(model)
        twins = [copy.deepcopy(model) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            for got in pool.map(run, twins):
                assert same(bare, got)


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_the_bare_model(strict: bool) -> None:
    """torch.export records the model without its policy, as it does when there is none."""
    model = Toy().build().requires_grad_(False)
    x, y = inputs(Toy())
    moment = torch.tensor(900.0)
    with cachepolicy.apply(model, parse("match attention every 2 -> reuse")):
        run(model)
        program = torch.export.export(model, (x, moment, y), strict=strict)
        assert same(expected("match attention every 2 -> reuse"), run(model))
    assert torch.allclose(model(x, moment, y), program.module()(x, moment, y), atol=1e-6)


# --- compilers -------------------------------------------------------------------------------------------


class Counting:
    """A compiler backend that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return graph.forward


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    try:
        yield
    finally:
        dynamo.reset()


def breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("text", "signatures"),
    [
        (EVERY_2, 2),
        ("match attention every 3 -> reuse\nmatch feedforward every 2 -> reuse", 4),
        ("match block every 2 -> reuse", 2),
    ],
)
def test_a_compiled_model_has_a_graph_for_each_step_signature(text: str, signatures: int) -> None:
    """`model.compile(fullgraph=True)`: as many graphs as distinct sets of decisions, no break, run after run."""
    with fresh_compiler():
        model, backend = Toy().build(), Counting()
        model.compile(backend=backend, fullgraph=True)
        with cachepolicy.apply(model, parse(text)) as attached:
            for _ in range(3):
                got = run(model)
            rows = attached.trace.rows()
        assert same(expected(text), got)
        assert signatures == len(set(zip(*rows.values(), strict=True))) == backend.graphs
        assert 0 == breaks()


def test_applying_before_compiling_is_the_same() -> None:
    """In the other order: the same graphs and the same numbers."""
    with fresh_compiler():
        model, backend = Toy().build(), Counting()
        with cachepolicy.apply(model, parse(EVERY_2)):
            model.compile(backend=backend, fullgraph=True)
            for _ in range(2):
                got = run(model)
        assert same(expected(EVERY_2), got)
        assert (2, 0) == (backend.graphs, breaks())


def test_compiled_blocks_keep_the_decision_outside() -> None:
    """Regional compilation: a graph for each state of a block, no break, no recompile later."""
    with fresh_compiler():
        model, backend = Toy().build(), Counting()
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        with cachepolicy.apply(model, parse(EVERY_2)):
            run(model)
            graphs = backend.graphs
            got = run(model)
        assert same(expected(EVERY_2), got)
        assert (graphs, 0) == (backend.graphs, breaks())
        assert graphs <= 4


def test_an_outside_compile_still_gives_the_right_numbers() -> None:
    """`torch.compile(model)` around an attached model: the decision stays in eager, whatever it costs in graphs."""
    with fresh_compiler():
        model = Toy().build()
        with cachepolicy.apply(model, parse(EVERY_2)) as attached:
            compiled = torch.compile(model, backend="eager")
            for _ in range(2):
                got = run(compiled)
            assert "CRCRCR" == attached.trace.rows()["blocks.0.attn"]
        assert same(expected(EVERY_2), got)


def test_removing_from_a_compiled_model_gives_the_bare_numbers() -> None:
    """After `remove` the compiled model is bare again, without a reset of the compiler."""
    with fresh_compiler():
        model = Toy().build()
        bare = run(Toy().build())
        model.compile(backend="eager", fullgraph=True)
        assert same(bare, run(model))
        with cachepolicy.apply(model, parse(EVERY_2)):
            assert same(expected(EVERY_2), run(model))
        assert same(bare, run(model))


@pytest.mark.deep
@pytest.mark.parametrize("name", ["flux", "cogvideox", "wan", "sd3", "dit"])
def test_real_models_compile_whole(name: str) -> None:
    """Tiny models of diffusers under fullgraph: two graphs for two signatures, no break, numbers near eager ones."""
    pytest.importorskip("diffusers")
    from tests.support import zoo

    with fresh_compiler(), torch.no_grad():
        model, backend = zoo.build(name), Counting()
        twin = zoo.build(name)
        with cachepolicy.apply(twin, parse(EVERY_2)):
            wanted = list(zoo.trajectory(name, twin, TIMESTEPS))
        model.compile(backend=backend, fullgraph=True)
        with cachepolicy.apply(model, parse(EVERY_2)):
            list(zoo.trajectory(name, model, TIMESTEPS))
            got = list(zoo.trajectory(name, model, TIMESTEPS))
        for one, other in zip(wanted, got, strict=True):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
        assert (2, 0) == (backend.graphs, breaks())


@pytest.mark.deep
def test_inductor_gives_near_numbers() -> None:
    """The default backend, on a CPU."""
    with fresh_compiler():
        model = Toy().build()
        model.compile(fullgraph=True)
        with cachepolicy.apply(model, parse(EVERY_2)):
            got = run(model)
        for one, other in zip(expected(EVERY_2), got, strict=True):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


# --- counting --------------------------------------------------------------------------------------------


def test_a_flop_counter_sees_what_is_computed() -> None:
    """The FLOP counter of torch counts fewer under a policy, by the attentions that were reused."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Toy().build()
    with FlopCounterMode(display=False) as bare:
        run(model)
    with cachepolicy.apply(model, parse(EVERY_2)), FlopCounterMode(display=False) as cached:
        run(model)
    assert 0 < cached.get_total_flops() < bare.get_total_flops()


def test_probes_do_not_disturb() -> None:
    """The probes of the checks are hooks like any other: they count what runs and change nothing."""
    model = Toy().build()
    bare = run(model)
    probes = Probes(model)
    assert same(bare, run(model))
    assert len(TIMESTEPS) == probes.take()["blocks.0.attn"]
    probes.remove()
    run(model)
    assert 0 == probes.take()["blocks.0.attn"]
