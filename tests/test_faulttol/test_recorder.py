"""Whoever starts a collective: it is recorded, once, with its end."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import faulttol
from faulttol import RecorderError, compiled
from faulttol.bench.parts.callers import count
from faulttol.events import KINDS
from faulttol.ring import RingReader
from parallel.pipeline.wires import Wires
from tests.ranks import run_ranks
from tests.test_faulttol import callers

RECORDERS = pytest.mark.parametrize("native", [True, False], ids=["C++", "Python"])


def _count(rank: int, world_size: int, folder: str, native: bool, names: list[str]) -> dict[str, Counter[str]]:
    """By caller: how often what was called, as torch's profiler counts it."""
    recorder = faulttol.install(folder, native=native)
    every = callers.QUICK | callers.HEAVY
    counts = count(rank, world_size, "cpu", {name: every[name] for name in names})
    dist.barrier()
    deadline = time.monotonic() + 10
    while recorder.num_pending and time.monotonic() < deadline:
        time.sleep(0.001)
    faulttol.uninstall()
    return counts


def _check(folder: Path, counts: list[dict[str, Counter[str]]]) -> None:
    for rank, of_callers in enumerate(counts):
        record = faulttol.read_ring(faulttol.ring_path(folder, rank))
        assert record.num_lost == 0
        for name, called in of_callers.items():
            events = [event for event in record.events if event.phase == name]
            assert [event for event in events if event.state != "ended"] == [], (rank, name)
            assert Counter(event.kind for event in events) == called, (rank, name)
            assert called, (rank, name)


@RECORDERS
def test_every_collective_of_every_caller_is_recorded_once_with_its_end(tmp_path: Path, native: bool) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), native, list(callers.QUICK)))


@pytest.mark.slow
@RECORDERS
def test_collectives_of_deepspeed_and_of_inductor_are_recorded_too(tmp_path: Path, native: bool) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), native, list(callers.HEAVY), timeout_s=180))


_OF_METHODS = {"bare": callers.KINDS_OF_METHODS, "group": callers.KINDS_OF_METHODS | callers.KINDS_OF_GROUPS}


def _call_methods(rank: int, world_size: int, folder: str, native: bool) -> None:
    store = dist.PrefixStore("methods", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    bare = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))  # type: ignore[attr-defined]
    faulttol.install(folder, native=native)
    for owner, of in (("bare", bare), ("group", dist.group.WORLD)):
        calls = callers.methods(of, rank)
        for kind in _OF_METHODS[owner]:
            faulttol.mark_step(3, phase=f"{owner} {kind}")
            calls[kind]().wait()
    faulttol.uninstall()


@RECORDERS
def test_every_kind_as_a_method_is_recorded_with_what_it_moves(tmp_path: Path, native: bool) -> None:
    run_ranks(_call_methods, 2, str(tmp_path), native)
    record = faulttol.read_ring(faulttol.ring_path(tmp_path, 0))
    expected = []
    for owner, kinds in _OF_METHODS.items():
        for kind, size in kinds.items():
            is_rooted = owner == "group" and kind in ("broadcast", "reduce", "gather", "scatter")
            peer = 1 if kind in ("send", "recv") else 0 if is_rooted else None
            expected.append((f"{owner} {kind}", kind, peer, size, "" if kind == "barrier" else "float64"))
    assert [(e.phase, e.kind, e.peer, e.bytes, e.dtype) for e in record.events] == expected
    assert {(event.step, event.state) for event in record.events} == {(3, "ended")}
    assert record.num_lost == 0
    assert {event.kind for event in record.events} == set(KINDS) - {"monitored_barrier"}, "which is only a function"


def _world_of_one(rank: int, world_size: int, folder: str, native: bool) -> None:
    """What holds of the recorder in any process; one fork is cheaper than many."""
    both = (_marks, _restores, _failures_are_told, _groups_of_one_name, _forks, _modes_come_first)
    of_one = (_ends_are_seen_as_they_happen,) if native else (_never_raises, _one_at_a_time, _rests, _ends_in_passing)
    for check in (*both, *of_one):
        check(Path(folder) / check.__name__, native)
        faulttol.uninstall()


@RECORDERS
def test_the_recorder_keeps_its_promises_in_a_process(tmp_path: Path, native: bool) -> None:
    run_ranks(_world_of_one, 1, str(tmp_path), native)


def _rests(folder: Path, native: bool) -> None:
    """Works begun in backward are let go of here, never by a thread of gloo's: it would need Python's lock for that."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), bucket_cap_mb=1e-4)
    model(torch.ones(2, 8)).sum().backward()  # builds its buckets anew
    recorder = faulttol.install(folder, poll_s=30, native=native)
    recorder._looked_ns = 1 << 62  # nothing is ended in passing
    dist.all_reduce(torch.ones(1))
    model(torch.ones(2, 8)).sum().backward()
    held = [token.work for token in recorder._pending.values() if token.in_backward] + [
        work for _, work in recorder._resting
    ]
    assert len(held) >= 4
    refs = [weakref.ref(work) for work in held]
    held.clear()
    assert all(ref() is not None for ref in refs)
    faulttol.uninstall()
    assert [ref for ref in refs if ref() is not None] == []


def _ends_in_passing(folder: Path, native: bool) -> None:
    """What nobody waits for in Python is ended by a mark and by the next collective, before the watcher looks."""
    recorder = faulttol.install(folder, poll_s=30, native=native)
    unawaited = []
    for passing in (lambda: faulttol.mark_step(1), lambda: dist.broadcast(torch.ones(1), 0)):
        works = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(3)]
        while not all(work.is_completed() for work in works):  # type: ignore[union-attr]
            pass
        assert recorder.num_pending
        recorder._looked_ns = 0  # as if the last look had been long ago
        passing()
        assert not recorder.num_pending
        unawaited += works
    events = faulttol.read_ring(faulttol.ring_path(folder, 0)).events
    assert [(e.kind, e.state, e.end_is_late) for e in events[:6]] == [("all_reduce", "ended", True)] * 6
    assert [(e.kind, e.state) for e in events[6:]] == [("broadcast", "ended")]
    for work in unawaited:
        work.wait()  # type: ignore[union-attr]
    assert len(faulttol.read_ring(faulttol.ring_path(folder, 0)).events) == 7


def _marks(folder: Path, native: bool) -> None:
    faulttol.mark_step(1)  # nothing is installed: nothing happens
    faulttol.install(folder, native=native)
    dist.all_reduce(torch.ones(1))
    faulttol.mark_step(7, tokens=100)
    dist.all_reduce(torch.ones(1))
    faulttol.mark_phase("checkpoint")
    dist.all_reduce(torch.ones(1))
    faulttol.mark_step(8)
    faulttol.mark_step_end(loss=0.5, grad_norm=float("nan"))
    record = faulttol.read_ring(faulttol.ring_path(folder, 0))
    assert [(e.step, e.phase) for e in record.events] == [(-1, "train"), (7, "train"), (7, "checkpoint")]
    kinds = [(mark.kind, mark.step) for mark in record.marks]
    assert kinds == [("step_begin", 7), ("phase", 7), ("step_end", 7), ("step_begin", 8), ("step_end", 8)]
    assert record.marks[0].tokens == 100
    assert record.marks[-1].is_numeric_fault


def _restores(folder: Path, native: bool) -> None:
    backend = torch._C._distributed_c10d.Backend
    places = [
        (dist.Work, "wait"),
        (dist.ProcessGroup, "_end_coalescing"),
        (dist.ProcessGroup, "_start_coalescing"),
        (backend, "send"),
    ]
    places += [(dist.distributed_c10d.ProcessGroupGloo, "__init__")]
    before = [vars(owner).get(name) for owner, name in places]
    for _ in range(2):
        faulttol.install(folder, native=native)
        assert [vars(owner).get(name) for owner, name in places] != before
        dist.all_reduce(torch.ones(1))
        faulttol.uninstall()
        faulttol.uninstall()
        assert [vars(owner).get(name) for owner, name in places] == before
        dist.all_reduce(torch.ones(1))
        assert len(faulttol.read_ring(faulttol.ring_path(folder, 0)).events) == 1
    for key in ("BackendSelect", "ADInplaceOrView"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", key)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("_c10d_functional::wait_tensor", "BackendSelect")
    assert not [thread for thread in threading.enumerate() if thread.name == "faulttol-recorder"]


def _never_raises(folder: Path, native: bool) -> None:
    recorder = faulttol.install(folder, native=native)
    x = torch.ones(2)
    original, recorder.ring.begin = recorder.ring.begin, None  # type: ignore[method-assign, assignment]
    dist.all_reduce(x)
    faulttol.mark_step(1)
    recorder.ring.begin = original  # type: ignore[method-assign]
    dist.all_reduce(x)
    faulttol.mark_step_end(loss=torch.ones((), device="meta"))  # type: ignore[arg-type]  # to read it would wait
    record = faulttol.read_ring(recorder.ring.path)
    assert x.tolist() == [1.0, 1.0]
    assert (len(record.events), len(record.marks), record.num_lost) == (1, 0, 3)


def _failures_are_told(folder: Path, native: bool) -> None:
    faulttol.install(folder, native=native)
    with pytest.raises((RuntimeError, ValueError)):
        dist.group.WORLD.scatter(torch.ones(2), [torch.ones(3)], 0).wait()  # type: ignore[union-attr]
    (event,) = faulttol.read_ring(faulttol.ring_path(folder, 0)).events
    assert (event.kind, event.state) == ("scatter", "failed")
    assert event.end_ns is not None


def _groups_of_one_name(folder: Path, native: bool) -> None:
    """A group that is made anew under the name of one that is gone counts anew, under a name of its own."""
    faulttol.install(folder, native=native)
    for _ in range(3):
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        for _ in range(3):
            dist.all_reduce(torch.ones(1))
    events = faulttol.read_ring(faulttol.ring_path(folder, 0)).events
    assert [(event.group, event.seq) for event in events] == [(g, n) for g in ("0", "0~2", "0~3") for n in (1, 2, 3)]


def _one_at_a_time(folder: Path, native: bool) -> None:
    faulttol.install(folder, native=native)
    with pytest.raises(RecorderError, match="is being recorded"):
        faulttol.install(folder, native=native)
    faulttol.uninstall()
    with pytest.raises(ValueError, match="rank: 3 is none of 2"):
        faulttol.install(folder, rank=3, world_size=2)
    with pytest.raises(ValueError, match="poll_s"):
        faulttol.install(folder, poll_s=0.0)
    faulttol.install(folder, generation=4)
    assert faulttol.ring_path(folder, 0, 4).exists()


def _forks(folder: Path, native: bool) -> None:
    """A forked child does not write into its parent's ring, nor close it; it may record into one of its own."""
    faulttol.install(folder, native=native)
    dist.all_reduce(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # it outlives its parent's test otherwise, if it hangs
        faulttol.mark_step(99)
        faulttol.install(folder / "child", native=native)
        faulttol.mark_step(98)
        dist.all_reduce(torch.ones(1), group=dist.new_group([0]))  # the threads of the old one are its parent's
        faulttol.uninstall()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with RingReader(faulttol.ring_path(folder, 0)) as reader:
        assert not reader.is_closed
        dist.all_reduce(torch.ones(1))
        record = reader.poll()
    assert not record.marks
    assert [event.seq for event in record.events] == [1, 2]
    of_child = faulttol.read_ring(faulttol.ring_path(folder / "child", 0))
    assert [mark.step for mark in of_child.marks] == [98]
    assert [event.kind for event in of_child.events] == ["all_reduce"]


class _Refuses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every call from the backend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InterruptedError


def _modes_come_first(folder: Path, native: bool) -> None:
    """A call that a mode of Python's takes away from the backend did not happen."""
    faulttol.install(folder, native=native)
    x = torch.ones(1)
    for _ in range(2):
        dist.all_reduce(x)
    for _ in range(2):
        with pytest.raises(InterruptedError), _Refuses():  # type: ignore[no-untyped-call]
            dist.all_reduce(x)
    dist.all_reduce(x)
    events = faulttol.read_ring(faulttol.ring_path(folder, 0)).events
    assert [(event.seq, event.state) for event in events] == [(1, "ended"), (2, "ended"), (3, "ended")]


def _ends_are_seen_as_they_happen(folder: Path, native: bool) -> None:
    """What nobody waits for has its end once it is over, though nothing of Python's ran since."""
    recorder = faulttol.install(folder, poll_s=30, native=native)
    assert recorder.is_native
    x = torch.ones(1)
    dist.all_reduce(x)  # the first of its kind comes past Python
    works = [dist.all_reduce(x, async_op=True) for _ in range(3)]
    while not all(work.is_completed() for work in works):  # type: ignore[union-attr]
        pass
    assert recorder.num_pending == 0
    events = faulttol.read_ring(faulttol.ring_path(folder, 0)).events[1:]
    assert [(event.state, event.end_is_late) for event in events] == [("ended", False)] * 3


def _same(rank: int, world_size: int, folder: str) -> None:
    """Everything twice, first from Python: the part in C++ records what it knows, which is what came before."""
    control = dist.new_group(timeout=timedelta(seconds=20))
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), bucket_cap_mb=1e-4)
    parts = [torch.ones(3) for _ in range(world_size)]
    for _ in range(2):  # builds its buckets anew
        model(torch.ones(2, 8)).sum().backward()
    for native in (False, True):
        faulttol.install(folder, generation=int(native), native=native)
        for step in range(4):
            faulttol.mark_step(step, tokens=7 * step, phase="train" if step % 2 else "eval")
            model(torch.ones(2, 8)).sum().backward()
            for dtype in (torch.float32, torch.int64):
                dist.all_reduce(torch.ones(5, dtype=dtype), group=control)
                dist.broadcast(torch.ones(2, 5, dtype=dtype), 1)
            dist.all_gather(parts, torch.ones(3))
            dist.reduce_scatter(torch.ones(3), parts)
            dist.gather(torch.ones(3), parts if rank == 0 else None)
            dist.barrier()
            with torch.inference_mode():
                dist.all_reduce(torch.ones(3))
            if rank == 0:
                dist.send(torch.ones(1), 1)
            else:
                dist.recv(torch.ones(1), 0)
            faulttol.mark_step_end(loss=0.5 * step, grad_norm=None if step else math.inf)
        faulttol.uninstall()
    del model
    fails = dist.new_group(timeout=timedelta(seconds=1))
    faulttol.install(folder, generation=2, native=True)
    for _ in range(2):
        dist.all_reduce(torch.ones(1), group=fails)
    dist.barrier()
    if rank == 0:
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=fails)
    dist.barrier(group=control)
    faulttol.uninstall()


def test_both_recorders_write_the_same(tmp_path: Path) -> None:
    run_ranks(_same, 2, str(tmp_path))
    for rank in range(2):
        python, native = (faulttol.read_ring(faulttol.ring_path(tmp_path, rank, place)) for place in (0, 1))
        assert python.num_lost == native.num_lost == 0
        assert [replace(mark, at_ns=0) for mark in python.marks] == [replace(mark, at_ns=0) for mark in native.marks]
        timeless = [
            [replace(event, begin_ns=0, end_ns=0, end_is_late=False) for event in record.events]
            for record in (python, native)
        ]
        assert timeless[0] == timeless[1]
        assert {event.state for event in timeless[1]} == {"ended"}
        assert all(event.begin_ns < (event.end_ns or 0) for event in native.events)
        assert sum(event.end_is_late for event in native.events) < sum(event.end_is_late for event in python.events)
    refused = faulttol.read_ring(faulttol.ring_path(tmp_path, 0, 2)).events
    assert [(event.kind, event.seq) for event in refused if event.state == "failed"] == [("all_reduce", 3)]


def _many_at_once(rank: int, world_size: int, folder: str) -> None:
    """Eight threads, each with its group, and marks beside them: all that is written is whole, and nothing is lost."""
    groups = [dist.new_group() for _ in range(8)]
    faulttol.install(folder, native=True)

    def talk(group: Any) -> None:
        for _ in range(200):
            dist.all_reduce(torch.ones(1), group=group)

    threads = [threading.Thread(target=talk, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for step in range(200):
        faulttol.mark_step(step)
    for thread in threads:
        thread.join()
    faulttol.uninstall()


def test_threads_that_record_at_once_lose_nothing(tmp_path: Path) -> None:
    run_ranks(_many_at_once, 2, str(tmp_path))
    record = faulttol.read_ring(faulttol.ring_path(tmp_path, 0))
    by_group: dict[str, list[int]] = {}
    for event in record.events:
        assert event.state == "ended"
        by_group.setdefault(event.group, []).append(event.seq)
    assert sorted(map(sorted, by_group.values())) == [list(range(1, 201))] * 8
    assert len(record.marks) == 399, "a begin each, and the end of all but the last"
    indexes = [event.index for event in record.events] + [mark.index for mark in record.marks]
    assert sorted(indexes) == list(range(1, 2000))


def test_without_what_was_built_it_records_from_python_and_without_a_compiler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        with caplog.at_level("INFO"):
            assert not faulttol.install(tmp_path, rank=0, world_size=1).is_native
        faulttol.uninstall()
        assert "python -m faulttol build" in caplog.text
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RecorderError, match=r"recorder.cpp: none of c\+\+.*apt install g\+\+"):
            faulttol.install(tmp_path, rank=0, world_size=1, native=True)
        (tmp_path / "c++").write_text("#!/bin/sh\necho no such header >&2; exit 1\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        with pytest.raises(RecorderError, match="no such header"):
            faulttol.install(tmp_path, rank=0, world_size=1, native=True)
        path = compiled.library_path()
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
        assert not faulttol.install(tmp_path, rank=0, world_size=1).is_native
        faulttol.uninstall()
        with pytest.raises(RecorderError, match=r"no folder to build .*: no home\. Set XDG_CACHE_HOME"):
            faulttol.install(tmp_path, rank=0, world_size=1, native=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        path.write_bytes(b"no library")
        with pytest.raises(RecorderError, match="remove the file and build it again"):
            faulttol.install(tmp_path, rank=0, world_size=1)
        assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing half built is left"
    finally:
        faulttol.uninstall()


def _no_home() -> Path:
    raise RuntimeError("no home.")


def _stuck(rank: int, world_size: int, folder: str) -> list[tuple[str, int]]:
    """Rank 0 waits for rank 1, which looks at rank 0's ring before it comes."""
    faulttol.install(folder)
    dist.barrier()
    if rank == 1:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            opened = [e for e in faulttol.read_ring(faulttol.ring_path(folder, 0)).events if e.state == "begun"]
            if opened and opened[-1].kind == "all_reduce":
                break
            time.sleep(0.001)
        seen = [(event.kind, event.seq) for event in opened]
    dist.all_reduce(torch.ones(1))
    faulttol.uninstall()
    return seen if rank == 1 else []


def test_what_a_rank_is_stuck_in_is_seen_from_outside(tmp_path: Path) -> None:
    assert run_ranks(_stuck, 2, str(tmp_path))[1] == [("all_reduce", 2)]


def test_without_a_place_in_the_job_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RecorderError, match="neither given nor to be had"):
        faulttol.install(tmp_path)
    assert not list(tmp_path.iterdir())


def _wires(rank: int, world_size: int, folder: str) -> None:
    """Ranks 1 and 2 of three are two stages of a pipeline."""
    faulttol.install(folder)
    group = dist.new_group([2, 1])  # rank 1 is the first of it
    if rank:
        wires = Wires(group, [(0, 1)], torch.device("cpu"), 20.0)  # type: ignore[arg-type]
        x, aux = torch.ones(5), torch.zeros(())
        for _ in range(3):
            if rank == 1:
                wires.send((x, aux), 0, 1).wait()
                wires.receive(x, 1, 0).wait()
            else:
                wires.receive(x, 0, 1).wait()
                wires.send((x, aux), 1, 0).wait()
        wires.close()
    faulttol.uninstall()


def test_messages_of_our_pipelines_are_matched_between_their_ranks(tmp_path: Path) -> None:
    run_ranks(_wires, 3, str(tmp_path))
    sides = [faulttol.read_ring(faulttol.ring_path(tmp_path, rank)).events for rank in (1, 2)]
    keys = [
        {(e.group, e.source, e.target, e.seq, e.bytes) for e in events if e.is_message and e.state == "ended"}
        for events in sides
    ]
    assert keys[0] == keys[1]
    directions = Counter((source, target) for _, source, target, _, _ in keys[0])
    assert directions == {(1, 2): 4, (2, 1): 4}, "a byte to connect, and three messages"
