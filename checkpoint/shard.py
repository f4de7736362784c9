"""The plan of one rank's shard: what lies where in its file, and in which parcels it is copied and written. Pure.

One order rules all: the order in which tensors are updated is the order in which they are copied, so that a
fence for the first of them returns first, and the order in which they lie in the file, so that parcels can be
written as they come. Within a group tensors of whole cache lines come first, since copies between unaligned addresses
take half as long again. They and the others go by falling element size, of one size small ones last, and every group
but the last ends on a multiple of the largest size: so each tensor is aligned to its own. The few whose sizes stand
against that come before all others, by rising element size; the header is padded so that they end on a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from checkpoint.digest import DIGEST_BYTES, SMALL_BYTES
from checkpoint.format import ALIGN_BYTES, CHUNK_BYTES, DTYPES, Entry, chunk_count, encode_header
from checkpoint.manifest import SHARED, FileRecord, SavedSlice, SliceTable
from checkpoint.region import Region
from checkpoint.state import Piece

_LINE_BYTES = 64
"""A line of the processor's caches; a multiple of every element size."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank wrote, ready for its vote."""

    rows: tuple[SavedSlice, ...] | SliceTable
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A run of whole CHUNK_BYTES of one piece, its end included: what is written of it."""

    source: int
    """Index of the piece."""
    first_chunk: int
    num_chunks: int
    """0 for an empty tensor alone."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A run of one piece's bytes inside a parcel: whole digests."""

    start: int
    """From the first byte of the parcel."""
    nbytes: int
    source: int
    """Index of the piece."""
    source_start: int
    """From the first byte of the piece's row-major order."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Consecutive bytes of the file that are copied, hashed and written together; at most a plan's parcel_bytes."""

    index: int
    """Place in the file."""
    group: int
    file_start: int
    nbytes: int
    cuts: tuple[Cut, ...]
    """In file order, without holes."""

    @property
    def page_offset(self) -> int:
        """Where in a page the first byte lies, in the file and so in the slot: direct writes need that."""
        return self.file_start % ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One rank's shard before its bytes are known. Holds no tensor."""

    header: bytes
    """First bytes of the file; the first parcel follows."""
    nbytes: int
    """Of the whole file."""
    parcels: tuple[Parcel, ...]
    """In file order."""
    num_groups: int
    path: str
    """Name of the file in the attempt's folder."""
    slices: tuple[tuple[SavedSlice, ...], ...]
    """For each part, in file order, the rows of all names of its memory; their digests are still missing."""
    parcel_bytes: int = CHUNK_BYTES
    """No parcel has more."""

    def rows(self, digests: Sequence[int]) -> list[SavedSlice]:
        """Return the slice table's rows, given the digests of all cuts in file order."""
        rows, position = [], 0
        for names in self.slices:
            end = position + chunk_count(names[0].nbytes)
            rows += [replace(row, digests=tuple(digests[position:end])) for row in names]
            position = end
        return rows


def rank_name(rank: int) -> str:
    """Return the stem of a rank's file names."""
    return f"r{rank:05d}"


def whole_parts(pieces: Sequence[Piece]) -> list[Part]:
    """Return every piece as one part."""
    return [Part(i, 0, chunk_count(piece.nbytes, CHUNK_BYTES)) for i, piece in enumerate(pieces)]


def plan_shard(
    pieces: Sequence[Piece],
    parts: Iterable[Part],
    groups: Sequence[int],
    rank: int,
    parcel_bytes: int = CHUNK_BYTES,
) -> ShardPlan:
    """Lay out a shard of these parts in parcels of up to `parcel_bytes`, a multiple of CHUNK_BYTES.

    `groups[i]` says in which turn piece i is updated, from 0.
    """
    drafts = [_draft(pieces[part.source], part, groups[part.source]) for part in parts]
    first, aligned = _in_file_order(drafts)
    ordered = [*first, *aligned]
    path = f"{rank_name(rank)}.safetensors"
    names = [pieces[d.part.source].name for d in ordered]
    keys = _keys(names, [_is_whole(pieces[d.part.source], d.region) for d in ordered], rank)
    entries = [Entry(key, d.dtype, d.shape) for key, d in zip(keys, ordered, strict=True)]
    header = encode_header(entries, {"format": "pt"}, sum(d.nbytes for d in first))
    slices, position = [], len(header)
    for draft in ordered:
        piece = pieces[draft.part.source]
        owner = rank if piece.kind == "local" else SHARED
        row = SavedSlice(piece.name, owner, draft.dtype, piece.global_shape, draft.region, path, position, digests=())
        slices.append((row, *(replace(row, name=alias) for alias in piece.aliases)))
        position += draft.nbytes
    parcels = _parcels(ordered, len(header), parcel_bytes)
    return ShardPlan(header, position, tuple(parcels), max(groups, default=0) + 1, path, tuple(slices), parcel_bytes)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A part on its way into the file."""

    part: Part
    group: int
    dtype: str
    itemsize: int
    nbytes: int
    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        return self.region.shape if self.region.is_box else (self.region.numel,)


def _draft(piece: Piece, part: Part, group: int) -> _Draft:
    itemsize = piece.tensor.element_size()
    start = part.first_chunk * CHUNK_BYTES
    stop = min(start + part.num_chunks * CHUNK_BYTES, piece.nbytes)
    region = piece.region.part(start // itemsize, stop // itemsize)
    return _Draft(part, group, DTYPES[piece.tensor.dtype], itemsize, stop - start, region)


def _in_file_order(drafts: Sequence[_Draft]) -> tuple[list[_Draft], list[_Draft]]:
    """Return the parts that come first, and the others."""
    unit = max((d.itemsize for d in drafts), default=1)
    by_group: dict[int, list[_Draft]] = {}
    for draft in drafts:
        by_group.setdefault(draft.group, []).append(draft)
    first: list[_Draft] = []
    aligned: list[_Draft] = []
    for group in sorted(by_group):
        fit, rest = by_group[group], list[_Draft]()
        if group < max(by_group):
            fit, rest = _fitting(fit, unit)
        aligned += sorted(fit, key=lambda d: (d.nbytes % _LINE_BYTES > 0, -d.itemsize, d.nbytes <= SMALL_BYTES))
        first += rest
    return sorted(first, key=lambda d: d.itemsize), aligned


def _fitting(drafts: Sequence[_Draft], unit: int) -> tuple[list[_Draft], list[_Draft]]:
    """Split off the few parts (fewer than `unit`) without which the sum of bytes is a multiple of `unit`.

    Whenever the sum of what is not settled returns to a remainder it had before, the parts since then sum to a
    multiple, and are settled.
    """
    fit: list[_Draft] = []
    open_parts: list[_Draft] = []
    remainders = [0]
    for draft in drafts:
        remainder = (remainders[-1] + draft.nbytes) % unit
        open_parts.append(draft)
        if remainder in remainders:
            keep = remainders.index(remainder)
            fit += open_parts[keep:]
            del open_parts[keep:], remainders[keep + 1 :]
        else:
            remainders.append(remainder)
    return fit, open_parts


def _parcels(ordered: Sequence[_Draft], file_start: int, parcel_bytes: int) -> list[Parcel]:
    parcels: list[Parcel] = []
    cuts: list[Cut] = []
    group, nbytes = 0, 0

    def close() -> None:
        nonlocal file_start, nbytes
        if cuts:
            parcels.append(Parcel(len(parcels), group, file_start, nbytes, tuple(cuts)))
            file_start += nbytes
            cuts.clear()
            nbytes = 0

    for draft in ordered:
        first = draft.part.first_chunk * CHUNK_BYTES
        start = 0
        while start < draft.nbytes:
            if draft.group != group:
                close()
            group = draft.group
            # No digest is divided between parcels; so at most DIGEST_BYTES of a slot stay empty.
            left, room = draft.nbytes - start, parcel_bytes - nbytes
            size = left if left <= room else room // DIGEST_BYTES * DIGEST_BYTES
            if not size:
                close()
                continue
            cuts.append(Cut(nbytes, size, draft.part.source, first + start))
            nbytes += size
            start += size
    close()
    return parcels


def _is_whole(piece: Piece, region: Region) -> bool:
    return piece.kind != "local" and region == Region.whole(piece.global_shape)


def _keys(names: Sequence[str], whole: Sequence[bool], rank: int) -> list[str]:
    """Return the names tensors have inside the shard: for other tools only, never read back here."""
    pairs = list(zip(names, whole, strict=True))
    used = {"__metadata__"} | {name for name, is_whole in pairs if is_whole}
    keys = []
    for name, is_whole in pairs:
        key = name if is_whole and name != "__metadata__" else f"{name}@{rank_name(rank)}"
        while key in used and not (is_whole and key == name):
            key += "'"
        used.add(key)
        keys.append(key)
    return keys
