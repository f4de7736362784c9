"""A live view of a run in a terminal: where every rank is, what it waits in, and what the detector says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from faulttol import pace, report
from faulttol.config import DetectorConfig, HealthConfig
from faulttol.detector import Memory, observe
from faulttol.errors import RingError, RunError
from faulttol.events import CollectiveEvent, RankRecord
from faulttol.finding import Finding
from faulttol.health import Vitals
from faulttol.history import History
from faulttol.ring import RingReader
from faulttol.view import JobView

_CLEAR, _HOME, _REST = "\x1b[2J", "\x1b[H", "\x1b[J"
_RED, _YELLOW, _DIM, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Sign:
    """What is known of a rank's process, besides its records."""

    age_s: float
    """Since its recorder gave a sign of life."""
    is_alive: bool
    """Whether its process exists, as far as this machine can tell."""
    is_done: bool = False
    """Whether its recorder was taken out in peace."""


class Watcher:
    """Follows the newest generation of a run's rings; use as a context manager."""

    def __init__(self, folder: Path, config: DetectorConfig, health: HealthConfig) -> None:
        """Raises: RunError where no rings are."""
        self._folder, self._config, self._health = folder, config, health
        self._readers: dict[Path, tuple[RingReader, History]] = {}
        self._generation = -1
        self._memory = Memory()
        self._find()
        if not self._readers:
            raise RunError(f"{folder}: no rings; a folder that a recorder writes to has some")

    def look(self) -> tuple[JobView, dict[int, Sign], tuple[Finding, ...]]:
        """Return what the ranks did, their signs of life, and what the detector says of it."""
        self._find()
        records: dict[int, RankRecord] = {}
        signs: dict[int, Sign] = {}
        for reader, history in self._readers.values():
            record = history.add(reader.poll())
            records[record.rank] = record
            signs[record.rank] = Sign(
                max(0.0, (record.now_ns - reader.sign_ns) / 1e9), _exists(reader), reader.is_closed
            )
        vitals = {
            rank: Vitals(rank=rank, process_alive=sign.is_alive, python_age_s=sign.age_s)
            for rank, sign in signs.items()
            if not sign.is_done
        }
        view = JobView(records, vitals)
        self._memory, found = observe(self._memory, view, self._config, self._health)
        return view, signs, found

    def close(self) -> None:
        """Let go of the rings. Idempotent."""
        for reader, _ in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self) -> None:
        for path in sorted(self._folder.rglob("*.ring")):
            if path in self._readers:
                continue
            with contextlib.suppress(FileNotFoundError, RingError):  # it is being made, or none of ours
                reader = RingReader(path)
                if reader.info.generation > self._generation:
                    self.close()
                    self._generation, self._memory = reader.info.generation, Memory()
                if reader.info.generation < self._generation:
                    reader.close()
                else:
                    self._readers[path] = reader, History()


def run(watcher: Watcher, out: TextIO, every_s: float, once: bool, sleep: Callable[[float], None] = time.sleep) -> None:
    """Draw until interrupted; `once`: one frame, without control sequences. The second look makes findings sure."""
    watcher.look()
    if not once:
        out.write(_CLEAR)
    while True:
        text = frame(*watcher.look(), colours=not once and out.isatty())
        out.write(text if once else _HOME + text.replace("\n", "\x1b[K\n") + _REST)
        out.flush()
        if once:
            return
        sleep(every_s)


def frame(view: JobView, signs: Mapping[int, Sign], found: Sequence[Finding], *, colours: bool) -> str:
    """Return one picture of the job."""
    rows: list[tuple[str, ...]] = [("RANK", "STEP", "PHASE", "STEP ms", "OWN ms", "COLLECTIVES", "SIGN s", "IN")]
    bad = {rank for finding in found if finding.kind.is_fault for rank in finding.culprits}
    for rank in view.ranks:
        record, sign = view.records.get(rank), signs.get(rank)
        rows.append(_row(rank, record, sign))
    lines = report.table(rows).split("\n")
    if colours:
        for place, rank in enumerate(view.ranks, 1):
            sign = signs.get(rank)
            silent = sign is not None and not sign.is_done and (not sign.is_alive or sign.age_s > 1.0)
            colour = _RED if rank in bad else _YELLOW if silent else ""
            lines[place] = colour + lines[place] + _PLAIN if colour else lines[place]
        lines[0] = _DIM + lines[0] + _PLAIN
    lines.append("")
    lines += [f"{finding.kind}: {finding.summary}" for finding in found]
    if signs and all(sign.is_done or not sign.is_alive for sign in signs.values()):
        lines.append("no rank is at work any more; `python -m faulttol report` tells how the run ended")
    elif not found:
        lines.append("nothing is wrong, as far as this tells")
    return "\n".join(lines) + "\n"


def _row(rank: int, record: RankRecord | None, sign: Sign | None) -> tuple[str, ...]:
    if record is None:
        return (str(rank), "-", "-", "-", "-", "-", "-", "not heard of")
    times = pace.step_times(record)[-16:]
    mark = record.marks[-1] if record.marks else None
    open_ones = [event for event in record.events if event.state == "begun"]
    silent = "-"
    if sign is not None:
        silent = "done" if sign.is_done else f"{sign.age_s:.1f}" if sign.is_alive else "gone"
    return (
        str(rank),
        "-" if mark is None else str(mark.step),
        "-" if mark is None else mark.phase,
        f"{sum(time.total_ns for time in times) / len(times) / 1e6:.1f}" if times else "-",
        f"{sum(time.own_ns for time in times) / len(times) / 1e6:.1f}" if times else "-",
        str(record.events[-1].index if record.events else 0),
        silent,
        _inside(open_ones, record.now_ns),
    )


def _inside(events: Sequence[CollectiveEvent], now_ns: int) -> str:
    if not events:
        return ""
    oldest = min(events, key=lambda event: event.begin_ns)
    peer = "" if oldest.peer is None else f" {'to' if oldest.kind == 'send' else 'from'} {oldest.peer}"
    more = f" and {len(events) - 1} more" if len(events) > 1 else ""
    return f"{oldest.kind} {oldest.group}#{oldest.seq}{peer} for {(now_ns - oldest.begin_ns) / 1e9:.1f} s{more}"


def _exists(reader: RingReader) -> bool:
    """Whether the rank's process is in this machine's table; a rank of another machine is taken to be there."""
    if not reader.is_here:
        return True
    try:
        state = Path(f"/proc/{reader.info.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
