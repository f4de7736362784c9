"""One contract for every storage, and what a local disk owes beyond it."""

from __future__ import annotations

import abc
import itertools
import os
import random
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from checkpoint import StorageError
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

    def test_its_url_opens_it_again(self, storage: Storage):
        storage.write("folder/file", b"x")
        assert open_storage(storage.url).read("folder/file") == b"x"


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
            calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
            fsync(descriptor)

        def spy_rename(source: Path, target: Path) -> None:
            calls.append(f"rename {target.name}")
            rename(source, target)

        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(os, "rename", spy_rename)
        LocalStorage(tmp_path).write("new/file", b"x")
        assert calls == [f"fsync {tmp_path.name}", "fsync .file.tmp", "rename file", "fsync new"]


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
