"""Curves as SVG, drawn here so that a report needs nothing installed. Pure: values in, text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_PLOT_WIDTH, _HEIGHT = 400, 340
_LEFT, _TOP, _BOTTOM = 56, 40, 44
_LABEL_AT, _LETTER = 18, 6.8
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, which people with colour blindness tell apart; beyond eight, lines are dashed as well."""
_TEXT = 'font-family="system-ui, sans-serif" font-size="12" fill="#444"'


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Return an SVG of the curves, named at their right ends; of no points at all an empty plot."""
    cleaned = [Line(line.name, [p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    shown = [line for line in cleaned if line.points]
    points = [point for line in shown for point in line.points] or [(0.0, 0.0), (1.0, 1.0)]
    labels = [f"{line.name} {line.points[-1][1]:.3g}" for line in shown]
    right = _LEFT + _PLOT_WIDTH
    width = right + _LABEL_AT + round(_LETTER * max(map(len, labels), default=0)) + 8
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * _PLOT_WIDTH,
            _HEIGHT - _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="22" {_TEXT} font-weight="600">{escape(title)}</text>',
    ]
    for y in y_ticks:
        _, row = at(x_ticks[0], y)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{row:.1f}" y2="{row:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{row + 4:.1f}" text-anchor="end" {_TEXT}>{y:g}</text>')
    for x in x_ticks:
        column, _ = at(x, y_ticks[0])
        parts.append(
            f'<text x="{column:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle" {_TEXT}>{_short(x)}</text>'
        )
    middle = _LEFT + _PLOT_WIDTH / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle" {_TEXT}>{escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{(_TOP + _HEIGHT - _BOTTOM) / 2}" text-anchor="middle" {_TEXT} '
        f'transform="rotate(-90 14 {(_TOP + _HEIGHT - _BOTTOM) / 2})">{escape(y_label)}</text>'
    )
    ends = [at(*line.points[-1])[1] for line in shown]
    for index, (line, label, row) in enumerate(zip(shown, labels, spread(ends, 15), strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        dash = ' stroke-dasharray="5 3"' if index >= len(_COLOURS) else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        last_x, last_y = at(*line.points[-1])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if len(line.points) == 1:
            parts.append(f'<circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="3" fill="{colour}"/>')
        parts.append(
            f'<path d="M{last_x + 3:.1f} {last_y:.1f}L{right + _LABEL_AT - 4} {row:.1f}" stroke="{colour}" '
            f'stroke-width="0.7" fill="none" opacity="0.6"/>'
        )
        parts.append(
            f'<text x="{right + _LABEL_AT}" y="{row + 4:.1f}" {_TEXT.replace("#444", colour)}>{escape(label)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


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
