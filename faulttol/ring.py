"""A rank's last records in a mapped file, which anyone on its machine can read in whatever state the rank is.

One process writes, from any of its threads and without a lock. A record is begun in one write and ended in a second,
each part sealed by a checksum over the record's index too: a reader never takes a half of one record, or a rest of the
record that had the place before, for a whole. Writing needs no system call: what a stopped or killed rank wrote is
there. The file's blocks are allocated when it is made, so that no later write can meet a full disk.

    0      header: version, who writes it, sizes, clocks; counters at _COUNTERS
    4096   names: (length, checksum, JSON) each, in the order of their numbers; groups, phases, dtypes
    …      records: begun part, ended part
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from faulttol.errors import RingError
from faulttol.events import KINDS, MARK_KINDS, CollectiveEvent, MarkKind, RankRecord, StepMark

_MAGIC = b"faulttol ring 1\n"
_HEADER_BYTES = 4096
_COUNTERS = 2048
"""Offset of the 64-bit counters: records begun, records that could not be written, bytes of names, last sign of life
(ns), and whether the ring was closed in peace."""
_BEGUN, _LOST, _NAMED, _SIGN, _CLOSED = (_COUNTERS // 8 + i for i in range(5))
_NAMES_BYTES = 1 << 20
_NAME = struct.Struct("=II")  # length, checksum

_BEGIN = struct.Struct("=QQQIiiHHHBB")  # index, when, bytes, seq, step, peer, group, phase, dtype, kind, flags
_END = struct.Struct("=QQBB")  # when, device ns + 1 or 0, state, flags
_MARK_END = struct.Struct("=ddBB")  # loss, gradient norm, state, which of them are there
_SEAL = struct.Struct("=I")
_BEGIN_BYTES = _BEGIN.size + _SEAL.size
_END_BYTES = max(_END.size, _MARK_END.size) + _SEAL.size
_RECORD_BYTES = _BEGIN_BYTES + _END_BYTES
_OPEN = bytes(_END_BYTES)
_INDEX = struct.Struct("=Q")

_FIRST_MARK = 200
"""Kind numbers from here on are marks."""
_NO_PEER = -1
_ENDED, _FAILED = 1, 2
_LATE = 1
_HAS_LOSS, _HAS_NORM = 1, 2
KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
"""The number of a kind in records."""
MARK_NUMBERS = {kind: _FIRST_MARK + number for number, kind in enumerate(MARK_KINDS)}
"""The same of a mark."""
_NAMELESS: Mapping[str, Any] = {"name": "", "backend": "", "ranks": ()}
_RING = re.compile(r"rank\d+\.generation(\d+)\.ring")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Layout(NamedTuple):
    """Where in a ring's file the records are, in bytes."""

    first: int
    capacity: int
    """Records."""
    record_bytes: int
    begin_bytes: int
    """Of them, of the part that is written first."""
    begun_counter: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingInfo:
    """Who writes a ring, and since when."""

    rank: int
    world_size: int
    generation: int
    pid: int
    host: str
    boot_id: str
    capacity: int
    """Records that it holds; older ones are overwritten."""
    created_ns: int
    """`time.monotonic_ns()`."""
    created_wall_ns: int
    """`time.time_ns()` of the same moment."""


class Ring:
    """Writes one rank's ring until `close()`."""

    def __init__(self, path: Path, *, rank: int, world_size: int, generation: int = 0, capacity: int = 8192) -> None:
        if capacity < 16:
            raise ValueError(f"capacity: {capacity} records; at least 16 are needed")
        self.path, self.capacity = path, capacity
        self._pid = os.getpid()
        info = RingInfo(
            rank=rank,
            world_size=world_size,
            generation=generation,
            pid=self._pid,
            host=socket.gethostname(),
            boot_id=_boot_id(),
            capacity=capacity,
            created_ns=time.monotonic_ns(),
            created_wall_ns=time.time_ns(),
        )
        self._map = _create(path, info)
        self._counters = memoryview(self._map).cast("Q")
        self._indexes = itertools.count(1)
        self._claim: Callable[[], int] = self._next
        self._first = _HEADER_BYTES + _NAMES_BYTES
        self._names: dict[tuple[str, ...], int] = {}
        self._naming = threading.Lock()
        self._counters[_SIGN] = time.monotonic_ns()

    @property
    def layout(self) -> Layout:
        """Where in the file the records are."""
        return Layout(self._first, self.capacity, _RECORD_BYTES, _BEGIN_BYTES, _BEGUN * 8)

    def share(self, claim: Callable[[], int]) -> None:
        """Let `claim` take the records: another writer of this process takes them too, before any was taken here."""
        self._claim = claim

    def number(self, kind: str, name: str, backend: str = "", ranks: tuple[int, ...] = ()) -> int:
        """Return the number of a group, phase or dtype, which is written down when it is new; 0 when all are taken."""
        key = (kind, name, backend, str(ranks))
        found = self._names.get(key)
        return found if found is not None else self._name(key, ranks)

    def begin(
        self, kind: int, when_ns: int, size: int, seq: int, where: tuple[int, int], peer: int, names: tuple[int, int]
    ) -> int:
        """Write that an operation begins; return its index. `where`: (step, phase); `names`: (group, dtype)."""
        index = self._claim()
        begun = _BEGIN.pack(index, when_ns, size, seq, where[0], peer, names[0], where[1], names[1], kind, 0)
        start = self._first + (index - 1) % self.capacity * _RECORD_BYTES
        self._map[start : start + _RECORD_BYTES] = begun + _SEAL.pack(zlib.crc32(begun)) + _OPEN
        return index

    def end(self, index: int, when_ns: int, device_ns: int | None, *, failed: bool, late: bool) -> None:
        """Write that the operation is over, unless its record was overwritten since."""
        ended = _END.pack(when_ns, 0 if device_ns is None else device_ns + 1, _FAILED if failed else _ENDED, late)
        self._finish(index, ended)

    def mark(
        self,
        kind: MarkKind,
        when_ns: int,
        where: tuple[int, int],
        tokens: int | None,
        loss: float | None,
        grad_norm: float | None,
    ) -> None:
        """Write a mark of the loop."""
        index = self.begin(MARK_NUMBERS[kind], when_ns, 0 if tokens is None else tokens + 1, 0, where, _NO_PEER, (0, 0))
        self._finish(index, _MARK_END.pack(loss or 0.0, grad_norm or 0.0, _ENDED, numbers_there(loss, grad_norm)))

    def lose(self) -> None:
        """Count a record that could not be written."""
        self._counters[_LOST] += 1

    @property
    def begun(self) -> int:
        """How many records were begun."""
        return int(self._counters[_BEGUN])

    def sign(self) -> None:
        """Stamp that the process lives."""
        self._counters[_SIGN] = time.monotonic_ns()

    def close(self) -> None:
        """Unmap; the file stays and can be read. Idempotent.

        In a forked child only that: the ring is its parent's, who may still write.
        """
        if self._map.closed:
            return
        is_ours = os.getpid() == self._pid
        if is_ours:
            self._counters[_CLOSED] = 1
        try:
            self._counters.release()
            self._map.close()
        except BufferError:
            if is_ours:
                raise  # a child may have been forked while another thread of its parent was writing

    def _next(self) -> int:
        index = next(self._indexes)
        if self._counters[_BEGUN] < index:  # another thread may have come in between with a later one
            self._counters[_BEGUN] = index
        return index

    def _name(self, key: tuple[str, ...], ranks: tuple[int, ...]) -> int:
        with self._naming:
            found = self._names.get(key)
            if found is not None:  # another thread was first
                return found
            text = json.dumps({"kind": key[0], "name": key[1], "backend": key[2], "ranks": ranks}).encode()
            used, number = self._counters[_NAMED], len(self._names) + 1
            whole = _NAME.pack(len(text), zlib.crc32(text)) + text
            if used + len(whole) > _NAMES_BYTES or number > 0xFFFF:
                return 0
            start = _HEADER_BYTES + used
            self._map[start : start + len(whole)] = whole
            self._counters[_NAMED] = used + len(whole)
            self._names[key] = number
            return number

    def _finish(self, index: int, ended: bytes) -> None:
        if self._counters[_BEGUN] - index >= self.capacity:
            return
        start = self._first + (index - 1) % self.capacity * _RECORD_BYTES + _BEGIN_BYTES
        sealed = ended + _SEAL.pack(zlib.crc32(ended, index & 0xFFFFFFFF))
        self._map[start : start + len(sealed)] = sealed


class RingReader:
    """Follows a ring, whoever writes it and whether or not he still does; use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises: FileNotFoundError before the rank made it; RingError for a file that is no ring or is cut short."""
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _HEADER_BYTES:
                raise RingError(f"{path}: {size} bytes are no ring")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.info = _info(path, self._map)
        except RingError:
            self._map.close()
            raise
        self._counters = memoryview(self._map)[:_HEADER_BYTES].cast("Q")
        self.is_here = self.info.boot_id == _boot_id()
        """Whether it was written on this machine, since it was started last: whether its clock is ours."""
        self._names: list[dict[str, Any]] = []
        self._named_bytes = 0
        self._read = 0
        self._open: dict[int, None] = {}
        self._num_passed = 0

    def poll(self) -> RankRecord:
        """Return what is new: records that began since the last call, and those that ended since, each whole.

        What was open at the last call and still is, is not repeated: keep events by `index`, the later replacing.
        """
        begun = int(self._counters[_BEGUN])
        oldest = max(1, begun - self.info.capacity + 1)
        self._num_passed += max(0, oldest - 1 - self._read)
        self._num_passed += sum(index < oldest for index in self._open)
        events: list[CollectiveEvent] = []
        marks: list[StepMark] = []
        still_open: dict[int, None] = {}
        for index in itertools.chain(self._open, range(max(oldest, self._read + 1), begun + 1)):
            if index < oldest:
                continue
            record = self._record(index)
            if isinstance(record, StepMark):
                marks.append(record)
            elif record is None:  # its writer is just at it
                still_open[index] = None
            else:
                if record.state == "begun":
                    still_open[index] = None
                if record.state != "begun" or index not in self._open:
                    events.append(record)
        self._read, self._open = max(self._read, begun), still_open
        return RankRecord(
            rank=self.info.rank,
            world_size=self.info.world_size,
            generation=self.info.generation,
            events=tuple(events),
            marks=tuple(marks),
            now_ns=time.monotonic_ns() if self.is_here else self.sign_ns,
            num_lost=self._num_passed + int(self._counters[_LOST]),
        )

    @property
    def num_begun(self) -> int:
        """How many records were begun since the ring was made, marks included."""
        return int(self._counters[_BEGUN])

    @property
    def sign_ns(self) -> int:
        """`time.monotonic_ns()` of the recorder's last sign of life."""
        return int(self._counters[_SIGN])

    @property
    def is_closed(self) -> bool:
        """Whether the recorder was taken out in peace: no more will come, and nothing is wrong with that."""
        return bool(self._counters[_CLOSED])

    def close(self) -> None:
        """Unmap. Idempotent."""
        if not self._map.closed:
            self._counters.release()
            self._map.close()

    def __enter__(self) -> RingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, index: int) -> CollectiveEvent | StepMark | None:
        start = _HEADER_BYTES + _NAMES_BYTES + (index - 1) % self.info.capacity * _RECORD_BYTES
        raw = self._map[start : start + _RECORD_BYTES]
        begun, (seal,) = raw[: _BEGIN.size], _SEAL.unpack_from(raw, _BEGIN.size)
        if seal != zlib.crc32(begun) or _INDEX.unpack_from(begun)[0] != index:
            return None
        kind = begun[-2]
        layout = _MARK_END if kind >= _FIRST_MARK else _END
        ended = raw[_BEGIN_BYTES : _BEGIN_BYTES + layout.size]
        (seal,) = _SEAL.unpack_from(raw, _BEGIN_BYTES + layout.size)
        is_whole = ended[-2] != 0 and seal == zlib.crc32(ended, index & 0xFFFFFFFF)
        if kind >= _FIRST_MARK:
            return self._mark(_BEGIN.unpack(begun), _MARK_END.unpack(ended)) if is_whole else None
        return self._event(_BEGIN.unpack(begun), _END.unpack(ended) if is_whole else None)

    def _mark(self, begun: Sequence[int], ended: Sequence[Any]) -> StepMark:
        index, when, tokens, _, step, _, _, phase, _, kind, _ = begun
        loss, grad_norm, _, has = ended
        return StepMark(
            rank=self.info.rank,
            index=index,
            kind=MARK_KINDS[kind - _FIRST_MARK],
            step=step,
            phase=self._name(phase)["name"],
            at_ns=when,
            tokens=tokens - 1 if tokens else None,
            loss=loss if has & _HAS_LOSS else None,
            grad_norm=grad_norm if has & _HAS_NORM else None,
        )

    def _event(self, begun: Sequence[int], ended: Sequence[int] | None) -> CollectiveEvent:
        index, when, size, seq, step, peer, group_number, phase, dtype, kind, _ = begun
        group = self._name(group_number)
        end, device, state, late = ended or (None, 0, 0, 0)
        return CollectiveEvent(
            rank=self.info.rank,
            index=index,
            kind=KINDS[kind],
            group=group["name"],
            group_ranks=tuple(group["ranks"]),
            backend=group["backend"],
            seq=seq,
            peer=None if peer == _NO_PEER else peer,
            bytes=size,
            dtype=self._name(dtype)["name"],
            step=step,
            phase=self._name(phase)["name"],
            state="ended" if state == _ENDED else "failed" if state == _FAILED else "begun",
            begin_ns=when,
            end_ns=end,
            device_ns=device - 1 if device else None,
            end_is_late=bool(late & _LATE),
        )

    def _name(self, number: int) -> Mapping[str, Any]:
        if not number:
            return _NAMELESS
        if number > len(self._names):
            self._read_names()
        return self._names[number - 1] if number <= len(self._names) else _NAMELESS

    def _read_names(self) -> None:
        used = int(self._counters[_NAMED])
        while self._named_bytes < used:
            start = _HEADER_BYTES + self._named_bytes
            length, seal = _NAME.unpack_from(self._map, start)
            text = self._map[start + _NAME.size : start + _NAME.size + length]
            if zlib.crc32(text) != seal:
                return
            self._names.append(json.loads(text))
            self._named_bytes += _NAME.size + length


def numbers_there(loss: float | None, grad_norm: float | None) -> int:
    """Return which of a mark's numbers are there, as it is written."""
    return (_HAS_LOSS if loss is not None else 0) | (_HAS_NORM if grad_norm is not None else 0)


def ring_path(directory: str | Path, rank: int, generation: int = 0) -> Path:
    """Return where a rank's ring is in its run's directory of rings."""
    return Path(directory) / f"rank{rank:05d}.generation{generation}.ring"


def generation_of(path: Path) -> int | None:
    """Return the generation of a ring by its name; None for a file that `ring_path` did not name."""
    named = _RING.fullmatch(path.name)
    return int(named[1]) if named is not None else None


def remove_rings(directory: Path, before: int | None = None) -> None:
    """Remove the rings from a run's directory of rings, which need not exist; or only those of generations `before`."""
    for path in (*directory.glob("rank*.generation*.ring"), *directory.glob("rank*.generation*.ring.new")):
        generation = generation_of(path.with_suffix("") if path.suffix == ".new" else path)
        if generation is not None and (before is None or generation < before):
            path.unlink(missing_ok=True)


def read(path: Path) -> RankRecord:
    """Return all that a ring holds now.

    Raises: FileNotFoundError before the rank made it; RingError for a file that is no ring or is cut short.
    """
    with RingReader(path) as reader:
        return reader.poll()


def _create(path: Path, info: RingInfo) -> mmap.mmap:
    """Map a new file, which appears under its name when it is complete."""
    header = json.dumps(asdict(info)).encode()
    size = _HEADER_BYTES + _NAMES_BYTES + info.capacity * _RECORD_BYTES
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    try:
        with unfinished.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            file.write(_MAGIC + _NAME.pack(len(header), zlib.crc32(header)) + header)
            file.flush()
            mapped = mmap.mmap(file.fileno(), size)
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # what little room there is was taken by it
        raise
    return mapped


def _info(path: Path, content: mmap.mmap) -> RingInfo:
    if content[: len(_MAGIC)] != _MAGIC:
        raise RingError(f"{path}: not a ring of this version")
    start = len(_MAGIC) + _NAME.size
    length, seal = _NAME.unpack_from(content, len(_MAGIC))
    text = content[start : start + length] if length < _COUNTERS else b""
    if not text or zlib.crc32(text) != seal:
        raise RingError(f"{path}: its header is damaged")
    info = RingInfo(**json.loads(text))
    needed = _HEADER_BYTES + _NAMES_BYTES + info.capacity * _RECORD_BYTES
    if len(content) < needed:
        raise RingError(f"{path}: {len(content)} bytes of {needed}: cut short")
    return info


def _boot_id() -> str:
    """The kernel's name for this boot; empty where the kernel has none."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
