"""Text to token shards: streamed, resumable after a kill, published whole.

The work is done in `.NAME.partial` beside the folder and renamed when all of it is there. Shards of both splits close
together, at points that only the text decides; each such point is a line of the journal. A preparation that is killed
goes on from the last line and ends with the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainsys.config import DataConfig
from trainsys.data.document import START, Piece, read_pieces
from trainsys.data.errors import (
    DiskFullError,
    PreparedError,
    SourceChangedError,
    TokenRangeError,
    TooFewTokensError,
)
from trainsys.data.journal import Journal, Ledger
from trainsys.data.lock import exclusive
from trainsys.data.plan import Plan, plan_from_config, plan_from_prepared
from trainsys.data.prepared import (
    META,
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
from trainsys.data.shard import ShardFormat, ShardInfo, ShardWriter, TokenDtype, token_dtype
from trainsys.data.source import SourceFile, find_files

SHARD_TOKENS = 1 << 26

_BATCH_BYTES = 4 << 20
_BATCH_PIECES = 1024
_STALLED_AFTER_S = 600.0
_PLAN = "plan.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def prepare(
    config: DataConfig,
    out_dir: Path,
    *,
    on_progress: OnProgress | None = None,
    format: ShardFormat = "arrow",
    shard_tokens: int = SHARD_TOKENS,
) -> PreparedInfo:
    """Writes the tokens of `config.path` to the folder `out_dir` and says what it holds.

    Memory is bounded by a few batches, whatever the source. Killed, it goes on when called again; done already, it
    returns at once; while another process does the same, it waits for that one. `on_progress` is called from this
    thread after every few MB of text and every finished shard. `shard_tokens` is the size at which shards close.

    Raises:
        DataError: see `trainsys.data.errors`; what is wrong with the source, the tokenizer, the folder or the disk.
    """
    return _prepare(plan_from_config(config, format, shard_tokens), out_dir, on_progress)


def ensure_prepared(config: DataConfig, cache_dir: Path, *, on_progress: OnProgress | None = None) -> Path:
    """The folder of Arrow shards for `config`: itself where it names one, else found in or added to `cache_dir`.

    A source whose listing changed (sizes, modification times, entity tags) is prepared anew, beside the old one. Of a
    prepared folder, its own tokenizer and held-out split count; `config.tokenizer` may repeat it or stay `bytes`.
    Safe to call from every rank at once.

    Raises:
        DataError: as `prepare`; PreparedError for a corrupt folder.
    """
    named = Path(config.path.removeprefix("file://"))
    if not is_prepared(named):
        plan = plan_from_config(config, "arrow", SHARD_TOKENS)
    else:
        info = read_prepared(named)
        _check_config(config, info)
        if info.format == "arrow":
            return named
        plan = plan_from_prepared(info, "arrow", SHARD_TOKENS)
    out_dir = cache_dir / plan.key[:20]
    if is_prepared(out_dir):
        return read_prepared(out_dir).path
    return _prepare(plan, out_dir, on_progress).path


def _check_config(config: DataConfig, info: PreparedInfo) -> None:
    if config.validation_path:
        raise PreparedError(
            f"{config.path}: a prepared folder has its held-out split; leave data.validation_path empty"
        )
    if config.tokenizer == "bytes":
        return
    from trainsys.data.tokenizer import load_tokenizer

    if load_tokenizer(config.tokenizer).digest != info.tokenizer().digest:
        raise PreparedError(
            f"{config.path}: prepared with another tokenizer than {config.tokenizer} (data.tokenizer)"
        )


def _prepare(plan: Plan, out_dir: Path, on_progress: OnProgress | None) -> PreparedInfo:
    work = out_dir.parent / f".{out_dir.name}.partial"
    with _room(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = out_dir.parent / f".{out_dir.name}.lock"
        with exclusive(lock, stalled_after_s=_STALLED_AFTER_S, progress=lambda: _sizes(work)):
            if is_prepared(out_dir):
                return _same(plan, out_dir)
            if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
                raise PreparedError(f"{out_dir}: not empty, and not a prepared folder; name another folder")
            _Run(plan, work, on_progress).complete()
            work.rename(out_dir)
            _sync_folder(out_dir.parent)
            return read_prepared(out_dir)


def _same(plan: Plan, out_dir: Path) -> PreparedInfo:
    info = read_prepared(out_dir)
    if info.source_key != plan.key:
        raise PreparedError(
            f"{out_dir}: already holds other tokens (of {info.source}, or before it changed); name another folder or delete it"
        )
    return info


@dataclass(frozen=True, slots=True)
class _Unit:
    """A piece on its way to a split."""

    file_index: int
    piece: Piece
    split: Split
    held_out_hash: int


class _Run:
    """One preparation in its work folder."""

    def __init__(self, plan: Plan, work: Path, on_progress: OnProgress | None) -> None:
        self._plan = plan
        self._work = work
        self._on_progress = on_progress
        self._journal = Journal(work, plan.tokenizer.vocab_size)
        self._dtype = token_dtype(plan.tokenizer.vocab_size)
        sizes = [file.size or 0 for file, _ in plan.files]
        self._bytes_before = np.concatenate([[0], np.cumsum(sizes)]).tolist() if sizes else [0]
        self._began_s = time.monotonic()
        self._began_bytes = 0

    def complete(self) -> None:
        """Leaves a whole prepared folder in the work folder."""
        if is_prepared(self._work) and read_prepared(self._work).source_key == self._plan.key:
            self._journal.remove()
            return
        held_out_below = self._open(int(self._plan.held_out_fraction * (1 << 64)))
        ledger = self._write(held_out_below)
        if (
            self._plan.held_out_fraction
            and not ledger.totals["validation"].tokens
            and ledger.totals["train"].tokens
        ):
            # Nothing fell under the fraction: hold out what came nearest.
            shutil.rmtree(self._work)
            ledger = self._write(self._open(ledger.lowest_train_hash + 1))
        if not ledger.totals["train"].tokens:
            shutil.rmtree(self._work)
            raise TooFewTokensError(self._nothing_to_train(ledger))
        if any(
            _listing(find_files(path)) - _listing(file for file, _ in self._plan.files)
            for path in self._plan.paths
        ):
            shutil.rmtree(self._work)
            raise SourceChangedError(f"{self._plan.source}: changed while it was read; run again")
        self._publish(ledger)

    def _nothing_to_train(self, ledger: Ledger) -> str:
        if ledger.totals["validation"].documents:
            return (
                f"{self._plan.source}: one document, too short to hold a part of it out; give data.validation_path, "
                "or data.validation_fraction=0"
            )
        return f"{self._plan.source}: no text in {len(self._plan.files)} files ({ledger.empty_documents} empty documents)"

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
        _write_whole(file, json.dumps({"key": self._plan.key, "held_out_below": held_out_below}))
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
                held_out_hash = xxhash.xxh3_64_intdigest(
                    content if isinstance(content, bytes) else content.tobytes()
                )
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
        with (self._work / UNIGRAM).open("wb") as file:
            np.save(file, ledger.unigram)
            file.flush()
            os.fsync(file.fileno())
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
        _write_whole(self._work / META, dump_meta(info))
        self._journal.remove()
        (self._work / _PLAN).unlink()
        for folder in (*(self._work / split for split in SPLITS), self._work):
            _sync_folder(folder)


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
            _sync_folder(part.parent)
        self._ledger.next_shard += 1
        return finished

    def close(self) -> None:
        """Lets go of files that were not finished."""
        for writer in self._writers.values():
            writer.close()


def _with_ends(units: Iterator[_Unit]) -> Iterator[tuple[_Unit, bool]]:
    """Each unit with whether its document ends there: it does at its last piece, and where the next one is held out."""
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


def _sizes(folder: Path) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the files in `folder`: changes as long as somebody works there."""
    found = []
    for file in folder.rglob("*"):
        try:
            found.append((str(file), file.stat().st_size))
        except FileNotFoundError:
            continue
    return tuple(sorted(found))


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _room(out_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFullError(
            f"{out_dir}: no room for the tokens ({os.strerror(error.errno)}); free some and run again, it goes on where it stopped"
        ) from error
