"""What stays, what goes, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import CheckpointConfig, Checkpointer
from checkpoint.catalog import PIN, PROMOTION, RETIRED, Known, scan
from checkpoint.dcp import StorageWriter
from checkpoint.format import fingerprint
from checkpoint.local import LocalStorage
from checkpoint.manifest import CommitRecord, FileRecord
from checkpoint.names import COMMIT, AttemptName
from checkpoint.reader import Reader
from checkpoint.retention import is_sound, removable, remove, superseded
from tests.test_checkpoint.worlds import wait_until


@dataclass(frozen=True)
class Committed:
    """As much of a reader as the decision needs."""

    step: int
    sound: bool = True
    commit: int = 0
    held: bool = False

    @property
    def record(self) -> SimpleNamespace:
        return SimpleNamespace(step=self.step)


def stays(committed: list[Committed], *, keep_last: int, keep_every: int = 0) -> list[int]:
    """Return the commits that stay."""
    gone = superseded(committed, lambda c: c.sound, keep_last=keep_last, keep_every=keep_every)  # type: ignore[arg-type, attr-defined]
    return [c.commit for c in committed if c not in gone]


def kept(committed: list[Committed], *, keep_last: int, keep_every: int = 0) -> list[int]:
    """Return the steps that stay, where no step is saved twice."""
    gone = superseded(committed, lambda c: c.sound, keep_last=keep_last, keep_every=keep_every)  # type: ignore[arg-type, attr-defined]
    return [c.step for c in committed if c not in gone]


@given(
    history=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), max_size=9),
    keep_last=st.integers(1, 4),
    keep_every=st.integers(0, 3),
)
def test_retention_is_what_it_says(history: list[tuple[int, bool, bool]], keep_last: int, keep_every: int):
    commits = [Committed(step, sound, i, held) for i, (step, sound, held) in enumerate(history)]
    gone = superseded(commits, lambda c: c.sound, keep_last=keep_last, keep_every=keep_every, held=lambda c: c.held)  # type: ignore[arg-type, attr-defined]
    sound = [c for c in commits if c.sound]
    oldest_kept = sound[-keep_last].commit if len(sound) >= keep_last else -1
    expected = set()
    for c in commits:
        if c.commit >= oldest_kept or c.held:  # the newest sound ones, whatever came after, and what is held
            expected.add(c.commit)
        if keep_every and c.step % keep_every == 0:
            sound_since = [o for o in sound if o.step == c.step and o.commit > c.commit]
            if not sound_since:  # the newest sound commit of a milestone; broken ones that might be it
                expected.add(c.commit)
    assert {c.commit for c in commits if c not in gone} == expected


def steps(*numbers: int) -> list[Committed]:
    return [Committed(n) for n in numbers]


def test_the_newest_commits_stay():
    assert kept(steps(1, 2, 3, 4), keep_last=2) == [3, 4]
    assert kept(steps(1), keep_last=2) == [1]
    assert kept([], keep_last=1) == []


def test_newest_is_by_commit_not_by_step():
    assert kept(steps(100, 200, 150), keep_last=2) == [200, 150]


def test_milestones_stay_for_ever():
    assert kept(steps(10, 15, 20, 25, 30, 35), keep_last=1, keep_every=10) == [10, 20, 30, 35]


def test_of_a_milestone_saved_twice_the_newest_sound_commit_stays():
    old, new = Committed(10, commit=1), Committed(10, commit=3)
    broken = Committed(10, commit=4, sound=False)
    last = Committed(11, commit=5)
    assert stays([old, Committed(20, commit=2), new, last], keep_last=1, keep_every=10) == [2, 3, 5]
    assert stays([old, new, broken, last], keep_last=1, keep_every=10) == [3, 4, 5]


def test_a_broken_checkpoint_never_pushes_out_a_good_one():
    assert kept([*steps(1, 2), Committed(3, sound=False)], keep_last=1) == [2, 3]
    assert kept([*steps(1), Committed(2, sound=False), Committed(3, sound=False)], keep_last=1) == [1, 2, 3]


def test_a_broken_checkpoint_goes_when_enough_good_ones_follow():
    assert kept([Committed(1, sound=False), *steps(2, 3)], keep_last=2) == [2, 3]


def test_retention_runs_after_every_commit(tmp_path: Path):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=2, keep_every=4)) as ck:
        for step in range(1, 8):
            ck.save(step, {"w": torch.ones(1)})
    assert [info.step for info in ck.list()] == [4, 6, 7]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Checkpointer]]:
    """Both ranks of a launch that keeps one checkpoint, step 1 committed."""
    config = CheckpointConfig(keep_last=1, commit_timeout_s=20)
    both = [Checkpointer(tmp_path, config=config, rank=r, world_size=2, run_id="run") for r in range(2)]
    for handle in [ck.save(1, {"w": torch.ones(1)}) for ck in both]:
        handle.result(20)
    yield both
    for ck in both:
        ck.close()


def test_nothing_goes_before_its_successor_is_committed(tmp_path: Path, two: list[Checkpointer]):
    first = two[0].save(2, {"w": torch.ones(1)})
    wait_until(lambda: bool(list(tmp_path.glob("step-00000002.*/parts/r00000.arrow"))))
    assert [info.step for info in two[0].list()] == [1]  # rank 0 has voted, rank 1 has not
    two[1].save(2, {"w": torch.ones(1)})
    first.result(20)
    two[0].close()
    assert [info.step for info in two[0].list()] == [2]


def test_the_next_attempt_of_a_faster_rank_is_not_collected(tmp_path: Path, two: list[Checkpointer]):
    second = two[1].save(2, {"w": torch.ones(1)})
    wait_until(lambda: bool(list(tmp_path.glob("step-00000002.*/parts/r00001.arrow"))))
    # What rank 0's thread may still be doing for step 1.
    two[0]._saver._retention["local"].collect(two[0]._storage, AttemptName.of(1, 0, "run"))
    two[0].save(2, {"w": torch.ones(1)})
    assert second.result(20).step == 2


@pytest.mark.parametrize("kind", ["missing", "truncated"])
def test_a_checkpoint_that_broke_is_not_counted(tmp_path: Path, kind: str):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=2)) as ck:
        ck.save(1, {"w": torch.ones(100)})
        broken = Path(ck.save(2, {"w": torch.ones(100)}).result(20).path, "r00000.safetensors")
        if kind == "missing":
            broken.unlink()
        else:
            broken.write_bytes(broken.read_bytes()[:-1])
        ck.save(3, {"w": torch.ones(100)})
    assert [info.step for info in ck.list()] == [1, 2, 3]
    latest = ck.latest()
    assert latest is not None
    assert latest.step == 3


def test_a_folder_that_another_launch_has_just_made_is_not_collected(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"w": torch.ones(1)}).result(20)
        fresh = tmp_path / AttemptName.of(7, 0, "another").folder
        fresh.mkdir()
        ck.save(2, {"w": torch.ones(1)})
    assert fresh.exists()


# Files that others refer to


def commit(storage: LocalStorage, step: int, *refers_to: str) -> str:
    """Make a checkpoint of two small files that refers to files of others; return its folder."""
    folder = AttemptName.of(step, 0, "run").folder
    files = []
    for name in ("r00000.safetensors", "slices.arrow"):
        data = f"{name} of {step}".encode()
        storage.write(f"{folder}/{name}", data)
        files.append(FileRecord(name, len(data), len(data), fingerprint(data)))
    for path in refers_to:
        nbytes = storage.size(path)
        assert nbytes is not None
        files.append(FileRecord(path, nbytes, 0, fingerprint(b"")))
    record = CommitRecord(step, step, "run", 1, "2000-01-01", tuple(files), None, {})
    storage.write(f"{folder}/{COMMIT}", record.to_bytes())
    return folder


def collect(storage: LocalStorage, keep_last: int, *, is_later_launch: bool = False) -> None:
    """Do what a Checkpointer does after a commit."""
    for removal in removable(storage, keep_last=keep_last, keep_every=0, abandoned=lambda name: is_later_launch):
        remove(storage, removal)


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take tables for sound: those of these tests are empty."""
    monkeypatch.setattr("checkpoint.retention.is_sound", lambda reader: True)


@pytest.mark.usefixtures("sound")
def test_a_file_stays_while_a_checkpoint_that_stays_refers_to_it(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    first = commit(storage, 1)
    shard = f"{first}/r00000.safetensors"
    for step in (2, 3):
        commit(storage, step, shard)
        collect(storage, keep_last=1)
        assert storage.size(shard) is not None
        assert [e.name for e in storage.entries(first)] == [RETIRED, "r00000.safetensors"]
        assert len(list(tmp_path.iterdir())) == 2
    commit(storage, 4)
    collect(storage, keep_last=1)
    assert not (tmp_path / first).exists()


@pytest.mark.usefixtures("sound")
def test_what_a_pinned_checkpoint_refers_to_stays_with_it(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    first = commit(storage, 1)
    pinned = commit(storage, 2, f"{first}/r00000.safetensors")
    storage.write(f"{pinned}/{PIN}", b"{}")
    waiting = commit(storage, 3)
    storage.write(f"{waiting}/{PROMOTION}", b"{}")
    commit(storage, 4)
    collect(storage, keep_last=1)
    assert {p.name for p in tmp_path.iterdir()} == {first, pinned, waiting, AttemptName.of(4, 0, "run").folder}
    for name, mark in ((pinned, PIN), (waiting, PROMOTION)):
        storage.remove(f"{name}/{mark}")
        collect(storage, keep_last=1)
    assert {p.name for p in tmp_path.iterdir()} == {AttemptName.of(4, 0, "run").folder}


@pytest.mark.usefixtures("sound")
def test_a_folder_that_was_copied_for_its_files_alone_is_no_abandoned_attempt(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    first = commit(storage, 1)
    commit(storage, 2, f"{first}/r00000.safetensors")
    storage.remove(f"{first}/{COMMIT}")
    assert removable(storage, keep_last=1, keep_every=0, abandoned=lambda name: True) == []


def test_what_is_known_is_read_again_only_after_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage, known = LocalStorage(tmp_path), Known()
    folder = commit(storage, 1)
    reads: list[str] = []
    read = LocalStorage.read

    def counted(self: LocalStorage, path: str) -> bytes:
        reads.append(path)
        return read(self, path)

    monkeypatch.setattr(LocalStorage, "read", counted)
    for _ in range(3):
        assert [r.record.step for r in scan(storage, known=known).committed] == [1]
    assert reads == [f"{folder}/{COMMIT}"]
    (tmp_path / folder / "r00000.safetensors").unlink()
    assert not is_sound(known.open(storage, folder))  # files are looked at each time
    assert len(reads) == 1
    storage.write(f"{folder}/{COMMIT}", b"damaged")
    assert [name.folder for name, _ in scan(storage, known=known).broken] == [folder]


class _Killed(Exception):
    pass


class _DyingStorage(LocalStorage):
    """Dies before its n-th change."""

    left = 0

    def write(self, path: str, data: bytes) -> None:
        self._live()
        super().write(path, data)

    def remove(self, path: str) -> None:
        self._live()
        super().remove(path)

    def _live(self) -> None:
        if not self.left:
            raise _Killed
        self.left -= 1


@pytest.mark.usefixtures("sound")
def test_a_kill_at_any_change_of_a_collection_loses_nothing_that_is_referred_to(tmp_path: Path):
    num_kills = 0
    while True:
        root = tmp_path / str(num_kills)
        storage = LocalStorage(root)
        first = commit(storage, 1)
        commit(storage, 2, f"{first}/r00000.safetensors")
        newest = commit(storage, 3, f"{first}/r00000.safetensors")
        dying = _DyingStorage(root)
        dying.left = num_kills
        try:
            collect(dying, keep_last=1)
        except _Killed:
            num_kills += 1
        else:
            break
        assert storage.size(f"{first}/r00000.safetensors") is not None
        Reader(storage, newest)
        collect(storage, keep_last=1, is_later_launch=True)
        assert sorted(p.name for p in root.iterdir()) == [first, newest]
        assert [e.name for e in storage.entries(first)] == [RETIRED, "r00000.safetensors"]
    assert num_kills == 5


def test_retention_that_would_leave_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="keep_last: 0; allowed are integers from 1"):
        removable(LocalStorage(tmp_path), keep_last=0, keep_every=0, abandoned=lambda name: False)
    with pytest.raises(ValueError, match="keep_last: 0; allowed are None and integers from 1"):
        StorageWriter(tmp_path, keep_last=0)
