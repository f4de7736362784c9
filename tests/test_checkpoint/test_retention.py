"""What stays, what goes, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint import CheckpointConfig, Checkpointer
from checkpoint.catalog import superseded
from checkpoint.commit import AttemptName
from tests.test_checkpoint.worlds import wait_until


@dataclass(frozen=True)
class Committed:
    """As much of a reader as the decision needs."""

    step: int
    sound: bool = True
    commit: int = 0

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
    two[0]._collect(AttemptName.of(1, 0, "run"))  # what rank 0's thread may still be doing for step 1
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
