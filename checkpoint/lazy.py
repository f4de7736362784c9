"""A checkpoint as a mapping of tensors that are read when they are indexed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from checkpoint.access import Place, open_reader, select
from checkpoint.catalog import CheckpointInfo, info_of
from checkpoint.reader import Reader, Want
from checkpoint.selection import Index, select_box
from checkpoint.transfer import Transfer


class LazyTensor:
    """A saved tensor, not read yet. An index reads what it needs, verified: `t[...]` all of it, `t[:10, 3]` a part."""

    def __init__(self, reader: Reader, transfer: Transfer, name: str, owner: int) -> None:
        self.name = name
        self.dtype, spec = reader.spec(name, owner)
        self.shape = torch.Size(spec)
        self._reader = reader
        self._transfer = transfer
        self._owner = owner

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Return the part that the index names, in new host memory.

        Integers, slices with steps from 1, and `...` are allowed, and mean what they do for a torch.Tensor. Between
        the elements of a step everything is read.

        Raises:
            IndexError, TypeError: no such part. CorruptCheckpoint: bytes are not what was committed.
        """
        region, rest = select_box(index, tuple(self.shape))
        (box,) = self._reader.read([Want(self.name, self._owner, region)], self._transfer)
        return box[rest].contiguous()

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype}, {list(self.shape)})"


class OpenCheckpoint(Mapping[str, LazyTensor]):
    """The tensors of one checkpoint by name. A context manager; its files stay open until `close`."""

    def __init__(self, reader: Reader, rank: int | None) -> None:
        self._reader = reader
        self._transfer = reader.transfer()
        self._owners = dict(select(reader, "*", rank))

    @property
    def info(self) -> CheckpointInfo:
        """Which checkpoint this is."""
        return info_of(self._reader)

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(self._reader, self._transfer, name, self._owners[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was indexed before stays. Idempotent."""
        self._transfer.close()


def open_checkpoint(
    place: Place, *, rank: int | None = None, storage_options: Mapping[str, Any] | None = None
) -> OpenCheckpoint:
    """Return a checkpoint's tensors by name, of which nothing is read yet but the slice table.

    Args:
        place: the checkpoint.
        rank: also the RankLocal tensors of this rank of the saving world.
        storage_options: for the fsspec file system.

    Raises:
        CheckpointNotFound, CorruptCheckpoint: there is none, or its record is damaged.
    """
    return OpenCheckpoint(open_reader(place, storage_options), rank)
