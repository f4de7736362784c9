"""Faults on schedule, to test with: each is written down before it strikes, so that a test can see it did."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from faulttol.errors import InjectedFault

Kind = Literal["raise", "kill", "freeze", "hang"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault of one rank."""

    kind: Kind
    """`raise`: InjectedFault; `kill`: SIGKILL to itself; `freeze`: SIGSTOP to itself; `hang`: endless sleep."""
    rank: int
    step: int


class Injector:
    """One rank's share of a schedule; call `at` at the start of each step."""

    def __init__(self, schedule: Sequence[Fault], *, rank: int, record: Path) -> None:
        self._schedule = [fault for fault in schedule if fault.rank == rank]
        self._record = record

    def at(self, step: int) -> None:
        """Strike with what is scheduled for this step, after appending it to the record."""
        for fault in self._schedule:
            if fault.step == step:
                _write_down(fault, self._record)
                _strike(fault)


def fired(record: Path) -> list[Fault]:
    """The faults that struck, over all ranks, in the order of their striking; none before the first."""
    if not record.exists():
        return []
    return [Fault(**json.loads(line)) for line in record.read_text().splitlines()]


def _write_down(fault: Fault, record: Path) -> None:
    fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, json.dumps(asdict(fault)).encode() + b"\n")  # in one piece: ranks share the file
        os.fsync(fd)
    finally:
        os.close(fd)


def _strike(fault: Fault) -> None:
    if fault.kind == "raise":
        raise InjectedFault(f"injected at step {fault.step} of rank {fault.rank}")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault.kind == "hang":
        while True:
            time.sleep(3600)
