"""First Block Cache: what a decision, a hit step and a miss step cost, against diffusers' hooks and cache-dit's F1B0.

Two models at two widths. One whose blocks do next to nothing leaves the decision: what a hit step takes above the first
block and an addition, and what a miss step takes above the bare model. The other is a Flux that works. All ways share
their weights and inputs and take each step in turn; first they show that they decide alike. cache-dit's rows need
cache-dit (1.5.3) installed. `python -m benchmarks.fbc`
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

import cachepolicy
from benchmarks import pab
from benchmarks._measure import Spread, Taken, one_thread, spread, table, timed
from benchmarks.pab import twin

HIT, MISS = 0.999, 1e-9
"""Thresholds that every drift stays under, or none. cache-dit does not measure at 0, nor from 1 on."""


class IdleBlock(nn.Module):
    """A block of two streams, in Flux' order, that scales both."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.work = nn.Identity()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Text and picture, scaled."""
        return encoder_hidden_states * self.gain, self.work(hidden_states) * self.gain


class Idle(nn.Module):
    """A model of blocks that do next to nothing."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(IdleBlock(1 + 0.1 / (1 + number)) for number in range(blocks))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Any) -> Tensor:  # noqa: ARG002 - the clock may read it
        """Call every block."""
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states
            )
        return hidden_states


TransformerBlockRegistry.register(IdleBlock, TransformerBlockMetadata(1, 0))


class Added(nn.Module):
    """Stands for all blocks after the first on a hit: it adds what they added."""

    def __init__(self, text: Tensor, picture: Tensor) -> None:
        super().__init__()
        self.text, self.picture = text, picture

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Text and picture."""
        return encoder_hidden_states + self.text, hidden_states + self.picture


# --- the models and their ways ---------------------------------------------------------------------------


class Subject(Protocol):
    """A model with its inputs."""

    model: nn.Module

    def call(self, model: nn.Module, latents: Tensor, t: float) -> Tensor:
        """One call of the model or a twin."""
        ...

    def noise(self) -> Tensor:
        """What all steps start from."""
        ...

    def last(self, model: nn.Module) -> nn.Module:
        """A module that runs where the last block computes, and only there."""
        ...

    def ideal(self) -> nn.Module:
        """A twin that always hits and decides nothing."""
        ...


@dataclass(slots=True)
class Idling:
    """Idle blocks at a width, 256 tokens of the picture and 32 of the text."""

    width: int
    blocks: int = 8
    edge: int = 16
    model: nn.Module = field(init=False)
    text: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.text = Idle(self.blocks), torch.randn(1, 32, self.width)

    def call(self, model: nn.Module, latents: Tensor, t: float) -> Tensor:
        """One call."""
        return model(latents, self.text, t)

    def noise(self) -> Tensor:
        """Hidden states."""
        return torch.randn(1, self.edge**2, self.width)

    def last(self, model: nn.Module) -> nn.Module:
        """What the last block runs."""
        return model.get_submodule(f"transformer_blocks.{self.blocks - 1}.work")

    def ideal(self) -> nn.Module:
        """The first block and an addition."""
        return _short(self.model, self.text, self.noise())


@dataclass(slots=True)
class Working:
    """A Flux with random weights."""

    setting: pab.Setting
    model: nn.Module = field(init=False)
    loop: pab.Loop = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.loop = self.setting.model(), pab.Loop(self.setting)

    def call(self, model: nn.Module, latents: Tensor, t: float) -> Tensor:
        """One call."""
        self.loop.t = torch.tensor(t)
        return self.loop.call(model, latents)

    def noise(self) -> Tensor:
        """Latents."""
        return torch.randn_like(self.loop.noise)

    def last(self, model: nn.Module) -> nn.Module:
        """A projection of the last block."""
        return model.get_submodule(f"single_transformer_blocks.{self.setting.single - 1}.attn.to_q")

    def ideal(self) -> nn.Module:
        """The first block and an addition, between what stands around the blocks."""
        width = 64 * self.setting.heads
        short = _short(
            self.model, torch.randn(1, self.setting.text, width), torch.randn(1, self.setting.edge**2, width)
        )
        short.single_transformer_blocks = nn.ModuleList()
        return short


def _short(model: nn.Module, text: Tensor, picture: Tensor) -> nn.Module:
    short = twin(model)
    short.transformer_blocks = nn.ModuleList([short.get_submodule("transformer_blocks.0"), Added(text, picture)])
    return short


def ours(model: nn.Module, threshold: float, current: Callable[[], float]) -> None:
    """`fbc.cp`, traced."""
    cachepolicy.apply(model, "fbc", timestep=current, threshold=threshold)


def diffusers(model: nn.Module, threshold: float, _current: Callable[[], float]) -> None:
    """The hooks of diffusers, in one cache context for good: pipelines enter one a step, off our clock."""
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold))
    _set_cache_context(model, CacheContext("only"))


def cache_dit(model: nn.Module, threshold: float, _current: Callable[[], float]) -> None:
    """cache-dit's first n = 1 blocks, last n = 0, without its warm-up and its limits."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit as library

    config = library.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=0
    )
    target: Any = model
    if isinstance(model, Idle):
        target = library.BlockAdapter(
            transformer=model, blocks=model.transformer_blocks, forward_pattern=library.ForwardPattern.Pattern_1
        )
    library.enable_cache(target, cache_config=config)


SYSTEMS: Mapping[str, Callable[[nn.Module, float, Callable[[], float]], None]] = {
    "ours": ours,
    "diffusers": diffusers,
    "cache-dit": cache_dit,
}


def systems() -> list[str]:
    """Those that are installed."""
    return [name for name in SYSTEMS if name != "cache-dit" or importlib.util.find_spec("cache_dit") is not None]


# --- the measurement -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """One subject in all ways, and the CPU seconds of each step by way; the first step, which computes, is left out."""

    subject: Subject
    steps: int
    t: float = 1000.0
    models: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    latents: list[Tensor] = field(default_factory=list[Tensor])
    taken: list[list[dict[str, Taken]]] = field(default_factory=list[list[dict[str, Taken]]])

    def __post_init__(self) -> None:
        noise = self.subject.noise()
        # Not a trajectory but a neighbourhood: every step is near the first, some nearer.
        self.latents = [noise + (0.02 + 0.04 * (step % 3)) * self.subject.noise() for step in range(self.steps)]
        self.models = {"bare": self.subject.model, "ideal": self.subject.ideal()}
        for what, threshold in (("hit", HIT), ("miss", MISS)):
            self.models |= {f"{system} {what}": self.attached(system, threshold) for system in systems()}

    def attached(self, system: str, threshold: float) -> nn.Module:
        """A twin with the cache of a system on it."""
        model = twin(self.subject.model)
        SYSTEMS[system](model, threshold, lambda: self.t)
        return model

    def trajectory(self) -> Iterator[Tensor]:
        """The latents of each step; times fall from 1000."""
        for step, latents in enumerate(self.latents):
            self.t = 1000.0 * (1 - step / self.steps)
            yield latents

    def letters(self, model: nn.Module) -> str:
        """One trajectory: C where the last block ran, R where it did not."""
        ran = list[bool]()
        watch = self.subject.last(model).register_forward_hook(lambda *_: ran.append(True))
        letters = ""
        for latents in self.trajectory():
            ran.clear()
            self.subject.call(model, latents, self.t)
            letters += "C" if ran else "R"
        watch.remove()
        return letters

    def round(self, shuffle: random.Random) -> None:
        """One trajectory of all ways, step by step, in an order of its own at each."""
        order = list(self.models)
        self.taken.append([])
        for step, latents in enumerate(self.trajectory()):
            shuffle.shuffle(order)
            taken = dict[str, Taken]()
            for way in order:
                taken[way], _ = timed(functools.partial(self.subject.call, self.models[way], latents, self.t))
            if step:
                self.taken[-1].append(taken)

    def decisions(self) -> dict[str, set[str]]:
        """What the systems do on the same inputs under three thresholds; the third leaves some steps on each side."""
        between = self._between()
        return {
            f"{threshold:.3g}": {self.letters(self.attached(system, threshold)) for system in systems()}
            for threshold in (HIT, between, MISS)
        }

    def _between(self) -> float:
        model = twin(self.subject.model)
        run = cachepolicy.apply(model, "fbc", timestep=lambda: self.t, threshold=HIT)
        self.letters(model)
        assert run.trace is not None
        assert run.trace.last is not None
        drifts = [number for signals in run.trace.last.signals.values() for each in signals.values()
                  for number in each.values()]  # fmt: skip
        return sorted(drifts[1:])[len(drifts) // 2 - 1] * (1 + 1e-4)

    # What is read off: over trajectories, or over single steps.

    def above(self, way: str) -> list[float]:
        """Microseconds a step takes above the ideal (a hit) or the bare model (a miss), a number a trajectory."""
        base = "ideal" if way.endswith("hit") else "bare"
        return [1e6 * sum(each[way].cpu - each[base].cpu for each in steps) / len(steps) for steps in self.taken]

    def milliseconds(self, way: str) -> Spread:
        """What a step takes."""
        return spread([1e3 * each[way].cpu for steps in self.taken for each in steps])

    def ratios(self, way: str, base: str) -> Spread:
        """A way's time over another's, within one step."""
        return spread([each[way].cpu / each[base].cpu for steps in self.taken for each in steps])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No gradients, and no word of a policy that reuses nothing, which is the point, nor of what cache-dit finds."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# --- the tables ------------------------------------------------------------------------------------------

KINDS = ("hit", "miss")


def decision_table(title: str, bench: Bench) -> str:
    """What deciding takes above doing, and ours against the others'."""
    heads = ["hit, µs", "miss, µs", "ours / its: hit", "ours / its: miss"]
    rows = dict[str, list[object]]()
    for system in systems():
        cells: list[object] = [f"{spread(bench.above(f'{system} {kind}')):.0f}" for kind in KINDS]
        for kind in KINDS:
            pairs = zip(bench.above(f"ours {kind}"), bench.above(f"{system} {kind}"), strict=True)
            cells.append(spread([mine / theirs for mine, theirs in pairs]))
        rows[system] = cells
    return table(title, heads, rows)


def step_table(title: str, bench: Bench) -> str:
    """Whole steps: against the ideal or the bare model, and ours against the others'."""
    heads = ["hit / ideal", "miss / bare", "ours / its: hit", "ours / its: miss"]
    rows = dict[str, list[object]]()
    for system in systems():
        cells = [bench.ratios(f"{system} hit", "ideal"), bench.ratios(f"{system} miss", "bare")]
        cells += [bench.ratios(f"ours {kind}", f"{system} {kind}") for kind in KINDS]
        rows[system] = [f"{cell:.3f}" for cell in cells]
    return table(title, heads, rows)


def agreement(bench: Bench) -> str:
    """Whether all decided alike."""
    decisions = bench.decisions()
    alike = all(len(letters) == 1 for letters in decisions.values())
    shown = ", ".join(f"{' or '.join(sorted(letters))} at {threshold}" for threshold, letters in decisions.items())
    return f"decisions {'equal' if alike else 'DIFFERENT'}: {shown}"


def report(title: str, bench: Bench, rounds: int, tabulate: Callable[[str, Bench], str]) -> str:
    """Check, measure, and tabulate one subject."""
    agreed = agreement(bench)
    shuffle = random.Random(0)
    bench.round(shuffle)
    bench.taken.clear()  # the first one warms up
    for _ in range(rounds):
        bench.round(shuffle)
    bare, ideal = bench.milliseconds("bare"), bench.milliseconds("ideal")
    return f"{agreed}\na bare step {bare} ms, an ideal hit {ideal} ms\n\n{tabulate(title, bench)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 8], help="widths, in heads of 64")
    parser.add_argument("--blocks", type=int, default=4, help="double blocks, and single blocks")
    parser.add_argument("--edge", type=int, default=16, help="picture tokens along one edge")
    parser.add_argument("--steps", type=int, default=8, help="steps of a trajectory")
    parser.add_argument("--rounds", type=int, default=40, help="trajectories of the idle model; of Flux fewer if wide")
    given = parser.parse_args(arguments)
    one_thread()
    if "cache-dit" not in systems():
        print("cache-dit is not installed: its rows are left out\n")
    with quiet():
        for heads in given.heads:
            idle = Bench(Idling(64 * heads, 2 * given.blocks, given.edge), given.steps)
            print(report(f"idle blocks of width {64 * heads}, above", idle, given.rounds, decision_table))
        for heads in given.heads:
            setting = pab.Setting(given.blocks, given.blocks, heads, given.edge)
            flux = Bench(Working(setting), given.steps)
            rounds = max(1, given.rounds // (2 if heads == 1 else 20))
            print(report(f"Flux {given.blocks} + {given.blocks}, width {64 * heads}", flux, rounds, step_table))


if __name__ == "__main__":
    main()
