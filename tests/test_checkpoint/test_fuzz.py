"""Hostile checkpoints: whatever they say, the answer is a CheckpointError, soon, without much memory, from one folder.

Whoever forges a checkpoint can also forge its fingerprints, so each of these is signed anew after the edit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import Checkpointer, CheckpointError, RankLocal, objects, read, verify
from checkpoint.access import open_reader
from checkpoint.format import CODES, fingerprint
from checkpoint.lazy import open_checkpoint
from checkpoint.local import LocalStorage
from checkpoint.manifest import CommitRecord, SavedSlice, SliceTable
from checkpoint.reader import Reader
from checkpoint.region import Region
from checkpoint.state import pieces_of
from checkpoint.storage import Entry, Source

MEMORY_BYTES = 1 << 30
"""Address space that reading a checkpoint of 20 kB may take."""

fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one checkpoint."""
    root = tmp_path_factory.mktemp("sound")
    with Checkpointer(root) as ck:
        ck.save(1, saved(), {"lr": 0.1, "steps": (1, 2)}, shared={"seen": [1, {2: b"x"}]}).result(20)
    return root


@pytest.fixture
def forged(sound: Path, tmp_path: Path) -> Path:
    """The folder of a copy of it."""
    shutil.copytree(sound, tmp_path / "root")
    (folder,) = (tmp_path / "root").iterdir()
    return folder


def saved() -> dict[str, Any]:
    return {
        "w": torch.arange(12.0).reshape(3, 4),
        "b": torch.arange(5, dtype=torch.int64),
        "rng": RankLocal(torch.arange(3, dtype=torch.uint8)),
    }


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """No more than MEMORY_BYTES of address space beyond what is there; an excess is a MemoryError."""
    (pages, *_) = Path("/proc/self/statm").read_text().split()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(pages) * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Watched(LocalStorage):
    """Remembers every path that was touched."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.touched: set[str] = set()

    def entries(self, folder: str) -> list[Entry]:
        self.touched.add(folder)
        return super().entries(folder)

    def size(self, path: str) -> int | None:
        self.touched.add(path)
        return super().size(path)

    def read(self, path: str) -> bytes:
        self.touched.add(path)
        return super().read(path)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        self.touched.add(path)
        with super().open(path) as source:
            yield source


def look(folder: Path) -> int:
    """Do with a checkpoint all that one can; only CheckpointErrors may come of it. Return how much went well."""
    storage = Watched(folder.parent)
    done = 0
    with little_memory():
        with contextlib.suppress(CheckpointError):
            reader = Reader(storage, folder.name)
            list(reader.problems())
            reader.check_files()
            _ = reader.shared
            for rank in range(2):
                reader.objects(rank)
            reader.mark()
            done += 1
        with contextlib.suppress(CheckpointError):
            found = {k: torch.zeros_like(t) if isinstance(t, torch.Tensor) else t for k, t in saved().items()}
            Reader(storage, folder.name).load(pieces_of(found), 0, strict=False, buffer_bytes=0)
            done += 1
        with contextlib.suppress(CheckpointError):
            read(folder, rank=0)
            done += 1
        with contextlib.suppress(CheckpointError), open_checkpoint(folder, rank=0) as opened:
            assert all(tensor.dtype in CODES.values() for tensor in opened.values())
            for tensor in opened.values():
                if 0 not in tensor.shape:
                    assert tensor[(0,) * len(tensor.shape)].numel() == 1
            done += 1
        with contextlib.suppress(CheckpointError):
            done += verify(folder).ok
    others = {path for path in storage.touched if path != folder.name and not path.startswith(f"{folder.name}/")}
    assert not any(".." in path or path.startswith("/") for path in storage.touched)
    assert all(path.startswith("step-") for path in others)
    return done


def test_all_goes_well_with_a_sound_checkpoint(forged: Path):
    assert look(forged) == 5


def sign(folder: Path, tree: dict[str, Any]) -> None:
    """Write a commit record with a good fingerprint."""
    tree = {key: value for key, value in tree.items() if key != "fingerprint"}
    with contextlib.suppress(ValueError, RecursionError):
        tree["fingerprint"] = fingerprint(objects.canonical(tree))
    (folder / "COMMIT.json").write_text(json.dumps(tree))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "COMMIT.json").read_text())
    return found


def put(folder: Path, name: str, data: bytes) -> None:
    """Replace a file, its proof in the record included."""
    tree = record(folder)
    (folder / name).write_bytes(data)
    (entry,) = (file for file in tree["files"] if file["path"] == name)
    entry.update(nbytes=len(data), head_bytes=len(data), fingerprint=fingerprint(data))
    sign(folder, tree)


numbers = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([-(2**63), -1, 2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]),
)
paths = st.sampled_from(
    [
        "../secret.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "r00000.safetensors/",
        "step-00000001.a0.0123456789abcdef/r00000.safetensors",
        "step-00000001.a0.0123456789abcdef/../secret.safetensors",
        "step-00000001.a0.0123456789abcdef/",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661.a0.0123456789abcdef/x",
        "r00000.safetensors\n",
        "r00000.safetensors\x00",
        "C:\\x",
        "COMMIT.json",
        "slices.arrow",
        "parts",
    ]
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=5), paths),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["$", "value", "path", "x"]), inner, max_size=3),
        st.builds(
            lambda k, v: {"$": k, "value": v}, st.sampled_from(["tuple", "bytes", "dict", "float", "exec"]), inner
        ),
    ),
    max_leaves=5,
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places(value)


@given(data=st.data())
@fuzzed
def test_no_commit_record_is_more_than_refused(forged: Path, data: st.DataObject):
    tree = json.loads((forged / "COMMIT.json").read_text())
    original = json.dumps(tree)
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(list(places(tree))))
        container[key] = data.draw(values)
    sign(forged, tree)
    look(forged)
    (forged / "COMMIT.json").write_text(original)


@given(data=st.data())
@fuzzed
def test_no_row_is_more_than_refused(forged: Path, data: st.DataObject):
    before = {name: (forged / name).read_bytes() for name in ("COMMIT.json", "slices.arrow")}
    rows = open_reader(forged).table.all_rows()
    int64 = numbers.filter(lambda n: -(2**63) <= n < 2**63)
    dims = st.lists(int64, max_size=4).map(tuple)
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(rows) - 1))
        change: dict[str, Any] = data.draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "name": st.sampled_from(["w", "b", "", "x\x00"]),
                    "owner": st.integers(-3, 2),
                    "dtype": st.sampled_from([*CODES, "", "F4"]),
                    "global_shape": dims,
                    "file": paths,
                    "byte_start": int64,
                    "digests": st.lists(st.integers(0, 2**64 - 1), max_size=3).map(tuple),
                    "region": st.builds(Region, dims, dims, int64, int64),
                },
            )
        )
        rows[i] = dataclasses.replace(rows[i], **change)
    rows += rows[: data.draw(st.integers(0, 2))]
    put(forged, "slices.arrow", SliceTable.of(rows, {}).to_bytes())
    look(forged)
    for name, content in before.items():
        (forged / name).write_bytes(content)


@given(position=st.integers(0, 10**6), noise=st.binary(min_size=1, max_size=40))
@fuzzed
def test_no_damaged_arrow_file_is_more_than_refused(forged: Path, position: int, noise: bytes):
    before = {name: (forged / name).read_bytes() for name in ("COMMIT.json", "slices.arrow")}
    data = bytearray(before["slices.arrow"])
    position %= len(data)
    data[position : position + len(noise)] = noise
    put(forged, "slices.arrow", bytes(data))
    look(forged)
    for name, content in before.items():
        (forged / name).write_bytes(content)


def arrow(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def bombs(table: pa.Table) -> dict[str, bytes]:
    """Arrow files that would become far larger than they are, or that hold what no slice table does."""
    many = table.take(pa.array([0] * 100_000))
    texts = pa.array(["x" * 1000]).take(pa.array([0] * len(many)))
    return {
        "zstd": arrow(many, compression="zstd"),
        "lz4": arrow(many, compression="lz4"),
        "dictionary": arrow(table.set_column(0, "name", table.column("name").dictionary_encode())),
        "run end encoded": arrow(many.set_column(0, "name", pc.run_end_encode(texts))),
        "large text": arrow(table.set_column(0, "name", table.column("name").cast(pa.large_string()))),
        "null column": arrow(table.set_column(7, "stop", pa.nulls(table.num_rows))),
        "float": arrow(table.set_column(7, "stop", table.column("stop").cast(pa.float64()))),
        "list of lists": arrow(table.set_column(10, "digests", pa.array([[[1]]] * table.num_rows))),
        "no rows": arrow(table.slice(0, 0)),
        "same rows again": arrow(table.take(pa.array([0, 0, 1, 2]))),
        "nested metadata": arrow(table.replace_schema_metadata({"checkpoint": "[" * 100_000})),
        "number as metadata": arrow(table.replace_schema_metadata({"checkpoint": "9" * 100_000})),
    }


def test_arrow_files_that_unpack_or_are_of_other_types_are_refused(forged: Path):
    with (forged / "slices.arrow").open("rb") as file:
        table = pa.ipc.open_file(file).read_all()
    cases = bombs(table)
    for name, data in cases.items():
        put(forged, "slices.arrow", data)
        look(forged)
        report = verify(forged)
        assert not report.ok, name
    assert len(cases) == 12


@given(text=st.one_of(values.map(json.dumps), st.text(), st.sampled_from(["[" * 5000, '{"$":' * 5000, "9" * 9999])))
@fuzzed
def test_no_objects_are_more_than_refused(forged: Path, text: str):
    before = {name: (forged / name).read_bytes() for name in ("COMMIT.json", "r00000.objects.json")}
    put(forged, "r00000.objects.json", text.encode(errors="surrogatepass"))
    look(forged)
    for name, content in before.items():
        (forged / name).write_bytes(content)


@given(noise=st.binary(max_size=200), position=st.integers(0, 5000))
@fuzzed
def test_no_shard_is_more_than_refused(forged: Path, noise: bytes, position: int):
    path = forged / "r00000.safetensors"
    before = path.read_bytes()
    position %= len(before)
    path.write_bytes(before[:position] + noise + before[position + len(noise) :])
    look(forged)
    path.write_bytes(before)


def huge_record(folder: Path) -> None:
    os.truncate(folder / "COMMIT.json", 1 << 40)  # a hole: it takes no space


def huge_shard(folder: Path) -> None:
    tree = record(folder)
    tree["files"][0].update(nbytes=1 << 40, head_bytes=1 << 40)
    os.truncate(folder / tree["files"][0]["path"], 1 << 40)
    sign(folder, tree)


def huge_table(folder: Path) -> None:
    tree = record(folder)
    (entry,) = (file for file in tree["files"] if file["path"] == "slices.arrow")
    entry.update(nbytes=3 << 30, head_bytes=3 << 30)
    os.truncate(folder / "slices.arrow", 3 << 30)
    sign(folder, tree)


def huge_mark(folder: Path) -> None:
    (folder / "BAD.json").touch()
    os.truncate(folder / "BAD.json", 1 << 40)


def deep_record(folder: Path) -> None:
    text = (folder / "COMMIT.json").read_text().rstrip()
    (folder / "COMMIT.json").write_text(text[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}")


def shard_is_a_link(folder: Path) -> None:
    outside = folder.parent / "secret"
    os.rename(folder / "r00000.safetensors", outside)
    (folder / "r00000.safetensors").symlink_to(outside)


def record_is_a_link(folder: Path) -> None:
    outside = folder.parent / "secret"
    os.rename(folder / "COMMIT.json", outside)
    (folder / "COMMIT.json").symlink_to(outside)


def record_is_a_pipe(folder: Path) -> None:
    (folder / "COMMIT.json").unlink()
    os.mkfifo(folder / "COMMIT.json")


def file_is_a_pipe(folder: Path) -> None:
    tree = record(folder)
    (entry,) = (file for file in tree["files"] if file["path"] == "r00000.objects.json")
    entry.update(nbytes=0, head_bytes=0)
    (folder / entry["path"]).unlink()
    os.mkfifo(folder / entry["path"])
    sign(folder, tree)


def shard_is_a_folder(folder: Path) -> None:
    (folder / "r00000.safetensors").unlink()
    (folder / "r00000.safetensors").mkdir()


def overlapping_tensors(folder: Path) -> None:
    rows = open_reader(folder).table.all_rows()
    (row,) = (r for r in rows if r.name == "w")
    rows = [r for r in rows if r.name != "b"]
    rows.append(SavedSlice("b", -1, "U8", (30,), Region.whole((30,)), row.file, row.byte_start + 8, (1,)))
    put(folder, "slices.arrow", SliceTable.of(rows, {}).to_bytes())


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (huge_record, "no commit record has more than"),
        (huge_shard, "a head of 1099511627776 bytes; allowed are"),
        (huge_table, "a head of 3221225472 bytes; allowed are"),
        (huge_mark, "is too large to be read"),
        (deep_record, "nested|recursion|is not JSON|is no JSON"),
        (shard_is_a_link, "bytes instead of|symbolic link"),
        (record_is_a_link, "symbolic link"),
        (record_is_a_pipe, "nothing was committed here"),
        (file_is_a_pipe, "it is no plain file"),
        (shard_is_a_folder, "is missing"),
        (overlapping_tensors, "claim the same bytes of file"),
    ],
)
def test_other_traps_are_named(forged: Path, forge: Any, message: str):
    forge(forged)
    look(forged)
    with little_memory(), pytest.raises(CheckpointError, match=message):
        told(forged)


def told(folder: Path) -> None:
    """Raise what a verification reports."""
    raise CheckpointError("; ".join(verify(folder).problems))


def test_what_no_reader_would_take_is_not_committed(forged: Path):
    good = CommitRecord.from_bytes((forged / "COMMIT.json").read_bytes(), "r")
    with pytest.raises(CheckpointError, match="save less as `shared`"):
        dataclasses.replace(good, shared="x" * (65 << 20)).to_bytes()
