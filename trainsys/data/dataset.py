"""Windows of tokens out of the shards of a split, read where they lie."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainsys.data.errors import PreparedError, TooFewTokensError
from trainsys.data.prepared import Split, read_prepared
from trainsys.data.shard import Segment, Tokens, read_segments


class TokenDataset:
    """One split as fixed windows: documents one after another, each with its end-of-document token.

    Window i feeds tokens i*T to i*T + T - 1, T = sequence_length, and looks one further for its last target:
    windows do not overlap, run over document and shard boundaries, and feed every token once, but for the
    fewer than T + 1 at the very end. Opening costs the manifest; a shard is mapped when first touched and
    never copied as a whole. Read-only, for any number of threads.
    """

    def __init__(self, prepared: Path, split: Split, sequence_length: int) -> None:
        """Opens the split.

        Raises:
            ValueError: sequence_length below 1. PreparedError: the folder is corrupt, or its shards are
            Parquet (`ensure_prepared` turns them to Arrow). TooFewTokensError: not one window.
        """
        if sequence_length < 1:
            raise ValueError(f"data.sequence_length: {sequence_length}; at least 1")
        self.info = read_prepared(prepared)
        if self.info.format != "arrow":
            raise PreparedError(
                f"{prepared}: its shards are {self.info.format}; ensure_prepared makes Arrow shards of them"
            )
        self.split: Split = split
        self.sequence_length = sequence_length
        self.num_tokens = self.info.split(split).tokens
        self._folder = prepared / split
        self._shards = self.info.split(split).shards
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._segments: dict[int, tuple[list[int], list[Segment]]] = {}
        if len(self) < 1:
            raise TooFewTokensError(self._too_few())

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens, the split and the window length: equal fingerprints, equal windows."""
        return f"{self.info.fingerprint}:{self.split}:{self.sequence_length}"

    def __len__(self) -> int:
        """Windows in one epoch."""
        return max(self.num_tokens - 1, 0) // self.sequence_length

    def window(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokens and document numbers of window `index`: int64 [T+1] and int32 [T+1], the caller's own.

        Documents are numbered from 0 within the window. An end-of-document token belongs to the document it
        ends.

        Raises:
            IndexError: no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.sequence_length
        tokens = np.empty(self.sequence_length + 1, np.int64)
        documents = np.empty(self.sequence_length + 1, np.int32)
        filled = 0
        first: int | None = None
        for segment, begin, end in self._spans(start, start + len(tokens)):
            count = end - begin
            tokens[filled : filled + count] = segment.values[begin:end]
            row = int(np.searchsorted(segment.offsets, begin, "right")) - 1
            last_row = int(np.searchsorted(segment.offsets, end, "left"))
            rows = segment.documents[row:last_row]
            first = int(rows[0]) if first is None else first
            if len(rows) == 1:
                documents[filled : filled + count] = rows[0] - first
            else:
                edges = np.clip(segment.offsets[row : last_row + 1], begin, end)
                documents[filled : filled + count] = np.repeat(rows - first, np.diff(edges))
            filled += count
        return tokens, documents

    def views(self, start: int, stop: int) -> list[Tokens]:
        """The tokens `start` to `stop` - 1 of the split as read-only views of the mapped shards."""
        return [segment.values[begin:end] for segment, begin, end in self._spans(start, stop)]

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
        """The segments under [start, stop), each with the part of it that lies there."""
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            starts, segments = self._opened(shard)
            index = bisect_right(starts, start) - 1
            end = min(stop, starts[index + 1])
            yield segments[index], start - starts[index], end - starts[index]
            start = end

    def _opened(self, shard: int) -> tuple[list[int], list[Segment]]:
        """Segments of a shard and where each begins in the split (one entry more than segments)."""
        opened = self._segments.get(shard)
        if opened is None:
            path = self._folder / self._shards[shard].name
            segments = read_segments(path)
            starts = [*accumulate((len(s.values) for s in segments), initial=self._starts[shard])]
            if starts[-1] != self._starts[shard + 1]:
                found = starts[-1] - starts[0]
                wanted = self._shards[shard].tokens
                raise PreparedError(f"{path}: corrupt shard: {found} of {wanted} tokens; prepare the data again")
            opened = self._segments[shard] = (starts, segments)
        return opened

    def _too_few(self) -> str:
        info = self.info
        if self.split == "validation" and not self.num_tokens:
            return (
                f"{info.source}: nothing is held out; set data.validation_fraction or data.validation_path, "
                "or evaluation.sequences=0"
            )
        remedy = "more text, or a smaller data.sequence_length"
        if self.split == "validation":
            remedy += ", or more of it held out (data.validation_fraction, data.validation_path)"
        needed = self.sequence_length + 1
        return f"{info.source}: {self.num_tokens} tokens in {self.split}, one window needs {needed}: {remedy}"
