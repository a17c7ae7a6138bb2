"""Measure a policy on the emoji model: time, FLOPs and pictures, against the uncached run and against fewer steps.

The three runs alternate over several rounds, so that other load on the machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cachepolicy.engine.apply import apply
from cachepolicy.errors import counted
from cachepolicy.language import ir
from cachepolicy.tools.emoji import NAMES, EmojiPipeline, load_pipeline
from cachepolicy.tools.flops import Flops, counting
from cachepolicy.tools.pictures import to_pil
from cachepolicy.tools.quality import psnr
from cachepolicy.tools.sampling import Progress


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling of each run.

    Attributes:
        steps: The number of denoising steps.
        seed: The seed of the initial noise.
        pictures: The batch size.
        pairs: The number of timed rounds.
    """

    steps: int = 50
    seed: int = 0
    pictures: int = 12
    pairs: int = 3


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, the smallest and the largest value of a ratio over all rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one run, compared with the uncached run.

    Attributes:
        name: The name of the run for people.
        steps: The number of denoising steps.
        wall: The speed-up in wall-clock time: the seconds of the uncached run divided by those of this run.
        cpu: The speed-up in CPU time of the process.
        flops: The FLOPs that ran, as a share of the uncached run's, 0 to 1.
        calls: The calls of the policy's sites that ran, as a share of the uncached run's, 0 to 1.
        psnr: The mean peak signal-to-noise ratio in dB over the pictures that differ, infinite if none differs.
        worst_psnr: The smallest ratio of a picture.
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
    """The result of a demonstration.

    Attributes:
        policy: The run with the policy.
        fewer_steps: The uncached run with as many steps as the policy's FLOPs pay for.
        digest: The semantic hash of the policy with its params.
        sampling: The sampling of the runs.
        seconds: The median wall-clock seconds of the uncached run.
        uncached: The pictures of the uncached run, `(N, 3, H, W)` in [-1, 1].
        cached: The pictures of the run with the policy, likewise.
    """

    policy: Row
    fewer_steps: Row
    digest: str
    sampling: Sampling
    seconds: float
    uncached: torch.Tensor = field(repr=False)
    cached: torch.Tensor = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain data. Infinite numbers become None."""
        rows = {"policy": asdict(self.policy), "fewer_steps": asdict(self.fewer_steps)}
        numbers = {
            name: {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for name, row in rows.items()
        }
        return {**numbers, "digest": self.digest, "uncached_seconds": self.seconds, **asdict(self.sampling)}


def measure(
    policy: str | os.PathLike[str] | ir.Policy,
    settings: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
    *,
    progress: Progress | None = None,
) -> Demo:
    """Sample the emoji model uncached, with the policy and with fewer steps, in turn.

    A first untimed pass of each run counts its FLOPs and warms up.

    Args:
        policy: What `cachepolicy.apply` takes as a policy.
        settings: Params of the policy.
        sampling: The sampling of the runs; `Sampling()` if None.
        progress: Called after each step.

    Returns:
        The measurements and the pictures.

    Raises:
        PolicyError: The policy or a param is wrong, or no module of the model matches the policy.
    """
    # One thread: in a model this small, threads that wait for each other would take most of the measured time.
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
    modules, digest = bench.check()
    plain, cached = bench.counted(steps, cached=False), bench.counted(steps, cached=True)
    fewer = min(steps, max(1, round(steps * cached.total / plain.total)))
    bench.total -= (1 + pairs) * (steps - fewer)
    short = bench.counted(fewer, cached=False)
    runs = {"uncached": (steps, False), "policy": (steps, True), "fewer steps": (fewer, False)}
    rounds = [bench.round(runs, backwards=number % 2 == 1) for number in range(pairs)]
    last = rounds[-1]

    uncached_calls = sum(plain.calls[name] for name in modules)

    def row(run: str, name: str, flops: Flops) -> Row:
        mean, worst = psnr(last["uncached"].images, last[run].images)
        return Row(
            name=name,
            steps=runs[run][0],
            wall=_spread([timed["uncached"].wall / timed[run].wall for timed in rounds]),
            cpu=_spread([timed["uncached"].cpu / timed[run].cpu for timed in rounds]),
            flops=flops.total / plain.total,
            # A policy without sites leaves all calls as they were.
            calls=sum(flops.calls[name] for name in modules) / uncached_calls if uncached_calls else 1.0,
            psnr=mean,
            worst_psnr=worst,
        )

    return Demo(
        policy=row("policy", "with the policy", cached),
        fewer_steps=row("fewer steps", counted(fewer, "step"), short),
        digest=digest,
        sampling=sampling,
        seconds=statistics.median(timed["uncached"].wall for timed in rounds),
        uncached=last["uncached"].images,
        cached=last["policy"].images,
    )


def _spread(ratios: Sequence[float]) -> Spread:
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True, slots=True)
class _Sampled:
    wall: float
    cpu: float
    images: torch.Tensor


@dataclass(slots=True)
class _Bench:
    """The pipeline, the policy and the sampling, and how many of all steps are done."""

    pipe: EmojiPipeline
    policy: str | os.PathLike[str] | ir.Policy
    settings: Mapping[str, Any]
    sampling: Sampling
    progress: Progress | None
    done: int = 0
    total: int = 0

    def check(self) -> tuple[list[str], str]:
        """Return the names of the modules that the policy decides on, and the policy's semantic hash."""
        self.pipe.set_progress_bar_config(disable=True)  # pyright: ignore[reportUnknownMemberType]
        with apply(self.pipe, self.policy, **self.settings) as run:
            return [name for site in run.plan.sites for name in site.modules], run.plan.resolved.digest

    def counted(self, steps: int, *, cached: bool) -> Flops:
        """Sample once and count the FLOPs that ran."""
        with self._with_policy(cached), counting(self.pipe.transformer) as flops:
            self._sample(steps, "counting FLOPs")
        return flops

    def round(self, runs: Mapping[str, tuple[int, bool]], *, backwards: bool) -> dict[str, _Sampled]:
        """Sample and time each run once. `runs` has the number of steps, and True for the policy, by name."""
        order = reversed(list(runs)) if backwards else iter(runs)
        return {name: self._timed(name, *runs[name]) for name in order}

    def _timed(self, name: str, steps: int, cached: bool) -> _Sampled:
        # The policy is applied before the clocks start.
        with self._with_policy(cached):
            wall, cpu = time.perf_counter(), time.process_time()
            images = self._sample(steps, name)
            return _Sampled(time.perf_counter() - wall, time.process_time() - cpu, images)

    def _with_policy(self, cached: bool) -> contextlib.AbstractContextManager[object]:
        return apply(self.pipe, self.policy, **self.settings) if cached else contextlib.nullcontext()

    def _sample(self, steps: int, description: str) -> torch.Tensor:
        labels = [(7 * number) % len(NAMES) for number in range(self.sampling.pictures)]

        def advance(_pipe: object, _step: int, _t: object, _tensors: object) -> None:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total, description)

        images = self.pipe(
            labels, steps, seed=self.sampling.seed, output_type="pt", callback_on_step_end=advance, return_dict=False
        )[0]
        assert isinstance(images, torch.Tensor)
        return images


# --- the picture -----------------------------------------------------------------------------------------

_COLUMNS, _SCALE, _GAP, _HEAD = 4, 3, 3, 26


def save(demo: Demo, path: str | os.PathLike[str], headings: tuple[str, str]) -> None:
    """Write the uncached and the cached pictures side by side, as two grids.

    Args:
        demo: The result of `measure`.
        path: The file. Its suffix chooses the format.
        headings: The texts above the uncached and the cached pictures.

    Raises:
        OSError: The file cannot be written.
        ValueError: Pillow knows no format with this suffix.
    """
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
    for number, tile in enumerate(tiles):
        row, column = divmod(number, _COLUMNS)
        grid.paste(tile, (_GAP + column * pitch, _HEAD + _GAP + row * pitch))
    return grid
