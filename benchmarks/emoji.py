"""Pictures of the emoji model under PAB, First Block Cache and FasterCache, beside the uncached run and fewer steps.

Every way draws the same pictures from the same noise, a few at a time; for each few all ways run in turn, in an order
of its own. FLOPs are counted as they run, in a pass that is not timed. `python -m benchmarks.emoji`
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import cachepolicy
from benchmarks._measure import Spread, one_thread, spread, timed
from cachepolicy.tools.emoji import NAMES, EmojiPipeline, load_pipeline
from cachepolicy.tools.flops import counting
from cachepolicy.tools.pictures import to_pil


@dataclass(frozen=True, slots=True)
class Way:
    """A way to sample: a number of steps (of 50), and a policy with its settings or none."""

    steps: float = 1.0
    policy: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    measured: bool = False
    """Whether it decides by what it measures, so that its FLOPs are another number for other pictures."""


def _fbc(threshold: float) -> Way:
    return Way(policy="fbc", settings={"threshold": threshold}, measured=True)


def _fastercache(**settings: Any) -> Way:
    return Way(policy="fastercache", settings=settings)


UNCACHED = "uncached"
STEPS = {f"{steps} steps": Way(steps=steps / 50) for steps in (43, 35, 25, 17, 12)}
WAYS: Mapping[str, Way] = {
    UNCACHED: Way(),
    "uncached again": Way(),
    **STEPS,
    **{f"PAB, every {every}": Way(policy="pab", settings={"spatial_every": every}) for every in (2, 3)},
    **{f"FBC {threshold:.2f}": _fbc(threshold) for threshold in (0.05, 0.1, 0.15, 0.2, 0.3)},
    "FasterCache": _fastercache(),
    "FasterCache, diffusers' variant": _fastercache(feedback=True),
    "FasterCache, unconditional half only": _fastercache(spatial_every=None),
    "same, every 3, no growth": _fastercache(spatial_every=None, uncond_every=3, low=1.0, high=1.0),
}


# --- sampling --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What a way did: CPU seconds by round, FLOPs of each picture of each round, and all its pictures."""

    seconds: list[float] = field(default_factory=list[float])
    flops: list[float] = field(default_factory=list[float])
    pictures: list[Tensor] = field(default_factory=list[Tensor])


@dataclass(slots=True)
class Bench:
    """The pipeline, and what all ways did with it."""

    steps: int
    seed: int
    pipe: EmojiPipeline = field(default_factory=load_pipeline)
    outcomes: dict[str, Outcome] = field(default_factory=lambda: {name: Outcome() for name in WAYS})

    def round(self, numbers: Sequence[int], shuffle: random.Random) -> None:
        """Draw the pictures of these numbers (and classes) in every way."""
        order = list(WAYS)
        shuffle.shuffle(order)
        for name in order:
            way, outcome = WAYS[name], self.outcomes[name]
            outcome.flops.append(self._counted(way, numbers, outcome.flops))
            with self._attached(way):
                taken, pictures = timed(lambda way=way: self._drawn(way, numbers))
            outcome.seconds.append(taken.cpu)
            outcome.pictures += list(pictures)

    def _counted(self, way: Way, numbers: Sequence[int], before: Sequence[float]) -> float:
        """FLOPs of one picture; a schedule that the clock alone decides is counted once, with one picture."""
        if not way.measured:
            if before:
                return before[0]
            numbers = numbers[:1]
        with self._attached(way), counting(self.pipe.transformer) as flops:
            self._drawn(way, numbers)
        return flops.total / len(numbers)

    def _attached(self, way: Way) -> contextlib.AbstractContextManager[object]:
        return cachepolicy.apply(self.pipe, way.policy, **way.settings) if way.policy else contextlib.nullcontext()

    def _drawn(self, way: Way, numbers: Sequence[int]) -> Tensor:
        noise = [torch.Generator().manual_seed(self.seed * 100_003 + number) for number in numbers]
        labels = [number % len(NAMES) for number in numbers]
        pictures = self.pipe(
            labels, max(1, round(way.steps * self.steps)), generator=noise, output_type="pt", return_dict=False
        )[0]
        assert isinstance(pictures, Tensor)
        return pictures


def drawn(pictures: int, at_a_time: int, steps: int, seed: int) -> Bench:
    """All ways, over all pictures."""
    bench, shuffle = Bench(steps, seed), random.Random(seed)
    bench.pipe.set_progress_bar_config(disable=True)
    bench._drawn(WAYS[UNCACHED], [0])  # noqa: SLF001 - warms up
    for start in range(0, pictures, at_a_time):
        bench.round(range(start, min(start + at_a_time, pictures)), shuffle)
    return bench


# --- numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """A way against the uncached run: shares of its FLOPs and CPU time, and its pictures' distance in dB."""

    flops: float
    cpu: Spread
    psnr: float
    worst_tenth: float


def psnr(bench: Bench, name: str) -> list[float]:
    """Peak signal-to-noise ratio of each picture against the uncached one, infinite where they are equal."""
    pairs = zip(bench.outcomes[UNCACHED].pictures, bench.outcomes[name].pictures, strict=True)
    errors = [float((reference.double() - other.double()).square().mean()) for reference, other in pairs]
    return [10 * math.log10(4 / error) if error else math.inf for error in errors]


def row(bench: Bench, name: str) -> Row:
    """The numbers of one way."""
    outcome, base = bench.outcomes[name], bench.outcomes[UNCACHED]
    ratios = [mine / theirs for mine, theirs in zip(outcome.seconds, base.seconds, strict=True)]
    decibels = sorted(psnr(bench, name))
    return Row(
        flops=sum(outcome.flops) / sum(base.flops),
        cpu=spread(ratios),
        psnr=statistics.fmean(decibels),
        worst_tenth=decibels[max(0, math.ceil(len(decibels) / 10) - 1)],
    )


def fewer_steps(rows: Mapping[str, Row], flops: float) -> tuple[float, float] | None:
    """What fewer steps reach at this share of FLOPs, mean and worst tenth; None outside what was sampled."""
    known = sorted((rows[name].flops, rows[name].psnr, rows[name].worst_tenth) for name in STEPS)
    for (low, *these), (high, *those) in itertools.pairwise(known):
        if low <= flops <= high:
            part = (flops - low) / (high - low) if high > low else 0.0
            mean, worst = (a + part * (b - a) for a, b in zip(these, those, strict=True))
            return mean, worst
    return None


def report(bench: Bench) -> str:
    """The table, in Markdown."""
    rows = {name: row(bench, name) for name in WAYS}
    lines = [
        "| | FLOPs | CPU time | PSNR, dB: mean | worst tenth | fewer steps at equal FLOPs: mean | worst tenth |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, each in rows.items():
        baseline = fewer_steps(rows, each.flops) if WAYS[name].policy else None
        cells = [f"{each.flops:.3f}", f"{each.cpu}", _decibels(each.psnr), _decibels(each.worst_tenth)]
        cells += [f"{value:.1f}" for value in baseline] if baseline else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


# --- pictures --------------------------------------------------------------------------------------------

_MARGIN, _GAP = 230, 2


def suffering(bench: Bench, number: int) -> list[int]:
    """The pictures that lose the most over all policies, in their own order."""
    losses = [psnr(bench, name) for name, way in WAYS.items() if way.policy]
    total = [sum(min(each, 100.0) for each in column) for column in zip(*losses, strict=True)]
    return sorted(sorted(range(len(total)), key=total.__getitem__)[:number])


def save(bench: Bench, path: Path, shown: int, scale: int) -> None:
    """A contact sheet: a line for each way, a column for each of the pictures that lose the most."""
    chosen = suffering(bench, shown)
    ways = [name for name in WAYS if name != "uncached again"]
    side = bench.outcomes[UNCACHED].pictures[0].shape[-1] * scale
    pitch = side + _GAP
    sheet = Image.new("RGB", (_MARGIN + len(chosen) * pitch, len(ways) * pitch), "white")
    for line, name in enumerate(ways):
        ImageDraw.Draw(sheet).text((4, line * pitch + side // 2 - 7), name, "black", ImageFont.load_default(13))
        tiles = to_pil(torch.stack([bench.outcomes[name].pictures[number] for number in chosen]))
        for column, tile in enumerate(tiles):
            enlarged = tile.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (_MARGIN + column * pitch, line * pitch))
    # A palette loses nothing the eye would miss, and two thirds of the file.
    sheet.quantize(255).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=len(NAMES), help="how many pictures, one class after another")
    parser.add_argument("--at-a-time", type=int, default=6, help="pictures in one call of the pipeline")
    parser.add_argument("--steps", type=int, default=50, help="steps of the uncached run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="write a contact sheet (PNG) here")
    parser.add_argument("--shown", type=int, default=12, help="how many pictures it shows")
    parser.add_argument("--scale", type=int, default=1, help="how much they are enlarged")
    given = parser.parse_args(arguments)
    one_thread()
    bench = drawn(given.number, given.at_a_time, given.steps, given.seed)
    print(report(bench))
    if given.pictures is not None:
        save(bench, given.pictures, given.shown, given.scale)
        print(f"\n{given.pictures}: {', '.join(NAMES[n % len(NAMES)] for n in suffering(bench, given.shown))}")


if __name__ == "__main__":
    main()
