"""The picture and the table at the head of the README: a tuned policy beside what costs nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.headline [--model dit] [--tune] [--samples 64]

The samples have seeds that were not tuned on. `--tune` first tunes the model and writes `tuned.cp` beside its weights.
The numbers, a chart and the pictures are written to `docs/headline`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cachepolicy
from benchmarks._measure import one_thread
from cachepolicy.reports.comparison import markdown_table
from cachepolicy.tools import emoji, emoji_flux
from cachepolicy.tools.emoji import NAMES
from cachepolicy.tuning.compare import Comparison

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "headline"
STEPS, COST = 50, 0.28
TRAINING, HELD_OUT = 7, 5
"""Seeds of the recorded calls and of those that are compared."""


@dataclass(frozen=True)
class Model:
    """A shipped model: its folder, its pipeline, and the arguments with which it draws some names."""

    folder: Path
    load: Callable[[], Any]
    arguments: Callable[[Sequence[str]], dict[str, Any]]

    def calls(self, samples: int, seed: int, at_a_time: int) -> list[dict[str, Any]]:
        """Calls that draw all names in turn, each picture with noise of its own."""
        return [
            {
                **self.arguments([NAMES[7 * number % len(NAMES)] for number in numbers]),
                "num_inference_steps": STEPS,
                "generator": [torch.Generator().manual_seed(seed * 100_003 + number) for number in numbers],
            }
            for numbers in (range(first, first + at_a_time) for first in range(0, samples, at_a_time))
        ]


MODELS = {
    "dit": Model(ROOT / "data" / "emoji-dit", emoji.load_pipeline, lambda names: {"class_labels": list(names)}),
    "flux": Model(ROOT / "data" / "emoji-flux", emoji_flux.load_pipeline, emoji_flux.call_arguments),
}


def tuned(model: Model) -> None:
    """Tune a model on 24 samples, and write the policy beside its weights."""
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    result = cachepolicy.tune(
        pipe,
        model.calls(24, TRAINING, 4),
        held_out=model.calls(8, TRAINING + 1, 4),
        cost=COST,
        keep_scheduler=True,
        progress=_said,
    )
    result.save(str(model.folder / "tuned.cp"))
    print(result.text)


def compared(model: Model, samples: int) -> Comparison:
    """Compare the policy of a model on further samples."""
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    calls = model.calls(samples, HELD_OUT, 4)
    return cachepolicy.compare(pipe, calls, {"tuned": str(model.folder / "tuned.cp")}, progress=_said)


def table(data: Mapping[str, Any]) -> str:
    """The table of the README, from the numbers of a comparison. The page `docs/headline.md` has all rows."""
    lines = ["| | FLOPs | PSNR to uncached: mean | worst tenth | to converged: mean | worst tenth |"]
    lines.append("| --- | --: | --: | --: | --: | --: |")
    for row in data["rows"]:
        if row["kind"] != "converged" and " on the steps of " not in row["name"]:
            names = {"uncached": f"{STEPS} steps, uncached", "tuned": "**tuned policy**"}
            distances = [row[f"psnr_{reference}"] or {} for reference in ("uncached", "converged")]
            values = [distance.get(part) for distance in distances for part in ("mean", "p10")]
            cells = ["" if value is None else f"{value:.1f}" for value in values]
            lines.append(f"| {names.get(row['name'], row['name'])} | {row['cost']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(done: int, total: int, phase: str) -> None:
    print(f"\r{done}/{total} {phase:40}", end="\n" if done == total else "", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dit")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    one_thread()
    model = MODELS[given.model]
    if given.tune:
        tuned(model)
    comparison = compared(model, given.samples)
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / f"{given.model}.json").write_text(json.dumps(comparison.to_dict(), indent=1) + "\n", "utf-8")
    (given.results / f"{given.model}.svg").write_text(comparison.plot("converged"), "utf-8")
    baselines = [row.name for row in comparison.rows if row.kind == "baseline"]
    sheet = comparison.sheet(["uncached", "tuned", *baselines[:2]], scale=3)
    sheet.quantize(255).save(given.results / f"{given.model}.png", optimize=True)
    (given.results / f"{given.model}.md").write_text(markdown_table(comparison.rows) + "\n", "utf-8")
    print(markdown_table(comparison.rows), table(comparison.to_dict()), sep="\n\n")


if __name__ == "__main__":
    main()
