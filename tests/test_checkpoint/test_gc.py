"""What goes while others are at it: collected beside saves that refer to it, superseded beside who reads it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, SaveFailed, StorageError
from checkpoint.catalog import RETIRED
from checkpoint.config import RemoteConfig
from checkpoint.local import LocalStorage
from checkpoint.names import COMMIT, REMOVAL, TABLE, AttemptName
from checkpoint.promotion import Promoter
from checkpoint.retention import Removal, collect, remove
from checkpoint.storage import Entry, Source, Storage, open_storage


def nothing(operation: str) -> None:
    """Do nothing."""


class Stepped(LocalStorage):
    """Tells of each operation before it happens."""

    before: Callable[[str], None] = staticmethod(nothing)

    def entries(self, folder: str) -> list[Entry]:
        self.before(f"entries {folder}")
        return super().entries(folder)

    def size(self, path: str) -> int | None:
        self.before(f"size {path}")
        return super().size(path)

    def write(self, path: str, data: bytes) -> None:
        self.before(f"write {path}")
        super().write(path, data)

    def show(self, path: str, data: bytes) -> None:
        self.before(f"show {path}")
        super().show(path, data)

    def write_new(self, path: str, data: bytes) -> None:
        self.before(f"write {path}")
        super().write_new(path, data)

    def remove(self, path: str) -> None:
        """Remove what a folder holds one by one, by name: the mark is not the last."""
        self.before(f"remove {path}")
        for entry in self.entries(path):
            self.remove(f"{path}/{entry.name}")
        super().remove(path)

    def open(self, path: str) -> contextlib.AbstractContextManager[Source]:
        self.before(f"open {path}")
        return super().open(path)


def gc(storage: Storage) -> list[Removal]:
    """Keep one checkpoint."""
    return list(collect(storage, keep_last=1, keep_every=0, abandoned=lambda name: False))


FIRST, SECOND = (AttemptName.of(step, 0, "run").folder for step in (1, 2))
OF_A_SAVE = {
    "compare": f"size {FIRST}/{REMOVAL}",
    "vote": f"show {SECOND}",
    "look": f"entries {FIRST}",
    "table": f"write {SECOND}/{TABLE}",
    "commit": f"write {SECOND}/{COMMIT}",
}
"""Operations of a save that refers to the first checkpoint: before them it stands still."""
OF_A_COLLECTION = ("plan", "mark", "look", "remove 0")
"""Before these of its operations the save goes on, and ends."""
REMOVALS = tuple(f"remove {i}" for i in range(1, 9))
"""Before what else it removes, file by file, the last of them after all is gone."""


def moment_of(operation: str, seen: Sequence[str]) -> str:
    """Return which part of a collection an operation belongs to."""
    if operation.startswith("write"):
        return "mark"
    if operation.startswith("remove"):
        return f"remove {len({moment for moment in seen if moment.startswith('remove')})}"
    return "between" if "remove 0" in seen else "look" if "mark" in seen else "plan"


def beside(root: Path, storage: Stepped, save_moment: str, gc_moment: str) -> BaseException | None:
    """Let a save stand still at one moment, and go on at one of a collection; return its error.

    It goes on afterwards where the collection, which saw it, has no such moment.
    """
    state = {"frozen": torch.arange(9.0), "other": torch.arange(5.0)}
    collector = Stepped(root)
    arrived, go = threading.Event(), threading.Event()
    seen: list[str] = []

    def stand_still(operation: str) -> None:
        if OF_A_SAVE[save_moment] in operation and not arrived.is_set():
            arrived.set()
            assert go.wait(20)

    def go_on(operation: str) -> None:
        seen.append(moment_of(operation, seen))
        if seen[-1] == gc_moment and not go.is_set():
            go.set()
            handle.exception(20)

    with Checkpointer(root, config=CheckpointConfig(delta=True), run_id="run") as ck:
        ck.save(1, state).result(20)
        with Checkpointer(root, config=CheckpointConfig(keep_last=9), run_id="another launch") as another:
            another.save(9, {"x": torch.ones(3)}).result(20)
        storage.before, collector.before = stand_still, go_on
        handle = ck.save(2, state)
        assert arrived.wait(20)
        gc(collector)
        assert go.is_set() or gc_moment in REMOVALS[-2:]
        go.set()
        storage.before = nothing
        error = handle.exception(20)
        if error is None:  # what it refers to is there
            assert all(torch.equal(found, state[name]) for name, found in checkpoint.read(handle.result()).items())
        assert not list(root.rglob(REMOVAL))
        ck.save(3, state).result(20)
    assert all(checkpoint.verify(info).ok for info in ck.list())
    return error


def test_a_collection_at_any_time_takes_nothing_from_what_a_save_refers_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failed = {}
    moments = [*itertools.product(OF_A_SAVE, OF_A_COLLECTION), *itertools.product(("vote", "look"), REMOVALS)]
    for save_moment, gc_moment in moments:
        root = tmp_path / f"{save_moment}-{gc_moment}"
        storage = Stepped(root)
        monkeypatch.setattr("checkpoint.checkpointer.open_storage", lambda *args, of=storage, **options: of)
        error = beside(root, storage, save_moment, gc_moment)
        assert error is None or isinstance(error, StorageError)
        failed[save_moment, gc_moment] = error is not None
    # Only a save that looks after it was marked fails, which is before it votes, or has not looked yet: one whose vote
    # was seen until the mark is gone, after which what it refers to stays.
    assert {moments for moments, is_failed in failed.items() if is_failed} == {
        *itertools.product(("vote", "look"), OF_A_COLLECTION[2:]),
        *itertools.product(["vote"], REMOVALS),
        *itertools.product(["look"], REMOVALS[:5]),
    }


@pytest.mark.parametrize("stays", [(), ("r00000.safetensors",)])
def test_the_mark_of_what_is_removed_is_the_last_to_go(tmp_path: Path, stays: tuple[str, ...]):
    with Checkpointer(tmp_path, run_id="run") as ck:
        ck.save(1, {"w": torch.ones(3)}).result(20)
    storage = Stepped(tmp_path)
    storage.write(f"{FIRST}/{REMOVAL}", b"{}")
    unmarked = []

    def look(operation: str) -> None:
        there = {path.name for path in (tmp_path / FIRST).glob("*")}
        unmarked.extend([there] if REMOVAL not in there and there - {RETIRED, *stays} else [])

    storage.before = look
    remove(storage, Removal(FIRST, stays))
    assert not unmarked
    left = {path.name for path in (tmp_path / FIRST).glob("*")}
    assert left == ({RETIRED, *stays} if stays else set())


@pytest.mark.parametrize("how", ["mark", "remove", "printing"])
def test_a_collection_that_is_broken_off_leaves_no_mark(tmp_path: Path, how: str):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=9), run_id="run") as ck:
        for step in (1, 2, 3, 4):
            ck.save(step, {"w": torch.ones(3)}).result(20)
        storage = Stepped(tmp_path)
        seen: list[str] = []

        def refuse(operation: str) -> None:
            if operation.startswith("write" if how == "mark" else f"remove {SECOND}/{TABLE}"):
                seen.append(operation)
                if len(seen) == (2 if how == "mark" else 1):
                    raise StorageError("the disk does not answer")

        storage.before = nothing if how == "printing" else refuse
        removals = collect(storage, keep_last=1, keep_every=0, abandoned=lambda name: False)
        if how == "printing":
            with contextlib.closing(removals):
                assert next(removals).folder == FIRST
        else:
            with pytest.raises(StorageError, match="does not answer"):
                list(removals)
        assert not list(tmp_path.rglob(REMOVAL))
        storage.before = nothing
        gc(storage)
        assert [info.step for info in ck.list()] == [4]
        assert checkpoint.verify(tmp_path).ok


def test_what_is_marked_is_written_again_not_referred_to(tmp_path: Path):
    state = {"frozen": torch.arange(9.0)}
    with Checkpointer(tmp_path, config=CheckpointConfig(delta=True)) as ck:
        first = ck.save(1, state).result(20)
        Path(first.path, REMOVAL).write_text("{}")  # by a gc that was killed
        assert ck.save(2, state).stats(20).written_bytes == 36
        assert ck.save(3, state).stats(20).written_bytes == 0


def test_a_vote_that_cannot_be_read_keeps_nothing_and_what_cannot_be_looked_at_keeps_all(tmp_path: Path):
    storage = Stepped(tmp_path)
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=9), run_id="run") as ck:
        for step in (1, 2):
            ck.save(step, {"w": torch.ones(3)}).result(20)
    vote = f"{AttemptName.of(3, 0, 'run').folder}/parts/r00000.arrow"

    def refuse(operation: str) -> None:
        if operation == f"size {vote}":
            raise StorageError("the disk does not answer")

    storage.write(vote, b"no table")
    storage.before = refuse
    with pytest.raises(StorageError, match="does not answer"):
        gc(storage)
    assert [info.step for info in ck.list()] == [1, 2]
    assert not list(tmp_path.rglob(REMOVAL))
    storage.before = nothing
    assert [removal.folder for removal in gc(storage)] == [FIRST]


def test_a_copy_whose_files_are_being_removed_is_not_committed_and_the_next_one_is_whole(tmp_path: Path):
    state = {"frozen": torch.arange(9.0)}
    remote = open_storage(f"memory://{uuid.uuid4()}")
    with Checkpointer(tmp_path, config=CheckpointConfig(delta=True), run_id="run") as ck:
        mover = Promoter(ck._storage, remote, RemoteConfig(), rank=0, world_size=1)
        mover.submit(ck.save(1, state).result(20).folder).result(20)
        remote.write(f"{FIRST}/{REMOVAL}", b"{}")
        second = ck.save(2, state).result(20)
        with pytest.raises(SaveFailed, match=f"not copied, {FIRST} in memory://"):
            mover.submit(second.folder).result(20)
        remote.remove(FIRST)
        assert checkpoint.verify(mover.submit(second.folder).result(20)).ok
        mover.close()


def recovered(root: Path) -> int:
    """Return the step that a restart takes."""
    with Checkpointer(root) as ck:
        loaded = ck.recover({"w": torch.zeros(3)})
    assert loaded is not None
    return loaded.step


def latest(root: Path) -> int:
    """Return the step of the newest checkpoint, all of it verified."""
    with Checkpointer(root) as ck:
        info = ck.latest("deep")
    assert info is not None
    return info.step


def verified(root: Path) -> int:
    """Return the step of the newest checkpoint, if it is sound."""
    report = checkpoint.verify(root)
    assert report.ok
    return 1 if FIRST in report.path else 2


READ: dict[str, Callable[[Path], float]] = {
    "read": lambda root: checkpoint.read(root)["w"][0].item(),
    "recover": recovered,
    "latest": latest,
    "verify": verified,
}


@pytest.mark.parametrize("how", READ)
def test_what_is_superseded_while_it_is_looked_at_gives_way_to_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    with Checkpointer(tmp_path / "all", run_id="run") as ck:
        for step in (1, 2):
            ck.save(step, {"w": torch.full((3,), float(step))}).result(20)
    found = []
    for moment in itertools.count():
        root = tmp_path / str(moment)
        shutil.copytree(tmp_path / "all" / FIRST, root / FIRST)
        storage, operations = Stepped(root), itertools.count()

        def supersede(operation: str, root: Path = root, operations=operations, moment: int = moment) -> None:
            if next(operations) == moment:
                shutil.copytree(tmp_path / "all" / SECOND, root / SECOND)
                shutil.rmtree(root / FIRST)

        storage.before = supersede
        for user in ("access", "checkpointer"):
            monkeypatch.setattr(f"checkpoint.{user}.open_storage", lambda *args, of=storage, **options: of)
        found.append(READ[how](root))
        if next(operations) <= moment:  # it was over before
            break
    assert found[0] == 2
    assert found[-1] == 1
    assert len(found) > 5
