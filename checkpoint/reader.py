"""Committed checkpoints opened for reading: verified before anything is exposed."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from checkpoint import objects
from checkpoint.commit import COMMIT, TABLE, brief
from checkpoint.errors import CheckpointNotFound, CorruptCheckpoint, StateMismatch
from checkpoint.format import CODES, DTYPES, digest, fingerprint
from checkpoint.manifest import SHARED, CommitRecord, FileRecord, SavedSlice, SliceTable
from checkpoint.region import Region
from checkpoint.reshard import Read, plan, view
from checkpoint.shard import rank_name
from checkpoint.state import Piece
from checkpoint.storage import MirroredSource, Source, Storage, sizes

REMEDY = "it was damaged or changed after the commit: load another checkpoint, or restore the file"
MARK = "BAD.json"
"""Written beside a commit record by a rank that found the checkpoint damaged."""
_RUN_BYTES = 16 << 20
"""Neighbouring chunks are read together up to this size."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Which names a load left alone."""

    missing: tuple[str, ...]
    """Asked for, not in the checkpoint; destinations untouched."""
    unexpected: tuple[str, ...]
    """In the checkpoint, not asked for."""
    missing_local: tuple[str, ...]
    """RankLocal entries that this rank has no saved counterpart for."""


class Reader:
    """One committed checkpoint. Opening it verifies the commit record; the rest is verified as it is read."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.folder = folder
        self._storage = storage
        source = f"{folder}/{COMMIT}"
        if storage.size(source) is None:
            raise CheckpointNotFound(f"{storage.url}/{folder}: no {COMMIT}: nothing was committed here")
        self.record = CommitRecord.from_bytes(storage.read(source), source)
        self._files: Mapping[str, FileRecord] = {f.path: f for f in self.record.files}

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

    def mark(self) -> str | None:
        """Say who found this checkpoint damaged; None if nobody did."""
        path = self._path(MARK)
        if self._storage.size(path) is None:
            return None
        mark = objects.parse(self._storage.read(path), path)
        who, reason = (mark.get("rank"), mark.get("reason")) if isinstance(mark, dict) else (None, None)
        return f"{self.folder}: rank {who} found it damaged: {reason}; remove {MARK} there to use it again"

    def condemn(self, rank: int, error: CorruptCheckpoint) -> None:
        """Mark this checkpoint as damaged, so that no rank takes it for the latest again."""
        text = objects.canonical({"rank": rank, "reason": str(error)})
        self._storage.write(self._path(MARK), text)

    def check_files(self) -> None:
        """Raise CorruptCheckpoint unless every file has its size and the slice table its fingerprint."""
        for file in self.record.files:
            self._check_size(file)
        len(self.table)

    def problems(self) -> Iterator[str]:
        """Read everything and yield what is wrong with it, one message a fault."""
        try:
            self.check_files()
            rows = self.table.all_rows()
            for row in rows:
                self._check_place(row)
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
        for row in rows:
            held[row.file] += row.nbytes
        for file in self.record.files:
            if "/" not in file.path and held[file.path] != file.nbytes:  # of another's file, a part may be needed
                yield f"{self._path(file.path)}: {file.nbytes} bytes, {held[file.path]} of them accounted for"
        reads = [read for row in rows for read in plan([row], row.region)]
        yield from (str(fault) for _, _, fault in self._chunks(reads) if fault)

    def load(self, wanted: Sequence[Piece], rank: int, *, strict: bool, buffer_bytes: int) -> LoadReport:
        """Fill the destinations in place, after every chunk they need has been verified.

        Between the two, up to `buffer_bytes` of chunks are held in memory; what exceeds it is read, and verified,
        a second time. From a local disk all is: the kernel has just cached it, and touching fresh memory costs
        more than a second copy out of the cache.
        """
        report, reads = self._plan(wanted, rank, strict)
        held: list[tuple[Read, np.ndarray[Any, Any]]] = []
        again: list[Read] = []
        space = 0 if self._storage.rereads_cheaply else buffer_bytes
        for read, data in self._verified(reads):
            if read.nbytes <= space:
                space -= read.nbytes
                held.append((read, data.copy()))
            else:
                again.append(read)
        for read, data in itertools.chain(held, self._verified(again)):
            piece = wanted[read.target]
            _scatter(read, data, piece.tensor, piece.region)
        return report

    def assemble(self, name: str, owner: int = SHARED) -> torch.Tensor:
        """Return a whole tensor in new memory."""
        rows = self._sound_rows(name, owner)
        whole = Region.whole(rows[0].global_shape)
        tensor = torch.empty(whole.shape, dtype=CODES[rows[0].dtype])
        for read, data in self._verified(list(plan(rows, whole))):
            _scatter(read, data, tensor, whole)
        return tensor

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
                rows = self._sound_rows(piece.name, owner)
                problem = _difference(piece, rows[0])
                if problem:
                    problems.append(f"{piece.name!r} {problem}")
                else:
                    reads += plan(rows, piece.region, target)
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

    def _sound_rows(self, name: str, owner: int) -> list[SavedSlice]:
        """Return the slices of a tensor, which make it whole and lie inside their files."""
        rows = self.table.rows(name, owner)
        for row in rows:
            self._check_place(row)
        problem = self.table.problem(name, owner)
        if problem:
            raise CorruptCheckpoint(f"{self._path(TABLE)}: tensor {name!r} {problem}")
        return rows

    def _check_place(self, row: SavedSlice) -> None:
        file = self._files.get(row.file)
        if file is None or row.byte_start < file.head_bytes or row.byte_start + row.nbytes > file.nbytes:
            raise CorruptCheckpoint(f"{self._path(TABLE)}: tensor {row.name!r} lies outside of file {row.file!r}")

    def _verified(self, reads: Sequence[Read]) -> Iterator[tuple[Read, np.ndarray[Any, Any]]]:
        for read, data, fault in self._chunks(reads):
            if fault:
                raise fault
            yield read, data

    def _chunks(self, reads: Sequence[Read]) -> Iterator[tuple[Read, np.ndarray[Any, Any], CorruptCheckpoint | None]]:
        """Yield every chunk with its bytes, in file order, and what is wrong with it.

        The bytes are there until the next chunk is asked for.
        """
        buffer = np.empty(_RUN_BYTES, dtype=np.uint8)
        ordered = sorted(reads, key=lambda r: (r.file, r.byte_start))
        for file, group in itertools.groupby(ordered, key=lambda r: r.file):
            self._check_size(self._files[file])
            with self._storage.open(self._path(file)) as source:
                for run in _runs(group):
                    start = run[0].byte_start
                    total = run[-1].byte_start + run[-1].nbytes - start
                    count = source.read_into(start, buffer[:total].data)
                    for read in run:
                        first = read.byte_start - start
                        data = buffer[first : first + read.nbytes]
                        fault = self._fault(read, data, first + read.nbytes <= count)
                        yield read, data, None if fault and self._mends(source, read, data) else fault

    def _fault(self, read: Read, data: np.ndarray[Any, Any], complete: bool) -> CorruptCheckpoint | None:
        if complete and digest(data) == read.digest:
            return None
        what = "the digest does not match" if complete else "the file ends too early"
        return CorruptCheckpoint(
            f"{self._path(read.file)}: tensor {read.row.name!r}, bytes "
            f"[{read.byte_start}, {read.byte_start + read.nbytes}): {what}; {REMEDY}"
        )

    def _mends(self, source: Source, read: Read, data: np.ndarray[Any, Any]) -> bool:
        """Whether another copy of the file has a chunk sound; it is in `data` then."""
        for copy in source.copies() if isinstance(source, MirroredSource) else ():
            if copy.read_into(read.byte_start, data.data) == read.nbytes and digest(data) == read.digest:
                _log.warning("%s: a copy is damaged, another one is read", self._path(read.file))
                return True
        return False

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
            names = sorted({row.name for row in self.table.all_rows() if row.file == path})
        except CorruptCheckpoint:
            return ""
        shown = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"; it holds {shown}" if names else ""

    def _path(self, path: str) -> str:
        """Return a file's path from the root; a name with a folder is that already."""
        return path if "/" in path else f"{self.folder}/{path}"


def _difference(piece: Piece, row: SavedSlice) -> str | None:
    if DTYPES[piece.tensor.dtype] != row.dtype:
        saved = str(CODES[row.dtype]).removeprefix("torch.")
        return f"was saved as {saved}, the destination is {str(piece.tensor.dtype).removeprefix('torch.')}"
    if piece.global_shape != row.global_shape:
        return f"was saved with shape {list(row.global_shape)}, the destination has {list(piece.global_shape)}"
    return None


def _runs(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Group reads of one file, in order, that follow each other without a gap."""
    run: list[Read] = []
    for read in reads:
        if run:
            end = run[-1].byte_start + run[-1].nbytes
            if read.byte_start != end or end + read.nbytes - run[0].byte_start > _RUN_BYTES:
                yield run
                run = []
        run.append(read)
    if run:
        yield run


@torch.no_grad()
def _scatter(read: Read, data: np.ndarray[Any, Any], tensor: torch.Tensor, region: Region) -> None:
    """Copy what `region` wants of a chunk into the tensor that holds it."""
    source = torch.from_numpy(data).view(CODES[read.row.dtype])
    for offset, shape in read.boxes:
        view(tensor, region, offset, shape).copy_(view(source, read.region, offset, shape))
