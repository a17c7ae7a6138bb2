"""The table of `docs/coverage.md`: every model of the zoo under every policy, ours and diffusers', by running them.

python tests/differential/coverage_table.py            # what differs from the record
python tests/differential/coverage_table.py --write    # the record and the table anew
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blocks
import halves
import harness
import torch
from diffusers.hooks import apply_faster_cache
from torch import nn

import cachepolicy
from tests.support import zoo

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "data" / "coverage.json"
TABLE = ROOT / "docs" / "coverage.md"

POLICIES = ("pab", "fastercache", "fbc")

RANKS = ("equal", "runs", "told", "none", "refused", "wrong", "fails")
"""What may be said of ours, the best first."""

MEANINGS = {
    "equal": "runs, and every step equals diffusers' to the last bit",
    "runs": "runs, skips work, and a hit on a repeated input equals the computed output",
    "told": "as `runs`, once it is told what it cannot find: `grid=` of a sequence, or `inputs=`",
    "none": "does not apply: the model takes no guidance batch",
    "refused": "a clear error, and the bare model",
    "wrong": "runs, and gives what it should not",
    "fails": "an error that is no answer",
    "raises": "an error, at apply or in a forward",
    "named": "runs once all batched inputs are listed in a private field",
    "labels": "runs, and takes one kind of attention for another",
}

AUDIO = ("stable_audio", "stable_audio3", "ace_step", "longcat_audio", "minimax_music3")
"""Models whose prediction is no picture."""

STEPS = (950.0, 850.0, 700.0, 620.0, 540.0, 400.0, 250.0, 150.0)

Cell = dict[str, str]
Row = dict[str, Cell]


def row(name: str) -> Row:
    """What happens with one model, by policy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        return {"pab": _pab(name), "fastercache": _fastercache(name), "fbc": _fbc(name)}


def _tried(run: Callable[[], Any]) -> Any:
    """What a run gave, or the error that ended it."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 (any of diffusers' errors is a result here)
        return error


def _failed(error: Exception) -> str:
    return "refused" if isinstance(error, cachepolicy.PolicyError) else "fails"


def _repeats(name: str, policy: str, *, batch: int = 1, **params: Any) -> bool:
    """True where hits on a repeated input give the computed output, and there are any."""
    model, inputs, clock = zoo.build(name), zoo.entry(name).inputs(batch=batch), iter(STEPS[-3:])
    with torch.no_grad(), cachepolicy.apply(model, policy, timestep=lambda: next(clock), **params) as run:
        first, *hits = [harness.flat(zoo.output(model(**inputs))).clone() for _ in range(3)]
        reused = "R" in "".join(run.trace.rows().values())
    return reused and all(bool((hit - first).abs().max() <= 1e-4 * first.abs().max()) for hit in hits)


# --- Pyramid Attention Broadcast -------------------------------------------------------------------------


def _pab(name: str) -> Cell:
    knobs, model = harness.Knobs(spatial=2, temporal=3, cross=4), zoo.build(name)
    theirs = _tried(lambda: harness.run_diffusers_pab(name, model, knobs, STEPS))
    ours = _tried(lambda: harness.run_ours(name, model, knobs, STEPS))
    if isinstance(ours, Exception):
        return {"ours": _failed(ours), "diffusers": _theirs(theirs)}
    if not isinstance(theirs, Exception) and harness.difference(theirs, ours) is None:
        return {"ours": "equal", "diffusers": "runs"}
    params: dict[str, Any] = {f"{kind}_every": 2 for kind in ("spatial", "temporal", "cross")}
    params |= {f"{kind}_range": (-1, 1001) for kind in ("spatial", "temporal", "cross")}
    right = _repeats(name, "pab", **params)
    return {"ours": "runs" if right else "wrong", "diffusers": _theirs(theirs, otherwise="labels")}


def _theirs(result: Any, *, otherwise: str = "runs") -> str:
    return "raises" if isinstance(result, Exception) else otherwise


# --- First Block Cache -----------------------------------------------------------------------------------


def _fbc(name: str) -> Cell:
    model = zoo.build(name)
    runs = {
        threshold: (
            _tried(lambda at=threshold: blocks.run_diffusers(name, model, at, timesteps=STEPS)),
            _tried(lambda at=threshold: blocks.run_ours(name, model, at, timesteps=STEPS)),
        )
        for threshold in (0.4, 0.8, 1e9)
    }
    theirs, ours = runs[1e9]
    if isinstance(ours, Exception):
        return {"ours": _failed(ours), "diffusers": _theirs(theirs)}
    if not _repeats(name, "fbc", threshold=1e9):
        return {"ours": "wrong", "diffusers": _theirs(theirs)}
    if isinstance(theirs, Exception):
        return {"ours": "runs", "diffusers": "raises"}
    same = all(harness.difference(*pair) is None for pair in runs.values())
    return {"ours": "equal" if same else "runs", "diffusers": "runs" if same else "wrong"}


# --- FasterCache -----------------------------------------------------------------------------------------


def _fastercache(name: str) -> Cell:
    one, knobs = zoo.entry(name), halves.Knobs(weight=0.3, temporal=3)
    if not one.batches:
        return {"ours": "none", "diffusers": "none"}
    model = zoo.build(name)
    named = _tried(lambda: halves.run_diffusers(name, model, knobs, STEPS))
    theirs = _five_names(name, knobs, named)
    ours = _tried(lambda: halves.run_ours(name, model, knobs, STEPS))
    extra = dict[str, Any]()
    if isinstance(ours, Exception):
        ours, extra = _told(name, model, knobs, ours)
    if isinstance(ours, Exception):
        return {"ours": _failed(ours), "diffusers": theirs}
    same = not isinstance(named, Exception) and harness.difference(named, ours) is None
    if not same:
        # Factors of 1 change nothing where the input is the same.
        if not _repeats(name, "fastercache", batch=2, guidance=True, low=1.0, high=1.0, **extra):
            return {"ours": "wrong", "diffusers": theirs}
        theirs = "raises" if theirs == "raises" else "labels" if name in halves.UNMARKED else "wrong"
    return {"ours": "told" if extra else "equal" if same else "runs", "diffusers": theirs}


def _five_names(name: str, knobs: halves.Knobs, named: Any) -> str:
    """What diffusers does by default, given what it does with all names listed."""

    def run() -> harness.Run:
        twin, clock = zoo.build(name), harness.Clock()
        apply_faster_cache(twin, knobs.config(clock, halves.layout_of(name), halves.FIVE))
        return halves.sample(name, twin, STEPS, clock)

    default = _tried(run)
    if isinstance(named, Exception):
        return "raises"
    if isinstance(default, Exception):
        return "named"
    shapes = [each.shape for each in default.outputs] == [each.shape for each in named.outputs]
    return "runs" if shapes and harness.difference(named, default) is None else "wrong"


def _told(name: str, model: nn.Module, knobs: halves.Knobs, error: Exception) -> tuple[Any, dict[str, Any]]:
    """Ours again, told what it could not find, and what that was."""
    attempts: list[dict[str, Any]] = [{"inputs": halves.batched(name)}]
    if name == "unet_motion":
        attempts = [{"inputs": ["sample", "timestep", "encoder_hidden_states"]}]
    latents = zoo.entry(name).inputs()[zoo.entry(name).latent]
    if name not in AUDIO and isinstance(latents, torch.Tensor) and latents.ndim == 3:
        tokens = len(zoo.output(copy.deepcopy(model)(**zoo.entry(name).inputs()))[0])
        grid = {"format": "BSC", "grid": [1, 1, tokens]}
        attempts += [grid, grid | attempts[0]]
    for extra in attempts:
        result = _tried(lambda extra=extra: halves.run_ours(name, model, knobs, STEPS, extra=extra))
        if not isinstance(result, Exception):
            return result, extra
    return error, {}


# --- the record and the table ----------------------------------------------------------------------------


def recorded() -> dict[str, Row]:
    """The record that is checked in."""
    return json.loads(RECORD.read_text("utf-8"))


def worse(before: Row, now: Row) -> list[str]:
    """Where a row says less of ours than it did."""
    return [
        f"{policy}: {now[policy]['ours']}, was {before[policy]['ours']}"
        for policy in POLICIES
        if RANKS.index(now[policy]["ours"]) > RANKS.index(before[policy]["ours"])
    ]


def table(rows: dict[str, Row]) -> str:
    """The page."""
    lines = [
        "# Coverage",
        "",
        f"{len(rows)} tiny seeded models of {len({zoo.entry(name).class_name for name in rows})} classes,",
        "each run under each policy by ours and by diffusers 0.42.1. This page is written by",
        "`python tests/differential/coverage_table.py --write`, and a test fails where a row gets worse.",
        "",
        "Left of the stroke is ours, right of it diffusers.",
        "",
        "| word | means |",
        "| --- | --- |",
        *(f"| {word} | {meaning} |" for word, meaning in MEANINGS.items()),
        "",
        "| | ours | diffusers |",
        "| --- | --- | --- |",
        *(_summary(rows, policy) for policy in POLICIES),
        "",
        "| model | class | `pab` | `fastercache` | `fbc` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, cells in rows.items():
        shown = " | ".join(f"{cells[policy]['ours']} / {cells[policy]['diffusers']}" for policy in POLICIES)
        lines.append(f"| {name} | {zoo.entry(name).class_name} | {shown} |")
    lines += ["", "Classes that are not built, and why:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in zoo.NOT_BUILT.items()]
    return "\n".join(lines) + "\n"


def _summary(rows: dict[str, Row], policy: str) -> str:
    sides = []
    for side in ("ours", "diffusers"):
        counts = Counter(cells[policy][side] for cells in rows.values())
        sides.append(", ".join(f"{counts[word]} {word}" for word in MEANINGS if counts[word]))
    return f"| `{policy}` | {sides[0]} | {sides[1]} |"


def main() -> None:
    """Run all rows; say where they differ from the record, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the record and the page anew")
    write = parser.parse_args().write
    rows = {name: row(name) for name in zoo.names()}
    before = recorded() if RECORD.exists() else {}
    for name, now in rows.items():
        if before.get(name) != now:
            print(name, "is", now, "was", before.get(name))  # noqa: T201
    if write:
        RECORD.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        TABLE.write_text(table(rows), "utf-8")


if __name__ == "__main__":
    main()
