"""Geometry of a chart of costs and distances, with the line of the rows that no other row beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LEFT, RIGHT, TOP, FLOOR, WIDTH, HEIGHT = 44, 24, 14, 290, 590, 330


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of the chart.

    Attributes:
        cost: Share of the uncached cost.
        value: PSNR in dB; infinite values are drawn at the upper edge.
        kind: The class of the mark: `"policy"`, `"baseline"`, `"uncached"`, `"forecast"`.
        label: A short text beside the mark.
        title: The tooltip.
    """

    cost: float
    value: float
    kind: str
    label: str
    title: str


@dataclass(slots=True)
class Scatter:
    """Points, and lines through some of them.

    Attributes:
        label: The accessible name of the drawing.
        dots: All points.
        lines: The class and the points of each line.
    """

    label: str
    dots: Sequence[Dot]
    lines: Sequence[tuple[str, Sequence[Dot]]] = ()
    width: int = field(default=WIDTH, init=False)
    height: int = field(default=HEIGHT, init=False)
    left: int = field(default=LEFT, init=False)
    right: int = field(default=WIDTH - RIGHT, init=False)
    floor: int = field(default=FLOOR, init=False)

    @property
    def _costs(self) -> tuple[float, float]:
        return 0.0, max([1.0, *(dot.cost for dot in self.dots)])

    @property
    def _values(self) -> tuple[float, float]:
        finite = [dot.value for dot in self.dots if math.isfinite(dot.value)] or [0.0]
        low, high = 5 * math.floor(min(finite) / 5), 5 * math.ceil(max(finite) / 5)
        return (low, high) if high > low else (low - 5, high + 5)

    def x(self, cost: float) -> float:
        """Return the horizontal position of a cost."""
        low, high = self._costs
        return round(LEFT + (cost - low) / (high - low) * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        """Return the vertical position of a value. Values outside are drawn at the edge."""
        low, high = self._values
        return round(FLOOR - (min(max(value, low), high) - low) / (high - low) * (FLOOR - TOP), 1)

    @property
    def levels(self) -> list[tuple[float, str]]:
        """Position and text of each horizontal line."""
        low, high = self._values
        step = 5 if high - low <= 30 else 10
        return [(self.y(value), f"{value:g}") for value in range(int(low), int(high) + 1, step)]

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position and text of each labelled cost."""
        return [(self.x(tenth / 10), f"{tenth / 10:g}") for tenth in range(0, int(10 * self._costs[1]) + 1, 2)]

    @property
    def marks(self) -> list[tuple[str, str, str, str, float, float]]:
        """Class, path, title and label of each mark, and the position of the label."""
        return [
            (dot.kind, self._path(dot), dot.title, dot.label, self.x(dot.cost) + 7, self.y(dot.value) + 4)
            for dot in self.dots
        ]

    def _path(self, dot: Dot) -> str:
        x, y = self.x(dot.cost), self.y(dot.value)
        if dot.kind == "policy":
            return f"M{x - 4} {y - 4}h8v8h-8z"
        return f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Class and points of each line."""
        return [
            (kind, " ".join(f"{self.x(dot.cost)},{self.y(dot.value)}" for dot in dots)) for kind, dots in self.lines
        ]
