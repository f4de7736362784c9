"""Text to token shards: streamed, resumable after a kill.

Shards of both splits close together, at points that only the text decides; each such point is a line of the
journal. A pipeline that is killed goes on from the last line and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from faulttol.durable import sync_folder, write_whole
from trainsys.data.document import START, Piece, read_pieces
from trainsys.data.errors import SourceChangedError, TokenRangeError, TooFewTokensError
from trainsys.data.journal import Journal, Ledger, array_bytes
from trainsys.data.plan import Plan
from trainsys.data.prepared import (
    SPLITS,
    UNIGRAM,
    PreparedInfo,
    Split,
    content_fingerprint,
    dump_meta,
    entropy,
    is_prepared,
    read_prepared,
)
from trainsys.data.shard import META, ShardFormat, ShardInfo, ShardWriter, TokenDtype, token_dtype
from trainsys.data.source import SourceFile, find_files

_BATCH_BYTES = 4 << 20
_BATCH_PIECES = 1024
_PLAN = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareProgress:
    """How far a preparation is."""

    documents: int
    bytes: int
    """Of the stored source files, read so far (by an earlier, killed preparation too)."""
    total_bytes: int | None
    """Of all source files; None where a file system does not say."""
    tokens: int
    elapsed_s: float
    """Since this call began."""
    bytes_per_s: float
    """Since this call began."""


OnProgress = Callable[[PrepareProgress], None]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A piece on its way to a split."""

    file_index: int
    piece: Piece
    split: Split
    held_out_hash: int


class Pipeline:
    """One preparation in its work folder; the caller holds the lock."""

    def __init__(self, plan: Plan, work: Path, on_progress: OnProgress | None) -> None:
        self._plan = plan
        self._work = work
        self._on_progress = on_progress
        self._journal = Journal(work, plan.tokenizer.vocab_size)
        self._dtype = token_dtype(plan.tokenizer.vocab_size)
        self._bytes_before = [*accumulate((file.size or 0 for file, _ in plan.files), initial=0)]
        self._began_s = time.monotonic()
        self._began_bytes = 0

    def complete(self) -> None:
        """Leaves a whole prepared folder in the work folder."""
        if is_prepared(self._work) and read_prepared(self._work).source_key == self._plan.key:
            self._tidy()
            return
        held_out_below = self._open(int(self._plan.held_out_fraction * (1 << 64)))
        ledger = self._write(held_out_below)
        train, validation = ledger.totals["train"], ledger.totals["validation"]
        if self._plan.held_out_fraction and train.tokens and not validation.tokens:
            # Nothing fell under the fraction: hold out what came nearest.
            shutil.rmtree(self._work)
            ledger = self._write(self._open(ledger.lowest_train_hash + 1))
        if not ledger.totals["train"].tokens:
            shutil.rmtree(self._work)
            raise TooFewTokensError(self._nothing_to_train(ledger))
        read = _listing(file for file, _ in self._plan.files)
        if any(_listing(find_files(path)) - read for path in self._plan.paths):
            shutil.rmtree(self._work)
            raise SourceChangedError(f"{self._plan.source}: changed while it was read; run again")
        self._publish(ledger)

    def _nothing_to_train(self, ledger: Ledger) -> str:
        if ledger.totals["validation"].documents:
            return (
                f"{self._plan.source}: one text, too short to hold a part of it out; "
                "give data.validation_path, or data.validation_fraction=0"
            )
        num_files, num_empty = len(self._plan.files), ledger.empty_documents
        return f"{self._plan.source}: no text in {num_files} files ({num_empty} empty documents)"

    def _open(self, held_out_below: int) -> int:
        """The hold-out threshold of the work folder's plan, after making that folder ours."""
        file = self._work / _PLAN
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["key"] == self._plan.key:
                return int(found["held_out_below"])
        if self._work.exists():
            shutil.rmtree(self._work)
        for split in SPLITS:
            (self._work / split).mkdir(parents=True)
        write_whole(file, json.dumps({"key": self._plan.key, "held_out_below": held_out_below}).encode())
        return held_out_below

    def _write(self, held_out_below: int) -> Ledger:
        ledger = self._journal.resume()
        self._began_bytes = self._bytes_before[ledger.file_index]
        units = _with_ends(self._units(ledger, held_out_below))
        shards: _OpenShards | None = None
        try:
            for batch in _batches(units):
                for (unit, ends), (tokens, replaced) in zip(batch, self._encode(batch), strict=True):
                    ledger.replaced_documents += replaced
                    if not len(unit.piece.content):
                        ledger.empty_documents += 1
                        continue
                    shards = shards or _OpenShards(self._work, self._dtype, self._plan.format, ledger)
                    shards.append(unit, tokens, self._plan.tokenizer.end_of_document if ends else None)
                    if shards.tokens >= self._plan.shard_tokens:
                        self._journal.record(ledger, shards.finish())
                        shards = None
                        self._report(ledger, unit)
                self._report(ledger, batch[-1][0])
            if shards:
                self._journal.record(ledger, shards.finish())
        finally:
            if shards:
                shards.close()
        return ledger

    def _units(self, ledger: Ledger, held_out_below: int) -> Iterator[_Unit]:
        """The pieces after the ledger's cursor, each with its split."""
        start, cursor = ledger.file_index, ledger.cursor
        end = self._plan.tokenizer.end_of_document
        for index, (file, split) in enumerate(self._plan.files[start:], start):
            for piece in read_pieces(file, self._plan.text_key, cursor if index == start else START):
                content = piece.content
                if isinstance(content, np.ndarray):
                    content = self._checked(content, file)
                    if piece.last and len(content) and content[-1] == end:
                        content = content[:-1]
                    piece = replace(piece, content=content)
                held_out_hash = xxhash.xxh3_64_intdigest(content if isinstance(content, bytes) else content.tobytes())
                chosen: Split = split or ("validation" if held_out_hash < held_out_below else "train")
                yield _Unit(index, piece, chosen, held_out_hash)

    def _checked(self, tokens: NDArray[np.int64], file: SourceFile) -> NDArray[np.int64]:
        size = self._plan.tokenizer.vocab_size
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < size):
            wrong = int(tokens[(tokens < 0) | (tokens >= size)][0])
            raise TokenRangeError(
                f"{file.url}: token id {wrong} lies outside the vocabulary of {size} ids of "
                f"'{self._plan.tokenizer.spec}' (data.tokenizer)"
            )
        return tokens

    def _encode(self, batch: list[tuple[_Unit, bool]]) -> list[tuple[NDArray[Any], bool]]:
        """Ids of each piece, and whether broken UTF-8 in it was replaced."""
        contents = [unit.piece.content for unit, _ in batch]
        texts: list[str | bytes] = [content for content in contents if isinstance(content, bytes)]
        replaced = [False] * len(texts)
        if self._plan.tokenizer.spec != "bytes":
            for index, text in enumerate(texts):
                assert isinstance(text, bytes)
                decoded = text.decode("utf-8", "replace")
                replaced[index] = "\ufffd" in decoded and decoded.encode() != text
                texts[index] = decoded
        encoded = iter(zip(self._plan.tokenizer.encode_batch(texts), replaced, strict=True))
        return [next(encoded) if isinstance(content, bytes) else (content, False) for content in contents]

    def _report(self, ledger: Ledger, unit: _Unit) -> None:
        if self._on_progress is None:
            return
        consumed = self._bytes_before[unit.file_index] + unit.piece.source_bytes
        elapsed_s = time.monotonic() - self._began_s
        self._on_progress(
            PrepareProgress(
                documents=sum(totals.documents for totals in ledger.totals.values()),
                bytes=consumed,
                total_bytes=self._plan.total_bytes,
                tokens=sum(totals.tokens for totals in ledger.totals.values()),
                elapsed_s=elapsed_s,
                bytes_per_s=(consumed - self._began_bytes) / max(elapsed_s, 1e-9),
            )
        )

    def _publish(self, ledger: Ledger) -> None:
        """Writes what completes the folder, the manifest last."""
        write_whole(self._work / UNIGRAM, array_bytes(ledger.unigram))
        tokenizer = self._plan.tokenizer
        info = PreparedInfo(
            path=self._work,
            source=self._plan.source,
            source_key=self._plan.key,
            fingerprint=content_fingerprint(tokenizer, ledger.shards),
            tokenizer_spec=tokenizer.save(self._work),
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            dtype=self._dtype,
            format=self._plan.format,
            train=ledger.split("train"),
            validation=ledger.split("validation"),
            empty_documents=ledger.empty_documents,
            replaced_documents=ledger.replaced_documents,
            unigram_entropy=entropy(ledger.unigram),
        )
        write_whole(self._work / META, dump_meta(info).encode())
        self._tidy()

    def _tidy(self) -> None:
        """Removes what only a resumption needs."""
        self._journal.remove()
        (self._work / _PLAN).unlink(missing_ok=True)
        for folder in (*(self._work / split for split in SPLITS), self._work):
            sync_folder(folder)


class _OpenShards:
    """The shards being written, one a split with text; all close together."""

    def __init__(self, work: Path, dtype: TokenDtype, format: ShardFormat, ledger: Ledger) -> None:
        self.tokens = 0
        self._work = work
        self._dtype = dtype
        self._format = format
        self._ledger = ledger
        self._writers: dict[Split, ShardWriter] = {}

    def append(self, unit: _Unit, tokens: NDArray[Any], end: int | None) -> None:
        """Adds a piece and counts it; `end` is the end-of-document token where its document ends."""
        ledger = self._ledger
        if unit.split not in self._writers:
            path = self._work / unit.split / f"{ledger.next_shard:05d}.{self._format}.part"
            unigram = ledger.unigram if unit.split == "train" else None
            self._writers[unit.split] = ShardWriter(path, self._dtype, self._format, unigram)
        totals = ledger.totals[unit.split]
        self._writers[unit.split].append(tokens, totals.documents, end=end)
        num_tokens = len(tokens) + (end is not None)
        self.tokens += num_tokens
        totals.tokens += num_tokens
        totals.bytes += len(unit.piece.content)
        totals.documents += end is not None
        ledger.file_index, ledger.cursor = unit.file_index, unit.piece.cursor
        if unit.split == "train":
            ledger.lowest_train_hash = min(ledger.lowest_train_hash, unit.held_out_hash)

    def finish(self) -> dict[Split, ShardInfo]:
        """Completes the files under their own names, on disk; the ledger counts them."""
        finished: dict[Split, ShardInfo] = {}
        for split, writer in self._writers.items():
            info = writer.finish()
            part = self._work / split / info.name
            whole = part.with_suffix("")
            part.rename(whole)
            finished[split] = replace(info, name=whole.name)
            self._ledger.shards[split].append(finished[split])
            sync_folder(part.parent)
        self._ledger.next_shard += 1
        return finished

    def close(self) -> None:
        """Lets go of files that were not finished."""
        for writer in self._writers.values():
            writer.close()


def _with_ends(units: Iterator[_Unit]) -> Iterator[tuple[_Unit, bool]]:
    """Each unit with whether its document ends there: at its last piece, and where the next is held out."""
    previous: _Unit | None = None
    for unit in units:
        if previous is not None:
            yield previous, previous.piece.last or unit.split != previous.split
        previous = unit
    if previous is not None:
        yield previous, True


def _batches(units: Iterator[tuple[_Unit, bool]]) -> Iterator[list[tuple[_Unit, bool]]]:
    batch: list[tuple[_Unit, bool]] = []
    size = 0
    for unit, ends in units:
        batch.append((unit, ends))
        size += len(unit.piece.content)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _listing(files: Iterable[SourceFile]) -> set[tuple[str, int | None, str]]:
    return {(file.url, file.size, file.version) for file in files}
