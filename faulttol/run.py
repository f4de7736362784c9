"""What is known of a run, from its rings, from what was shipped of them, or from both."""

from __future__ import annotations

import json
from pathlib import Path

from faulttol import ring, table
from faulttol.errors import RunError
from faulttol.events import RankRecord


def records(run: str | Path, generation: int | None = None) -> list[RankRecord]:
    """Return what the ranks of one generation of a run did, by rank; of the newest generation unless one is given.

    `run`: a folder in which rings and shipped events are, at any depth, or a URI of shipped events.

    Raises: RunError when there is nothing, or nothing of that generation.
    """
    from faulttol import ship  # pyarrow's file systems take a while to load

    found: list[RankRecord] = []
    path = Path(run)
    if "://" in str(run):
        found = ship.shipped(str(run))
    elif path.is_dir():
        found = ship.shipped(str(run))
        found += [ring.read(file) for file in sorted(path.rglob("*.ring"))]
    merged = table.merge(found)
    if not merged:
        raise RunError(f"{run}: no rings and no shipped events; a folder that a recorder wrote to has some")
    generations = sorted({record.generation for record in merged})
    wanted = generations[-1] if generation is None else generation
    if wanted not in generations:
        raise RunError(f"{run}: no generation {generation}; there are {', '.join(map(str, generations))}")
    return [record for record in merged if record.generation == wanted]


def recoveries(run: str | Path) -> list[str]:
    """Return a line on each loss of ranks that a launcher with recovery wrote down, and what it did about it, in order.

    Of a folder of this machine; a URI has none. A last line that a kill cut off is left out.
    """
    told: list[str] = []
    for path in sorted(Path(run).rglob("recoveries.jsonl")) if Path(run).is_dir() else ():
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not text.endswith("\n"):
                continue
            line = json.loads(text)
            lost = "; ".join(f"rank {loss['rank']} {loss['kind']}: {loss['detail']}" for loss in line["losses"])
            after_s = line["after_s"].get("rejoined")
            now = "" if after_s is None else f"generation {line['generation']}, after {after_s:.2f} s: "
            told.append(f"step {line['step']}: {lost or 'the ranks lost one another'} -> {now}{line['decision']}")
    return told
