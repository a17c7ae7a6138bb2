"""Many trajectories at once through one model with a cache: how many come out otherwise than alone, and how fast.

Threads, and asyncio tasks that take turns on one thread, each sample one trajectory after another, of several lengths,
as pipelines do: a `cache_context` around each call, a reset at the end. Every prediction is compared, to the last bit,
with that of the same trajectory run alone through another model with the same cache. A Flux under our policies and
under diffusers' hooks, a toy of plain torch under our policies. `python -m benchmarks.concurrency`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, PyramidAttentionBroadcastConfig
from torch import Tensor, nn

import cachepolicy
from benchmarks._measure import one_thread, over, rounds, table, timed
from cachepolicy.testing.models import Toy, inputs, redraw

STEPS = (5, 8, 11, 14)
EVERY, WINDOW = 2, (100, 800)


@dataclass(frozen=True, slots=True)
class Setting:
    """How many threads or tasks, how many trajectories each, and in how many rounds they are timed."""

    callers: int = 8
    trajectories: int = 50
    rounds: int = 5

    def jobs(self, caller: int) -> range:
        """The numbers of a caller's trajectories."""
        return range(caller * self.trajectories, (caller + 1) * self.trajectories)

    @property
    def total(self) -> int:
        """Trajectories of all callers."""
        return self.callers * self.trajectories


class Now(threading.local):
    """The timestep that a caller is at, which pipelines show as `current_timestep`: each thread has its own."""

    t: float = 0.0


NOW = Now()


@dataclass(frozen=True, slots=True)
class Kind:
    """A model, one call of it, and the First Block Cache threshold that some of its steps stay under."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor, int], Tensor]
    start: Callable[[int], Tensor]
    threshold: float


def _flux() -> nn.Module:
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    redraw(model, 0)
    return model.eval()


def _call_flux(model: nn.Module, latents: Tensor, t: Tensor, number: int) -> Tensor:
    conditioning = _conditioning(number)
    return model(latents, timestep=t.reshape(1) / 1000, return_dict=False, **conditioning)[0]


def _conditioning(number: int) -> dict[str, Tensor]:
    found = _CONDITIONING.get(number)
    if found is None:
        generator = torch.Generator().manual_seed(1_000_000 + number)
        found = _CONDITIONING[number] = {
            "encoder_hidden_states": torch.randn(1, 4, 8, generator=generator),
            "pooled_projections": torch.randn(1, 8, generator=generator),
            "img_ids": torch.zeros(9, 3),
            "txt_ids": torch.zeros(4, 3),
        }
    return found


_CONDITIONING: dict[int, dict[str, Tensor]] = {}


def _start_flux(number: int) -> Tensor:
    return torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(number))


_TOY = Toy(blocks=4, returns="tuple")


def _call_toy(model: nn.Module, latents: Tensor, t: Tensor, number: int) -> Tensor:
    return model(latents, t, inputs(_TOY, seed=number)[1])


KINDS = {
    "Flux": Kind(_flux, _call_flux, _start_flux, 0.8),
    "toy": Kind(_TOY.build, _call_toy, lambda number: inputs(_TOY, seed=number)[0], 0.3),
}


def trajectory(model: nn.Module, kind: Kind, number: int) -> Iterator[Tensor]:
    """The predictions of one sampling loop; its seed is its number, which tells its length too."""
    x = kind.start(number)
    for t in torch.linspace(999, 10, STEPS[number % len(STEPS)]):
        NOW.t = float(t)
        with model.cache_context("cond") if hasattr(model, "cache_context") else contextlib.nullcontext():
            prediction = kind.call(model, x, t, number)
        yield prediction
        x = x - 0.1 * prediction
    if hasattr(model, "_reset_stateful_cache"):
        model._reset_stateful_cache()  # noqa: SLF001 (as every pipeline of diffusers does)


# --- caches ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Way:
    """A model with a cache on, and another one of the same on which trajectories are run alone."""

    name: str
    kind: Kind
    put: Callable[[nn.Module], object]
    model: nn.Module = field(init=False)
    alone: nn.Module = field(init=False)
    expected: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.model, self.alone = self.kind.build(), self.kind.build()
        self.put(self.model)
        self.put(self.alone)

    @torch.no_grad()
    def run_alone(self, numbers: Sequence[int]) -> None:
        """What each trajectory should come to."""
        for number in numbers:
            self.expected[number] = torch.stack(list(trajectory(self.alone, self.kind, number)))


def ways(kind: Kind) -> list[Way]:
    """The bare model, ours and, where they know the model, diffusers'."""

    def ours(policy: str, **params: Any) -> Callable[[nn.Module], object]:
        return lambda model: cachepolicy.apply(model, policy, **params)

    found = [
        Way("bare", kind, lambda _: None),
        Way("ours, PAB", kind, ours("pab.cp", spatial_every=EVERY, spatial_range=WINDOW)),
        Way("ours, FBC", kind, ours("fbc.cp", threshold=kind.threshold)),
    ]
    if kind.build is _flux:
        pab = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=EVERY,
            spatial_attention_timestep_skip_range=WINDOW,
            current_timestep_callback=lambda: NOW.t,
        )
        found.append(Way("diffusers, PAB", kind, lambda model: model.enable_cache(pab)))
        fbc = FirstBlockCacheConfig(threshold=kind.threshold)
        found.append(Way("diffusers, FBC", kind, lambda model: model.enable_cache(fbc)))
    return found


# --- at once ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Count:
    """What came of trajectories that ran at once."""

    wrong: int = 0
    raised: int = 0
    total: int = 0

    def add(self, expected: Tensor, got: Sequence[Tensor] | None) -> None:
        """Count one; None where it raised."""
        self.total += 1
        if got is None:
            self.raised += 1
        elif not torch.equal(expected, torch.stack(list(got))):
            self.wrong += 1

    def __str__(self) -> str:
        return f"{self.wrong} of {self.total}" + (f", {self.raised} raised" if self.raised else "")


def _whole(way: Way, number: int) -> list[Tensor] | None:
    try:
        return list(trajectory(way.model, way.kind, number))
    except Exception:  # noqa: BLE001 (whatever a cache raises that is used by several at once)
        return None


def threads(way: Way, numbers: Sequence[Sequence[int]]) -> dict[int, list[Tensor] | None]:
    """Each list of trajectories in a thread of its own, all at once."""
    barrier = threading.Barrier(len(numbers))

    @torch.no_grad()
    def work(mine: Sequence[int]) -> list[tuple[int, list[Tensor] | None]]:
        barrier.wait()
        return [(number, _whole(way, number)) for number in mine]

    with ThreadPoolExecutor(len(numbers)) as pool:
        return dict(each for done in pool.map(work, numbers) for each in done)


@torch.no_grad()
def tasks(way: Way, numbers: Sequence[Sequence[int]]) -> dict[int, list[Tensor] | None]:
    """Each list of trajectories in an asyncio task, which lets the others run after every step."""

    async def one(number: int) -> list[Tensor] | None:
        got = list[Tensor]()
        try:
            for prediction in trajectory(way.model, way.kind, number):
                got.append(prediction)
                await asyncio.sleep(0)
        except Exception:  # noqa: BLE001 (as above)
            return None
        return got

    async def work(mine: Sequence[int]) -> list[tuple[int, list[Tensor] | None]]:
        return [(number, await one(number)) for number in mine]

    async def all_of_them() -> list[list[tuple[int, list[Tensor] | None]]]:
        return await asyncio.gather(*map(work, numbers))

    return dict(each for done in asyncio.run(all_of_them()) for each in done)


AT_ONCE = {"threads": threads, "tasks": tasks}


def counted(way: Way, results: Mapping[int, list[Tensor] | None], count: Count) -> None:
    """Hold results to what the same trajectories are alone."""
    for number, got in results.items():
        count.add(way.expected[number], got)


@dataclass(slots=True)
class Outcome:
    """What came of one way: wrong results by how it was called, and seconds by round."""

    counts: dict[str, Count]
    unlike: int
    """Alone, so many trajectories are not those of the bare model: the cache does something."""


def measure(kind: Kind, setting: Setting) -> tuple[dict[str, Outcome], list[dict[str, float]]]:
    """All ways of one model: what each gets wrong, and how long a round takes in threads."""
    every = {way.name: way for way in ways(kind)}
    for way in every.values():
        way.run_alone(range(setting.total))
    bare = every["bare"].expected
    outcomes = {
        name: Outcome(
            {how: Count() for how in AT_ONCE},
            sum(not torch.equal(bare[number], got) for number, got in way.expected.items()),
        )
        for name, way in every.items()
    }
    parts = [
        [setting.jobs(caller)[part :: setting.rounds] for caller in range(setting.callers)]
        for part in range(setting.rounds)
    ]
    seen = dict.fromkeys(every, 0)

    def round_of(way: Way) -> float:
        part = parts[seen[way.name]]
        seen[way.name] += 1
        taken, results = timed(lambda: threads(way, part))
        counted(way, results, outcomes[way.name].counts["threads"])
        return taken.wall

    measured = rounds({name: lambda way=way: round_of(way) for name, way in every.items()}, setting.rounds)
    for name, way in every.items():
        for part in parts:
            counted(way, tasks(way, part), outcomes[name].counts["tasks"])
    return outcomes, measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each model."""
    options = argparse.ArgumentParser(description=__doc__)
    usual = Setting()
    options.add_argument("--callers", type=int, default=usual.callers)
    options.add_argument("--trajectories", type=int, default=usual.trajectories, help="of each caller")
    options.add_argument("--rounds", type=int, default=usual.rounds)
    chosen = options.parse_args(arguments)
    setting = Setting(chosen.callers, chosen.trajectories, min(chosen.rounds, chosen.trajectories))
    one_thread()
    print(f"{setting.callers} callers x {setting.trajectories} trajectories of {STEPS} steps; wrong results:")
    for title, kind in KINDS.items():
        outcomes, measured = measure(kind, setting)
        rows = {
            name: [
                *outcome.counts.values(),
                f"{outcome.unlike} of {setting.total}",
                over(measured, lambda each, name=name: each["bare"] / each[name]),
            ]
            for name, outcome in outcomes.items()
        }
        heads = [*(f"wrong in {how}" for how in AT_ONCE), "unlike bare, alone", "throughput / bare's, threads"]
        print(f"\n{table(title, heads, rows)}")


if __name__ == "__main__":
    main()
