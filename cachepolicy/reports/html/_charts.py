"""Geometry of the report's SVG charts: curves against their limits, and a bar for each call of the model.

The template draws what stands here. Colours are classes of the page's style sheet; the shape of a mark says the same
as its colour, and every chart has a table with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

LEFT, RIGHT, TOP, BOTTOM, HEIGHT, STEP = 60, 14, 10, 24, 180, 15


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a curve: its step, its value (None: undefined), whether the site computed, and the tooltip."""

    step: int
    value: float | None
    computes: bool
    title: str


@dataclass(slots=True)
class Chart:
    """A chart over steps (or calls) 0 to `last` with values from `bottom` to `top`.

    `limit` is the path of the dashed line, `lines` the points of each curve, `marks` the class, path and tooltip of
    each mark or bar. All coordinates are pixels from the upper left corner.
    """

    label: str
    last: int
    bottom: float
    top: float
    number_format: Callable[[float], str]
    limit: str = ""
    lines: list[str] = field(default_factory=list[str])
    marks: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    height: int = HEIGHT
    left: int = LEFT
    floor: int = HEIGHT - BOTTOM

    def x(self, step: float) -> float:
        """Returns the horizontal position of a step."""
        return LEFT + (step + 0.5) * STEP

    def y(self, value: float) -> float:
        """Returns the vertical position of a value. Values outside the chart are drawn at its edge."""
        share = (min(max(value, self.bottom), self.top) - self.bottom) / (self.top - self.bottom)
        return round(self.floor - share * (self.floor - TOP), 1)

    @property
    def width(self) -> int:
        """Width of the drawing."""
        return max(LEFT + (self.last + 1) * STEP + RIGHT, 260)

    @property
    def right(self) -> float:
        """Right end of the horizontal lines."""
        return self.x(self.last) + STEP / 2

    @property
    def levels(self) -> Iterator[tuple[float, str]]:
        """Position and text of each horizontal line."""
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            value = self.bottom + share * (self.top - self.bottom)
            yield self.y(value), self.number_format(value)

    @property
    def steps(self) -> list[tuple[float, int]]:
        """Position and number of each labelled step."""
        return [(self.x(step), step) for step in range(0, self.last + 1, 5 if self.last >= 10 else 1)]


def curve_chart(lines: Sequence[Sequence[Mark]], limits: Sequence[tuple[int, float | None]], *, label: str) -> Chart:
    """Returns curves over steps with their limits.

    Args:
        lines: The marks of each curve.
        limits: The limit at each step, None where it is undefined.
        label: The accessible name of the drawing.
    """
    marks = [mark for line in lines for mark in line]
    values = [mark.value for mark in marks if mark.value is not None]
    last = max((mark.step for mark in marks), default=0)
    chart = Chart(label, last, *_range(values, [limit for _, limit in limits if limit is not None]), number)
    chart.limit = _stairs(chart, limits)
    for line in lines:
        known = [(mark.step, mark.value) for mark in line if mark.value is not None]
        chart.lines.append(" ".join(f"{chart.x(step)},{chart.y(value)}" for step, value in known))
    chart.marks = [_mark(chart, mark) for mark in marks]
    return chart


def bar_chart(bars: Sequence[tuple[float, str]], titles: Sequence[str], *, label: str, unit: str) -> Chart:
    """Returns a bar for each call.

    Args:
        bars: The value and the class of each bar.
        titles: The tooltip of each bar.
        label: The accessible name of the drawing.
        unit: The unit of the values.
    """
    top = _round_up(max((value for value, _ in bars), default=0))
    chart = Chart(label, len(bars) - 1, 0, top, lambda value: f"{number(value)} {unit}")
    for index, ((value, kind), title) in enumerate(zip(bars, titles, strict=True)):
        left, height = chart.x(index) - STEP / 2 + 1.5, max(1, round(chart.floor - chart.y(value), 1))
        path = f"M{left} {chart.floor}v-{height}h{STEP - 3}v{height}z"
        chart.marks.append((kind, path, title))
    return chart


def _range(values: Sequence[float], limits: Sequence[float]) -> tuple[float, float]:
    """Returns the lower and upper end of the axis: it shows the limits well, and far values lie at the edge."""
    top = max([*values, *limits, 0.0])
    if limits and top > 4 * max(limits) > 0:
        top = 2.5 * max(limits)
    bottom = min([*values, *limits, 0.0])
    if limits and bottom < 4 * min(limits) < 0:
        bottom = 2.5 * min(limits)
    return (bottom, _round_up(top)) if bottom == 0 else (-_round_up(-bottom), _round_up(top) if top > 0 else 0.0)


def _round_up(top: float) -> float:
    """Returns the next number of the form 1, 2, 2.5, 4, 5 or 8 times a power of ten."""
    if top <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(power * digit for digit in (1, 2, 2.5, 4, 5, 8, 10, 20) if power * digit >= top * 1.0001 or digit == 20)


def number(value: float) -> str:
    """Returns a number with four significant digits at most: `0.05`, `1200`, `3.1e-07`."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _stairs(chart: Chart, limits: Sequence[tuple[int, float | None]]) -> str:
    path, drawn = "", False
    for step, limit in limits:
        if limit is not None:
            path += f"{'L' if drawn else 'M'}{chart.x(step) - STEP / 2} {chart.y(limit)}H{chart.x(step) + STEP / 2}"
        drawn = limit is not None
    return path


def _mark(chart: Chart, mark: Mark) -> tuple[str, str, str]:
    """Returns a square for a compute, a circle for a reuse, a triangle beyond the edge and a cross without a value."""
    x, kind = chart.x(mark.step), "computes" if mark.computes else "reuses"
    if mark.value is None:
        return f"mark none {kind}", f"M{x - 4} {chart.floor - 4}l8 8m0 -8l-8 8", mark.title
    y = chart.y(mark.value)
    if mark.value > chart.top:
        path = f"M{x} {y - 5}l5 9h-10z"
    elif mark.value < chart.bottom:
        path = f"M{x} {y + 5}l5 -9h-10z"
    elif mark.computes:
        path = f"M{x - 4} {y - 4}h8v8h-8z"
    else:
        path = f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"
    return f"mark {kind}", path, mark.title
