"""A page that shows where a run's time went: rank by step, and link by link. One file, no script, nothing fetched."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from faulttol import localize, pace
from faulttol.events import RankRecord
from faulttol.view import JobView

_MAX_COLUMNS = 120
_CELL, _GAP, _LEFT, _TOP = 14, 1, 64, 22
_WORST = 2.0
"""The ratio at which a cell is as dark as it gets."""

_LOW, _HIGH, _NONE = (222, 230, 240), (178, 24, 43), "#9aa0a633"
"""Colours of the least and of the worst, legible on a light and on a dark page, and of what is not known."""
_STYLE = """
:root { color-scheme: light dark }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; max-width: 120rem }
h1 { font-size: 1.3rem }
h2 { font-size: 1rem; margin: 2rem 0 .2rem }
p { opacity: .7; margin: 0 0 .6rem }
svg { display: block; overflow: visible }
text { fill: currentColor; opacity: .7; font-size: 11px }
"""


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells by (row, column), each with a value and what a pointer on it is told."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], tuple[float, str]]


def write(records: Sequence[RankRecord], path: Path, title: str) -> None:
    """Write the page."""
    path.write_text(page(records, title))


def page(records: Sequence[RankRecord], title: str) -> str:
    """Return the page of one generation of a run."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    own, inside = _own(records), _inside(records)
    if own.columns:
        parts += [
            "<h2>Own time of every rank, by step</h2>",
            "<p>Time outside of collectives over the median of the ranks in that step: a row that is dark is a slow "
            f"rank. Darkest at {_WORST:g} times the median.</p>",
            _svg(own, _WORST),
            "<h2>Share of the step that every rank was in collectives</h2>",
            "<p>Who waits, waits here: beside a slow rank all the others are dark.</p>",
            _svg(inside, 1.0, least=0.0),
        ]
    links = _links(records)
    if links.cells:
        parts += [
            "<h2>Messages between ranks: the least time of each link</h2>",
            "<p>Row: sender. Column: receiver. A cell is a link, a row a sender, a column a receiver. Darkest at "
            f"{2 * _WORST:g} times the fastest link.</p>",
            _svg(links, 2 * _WORST),
        ]
    if len(parts) == 1:
        parts.append("<p>No step has both its marks and there are no messages: nothing to compare.</p>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _own(records: Sequence[RankRecord]) -> Grid:
    return _by_step(records, pace.excess(records), lambda value: f"{value:.2f} times the median")


def _inside(records: Sequence[RankRecord]) -> Grid:
    shares = {
        (time.rank, time.step): time.inside_ns / max(1, time.total_ns)
        for record in records
        for time in pace.step_times(record)
    }
    return _by_step(records, shares, lambda value: f"{value:.0%} of the step")


def _by_step(
    records: Sequence[RankRecord], values: Mapping[tuple[int, int], float], tell: Callable[[float], str]
) -> Grid:
    """Return a grid of ranks by steps, several steps a column where there are many."""
    ranks = [record.rank for record in records]
    steps = sorted({step for _, step in values})
    width = max(1, math.ceil(len(steps) / _MAX_COLUMNS))
    columns = [steps[start : start + width] for start in range(0, len(steps), width)]
    cells = {}
    for row, rank in enumerate(ranks):
        for column, some in enumerate(columns):
            found = [values[rank, step] for step in some if (rank, step) in values]
            if found:
                cells[row, column] = (mean(found), f"rank {rank}, {_steps(some)}: {tell(mean(found))}")
    return Grid(tuple(f"rank {rank}" for rank in ranks), tuple(str(some[0]) for some in columns), cells)


def _links(records: Sequence[RankRecord]) -> Grid:
    ranks = [record.rank for record in records]
    matrix = localize.passive(JobView({record.rank: record for record in records})).seconds
    fastest = min(matrix.values(), default=1.0)
    places = {rank: place for place, rank in enumerate(ranks)}
    cells = {
        (places[source], places[target]): (seconds / fastest, f"{source} to {target}: {seconds * 1e3:.3g} ms")
        for (source, target), seconds in matrix.items()
        if source in places and target in places
    }
    return Grid(tuple(f"from {rank}" for rank in ranks), tuple(str(rank) for rank in ranks), cells)


def _svg(grid: Grid, worst: float, least: float = 1.0) -> str:
    pitch = _CELL + _GAP
    width, height = _LEFT + pitch * len(grid.columns), _TOP + pitch * len(grid.rows)
    parts = [f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">']
    every = max(1, math.ceil((8 + 7 * max(map(len, grid.columns), default=1)) / pitch))
    for column, name in enumerate(grid.columns):
        if column % every == 0:
            parts.append(f'<text x="{_LEFT + column * pitch}" y="{_TOP - 8}">{html.escape(name)}</text>')
    for row, name in enumerate(grid.rows):
        y = _TOP + row * pitch
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 11}" text-anchor="end">{html.escape(name)}</text>')
        for column in range(len(grid.columns)):
            value, told = grid.cells.get((row, column), (math.nan, "not known"))
            parts.append(
                f'<rect x="{_LEFT + column * pitch}" y="{y}" width="{_CELL}" height="{_CELL}" rx="2" '
                f'fill="{_fill(value, least, worst)}"><title>{html.escape(told)}</title></rect>'
            )
    return "".join(parts) + "</svg>"


def _fill(value: float, least: float, worst: float) -> str:
    """Return a mix of the low and the high colour; a value below the least is as good as the least."""
    if math.isnan(value):
        return _NONE
    share = min(1.0, max(0.0, (value - least) / (worst - least)))
    return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in zip(_LOW, _HIGH, strict=True))


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
