"""Renders comparisons of policies, solvers and numbers of steps as one HTML file that loads nothing."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cachepolicy._resources import render_template, template
from cachepolicy.reports.comparison import Reference, Row, cells, decibels, pareto_front
from cachepolicy.reports.html._scatter import Dot, Scatter


@dataclass(frozen=True, slots=True)
class PictureRow:
    """The pictures of a row, as one PNG file, and their differences from the uncached pictures as another one."""

    heading: str
    pictures: bytes = field(repr=False)
    differences: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Summary:
    """What stands above a comparison: figures and a chart.

    Attributes:
        figures: The name, the value and a note of each figure.
        frontier: The cost and the forecast in dB of each planned schedule.
        measured: The cost and the PSNR in dB of the schedules that were sampled.
        reference: The run to which both are measured, for people.
        schedule: A letter for each call of the chosen schedule, `C` or `R`.
    """

    figures: Sequence[tuple[str, str, str]] = ()
    frontier: Sequence[tuple[float, float]] = ()
    measured: Sequence[tuple[float, float]] = ()
    reference: str = "the uncached run"
    schedule: str = ""


def comparison_page(
    title: str,
    rows: Sequence[Row],
    *,
    captions: Sequence[str] = (),
    notes: Sequence[str] = (),
    policies: Mapping[str, str] | None = None,
    pictures: Sequence[PictureRow] = (),
    summary: Summary | None = None,
) -> str:
    """Render a comparison as one HTML page.

    Args:
        title: The title.
        rows: The rows, in the order of the table.
        captions: What the columns mean.
        notes: What was left out.
        policies: The texts of the policies by name.
        pictures: The pictures of the rows.
        summary: What stands above, for the report of a tuning.

    Returns:
        The text of the page.
    """
    heads, table = cells(rows)
    lines = [
        {"number": number, "kind": row.kind, "cells": line}
        for number, (row, line) in enumerate(zip(rows, table, strict=True), start=1)
    ]
    return render_template(
        "comparison.html",
        title=title,
        captions=captions,
        notes=notes,
        heads=heads,
        lines=lines,
        charts=[
            (_scatter(rows, reference), f"Distance from the {reference} run")
            for reference in ("uncached", "converged")
            if any(row.distance(reference) for row in rows)
        ],
        policies=policies or {},
        pictures=[
            (row.heading, _data(row.pictures), None if row.differences is None else _data(row.differences))
            for row in pictures
        ],
        summary=summary,
        frontier=None if summary is None or not summary.frontier else _frontier(summary),
        style=template("report.css"),
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _scatter(rows: Sequence[Row], reference: Reference) -> Scatter:
    # The converged run costs so much that the others would be near together.
    shown = [(number, row) for number, row in enumerate(rows, start=1) if row.kind != "converged"]
    dots = dict[str, Dot]()
    for number, row in shown:
        distance = row.distance(reference)
        if distance is not None:
            title = f"{row.name}: cost {row.cost:.3f}, {decibels(distance.mean)} dB"
            dots[row.name] = Dot(row.cost, distance.mean, row.kind, str(number), title)
    front = [dots[row.name] for row in pareto_front((row for _, row in shown), reference)]
    label = f"PSNR to the {reference} run in dB, by cost"
    return Scatter(label, list(dots.values()), [("front", front)])


def _frontier(summary: Summary) -> Scatter:
    planned = [
        Dot(cost, value, "forecast", "", f"forecast: cost {cost:.3f}, {value:.1f} dB")
        for cost, value in summary.frontier
        if math.isfinite(value)
    ]
    measured = [
        Dot(cost, value, "policy", "", f"measured: cost {cost:.3f}, {value:.1f} dB") for cost, value in summary.measured
    ]
    label = f"PSNR to {summary.reference} in dB, by cost: forecast of each schedule, and measured"
    return Scatter(label, [*planned, *measured], [("front", planned)])


def plot(rows: Sequence[Row], reference: Reference = "uncached") -> str:
    """Return the costs and distances of rows as an SVG file, with their names.

    Args:
        rows: The rows.
        reference: The run to which the distance is measured.
    """
    scatter = _scatter(rows, reference)
    names = {str(number): row.name for number, row in enumerate(rows, start=1)}
    scatter.dots = [Dot(dot.cost, dot.value, dot.kind, names[dot.label], dot.title) for dot in scatter.dots]
    return render_template("scatter.svg", chart=scatter)
