"""What a policy costs where it saves nothing: per hit and miss of a site, per call of the root, per apply and remove.

The modules do no work at all, so that what is measured is the call itself and what stands around it. Everything is
CPU time of one process on one thread. `python -m benchmarks.overhead`
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PyramidAttentionBroadcastConfig
from diffusers.hooks.pyramid_attention_broadcast import _apply_pyramid_attention_broadcast_hook as hook
from torch import Tensor, nn

import cachepolicy
from benchmarks._measure import Spread, one_thread, over, rounds, table
from cachepolicy.engine.introspection import describe
from cachepolicy.language.linker import load, resolve
from cachepolicy.planning.bind import bind

ALWAYS, NEVER = 1_000_000, 1
"""`every` so many steps: all calls after the first hit, or all miss (and keep what they computed)."""


class Idle(nn.Module):
    """A site whose computation takes no time."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The input."""
        return hidden_states


class IdlePair(nn.Module):
    """A site of two streams, as the attention of Flux' and SD3's double blocks."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs."""
        return hidden_states, encoder_hidden_states


class Stack(nn.Module):
    """A root with so many sites, called in turn."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Idle() for _ in range(sites))

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:  # noqa: ARG002 - the clock may read it
        """Call every site."""
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Pairs(nn.Module):
    """A root whose sites are called by keyword and give two tensors."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(IdlePair() for _ in range(sites))

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:  # noqa: ARG002 - the clock may read it
        """Call every site."""
        encoded = hidden_states[:, 0]
        for block in self.blocks:
            hidden_states, encoded = block(hidden_states=hidden_states, encoder_hidden_states=encoded)
        return hidden_states


MODELS: Mapping[str, Callable[[int], nn.Module]] = {"one tensor": Stack, "two, by keyword": Pairs}


@dataclass(slots=True)
class Loop:
    """A sampling loop: it sets the current timestep, as pipelines do, and calls the model."""

    model: nn.Module
    timesteps: Sequence[Any]
    t: Any = None
    latents: Tensor = field(default_factory=lambda: torch.zeros(1, 4, 4))

    def current(self) -> Any:
        """What a pipeline shows as `current_timestep`."""
        return self.t

    def seconds(self) -> float:
        """CPU seconds a call; the first calls, which have to compute, are left out."""
        first, rest = self.timesteps[:2], self.timesteps[2:]
        for self.t in first:
            self.model(self.latents, self.t)
        start = time.process_time()
        for self.t in rest:
            self.model(self.latents, self.t)
        return (time.process_time() - start) / len(rest)


def timesteps(calls: int, *, tensors: bool) -> list[Any]:
    """Falling timesteps: elements of one tensor, as a scheduler's are, or plain numbers."""
    values = torch.linspace(1000, 1, calls + 2)
    return list(values) if tensors else values.tolist()


def bare(model: nn.Module, calls: int) -> Loop:
    """Nothing attached."""
    return Loop(model, timesteps(calls, tensors=False))


def diffusers(model: nn.Module, calls: int, every: int, *, tensors: bool) -> Loop:
    """The hook of diffusers for Pyramid Attention Broadcast on every site."""
    loop = Loop(model, timesteps(calls, tensors=tensors))
    for block in loop.model.blocks:
        hook(block, (-1, 1001), every, loop.current)
    return loop


def ours(model: nn.Module, calls: int, every: int, *, tensors: bool, argument: bool = False) -> Loop:
    """The same schedule as a policy, traced; the clock is the loop's `current`, or the root's own argument."""
    loop = Loop(model, timesteps(calls, tensors=tensors))
    text = f'cachepolicy 1\npolicy overhead\nmatch "^blocks" when -1 < t < 1001 every {every} -> reuse\n'
    cachepolicy.apply(loop.model, cachepolicy.parse(text), timestep=None if argument else loop.current)
    return loop


HITS_AND_MISSES = {"hit": ALWAYS, "miss": NEVER}


def loops(model: Callable[[], nn.Module], calls: int) -> dict[str, Loop]:
    """Every way to run a model, by name."""
    ways = {"bare": bare(model(), calls)}
    for what, every in HITS_AND_MISSES.items():
        for kind, tensors in (("number", False), ("tensor", True)):
            ways[f"diffusers {kind} {what}"] = diffusers(model(), calls, every, tensors=tensors)
            ways[f"ours {kind} {what}"] = ours(model(), calls, every, tensors=tensors)
        ways[f"ours argument {what}"] = ours(model(), calls, every, tensors=True, argument=True)
    return ways


# --- calls -----------------------------------------------------------------------------------------------


Round = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Calls:
    """The rounds of all ways at all sizes, and the numbers that are made of one round, in microseconds."""

    sizes: Sequence[int]
    measured: Sequence[Round]

    def above(self, each: Round, way: str, sites: int) -> float:
        """What a call of the root takes above the bare one."""
        return 1e6 * (each[f"{way} {sites}"] - each[f"bare {sites}"])

    def site(self, each: Round, way: str) -> float:
        """What one more site takes above the bare one."""
        few, many = self.sizes[0], self.sizes[-1]
        return (self.above(each, way, many) - self.above(each, way, few)) / (many - few)

    def root(self, each: Round, way: str) -> float:
        """What is left without any site."""
        return self.above(each, way, self.sizes[0]) - self.sizes[0] * self.site(each, way)

    def bare_site(self, each: Round) -> float:
        """A bare call of a site."""
        few, many = self.sizes[0], self.sizes[-1]
        return 1e6 * (each[f"bare {many}"] - each[f"bare {few}"]) / (many - few)


def measure(model: Callable[[int], nn.Module], sizes: Sequence[int], number: int, calls: int) -> Calls:
    """Run every way at every size, in turn."""
    ways = dict[str, Callable[[], float]]()
    for sites in sizes:
        each = loops(functools.partial(model, sites), calls)
        ways |= {f"{name} {sites}": loop.seconds for name, loop in each.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that `every 1` reuses nothing is the point
        rounds(ways, 1)
        return Calls(sizes, rounds(ways, number))


CLOCKS = ("diffusers number", "diffusers tensor", "ours number", "ours tensor", "ours argument")
"""Who runs it, and what the timestep is: from a callback, a number or a tensor; or the root's own (tensor) argument."""


def report(gives: str, calls: Calls) -> Iterator[str]:
    """The tables of one measurement."""
    bare = over(calls.measured, calls.bare_site)
    yield f"Sites that give {gives}: a bare call takes {bare}.\n"
    for what in HITS_AND_MISSES:
        heads = ["a site", "the root", *(f"a site of {sites}, root included" for sites in calls.sizes)]
        rows = {clock: _costs(calls, f"{clock} {what}") for clock in CLOCKS}
        yield table(f"{what}, above the bare call", heads, rows) + "\n"
    heads = ["a site", *(f"{sites} sites and the root" for sites in calls.sizes)]
    rows = {
        f"{what}, timestep a {clock}": _ratios(calls, f"ours {clock} {what}", f"diffusers {clock} {what}")
        for what, clock in itertools.product(HITS_AND_MISSES, ("number", "tensor"))
    }
    yield table("overhead, ours / diffusers (the goal: 0.50)", heads, rows) + "\n"


def _costs(calls: Calls, way: str) -> list[Spread]:
    return [
        over(calls.measured, lambda each: calls.site(each, way)),
        over(calls.measured, lambda each: calls.root(each, way)),
        *(over(calls.measured, lambda each, n=sites: calls.above(each, way, n) / n) for sites in calls.sizes),
    ]


def _ratios(calls: Calls, way: str, base: str) -> list[Spread]:
    return [
        over(calls.measured, lambda each: calls.site(each, way) / calls.site(each, base)),
        *(
            over(calls.measured, lambda each, n=sites: calls.above(each, way, n) / calls.above(each, base, n))
            for sites in calls.sizes
        ),
    ]


# --- putting on and taking off ---------------------------------------------------------------------------


def flux(double: int = 19, single: int = 38) -> FluxTransformer2DModel:
    """A Flux of real depth (57 blocks) and no width."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=double, num_single_layers=single, attention_head_dim=8,
        num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def milliseconds(work: Callable[[], object]) -> float:
    """CPU milliseconds of one run."""
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def attaching(number: int, double: int = 19, single: int = 38) -> str:
    """What is paid once: reading a policy, binding it, putting it on a model of 57 blocks and taking it off."""
    model = flux(double, single)
    text = cachepolicy.format(load("pab"))
    policy = cachepolicy.parse(text)
    skeleton, resolved = describe(model), resolve(policy, {})

    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=float)
    pairs = {
        "ours": (lambda: cachepolicy.apply(model, policy), lambda: cachepolicy.remove(model)),
        "diffusers": (lambda: model.enable_cache(config), model.disable_cache),
    }
    ways = {
        "parse pab.cp": lambda: milliseconds(lambda: cachepolicy.parse(text)),
        "describe the model": lambda: milliseconds(lambda: describe(model)),
        "bind": lambda: milliseconds(lambda: bind(resolved, skeleton)),
    }
    measured = rounds(ways, number)
    for each in measured:
        for name, (put_on, take_off) in pairs.items():
            each[f"{name} apply"] = milliseconds(put_on)
            each[f"{name} remove"] = milliseconds(take_off)
    rows = {name: [over(measured, lambda each, name=name: each[name])] for name in measured[0]}
    rows = {name: rows[name] for name in (*ways, *(f"{name} {verb}" for verb in ("apply", "remove") for name in pairs))}
    return table(f"once, on a Flux of {double + single} blocks", ["CPU ms"], rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 60, 114], help="sizes of the model; two or more")
    parser.add_argument("--rounds", type=int, default=40, help="how often each way is timed")
    parser.add_argument("--calls", type=int, default=20, help="calls of the model in one timing")
    parser.add_argument("--blocks", type=int, nargs=2, default=[19, 38], help="double and single blocks of the Flux")
    given = parser.parse_args(arguments)
    one_thread()
    print(f"CPU microseconds, median [quartiles] of {given.rounds} rounds. Ours is traced.\n")
    for gives, model in MODELS.items():
        for text in report(gives, measure(model, given.sites, given.rounds, given.calls)):
            print(text)
    print(attaching(max(1, given.rounds // 3), *given.blocks))


if __name__ == "__main__":
    main()
