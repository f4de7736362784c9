"""Killed, out of space or refused by the disk at any moment: the old checkpoint or the new one, whole."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, StorageError
from tests.ranks import run_ranks
from tests.test_checkpoint.worlds import wait_until

NUM_KILLS = 40
SYSCALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink")
"""What a local save does to the disk, in `os`."""


def weights(step: int) -> dict[str, torch.Tensor]:
    """A state that tells its step everywhere."""
    return {f"w{i}": torch.full((20_000 + i,), float(step)) for i in range(4)}


def assert_whole(root: Path, steps: set[int] | None = None) -> int:
    """Assert that the newest checkpoint is bit for bit one save, of one of `steps`; return its step."""
    info = Checkpointer(root).latest("deep")
    assert info is not None
    found = checkpoint.read(info)
    expected = weights(info.step)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert info.shared == {"step": info.step}
    assert steps is None or info.step in steps
    return info.step


def test_a_process_killed_at_any_time_loses_nothing_that_was_committed(tmp_path: Path):
    (newest,) = run_ranks(_kill_again_and_again, 1, str(tmp_path), timeout_s=600)
    assert newest > 2  # processes came that far between the kills


def _kill_again_and_again(rank: int, world_size: int, root: str) -> int:
    """Start a process that saves for ever, kill it, look at what it left; return the newest step."""
    generator = random.Random(0)
    begun_s = time.monotonic()
    save_on(Path(root), 1)
    save_s = time.monotonic() - begun_s
    committed = 1
    for _ in range(NUM_KILLS):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            _save_for_ever(root, writing)
        os.close(writing)
        with os.fdopen(reading) as reports:
            reports.readline()  # it begins
            time.sleep(generator.uniform(0, 2 * save_s))  # the moment of the kill, not a synchronisation
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            committed = max([committed, *map(int, reports)])
        newest = assert_whole(Path(root))
        assert newest >= committed
        committed = newest
    return committed


def _save_for_ever(root: str, reports: int) -> None:
    """Save step after step and write each that is committed, one a line."""
    ck = Checkpointer(root, config=CheckpointConfig(keep_last=2))
    newest = ck.latest()
    step = newest.step if newest else 0
    os.write(reports, f"{step}\n".encode())
    while True:
        step += 1
        ck.save(step, weights(step), shared={"step": step}).result(20)
        os.write(reports, f"{step}\n".encode())


# At every single step of a save


class Disk:
    """Counts the calls that touch the disk, and does something else instead of the n-th one."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, strike: Callable[[str], None]) -> None:
        self.calls = 0
        self._at, self._strike = at, strike
        for name in SYSCALLS:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            index, self.calls = self.calls, self.calls + 1
            if index == self._at:
                self._strike(name)
            return call(*args, **options)

        return counted


def save_on(root: Path, step: int) -> None:
    """Save one step."""
    with Checkpointer(root, config=CheckpointConfig(keep_last=1)) as ck:
        ck.save(step, weights(step), shared={"step": step})


def num_calls(root: Path) -> int:
    """How often a second save and the removal of the first one touch the disk; leaves step 1 in `root`."""
    save_on(root, 1)
    again = root.with_name("again")
    shutil.copytree(root, again)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, -1, lambda name: None)
        save_on(again, 2)
    return disk.calls


def test_an_error_of_any_disk_operation_leaves_the_old_or_the_new_checkpoint(tmp_path: Path):
    total = num_calls(tmp_path / "one")
    assert total > 20
    told: list[str] = []
    for at in range(total):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "one", root)
        number = (errno.ENOSPC, errno.EIO)[at % 2]

        def strike(name: str, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, strike)
            try:
                save_on(root, 2)
            except StorageError as error:
                told.append(str(error))
            assert disk.calls > at
        assert_whole(root, {1, 2})
        save_on(root, 3)
        assert_whole(root, {3})
    assert len(told) > 10
    assert all("No space left" in text or "Input/output error" in text for text in told)


def test_a_process_killed_at_any_disk_operation_leaves_the_old_or_the_new_checkpoint(tmp_path: Path):
    total = num_calls(tmp_path / "one")
    (steps,) = run_ranks(_kill_everywhere, 1, str(tmp_path), total, timeout_s=600)
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


def _kill_everywhere(rank: int, world_size: int, folder: str, total: int) -> list[int]:
    """Kill a process just before each disk operation of a second save; return the newest steps it left."""
    steps = []
    for at in range(total):
        root = Path(folder, str(at))
        shutil.copytree(Path(folder, "one"), root)
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch, at, lambda name: os.kill(os.getpid(), signal.SIGKILL))
                save_on(root, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"operation {at} never came"
        steps.append(assert_whole(root, {1, 2}))
        save_on(root, 3)
        assert_whole(root, {3})
        assert len(list(root.iterdir())) == 1  # what was left behind is collected
    return steps


# A disk that is really full


def fill(root: Path) -> str:
    """Save small, too large, small; return the error of the large one."""
    with Checkpointer(root, config=CheckpointConfig(on_error="warn")) as ck:
        ck.save(1, weights(1), shared={"step": 1}).result(20)
        error = ck.save(2, {"w": torch.full((5_000_000,), 2.0)}).exception(20)
        assert isinstance(error, StorageError)
        assert_whole(root, {1})
        ck.save(3, weights(3), shared={"step": 3}).result(20)
    assert [info.step for info in ck.list()] == [1, 3]
    assert_whole(root, {3})
    return str(error)


def test_a_file_that_may_not_grow_fails_its_save_alone(tmp_path: Path):
    (error,) = run_ranks(_fill_within_a_limit, 1, str(tmp_path))
    assert "r00000.safetensors: cannot write: File too large; raise the limit on file sizes" in error


def _fill_within_a_limit(rank: int, world_size: int, root: str) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    return fill(Path(root))


def test_a_full_disk_fails_its_save_alone_and_its_space_is_given_back(tmp_path: Path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        error = fill(tmp_path / "root")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "r00000.safetensors: cannot write: No space left on device; free space or save elsewhere" in error


def test_a_rank_that_dies_before_its_vote_fails_the_others_in_time(tmp_path: Path):
    context = get_context("forkserver")
    process = context.Process(target=_die_before_the_vote, args=(str(tmp_path),), daemon=True)
    config = CheckpointConfig(commit_timeout_s=1)
    with Checkpointer(tmp_path, config=config, rank=0, world_size=2, run_id="run") as ck:
        process.start()
        wait_until(lambda: process.exitcode is not None)
        error = ck.save(1, {"w": torch.ones(1)}).exception(20)
    assert process.exitcode == -signal.SIGKILL
    process.close()
    assert isinstance(error, checkpoint.CommitTimeout)
    assert error.missing_ranks == (1,)
    assert (tmp_path / os.listdir(tmp_path)[0] / "r00001.safetensors").exists()


def _die_before_the_vote(root: str) -> None:
    os_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if target.name == "r00001.arrow":
            os.kill(os.getpid(), signal.SIGKILL)
        os_rename(source, target)

    os.rename = rename  # type: ignore[assignment]
    with Checkpointer(root, rank=1, world_size=2, run_id="run") as ck:
        ck.save(1, {"w": torch.ones(1)}).result(20)
