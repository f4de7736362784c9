"""Committed checkpoints opened for reading: verified before anything is exposed."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from checkpoint import objects
from checkpoint.arena import free_memory_bytes
from checkpoint.commit import brief
from checkpoint.errors import CheckpointNotFound, CorruptCheckpoint, StateMismatch, StorageError
from checkpoint.filling import LEAST_BUFFER_BYTES, difference, fill, fill_fresh, raise_first, scatter
from checkpoint.format import CHUNK_BYTES, CODES, fingerprint
from checkpoint.manifest import MAX_RECORD_BYTES, SHARED, CommitRecord, FileRecord, SavedSlice, SliceTable
from checkpoint.names import COMMIT, MARK, TABLE
from checkpoint.region import Region, Shape
from checkpoint.reshard import Read, plan
from checkpoint.shard import rank_name
from checkpoint.state import Piece
from checkpoint.storage import MirroredSource, Source, Storage, sizes
from checkpoint.transfer import Bytes, Transfer, windows

REMEDY = "it was damaged or changed after the commit: load another checkpoint, or restore the file"
_MAX_MARK_BYTES = 1 << 20
_LOCAL_THREADS = 4
_REMOTE_THREADS = 16
"""Reads under way at once, of CHUNK_BYTES each: those of an object store take longer to begin."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Which names a load left alone."""

    missing: tuple[str, ...]
    """Asked for, not in the checkpoint; destinations untouched."""
    unexpected: tuple[str, ...]
    """In the checkpoint, not asked for."""
    missing_local: tuple[str, ...]
    """RankLocal entries that this rank has no saved counterpart for."""
    read_bytes: int = 0
    """Bytes of tensors that were read from the storage and verified."""
    reread_bytes: int = 0
    """Bytes of them that were read again when they were copied: what could not be held in memory."""
    needed_bytes: int = 0
    """Bytes of tensors that went into destinations."""


@dataclass(frozen=True, slots=True)
class Want:
    """A tensor, or a part of it, to be read."""

    name: str
    owner: int = SHARED
    region: Region | None = None
    """A box of it; all of it if None."""


class Reader:
    """One committed checkpoint. Opening it verifies the commit record; the rest is verified as it is read."""

    def __init__(
        self, storage: Storage, folder: str, *, record: CommitRecord | None = None, table: SliceTable | None = None
    ) -> None:
        """Open a checkpoint; what is given of it was verified or written by this process, and is not read."""
        self.folder = folder
        self._storage = storage
        if table is not None:
            self.__dict__["table"] = table
        self.record = record or self._read_record()
        self._files: Mapping[str, FileRecord] = {f.path: f for f in self.record.files}
        self._placed = False

    def again(self) -> Reader:
        """Return a reader that looks at the files anew, but not into the record, nor the slice table if it was read."""
        return Reader(self._storage, self.folder, record=self.record, table=self.__dict__.get("table"))

    def _read_record(self) -> CommitRecord:
        storage, folder = self._storage, self.folder
        source = f"{folder}/{COMMIT}"
        nbytes = storage.size(source)
        if nbytes is None:
            raise CheckpointNotFound(f"{storage.url}/{folder}: no {COMMIT}: nothing was committed here")
        if nbytes > MAX_RECORD_BYTES:
            raise CorruptCheckpoint(f"{source}: {nbytes} bytes; no commit record has more than {MAX_RECORD_BYTES}")
        return CommitRecord.from_bytes(storage.read(source), source)

    @property
    def url(self) -> str:
        return f"{self._storage.url}/{self.folder}"

    @functools.cached_property
    def table(self) -> SliceTable:
        """The slice table, proved by the commit record."""
        return SliceTable.from_bytes(self._head(TABLE), self._path(TABLE))

    @functools.cached_property
    def shared(self) -> Any:
        """What rank 0 handed to save as `shared`."""
        return objects.from_json(self.record.shared, self._path(COMMIT))

    def objects(self, rank: int) -> dict[str, Any]:
        """Return a rank's objects; none if the saving world had no such rank."""
        if rank >= self.record.world_size:
            return {}
        path = f"{rank_name(rank)}.objects.json"
        value = objects.decode(self._head(path), self._path(path))
        if not isinstance(value, dict):
            raise CorruptCheckpoint(f"{self._path(path)}: does not hold objects by name")
        return value

    def is_gone(self) -> bool:
        """Whether this checkpoint was removed since it was opened."""
        return self._storage.size(self._path(COMMIT)) is None

    def mark(self) -> str | None:
        """Say who found this checkpoint damaged, or distrusts it; None if nobody does."""
        path = self._path(MARK)
        nbytes = self._storage.size(path)
        if nbytes is None:
            return None
        if nbytes > _MAX_MARK_BYTES:
            return f"{self.folder}: {MARK} there is too large to be read; remove it to use the checkpoint"
        mark = objects.parse(self._storage.read(path), path)
        mark = mark if isinstance(mark, dict) else {}
        verdict = "distrusts it, though it is whole" if mark.get("whole") else "found it damaged"
        who, reason = mark.get("rank"), mark.get("reason")
        return f"{self.folder}: rank {who} {verdict}: {reason}; remove {MARK} there to use it again"

    def is_distrusted(self) -> bool:
        """Whether this checkpoint is marked as wrong, and with it every copy, not as a copy that was damaged."""
        path = self._path(MARK)
        nbytes = self._storage.size(path)
        if nbytes is None or nbytes > _MAX_MARK_BYTES:
            return False
        mark = objects.parse(self._storage.read(path), path)
        return isinstance(mark, dict) and bool(mark.get("whole"))

    def distrust(self, rank: int, reason: str) -> bool:
        """Mark this checkpoint as wrong though whole; return whether it is still there. Raises StorageError."""
        if not self.is_gone():
            self._storage.write(self._path(MARK), objects.canonical({"rank": rank, "reason": reason, "whole": True}))
        return not self.is_gone()

    def condemn(self, rank: int, error: CorruptCheckpoint) -> None:
        """Mark this checkpoint as damaged, so that no rank takes it for the latest again; not one that was removed.

        Where that fails, because another rank is at it or nothing can be written, `error` gets a note that says so.
        A mark that is there stays: it may say more.
        """
        text = objects.canonical({"rank": rank, "reason": str(error)})
        try:
            if self.is_gone():
                error.add_note("it was removed since it was opened (by retention?): load another checkpoint")
                return
            if self._storage.size(self._path(MARK)) is None:
                self._storage.write(self._path(MARK), text)
        except StorageError as second:
            error.add_note(f"it could not be marked as damaged: {second}")

    def check_files(self) -> None:
        """Raise CorruptCheckpoint unless every file has its size and the slice table its fingerprint."""
        for file in self.record.files:
            self._check_size(file)
        len(self.table)

    def problems(self, progress: Callable[[int], None] | None = None) -> Iterator[str]:
        """Read everything and yield what is wrong with it, one message a fault.

        `progress` is told the bytes of each read that was sound, one at a time, from any thread.
        """
        try:
            self.check_files()
            self._check_places()
            rows = self.table.all_rows()
        except CorruptCheckpoint as error:
            yield str(error)
            return
        for file in self.record.files:
            try:
                self._head(file.path)
            except CorruptCheckpoint as error:
                yield str(error)
        yield from (f"{self._path(TABLE)}: tensor {problem}" for problem in self.table.problems())
        held = Counter({file.path: file.head_bytes for file in self.record.files})
        for path, _, nbytes in {(row.file, row.byte_start, row.nbytes) for row in rows}:
            held[path] += nbytes
        for file in self.record.files:
            if "/" not in file.path and held[file.path] != file.nbytes:  # of another's file, a part may be needed
                yield f"{self._path(file.path)}: {file.nbytes} bytes, {held[file.path]} of them accounted for"
        reads = (read for row in rows for read in plan([row], row.region))
        lock = threading.Lock()

        def tell(read: Read, _: Bytes) -> None:
            if progress:
                with lock:
                    progress(read.nbytes)

        with self.transfer() as transfer:
            yield from map(str, transfer.stream(windows(reads, CHUNK_BYTES), tell))

    def load(
        self, wanted: Sequence[Piece], rank: int, *, strict: bool, buffer_bytes: int, fresh: bool = False
    ) -> LoadReport:
        """Fill the destinations in place, after every chunk they need has been verified.

        Up to `buffer_bytes` of chunks are held in memory in between, at least LEAST_BUFFER_BYTES, and of a local file
        no more than half of the free memory; what exceeds that is read twice.

        With `fresh`, memory is filled with each chunk as soon as that one is verified: once, in one reading.
        """
        report, reads = self._plan(wanted, rank, strict)
        room = self._room(buffer_bytes)
        once = fresh or sum(read.nbytes for read in reads) <= room

        def copy(read: Read, data: Bytes) -> None:
            piece = wanted[read.target]
            scatter(read, data, piece.tensor, piece.region)

        with self.transfer(once=once) as transfer:
            if fresh:
                read_bytes = fill_fresh(transfer, [(read, wanted[read.target]) for read in reads], copy)
            else:
                on_host = {i for i, p in enumerate(wanted) if p.tensor.device.type == "cpu"}
                read_bytes = fill(transfer, list(windows(reads, room)), copy, on_host)
        needed_bytes = sum(read.needed_bytes for read in reads)
        again = transfer.read_bytes - read_bytes
        return replace(report, read_bytes=read_bytes, needed_bytes=needed_bytes, reread_bytes=again)

    def read(self, wanted: Iterable[Want], transfer: Transfer | None = None) -> list[torch.Tensor]:
        """Return parts of tensors in new host memory; only the chunks that they need are read.

        By `transfer`, one of this reader's, if there is one already.
        """
        found: list[tuple[torch.Tensor, Region]] = []
        reads: list[Read] = []
        for want in wanted:
            dtype, shape = self.spec(want.name, want.owner)
            region = want.region if want.region is not None else Region.whole(shape)
            reads += plan(self._sound_rows(want.name, want.owner, region), region, len(found))
            found.append((torch.empty(region.shape, dtype=dtype), region))

        def consume(read: Read, data: Bytes) -> None:
            scatter(read, data, *found[read.target])

        with contextlib.nullcontext(transfer) if transfer else self.transfer() as used:
            raise_first(used.stream(windows(reads, CHUNK_BYTES), consume))
        return [tensor for tensor, _ in found]

    def assemble(self, name: str, owner: int = SHARED) -> torch.Tensor:
        """Return a whole tensor in new host memory."""
        return self.read([Want(name, owner)])[0]

    def spec(self, name: str, owner: int = SHARED) -> tuple[torch.dtype, Shape]:
        """Return the dtype and the shape of a tensor, which is whole; nothing of it is read."""
        problem = self.table.problem(name, owner)
        if problem:
            raise CorruptCheckpoint(f"{self._path(TABLE)}: tensor {name!r} {problem}")
        dtype, shape = self.table.spec(name, owner)
        return CODES[dtype], shape

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[Source]:
        """Open one of the files, its size checked."""
        self._check_size(self._files[file])
        with self._storage.open(self._path(file)) as source:
            yield source

    def fault(self, row: SavedSlice, start: int, stop: int, what: str) -> CorruptCheckpoint:
        """Return the error that says what is wrong with bytes [start, stop) of a slice's file."""
        where = f"{self._path(row.file)}: tensor {row.name!r}, bytes [{start}, {stop})"
        return CorruptCheckpoint(f"{where}: {what}; {REMEDY}")

    def transfer(self, *, once: bool = False) -> Transfer:
        """Return what reads this checkpoint's chunks; to be closed. `once`: nothing is read twice."""
        # Ranks of one host may all read the same file: then the kernel's cache saves the disk all but the first time.
        alone = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1
        num_threads = _LOCAL_THREADS if self._storage.rereads_cheaply else _REMOTE_THREADS
        return Transfer(self, num_threads, once=once and alone)

    def _room(self, buffer_bytes: int) -> int:
        """Return how many bytes may be held until they are verified."""
        if self._storage.rereads_cheaply:  # what does not fit into memory comes out of the kernel's cache
            buffer_bytes = min(buffer_bytes, free_memory_bytes() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return max(buffer_bytes, LEAST_BUFFER_BYTES)

    def _plan(self, wanted: Sequence[Piece], rank: int, strict: bool) -> tuple[LoadReport, list[Read]]:
        """Join what is wanted with what is saved. Raises StateMismatch with every difference."""
        saved = set(self.table.keys())
        names = {name for name, _ in saved}
        missing: list[str] = []
        missing_local: list[str] = []
        problems: list[str] = []
        reads: list[Read] = []
        for target, piece in enumerate(wanted):
            owner = rank if piece.kind == "local" else SHARED
            if (piece.name, owner) in saved:
                problem = difference(piece, *self.spec(piece.name, owner))
                if problem:
                    problems.append(f"{piece.name!r} {problem}")
                else:
                    reads += plan(self._sound_rows(piece.name, owner, piece.region), piece.region, target)
            elif piece.name in names and (piece.kind != "local" or (piece.name, SHARED) in saved):
                how = "shared by all ranks" if piece.kind == "local" else "rank-local"
                problems.append(f"{piece.name!r} was saved {how}, the destination is not")
            else:
                (missing_local if piece.kind == "local" else missing).append(piece.name)
        unexpected = {name for name, owner in saved if owner in (SHARED, rank)} - {p.name for p in wanted}
        if strict:
            extra = [f"{name!r} is not in the checkpoint" for name in set(missing)]
            # A rank's own tensors (the generator of a device that is not here) may stay behind, shared ones may not.
            left = [name for name in unexpected if (name, SHARED) in saved]
            extra += [f"{name!r} is in the checkpoint and has no destination" for name in left]
            if extra:
                problems += [*sorted(extra), "strict=False loads what both have"]
        if problems:
            raise StateMismatch(f"{self.url}: {brief(list(dict.fromkeys(problems)))}")
        report = LoadReport(tuple(sorted(set(missing))), tuple(sorted(unexpected)), tuple(sorted(set(missing_local))))
        return report, reads

    def _sound_rows(self, name: str, owner: int, region: Region) -> list[SavedSlice]:
        """Return the slices of a whole tensor that hold something of a region, all inside their files."""
        self._check_places()
        return self.table.rows(name, owner, region)

    def _check_places(self) -> None:
        """Raise CorruptCheckpoint unless every slice lies inside its file, and apart from the others."""
        if not self._placed:
            places = self.table.places()
            heads = [self._files[f].head_bytes if f in self._files else 0 for f in places.files]
            ends = [self._files[f].nbytes if f in self._files else -1 for f in places.files]
            outside = places.outside(heads, ends)
            if outside is not None:
                row = self.table.row(outside)
                where = f"tensor {row.name!r} lies outside of file {row.file!r}"
                raise CorruptCheckpoint(f"{self._path(TABLE)}: {where}")
            shared = places.shared()
            if shared is not None:
                rows = [self.table.row(i) for i in shared]
                where = f"{rows[0].name!r} and {rows[1].name!r} claim the same bytes of file {rows[0].file!r}"
                raise CorruptCheckpoint(f"{self._path(TABLE)}: tensors {where}")
            self._placed = True

    def _head(self, path: str) -> bytes:
        """Return the part of a file that the commit record proves."""
        file = self._files.get(path)
        if file is None:
            raise CorruptCheckpoint(f"{self._path(COMMIT)}: does not list {path}")
        self._check_size(file)
        buffer = bytearray(file.head_bytes)
        with self._storage.open(self._path(path)) as source:
            for copy in (source, *(source.copies() if isinstance(source, MirroredSource) else ())):
                copy.read_into(0, memoryview(buffer))
                if fingerprint(buffer) == file.fingerprint:
                    return bytes(buffer)
        where = f"{self._path(path)}: bytes [0, {file.head_bytes})"
        raise CorruptCheckpoint(f"{where}: the fingerprint does not match; {REMEDY}")

    @functools.cached_property
    def _sizes(self) -> Mapping[str, int]:
        """Bytes of the files that are there, by their path in the record; one listing a folder."""
        found = sizes(self._storage, self.folder)
        for folder in {path.rpartition("/")[0] for path in self._files} - {""}:
            found |= {f"{folder}/{name}": nbytes for name, nbytes in sizes(self._storage, folder).items()}
        return found

    def _check_size(self, file: FileRecord) -> None:
        size = self._sizes.get(file.path)
        if size != file.nbytes:
            what = "is missing" if size is None else f"has {size} bytes instead of {file.nbytes}"
            raise CorruptCheckpoint(f"{self._path(file.path)} {what}{self._tensors_of(file.path)}; {REMEDY}")

    def _tensors_of(self, path: str) -> str:
        """Return which tensors a shard holds, as far as the slice table can be read."""
        if path == TABLE:
            return ""
        try:
            names = self.table.names_in(path)
        except CorruptCheckpoint:
            return ""
        shown = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"; it holds {shown}" if names else ""

    def _path(self, path: str) -> str:
        """Return a file's path from the root; a name with a folder is that already."""
        return path if "/" in path else f"{self.folder}/{path}"
