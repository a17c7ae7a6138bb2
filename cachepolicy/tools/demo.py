"""What a policy does to a real model: time, FLOPs and pictures against the uncached run and against fewer steps.

The three are sampled in turn, many times over, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cachepolicy.engine.run import apply
from cachepolicy.language import ir
from cachepolicy.tools.emoji import NAMES, EmojiPipeline, load_pipeline, to_pil
from cachepolicy.tools.flops import Flops, counting
from cachepolicy.tools.quality import psnr

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is sampled: denoising steps, the seed of the noise, pictures at a time, and how often each way is timed."""

    steps: int = 50
    seed: int = 0
    pictures: int = 12
    pairs: int = 3


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of a ratio over all rounds, and its least and largest value."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """One way to sample, against the uncached run.

    `wall` and `cpu` are the uncached run's seconds over its own (above 1 is faster); `flops` and `calls` are the shares
    of the uncached run's FLOPs and site calls that really ran; `psnr` is in dB, infinite where every picture is bitwise
    equal.
    """

    name: str
    steps: int
    wall: Spread
    cpu: Spread
    flops: float
    calls: float
    psnr: float
    worst_psnr: float


@dataclass(frozen=True, slots=True)
class Demo:
    """The outcome: a row for the policy, one for fewer steps at nearly its cost, and the pictures."""

    policy: Row
    fewer_steps: Row
    digest: str
    sampling: Sampling
    seconds: float
    uncached: torch.Tensor = field(repr=False)
    cached: torch.Tensor = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data; infinity becomes None."""
        rows = {"policy": self.policy, "fewer_steps": self.fewer_steps}
        numbers = {name: {key: _finite(value) for key, value in asdict(row).items()} for name, row in rows.items()}
        return {**numbers, "digest": self.digest, "uncached_seconds": self.seconds, **asdict(self.sampling)}


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(
    policy: str | os.PathLike[str] | ir.Policy,
    settings: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
    *,
    progress: Progress | None = None,
) -> Demo:
    """Sample the emoji model uncached, with the policy and with fewer steps, all in turn.

    A first pass of each, untimed, counts the FLOPs of what really ran and warms up. `progress` hears of every step:
    steps done, steps in all, what is sampled.

    Raises:
        PolicyError: the policy or a setting is wrong, or nothing in the model fits it.
    """
    # One thread: threads that wait for each other in a model this small would be most of what is timed.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(policy, settings or {}, sampling or Sampling(), progress)
    finally:
        torch.set_num_threads(threads)


def _measured(
    policy: str | os.PathLike[str] | ir.Policy,
    settings: Mapping[str, Any],
    sampling: Sampling,
    progress: Progress | None,
) -> Demo:
    steps, pairs = sampling.steps, sampling.pairs
    bench = _Bench(load_pipeline(), policy, settings, sampling, progress)
    bench.total = (3 + 3 * pairs) * steps
    sites, digest = bench.check()
    plain, cached = bench.counted(steps, cached=False), bench.counted(steps, cached=True)
    fewer = min(steps, max(1, round(steps * cached.total / plain.total)))
    bench.total -= (1 + pairs) * (steps - fewer)
    short = bench.counted(fewer, cached=False)
    ways = {"uncached": (steps, False), "policy": (steps, True), "fewer steps": (fewer, False)}
    rounds = [bench.round(ways, backwards=number % 2 == 1) for number in range(pairs)]
    last = rounds[-1]

    def row(way: str, name: str, flops: Flops) -> Row:
        each, worst = psnr(last["uncached"].images, last[way].images)
        return Row(
            name=name,
            steps=ways[way][0],
            wall=_spread([one["uncached"].wall / one[way].wall for one in rounds]),
            cpu=_spread([one["uncached"].cpu / one[way].cpu for one in rounds]),
            flops=flops.total / plain.total,
            calls=_share(sum(flops.calls[site] for site in sites), sum(plain.calls[site] for site in sites)),
            psnr=each,
            worst_psnr=worst,
        )

    return Demo(
        policy=row("policy", "with the policy", cached),
        fewer_steps=row("fewer steps", f"{fewer} steps", short),
        digest=digest,
        sampling=sampling,
        seconds=statistics.median(one["uncached"].wall for one in rounds),
        uncached=last["uncached"].images,
        cached=last["policy"].images,
    )


def _share(part: int, whole: int) -> float:
    """A policy without sites leaves every call as it was."""
    return part / whole if whole else 1.0


def _spread(ratios: Sequence[float]) -> Spread:
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True, slots=True)
class _Sampled:
    wall: float
    cpu: float
    images: torch.Tensor


@dataclass(slots=True)
class _Bench:
    """The model, what to draw with it, and how far the work is."""

    pipe: EmojiPipeline
    policy: str | os.PathLike[str] | ir.Policy
    settings: Mapping[str, Any]
    sampling: Sampling
    progress: Progress | None
    done: int = 0
    total: int = 0

    def check(self) -> tuple[list[str], str]:
        """The names of the modules that the policy decides on, and the policy's semantic hash."""
        self.pipe.set_progress_bar_config(disable=True)  # pyright: ignore[reportUnknownMemberType]
        with apply(self.pipe, self.policy, **self.settings) as run:
            return [name for site in run.plan.sites for name in site.modules], run.plan.resolved.digest

    def counted(self, steps: int, *, cached: bool) -> Flops:
        with self._attached(cached), counting(self.pipe.transformer) as flops:
            self._sample(steps, "counting FLOPs")
        return flops

    def round(self, ways: Mapping[str, tuple[int, bool]], *, backwards: bool) -> dict[str, _Sampled]:
        """One timed sampling of each; every second round runs in the other order."""
        order = reversed(list(ways)) if backwards else iter(ways)
        return {way: self._timed(way, *ways[way]) for way in order}

    def _timed(self, way: str, steps: int, cached: bool) -> _Sampled:
        with self._attached(cached):
            wall, cpu = time.perf_counter(), time.process_time()
            images = self._sample(steps, way)
            return _Sampled(time.perf_counter() - wall, time.process_time() - cpu, images)

    def _attached(self, cached: bool) -> contextlib.AbstractContextManager[object]:
        """The policy put on before the clock starts; without it the model is bare."""
        return apply(self.pipe, self.policy, **self.settings) if cached else contextlib.nullcontext()

    def _sample(self, steps: int, what: str) -> torch.Tensor:
        labels = [(7 * number) % len(NAMES) for number in range(self.sampling.pictures)]

        def advance(_pipe: object, _step: int, _t: object, _tensors: object) -> None:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total, what)

        images = self.pipe(
            labels, steps, seed=self.sampling.seed, output_type="pt", callback_on_step_end=advance, return_dict=False
        )[0]
        assert isinstance(images, torch.Tensor)
        return images


# --- the picture -----------------------------------------------------------------------------------------

_COLUMNS, _SCALE, _GAP, _HEAD = 4, 3, 3, 26


def save(demo: Demo, path: str | os.PathLike[str], headings: tuple[str, str]) -> None:
    """Write both grids of pictures side by side, each under its heading; the file's suffix tells the format."""
    from PIL import Image

    grids = [_grid(heading, pictures) for heading, pictures in zip(headings, (demo.uncached, demo.cached), strict=True)]
    sheet = Image.new("RGB", (sum(grid.width for grid in grids) + 8 * _GAP, grids[0].height), "white")
    sheet.paste(grids[0], (0, 0))
    sheet.paste(grids[1], (sheet.width - grids[1].width, 0))
    sheet.save(path)


def _grid(heading: str, pictures: torch.Tensor) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    tiles = [
        tile.resize((tile.width * _SCALE, tile.height * _SCALE), Image.Resampling.NEAREST) for tile in to_pil(pictures)
    ]
    pitch = tiles[0].width + _GAP
    grid = Image.new("RGB", (_COLUMNS * pitch + _GAP, _HEAD + math.ceil(len(tiles) / _COLUMNS) * pitch + _GAP), "white")
    ImageDraw.Draw(grid).text((_GAP, _GAP), heading, fill="black", font=ImageFont.load_default(16))
    for tile, (x, y) in zip(tiles, _corners(len(tiles), pitch), strict=True):
        grid.paste(tile, (x, y))
    return grid


def _corners(count: int, pitch: int) -> Iterator[tuple[int, int]]:
    for number in range(count):
        row, column = divmod(number, _COLUMNS)
        yield _GAP + column * pitch, _HEAD + _GAP + row * pitch
