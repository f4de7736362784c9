"""The slice table (Arrow) and the commit record (JSON): what a checkpoint says about itself."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from checkpoint import objects
from checkpoint.columns import Columns, Places, arrow_table, num_nulls
from checkpoint.coverage import Bools, Ints, coverage_problem
from checkpoint.errors import CorruptCheckpoint, SaveFailed
from checkpoint.format import (
    CODES,
    DIGEST_BYTES,
    FORMAT,
    LARGEST_DIGEST_BYTES,
    MAX_HEADER_BYTES,
    check_version,
    chunk_count,
    fingerprint,
)
from checkpoint.names import ATTEMPT_NAME
from checkpoint.region import Region, Shape

SHARED = -1
"""Owner of a tensor that belongs to no single rank."""

_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("owner", pa.int32()),  # SHARED, or the rank a RankLocal belongs to
        ("dtype", pa.string()),  # safetensors code
        ("global_shape", pa.list_(pa.int64())),
        ("box_offset", pa.list_(pa.int64())),
        ("box_shape", pa.list_(pa.int64())),
        ("start", pa.int64()),  # range of the box's row-major order
        ("stop", pa.int64()),
        ("file", pa.string()),  # path of a FileRecord
        ("byte_start", pa.int64()),  # from the start of the file
        ("digests", pa.list_(pa.uint64())),  # of the slice's consecutive chunks
    ]
)
_KEY = b"checkpoint"
_MAX_DIMS = 64
_MAX_BYTES = 2**63 - 1
"""What torch allows of a tensor."""
MAX_RECORD_BYTES = 64 << 20
"""A larger commit record is neither written nor read."""
_MAX_HEADS = {".safetensors": MAX_HEADER_BYTES + 8, ".arrow": 2 << 30}
_MAX_HEAD_BYTES = 1 << 30
"""Bytes of a file that are read into memory as one, by the end of its name, and of any other."""
_CHUNK_BYTES = frozenset(1 << n for n in range(12, LARGEST_DIGEST_BYTES.bit_length()))
"""Bytes under one digest that a table may have."""
_FILE_NAME = re.compile(rf"(?:{ATTEMPT_NAME.pattern}/)?[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class SavedSlice:
    """A row of the slice table: which elements of which tensor lie where."""

    name: str
    owner: int
    dtype: str
    global_shape: Shape
    region: Region
    file: str
    byte_start: int
    digests: tuple[int, ...]
    chunk_bytes: int = DIGEST_BYTES
    """Bytes under one digest; the same in all rows of a table."""

    @property
    def itemsize(self) -> int:
        return CODES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.region.numel * self.itemsize

    def check(self, source: str) -> None:
        """Raise CorruptCheckpoint unless the row makes sense by itself."""
        problem = None
        if self.dtype not in CODES:
            problem = f"unknown dtype {self.dtype!r}"
        elif any(n < 0 for n in self.global_shape):
            problem = f"negative size in shape {list(self.global_shape)}"
        elif len(self.global_shape) > _MAX_DIMS or _extent(self.global_shape) * self.itemsize > _MAX_BYTES:
            problem = "has a shape that no tensor can have"
        elif self.owner < SHARED:
            problem = f"belongs to rank {self.owner}"
        elif self.byte_start < 0:
            problem = f"starts at byte {self.byte_start}"
        else:
            problem = self.region.problem(self.global_shape)
        if problem is None and len(self.digests) != chunk_count(self.nbytes, self.chunk_bytes):
            problem = f"{len(self.digests)} digests for {self.nbytes} bytes"
        if problem:
            raise CorruptCheckpoint(f"{source}: tensor {self.name!r}: {problem}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a checkpoint and what proves it: its size, and the fingerprint of its first `head_bytes`.

    The rest, the tensors of a shard, is under the digests of the slice table.
    """

    path: str
    """Its name in the checkpoint's folder; or `<another attempt's folder of the same root>/<name>`, to whose tensors
    rows refer."""
    nbytes: int
    head_bytes: int
    fingerprint: str


class SliceTable:
    """The rows of a slice table, found by name without turning the others into Python objects."""

    def __init__(self, table: pa.Table, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        """What the writer said beside the rows."""
        self.source = source
        """What messages call this table."""
        self._table = table.combine_chunks()
        self.chunk_bytes: int = metadata.get("chunk_bytes", DIGEST_BYTES)
        """Bytes of a slice under one digest."""

    @classmethod
    def of(cls, rows: Iterable[SavedSlice], metadata: Mapping[str, Any]) -> SliceTable:
        """Return a table of these rows."""
        columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        for row in rows:
            columns["name"].append(row.name)
            columns["owner"].append(row.owner)
            columns["dtype"].append(row.dtype)
            columns["global_shape"].append(row.global_shape)
            columns["box_offset"].append(row.region.offset)
            columns["box_shape"].append(row.region.shape)
            columns["start"].append(row.region.start)
            columns["stop"].append(row.region.stop)
            columns["file"].append(row.file)
            columns["byte_start"].append(row.byte_start)
            columns["digests"].append(row.digests)
        return cls(pa.table(columns, schema=_SCHEMA), metadata, "new slice table")

    def described(self, metadata: Mapping[str, Any]) -> SliceTable:
        """Return these rows with other metadata."""
        return SliceTable(self._table, metadata, self.source)

    def outline(self) -> pa.Table:
        """Return all that decides whether tensors are whole: the columns but for the digests, of which their number."""
        counts = pc.list_value_length(self._table.column("digests"))
        return self._table.drop_columns(["digests"]).append_column("digests", counts)

    @classmethod
    def merge(cls, tables: Sequence[SliceTable]) -> SliceTable:
        """Return the rows of all tables."""
        return cls(pa.concat_tables([t._table for t in tables]), {}, "merged slice table")

    def to_bytes(self) -> bytes:
        """Return the table as an uncompressed Arrow IPC file."""
        header = {"format": FORMAT, **self.metadata, "chunk_bytes": self.chunk_bytes}
        table = self._table.replace_schema_metadata({_KEY: json.dumps(header).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> SliceTable:
        """Return the table that `to_bytes` wrote. Raises CorruptCheckpoint, UnsupportedFormat."""
        try:
            table = arrow_table(data)
            metadata = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
            if not isinstance(metadata, dict):
                raise ValueError("its schema carries no metadata of this package")
            check_version(metadata.get("format"), source)
            chunk_bytes = metadata.get("chunk_bytes")
            if type(chunk_bytes) is not int or chunk_bytes not in _CHUNK_BYTES:
                raise ValueError(f"chunk_bytes is {chunk_bytes!r}")
            table = table.select(_SCHEMA.names)
            if not table.schema.equals(_SCHEMA):
                raise ValueError(f"its columns are {', '.join(f'{f.name}: {f.type}' for f in table.schema)}")
        except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
            raise CorruptCheckpoint(f"{source}: is not a slice table ({error})") from error
        if any(num_nulls(column) for column in table.columns):
            raise CorruptCheckpoint(f"{source}: has empty cells")
        return cls(table, metadata, source)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def keys(self) -> list[tuple[str, int]]:
        """Return the (name, owner) pairs, in the order of first appearance."""
        return list(self._index)

    def rows(self, name: str, owner: int = SHARED, touching: Region | None = None) -> list[SavedSlice]:
        """Return the checked slices of one tensor; none if there is no such tensor.

        With `touching`, a tensor that is whole may leave out slices that hold nothing of that region.
        """
        order, starts, _ = self._tensors
        index = self._index.get((name, owner))
        if index is None:
            return []
        rows = order[starts[index] : starts[index + 1]]
        if touching is not None and len(rows) > 1 and self._whole[index]:
            rows = self._columns.may_touch(rows, touching)
        return [self.row(i) for i in rows.tolist()]

    def all_rows(self) -> list[SavedSlice]:
        """Return every checked slice."""
        return [self.row(i) for i in range(len(self))]

    def problem(self, name: str, owner: int = SHARED) -> str | None:
        """Say why the slices of a tensor do not make it whole, each element once; None if they do.

        Raises CorruptCheckpoint if one of them makes no sense by itself.
        """
        return None if self._whole[self._index[name, owner]] else _rows_problem(self.rows(name, owner))

    def problems(self) -> list[str]:
        """Return what is wrong with each tensor, by name. Raises as `problem` does."""
        found = []
        kinds: dict[str, bool] = {}
        for name, owner in self._index:
            who = repr(name) if owner == SHARED else f"{name!r} of rank {owner}"
            if kinds.setdefault(name, owner == SHARED) != (owner == SHARED):
                found.append(f"{who} is rank-local on some ranks and not on others")
            problem = self.problem(name, owner)
            if problem:
                found.append(f"{who} {problem}")
        return found

    def places(self) -> Places:
        """Return which bytes of which file each row claims; of rows that make no sense, anything."""
        return self._columns.places()

    def spec(self, name: str, owner: int = SHARED) -> tuple[str, Shape]:
        """Return what the first slice of a tensor says of its dtype, as a safetensors code, and its shape."""
        order, starts, _ = self._tensors
        return self._columns.spec(int(order[starts[self._index[name, owner]]]))

    def names_in(self, file: str) -> list[str]:
        """Return the names of the tensors that have slices in a file, sorted."""
        return sorted(set(self._table.filter(pc.field("file") == file).column("name").to_pylist()))

    @functools.cached_property
    def _columns(self) -> Columns:
        return Columns(self._table, self.chunk_bytes)

    @functools.cached_property
    def _tensors(self) -> tuple[Ints, Ints, list[tuple[str, int]]]:
        return self._columns.tensors()

    @functools.cached_property
    def _index(self) -> dict[tuple[str, int], int]:
        return {key: i for i, key in enumerate(self._tensors[2])}

    @functools.cached_property
    def _whole(self) -> Bools:
        """Whether each tensor is known to be whole; where not, its rows tell."""
        order, starts, _ = self._tensors
        return self._columns.whole_tensors(order, starts)

    def row(self, i: int) -> SavedSlice:
        """Return a row, checked."""
        row = SavedSlice(**self._columns.row(i), chunk_bytes=self.chunk_bytes)
        row.check(self.source)
        return row


class TableForm:
    """A slice table whose digests are still missing: made once for all saves that have the same rows."""

    def __init__(self, slices: Sequence[Sequence[SavedSlice]]) -> None:
        """`slices` are, for each part of a file, the rows of all names of its memory."""
        self._table = SliceTable.of((row for rows in slices for row in rows), {})._table
        counts = [chunk_count(rows[0].nbytes) for rows in slices]
        starts = np.cumsum([0, *counts])
        runs = [(start, count) for start, count, rows in zip(starts, counts, slices, strict=False) for _ in rows]
        self._offsets = pa.array(np.cumsum([0, *(count for _, count in runs)]), pa.int32())
        self._order: Ints = np.concatenate([np.arange(start, start + count) for start, count in runs] or [starts[:0]])
        self._num_digests = int(starts[-1])

    def filled(self, digests: Sequence[int]) -> SliceTable:
        """Return the table, given the digests of all parts in file order."""
        if len(digests) != self._num_digests:
            raise AssertionError(f"{len(digests)} digests for {self._num_digests} chunks")
        values = pa.array(np.array(digests, dtype=np.uint64)[self._order], pa.uint64())
        column = pa.ListArray.from_arrays(self._offsets, values)
        place = _SCHEMA.get_field_index("digests")
        return SliceTable(self._table.set_column(place, _SCHEMA.field(place), column), {}, "new slice table")


def _rows_problem(rows: Sequence[SavedSlice]) -> str | None:
    first = rows[0]
    for row in rows[1:]:
        if (row.dtype, row.global_shape) != (first.dtype, first.global_shape):
            return (
                f"is {first.dtype} {list(first.global_shape)} in {first.file} "
                f"but {row.dtype} {list(row.global_shape)} in {row.file}"
            )
    return coverage_problem(first.global_shape, [row.region for row in rows])


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """COMMIT.json: the checkpoint exists if and only if this record verifies."""

    step: int
    sequence: int
    """Place in the order in which the checkpoints of this root were committed, from 1."""
    run_id: str
    world_size: int
    created: str
    """UTC, ISO 8601."""
    files: tuple[FileRecord, ...]
    shared: Any
    """As JSON; `checkpoint.objects` restores it."""
    versions: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files if "/" not in f.path)

    def to_bytes(self) -> bytes:
        """Return the record's text, which carries its own fingerprint. Raises SaveFailed if no reader would take it."""
        tree = asdict(self) | {"format": FORMAT}
        tree["fingerprint"] = fingerprint(objects.canonical(tree))
        text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False).encode()
        problem = self.problem()
        if len(text) > MAX_RECORD_BYTES:
            problem = f"{len(text)} bytes; allowed are {MAX_RECORD_BYTES}: save less as `shared`"
        if problem:
            raise SaveFailed(f"the commit record cannot be written: {problem}")
        return text

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> CommitRecord:
        """Return the record. Raises CorruptCheckpoint, UnsupportedFormat."""
        tree = objects.parse(data, source)
        if not isinstance(tree, dict):
            raise CorruptCheckpoint(f"{source}: is not a commit record")
        check_version(tree.get("format"), source)
        claimed = tree.pop("fingerprint", None)
        try:
            found = fingerprint(objects.canonical(tree))
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpoint(f"{source}: is no JSON that this package writes ({error})") from error
        if claimed != found:
            raise CorruptCheckpoint(
                f"{source}: was damaged or changed after the commit: its fingerprint does not match; "
                "load another checkpoint"
            )
        del tree["format"]
        try:
            record = cls(**tree | {"files": tuple(FileRecord(**file) for file in tree["files"])})
        except (TypeError, KeyError) as error:
            raise CorruptCheckpoint(f"{source}: is not a commit record ({error})") from error
        problem = record.problem()
        if problem:
            raise CorruptCheckpoint(f"{source}: {problem}")
        return record

    def problem(self) -> str | None:
        """Say which field cannot be what it claims; None if all can."""
        for name in ("step", "sequence", "world_size"):
            if not _is_count(getattr(self, name)):
                return f"{name}: {getattr(self, name)!r} is not a count"
        if not isinstance(self.run_id, str) or not isinstance(self.created, str):
            return "run_id and created must be text"
        for file in self.files:
            if not isinstance(file.path, str) or not _FILE_NAME.fullmatch(file.path):
                return f"files: {file.path!r} is not the name of a file in this folder or in another attempt's"
            if not (_is_count(file.nbytes) and _is_count(file.head_bytes) and file.head_bytes <= file.nbytes):
                return f"files: {file.path}: sizes {file.nbytes!r} and {file.head_bytes!r} make no sense"
            most = _MAX_HEADS.get(file.path[file.path.rfind(".") :], _MAX_HEAD_BYTES)
            if file.head_bytes > most:
                return f"files: {file.path}: a head of {file.head_bytes} bytes; allowed are {most}"
        if self.world_size > len(self.files):
            return f"world_size: {self.world_size} ranks cannot have written {len(self.files)} files"
        if len({file.path for file in self.files}) < len(self.files):
            return "files: one is listed twice"
        if not isinstance(self.versions, dict) or not all(isinstance(v, str) for v in self.versions.values()):
            return "versions must be text by name"
        return None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _extent(shape: Shape) -> int:
    """Return the elements of a shape, its empty dimensions left out: strides overflow by them too."""
    return math.prod(n for n in shape if n)
