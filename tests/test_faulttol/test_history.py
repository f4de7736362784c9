"""The rings of a job are followed from the launch that makes them, not from an earlier one."""

from __future__ import annotations

from pathlib import Path

from faulttol.history import Follower
from faulttol.ring import Ring, remove_rings, ring_path


def _record(folder: Path, num_steps: int) -> None:
    ring = Ring(ring_path(folder, 0), rank=0, world_size=1, capacity=64)
    for step in range(num_steps):
        ring.mark("step_begin", 1000 * step, (step, 0), None, None, None)
    ring.close()


def _steps(follower: Follower) -> list[int]:
    return [mark.step for mark in follower.look().records[0].marks]


def test_a_ring_that_is_made_anew_is_followed_instead_of_the_old_one(tmp_path: Path) -> None:
    _record(tmp_path, 5)
    with Follower(tmp_path, [0]) as follower:
        assert _steps(follower) == [0, 1, 2, 3, 4]
        _record(tmp_path, 2)
        assert _steps(follower) == [0, 1]
        remove_rings(tmp_path)
        assert _steps(follower) == [0, 1], "what was recorded last is kept"


def test_only_rings_are_removed(tmp_path: Path) -> None:
    _record(tmp_path, 1)
    (tmp_path / "findings.jsonl").touch()
    remove_rings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["findings.jsonl"]
    remove_rings(tmp_path / "none")
