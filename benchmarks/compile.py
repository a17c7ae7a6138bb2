"""Under torch.compile: graphs, breaks, given-up code and time of ours, diffusers' hooks and cache-dit, side by side.

Every system is put on a twin of one Flux and compiled, as a whole (`model.compile()`) or block by block
(`compile_repeated_blocks()`), from a fresh compiler. A trajectory is run once to compile and then again to be timed,
each time beside one of the bare model without a compiler. cache-dit's row needs cache-dit (1.5.3) installed.
`python -m benchmarks.compile`
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo as dynamo
from diffusers.hooks import apply_pyramid_attention_broadcast
from torch import Tensor, nn

import cachepolicy
from benchmarks import fbc, pab
from benchmarks._measure import Spread, one_thread, spread, table, timed
from benchmarks.pab import twin

THRESHOLD = 0.8
"""Between the drift of steps that stay near one another, and that of a jump."""

Put = Callable[[nn.Module, pab.Loop], None]


def ours_pab(model: nn.Module, loop: pab.Loop) -> None:
    """`pab.cp`, every second step."""
    cachepolicy.apply(model, "pab", timestep=loop.current, spatial_every=2)


def diffusers_pab(model: nn.Module, loop: pab.Loop) -> None:
    """The same as diffusers' hooks; the timestep is a tensor, as the pipelines' is."""
    apply_pyramid_attention_broadcast(model, pab.config(loop, 2))


def ours_fbc(model: nn.Module, loop: pab.Loop) -> None:
    """`fbc.cp`."""
    fbc.ours(model, THRESHOLD, loop.current)


def diffusers_fbc(model: nn.Module, loop: pab.Loop) -> None:
    """The same as diffusers' hooks, in one cache context for good."""
    fbc.diffusers(model, THRESHOLD, loop.current)


def cache_dit_fbc(model: nn.Module, loop: pab.Loop) -> None:
    """cache-dit's F1B0, without its warm-up and its limits."""
    fbc.cache_dit(model, THRESHOLD, loop.current)


def none(_: nn.Module, __: pab.Loop) -> None:
    """The bare model."""


SYSTEMS: Mapping[str, Put] = {
    "no cache": none,
    "PAB, ours": ours_pab,
    "PAB, diffusers": diffusers_pab,
    "FBC, ours": ours_fbc,
    "FBC, diffusers": diffusers_fbc,
    "FBC, cache-dit": cache_dit_fbc,
}


def whole(model: nn.Module, **options: Any) -> None:
    """All of it."""
    model.compile(**options)


def by_block(model: nn.Module, **options: Any) -> None:
    """Each of its repeated blocks."""
    model.compile_repeated_blocks(**options)


WAYS: Mapping[str, Callable[..., None]] = {"the whole model": whole, "block by block": by_block}


# --- counting --------------------------------------------------------------------------------------------


class GivenUp(logging.Handler):
    """Counts the code that torch stops compiling, for it has compiled it too often."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.number = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Torch says it in a warning and nowhere else."""
        self.number += "recompile_limit" in record.getMessage() or "cache_size_limit" in record.getMessage()


@dataclass(slots=True)
class Outcome:
    """What compiling came to."""

    graphs: int = 0
    breaks: int = 0
    given_up: int = 0
    full: bool = False
    first: float = 0.0
    ratios: list[float] = field(default_factory=list[float])

    def cells(self) -> list[object]:
        """As a table's line."""
        ratio: Spread = spread(self.ratios)
        return [self.graphs, self.breaks, self.given_up, "yes" if self.full else "no", f"{self.first:.1f}", ratio]


HEADS = ["graphs", "breaks", "given up", "fullgraph", "first run, s", "later / uncompiled"]


@contextlib.contextmanager
def counting(outcome: Outcome) -> Iterator[None]:
    """Count from a fresh compiler."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    handler, logger = GivenUp(), logging.getLogger("torch._dynamo.convert_frame")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        counters = dynamo.utils.counters
        outcome.graphs = counters["stats"]["unique_graphs"]
        outcome.breaks = sum(counters["graph_break"].values())
        outcome.given_up = handler.number


@dataclass(slots=True)
class Bench:
    """A Flux, its trajectory, and what to compile with."""

    setting: pab.Setting
    backend: str
    rounds: int
    model: nn.Module = field(init=False)
    loop: pab.Loop = field(init=False)
    latents: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.loop = self.setting.model(), pab.Loop(self.setting)
        # Three steps near one another, then a jump: a First Block Cache hits twice and misses once.
        jumps = [torch.randn_like(self.loop.noise) for _ in range(self.setting.steps // 3 + 1)]
        self.latents = [
            jumps[step // 3] + 0.01 * torch.randn_like(self.loop.noise) for step in range(self.setting.steps)
        ]

    def run(self, model: nn.Module) -> None:
        """One trajectory."""
        for step in self.loop.steps():
            self.loop.call(model, self.latents[step])

    def outcome(self, put: Put, way: Callable[..., None]) -> Outcome:
        """Compile and measure one system."""
        outcome = Outcome()
        with counting(outcome):
            model = self.prepared(put, way)
            taken, _ = timed(lambda: self.run(model))
            outcome.first = taken.wall
            for _ in range(self.rounds):
                mine, _ = timed(lambda: self.run(model))
                base, _ = timed(lambda: self.run(self.model))
                outcome.ratios.append(mine.cpu / base.cpu)
        outcome.full = self.stays_whole(put, way)
        return outcome

    def prepared(self, put: Put, way: Callable[..., None], **options: Any) -> nn.Module:
        """A twin with the cache on it, to be compiled as it runs."""
        model = twin(self.model)
        put(model, self.loop)
        way(model, backend=self.backend, **options)
        return model

    def stays_whole(self, put: Put, way: Callable[..., None]) -> bool:
        """Whether a trajectory runs with `fullgraph=True`, which raises at a break and where torch gives up."""
        dynamo.reset()
        model = self.prepared(put, way, fullgraph=True)
        try:
            self.run(model)
        except Exception:  # noqa: BLE001 - whatever it is, that is the answer
            return False
        return True


def systems() -> list[str]:
    """Those that are installed."""
    return [name for name in SYSTEMS if "cache-dit" not in name or importlib.util.find_spec("cache_dit") is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="double blocks, and single blocks")
    parser.add_argument("--heads", type=int, default=2, help="width, in heads of 64")
    parser.add_argument("--edge", type=int, default=8, help="picture tokens along one edge")
    parser.add_argument("--steps", type=int, default=20, help="steps of a trajectory")
    parser.add_argument("--rounds", type=int, default=5, help="timed trajectories")
    parser.add_argument("--backend", default="eager", help="what graphs are given to: eager (counts), inductor (time)")
    given = parser.parse_args(arguments)
    one_thread()
    setting = pab.Setting(given.blocks, given.blocks, given.heads, given.edge, steps=given.steps)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = Bench(setting, given.backend, given.rounds)
        bench.run(bench.model)
        for title, way in WAYS.items():
            rows = {name: bench.outcome(SYSTEMS[name], way).cells() for name in systems()}
            print(table(f"{title}, backend {given.backend}", HEADS, rows) + "\n")


if __name__ == "__main__":
    main()
