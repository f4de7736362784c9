"""A chart as PNG: its marks drawn with smooth edges, its words by strokes. Pure: a picture in, bytes out."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainsys.rl import font
from trainsys.rl.chart import DASH, FONT_SIZE, Picture, Stroke, Text

Points = Sequence[tuple[float, float]]

_CAPITAL = 0.7 * FONT_SIZE
_NARROW = 0.75
"""Width of letters over their drawing's, so that words are as long as the chart has room for."""
_THIN, _BOLD = 1.0, 1.5


def png(picture: Picture, *, scale: int = 2) -> bytes:
    """Return a picture as PNG, `scale` pixels a point."""
    canvas_HWC = torch.ones(picture.height * scale, picture.width * scale, 3)
    for mark in picture.marks:
        stroke_lines, width, opacity = _drawn(mark)
        pixels = [[(x * scale, y * scale) for x, y in line] for line in stroke_lines]
        radius = width * scale / 2
        rows, columns = (_span([p[axis] for line in pixels for p in line], radius) for axis in (1, 0))
        part_HWC = canvas_HWC[rows, columns]
        cover_HW = torch.zeros(part_HWC.shape[:2])
        for line in pixels:
            at = [(x - columns.start, y - rows.start) for x, y in line]
            for one, other in itertools.pairwise(at if len(at) > 1 else at * 2):
                _cover(cover_HW, one, other, radius)
        part_HWC += (cover_HW * opacity)[..., None] * (_colour(mark.colour) - part_HWC)
    return _encode((canvas_HWC * 255).round().to(torch.uint8))


def _drawn(mark: Stroke | Text) -> tuple[list[Points], float, float]:
    """Return (lines, their width, opacity) of a mark, in points."""
    if isinstance(mark, Text):
        return _letters(mark), _BOLD if mark.is_bold else _THIN, 1.0
    return list(_dashes(mark.points)) if mark.is_dashed else [mark.points], mark.width, mark.opacity


def _letters(text: Text) -> list[Points]:
    lines, length = font.strokes(text.text)
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.anchor] * length
    turned = [[((x - shift) * _NARROW * _CAPITAL, y * _CAPITAL) for x, y in line] for line in lines]
    if text.is_upright:
        turned = [[(y, -x) for x, y in line] for line in turned]
    return [[(text.x + x, text.y + y) for x, y in line] for line in turned]


def _dashes(points: Points) -> Iterator[Points]:
    """Yield the parts of a line that are drawn."""
    piece, left, is_drawn = [points[0]], float(DASH[0]), True
    for start, end in itertools.pairwise(points):
        here, rest = start, math.dist(start, end)
        while rest >= left:
            share = left / rest
            here = (here[0] + (end[0] - here[0]) * share, here[1] + (end[1] - here[1]) * share)
            rest -= left
            if is_drawn:
                yield [*piece, here]
            is_drawn = not is_drawn
            piece, left = [here], float(DASH[0] if is_drawn else DASH[1])
        piece.append(end)
        left -= rest
    if is_drawn:
        yield piece


def _cover(cover_HW: Tensor, one: tuple[float, float], other: tuple[float, float], radius: float) -> None:
    """Raise how much of each pixel is covered to what a line between two points, with round ends, covers of it."""
    columns, rows = (_span([one[axis], other[axis]], radius) for axis in (0, 1))
    part_HW = cover_HW[rows, columns]
    y_H1 = torch.arange(rows.start, rows.start + part_HW.shape[0])[:, None] + 0.5 - one[1]
    x_1W = torch.arange(columns.start, columns.start + part_HW.shape[1])[None] + 0.5 - one[0]
    dx, dy = other[0] - one[0], other[1] - one[1]
    along_HW = ((x_1W * dx + y_H1 * dy) / max(dx * dx + dy * dy, 1e-12)).clamp(0, 1)
    distance_HW = torch.hypot(x_1W - along_HW * dx, y_H1 - along_HW * dy)
    torch.maximum(part_HW, (radius + 0.5 - distance_HW).clamp(0, 1), out=part_HW)


def _span(places: Sequence[float], radius: float) -> slice:
    """Return the pixels of one axis that lines through places can touch, those before the first one left out."""
    return slice(max(0, round(min(places, default=0) - radius - 1)), round(max(places, default=0) + radius + 2))


def _colour(text: str) -> Tensor:
    digits = text[1:] if len(text) == 7 else "".join(digit * 2 for digit in text[1:])
    return torch.tensor([int(digits[index : index + 2], 16) / 255 for index in (0, 2, 4)])


def _encode(pixels_HWC: Tensor) -> bytes:
    """Return 8-bit colours as a PNG file."""
    height, width, _ = pixels_HWC.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels_HWC.flatten(1)], 1)  # no row is filtered
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
