"""Geometry of a small line chart: maps values to positions in a drawing of fixed size.

This module draws nothing; the report's template renders the positions as SVG. x is a count (updates), and y is any
finite number.
"""

import dataclasses
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28
MAX_DOTS = 60


@dataclasses.dataclass(frozen=True)
class Series:
    """One named line through points (x, y); points that are not finite leave a gap."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class ChartPoint:
    """A position in the drawing with its text: a tick, a dot's tooltip or a marker's label."""

    x: float
    y: float
    text: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One series as pieces of `x,y x,y ...` between gaps, and its dots (none if there are more than MAX_DOTS)."""

    name: str
    pieces: tuple[str, ...]
    dots: tuple[ChartPoint, ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """All positions of one chart, in a box of WIDTH x HEIGHT with its origin at the top left."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[ChartPoint, ...]
    y_ticks: tuple[ChartPoint, ...]
    markers: tuple[ChartPoint, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclasses.dataclass(frozen=True)
class _Scale:
    """A linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def layout_chart(title: str, series: Sequence[Series], markers: Sequence[tuple[float, str]] = ()) -> Chart | None:
    """Return the layout of the series on common axes, or None if no point is finite.

    Args:
        markers: Vertical lines as (x, label).
    """
    finite = [(x, y) for line in series for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return None
    xs = [x for x, _ in finite] + [x for x, _ in markers]
    ys = [y for _, y in finite]
    x_scale = _Scale(*_widen(min(xs), max(xs), share=0.02), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(*_widen(min(ys), max(ys), share=0.08), HEIGHT - BOTTOM, TOP)
    return Chart(
        title=title,
        lines=tuple(_lay_out_line(line, x_scale, y_scale) for line in series),
        x_ticks=tuple(
            ChartPoint(x_scale(x), HEIGHT - BOTTOM, f"{x:g}") for x in ticks(min(xs), max(xs), count=8, whole=True)
        ),
        y_ticks=tuple(ChartPoint(LEFT, y_scale(y), f"{y:g}") for y in ticks(y_scale.low, y_scale.high, count=5)),
        markers=tuple(ChartPoint(x_scale(x), TOP, label) for x, label in markers),
    )


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Return round values in [low, high] that are 1, 2 or 5 times a power of ten apart, at most about `count`."""
    rough = max((high - low) / count, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded because 3 * 0.1 is not 0.3.
    return [round(index * step, 12) for index in range(first, last + 1)]


def _widen(low: float, high: float, *, share: float) -> tuple[float, float]:
    margin = (high - low) * share or max(abs(high), 1.0) * share
    return low - margin, high + margin


def _lay_out_line(series: Series, x_scale: _Scale, y_scale: _Scale) -> Line:
    pieces: list[list[str]] = [[]]
    dots: list[ChartPoint] = []
    for x, y in series.points:
        if not math.isfinite(y):
            pieces.append([])
            continue
        pieces[-1].append(f"{x_scale(x)},{y_scale(y)}")
        dots.append(ChartPoint(x_scale(x), y_scale(y), f"{series.name} at update {x:g}: {y:.6g}"))
    return Line(
        name=series.name,
        pieces=tuple(" ".join(piece) for piece in pieces if piece),
        dots=tuple(dots) if len(dots) <= MAX_DOTS else (),
    )
