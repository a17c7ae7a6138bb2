"""Checks on four processes with the toy denoiser, whose attention gathers the tokens that others hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import cachepolicy
from cachepolicy.engine.distributed import groups
from cachepolicy.engine.distributed.norms import norm_alone, norm_of, numbers_of, share
from cachepolicy.errors import PolicyError
from cachepolicy.testing.models import Attention, Toy, ToyDiT, sample
from tests.support.ranks import gathered

TIMESTEPS = (950.0, 900.0, 850.0, 600.0, 550.0, 500.0, 450.0, 100.0)
POLICY = """
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= {} -> reuse residual
"""
POLICIES = {
    "on the way": POLICY.format(0.12),
    "each block by itself": """
signal x = output(blocks[0])
signal drift = relative_l1(x, kept(x))
match each blocks[1:] while drift <= 0.15 -> reuse
""",
    "accumulated": """
signal x = input(blocks[0])
signal change = l1(x, prev(x)) + 0.01 * cosine(x, kept(x))
match blocks when step > 0 while sum(change) < 0.3 -> reuse residual
""",
    "attention, by what came before it": """
signal x = output(blocks[0])
signal drift = l2(x, kept(x))
match attention and not "blocks.0" while drift <= 0.2 -> reuse
""",
}


class GatheringAttention(Attention):
    """Attention of this rank's tokens to all tokens of the group."""

    sizes: Sequence[int]
    group: Any

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        pieces = [x.new_empty(len(x), size, x.shape[-1]) for size in self.sizes]
        mine = dist.get_rank(self.group)
        pieces[mine] = x.contiguous()
        for piece, rank in zip(pieces, dist.get_process_group_ranks(self.group), strict=True):
            dist.broadcast(piece, rank, self.group)
        return super().forward(x, torch.cat(pieces, dim=1))


def spread(model: ToyDiT, sizes: Sequence[int], group: Any) -> ToyDiT:
    """Let the model take its share of the tokens."""
    for block in model.blocks:
        block.attn.__class__ = GatheringAttention
        block.attn.sizes, block.attn.group = sizes, group
    return model


def given(*, batch: int = 1, tokens: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 8, generator=generator), torch.randn(batch, 3, 8, generator=generator)


def run(
    model: nn.Module, policy: str, x: Tensor, y: Tensor, *, timesteps: Sequence[float] = TIMESTEPS, **options: Any
) -> tuple[dict[str, str], list[Tensor], Any]:
    with torch.no_grad(), cachepolicy.apply(model, cachepolicy.parse(policy), **options) as attached:
        outputs = list(sample(model, timesteps, x, y))
        return attached.trace.rows(), outputs, attached.trace.last


def sharded(policy: str, sizes: Sequence[int], group: Any, mesh: Any = None, **options: Any) -> tuple[Any, Any]:
    """What one process makes of all tokens, and what this one makes of its own."""
    batch = options.pop("batch", 1)
    dtype = options.pop("dtype", torch.float32)
    x, y = (each.to(dtype) for each in given(batch=batch, tokens=sum(sizes)))
    alone = run(Toy(blocks=3).build().to(dtype), policy, x, y, process_group=False, **options)
    mine = dist.get_rank(group)
    start = sum(sizes[:mine])
    model = spread(Toy(blocks=3).build().to(dtype), sizes, group)
    piece = x[:, start : start + sizes[mine]]
    got = run(model, policy, piece, y, process_group=group if mesh is None else mesh, **options)
    expected = [each[:, start : start + sizes[mine]] for each in alone[1]]
    return (alone[0], expected, alone[2]), got


def same(expected: tuple[Any, ...], got: tuple[Any, ...]) -> None:
    assert expected[0] == got[0], (expected[0], got[0])
    for whole, mine in zip(expected[1], got[1], strict=True):
        torch.testing.assert_close(whole, mine)


# --- checks ----------------------------------------------------------------------------------------------


def replicas_without_a_group_are_left_alone(rank: int) -> None:
    """Four replicas with prompts, thresholds and step counts of their own: nobody talks to anybody."""
    timesteps = TIMESTEPS[: 4 + rank]
    x, y = given(seed=rank)
    policy = POLICY.format(0.05 * (1 + rank))
    alone = run(Toy(blocks=3).build(), policy, x, y, timesteps=timesteps, process_group=False)
    same(alone, run(Toy(blocks=3).build(), policy, x, y, timesteps=timesteps))
    same(
        alone, run(nn.parallel.DistributedDataParallel(Toy(blocks=3).build()).module, policy, x, y, timesteps=timesteps)
    )
    assert not groups._all


def pieces_decide_as_the_whole(rank: int) -> None:
    """Tokens over four processes, evenly or not, give the decisions of one process and its outputs."""
    for sizes in ([2, 2, 2, 2], [3, 1, 2, 2]):
        for policy in POLICIES.values():
            expected, got = sharded(policy, sizes, dist.group.WORLD)
            same(expected, got)
            assert {"C", "R"} <= set("".join(got[0].values())), got[0]
            signals = [list(call.signals.values()) for call in got[2].calls]
            assert all(str(signals) == str(each) for each in gathered(signals))


def pieces_of_samples_decide_as_the_worst(rank: int) -> None:
    """With `samples="max"`, in bfloat16 too, where a norm has but three digits."""
    for dtype in (torch.float32, torch.bfloat16):
        expected, got = sharded(
            POLICIES["on the way"], [2, 2, 2, 2], dist.group.WORLD, samples="max", batch=3, dtype=dtype
        )
        assert expected[0] == got[0]


def each_rank_for_itself_would_part(rank: int) -> None:
    """Without a group the ranks decide differently on the same tokens: here only a feed-forward is reused, so that no
    rank waits for another."""
    policy = POLICIES["each block by itself"].replace("each blocks[1:]", 'feedforward and not "blocks.0"')
    x, y = given()
    parts = {}
    for group in (dist.group.WORLD, False):
        model = spread(Toy(blocks=3).build(), [2] * 4, dist.group.WORLD)
        rows = run(model, policy, x[:, 2 * rank : 2 * rank + 2], y, process_group=group)[0]
        parts[group is not False] = len({str(each) for each in gathered(rows)})
    assert parts[True] == 1
    assert parts[False] > 1


def groups_that_do_not_fit_are_refused(rank: int) -> None:
    """At `apply`, before anything is attached: what is no group, and a group of others."""
    model = Toy(blocks=3).build()
    alone = [dist.new_group([each]) for each in range(4)]
    for wrong in (True, "world", [0, 1], alone[(rank + 1) % 4]):
        with pytest.raises(PolicyError, match="process_group") as caught:
            cachepolicy.apply(model, "fora", process_group=wrong)
        assert caught.value.diagnostics[0].code == "E309"
    others = DeviceMesh("cpu", [[0, 1], [2, 3]][rank < 2], _init_backend=False)
    with pytest.raises(PolicyError, match=f"this is {rank}"):
        cachepolicy.apply(model, "fora", process_group=others)
    cachepolicy.apply(model, "fora").remove()


def two_groups_do_not_couple(rank: int) -> None:
    """Two requests on two processes each, as a mesh: other prompts, thresholds and numbers of steps."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    request = mesh["dp"].get_local_rank()
    for form in (mesh["cp"], mesh["cp"].get_group()):
        x, y = given(seed=request)
        timesteps = TIMESTEPS[: 4 + 3 * request]
        policy = POLICY.format(0.12 + 0.1 * request)
        expected = run(Toy(blocks=3).build(), policy, x, y, timesteps=timesteps, process_group=False)
        group = mesh["cp"].get_group()
        mine = dist.get_rank(group)
        model = spread(Toy(blocks=3).build(), [4, 4], group)
        got = run(model, policy, x[:, 4 * mine : 4 * mine + 4], y, timesteps=timesteps, process_group=form)
        same((expected[0], [each[:, 4 * mine : 4 * mine + 4] for each in expected[1]]), got)
    assert len(groups.peers_of(mesh["cp"], nn.Identity()).ranks) == 2
    assert groups.peers_of(mesh, nn.Identity()).ranks == (0, 1, 2, 3)


def a_nan_on_one_rank_makes_all_compute(rank: int) -> None:
    """And then they go on together."""
    model = Toy(blocks=3).build()
    x, y = given(seed=rank)
    with (
        torch.no_grad(),
        cachepolicy.apply(model, cachepolicy.parse(POLICY.format(9)), process_group=dist.group.WORLD) as attached,
    ):
        for step, t in enumerate(TIMESTEPS):
            model(x * math.nan if (rank, step) == (2, 3) else x, torch.tensor(t), y)
        rows = attached.trace.rows()
    assert rows == {"blocks[1:3]": "CRRCCRRR"}, rows


def copies_decide_as_one_of_them(rank: int) -> None:
    """Where all hold the same, as under tensor parallelism, a group changes nothing."""
    x, y = given()
    alone = run(Toy(blocks=3).build(), POLICIES["on the way"], x, y, process_group=False)
    same(alone, run(Toy(blocks=3).build(), POLICIES["on the way"], x, y, process_group=dist.group.WORLD))


def sessions_take_turns(rank: int) -> None:
    """Two sessions, a step each in turn, on all ranks in the same order."""
    model = spread(Toy(blocks=3).build(), [2] * 4, dist.group.WORLD)
    policy = POLICIES["on the way"]
    inputs = [given(seed=seed) for seed in range(2)]
    expected = [run(Toy(blocks=3).build(), policy, x, y, process_group=False)[0] for x, y in inputs]
    with (
        torch.no_grad(),
        cachepolicy.apply(model, cachepolicy.parse(policy), process_group=dist.group.WORLD) as attached,
    ):
        loops = [sample(model, TIMESTEPS, x[:, 2 * rank : 2 * rank + 2], y) for x, y in inputs]
        for _ in TIMESTEPS:
            for key, loop in enumerate(loops):
                with attached.session(key):
                    next(loop)
        assert [each.rows() for each in attached.trace] == expected


def parameters_in_pieces_are_skipped_together(rank: int) -> None:
    """Under FSDP2 each rank has samples of its own and measures them alone, but runs a block where another runs it:
    otherwise it would take another block's parameters for this one's. With equal samples decisions are those alone."""
    mesh = init_device_mesh("cpu", (4,))
    for seed in (0, rank):
        x, y = given(seed=seed)
        model = Toy(blocks=3).build()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rows, outputs, last = run(model, POLICIES["on the way"], x, y)
        alone = run(Toy(blocks=3).build(), POLICIES["on the way"], x, y, process_group=False)
        assert gathered(rows) == [rows] * 4
        if seed == 0 != rank:
            same(alone, (rows, outputs))
        for call, facts in zip(last.calls, gathered([call.facts for call in last.calls])[rank], strict=True):
            assert set(facts.values()) <= {"another process had to compute"}, call
        mask = "".join("1" if letter == "C" else "0" for letter in rows["blocks[1:3]"])
        forced = run(Toy(blocks=3).build(), f'match blocks[1:] mask "{mask}" -> reuse residual', x, y, steps=8)
        for expected, got in zip(forced[1], outputs, strict=True):
            torch.testing.assert_close(expected, got)


class Scale(nn.Module):
    def forward(self, hidden_states: Any, scale: float) -> Any:
        return hidden_states * scale


class Scaling(nn.Module):
    """A model that takes DTensors: blocks that scale their stream by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scale() for _ in range(3))

    def forward(self, hidden_states: Any, timestep: Tensor) -> Any:
        for block in self.blocks:
            hidden_states = block(hidden_states, 1 + float(timestep) / 1000)
        return hidden_states


SCALING = r"""
signal head = residual("^blocks\.0$")
signal drift = relative_l1(head, kept(head))
match "^blocks\.[12]$" while drift <= 0.6 -> reuse
"""


def tensors_in_pieces_are_measured_whole(rank: int) -> None:
    """A DTensor is never read by what this rank has of it: with a group or without, cut evenly or not."""
    mesh = init_device_mesh("cpu", (4,))
    for tokens in (8, 7):
        x, _ = given(batch=2, tokens=tokens)
        rows = {}
        for form in ("plain", "pieces", "pieces in a group"):
            stream: Any = x if form == "plain" else distribute_tensor(x, mesh, [Shard(1)])
            model = Scaling()
            group = mesh if form == "pieces in a group" else False
            with torch.no_grad(), cachepolicy.apply(model, cachepolicy.parse(SCALING), process_group=group) as attached:
                for t in TIMESTEPS:
                    stream = stream - 0.1 * model(stream, torch.tensor(t))
                rows[form] = attached.trace.rows()
        assert {"C", "R"} <= set("".join(rows["plain"].values()))
        assert rows["plain"] == rows["pieces"] == rows["pieces in a group"]


def norms_of_tensors_in_pieces_are_right(rank: int) -> None:
    """Cut along any dimension, copied or pending: the norm of the whole, the same on all ranks."""
    mesh = init_device_mesh("cpu", (4,))
    x, y = given(batch=2, tokens=7)[0], given(batch=2, tokens=7, seed=1)[0]
    forms = [Shard(0), Shard(1), Shard(2), Replicate(), Partial()]
    for function in ("l1", "l2", "relative_l1", "cosine"):
        for by_sample in (False, True):
            whole = share(function, x, y, by_sample=by_sample)
            expected = norm_of(function, numbers_of([whole])[0], torch.float32)
            for form in forms:
                a, b = (_cut(each, mesh, form) for each in (x, y))
                got = norm_alone(function, a, b, by_sample=by_sample)
                assert math.isclose(expected, got, rel_tol=1e-5), (function, form, expected, got)
                assert gathered(got) == [got] * 4


def _cut(tensor: Tensor, mesh: Any, form: Any) -> DTensor:
    if form == Partial():
        return DTensor.from_local(tensor / 4, mesh, [form])
    return distribute_tensor(tensor, mesh, [form])
