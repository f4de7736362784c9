"""Killed, out of space or refused by the disk at any moment: the old checkpoint or the new one, whole.

More than 500 faults: each test says how many it strikes with at least, and asserts that every one of them fired.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, SaveFailed, StorageError
from tests.ranks import run_ranks
from tests.test_checkpoint.disk import (
    Disk,
    MemoryStore,
    Strike,
    assert_whole,
    copied,
    fail,
    fail_when_done,
    fall_short,
    grow_old,
    kill_after,
    kill_before,
    memory_folder,
    operations,
    save_on,
    weights,
)
from tests.test_checkpoint.worlds import ranks, wait_until

LEAST = {
    "errors": 140,
    "errors, delta": 40,
    "short": 5,
    "errors of two ranks": 70,
    "object store": 20,
    "kills before": 45,
    "kills after": 45,
    "kills, delta": 40,
    "kills of a rank": 20,
    "random kills": 60,
    "writer process": 30,
}
"""Faults that each test strikes with at least."""


def test_there_are_five_hundred_faults():
    assert sum(LEAST.values()) >= 500


# Errors


@pytest.mark.parametrize(("delta", "numbers"), [(False, (errno.ENOSPC, errno.EDQUOT, errno.EIO)), (True, (errno.EIO,))])
def test_an_error_of_any_disk_operation_leaves_the_old_or_the_new_checkpoint(delta: bool, numbers: tuple[int, ...]):
    with memory_folder() as folder:
        names = operations(folder, delta=delta)
        assert set(names) >= {"open", "_set_aside", "pwrite", "write", "fsync", "rename", "link", "mkdir", "unlink"}
        told, fired = [], 0
        for number in numbers:
            for at in range(len(names)):
                root = copied(folder, f"{number}-{at}")
                with Disk(at, fail(number)) as disk:
                    try:
                        save_on(root, 2, delta=delta)
                    except StorageError as error:
                        told.append(str(error))
                fired += disk.has_struck
                assert_whole(root, {1, 2})
                if at % 4 == 0:
                    save_on(root, 3, delta=delta)
                    assert_whole(root, {3})
    assert fired == len(numbers) * len(names) >= LEAST["errors, delta" if delta else "errors"]
    assert len(told) > 10
    reasons = [os.strerror(number) for number in numbers]
    assert all(any(reason in text for reason in reasons) for text in told)


def test_writes_that_fall_short_are_made_whole():
    with memory_folder() as folder:
        writes = [at for at, name in enumerate(operations(folder)) if name in ("write", "pwrite")]
        for at in writes:
            root = copied(folder, str(at))
            with Disk(at, fall_short) as disk:
                save_on(root, 2)
            assert disk.names[at] in ("write", "pwrite")
            assert_whole(root, {2})
    assert len(writes) >= LEAST["short"]


def test_an_error_of_any_operation_of_either_rank_leaves_the_old_or_the_new_checkpoint():
    with memory_folder() as folder:
        _save_together(folder / "one", 1)
        with Disk() as disk:
            _save_together(copied(folder, "again"), 2)
        fired = 0
        for at in range(len(disk.names)):
            root = copied(folder, str(at))
            with Disk(at, fail(errno.ENOSPC)) as struck:
                _save_together(root, 2)
            fired += struck.has_struck
            assert_whole(root, {1, 2})
    assert fired >= LEAST["errors of two ranks"]


def _save_together(root: Path, step: int) -> None:
    """Save one step from two ranks; either may fail."""
    config = CheckpointConfig(keep_last=1, commit_timeout_s=0.5)

    def save(rank: int) -> None:
        ck = Checkpointer(root, config=config, rank=rank, world_size=2, run_id=f"{step}")
        error = ck.save(step, weights(step), shared={"step": step}).exception(20)
        assert error is None or isinstance(error, checkpoint.CheckpointError)
        ck.close()

    ranks(2, save)


def test_an_error_of_any_operation_of_an_object_store_leaves_the_old_or_the_new_checkpoint():
    url = f"memory://{uuid.uuid4().hex}"
    save_on(f"{url}/dry", 1)
    with MemoryStore() as store:
        save_on(f"{url}/dry", 2)
    fired = 0
    for strike in (fail(errno.EIO), fail_when_done):
        for at in range(len(store.names)):
            root = f"{url}/{strike.__name__}{at}"
            save_on(root, 1)
            with MemoryStore(at, strike) as struck, contextlib.suppress(StorageError):
                save_on(root, 2)
            fired += struck.has_struck
            assert_whole(root, {1, 2})
    fsspec.filesystem("memory").rm(url, recursive=True)
    assert fired == 2 * len(store.names) >= LEAST["object store"]


# Kills


@pytest.mark.parametrize(
    ("case", "strike", "settings"),
    [
        ("kills before", kill_before, {}),
        ("kills after", kill_after, {}),
        ("kills, delta", kill_before, {"delta": True}),
    ],
)
def test_a_process_killed_at_any_disk_operation_leaves_the_old_or_the_new_checkpoint(
    case: str, strike: Strike, settings: dict[str, Any]
):
    (steps,) = run_ranks(_kill_everywhere, 1, strike, settings, timeout_s=300)
    assert len(steps) >= LEAST[case]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


def _kill_everywhere(rank: int, world_size: int, strike: Strike, settings: dict[str, Any]) -> list[int]:
    """Kill a process at each disk operation of a second save; return the newest steps they left."""
    steps = []
    with memory_folder() as folder:
        for at in range(len(operations(folder, **settings))):
            root = copied(folder, str(at))
            child = os.fork()
            if not child:
                with Disk(at, strike):
                    save_on(root, 2, **settings)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), f"operation {at} never came"
            steps.append(assert_whole(root, {1, 2}))
            if at % 4 == 0:
                grow_old(root)
                save_on(root, 3, **settings)
                assert_whole(root, {3})
                if not settings:
                    assert len(list(root.iterdir())) == 1  # what was left behind is collected
    return steps


def test_a_rank_killed_at_any_disk_operation_leaves_the_old_or_the_new_checkpoint():
    (steps,) = run_ranks(_kill_second_rank, 1, timeout_s=300)
    assert len(steps) >= LEAST["kills of a rank"]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}  # committed if it was killed after its vote


def _kill_second_rank(rank: int, world_size: int) -> list[int]:
    """Kill rank 1 at each disk operation, and let rank 0 then do its part; return the newest steps they left."""
    steps: list[int] = []
    with memory_folder() as folder:
        _save_together(folder / "one", 1)
        while True:
            root = copied(folder, str(len(steps)))
            child = os.fork()
            if not child:
                with Disk(len(steps), kill_after):
                    _save_alone(root, 1, commit_timeout_s=0.01)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                return steps  # there is no such operation any more
            _save_alone(root, 0, commit_timeout_s=0.01)
            steps.append(assert_whole(root, {1, 2}))


def _save_alone(root: Path, rank: int, commit_timeout_s: float) -> None:
    """Do one rank's part of a second save; its failure is another rank's."""
    config = CheckpointConfig(keep_last=1, commit_timeout_s=commit_timeout_s)
    ck = Checkpointer(root, config=config, rank=rank, world_size=2, run_id="2")
    error = ck.save(2, weights(2), shared={"step": 2}).exception(20)
    if error is not None:
        assert isinstance(error, checkpoint.CommitTimeout)
        assert error.missing_ranks == (1 - rank,)
    ck.close()


def test_a_process_killed_at_any_time_loses_nothing_that_was_committed(tmp_path: Path):
    (newest,) = run_ranks(_kill_again_and_again, 1, str(tmp_path), LEAST["random kills"], timeout_s=300)
    assert newest > 2  # processes came that far between the kills


def _kill_again_and_again(rank: int, world_size: int, root: str, num_kills: int) -> int:
    """Start a process that saves for ever, kill it, look at what it left; return the newest step."""
    generator = random.Random(0)
    begun_s = time.monotonic()
    save_on(Path(root), 1)
    save_s = time.monotonic() - begun_s
    committed = 1
    for _ in range(num_kills):
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


def test_a_writer_process_killed_at_any_time_fails_its_save_alone():
    generator = random.Random(0)
    config = CheckpointConfig(keep_last=1, writer="process", on_error="warn")
    kills, committed = 0, 0
    with memory_folder() as root:
        with Checkpointer(root, config=config) as ck:
            begun_s = time.monotonic()
            ck.save(1, weights(1), shared={"step": 1}).result(20)
            save_s = time.monotonic() - begun_s
            step = 1
            while kills < LEAST["writer process"]:
                step += 1
                handle = ck.save(step, weights(step), shared={"step": step})
                time.sleep(generator.uniform(0, save_s))  # the moment of the kill, not a synchronisation
                for writer in writers():
                    os.kill(writer, signal.SIGKILL)
                    kills += 1
                error = handle.exception(20)
                assert error is None or (isinstance(error, SaveFailed) and "killed by SIGKILL" in str(error))
                committed += error is None
                assert assert_whole(root) == step if error is None else assert_whole(root) < step
            wait_until(lambda: not writers())
            ck.save(step + 1, weights(step + 1), shared={"step": step + 1}).result(20)
            assert_whole(root, {step + 1})
        assert len(list(root.iterdir())) == 1  # what the killed ones left is collected
    assert 0 < committed < step


def writers() -> list[int]:
    """Return the writer processes of this process."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [int(pid) for pid in children if b"checkpoint.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


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
