"""From filled slots to durable files: hash, write, give the slot back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from checkpoint.arena import Arena, Slot
from checkpoint.format import DTYPES, Entry, digests, encode_header, fingerprint
from checkpoint.manifest import SHARED, FileRecord, SavedSlice
from checkpoint.shard import Parcel, ShardPlan, Written, _is_whole, _keys, rank_name
from checkpoint.staging import Staged
from checkpoint.storage import Storage
from checkpoint.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One place that a shard is written to."""

    tier: str
    """Unique in a save."""
    storage: Storage
    path: str
    """Of the shard, in the storage."""


class Flow(Protocol):
    """One shard on its way to its targets. Any thread may call any method."""

    @property
    def in_order(self) -> bool:
        """Whether parcels must be handed over by rising file offset; else in any order. Waits until files are open."""

    @property
    def written_bytes(self) -> int:
        """Bytes that are through: written to every target that did not fail."""

    def put(self, parcel: Parcel, slot: Slot) -> None:
        """Hand over a filled slot: the parcel's bytes start at its page offset. Returns soon.

        The slot goes back to the arena when no target needs it any more, whatever happens.
        """

    def cancel(self, error: BaseException) -> None:
        """Fail every target that is not durable yet: no more parcels come. What was put is given back all the same."""

    def wait(self, tier: str) -> list[int]:
        """Return when a target's file is whole and durable: the digests of all cuts in file order.

        Raises the error that kept it from becoming so.
        """


class Drain(Protocol):
    """Who hashes and writes: kept from save to save."""

    def begin(self, plan: ShardPlan, arena: Arena, targets: Sequence[Target], trace: Trace) -> Flow:
        """Start to open the targets' files; returns at once. The header is written by the drain.

        Shards begun one after the other are written side by side: the slots of all are in one arena. What is done
        is told to `trace`: spans "hash" and "write", and "sync" for the time from the last byte to durable.
        """

    def close(self) -> None:
        """Stop when all that was begun has ended. Idempotent."""


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
    keys = _keys([s.piece.name for s in ordered], [_is_whole(s.piece, s.piece.region) for s in ordered], rank)
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
            found: list[int] = []
            for chunk in item.chunks():
                found += digests(memoryview(chunk))
                sink.write(chunk)
            rows.append(_row(item, rank, path, position, tuple(found)))
            position += item.piece.nbytes
    return rows, FileRecord(path, position, len(header), fingerprint(header))


def _row(item: Staged, rank: int, path: str, byte_start: int, found: tuple[int, ...]) -> SavedSlice:
    piece = item.piece
    return SavedSlice(
        name=piece.name,
        owner=rank if piece.kind == "local" else SHARED,
        dtype=DTYPES[piece.tensor.dtype],
        global_shape=piece.global_shape,
        region=piece.region,
        file=path,
        byte_start=byte_start,
        digests=found,
    )
