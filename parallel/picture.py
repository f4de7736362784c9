"""A mesh as text: who stands where, which ranks share a host, and which axes cross hosts. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from parallel.errors import MeshError
from parallel.mesh import Along, Coordinates, Mesh

_MAX_ROWS = 16
_GAP = None
"""In a list of indices: those between its neighbours are left out."""
_GAP_BOX = "  …"
"""What stands in a line for the stages that are left out."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """Which indices are drawn."""

    stages: tuple[int | None, ...]
    rows: tuple[int | None, ...]
    data_per_row: int
    contexts: tuple[int | None, ...]
    tensors: tuple[int | None, ...]


def draw(mesh: Mesh, ranks_per_host: int = 0, width: int = 120) -> str:
    """Return the mesh drawn in `width` columns, or narrower where it fits, all of it or with gaps (…).

    A box is a stage, a line in it one or several data ranks, set apart; in each, context ranks are divided by | and
    tensor ranks stand side by side. With `ranks_per_host`, double lines divide hosts. Below, the groups of each axis.

    Raises:
        MeshError: `ranks_per_host` is negative.
    """
    if ranks_per_host < 0:
        raise MeshError(f"parallel: {ranks_per_host} ranks cannot be on a host; at least 1, or 0 for no hosts")
    shown = _choose(mesh, width)
    lines = [_title(mesh, ranks_per_host), "", *_boxes(mesh, shown, ranks_per_host)]
    summary = _summary(mesh, ranks_per_host)
    return "\n".join(line.rstrip() for line in [*lines, *([""] if summary else []), *summary])


def _title(mesh: Mesh, ranks_per_host: int) -> str:
    factors = [f"{axis} {mesh.size(axis)}" for axis in _axes() if mesh.size(axis) > 1]
    title = f"{_ranks(mesh.world_size)} = {' x '.join(factors) or '1'}"
    if mesh.degrees.expert > 1:
        title += f"; expert {mesh.degrees.expert} in replicate x shard"
    if ranks_per_host:
        title += f"; {-(-mesh.world_size // ranks_per_host)} hosts of {_ranks(ranks_per_host)}"
    return title


def _choose(mesh: Mesh, width: int) -> _Shown:
    """Return all of the mesh, in as few data ranks a line as fit the rows, or the gaps that make it fit."""
    inner = mesh.size("shard") if mesh.size("shard") > 1 else mesh.size("replicate")
    everything = _Shown(
        stages=tuple(range(mesh.size("pipeline"))),
        rows=(),
        data_per_row=1,
        contexts=tuple(range(mesh.size("context"))),
        tensors=tuple(range(mesh.size("tensor"))),
    )
    for data_per_row in (n for n in range(1, inner + 1) if inner % n == 0):
        rows = tuple(range(0, mesh.data_size, data_per_row))
        shown = replace(everything, rows=rows, data_per_row=data_per_row)
        if len(rows) <= _MAX_ROWS and _width(mesh, shown) <= width:
            return shown
    rows = tuple(range(mesh.data_size))
    shown = replace(everything, rows=rows if len(rows) <= _MAX_ROWS else (0, 1, 2, _GAP, rows[-1]))
    narrower = [
        replace(shown, tensors=_ends(shown.tensors, 4)),
        replace(shown, tensors=_ends(shown.tensors, 4), contexts=_ends(shown.contexts, 4)),
    ]
    narrower.append(replace(narrower[-1], stages=_ends(shown.stages, 4)))
    least = replace(
        shown, tensors=_ends(shown.tensors, 3), contexts=_ends(shown.contexts, 3), stages=_ends(shown.stages, 2)
    )
    return next((choice for choice in [shown, *narrower] if _width(mesh, choice) <= width), least)


def _ends(indices: tuple[int | None, ...], most: int) -> tuple[int | None, ...]:
    """Return all indices if they are at most `most`, else the first ones, a gap and the last."""
    return indices if len(indices) <= most else (*indices[: max(1, most - 2)], _GAP, indices[-1])


def _width(mesh: Mesh, shown: _Shown) -> int:
    box = len(_cell(mesh, 0, 0, shown, 0)) + 6
    return len(_labels(mesh, None)) + sum(len(_GAP_BOX) if stage is _GAP else box for stage in shown.stages)


def _boxes(mesh: Mesh, shown: _Shown, ranks_per_host: int) -> Iterator[str]:
    inside = len(_cell(mesh, 0, 0, shown, 0)) + 2
    margin = " " * len(_labels(mesh, None))
    if len(shown.stages) > 1:
        yield margin + _line(shown, lambda stage: f"{f'stage {stage}':^{inside + 2}}")
    top = functools.partial(_rule, mesh, row=0, plain=("┌", "─", "┐"), ranks_per_host=ranks_per_host, inside=inside)
    yield _labels(mesh, None) + _line(shown, top)
    before: int | None = _GAP
    for row in shown.rows:
        if row is _GAP:
            yield margin + _line(shown, lambda _: f"│{'⋮':^{inside}}│")
        else:
            if row:
                plain = ("├", "╌", "┤") if before is not _GAP and _begins_replica(mesh, row) else ("│", " ", "│")
                rule = functools.partial(
                    _rule, mesh, row=row, plain=plain, ranks_per_host=ranks_per_host, inside=inside
                )
                line = _line(shown, rule)
                if line.strip("│… "):
                    yield margin + line
            boxed = functools.partial(_boxed, mesh, row=row, shown=shown, ranks_per_host=ranks_per_host)
            yield _labels(mesh, row, shown.data_per_row) + _line(shown, boxed)
        before = row
    yield margin + _line(shown, lambda _: f"└{'─' * inside}┘")


def _line(shown: _Shown, box: Callable[[int], str]) -> str:
    return "".join(_GAP_BOX if stage is _GAP else f"  {box(stage)}" for stage in shown.stages)


def _boxed(mesh: Mesh, stage: int, row: int, shown: _Shown, ranks_per_host: int) -> str:
    return f"│ {_cell(mesh, stage, row, shown, ranks_per_host)} │"


def _cell(mesh: Mesh, stage: int, row: int, shown: _Shown, ranks_per_host: int) -> str:
    """Return the ranks of one stage in one line."""
    digits = len(str(mesh.world_size - 1))
    text, last = "", None
    for data in range(row, row + shown.data_per_row):
        for context in shown.contexts:
            for tensor in shown.tensors if context is not _GAP else (_GAP,):
                rank = None
                if context is not _GAP and tensor is not _GAP:
                    rank = _rank(mesh, stage, data, context, tensor)
                if text:
                    starts = tensor == 0 or context is _GAP
                    divider = ("   " if context == 0 else " | ") if starts else " "
                    if ranks_per_host and rank is not None and last is not None and rank % ranks_per_host == 0:
                        divider = " ║ " if starts else "║"
                    text += divider
                text += f"{'…' if rank is None else rank:>{digits}}"
                last = rank
    return text


def _begins_replica(mesh: Mesh, row: int) -> bool:
    shard = mesh.size("shard")
    return mesh.size("replicate") > 1 and shard > 1 and row % shard == 0


def _rule(mesh: Mesh, stage: int, row: int, plain: tuple[str, str, str], ranks_per_host: int, inside: int) -> str:
    """Return the line of a box above a row: a double one where a host begins, else `plain`; with the host's number."""
    left, line, right = plain
    name = ""
    if ranks_per_host:
        host, place = divmod(_rank(mesh, stage, row, 0, 0), ranks_per_host)
        if row and place == 0:
            left, line, right = "╞", "═", "╡"
        if place == 0 or row == 0:
            name = next((n for n in (f" host {host} ", f" {host} ") if len(n) <= inside - 1), "")
    return f"{left}{line if name else ''}{name}{line * (inside - len(name) - bool(name))}{right}"


def _labels(mesh: Mesh, row: int | None, data_per_row: int = 1) -> str:
    """Return what stands left of a line of data ranks; the names of its columns for no row."""
    axes: list[Along] = ["replicate", "shard", "expert"]
    names = [axis for axis in axes if mesh.size(axis) > 1]
    widths = [max(len(name), 2 * len(str(mesh.data_size)) + 1) for name in names]
    if row is None:
        return " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    values: list[list[int]] = [[], [], []]
    for data in (row, row + data_per_row - 1):
        replica, shard = divmod(data, mesh.size("shard"))
        for found, value in zip(values, (replica, shard, data % mesh.degrees.expert), strict=True):
            found.append(value)
    if data_per_row >= mesh.degrees.expert:
        values[2] = [0, mesh.degrees.expert - 1]
    by_name = dict(zip(axes, values, strict=True))
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in (by_name[name] for name in names)]
    return " ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _summary(mesh: Mesh, ranks_per_host: int) -> list[str]:
    """Return a line an axis: its groups, one of them, and on how many hosts one lies."""
    axes: tuple[Along, ...] = get_args(Along)
    lines = []
    for axis in axes:
        if mesh.size(axis) == 1 or (axis == "expert_data" and mesh.degrees.expert == 1):
            continue
        groups = mesh.groups(axis)
        members = groups[0] if len(groups[0]) <= 8 else [*groups[0][:4], _GAP, groups[0][-1]]
        example = " ".join("…" if rank is _GAP else str(rank) for rank in members)
        count = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
        line = f"{axis:11s}  {count:>11s} of {mesh.size(axis):<5d} {_hosts(groups, ranks_per_host):<22s}"
        lines.append(f"{line} {'like ' if len(groups) > 1 else ''}{example}")
    return lines


def _hosts(groups: Sequence[Sequence[int]], ranks_per_host: int) -> str:
    if not ranks_per_host:
        return ""
    counts = {len({rank // ranks_per_host for rank in group}) for group in groups}
    if counts == {1}:
        return "inside hosts"
    low, high = min(counts), max(counts)
    return f"across {high} hosts" if low == high else f"across {low} to {high} hosts"


def _rank(mesh: Mesh, stage: int, data: int, context: int, tensor: int) -> int:
    replica, shard = divmod(data, mesh.size("shard"))
    return mesh.rank_of(Coordinates(stage, replica, shard, context, tensor))


def _axes() -> tuple[Along, ...]:
    axes: tuple[Along, ...] = get_args(Along)
    return tuple(axis for axis in axes if axis in Coordinates._fields)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
