"""Faults for a run to practise on: what `RUN/drill.jsonl` orders strikes at the steps it names, once each.

A line is a `faulttol.inject.Fault` as JSON. Lines may be added while the run goes on. What struck is written to
`RUN/events/faults.jsonl` before it does, and does not strike again in a later generation or a resumed run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from faulttol import sockets
from faulttol.inject import Fault, Injector, fired
from trainsys.errors import ConfigError
from trainsys.folder import RunFolder


def order(folder: RunFolder, fault: Fault) -> None:
    """Add a fault to a run's drill."""
    with _schedule(folder).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(fault)) + "\n")


def record(folder: RunFolder) -> Path:
    """Return where the faults that struck are written down (`faulttol.inject.fired` reads it)."""
    return folder.path / "events" / "faults.jsonl"


class Drill:
    """One rank's share of a run's drill."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        self._path = _schedule(folder)
        self._record = record(folder)
        self._record.parent.mkdir(parents=True, exist_ok=True)
        self._over = set(fired(self._record))
        self._connections: dict[int, list[int]] = {}
        self._injector = Injector([], rank=rank, record=self._record, connections=self._connections)
        self._read_bytes = 0

    def connect(self) -> None:
        """Learn which connections lead to which rank, for faults of links; all ranks call it, their groups made."""
        self._connections.update(sockets.connections())

    def at(self, step: int) -> None:
        """Strike with what is ordered for this step."""
        try:
            size = os.stat(self._path).st_size
        except FileNotFoundError:
            return
        if size > self._read_bytes:
            self._take()
        self._injector.at(step)

    def flip(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Invert a bit of a parameter with what is ordered for this step; after `at`."""
        self._injector.flip(step, parameters)

    def corrupt(self, step: int, gradients: Mapping[str, Tensor]) -> bool:
        """Damage a gradient, before it is reduced, with what is ordered for this step; whether anything was."""
        return self._injector.corrupt(step, gradients)

    def close(self) -> None:
        """Stop what still acts. Idempotent."""
        self._injector.close()

    def _take(self) -> None:
        """Take in the whole lines that are new."""
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(new)
        for line in new.splitlines():
            try:
                fault = Fault(**json.loads(line))
                if fault not in self._over:
                    self._injector.add(fault)
            except (TypeError, ValueError) as error:
                raise ConfigError([f"{self._path}: {line.decode(errors='replace')}: {error}"]) from error


def _schedule(folder: RunFolder) -> Path:
    return folder.path / "drill.jsonl"
