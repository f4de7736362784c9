"""One rank's files of one attempt: the shard, the objects, and the slice table that votes for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checkpoint.format import DTYPES, Entry, digest, encode_header, fingerprint
from checkpoint.manifest import SHARED, FileRecord, SavedSlice
from checkpoint.region import Region
from checkpoint.staging import Staged
from checkpoint.storage import Storage


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank wrote, ready for its vote."""

    rows: tuple[SavedSlice, ...]
    files: tuple[FileRecord, ...]


def rank_name(rank: int) -> str:
    """Return the stem of a rank's file names."""
    return f"r{rank:05d}"


def write_rank(storage: Storage, folder: str, rank: int, staged: Sequence[Staged], objects: bytes) -> Written:
    """Write this rank's shard and objects into an attempt's folder, durable when it returns."""
    rows, shard = _write_shard(storage, folder, rank, staged)
    path = f"{rank_name(rank)}.objects.json"
    storage.write(f"{folder}/{path}", objects)
    return Written(tuple(rows), (shard, FileRecord(path, len(objects), len(objects), fingerprint(objects))))


def _write_shard(
    storage: Storage, folder: str, rank: int, staged: Sequence[Staged]
) -> tuple[list[SavedSlice], FileRecord]:
    # By falling element size, so that every tensor is aligned to its own.
    ordered = sorted(staged, key=lambda s: (-s.piece.tensor.element_size(), s.piece.name))
    keys = _keys([s.piece.name for s in ordered], [_is_whole(s) for s in ordered], rank)
    entries = [
        Entry(
            key,
            DTYPES[s.piece.tensor.dtype],
            s.piece.region.shape if s.piece.region.is_box else (s.piece.region.numel,),
        )
        for key, s in zip(keys, ordered, strict=True)
    ]
    header = encode_header(entries, {"format": "pt"})
    path = f"{rank_name(rank)}.safetensors"
    rows, position = [], len(header)
    with storage.create(f"{folder}/{path}") as sink:
        sink.write(header)
        for item in ordered:
            digests = []
            for chunk in item.chunks():
                digests.append(digest(chunk))
                sink.write(chunk)
            rows.append(_row(item, rank, path, position, tuple(digests)))
            position += item.piece.nbytes
    return rows, FileRecord(path, position, len(header), fingerprint(header))


def _row(item: Staged, rank: int, path: str, byte_start: int, digests: tuple[int, ...]) -> SavedSlice:
    piece = item.piece
    return SavedSlice(
        name=piece.name,
        owner=rank if piece.kind == "local" else SHARED,
        dtype=DTYPES[piece.tensor.dtype],
        global_shape=piece.global_shape,
        region=piece.region,
        file=path,
        byte_start=byte_start,
        digests=digests,
    )


def _is_whole(item: Staged) -> bool:
    return item.piece.kind != "local" and item.piece.region == Region.whole(item.piece.global_shape)


def _keys(names: Iterable[str], whole: Iterable[bool], rank: int) -> list[str]:
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
