"""From rings to where a run's events are kept: Arrow streams on any file system, in parts, by whoever is not a rank.

A shipper belongs to a node's agent, or to a process of its own (`python -m faulttol ship`): the ranks do nothing for
it. What it holds is bounded: when the target cannot be written, the oldest rows go, and are counted. It goes on where
another left off: every part says until where nothing was open. A part is written under a name of its own and then
moved, but a reader takes what it finds: of a file that is cut off, the whole batches.

    TARGET/generation0/rank00003/events-00000.arrows
                                 marks-00000.arrows
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from faulttol import table
from faulttol.durable import is_there
from faulttol.errors import RingError, ShipError
from faulttol.events import CollectiveEvent, RankRecord, StepMark
from faulttol.ring import RingReader, generation_of

_ABOUT = b"faulttol"
_PART = re.compile(r"(events|marks)-(\d+)\.arrows")
_BATCH_ROWS = 1024


class Shipper:
    """Ships one ring; `ship()` now and then, `close()` in the end. Not thread-safe."""

    def __init__(self, ring: Path, target: str, *, max_rows: int = 65536) -> None:
        """`target`: a path or a URI that pyarrow knows, or `fsspec+` and one that fsspec knows.

        Raises: FileNotFoundError before the rank made its ring; RingError; ShipError for a target that cannot be.
        """
        self._reader = RingReader(ring)
        try:
            self._system, root = file_system(target)
            info = self._reader.info
            self._folder = f"{root}/generation{info.generation}/rank{info.rank:05d}"
            self._next, self._done = self._left_off()
        except (OSError, ShipError):
            self._reader.close()
            raise
        self._rows: deque[CollectiveEvent | StepMark] = deque(maxlen=max_rows)
        self._open: set[int] = set()
        self._newest = self._done
        self.num_dropped = 0
        """Rows that were given up because the target could not be written."""

    def ship(self) -> int:
        """Write a part of what is new, if anything is; return its rows.

        Raises: OSError when the target cannot be written; what was to be written is kept for the next call.
        """
        record = self._reader.poll()
        rows: list[CollectiveEvent | StepMark] = [*record.events, *record.marks]
        for row in rows:
            if row.index <= self._done:
                continue
            if len(self._rows) == self._rows.maxlen:
                self.num_dropped += 1
            self._rows.append(row)
            self._newest = max(self._newest, row.index)
            if isinstance(row, CollectiveEvent):
                (self._open.add if row.state == "begun" else self._open.discard)(row.index)
        if not self._rows:
            return 0
        events = [row for row in self._rows if isinstance(row, CollectiveEvent)]
        marks = [row for row in self._rows if isinstance(row, StepMark)]
        about = self._about(record, events)
        self._system.create_dir(self._folder, recursive=True)
        if marks:
            self._write("marks", table.marks_table(marks), about)
        self._write("events", table.events_table(events), about)
        self._next += 1
        shipped = len(self._rows)
        self._rows.clear()
        return shipped

    def close(self) -> None:
        """Ship what is left, and let go of the ring. Raises: OSError as `ship`; the ring is let go of anyway."""
        try:
            self.ship()
        finally:
            self.release()

    def release(self) -> None:
        """Let go of the ring without shipping. Idempotent."""
        self._reader.close()

    def _about(self, record: RankRecord, events: list[CollectiveEvent]) -> dict[str, Any]:
        info = self._reader.info
        return {
            "rank": info.rank,
            "world_size": info.world_size,
            "generation": info.generation,
            "host": info.host,
            "boot_id": info.boot_id,
            "created_ns": info.created_ns,
            "created_wall_ns": info.created_wall_ns,
            "now_ns": record.now_ns,
            "num_lost": record.num_lost + self.num_dropped,
            "done": min(self._open, default=self._newest + 1) - 1,
            "groups": table.group_ranks(events),
        }

    def _write(self, what: str, rows: Any, about: dict[str, Any]) -> None:
        path = f"{self._folder}/{what}-{self._next:05d}.arrows"
        schema = rows.schema.with_metadata({_ABOUT: json.dumps(about)})
        options = pa.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=True)
        with (
            self._system.open_output_stream(path + ".part") as stream,
            pa.ipc.new_stream(stream, schema, options=options) as writer,
        ):
            writer.write_table(rows.replace_schema_metadata(schema.metadata), max_chunksize=_BATCH_ROWS)
        self._system.move(path + ".part", path)

    def _left_off(self) -> tuple[int, int]:
        """Return the number of the next part, and the index until which all is shipped."""
        parts = sorted(_parts(self._system, self._folder, "events"))
        if not parts:
            return 0, 0
        number, path = parts[-1]
        about, _ = _read(self._system, path)
        return number + 1, about["done"] if about else 0


class Convoy:
    """Ships every ring of a folder, those that come later too, from a thread of its own until `close()`."""

    def __init__(
        self, folder: Path, target: str, *, every_s: float = 10.0, max_rows: int = 65536, removes: bool = False
    ) -> None:
        """`removes`: whether a ring goes once it is shipped and the job has begun two more generations.

        Raises: ShipError for a target that cannot be; ValueError for an interval that is not above 0.
        """
        if not every_s > 0:
            raise ValueError(f"every_s: {every_s} is not above 0")
        file_system(target)
        self._folder, self._target, self._max_rows, self._removes = folder, target, max_rows, removes
        self._shippers: dict[Path, Shipper] = {}
        self._done: set[Path] = set()
        """Rings that nobody writes any more, and that are shipped."""
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._go, args=(every_s,), name="faulttol-convoy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ship what is left. Idempotent. Raises: OSError, ShipError when that fails at the last try either."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        self._ship()
        for shipper in self._shippers.values():
            shipper.release()
        if isinstance(self._error, OSError):
            raise self._error
        if self._error is not None:
            raise ShipError(f"{self._target}: {self._error}") from self._error

    def __enter__(self) -> Convoy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _go(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            self._ship()

    def _ship(self) -> None:
        self._error = None
        try:
            paths = sorted(self._folder.rglob("*.ring"))
            newest: dict[Path, int] = {}
            for path in paths:
                newest[path.parent] = max(newest.get(path.parent, 0), generation_of(path) or 0)
            for path in paths:
                if path not in self._done:
                    generation = generation_of(path)
                    self._ship_one(path, is_old=generation is not None and generation < newest[path.parent] - 1)
            for path in self._shippers.keys() - set(paths):  # not shown for once, or removed and still open here
                self._ship_one(path, is_old=not is_there(path))
        except OSError as error:  # the folder cannot be read now
            self._error = error

    def _ship_one(self, path: Path, *, is_old: bool) -> None:
        try:
            if path not in self._shippers:
                self._shippers[path] = Shipper(path, self._target, max_rows=self._max_rows)
            if self._shippers[path].ship() or not is_old:
                return
            self._shippers.pop(path).release()
            self._done.add(path)
            if self._removes:
                path.unlink(missing_ok=True)
        except RingError:  # none of ours
            return
        except Exception as error:  # noqa: BLE001  file systems of fsspec raise what they like; what was to be written
            self._error = error  # is kept, and tried again


def shipped(target: str) -> list[RankRecord]:
    """Return what is there of every rank and generation; torn files give what is whole in them.

    Raises: ShipError for a target that cannot be; FileNotFoundError when nothing is there.
    """
    system, root = file_system(target)
    found = []
    selector = fs.FileSelector(root, recursive=True)
    for path in sorted(info.path for info in system.get_file_info(selector) if info.type == fs.FileType.File):
        named = _PART.fullmatch(path.rpartition("/")[2])
        if named is None:
            continue
        about, batches = _read(system, path)
        if about is None:
            continue
        events: list[CollectiveEvent] = []
        marks: list[StepMark] = []
        for batch in batches:
            if named[1] == "events":
                events += table.events_of(batch, about["groups"])
            else:
                marks += table.marks_of(batch)
        found.append(
            RankRecord(
                rank=about["rank"],
                world_size=about["world_size"],
                generation=about["generation"],
                events=tuple(events),
                marks=tuple(marks),
                now_ns=about["now_ns"],
                num_lost=about["num_lost"],
            )
        )
    return table.merge(found)


def file_system(target: str) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path in it.

    Raises: ShipError when pyarrow knows none, or fsspec lacks what it takes.
    """
    try:
        system, path = fs.FileSystem.from_uri(target if "://" in target else str(Path(target).absolute()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, ValueError) as error:
        raise ShipError(
            f"{target}: no file system: {error}; a path, s3://, gs://, hdfs:// or fsspec+X:// is"
        ) from error
    return system, path.rstrip("/")


def _parts(system: Any, folder: str, what: str) -> Iterator[tuple[int, str]]:
    for info in system.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        named = _PART.fullmatch(info.base_name)
        if named is not None and named[1] == what:
            yield int(named[2]), info.path


def _read(system: Any, path: str) -> tuple[dict[str, Any] | None, list[Any]]:
    """Return what a part says of itself, None if it is not even whole there, and its whole batches."""
    with system.open_input_file(path) as file:
        content = file.read()
    batches: list[Any] = []
    about: dict[str, Any] | None = None
    torn = (pa.ArrowInvalid, OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError)
    with contextlib.suppress(*torn), pa.ipc.open_stream(content) as reader:
        about = json.loads(reader.schema.metadata[_ABOUT])
        for batch in reader:
            batch.validate(full=True)
            batches.append(batch)
    return about, batches
