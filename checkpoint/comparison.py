"""Whether chunks are as they were: digested where they lie, on the host or a GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from checkpoint import catalog
from checkpoint.delta import Narrowed, Parent, narrow
from checkpoint.digest import CHUNK_BYTES, DIGEST_BYTES, digest
from checkpoint.errors import CheckpointError
from checkpoint.manifest import FileRecord, SavedSlice
from checkpoint.names import COMMIT, MARK, REMOVAL
from checkpoint.shard import whole_parts
from checkpoint.state import Piece
from checkpoint.storage import Storage

_log = logging.getLogger(__name__)


class Delta:
    """What the saves of one rank need not write again, as the newest checkpoint of a root has it.

    A save may be compared while the one before it is still being written: it then refers to what the one before
    that has; an urgent save may be the third under way. So of a root that is written with this class three checkpoints
    stay at least.
    """

    def __init__(self, storage: Storage, rank: int) -> None:
        self._storage = storage
        self._rank = rank
        self._parent: Parent | None = None

    def committed(self, folder: str, rows: Sequence[SavedSlice], files: Sequence[FileRecord]) -> None:
        """Take this rank's part of a checkpoint, committed since, for what the next saves are compared with."""
        self._parent = Parent(folder, rows, files)

    def narrow(self, pieces: Sequence[Piece], moments: Sequence[Any] = ()) -> Narrowed:
        """Return what there is to write of some pieces, after looking at each of them; `moments` as for the copies.

        Pieces that are not contiguous are always written. Where nothing sound was committed, all are.
        """
        parent = self._sound_parent()
        if parent is None:
            return Narrowed(tuple(whole_parts(pieces)), (), ())
        return narrow(pieces, parent, Digester(pieces, moments).has_digests, self._rank)

    def _sound_parent(self) -> Parent | None:
        """Return what to compare with: what this launch committed last, else the newest that stands."""
        parent = self._parent
        try:
            found = parent if parent is not None and self._stands(parent) else self._newest()
            return found and found.without(self._going(found))
        except CheckpointError as error:
            _log.warning("all of the state is written: what was saved before cannot be used: %s", error)
            return None

    def _stands(self, parent: Parent) -> bool:
        """Whether a checkpoint is still there, and nobody found it damaged or distrusts it."""
        there = self._storage.size(f"{parent.folder}/{COMMIT}") is not None
        return there and self._storage.size(f"{parent.folder}/{MARK}") is None

    def _going(self, parent: Parent) -> set[str]:
        """Return in which of its folders nothing may be referred to any more."""
        return {f for f in parent.folders if self._storage.size(f"{f}/{REMOVAL}") is not None}

    def _newest(self) -> Parent | None:
        reader = catalog.latest(self._storage, "quick")
        return Parent(reader.folder, reader.table.all_rows(), reader.record.files) if reader else None


class Digester:
    """Compares the bytes of pieces with digests; stops at the first that differs."""

    def __init__(self, pieces: Sequence[Piece], moments: Sequence[Any]) -> None:
        """`moments` are events of GPUs, after all that the pieces are the result of."""
        self._pieces = pieces
        self._moments = moments
        self._streams: dict[torch.device, Any] = {}
        self._buffer: torch.Tensor | None = None

    def has_digests(self, source: int, start: int, expected: Sequence[int]) -> bool:
        """Whether piece `source` has these digests from byte `start` on."""
        tensor = self._pieces[source].tensor
        if not tensor.is_contiguous():
            return False
        data = tensor.view(-1).view(torch.uint8)[start : start + len(expected) * DIGEST_BYTES]
        if tensor.device.type == "cpu":
            return _agrees(data, expected)
        # A GPU's first chunk tells most: what was updated differs there.
        return all(
            _agrees(self._fetched(data[a:b]), expected[a // DIGEST_BYTES : -(-b // DIGEST_BYTES)])
            for a, b in ((0, DIGEST_BYTES), (DIGEST_BYTES, CHUNK_BYTES))
            if a < len(data)
        )

    def _fetched(self, data: torch.Tensor) -> torch.Tensor:
        """Return bytes of a GPU in host memory, until the next call."""
        if self._buffer is None:
            self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        stream = self._streams.get(data.device)
        if stream is None:
            stream = self._streams[data.device] = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
            for moment in self._moments:
                stream.wait_event(moment)
        with torch.cuda.device(data.device), torch.cuda.stream(stream):
            found = self._buffer[: len(data)].copy_(data, non_blocking=True)
        stream.synchronize()
        return found


def _agrees(data: torch.Tensor, expected: Sequence[int]) -> bool:
    memory = memoryview(data.numpy().data)
    return all(digest(memory[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]) == value for i, value in enumerate(expected))
