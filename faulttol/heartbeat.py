"""A rank's sign of life: a small mapped file that the rank writes and anyone on its machine may read.

Two writers per rank, each with a record of its own: a daemon thread stamps that the process lives, the
training loop stamps where it is. A record is two slots written in turn, each sealed by a checksum: at any
instant one slot at most is being written, so a reader finds the other whole, also when the rank was stopped
or killed mid-write.

What the two records tell apart, and what they cannot:

    process gone          no new sign of life; only the process table tells death from a freeze
    SIGSTOP, swap, D      no new sign of life
    GIL held by C code    no new sign of life: the thread needs the GIL. Reads as frozen, though the code runs
    loop blocked          signs of life, no progress: a waiting collective, an endless loop, slow I/O
    loop slow             signs of life, slow progress
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from faulttol.errors import HeartbeatError

_FILE_BYTES = 512
_MAGIC = b"faulttol heartbeat 1\n"
_HEADER = struct.Struct("<24s Q Q 36s")  # magic, pid, start (ns), boot id
_LIFE = struct.Struct("<Q Q")  # number of signs, when (ns)
_PROGRESS = struct.Struct("<Q Q q 24s")  # number of beats, when (ns), step, phase
_SEAL = struct.Struct("<I")
_SLOT_BYTES = 64
_LIFE_OFFSET = 128
_PROGRESS_OFFSET = 256
_PHASE_BYTES = 24
_READ_ATTEMPTS = 100
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class HeartbeatView:
    """What a heartbeat file said at one moment.

    Times are `time.monotonic_ns()` of the rank's machine: compare them only on that machine, under `boot_id`.
    The counts need no clock: a reader that sees one change knows that the rank did something since.
    """

    pid: int
    boot_id: str
    started_ns: int
    alive_count: int
    alive_ns: int
    progress_count: int
    progress_ns: int
    step: int
    phase: str


class Heartbeat:
    """Writes one rank's heartbeat file until `close()`; use as a context manager.

    The file appears under its name complete, with a first sign of life. `beat` belongs to one thread, that of
    the loop; a thread of its own stamps liveness every `interval_s` seconds. Put the file on a local disk or
    in memory: a mapping of a network file system is not seen by other machines in time.
    """

    def __init__(self, path: Path, interval_s: float) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s: {interval_s} is not above 0")
        self.path = path
        self.step = 0
        self._pid = os.getpid()
        self._life_count = 0
        self._progress_count = 0
        self._map = _create(path)
        self._stamp_life()
        self.beat(step=0, phase="start")
        os.rename(_unfinished(path), path)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(interval_s,), name="faulttol-heartbeat", daemon=True)
        self._thread.start()

    def beat(self, *, step: int, phase: str) -> None:
        """Record that the loop reached `phase` of `step`; a few microseconds, no system call.

        Raises: HeartbeatError in a forked child, which must not speak for its parent; ValueError for a phase
        of more than 24 bytes.
        """
        if os.getpid() != self._pid:
            raise HeartbeatError(f"{self.path}: belongs to process {self._pid}, not to its child {os.getpid()}")
        name = phase.encode()
        if len(name) > _PHASE_BYTES:
            raise ValueError(f"phase {phase!r}: longer than {_PHASE_BYTES} bytes")
        self.step = step
        self._progress_count += 1
        record = _PROGRESS.pack(self._progress_count, time.monotonic_ns(), step, name)
        _write_slot(self._map, _PROGRESS_OFFSET, self._progress_count, record)

    def close(self) -> None:
        """Stop the signs of life; the file stays and can be read. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if os.getpid() == self._pid:  # a forked child has no such thread
            self._thread.join()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _live(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            self._stamp_life()

    def _stamp_life(self) -> None:
        self._life_count += 1
        record = _LIFE.pack(self._life_count, time.monotonic_ns())
        _write_slot(self._map, _LIFE_OFFSET, self._life_count, record)


def read(path: Path) -> HeartbeatView:
    """What the heartbeat file says now, whatever state its rank is in.

    Raises: FileNotFoundError while the rank has not started its heartbeat; HeartbeatError for a file that is
    not a heartbeat.
    """
    for _ in range(_READ_ATTEMPTS):
        content = path.read_bytes()
        if len(content) != _FILE_BYTES or not content.startswith(_MAGIC):
            raise HeartbeatError(f"{path}: not a heartbeat file of this version")
        _, pid, started_ns, boot_id = _HEADER.unpack_from(content)
        life = _newest_slot(content, _LIFE_OFFSET, _LIFE)
        progress = _newest_slot(content, _PROGRESS_OFFSET, _PROGRESS)
        if life is not None and progress is not None:
            alive_count, alive_ns = _LIFE.unpack(life)
            progress_count, progress_ns, step, phase = _PROGRESS.unpack(progress)
            return HeartbeatView(
                pid=pid,
                boot_id=boot_id.rstrip(b"\0").decode(),
                started_ns=started_ns,
                alive_count=alive_count,
                alive_ns=alive_ns,
                progress_count=progress_count,
                progress_ns=progress_ns,
                step=step,
                phase=phase.rstrip(b"\0").decode(),
            )
    raise HeartbeatError(f"{path}: no whole record in {_READ_ATTEMPTS} reads; the file is damaged")


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _create(path: Path) -> mmap.mmap:
    """Map a new file at the unfinished name; its blocks are allocated here, so no later write can fail."""
    header = _HEADER.pack(_MAGIC, os.getpid(), time.monotonic_ns(), _boot_id().encode())
    with open(_unfinished(path), "w+b") as file:
        file.write(header.ljust(_FILE_BYTES, b"\0"))
        file.flush()
        return mmap.mmap(file.fileno(), _FILE_BYTES)


def _boot_id() -> str:
    """The kernel's name for this boot; empty where the kernel has none."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _write_slot(target: mmap.mmap, offset: int, count: int, record: bytes) -> None:
    start = offset + (count & 1) * _SLOT_BYTES
    target[start : start + len(record) + _SEAL.size] = record + _SEAL.pack(zlib.crc32(record))


def _newest_slot(content: bytes, offset: int, layout: struct.Struct) -> bytes | None:
    """The whole record with the larger count, or None when both slots are torn; count 0 is never written."""
    whole: list[bytes] = []
    for start in (offset, offset + _SLOT_BYTES):
        record = content[start : start + layout.size]
        (seal,) = _SEAL.unpack_from(content, start + layout.size)
        if seal == zlib.crc32(record) and record[:8] != bytes(8):
            whole.append(record)
    return max(whole, key=lambda record: int.from_bytes(record[:8], "little"), default=None)
