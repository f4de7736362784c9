"""Which link, sender, receiver, rank or switch makes transfers slow: the matrix of delays between all ranks.

A slow cell is a link; a slow row a sender, a slow column a receiver, both of one rank that rank; all cells between two
blocks of ranks what connects them. `probe` measures the matrix, `passive` takes it from messages that a job sent
anyway, `explain` reads it. A cell is timed by its sender alone: payload there, one byte back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

from faulttol.config import DetectorConfig
from faulttol.finding import Finding, Suspect
from faulttol.view import JobView, match

if TYPE_CHECKING:
    import torch.distributed as dist

Link = tuple[int, int]
"""Sender, receiver."""
Shape = Literal["link", "pair", "sender", "receiver", "rank", "block"]
_ORDER: tuple[Shape, ...] = ("link", "pair", "sender", "receiver", "rank", "block")
"""The simpler explanation first, where two explain equally much."""
_MOST = 0.7
"""Share of an entity's cells that have to be slow for it to be the explanation."""


@dataclass(frozen=True, slots=True)
class DelayMatrix:
    """Seconds that a payload takes from one rank to another, the least of several."""

    seconds: Mapping[Link, float]
    classes: Mapping[Link, str] = field(default_factory=dict)
    """What kind of link each is, as `within` a machine or `between`; only equal kinds are compared."""

    @property
    def ranks(self) -> list[int]:
        """Every rank of the matrix, ascending."""
        return sorted({rank for link in self.seconds for rank in link})

    def __or__(self, other: DelayMatrix) -> DelayMatrix:
        """The union; where both know a cell, the lesser."""
        seconds = dict(self.seconds)
        for link, value in other.seconds.items():
            seconds[link] = min(value, seconds.get(link, value))
        return DelayMatrix(seconds, {**self.classes, **other.classes})


@dataclass(frozen=True, slots=True)
class Explanation:
    """One thing that explains slow cells."""

    shape: Shape
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    """The cells are those from a source to a target."""
    factor: float
    """How many times slower than usual its cells are, the median of them."""
    num_slow: int
    num_cells: int

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """Whom to accuse: the link, or the rank all of whose links are slow; of a block all its links."""
        score = self.num_slow / self.num_cells
        if self.shape in ("sender", "rank"):
            return (Suspect(self.sources[0], score),)
        if self.shape == "receiver":
            return (Suspect(self.targets[0], score),)
        links = [(source, target) for source in self.sources for target in self.targets if source != target]
        return tuple(Suspect(source, score, target) for source, target in links)


def explain(
    matrix: DelayMatrix,
    config: DetectorConfig,
    *,
    usual: DelayMatrix | None = None,
    blocks: Sequence[Sequence[int]] = (),
) -> list[Explanation]:
    """Return what explains the slow cells: greedily, each time what explains most of the rest, of equals the slowest.

    A cell is slow at `link_factor` times what is usual and `link_floor_s` more than that; usual is the cell of an
    earlier, healthy matrix, or else the median of its class. `blocks`: ranks that hang on one switch each.
    """
    normal = _usual(matrix, usual)
    slow = {
        link
        for link, value in matrix.seconds.items()
        if value > config.link_factor * normal[link] and value > normal[link] + config.link_floor_s
    }
    found = []
    entities = _entities(matrix, blocks)
    while slow:
        _, _, factor, index = max(
            (gain, -_ORDER.index(shape), median(matrix.seconds[link] / max(normal[link], 1e-9) for link in cells), i)
            for i, (shape, cells) in enumerate(entities)
            if (gain := _gain(cells, slow)) > 0
        )
        shape, cells = entities[index]
        hit = cells & slow
        found.append(
            Explanation(
                shape,
                *_ends(shape, cells),
                factor=factor,
                num_slow=len(hit),
                num_cells=len(cells),
            )
        )
        slow -= cells
    return found


def refine(finding: Finding, explanations: Sequence[Explanation]) -> Finding:
    """Return the finding with the suspects that a delay matrix named; itself, if it named none."""
    suspects = tuple(suspect for one in explanations for suspect in one.suspects)
    if not suspects:
        return finding
    first = explanations[0]
    told = f"{first.shape} {', '.join(map(str, first.sources))} -> {', '.join(map(str, first.targets))}"
    return replace(
        finding,
        suspects=suspects,
        summary=f"{finding.summary}; slow is the {told}, by {first.factor:.1f} times",
        evidence={**finding.evidence, "delay matrix": told, "delay factor": round(first.factor, 2)},
    )


def passive(view: JobView, num_bytes: int | None = None) -> DelayMatrix:
    """Return what the messages of the view tell: the least time that either end had one open, per link.

    A lower bound of the delay: who came last to a message had it open for its transfer only.
    """
    events = [event for record in view.records.values() for event in record.events if event.state == "ended"]
    seconds: dict[Link, list[float]] = {}
    for key, operation in match(events).items():
        if not operation.is_message or operation.absent:
            continue
        both = list(operation.events.values())
        if num_bytes is not None and both[0].bytes < num_bytes:
            continue
        seconds.setdefault((key.source, key.target), []).append(
            max((event.duration_ns or 0) / 1e9 for event in both if event.kind == "recv" or len(both) == 1)
        )
    return DelayMatrix({link: min(values) for link, values in seconds.items()})


def from_backlogs(rows: Mapping[int, Mapping[int, int]]) -> list[Explanation]:
    """Return the links on which bytes wait that nobody acknowledges, the most first.

    `rows`: of each sender, by receiver, what waited in its connections at two looks in a row
    (`faulttol.sockets.backlog_bytes`) while its loop stood.
    """
    waiting = {(source, target): count for source, row in rows.items() for target, count in row.items() if count > 0}
    most = max(waiting.values(), default=1)
    return [
        Explanation("link", (link[0],), (link[1],), factor=waiting[link] / most, num_slow=1, num_cells=1)
        for link in sorted(waiting, key=lambda link: -waiting[link])
    ]


def rounds(num_ranks: int) -> list[list[Link]]:
    """Return pairs of places such that each round's are disjoint and every two places meet once (circle method)."""
    places: list[int] = list(range(num_ranks + num_ranks % 2))
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < num_ranks])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def probe(
    group: dist.ProcessGroup | None = None, *, num_bytes: int = 1 << 18, repeats: int = 5, device: str = "cpu"
) -> dict[Link, float]:
    """Measure this rank's row of the matrix: seconds to each other rank; all ranks of the group call it together.

    Pairs measure at once that have no rank in common. The payload is several times what a paced connection sends in
    one piece before it waits. Links are named by ranks in the job. It blocks for as long as
    the slowest link takes, and gives up by the group's timeout only.
    """
    import torch
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    own = ranks.index(dist.get_rank())
    payload = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    answer = torch.zeros(1, dtype=torch.uint8, device=device)
    seconds: dict[Link, float] = {}
    for pairs in rounds(len(ranks)):
        pair = next((pair for pair in pairs if own in pair), None)
        for sender in pair or ():
            assert pair is not None
            other = ranks[pair[0] + pair[1] - own]
            for _ in range(repeats):
                if sender == own:
                    begun_s = time.perf_counter()
                    dist.send(payload, other, group=group)
                    dist.recv(answer, other, group=group)
                    answer.item()  # on a device: waits for the answer
                    link = (ranks[own], other)
                    seconds[link] = min(seconds.get(link, float("inf")), time.perf_counter() - begun_s)
                else:
                    dist.recv(payload, other, group=group)
                    payload[:1].item()
                    dist.send(answer, other, group=group)
    return seconds


def _usual(matrix: DelayMatrix, usual: DelayMatrix | None) -> dict[Link, float]:
    known = {} if usual is None else usual.seconds
    by_class: dict[str, list[float]] = {}
    for link, value in matrix.seconds.items():
        by_class.setdefault(matrix.classes.get(link, ""), []).append(value)
    return {link: known.get(link, median(by_class[matrix.classes.get(link, "")])) for link in matrix.seconds}


def _gain(cells: set[Link], slow: set[Link]) -> float:
    hit = len(cells & slow)
    return hit - (len(cells) - hit) if hit >= _MOST * len(cells) else 0.0


def _entities(matrix: DelayMatrix, blocks: Sequence[Sequence[int]]) -> list[tuple[Shape, set[Link]]]:
    """What a fault can be: each with its cells."""
    links = set(matrix.seconds)
    found: list[tuple[Shape, set[Link]]] = [("link", {link}) for link in sorted(links)]
    found += [("pair", {link, link[::-1]}) for link in sorted(links) if link[0] < link[1] and link[::-1] in links]
    for rank in matrix.ranks:
        row = {link for link in links if link[0] == rank}
        column = {link for link in links if link[1] == rank}
        if len(row) > 1:
            found.append(("sender", row))
        if len(column) > 1:
            found.append(("receiver", column))
        if len(row) > 1 and len(column) > 1:
            found.append(("rank", row | column))
    for one in blocks:
        for other in blocks:
            between = {link for link in links if link[0] in one and link[1] in other}
            if one != other and len(between) > 1:
                found.append(("block", between))
    return found


def _ends(shape: Shape, cells: set[Link]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if shape == "rank":  # the one that all its cells have in common
        (rank,) = set.intersection(*(set(link) for link in cells))
        return (rank,), (rank,)
    return tuple(sorted({link[0] for link in cells})), tuple(sorted({link[1] for link in cells}))
