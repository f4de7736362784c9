"""Token shards on disk: Arrow IPC files read in place, or Parquet; written beside, then renamed.

A shard is a sequence of record batches of about BATCH_TOKENS tokens. A row is a document or a piece of one:
`tokens` with the end-of-document token where the document ends, `document` its index within the split, `ends`
whether it ends here. Nothing is compressed in an Arrow shard, so that its buffers are numpy arrays as they
lie in the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from trainsys.data.errors import PreparedError

ShardFormat = Literal["arrow", "parquet"]
TokenDtype = Literal["uint16", "uint32"]
Tokens = NDArray[np.uint16] | NDArray[np.uint32]

BATCH_TOKENS = 1 << 20
META = "meta.json"
"""Manifest of a prepared folder."""
PREPARED_KIND = "trainsys.tokens"
"""What a manifest says it is; as bytes, the key that marks the schema of a shard."""
PREPARED_METADATA_KEY = PREPARED_KIND.encode()


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the manifest says of one shard."""

    name: str
    tokens: int
    file_bytes: int
    digest: str
    """xxh3_128 of tokens, row lengths and document indices; the same for both formats."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One record batch of a shard, as views of the mapped file."""

    values: Tokens
    offsets: NDArray[np.int32]
    """Row i is values[offsets[i]:offsets[i + 1]]."""
    documents: NDArray[np.int64]
    """Document index of each row."""


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest of the two dtypes that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one shard to `path`; complete and on disk after `finish()`, and no file of use before.

    `unigram`, int64 [vocab_size], counts what is written, where one is passed.
    """

    def __init__(
        self, path: Path, dtype: TokenDtype, format: ShardFormat, unigram: NDArray[np.int64] | None = None
    ) -> None:
        self.tokens = 0
        self._path = path
        self._unigram = unigram
        self._dtype = np.dtype(dtype)
        self._schema = pa.schema(
            [
                ("tokens", pa.list_(pa.from_numpy_dtype(self._dtype))),
                ("document", pa.int64()),
                ("ends", pa.bool_()),
            ],
            metadata={PREPARED_METADATA_KEY: b"1"},
        )
        self._rows: list[NDArray[Any]] = []
        self._documents: list[int] = []
        self._ends: list[bool] = []
        self._pending = 0
        self._hash = xxhash.xxh3_128()
        self._file = path.open("wb")
        self._writer: Any = (
            pa.ipc.new_file(self._file, self._schema)
            if format == "arrow"
            else pq.ParquetWriter(self._file, self._schema, compression="zstd", use_dictionary=False)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, tokens: NDArray[Any], document: int, *, end: int | None) -> None:
        """Adds a row; `end` is the end-of-document token where the document ends here."""
        self._rows.append(tokens)
        if end is not None:
            self._rows.append(np.array([end], self._dtype))
        self._documents.append(document)
        self._ends.append(end is not None)
        self._pending += len(tokens) + (end is not None)
        if self._pending >= BATCH_TOKENS:
            self._flush()

    def finish(self) -> ShardInfo:
        """Completes the file, waits until it is on disk, and says what it holds."""
        self._flush()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        file_bytes = self._file.tell()
        self.close()
        return ShardInfo(self._path.name, self.tokens, file_bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Lets go of the file, complete or not."""
        if isinstance(self._writer, pq.ParquetWriter):
            # Its finaliser would write a footer to what is no file any more.
            self._writer.is_open = False
        self._file.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        values = np.concatenate(self._rows, dtype=self._dtype, casting="unsafe")
        lengths = self._row_lengths()
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        documents = np.array(self._documents, np.int64)
        _digest_rows(self._hash, values, offsets, documents)
        if self._unigram is not None:
            self._unigram += np.bincount(values, minlength=len(self._unigram))
        columns = [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            pa.array(documents),
            pa.array(self._ends),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self.tokens += self._pending
        self._rows, self._documents, self._ends, self._pending = [], [], [], 0

    def _row_lengths(self) -> NDArray[np.int64]:
        rows = iter(self._rows)
        lengths = [len(next(rows)) + (len(next(rows)) if ends else 0) for ends in self._ends]
        return np.array(lengths, np.int64)


def read_segments(path: Path) -> list[Segment]:
    """The record batches of an Arrow shard, as views of the mapped file; nothing is read yet.

    Raises:
        PreparedError: not a whole Arrow file, or not one of ours.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        _check_schema(reader.schema, path)
        return [_segment(reader.get_batch(index)) for index in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise PreparedError(f"{path}: corrupt shard: {' '.join(str(error).split())}; prepare the data again") from error


def shard_digest(path: Path, format: ShardFormat) -> str:
    """The digest of what the shard holds now, read in full.

    Raises:
        PreparedError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    for segment in read_segments(path) if format == "arrow" else _parquet_segments(path):
        _digest_rows(digest, segment.values, segment.offsets, segment.documents)
    return digest.hexdigest()


def _parquet_segments(path: Path) -> Iterator[Segment]:
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, path)
            for group in range(file.num_row_groups):
                yield _segment(file.read_row_group(group).combine_chunks().to_batches()[0])
    except (pa.ArrowException, OSError) as error:
        raise PreparedError(f"{path}: corrupt shard: {' '.join(str(error).split())}; prepare the data again") from error


def _check_schema(schema: pa.Schema, path: Path) -> None:
    if PREPARED_METADATA_KEY not in (schema.metadata or {}):
        raise PreparedError(f"{path}: not a shard of tokens written by trainsys")


def _segment(batch: pa.RecordBatch) -> Segment:
    rows = batch.column(0)
    return Segment(
        values=rows.values.to_numpy(zero_copy_only=True),
        offsets=rows.offsets.to_numpy(zero_copy_only=True),
        documents=batch.column(1).to_numpy(zero_copy_only=True),
    )


def _digest_rows(digest: Any, values: Tokens, offsets: NDArray[np.int32], documents: NDArray[np.int64]) -> None:
    for array in (values, offsets, documents):
        digest.update(np.ascontiguousarray(array).data)
