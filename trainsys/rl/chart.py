"""Curves as charts, drawn here so that a report needs nothing installed. Pure: values in, marks or SVG out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_PLOT_WIDTH, _HEIGHT = 400, 340
_LEFT, _TOP, _BOTTOM = 56, 40, 44
_LABEL_AT, _LETTER = 18, 6.8
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, which people with colour blindness tell apart; beyond eight, lines are dashed as well."""
FONT_SIZE = 12
DASH = (5, 3)
"""Points drawn and left out, of a dashed line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Stroke:
    """A line through points."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.0
    opacity: float = 1.0
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Words at a point of their baseline."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    colour: str = "#444"
    is_bold: bool = False
    is_upright: bool = False
    """Read from below upwards."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart as marks at places, in points from the upper left; `svg` and `raster.png` draw it."""

    title: str
    width: int
    height: int
    marks: Sequence[Stroke | Text]


def draw(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Return an SVG of the curves."""
    return svg(plan(lines, title=title, x_label=x_label, y_label=y_label))


def plan(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> Picture:
    """Return a chart of the curves, named at their right ends; of no points at all an empty plot."""
    cleaned = [Line(line.name, [p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    shown = [line for line in cleaned if line.points]
    points = [point for line in shown for point in line.points] or [(0.0, 0.0), (1.0, 1.0)]
    labels = [f"{line.name} {line.points[-1][1]:.3g}" for line in shown]
    right = _LEFT + _PLOT_WIDTH
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * _PLOT_WIDTH,
            _HEIGHT - _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM),
        )

    marks: list[Stroke | Text] = [Text(_LEFT, 22, title, is_bold=True)]
    for y in y_ticks:
        _, row = at(x_ticks[0], y)
        marks.append(Stroke([(_LEFT, row), (right, row)], "#e4e4e4"))
        marks.append(Text(_LEFT - 6, row + 4, f"{y:g}", "end"))
    marks += [Text(at(x, y_ticks[0])[0], _HEIGHT - _BOTTOM + 18, _short(x), "middle") for x in x_ticks]
    marks.append(Text(_LEFT + _PLOT_WIDTH / 2, _HEIGHT - 8, x_label, "middle"))
    marks.append(Text(14, (_TOP + _HEIGHT - _BOTTOM) / 2, y_label, "middle", is_upright=True))
    ends = [at(*line.points[-1])[1] for line in shown]
    for index, (line, label, row) in enumerate(zip(shown, labels, spread(ends, 15), strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [at(*point) for point in line.points]
        last_x, last_y = places[-1]
        if len(places) == 1:  # a dot
            places = [(last_x - 2, last_y), (last_x + 2, last_y)]
        marks.append(Stroke(places, colour, 2.0, is_dashed=index >= len(_COLOURS)))
        marks.append(Stroke([(last_x + 3, last_y), (right + _LABEL_AT - 4, row)], colour, 0.7, 0.6))
        marks.append(Text(right + _LABEL_AT, row + 4, label, colour=colour))
    width = right + _LABEL_AT + round(_LETTER * max(map(len, labels), default=0)) + 8
    return Picture(title, width, _HEIGHT, marks)


def svg(picture: Picture) -> str:
    """Return a picture as SVG."""
    width, height = picture.width, picture.height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        f"<title>{escape(picture.title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *(_words(mark) if isinstance(mark, Text) else _line(mark) for mark in picture.marks),
    ]
    return "\n".join([*parts, "</svg>\n"])


def _words(text: Text) -> str:
    weight = ' font-weight="600"' if text.is_bold else ""
    turn = f' transform="rotate(-90 {text.x:.1f} {text.y:.1f})"' if text.is_upright else ""
    return (
        f'<text x="{text.x:.1f}" y="{text.y:.1f}" text-anchor="{text.anchor}" font-family="system-ui, sans-serif" '
        f'font-size="{FONT_SIZE}" fill="{text.colour}"{weight}{turn}>{escape(text.text)}</text>'
    )


def _line(stroke: Stroke) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in stroke.points)
    dash = f' stroke-dasharray="{DASH[0]} {DASH[1]}"' if stroke.is_dashed else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{stroke.colour}" stroke-width="{stroke.width:g}" '
        f'opacity="{stroke.opacity:g}"{dash}/>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers that enclose a range."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def spread(rows: Sequence[float], distance: float) -> list[float]:
    """Return positions near `rows` and in their order, at least `distance` apart, and all within the plot."""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    placed = [0.0] * len(rows)
    before = float("-inf")
    for index in order:
        before = placed[index] = max(rows[index], before + distance)
    over = max(0.0, before - (_HEIGHT - _BOTTOM))
    limit = float("inf")
    for index in reversed(order):
        limit = placed[index] = min(placed[index] - (over if limit == float("inf") else 0.0), limit - distance)
    return placed


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
