"""Drawings of a report in SVG: curves against their limits, and a bar or a level for each call.

Colours are classes of the page's style sheet; a shape tells what a colour tells. What is drawn stands in a table too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cachepolicy.reports.html.markup import Markup, tag

LEFT, RIGHT, TOP, BOTTOM, HEIGHT, STEP = 60, 14, 10, 24, 180, 15


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a curve at a step: None is undefined; `computes` and `told` are its shape and what it says."""

    step: int
    value: float | None
    computes: bool
    told: str


@dataclass(frozen=True, slots=True)
class AxisScale:
    """From numbers to places: `last` is the last step, `top` the number at the upper edge."""

    last: int
    bottom: float
    top: float

    def x(self, step: float) -> float:
        """The place of a step from the left."""
        return LEFT + (step + 0.5) * STEP

    def y(self, value: float) -> float:
        """The place of a number from above, held to the edges."""
        share = (min(max(value, self.bottom), self.top) - self.bottom) / (self.top - self.bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    @property
    def width(self) -> int:
        """The width of the drawing."""
        return max(LEFT + (self.last + 1) * STEP + RIGHT, 260)


def curve(lines: Sequence[Sequence[Mark]], limits: Sequence[tuple[int, float | None]], *, label: str) -> Markup:
    """Curves over steps, dashed limits, and at each decision a square that computes or a circle that reuses."""
    marks = [mark for line in lines for mark in line]
    values = [mark.value for mark in marks if mark.value is not None]
    bounds = [limit for _, limit in limits if limit is not None]
    last = max((mark.step for mark in marks), default=0)
    scale = AxisScale(last, *_range(values, bounds))
    parts = [*_axes(scale, number)]
    parts += [_stairs(scale, limits)]
    for line in lines:
        known = [(mark.step, mark.value) for mark in line if mark.value is not None]
        places = " ".join(f"{scale.x(step)},{scale.y(value)}" for step, value in known)
        parts.append(tag("polyline", class_="curve", points=places))
    parts += [_mark(scale, mark) for mark in marks]
    return _drawing(scale, parts, label)


def bars(values: Sequence[tuple[float, str]], told: Sequence[str], *, label: str, unit: str) -> Markup:
    """A bar for each call, of a height and a class."""
    scale = AxisScale(len(values) - 1, 0, _nice(max((value for value, _ in values), default=0)))
    parts = [*_axes(scale, lambda value: f"{number(value)} {unit}")]
    floor = scale.y(0)
    for index, ((value, kind), text) in enumerate(zip(values, told, strict=True)):
        y = scale.y(value)
        x = scale.x(index) - STEP / 2 + 1.5
        parts.append(
            tag("rect", tag("title", text), class_=kind, x=x, y=y, width=STEP - 3, height=max(1, round(floor - y, 1)))
        )
    return _drawing(scale, parts, label)


def _drawing(scale: AxisScale, parts: Iterable[Markup], label: str) -> Markup:
    view = f"0 0 {scale.width} {HEIGHT}"
    return tag("svg", *parts, viewBox=view, width=scale.width, height=HEIGHT, role="img", aria_label=label)


def _range(values: Sequence[float], limits: Sequence[float]) -> tuple[float, float]:
    """From 0, or below, to what shows the limits well: a value far beyond them is drawn at the edge."""
    top = max([*values, *limits, 0.0])
    if limits and top > 4 * max(limits) > 0:
        top = 2.5 * max(limits)
    bottom = min([*values, *limits, 0.0])
    if limits and bottom < 4 * min(limits) < 0:
        bottom = 2.5 * min(limits)
    return (bottom, _nice(top)) if bottom == 0 else (-_nice(-bottom), _nice(top) if top > 0 else 0.0)


def _nice(top: float) -> float:
    """The next number of the form 1, 2, 2.5, 4, 5 or 8 times a power of ten."""
    if top <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(power * step for step in (1, 2, 2.5, 4, 5, 8, 10, 20) if power * step >= top * 1.0001 or step == 20)


def number(value: float) -> str:
    """A number as people write it, four digits at most: `0.05`, `1200`, `3.1e-07`."""
    if value != value or abs(value) == math.inf:  # noqa: PLR0124 - NaN alone differs from itself
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _axes(scale: AxisScale, form: Callable[[float], str]) -> Iterator[Markup]:
    right, floor = scale.x(scale.last) + STEP / 2, HEIGHT - BOTTOM
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = scale.bottom + share * (scale.top - scale.bottom)
        y = scale.y(value)
        yield tag("line", class_="rule", x1=LEFT, x2=right, y1=y, y2=y)
        text = form(value)
        yield tag("text", text, x=LEFT - 6, y=y + 4, text_anchor="end")
    every = 5 if scale.last >= 10 else 1
    for step in range(0, scale.last + 1, every):
        yield tag("text", step, x=scale.x(step), y=floor + 16, text_anchor="middle")


def _stairs(scale: AxisScale, limits: Sequence[tuple[int, float | None]]) -> Markup:
    path, pen = "", False
    for step, limit in limits:
        if limit is None:
            pen = False
            continue
        left, right, y = scale.x(step) - STEP / 2, scale.x(step) + STEP / 2, scale.y(limit)
        path += f"{'L' if pen else 'M'}{left} {y}H{right}"
        pen = True
    return tag("path", class_="limit", d=path)


def _mark(scale: AxisScale, mark: Mark) -> Markup:
    """A square where it computed, a circle where it reused, a triangle at the edge where it lies beyond."""
    x, title = scale.x(mark.step), tag("title", mark.told)
    kind = "computes" if mark.computes else "reuses"
    if mark.value is None:
        y = HEIGHT - BOTTOM
        return tag("path", title, class_=f"mark none {kind}", d=f"M{x - 4} {y - 4}l8 8m0 -8l-8 8")
    y = scale.y(mark.value)
    if mark.value > scale.top:
        return tag("path", title, class_=f"mark {kind}", d=f"M{x} {y - 5}l5 9h-10z")
    if mark.value < scale.bottom:
        return tag("path", title, class_=f"mark {kind}", d=f"M{x} {y + 5}l5 -9h-10z")
    if mark.computes:
        return tag("rect", title, class_=f"mark {kind}", x=x - 4, y=y - 4, width=8, height=8)
    return tag("circle", title, class_=f"mark {kind}", cx=x, cy=y, r=4)


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, shown: bool = False) -> Markup:
    """What is drawn, as a table behind a disclosure, which is open where it is `shown`."""
    head = tag("thead", tag("tr", *(tag("th", each, scope="col") for each in heads)))
    body = tag(
        "tbody",
        *(tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows),
    )
    inner = tag("table", tag("caption", caption, class_="unseen"), head, body, class_="numbers")
    scroll = tag("div", inner, class_="scroll", tabindex="0", role="group", aria_label=caption)
    return tag("details", tag("summary", "As a table"), scroll, open=shown)
