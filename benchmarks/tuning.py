"""What tuning reaches on the two shipped models, on seeds that were not tuned on.

`python -m benchmarks.tuning [dit] [flux] [--calls 25 20 14 12] [--samples 64]` prints a row for each number of model
calls: the tuned policy against 50 Euler steps (the scheduler kept), and against a converged run (the scheduler
chosen) beside UniPC with as many calls. Hours on 2 cores; `--run-dir DIR` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cachepolicy.tools import emoji, emoji_flux
from cachepolicy.tools.quality import each_psnr, percentile
from cachepolicy.tuning.sampling import STEPS, Sampler
from cachepolicy.tuning.schedulers import with_solver
from cachepolicy.tuning.tuner import Tuning, tune

OWN = 50
CONVERGED = 120
TUNED_SEED, TESTED_SEED = 7, 5
BATCH = 16


def noise(seed: int, number: int) -> torch.Tensor:
    """The noise of a sample, which does not depend on how many are drawn."""
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed * 100_003 + number))


class Dit:
    """The class-conditional model, with both halves of guidance in one batch."""

    def __init__(self) -> None:
        self.pipe = emoji.load_pipeline()

    def call(self, seed: int, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments for some samples of a seed; the classes take turns."""
        latents = torch.stack([noise(seed, number) for number in numbers])
        return {"class_labels": [number % 36 for number in numbers], STEPS: OWN, "latents": latents}


class Flux:
    """The text-conditioned model in diffusers' `FluxPipeline`, with a call for each half of guidance."""

    def __init__(self) -> None:
        self.pipe = emoji_flux.load_pipeline()

    def call(self, seed: int, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments for some samples of a seed; the prompts take turns."""
        pictures = torch.stack([noise(seed, number) for number in numbers])
        unshuffled = torch.nn.functional.pixel_unshuffle(pictures, 2)
        latents = self.pipe._pack_latents(unshuffled, len(numbers), 12, 16, 16)  # noqa: SLF001 (the only packer)
        prompts = [emoji.NAMES[number % 36].replace("_", " ") for number in numbers]
        return {**emoji_flux.call_arguments(prompts), "guidance_scale": 1.0, STEPS: OWN, "latents": latents}


MODELS: dict[str, Callable[[], Any]] = {"dit": Dit, "flux": Flux}


class Bench:
    """Samples the tested seed in each way, in batches."""

    def __init__(self, name: str, samples: int, run_dir: str | None) -> None:
        self.name = name
        self.model = MODELS[name]()
        self.pipe = self.model.pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.sampler = Sampler(self.pipe)
        self.run_dir = None if run_dir is None else Path(run_dir) / name
        numbers = range(samples)
        self.calls = [
            self.model.call(TESTED_SEED, numbers[first : first + BATCH]) for first in range(0, samples, BATCH)
        ]
        self.euler = self.kept(f"euler-{samples}", OWN)
        self.exact = self.kept(f"exact-{samples}", CONVERGED, with_solver(self.pipe.scheduler, "UniPC"))

    def kept(self, name: str, steps: int, scheduler: Any = None) -> torch.Tensor:
        """All samples without a policy, drawn once for each run directory."""
        if self.run_dir is None:
            return self.pictures(steps, scheduler)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        file = self.run_dir / f"{name}.pt"
        if not file.exists():
            torch.save(self.pictures(steps, scheduler), file)
        return torch.load(file)

    def pictures(self, steps: int | None, scheduler: Any = None) -> torch.Tensor:
        """All samples of the tested seed."""
        drawn = list[torch.Tensor]()
        for call in self.calls:
            with self.sampler.on(scheduler, steps, call) as arguments:
                drawn.append(self.sampler(arguments).pictures)
        return torch.cat(drawn)

    def tuned(self, computed: int, *, keep: bool) -> Tuning:
        """Tune on the other seed."""
        recorded, held_out = (24, 4) if keep else (12, 4)
        spread = [number * 36 // recorded for number in range(recorded)] if not keep else list(range(recorded))
        calls = [self.model.call(TUNED_SEED, [number]) for number in [*spread, *range(36, 36 + held_out)]]
        folder = None if self.run_dir is None else self.run_dir / ("own" if keep else "chosen")
        return tune(
            self.pipe,
            calls[:recorded],
            held_out=calls[recorded:],
            cost=computed / OWN,
            keep_scheduler=keep,
            run_dir=folder,
        )

    def row(self, computed: int) -> str:
        """The line of the table for a number of model calls."""
        cells = list[str]()
        for keep in (True, False):
            started = time.perf_counter()
            found = self.tuned(computed, keep=keep)
            own = self.pipe.scheduler
            with found.apply(self.pipe, trace=False):
                drawn = self.pictures(found.base.steps)
            self.pipe.scheduler = own
            reference = self.euler if keep else self.exact
            cells += [
                distance(reference, drawn), f"{found.chosen.psnr:.2f}", f"{found.chosen.forecast:.2f}",
                f"{found.evaluations:.0f}", *([] if keep else [str(found.base)]),
            ]  # fmt: skip
            print(self.name, computed, found.base, found.chosen, f"{time.perf_counter() - started:.0f} s", flush=True)
        unipc = self.kept(f"unipc-{computed}-{len(self.euler)}", computed, with_solver(self.pipe.scheduler, "UniPC"))
        cells.append(distance(self.exact, unipc))
        return f"| {self.name} | {computed} | {' | '.join(cells)} |"


def distance(reference: torch.Tensor, drawn: torch.Tensor) -> str:
    """Mean and worst tenth of the PSNR."""
    ratios = each_psnr(reference, drawn)
    return f"{statistics.fmean(ratios):.2f} / {percentile(ratios, 10):.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=[*MODELS, []])
    parser.add_argument("--calls", type=int, nargs="+", default=[25, 20, 14, 12])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--run-dir")
    arguments = parser.parse_args()
    own = ["PSNR / p10", "tune says", "forecast", "runs"]
    titles = ["model", "calls", *own, *own, "base", "UniPC"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}", flush=True)
    for name in arguments.models:
        bench = Bench(name, arguments.samples, arguments.run_dir)
        print(f"{name}: 50 Euler steps against converged {distance(bench.exact, bench.euler)}", flush=True)
        for computed in arguments.calls:
            print(bench.row(computed), flush=True)


if __name__ == "__main__":
    main()
