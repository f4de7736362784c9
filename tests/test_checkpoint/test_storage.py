"""One contract for every storage, and what a local disk owes beyond it."""

from __future__ import annotations

import abc
import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import random
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from checkpoint import CheckpointConfig, Checkpointer, StorageError
from checkpoint.local import LocalStorage
from checkpoint.remote import FsspecStorage
from checkpoint.storage import Storage, open_storage, sizes


class StorageContract(abc.ABC):
    """What every storage does."""

    @pytest.fixture
    @abc.abstractmethod
    def storage(self, tmp_path: Path) -> Storage:
        """An empty storage."""

    def test_a_written_file_reads_back(self, storage: Storage):
        storage.write("a/b/file", b"hello")
        assert storage.read("a/b/file") == b"hello"
        assert storage.size("a/b/file") == 5

    def test_pieces_are_appended_in_order(self, storage: Storage):
        with storage.create("file") as sink:
            for part in (b"ab", memoryview(b"cd"), bytearray(b"ef")):
                sink.write(part)
        assert storage.read("file") == b"abcdef"

    def test_blocks_make_one_file(self, storage: Storage):
        data = bytearray(os.urandom(100_001))
        borders = [0, 3, 4_096, 5_000, 50_000, 50_001, 98_304, len(data)]
        blocks = list(itertools.pairwise(borders))
        with storage.create_at("folder/file", len(data)) as sink:
            if not sink.in_order:
                random.Random(0).shuffle(blocks)
            for start, end in blocks:
                sink.write_at(start, memoryview(data)[start:end])
        assert storage.read("folder/file") == data

    def test_an_empty_file_of_blocks_is_a_file(self, storage: Storage):
        with storage.create_at("file", 0):
            pass
        assert storage.size("file") == 0

    def test_a_file_that_misses_blocks_is_refused(self, storage: Storage):
        with pytest.raises(StorageError, match="3 of 10 bytes"), storage.create_at("file", 10) as sink:
            sink.write_at(0, memoryview(b"abc"))

    def test_writing_again_replaces_whole(self, storage: Storage):
        storage.write("file", b"the first")
        storage.write("file", b"second")
        assert storage.read("file") == b"second"

    def test_a_new_file_replaces_none(self, storage: Storage):
        storage.write_new("folder/file", b"first")
        with pytest.raises(StorageError, match="file: cannot write: File exists"):
            storage.write_new("folder/file", b"other")
        assert storage.read("folder/file") == b"first"
        assert sizes(storage, "folder") == {"file": 5}

    def test_what_is_absent_has_no_size_and_no_entries(self, storage: Storage):
        assert storage.size("nothing") is None
        assert storage.size("no/folder/file") is None
        assert storage.entries("nothing") == []

    def test_a_folder_has_no_size(self, storage: Storage):
        storage.write("folder/file", b"x")
        assert storage.size("folder") is None

    def test_entries_tell_files_from_folders(self, storage: Storage):
        storage.write("top/file", b"xyz")
        storage.write("top/inner/file", b"x")
        found = {e.name: (e.is_folder, None if e.is_folder else e.nbytes) for e in storage.entries("top")}
        assert found == {"file": (False, 3), "inner": (True, None)}
        assert sizes(storage, "top") == {"file": 3}

    def test_the_time_of_a_change_is_told(self, storage: Storage):
        storage.write("folder/file", b"x")
        (entry,) = storage.entries("folder")
        assert entry.modified_s is not None
        assert entry.modified_s > 1_700_000_000

    def test_reads_start_anywhere_and_stop_at_the_end(self, storage: Storage):
        storage.write("file", bytes(range(100)))
        with storage.open("file") as source:
            middle, tail = bytearray(10), bytearray(10)
            assert source.read_into(40, memoryview(middle)) == 10
            assert source.read_into(95, memoryview(tail)) == 5
        assert middle == bytes(range(40, 50))
        assert tail[:5] == bytes(range(95, 100))

    def test_reading_what_is_absent_names_it(self, storage: Storage):
        with pytest.raises(StorageError, match=r"absent\.bin: cannot read"):
            storage.read("absent.bin")

    def test_removing_takes_files_folders_and_nothing(self, storage: Storage):
        storage.write("folder/a", b"x")
        storage.write("folder/inner/b", b"x")
        storage.remove("folder/a")
        assert storage.size("folder/a") is None
        assert storage.size("folder/inner/b") == 1
        storage.remove("folder")
        assert storage.entries("folder") == []
        storage.remove("folder")

    def test_a_name_that_looks_like_a_pattern_is_a_name(self, storage: Storage):
        for name in ("run1", "run[1]", "run*", "run?"):
            storage.write(f"{name}/inner/file", name.encode())
            storage.write(f"{name}/other", b"x")
        for name in ("run*", "run[1]", "run?"):
            assert storage.read(f"{name}/inner/file") == name.encode()
            storage.remove(f"{name}/other")
            assert sizes(storage, name) == {}
            storage.remove(name)
            assert storage.size(f"{name}/inner/file") is None
            storage.remove(name)
        assert storage.read("run1/inner/file") == b"run1"
        assert [entry.name for entry in storage.entries("")] == ["run1"]

    def test_its_url_opens_it_again(self, storage: Storage):
        storage.write("folder/file", b"x")
        assert open_storage(storage.url).read("folder/file") == b"x"

    def test_what_reopens_it_is_json(self, storage: Storage):
        storage.write("folder/file", b"x")
        if storage.reopening is not None:
            again = open_storage(**json.loads(json.dumps(storage.reopening)))
            assert again.read("folder/file") == b"x"


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(tmp_path / "root")

    def test_a_local_url_is_the_local_storage(self, tmp_path: Path):
        assert isinstance(open_storage(f"file://{tmp_path}"), LocalStorage)

    def test_a_relative_path_stays_what_it_was_when_the_process_moves(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.chdir(tmp_path)
        storage = open_storage("here")
        monkeypatch.chdir("/")
        storage.write("file", b"x")
        assert (tmp_path / "here" / "file").read_bytes() == b"x"

    def test_a_file_is_absent_until_it_is_whole(self, storage: Storage):
        with storage.create("folder/file") as sink:
            sink.write(b"x" * 100)
            assert storage.size("folder/file") is None
        assert storage.size("folder/file") == 100

    def test_a_failed_write_leaves_no_file(self, storage: Storage):
        def fail_half_way() -> None:
            with storage.create("folder/file") as sink:
                sink.write(b"half")
                raise KeyError

        with pytest.raises(KeyError):
            fail_half_way()
        assert storage.size("folder/file") is None
        assert sizes(storage, "folder") == {}

    def test_a_file_is_synced_before_its_name_and_the_folder_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        calls: list[str] = []
        fsync, rename = os.fsync, os.rename

        def spy_fsync(descriptor: int) -> None:
            name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
            calls.append(f"fsync {re.sub('[.][0-9a-f]{8}[.]', '.NEW.', name)}")
            fsync(descriptor)

        def spy_rename(source: Path, target: Path) -> None:
            calls.append(f"rename {target.name}")
            rename(source, target)

        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(os, "rename", spy_rename)
        LocalStorage(tmp_path).write("new/file", b"x")
        assert calls == [f"fsync {tmp_path.name}", "fsync .file.NEW.tmp", "rename file", "fsync new"]

    def test_a_file_of_blocks_is_absent_until_it_is_whole(self, storage: Storage):
        with storage.create_at("folder/file", 10) as sink:
            sink.write_at(0, memoryview(bytes(10)))
            assert storage.size("folder/file") is None
        assert storage.size("folder/file") == 10

    def test_blocks_that_fail_leave_no_file(self, storage: Storage):
        with pytest.raises(StorageError, match="3 of 10 bytes"), storage.create_at("folder/file", 10) as sink:
            sink.write_at(0, memoryview(b"abc"))
        assert sizes(storage, "folder") == {}


class TestLocalStorageThroughTheCache(TestLocalStorage):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(tmp_path / "root", direct_io=False)


# Past the kernel's cache

PAGE = 4096


class Pages:
    """Memory of which every block lies in its page as it will lie in the file."""

    def __init__(self, content: bytes) -> None:
        self._map = mmap.mmap(-1, len(content) + PAGE)
        self._map[: len(content)] = content
        self._memory = memoryview(self._map)

    def block(self, start: int, end: int) -> memoryview:
        return self._memory[start:end]


def pages_in_cache(path: Path) -> int:
    """Return how many pages of a file the kernel holds in memory."""
    nbytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
        states = (ctypes.c_ubyte * -(-nbytes // PAGE))()
        address = ctypes.c_void_p(np.frombuffer(view, np.uint8).ctypes.data)
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(nbytes), states) == 0
    return sum(state & 1 for state in states)


def has_direct_io(folder: Path) -> bool:
    probe = folder / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("direct_io", [True, False])
def test_only_the_edges_of_blocks_stay_in_the_cache(tmp_path: Path, direct_io: bool):
    if not has_direct_io(tmp_path):
        pytest.skip("this file system has no direct I/O")
    content = random.Random(0).randbytes(100 * PAGE + 77)
    memory = Pages(content)
    borders = [0, 3 * PAGE, 20 * PAGE + 5, 60 * PAGE, len(content)]
    storage = LocalStorage(tmp_path, direct_io=direct_io)
    with storage.create_at("file", len(content)) as sink:
        for start, end in itertools.pairwise(borders):
            sink.write_at(start, memory.block(start, end))
    assert pages_in_cache(tmp_path / "file") == (2 if direct_io else 101)
    assert storage.read("file") == content


@pytest.mark.parametrize("writer", ["thread", "process"])
@pytest.mark.parametrize("direct_io", [True, False])
def test_saves_go_past_the_cache_unless_told_not_to(
    tmp_path: Path, direct_io: bool, writer: Literal["thread", "process"]
):
    if not has_direct_io(tmp_path):
        pytest.skip("this file system has no direct I/O")
    config = CheckpointConfig(direct_io=direct_io, writer=writer)
    with Checkpointer(tmp_path / "root", config=config) as ck:
        info = ck.save(1, {"w": torch.arange(1_000_000.0)}).result(20)
    shard = Path(info.path) / "r00000.safetensors"
    num_cached = pages_in_cache(shard)
    assert num_cached < 10 if direct_io else num_cached == -(-shard.stat().st_size // PAGE)


@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_any_size_alignment_and_order_make_the_file(tmp_path: Path, seed: int):
    generator = random.Random(seed)
    content = generator.randbytes(generator.randrange(1, 40 * PAGE))
    memory, unaligned = Pages(content), memoryview(b"x" + content)[1:]
    inner = {generator.randrange(len(content)) for _ in range(generator.randrange(12))}
    borders = sorted({0, len(content)} | inner | {b // PAGE * PAGE for b in inner if generator.random() < 0.3})
    blocks = list(itertools.pairwise(borders))
    generator.shuffle(blocks)
    storage = LocalStorage(tmp_path)
    with storage.create_at("file", len(content)) as sink, ThreadPoolExecutor(3) as pool:
        sources = [memory.block(*block) if generator.random() < 0.7 else unaligned[slice(*block)] for block in blocks]
        list(pool.map(sink.write_at, [start for start, _ in blocks], sources))
    assert storage.read("file") == content


def test_a_full_disk_is_told_before_the_first_block(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    with (
        pytest.raises(StorageError, match=r"file: cannot write: (No space left|File too large)"),
        storage.create_at("folder/file", 1 << 60),
    ):
        pytest.fail("the block was entered")
    assert sizes(storage, "folder") == {}


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_file_system_that_refuses_direct_io_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
):
    refusals = []
    call = getattr(os, refused)

    def refuse(target: object, *arguments: int) -> object:
        flags = arguments[0] if refused == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refusals.append(target)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(target, *arguments)

    monkeypatch.setattr(os, refused, refuse)
    content = random.Random(0).randbytes(10 * PAGE + 7)
    storage = LocalStorage(tmp_path)
    with storage.create_at("file", len(content)) as sink:
        sink.write_at(0, Pages(content).block(0, len(content)))
    assert len(refusals) == 1
    assert storage.read("file") == content


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(f"memory://{uuid.uuid4().hex}/root")


class TestFsspecOverADisk(StorageContract):
    """The generic fsspec path on a file system whose writes really take time to appear."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return FsspecStorage(LocalFileSystem(auto_mkdir=True), str(tmp_path / "root"))


def test_errors_of_a_client_that_are_no_os_errors_become_storage_errors(tmp_path: Path):
    class Unreachable(DirFileSystem):
        def info(self, path: str, **options: object) -> dict[str, object]:
            raise RuntimeError("no credentials")

    storage = FsspecStorage(Unreachable(str(tmp_path), LocalFileSystem()), "root")
    with pytest.raises(StorageError, match="root/file: cannot look at: no credentials"):
        storage.size("file")


def test_a_protocol_that_is_not_installed_says_what_is_missing():
    unknown = next(p for p in ("s3", "gs", "abfs") if _is_missing(p))
    with pytest.raises(StorageError, match=f"{unknown}://bucket: cannot open: .*[Ii]nstall"):
        open_storage(f"{unknown}://bucket")


def _is_missing(protocol: str) -> bool:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        return True
    return False


def test_options_reach_the_file_system(tmp_path: Path):
    storage = open_storage("dir://inner", {"path": str(tmp_path), "target_protocol": "file"})
    storage.write("file", b"x")
    assert (tmp_path / "inner" / "file").read_bytes() == b"x"


@pytest.mark.parametrize("trap", ["link", "pipe"])
def test_what_lies_under_a_temporary_name_is_not_written_through(tmp_path: Path, trap: str):
    (tmp_path / "precious").write_bytes(b"precious")
    if trap == "link":
        (tmp_path / ".file.tmp").symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(tmp_path / ".file.tmp")
    with pytest.raises(StorageError, match="file: cannot create"), LocalStorage(tmp_path).create("file") as sink:
        sink.write(b"other")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_links_are_refused_unless_they_are_to_be_followed(tmp_path: Path):
    (tmp_path / "elsewhere").write_bytes(b"content")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="it is a symbolic link; put the file itself there"):
        LocalStorage(tmp_path / "root").read("link")
    followed = LocalStorage(tmp_path / "root", follow_links=True)
    assert followed.read("link") == b"content"
    assert sizes(followed, "") == {"link": 7}


@pytest.mark.parametrize("fs", ["local", "renaming"])
def test_a_file_that_many_write_at_once_is_one_of_theirs(tmp_path: Path, fs: str):
    remote = FsspecStorage(DirFileSystem(tmp_path, LocalFileSystem()), "root")
    storage = LocalStorage(tmp_path / "root") if fs == "local" else remote
    texts = [bytes([i]) * (1 + 3000 * i) for i in range(4)]

    def write(text: bytes) -> None:
        for _ in range(15):
            storage.write("a/file", text)
            assert storage.read("a/file") in texts

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert [entry.name for entry in storage.entries("a")] == ["file"]
