"""Documents out of files, in pieces of bounded size, from any point on.

A document is a text file, a JSONL line, or a Parquet row. One longer than LONG_DOCUMENT_BYTES comes in
sections of about SECTION_BYTES, cut after a line's end: memory stays bounded, and a book in one file can
still be held out in part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainsys.data.errors import SourceError, TextKeyError, UnreadableSourceError
from trainsys.data.shard import PREPARED_METADATA_KEY
from trainsys.data.source import SourceFile

LONG_DOCUMENT_BYTES = 256 * 1024
SECTION_BYTES = 64 * 1024
TOKENS_COLUMN = "tokens"
"""Parquet column of ready-made token ids, taken where the text column is absent."""

_ROWS_PER_READ = 128

Cursor = tuple[int, int, int]
"""Where reading of a file continues, in numbers that mean something to its reader only. START reads all."""
START: Cursor = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a section of a long one."""

    content: bytes | NDArray[np.int64]
    """UTF-8 text (or the bytes of a text file as they are), or token ids without an end-of-document token."""
    last: bool
    """The document ends here."""
    cursor: Cursor
    """Reading from here on yields what follows this piece."""
    source_bytes: int
    """Bytes of the stored file consumed so far: progress, not a position."""


def read_pieces(file: SourceFile, text_key: str, cursor: Cursor = START) -> Iterator[Piece]:
    """The pieces of one file after `cursor`, in order; an empty document is one piece without content.

    Raises:
        UnreadableSourceError: the file or one of its lines is broken; the message says which line.
        TextKeyError: no such field or column, or it does not hold text; the message names those that exist.
    """
    if file.kind == "text":
        return _text_pieces(file, cursor)
    if file.kind == "jsonl":
        return _jsonl_pieces(file, text_key, cursor)
    return _parquet_pieces(file, text_key, cursor)


def cut(stream: IO[bytes], *, inside: bool = False) -> Iterator[tuple[bytes, bool]]:
    """The sections of the document in `stream`, each with whether it is the last.

    `inside`: the stream stands at a section's start within a long document. Cuts depend only on the bytes
    after the section's start, so that reading from there finds the same ones.
    """
    if not inside:
        buffer = _read_fully(stream, LONG_DOCUMENT_BYTES + 1)
        if len(buffer) <= LONG_DOCUMENT_BYTES:
            yield buffer, True
            return
    else:
        buffer = b""
    ended = False
    while True:
        if not ended and len(buffer) <= 2 * SECTION_BYTES:
            more = _read_fully(stream, LONG_DOCUMENT_BYTES)
            ended = len(more) < LONG_DOCUMENT_BYTES
            buffer += more
        if len(buffer) <= 2 * SECTION_BYTES:
            if buffer:
                yield buffer, True
            return
        end = buffer.find(b"\n", SECTION_BYTES - 1, 2 * SECTION_BYTES) + 1
        end = end or _character_start(buffer, 2 * SECTION_BYTES)
        yield buffer[:end], False
        buffer = buffer[end:]


def _text_pieces(file: SourceFile, cursor: Cursor) -> Iterator[Piece]:
    """Cursor: bytes of the document already read."""
    offset = cursor[0]
    with file.open() as (stream, stored):
        _skip(stream, offset, file)
        for content, last in cut(stream, inside=offset > 0):
            offset += len(content)
            yield Piece(content, last, (offset, 0, 0), stored.tell())


def _jsonl_pieces(file: SourceFile, text_key: str, cursor: Cursor) -> Iterator[Piece]:
    """Cursor: start of a line, lines before it, pieces of its document already read."""
    offset, line_index, skipped = cursor
    with file.open() as (stream, stored):
        _skip(stream, offset, file)
        for line in stream:
            end = offset + len(line)
            text = _text_of_line(line, text_key, f"{file.url}:{line_index + 1}", first=offset == 0)
            if text is not None:
                for index, (content, last) in enumerate(cut(io.BytesIO(text))):
                    after = (end, line_index + 1, 0) if last else (offset, line_index, index + 1)
                    if index >= skipped:
                        yield Piece(content, last, after, stored.tell())
            offset, line_index, skipped = end, line_index + 1, 0


def _text_of_line(line: bytes, text_key: str, where: str, *, first: bool) -> bytes | None:
    if first:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreadableSourceError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UnreadableSourceError(f"{where}: a JSON object is wanted, this is a {type(row).__name__}")
    if text_key not in row:
        raise TextKeyError(f"{where}: no field '{text_key}'; {_choice(row)} (data.text_key)")
    text = row[text_key]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise TextKeyError(f"{where}: field '{text_key}' holds a {type(text).__name__}, not a string")
    # A lone surrogate ("\ud800") is legal JSON and no text: it becomes "?".
    return text.encode("utf-8", "replace")


def _parquet_pieces(file: SourceFile, text_key: str, cursor: Cursor) -> Iterator[Piece]:
    """Cursor: row group, row in it, pieces of that row's document already read."""
    first_group, first_row, skipped = cursor
    with file.open() as (_, stored):
        try:
            parquet = pq.ParquetFile(stored)
            columns = _parquet_columns(parquet.schema_arrow, text_key, file.url)
            for group in range(first_group, parquet.num_row_groups):
                consumed = (file.size or 0) * (group + 1) // parquet.num_row_groups
                row = 0
                for batch in parquet.iter_batches(_ROWS_PER_READ, row_groups=[group], columns=columns):
                    unread = max(first_row - row, 0) if group == first_group else 0
                    row += min(unread, batch.num_rows)
                    for pieces in _rows(batch.slice(unread), f"{file.url}: row group {group}"):
                        for index, (content, last, row_done) in enumerate(pieces):
                            if index >= skipped:
                                after = (group, row + 1, 0) if row_done else (group, row, index + 1)
                                yield Piece(content, last, after, consumed)
                        row, skipped = row + 1, 0
        except pa.ArrowException as error:
            what = " ".join(str(error).split())
            raise UnreadableSourceError(f"{file.url}: not a readable Parquet file: {what}") from error


def _parquet_columns(schema: pa.Schema, text_key: str, url: str) -> list[str]:
    prepared = PREPARED_METADATA_KEY in (schema.metadata or {})
    if text_key in schema.names:
        kind = schema.field(text_key).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        if any(is_text(value) for is_text in text):
            return [text_key]
        if text_key != TOKENS_COLUMN:
            raise TextKeyError(f"{url}: column '{text_key}' holds {kind}, not strings")
    if TOKENS_COLUMN in schema.names:
        kind = schema.field(TOKENS_COLUMN).type
        if _is_list(kind) and pa.types.is_integer(kind.value_type):
            return [TOKENS_COLUMN, *(["ends"] if prepared else [])]
    raise TextKeyError(
        f"{url}: no column '{text_key}' of text and no column '{TOKENS_COLUMN}' of integer lists; "
        f"{_choice(schema.names)} (data.text_key)"
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


_RowPieces = Iterator[tuple[bytes | NDArray[np.int64], bool, bool]]


def _rows(batch: pa.RecordBatch, where: str) -> Iterator[_RowPieces]:
    """Per row: its pieces, each with whether it ends the document, and whether it ends the row."""
    column = batch.column(0)
    if not _is_list(column.type):
        for text in column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
            yield ((content, last, last) for content, last in cut(io.BytesIO(text or b"")))
        return
    ends = batch.column(1).to_pylist() if batch.num_columns > 1 else None
    for index in range(batch.num_rows):
        values = column[index].values
        if values is not None and values.null_count:
            raise UnreadableSourceError(f"{where}: column '{TOKENS_COLUMN}' holds a null token")
        tokens = np.zeros(0, np.int64) if values is None else values.to_numpy(zero_copy_only=False)
        yield _cut_tokens(tokens.astype(np.int64), ends is None or ends[index])


def _cut_tokens(tokens: NDArray[np.int64], ends: bool) -> _RowPieces:
    # No piece is the last token alone: that may be the end-of-document token, without which a piece is empty.
    for start in range(0, max(len(tokens) - 1, 1), LONG_DOCUMENT_BYTES):
        row_done = start + LONG_DOCUMENT_BYTES >= len(tokens) - 1
        stop = len(tokens) if row_done else start + LONG_DOCUMENT_BYTES
        yield tokens[start:stop], ends and row_done, row_done


def _choice(names: Any) -> str:
    return f"those that exist: {', '.join(map(str, names))}" if names else "it has none"


def _read_fully(stream: IO[bytes], num_bytes: int) -> bytes:
    parts: list[bytes] = []
    while num_bytes > 0 and (part := stream.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _skip(stream: IO[bytes], offset: int, file: SourceFile) -> None:
    if offset and not file.compression and stream.seekable():
        stream.seek(offset)
        return
    while offset > 0:
        skipped = len(stream.read(min(offset, 1 << 20)))
        if skipped == 0:
            raise SourceError(f"{file.url}: shorter than when its preparation began")
        offset -= skipped


def _character_start(buffer: bytes, end: int) -> int:
    """The last cut at or before `end` that splits no UTF-8 character."""
    start = end
    while start > end - 3 and buffer[start] & 0xC0 == 0x80:
        start -= 1
    return start if buffer[start] & 0xC0 != 0x80 else end
