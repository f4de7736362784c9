"""What need not be written again: chunks that lie in a file of a checkpoint before, as they are now.

Before a save is laid out, the chunks of its tensors are digested where they are and compared with what the newest
checkpoint says of the same chunks. Those that are equal become rows that refer to the file that holds them, always
the file itself: a chunk that was not written for a hundred saves is one step away, not a hundred. Digests decide,
nobody's word: a tensor that was changed costs one digest, or as many as it takes to the first difference; one that
was not costs its digests, and no copy and no write.

Retention (see `catalog`) keeps the files that a kept checkpoint refers to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from checkpoint.format import CHUNK_BYTES, DIGEST_BYTES, DTYPES, chunk_count
from checkpoint.manifest import SHARED, FileRecord, SavedSlice
from checkpoint.region import Region
from checkpoint.shard import Part
from checkpoint.state import Piece

MAX_FILES = 4
"""Files that one rank's part of a checkpoint refers to at most: the chunks of others are written again.

Without a limit a few chunks in each of many files would keep all of them on the disk."""

HasDigests = Callable[[int, int, Sequence[int]], bool]
"""Whether a piece, given by its index, has these digests from a byte on; `DIGEST_BYTES` each but the piece's last."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """What is left to write of some pieces, and what stands for the rest."""

    parts: tuple[Part, ...]
    """To be written."""
    rows: tuple[SavedSlice, ...]
    """Chunks that are there already."""
    files: tuple[FileRecord, ...]
    """The files that the rows refer to, as they are called from the new checkpoint."""

    @property
    def referred_bytes(self) -> int:
        """Bytes that are not written again; those with several names count once."""
        return sum({(row.file, row.byte_start): row.nbytes for row in self.rows}.values())


class Parent:
    """A committed checkpoint's slices, by tensor, under the names that other checkpoints have for their files."""

    def __init__(self, folder: str, rows: Iterable[SavedSlice], files: Iterable[FileRecord]) -> None:
        self.folder = folder
        """Of the checkpoint, in its root."""
        self._rows: dict[object, list[SavedSlice]] = {}
        for row in rows:
            if row.chunk_bytes == DIGEST_BYTES and row.nbytes:
                place = (row.name, row.owner, row.dtype, row.global_shape, row.region.offset, row.region.shape)
                self._rows.setdefault(place, []).append(replace(row, file=self._from_root(row.file)))
        self._files = {self._from_root(file.path): file for file in files}

    @property
    def folders(self) -> set[str]:
        """The folders that its files lie in."""
        return {path.rpartition("/")[0] for path in self._files}

    def without(self, folders: Collection[str]) -> Parent:
        """Return what of it lies in no such folder."""
        if not folders:
            return self
        rows = [row for rows in self._rows.values() for row in rows if row.file.rpartition("/")[0] not in folders]
        return Parent(self.folder, rows, self._files.values())

    def file(self, path: str) -> FileRecord:
        """Return a file's record as another checkpoint has it."""
        return replace(self._files[path], path=path)

    def holder(self, piece: Piece, owner: int, region: Region) -> tuple[SavedSlice, int] | None:
        """Return the row that has all of a region, and the first of its digests there; None if no row has it so."""
        place = (piece.name, owner, DTYPES[piece.tensor.dtype], piece.global_shape, region.offset, region.shape)
        for row in self._rows.get(place, ()):
            if row.region.start <= region.start and region.stop <= row.region.stop:
                start, odd = divmod((region.start - row.region.start) * row.itemsize, DIGEST_BYTES)
                ends_with_it = region.stop == row.region.stop or region.numel * row.itemsize % DIGEST_BYTES == 0
                if not odd and ends_with_it:
                    return row, start
        return None

    def _from_root(self, path: str) -> str:
        return path if "/" in path else f"{self.folder}/{path}"


@dataclass(frozen=True, slots=True)
class _Known:
    """A run of a piece's bytes, at most CHUNK_BYTES, that the parent has."""

    source: int
    chunk: int
    region: Region
    row: SavedSlice
    first_digest: int


def narrow(pieces: Sequence[Piece], parent: Parent, has_digests: HasDigests, rank: int) -> Narrowed:
    """Return what a rank has to write of its pieces, and the rows that refer to a parent for the rest. Pure."""
    same: list[_Known] = []
    for source, piece in enumerate(pieces):
        for known in _known(source, piece, parent, rank):
            expected = _digests(known)
            if has_digests(source, known.chunk * CHUNK_BYTES, expected):
                same.append(known)
    same = _in_few_files(same)
    unwritten = {(known.source, known.chunk) for known in same}
    parts = [part for i, piece in enumerate(pieces) for part in _parts(i, piece, unwritten)]
    rows = [row for known in _joined(same) for row in _rows(known, pieces[known.source], rank)]
    files = [parent.file(path) for path in sorted({row.file for row in rows})]
    return Narrowed(tuple(parts), tuple(rows), tuple(files))


def _known(source: int, piece: Piece, parent: Parent, rank: int) -> Iterable[_Known]:
    owner = rank if piece.kind == "local" else SHARED
    per_chunk = CHUNK_BYTES // piece.tensor.element_size()
    for chunk in range(chunk_count(piece.nbytes, CHUNK_BYTES)):
        start = chunk * per_chunk
        region = piece.region.part(start, min(start + per_chunk, piece.region.numel))
        found = parent.holder(piece, owner, region)
        if found:
            yield _Known(source, chunk, region, *found)


def _digests(known: _Known) -> Sequence[int]:
    count = chunk_count(known.region.numel * known.row.itemsize)
    return known.row.digests[known.first_digest : known.first_digest + count]


def _in_few_files(same: Sequence[_Known]) -> list[_Known]:
    """Return the chunks that lie in the files that have most of them."""
    nbytes: Counter[str] = Counter()
    for known in same:
        nbytes[known.row.file] += known.region.numel * known.row.itemsize
    chosen = sorted(nbytes, key=lambda path: (-nbytes[path], path))[:MAX_FILES]
    return [known for known in same if known.row.file in chosen]


def _parts(source: int, piece: Piece, unwritten: set[tuple[int, int]]) -> Iterable[Part]:
    """Yield the runs of a piece's chunks that are to be written."""
    count = chunk_count(piece.nbytes, CHUNK_BYTES)
    if not count:
        yield Part(source, 0, 0)
    first = 0
    for chunk in range(count + 1):
        if chunk == count or (source, chunk) in unwritten:
            if chunk > first:
                yield Part(source, first, chunk - first)
            first = chunk + 1


def _joined(same: Sequence[_Known]) -> Iterable[_Known]:
    """Join chunks that follow each other in the piece and in the row."""
    last: _Known | None = None
    for known in same:
        if last is not None:
            if last.source == known.source and last.row is known.row and last.region.stop == known.region.start:
                last = replace(last, region=replace(last.region, stop=known.region.stop))
                continue
            yield last
        last = known
    if last is not None:
        yield last


def _rows(known: _Known, piece: Piece, rank: int) -> Iterable[SavedSlice]:
    """Yield the row of each name that these chunks have."""
    for name in (piece.name, *piece.aliases):
        yield replace(
            known.row,
            name=name,
            owner=rank if piece.kind == "local" else SHARED,
            region=known.region,
            byte_start=known.row.byte_start + known.first_digest * DIGEST_BYTES,
            digests=tuple(_digests(known)),
        )
