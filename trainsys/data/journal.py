"""How far a preparation has come: a line on disk for each finished set of shards, to go on from."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faulttol.durable import write_whole
from trainsys.data.document import START, Cursor
from trainsys.data.prepared import SPLITS, Split, SplitInfo
from trainsys.data.shard import ShardInfo

_NAME = "journal.jsonl"


@dataclass(slots=True)
class SplitTotals:
    """Counts of one split so far."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Ledger:
    """Everything that carries over from one set of shards to the next."""

    unigram: NDArray[np.int64]
    """int64 [vocab_size]: ids in train so far."""
    next_shard: int = 0
    file_index: int = 0
    cursor: Cursor = START
    empty_documents: int = 0
    replaced_documents: int = 0
    lowest_train_hash: int = (1 << 64) - 1
    """Smallest hold-out hash that went to train."""
    totals: dict[Split, SplitTotals] = field(default_factory=lambda: {split: SplitTotals() for split in SPLITS})
    shards: dict[Split, list[ShardInfo]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def split(self, name: Split) -> SplitInfo:
        """The totals of a split as a manifest has them."""
        return SplitInfo(**asdict(self.totals[name]), shards=tuple(self.shards[name]))


class Journal:
    """The journal in a work folder. One process at a time."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size

    def resume(self) -> Ledger:
        """The ledger after the last whole line; files that no line vouches for are removed."""
        ledger = Ledger(np.zeros(self._vocab_size, np.int64))
        whole: list[str] = []
        for line in self._lines():
            record = _record(line)
            if record is None:
                break
            whole.append(line)
            for split, shard in record.pop("shards"):
                ledger.shards[split].append(ShardInfo(**shard))
            for split, totals in record.pop("totals").items():
                ledger.totals[split] = SplitTotals(**totals)
            ledger.cursor = tuple(record.pop("cursor"))
            for name, value in record.items():
                setattr(ledger, name, value)
        if ledger.next_shard:
            ledger.unigram = np.load(self._unigram(ledger.next_shard))
        write_whole(self._folder / _NAME, "".join(whole).encode())
        vouched = {f"{split}/{shard.name}" for split in SPLITS for shard in ledger.shards[split]}
        for split in SPLITS:
            for file in (self._folder / split).iterdir():
                if f"{split}/{file.name}" not in vouched:
                    file.unlink()
        return ledger

    def record(self, ledger: Ledger, finished: dict[Split, ShardInfo]) -> None:
        """Makes `ledger` the point to go on from; the shards it counts must be on disk by now."""
        write_whole(self._unigram(ledger.next_shard), array_bytes(ledger.unigram))
        record = {
            "shards": [[split, asdict(shard)] for split, shard in finished.items()],
            "totals": {split: asdict(totals) for split, totals in ledger.totals.items()},
            "cursor": ledger.cursor,
            "next_shard": ledger.next_shard,
            "file_index": ledger.file_index,
            "empty_documents": ledger.empty_documents,
            "replaced_documents": ledger.replaced_documents,
            "lowest_train_hash": ledger.lowest_train_hash,
        }
        with (self._folder / _NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._unigram(ledger.next_shard - 1).unlink(missing_ok=True)

    def remove(self) -> None:
        """Takes the journal's own files away, once nothing needs to be resumed."""
        for file in (self._folder / _NAME, *self._folder.glob("journal-unigram-*.npy")):
            file.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        try:
            return (self._folder / _NAME).read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []

    def _unigram(self, shard: int) -> Path:
        return self._folder / f"journal-unigram-{shard:05d}.npy"


def array_bytes(array: NDArray[np.int64]) -> bytes:
    """The array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _record(line: str) -> dict[str, Any] | None:
    """What a line says; None for one that a kill cut off."""
    if not line.endswith("\n"):
        return None
    record: dict[str, Any] = json.loads(line)
    return record
