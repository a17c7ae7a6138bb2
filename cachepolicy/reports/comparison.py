"""Rows of a comparison of policies, numbers of steps and solvers: as text, CSV and data, and their Pareto front."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Reference = Literal["uncached", "converged"]


@dataclass(frozen=True, slots=True)
class Distance:
    """Peak signal-to-noise ratios of samples against a reference, in dB.

    Attributes:
        each: The ratio of each sample, infinite where it is equal.
        mean: The mean over the samples that differ, infinite if none differs.
        p10: The 10th percentile over all samples.
    """

    each: tuple[float, ...]
    mean: float
    p10: float

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data. Infinite ones become None."""
        return {"mean": _finite(self.mean), "p10": _finite(self.p10), "each": [_finite(value) for value in self.each]}


@dataclass(frozen=True, slots=True)
class Row:
    """One way to sample, and what was measured of it.

    Attributes:
        name: The name for people.
        kind: `"uncached"`, `"policy"`, `"baseline"`, or `"converged"`.
        at_cost_of: The name of the row whose cost a baseline has.
        solver: The class of the scheduler.
        steps: The number of steps.
        cost: The FLOPs of the denoisers, as a share of the uncached run's.
        evaluations: The same in full evaluations of the model per sample, 1 for each step of the uncached run.
        uncached: The distance from the uncached run, None for that run.
        converged: The distance from the converged run, None for that run and where there is none.
        seconds: The median seconds of a call.
        call_speedup: The seconds of a whole uncached call divided by those of this one, the median over the calls.
        model_speedup: The same of the seconds inside the denoisers.
        metrics: The means of further metrics against the uncached run, by name.
    """

    name: str
    kind: Literal["uncached", "policy", "baseline", "converged"]
    at_cost_of: str | None
    solver: str
    steps: int
    cost: float
    evaluations: float
    uncached: Distance | None
    converged: Distance | None
    seconds: float
    call_speedup: float
    model_speedup: float
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    def distance(self, reference: Reference) -> Distance | None:
        """Return the distance from one of the two references."""
        return self.uncached if reference == "uncached" else self.converged

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "at_cost_of": self.at_cost_of,
            "solver": self.solver,
            "steps": self.steps,
            "cost": self.cost,
            "evaluations": self.evaluations,
            "psnr_uncached": self.uncached and self.uncached.to_dict(),
            "psnr_converged": self.converged and self.converged.to_dict(),
            "seconds": self.seconds,
            "call_speedup": self.call_speedup,
            "model_speedup": self.model_speedup,
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def pareto_front(rows: Iterable[Row], reference: Reference) -> list[Row]:
    """Return the rows that no other row beats, the cheapest first.

    A row is beaten by one that costs at most as much and is at least as near to the reference, and is better in one of
    the two. The reference itself is left out.

    Args:
        rows: The rows.
        reference: The run to which the distance is measured.
    """
    known = [(row, distance.mean) for row in rows if (distance := row.distance(reference)) is not None]
    known.sort(key=lambda pair: (pair[0].cost, -pair[1]))
    front, best = list[Row](), -math.inf
    for row, mean in known:
        if mean > best:
            front.append(row)
            best = mean
    return front


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heads of a table and its rows, as text."""
    converged = any(row.converged for row in rows)
    metrics = _metrics(rows)
    heads = ["", "cost", "model calls", "PSNR to uncached", "p10"]
    heads += ["PSNR to converged", "p10"] if converged else []
    heads += [*metrics, "speed-up, whole call", "speed-up, denoiser"]
    table = list[list[str]]()
    for row in rows:
        line = [row.name, f"{row.cost:.3f}", f"{row.evaluations:.3g}", *_decibels(row.uncached)]
        line += _decibels(row.converged) if converged else []
        line += [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in metrics]
        table.append([*line, f"{row.call_speedup:.2f}x", f"{row.model_speedup:.2f}x"])
    return heads, table


def _metrics(rows: Sequence[Row]) -> list[str]:
    """Return the names of the further metrics that any row has."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def decibels(value: float) -> str:
    """Return a ratio as text: `48.5`, or `inf` where nothing differs."""
    return f"{value:.1f}"


def _decibels(distance: Distance | None) -> list[str]:
    if distance is None:
        return ["", ""]
    return ["equal" if value == math.inf else decibels(value) for value in (distance.mean, distance.p10)]


def text_table(rows: Sequence[Row]) -> str:
    """Return the table with aligned columns."""
    heads, table = cells(rows)
    widths = [max(len(line[column]) for line in (heads, *table)) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (heads, *table)
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    heads, table = cells(rows)
    return "\n".join(markdown_lines([heads, ["---", *["--:"] * (len(heads) - 1)], *table]))


def markdown_lines(lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown from its cells: those of the heads, the alignments and the rows."""
    for line in lines:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"


def csv_table(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, one line for each. Infinite distances are empty, as are those that do not exist."""
    written = io.StringIO()
    metrics = _metrics(rows)
    plain = ("name", "kind", "at_cost_of", "solver", "steps", "cost", "evaluations", "seconds")
    speedups = ("call_speedup", "model_speedup")
    distances = [f"psnr_{reference}_{part}" for reference in ("uncached", "converged") for part in ("mean", "p10")]
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([*plain, *speedups, *distances, *metrics])
    for row in rows:
        values = row.to_dict()
        psnr = [
            _finite(value)
            for distance in (row.uncached, row.converged)
            for value in ((math.inf, math.inf) if distance is None else (distance.mean, distance.p10))
        ]
        more = [values["metrics"].get(name) for name in metrics]
        writer.writerow([*(values[name] for name in (*plain, *speedups)), *psnr, *more])
    return written.getvalue()
