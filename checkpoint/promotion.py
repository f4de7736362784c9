"""Copies of committed checkpoints in the remote tier, made in the background.

    step-00000100.a0.5a3f…/PROMOTION.json    in the local tier: this checkpoint waits, or is being copied

Rank 0 decides what is copied, and writes it there, first before the commit: retention leaves such a checkpoint
alone, the other ranks copy their files when it says so, and a later launch goes on where this one ended. At most one
checkpoint is on its way; of those that wait the newest counts. Every byte is verified on its way; the commit record,
the very bytes of the local one, goes last. What fails is tried again, ever less often; training never waits for any
of it. What is marked as damaged or wrong is not committed there; one found wrong while it is, is marked there too.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from checkpoint import catalog, objects, retention
from checkpoint.catalog import PROMOTION, CheckpointInfo
from checkpoint.commit import brief, is_going
from checkpoint.config import RemoteConfig
from checkpoint.errors import CheckpointError, CorruptCheckpoint, SaveFailed, StorageError
from checkpoint.format import digest, fingerprint
from checkpoint.manifest import FileRecord
from checkpoint.names import COMMIT, MARK, REMOVAL, TABLE, AttemptName
from checkpoint.reader import REMEDY, Reader
from checkpoint.storage import Storage, sizes

_FAILURE = "PROMOTION-FAILED.json"
_WAITS, _COPIED, _LEFT = "waits", "is copied", "is left to the next launch"
"""States of a marked checkpoint."""
_RUN_BYTES = 8 << 20
"""Bytes that are read, verified and handed over together."""
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
"""Pauses between two tries double from the first to the longest."""
_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 1.0
"""Pauses between two looks at what the other ranks have done double likewise."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Promoter:
    """One rank's side of the copies. Methods may be called from any thread, and never wait for the remote tier."""

    def __init__(
        self,
        local: Storage,
        remote: Storage,
        config: RemoteConfig,
        *,
        rank: int,
        world_size: int,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = 600.0,
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        """Take up what an earlier launch left.

        After `close`, ranks wait no longer than `timeout_s` for each other. `pause(event, s)` returns when the event is
        set or the time is over.
        """
        self._local = local
        self._remote = remote
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._clock = clock
        self._timeout_s = timeout_s
        self._pause = pause
        self._closing = threading.Event()
        self._never = threading.Event()
        self._changed = threading.Condition()
        self._waiting: dict[str, Future[CheckpointInfo]] = {}  # by folder, oldest first
        self._bad: set[str] = set()
        """Checkpoints found marked: they are taken up to be refused, and push nothing out."""
        self._current = ""
        self._thread: threading.Thread | None = None
        for folder in marked(local):
            if local.size(f"{folder}/{COMMIT}") is not None:
                if local.size(f"{folder}/{MARK}") is not None:
                    self._bad.add(folder)
                self.submit(folder)
            elif rank == 0:  # its save failed; it must not push out an older one that waits
                local.remove(f"{folder}/{PROMOTION}")

    def announce(self, folder: str) -> None:
        """Mark a checkpoint as one that is to be copied; every rank calls it, rank 0 before it commits there."""
        if self._rank == 0:
            self._mark(folder, _WAITS)

    def submit(self, folder: str) -> Future[CheckpointInfo]:
        """Have a committed local checkpoint copied that was announced; every rank calls it, in the same order.

        The future gives the copy; SaveFailed if a newer checkpoint came first or rank 0 gave up, StorageError if
        this rank did, CorruptCheckpoint if the local one is damaged or distrusted.
        """
        outcome: Future[CheckpointInfo] = Future()
        with self._changed:
            if self._closing.is_set():
                raise ValueError("submit: this Promoter is closed")
            pushes = self._rank == 0 and folder not in self._bad
            superseded = {name: f for name, f in self._waiting.items() if name not in self._bad} if pushes else {}
            self._waiting = {name: f for name, f in self._waiting.items() if name not in superseded}
            self._waiting[folder] = outcome
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-promotion", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        for older, failed in superseded.items():
            reason = SaveFailed(f"{older}: {folder}, which is newer, is copied in its place")
            self._give_up(older, reason)
            failed.set_exception(reason)
        return outcome

    def close(self, timeout_s: float | None = None) -> bool:
        """Let what is waiting or under way end, without trying again what fails; return whether it did. Idempotent.

        What did not end in time goes on while the process lives; a later launch completes it.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _run(self) -> None:
        """Be the thread; whatever happens ends in a future."""
        while (taken := self._next()) is not None:
            folder, outcome = taken
            try:
                info = self._lead(folder) if self._rank == 0 else self._follow(folder)
            except BaseException as error:  # noqa: BLE001  carried to the future
                self._give_up(folder, error)
                _log.warning("%s was not copied to %s: %s", folder, self._remote.url, error)
                outcome.set_exception(error)
            else:
                outcome.set_result(info)

    def _next(self) -> tuple[str, Future[CheckpointInfo]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            if not self._waiting:
                return None
            self._current = next(iter(self._waiting))
            return self._current, self._waiting.pop(self._current)

    def _lead(self, folder: str) -> CheckpointInfo:
        """Rank 0: announce, copy, wait for the others, commit."""
        self._local.remove(f"{folder}/{_FAILURE}")
        self._mark(folder, _COPIED)
        reader = self._again(lambda: Reader(self._local, folder))
        if self._again(lambda: self._remote.size(f"{folder}/{COMMIT}")) is None:
            self._copy_own(reader)
            self._await_others(reader)
            self._again(lambda: self._commit(reader))
        self._again(lambda: self._pass_on_distrust(reader))
        self._collect()
        self._local.remove(f"{folder}/{PROMOTION}")
        return self._again(lambda: catalog.info_of(Reader(self._remote, folder), "remote"))

    def _follow(self, folder: str) -> CheckpointInfo:
        """Other ranks: copy when rank 0 says so, and learn from the mark how it ended."""
        copied = False
        since_s, poll_s = self._clock(), _FIRST_POLL_S
        while (state := self._again(lambda: _state(self._local, folder))) is not None:
            if state == _COPIED and not copied:
                self._copy_own(self._again(lambda: Reader(self._local, folder)))
                copied, since_s = True, self._clock()
                continue
            # Unless this launch ends, such a mark is from the launch before, and rank 0 has yet to take it up.
            if self._closing.is_set() and (state == _LEFT or self._clock() - since_s > self._timeout_s):
                raise SaveFailed(f"{folder}: rank 0 has left the copy to the next launch")
            self._pause(self._never, poll_s)
            poll_s = min(2 * poll_s, _LONGEST_POLL_S)
        if self._again(lambda: self._remote.size(f"{folder}/{COMMIT}")) is None:
            raise SaveFailed(f"{folder}: rank 0 did not commit the copy in {self._remote.url}")
        return self._again(lambda: catalog.info_of(Reader(self._remote, folder), "remote"))

    def _give_up(self, folder: str, error: BaseException) -> None:
        """Let the other ranks know; a copy that only ran out of time at the end is left to the next launch."""
        is_left = self._closing.is_set() and isinstance(error, StorageError | SaveFailed)
        try:
            if self._rank:
                text = objects.canonical({"rank": self._rank, "reason": f"{type(error).__name__}: {error}"})
                if _state(self._local, folder) is not None:
                    self._local.write(f"{folder}/{_FAILURE}", text)
            elif is_left:
                self._mark(folder, _LEFT)
            else:
                self._local.remove(f"{folder}/{PROMOTION}")
        except CheckpointError as second:
            error.add_note(f"the other ranks could not be told: {second}")

    def _mark(self, folder: str, state: str) -> None:
        self._local.write(f"{folder}/{PROMOTION}", objects.canonical({"state": state}))

    def _copy_own(self, reader: Reader) -> None:
        """Copy this rank's share of the files: its own, or of another world size those that fall to it."""
        own = [f for i, f in enumerate(_shared_out(reader)) if _writer(f.path, i) % self._world_size == self._rank]
        for file in own:
            self._again(lambda: _refuse_marked(reader))
            try:
                self._again(functools.partial(copy_file, reader, file, self._local, self._remote))
            except CorruptCheckpoint as error:
                reader.condemn(self._rank, error)
                raise

    def _await_others(self, reader: Reader) -> None:
        """Return when every file is in the remote tier, whole."""
        wanted = {_place(reader.folder, file.path): file.nbytes for file in _shared_out(reader)}
        missing: set[str] = set()
        since_s, poll_s = self._clock(), _FIRST_POLL_S
        while left := self._again(lambda: _missing(self._remote, wanted)):
            if left != missing:
                missing, since_s = left, self._clock()
            self._again(lambda: _refuse_marked(reader))
            failure = self._failure(reader)
            patience_s = self._timeout_s if self._closing.is_set() else self._config.retry_s
            if failure is None and self._clock() - since_s > patience_s:
                failure = f"not copied within {patience_s:g} s: {brief(sorted(missing), 8)}"
            if failure is not None:
                raise SaveFailed(f"{reader.folder}: {failure}")
            self._pause(self._never, poll_s)
            poll_s = min(2 * poll_s, _LONGEST_POLL_S)

    def _failure(self, reader: Reader) -> str | None:
        """Return what keeps another rank from copying its files."""
        path = f"{reader.folder}/{_FAILURE}"
        if self._local.size(path) is None:
            return None
        failure = objects.parse(self._local.read(path), path)
        return f"rank {failure['rank']} gave up: {failure['reason']}"

    def _commit(self, reader: Reader) -> None:
        table, record = (self._local.read(f"{reader.folder}/{name}") for name in (TABLE, COMMIT))
        proof = next(f.fingerprint for f in reader.record.files if f.path == TABLE)
        if fingerprint(table) != proof:
            raise CorruptCheckpoint(f"{reader.folder}/{TABLE}: the fingerprint does not match; {REMEDY}")
        self._remote.write(f"{reader.folder}/{TABLE}", table)  # says what is referred to, to who removes (`retention`)
        going = _going(self._remote, {_place(reader.folder, file.path) for file in reader.record.files})
        if going:
            raise SaveFailed(
                f"{reader.folder}: not copied, {', '.join(going)} in {self._remote.url} is going; if no gc runs "
                "there any more, run it again"
            )
        _refuse_marked(reader)
        self._remote.write_new(f"{reader.folder}/{COMMIT}", record)

    def _pass_on_distrust(self, reader: Reader) -> None:
        """Mark a committed copy as wrong where the local one is. Raises CorruptCheckpoint then.

        Who distrusts marks the local one first and then looks for copies; here is committed first and then looked.
        Retention leaves the local one, and with it the mark, until this has looked.
        """
        if reader.is_distrusted():
            path = f"{reader.folder}/{MARK}"
            self._remote.write(path, self._local.read(path))
            _refuse_marked(reader)

    def _collect(self) -> None:
        """Remove what the newest copy supersedes, and copies that were given up."""
        config = self._config
        try:
            removals = retention.removable(
                self._remote, keep_last=config.keep_last, keep_every=config.keep_every, abandoned=self._is_abandoned
            )
            for removal in removals:
                retention.remove(self._remote, removal)
        except CheckpointError as error:
            _log.warning("superseded copies stay in %s, the next one tries again: %s", self._remote.url, error)

    def _is_abandoned(self, name: AttemptName) -> bool:
        with self._changed:
            return name.folder != self._current and name.folder not in self._waiting

    def _again(self, act: Callable[[], _T]) -> _T:
        """Return what `act` does, as soon as the storage lets it; raise when it did not for too long."""
        end_s = self._clock() + self._config.retry_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return act()
            except StorageError as error:
                left_s = end_s - self._clock()
                if left_s <= 0 or self._closing.is_set():
                    raise
                _log.warning("a copy failed, the next try is in %g s: %s", min(pause_s, left_s), error)
                self._pause(self._closing, min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _refuse_marked(reader: Reader) -> None:
    mark = reader.mark()
    if mark:
        raise CorruptCheckpoint(mark)


def marked(local: Storage) -> list[str]:
    """Return the folders of the checkpoints that wait or are being copied, by step: retention leaves them alone."""
    names = (AttemptName.parse(entry.name) for entry in local.entries("") if entry.is_folder)
    ordered = sorted((n for n in names if n), key=lambda n: (n.step, n.launch, n.ordinal))
    return [n.folder for n in ordered if local.size(f"{n.folder}/{PROMOTION}") is not None]


def copy_file(reader: Reader, file: FileRecord, source: Storage, target: Storage) -> None:
    """Copy one file of a checkpoint, every byte that it proves verified on its way; not if it is there already.

    Raises:
        CorruptCheckpoint: the bytes are not what was committed; the copy does not appear. StorageError.
    """
    path = _place(reader.folder, file.path)
    if target.size(path) == file.nbytes:
        return
    buffer = memoryview(bytearray(_RUN_BYTES))
    with source.open(path) as content, target.create_at(path, file.nbytes) as sink:
        for start, run in _runs(_cells(reader, file)):
            nbytes = sum(cell[0] for cell in run)
            if nbytes > buffer.nbytes:
                buffer = memoryview(bytearray(nbytes))
            count = content.read_into(start, buffer[:nbytes])
            position = 0
            for cell_bytes, sound in run:
                end = position + cell_bytes
                if end > count or not sound(buffer[position:end]):
                    raise CorruptCheckpoint(
                        f"{path}: bytes [{start + position}, {start + end}) are not what was committed; {REMEDY}"
                    )
                position = end
            sink.write_at(start, buffer[:nbytes])


_Cell = tuple[int, Callable[[memoryview], bool]]
"""Consecutive bytes of a file, and what tells whether they are sound."""


def _cells(reader: Reader, file: FileRecord) -> Iterator[_Cell]:
    """Yield a file's bytes in order: its head, then the chunks of its slices; what nothing proves is in no slice."""
    position = file.head_bytes
    yield position, lambda data: fingerprint(data) == file.fingerprint
    if position == file.nbytes:
        return
    places = reader.table.places()
    names = np.array([name == file.path for name in places.files], dtype=np.bool_)
    rows = np.flatnonzero(names[places.file])
    for row in (reader.table.row(int(i)) for i in rows[np.argsort(places.start[rows])]):
        for i, expected in enumerate(row.digests):
            start = row.byte_start + i * row.chunk_bytes
            nbytes = min(row.chunk_bytes, row.byte_start + row.nbytes - start)
            if start < position:
                continue  # of tensors that share their bytes, the first proves them
            yield from _unproved(start - position)
            yield nbytes, functools.partial(_has_digest, expected)
            position = start + nbytes
    yield from _unproved(file.nbytes - position)


def _unproved(nbytes: int) -> Iterator[_Cell]:
    for start in range(0, nbytes, _RUN_BYTES):
        yield min(_RUN_BYTES, nbytes - start), lambda data: True


def _has_digest(expected: int, data: memoryview) -> bool:
    return digest(data) == expected


def _runs(cells: Iterator[_Cell]) -> Iterator[tuple[int, list[_Cell]]]:
    """Group cells into runs of about `_RUN_BYTES`, each with the offset where it starts."""
    start = end = 0
    run: list[_Cell] = []
    for cell in cells:
        if run and end + cell[0] - start > _RUN_BYTES:
            yield start, run
            start, run = end, []
        run.append(cell)
        end += cell[0]
    yield start, run


def _shared_out(reader: Reader) -> list[FileRecord]:
    """Return the files that the ranks share out among themselves; rank 0 commits the rest."""
    return [file for file in reader.record.files if file.path != TABLE]


def _writer(path: str, index: int) -> int:
    """Return the rank of the saving world that wrote a file."""
    stem = path.rpartition("/")[2].partition(".")[0]
    return int(stem[1:]) if stem[1:].isdecimal() else index


def _place(folder: str, path: str) -> str:
    """Return a file's path from the root; one with a folder is that already."""
    return path if "/" in path else f"{folder}/{path}"


def _missing(storage: Storage, wanted: Mapping[str, int]) -> set[str]:
    """Return the files that are not there in their size; one listing a folder."""
    found: dict[str, int] = {}
    for folder in {path.rpartition("/")[0] for path in wanted}:
        found |= {f"{folder}/{name}": nbytes for name, nbytes in sizes(storage, folder).items()}
    return {path for path, nbytes in wanted.items() if found.get(path) != nbytes}


def _going(storage: Storage, paths: Iterable[str]) -> list[str]:
    """Return the folders of files that are being removed, and the files that are gone already, sorted."""
    gone = []
    for folder in {path.rpartition("/")[0] for path in paths}:
        is_marked = is_going(storage, folder)
        there = sizes(storage, folder)
        gone += [folder] if is_marked or REMOVAL in there else []
        gone += [p for p in paths if p.rpartition("/")[0] == folder and p.rpartition("/")[2] not in there]
    return sorted(gone)


def _state(local: Storage, folder: str) -> str | None:
    """Return what rank 0 has marked a checkpoint with; None when it is done with it."""
    path = f"{folder}/{PROMOTION}"
    try:
        mark = objects.parse(local.read(path), path)
    except StorageError:
        if local.size(path) is None:
            return None
        raise
    return str(mark.get("state")) if isinstance(mark, dict) else ""
