"""One contract for every drain, and what a process of its own owes beyond it."""

from __future__ import annotations

import abc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from checkpoint import CheckpointConfig, Checkpointer, StorageError
from checkpoint.arena import Arena, Slot
from checkpoint.digest import digest
from checkpoint.errors import SaveFailed
from checkpoint.process import ProcessDrain
from checkpoint.remote import FsspecStorage
from checkpoint.shard import Cut, Parcel, ShardPlan
from checkpoint.spans import Trace
from checkpoint.storage import Storage, open_storage
from checkpoint.writer import Drain, Flow, Target, ThreadDrain
from tests.test_checkpoint.worlds import wait_until

SIZES = [[5000], [4096, 3, 9001], [1], [4096], [20_000, 1, 1], [4095]]
"""Bytes of each cut of each parcel."""
HEADER = b"h" * 4096


def content(start: int, end: int) -> bytes:
    """Return bytes of the test's file."""
    return random.Random(1).randbytes(100_000)[start:end]


def plan(sizes: Sequence[Sequence[int]] = SIZES) -> ShardPlan:
    """Return the plan of a shard with these cuts."""
    parcels, start = [], len(HEADER)
    for index, cuts in enumerate(sizes):
        starts = itertools.accumulate(cuts, initial=0)
        made = tuple(Cut(at, nbytes, 0, 0) for at, nbytes in zip(starts, cuts, strict=False))
        parcels.append(Parcel(index, 0, start, sum(cuts), made))
        start += sum(cuts)
    return ShardPlan(HEADER, start, tuple(parcels), 1, "shard", ())


def fill(flow: Flow, arena: Arena, parcels: Sequence[Parcel]) -> None:
    """Copy and hand over parcels."""
    for parcel in parcels:
        hand_over(flow, parcel, taken(arena))


def taken(arena: Arena) -> Slot:
    slot = arena.take(lambda: False)
    assert slot is not None
    return slot


def hand_over(flow: Flow, parcel: Parcel, slot: Slot) -> None:
    slot.memory[parcel.page_offset :][: parcel.nbytes] = content(parcel.file_start, parcel.file_start + parcel.nbytes)
    flow.put(parcel, slot)


def expected_digests(of: ShardPlan) -> list[int]:
    return [
        digest(content(parcel.file_start + cut.start, parcel.file_start + cut.start + cut.nbytes))
        for parcel in of.parcels
        for cut in parcel.cuts
    ]


def assert_written(storage: Storage, path: str, of: ShardPlan) -> None:
    assert storage.read(path) == HEADER + content(len(HEADER), of.nbytes)


def assert_all_come_back(arena: Arena) -> None:
    wait_until(lambda: arena.num_free == arena.num_slots)


class DrainContract(abc.ABC):
    """What every drain does."""

    @pytest.fixture
    @abc.abstractmethod
    def drain(self) -> Iterator[Drain]:
        """A drain, closed at the end."""

    @pytest.fixture
    def arena(self) -> Iterator[Arena]:
        with Arena(2, is_file=True) as arena:  # less than there are parcels
            yield arena

    def test_parcels_in_any_order_make_the_file_and_its_digests(self, drain: Drain, arena: Arena, tmp_path: Path):
        storage = open_storage(tmp_path)
        of = plan()
        flow = drain.begin(of, arena, [Target("local", storage, "folder/shard")], Trace())
        fill(flow, arena, random.Random(0).sample(of.parcels, len(of.parcels)))
        assert flow.wait("local") == expected_digests(of)
        assert_written(storage, "folder/shard", of)
        assert_all_come_back(arena)
        assert flow.written_bytes == of.nbytes - len(HEADER)

    def test_a_storage_that_wants_order_gets_it(self, drain: Drain, arena: Arena, tmp_path: Path):
        storage = open_storage("dir://inner", {"path": str(tmp_path), "target_protocol": "file"})
        of = plan()
        flow = drain.begin(of, arena, [Target("remote", storage, "shard")], Trace())
        slots = [(parcel, taken(arena)) for parcel in of.parcels[:2]]
        for parcel, slot in reversed(slots):
            hand_over(flow, parcel, slot)
        fill(flow, arena, of.parcels[2:])
        assert flow.wait("remote") == expected_digests(of)
        assert_written(storage, "shard", of)

    def test_a_target_that_fails_leaves_the_others_alone(self, drain: Drain, arena: Arena, tmp_path: Path):
        (tmp_path / "taken").write_bytes(b"a file, no folder")
        targets = [
            Target("bad", open_storage(tmp_path / "taken"), "folder/shard"),
            Target("good", open_storage(tmp_path / "good"), "folder/shard"),
        ]
        of = plan()
        flow = drain.begin(of, arena, targets, Trace())
        fill(flow, arena, of.parcels)
        with pytest.raises(StorageError, match="taken/folder/shard: cannot create: Not a directory"):
            flow.wait("bad")
        assert flow.wait("good") == expected_digests(of)
        assert_written(targets[1].storage, "folder/shard", of)
        assert_all_come_back(arena)

    def test_a_cancelled_shard_gives_its_slots_back_and_leaves_no_file(
        self, drain: Drain, arena: Arena, tmp_path: Path
    ):
        storage = open_storage(tmp_path)
        of = plan()
        flow = drain.begin(of, arena, [Target("local", storage, "shard")], Trace())
        fill(flow, arena, of.parcels[1:3])
        flow.cancel(SaveFailed("nobody wants it"))
        with pytest.raises(SaveFailed, match=r"^nobody wants it$"):
            flow.wait("local")
        assert_all_come_back(arena)
        assert storage.entries("") == []

    def test_a_slot_that_comes_after_the_end_is_given_back(self, drain: Drain, arena: Arena, tmp_path: Path):
        flow = drain.begin(plan(), arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        flow.cancel(SaveFailed("nobody wants it"))
        with pytest.raises(SaveFailed):
            flow.wait("local")
        fill(flow, arena, plan().parcels)
        assert_all_come_back(arena)

    def test_shards_are_written_side_by_side(self, drain: Drain, arena: Arena, tmp_path: Path):
        storage = open_storage(tmp_path)
        of = plan()
        flows = [drain.begin(of, arena, [Target("local", storage, f"shard{i}")], Trace()) for i in range(3)]
        for parcel in of.parcels:
            for flow in flows:
                fill(flow, arena, [parcel])
        for i, flow in enumerate(flows):
            assert flow.wait("local") == expected_digests(of)
            assert_written(storage, f"shard{i}", of)

    def test_a_shard_without_tensors_is_its_header(self, drain: Drain, arena: Arena, tmp_path: Path):
        storage = open_storage(tmp_path)
        flow = drain.begin(plan([]), arena, [Target("local", storage, "shard")], Trace())
        assert flow.wait("local") == []
        assert storage.read("shard") == HEADER

    def test_what_was_done_is_told(self, drain: Drain, arena: Arena, tmp_path: Path):
        trace = Trace()
        of = plan()
        flow = drain.begin(of, arena, [Target("local", open_storage(tmp_path), "shard")], trace)
        fill(flow, arena, of.parcels)
        flow.wait("local")
        nbytes = {name: sum(s.nbytes for s in trace.spans if s.name == name) for name in ("hash", "write")}
        assert nbytes == {"hash": of.nbytes - len(HEADER), "write": of.nbytes - len(HEADER)}
        assert [s.name for s in trace.spans].count("sync") == 1

    def test_closing_waits_for_what_was_begun(self, drain: Drain, arena: Arena, tmp_path: Path):
        storage = open_storage(tmp_path)
        of = plan(SIZES[:2])
        flow = drain.begin(of, arena, [Target("local", storage, "shard")], Trace())
        fill(flow, arena, of.parcels)
        drain.close()
        assert flow.wait("local") == expected_digests(of)
        drain.close()


class TestThreadDrain(DrainContract):
    @pytest.fixture
    def drain(self) -> Iterator[Drain]:
        drain = ThreadDrain(2)
        yield drain
        drain.close()


class TestProcessDrain(DrainContract):
    @pytest.fixture
    def drain(self) -> Iterator[ProcessDrain]:
        drain = ProcessDrain(2)
        yield drain
        drain.close()

    @pytest.mark.parametrize("num_parcels", range(len(SIZES) + 1))
    def test_a_killed_process_fails_its_shards_alone(self, drain: ProcessDrain, tmp_path: Path, num_parcels: int):
        storage = open_storage(tmp_path)
        of = plan()
        target = [Target("local", storage, "shard")]
        with Arena(len(SIZES), is_file=True) as arena:
            flow = drain.begin(of, arena, target, Trace())
            wait_until(lambda: "shard" in str(list(tmp_path.iterdir())))  # it is up
            killed = process_of(drain)
            if num_parcels == len(SIZES):  # all is there, and none of it durable
                os.kill(killed, signal.SIGSTOP)
            fill(flow, arena, of.parcels[:num_parcels])
            os.kill(killed, signal.SIGKILL)
            with pytest.raises(SaveFailed, match=r"killed by SIGKILL.*staging_bytes.*the next save starts another"):
                flow.wait("local")
            assert_all_come_back(arena)
            fill(flow, arena, of.parcels[num_parcels:])  # a copier that has not heard of it
            assert_all_come_back(arena)
            assert storage.size("shard") is None

            again = drain.begin(of, arena, target, Trace())
            fill(again, arena, of.parcels)
            assert again.wait("local") == expected_digests(of)
            assert_written(storage, "shard", of)
            assert process_of(drain) != killed

    def test_a_process_killed_before_it_is_up_fails_its_shards(self, drain: ProcessDrain, arena: Arena, tmp_path: Path):
        flow = drain.begin(plan(), arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        wait_until(lambda: drain.pid is not None)
        os.kill(process_of(drain), signal.SIGKILL)
        with pytest.raises(SaveFailed, match="SIGKILL"):
            flow.wait("local")

    def test_what_was_durable_stays_so_when_the_process_is_killed(
        self, drain: ProcessDrain, arena: Arena, tmp_path: Path
    ):
        of = plan()
        flow = drain.begin(of, arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        fill(flow, arena, of.parcels)
        flow.wait("local")
        os.kill(process_of(drain), signal.SIGKILL)
        drain.close()
        assert flow.wait("local") == expected_digests(of)

    def test_the_process_has_no_torch(self, drain: ProcessDrain, arena: Arena, tmp_path: Path):
        of = plan()
        flow = drain.begin(of, arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        fill(flow, arena, of.parcels)
        flow.wait("local")
        assert "torch" not in Path(f"/proc/{process_of(drain)}/maps").read_text()

    def test_signals_for_the_whole_group_are_the_parents_to_answer(
        self, drain: ProcessDrain, arena: Arena, tmp_path: Path
    ):
        of = plan()
        flow = drain.begin(of, arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        wait_until(lambda: list(tmp_path.iterdir()) != [])  # it is up
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process_of(drain), number)
        fill(flow, arena, of.parcels)
        assert flow.wait("local") == expected_digests(of)

    def test_another_arena_gets_a_process_of_its_own(self, drain: ProcessDrain, arena: Arena, tmp_path: Path):
        storage = open_storage(tmp_path)
        of = plan()
        first = drain.begin(of, arena, [Target("local", storage, "first")], Trace())
        with Arena(3, is_file=True) as larger:
            second = drain.begin(of, larger, [Target("local", storage, "second")], Trace())
            for flow, memory in ((first, arena), (second, larger)):
                fill(flow, memory, of.parcels)
                assert flow.wait("local") == expected_digests(of)
            drain.close()

    def test_what_the_process_says_when_it_fails_is_in_the_error_and_nowhere_else(
        self, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        drain = ProcessDrain(1)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [])
            flow = drain.begin(plan(), arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        with pytest.raises(SaveFailed, match="ended with status 1: ModuleNotFoundError: No module named"):
            flow.wait("local")
        drain.close()
        assert capfd.readouterr() == ("", "")

    def test_a_python_that_cannot_be_started_fails_the_shard(
        self, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
        drain = ProcessDrain(1)
        flow = drain.begin(plan(), arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        with pytest.raises(SaveFailed, match=r"the writer process cannot be started: .*No such file"):
            flow.wait("local")
        drain.close()

    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            ('["durable", 0, "local", "AAAA', "was killed by SIGKILL"),
            ('["free", 0, 17]\\n', "was not understood, and ended: KeyError"),
        ],
    )
    def test_half_a_word_and_nonsense_fail_the_shard(
        self, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
    ):
        impostor = tmp_path / "python"
        impostor.write_text(IMPOSTOR.format(python=sys.executable, said=said))
        impostor.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(impostor))
        drain = ProcessDrain(1)
        flow = drain.begin(plan(), arena, [Target("local", open_storage(tmp_path), "shard")], Trace())
        fill(flow, arena, plan().parcels[:1])
        with pytest.raises(SaveFailed, match=reason):
            flow.wait("local")
        assert_all_come_back(arena)
        drain.close()

    def test_storages_that_the_process_cannot_reach_are_refused(
        self, drain: ProcessDrain, arena: Arena, tmp_path: Path
    ):
        inside = open_storage("memory://somewhere")
        locked = FsspecStorage(LocalFileSystem(auto_mkdir=True, lock=threading.Lock()), str(tmp_path))
        for storage, reason in ((inside, "it lies in this process"), (locked, "its options are not JSON .*lock")):
            with pytest.raises(ValueError, match=f"cannot reach .*: {reason}.*allowed is 'thread'"):
                drain.begin(plan(), arena, [Target("remote", storage, "shard")], Trace())
        with pytest.raises(ValueError, match=r"config\.writer: .*memory://"):
            Checkpointer("memory://somewhere", config=CheckpointConfig(writer="process"))

    def test_the_process_ends_with_its_parent(self, tmp_path: Path):
        ours, theirs = get_context("forkserver").Pipe()
        parent = get_context("forkserver").Process(target=_be_killed, args=(theirs, str(tmp_path)), daemon=True)
        parent.start()
        theirs.close()
        writer = ours.recv()
        assert is_running(writer)
        os.kill(parent.pid or 0, signal.SIGKILL)
        parent.join()
        parent.close()
        wait_until(lambda: not is_running(writer))


IMPOSTOR = """#!{python}
import json, os, signal, sys
os.write(json.loads(sys.argv[3])["reports"], b'{said}')
os.kill(os.getpid(), signal.SIGKILL)
"""

SCRIPT = """
import sys, torch
from checkpoint import CheckpointConfig, Checkpointer
print("from the top")
with Checkpointer(sys.argv[1], config=CheckpointConfig(writer="process")) as ck:
    ck.save(1, {"w": torch.ones(3)})
"""


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run([sys.executable, script, tmp_path / "root"], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("from the top\n", "")
    with Checkpointer(tmp_path / "root") as ck:
        assert [info.step for info in ck.list()] == [1]


def process_of(drain: ProcessDrain) -> int:
    assert drain.pid is not None
    return drain.pid


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _be_killed(pipe: Connection, root: str) -> None:
    """Start a writer process in the middle of a shard, tell its id, and wait."""
    arena, drain = Arena(1, is_file=True), ProcessDrain(1)
    flow = drain.begin(plan(), arena, [Target("local", open_storage(root), "shard")], Trace())
    fill(flow, arena, plan().parcels[:1])
    wait_until(lambda: drain.pid is not None)
    pipe.send(drain.pid)
    flow.wait("local")


def test_a_worker_that_is_forked_while_the_process_starts_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start, forked = subprocess.Popen, list[int]()

    def fork_and_start(*arguments: object, **options: object) -> object:
        forked.append(os.fork())
        if not forked[-1]:  # it has all descriptors, as a data loader's worker would
            signal.alarm(60)
            signal.pause()
        return start(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", fork_and_start)
    with Checkpointer(tmp_path, config=CheckpointConfig(writer="process")) as ck:
        assert ck.save(1, {"w": torch.zeros(10)}).result(20).step == 1
    (worker,) = forked
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)  # it has not ended
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


LEAVES = """
import os, sys, torch
from checkpoint import Checkpointer
ck = Checkpointer(sys.argv[1])
ck.save(1, {"w": torch.ones(5_000_000)})
if os.fork() == 0:
    try:
        ck.save(2, {"w": torch.ones(1)})
    except ValueError as error:
        print(error)
    ck.close()
    sys.exit()
os.wait()
"""


def test_a_process_that_ends_without_close_commits_first_and_its_fork_saves_nothing(tmp_path: Path):
    ran = subprocess.run([sys.executable, "-c", LEAVES, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout == "save: this Checkpointer was made before the process was forked; make one here\n"
    (info,) = Checkpointer(tmp_path).list()
    assert info.step == 1
