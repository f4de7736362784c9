"""A load: what fills a rank's destinations and brings the rest of what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint import catalog
from checkpoint.catalog import CheckpointInfo
from checkpoint.config import CheckpointConfig
from checkpoint.errors import CorruptCheckpoint
from checkpoint.reader import Reader
from checkpoint.state import TensorLike, pieces_of


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load brought beside the tensors it filled."""

    step: int
    """Step the checkpoint was saved after."""
    objects: dict[str, Any]
    """This rank's objects; empty if the saving world had no such rank."""
    shared: Any
    """What rank 0 handed to save as `shared`."""
    missing: tuple[str, ...]
    """strict=False: asked for, not in the checkpoint; left untouched."""
    unexpected: tuple[str, ...]
    """strict=False: in the checkpoint, not asked for."""
    missing_local: tuple[str, ...]
    """RankLocal entries that this rank has no saved counterpart for; left untouched."""
    read_bytes: int
    """Bytes of tensors that were read from the storage and verified."""
    reread_bytes: int
    """Bytes of them that were read again when they were copied: what could not be held in memory."""
    needed_bytes: int
    """Bytes of tensors that went into the destinations."""
    info: CheckpointInfo
    """The checkpoint; `info.tier` is where it was read from."""
    skipped: tuple[str, ...] = ()
    """recover: what was newer or nearer and could not be used, with the reasons."""


def load(
    reader: Reader,
    tensors: Mapping[str, TensorLike],
    rank: int,
    config: CheckpointConfig,
    *,
    strict: bool,
    tier: str,
    fresh: bool,
) -> Loaded:
    """Fill the destinations from an open checkpoint, which lies in `tier`; see `Checkpointer.load`."""
    pieces = pieces_of(tensors)
    try:
        own = reader.objects(rank)
        shared = reader.shared
        report = reader.load(pieces, rank, strict=strict, buffer_bytes=config.load_buffer_bytes, fresh=fresh)
    except CorruptCheckpoint as error:
        reader.condemn(rank, error)
        raise
    return Loaded(
        step=reader.record.step,
        objects=own,
        shared=shared,
        missing=report.missing,
        unexpected=report.unexpected,
        missing_local=report.missing_local,
        read_bytes=report.read_bytes,
        reread_bytes=report.reread_bytes,
        needed_bytes=report.needed_bytes,
        info=catalog.info_of(reader, tier),
    )
