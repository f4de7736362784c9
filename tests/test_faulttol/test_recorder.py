"""Whoever starts a collective: it is recorded, once, with its end."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import faulttol
from faulttol import RecorderError
from faulttol.bench.parts.callers import count
from faulttol.events import KINDS
from parallel.pipeline.wires import Wires
from tests.ranks import run_ranks
from tests.test_faulttol import callers


def _count(rank: int, world_size: int, folder: str, names: list[str]) -> dict[str, Counter[str]]:
    """By caller: how often what was called, as torch's profiler counts it."""
    recorder = faulttol.install(folder)
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


def test_every_collective_of_every_caller_is_recorded_once_with_its_end(tmp_path: Path) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), list(callers.QUICK)))


@pytest.mark.slow
def test_collectives_of_deepspeed_and_of_inductor_are_recorded_too(tmp_path: Path) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), list(callers.HEAVY), timeout_s=180))


_OF_METHODS = {"bare": callers.KINDS_OF_METHODS, "group": callers.KINDS_OF_METHODS | callers.KINDS_OF_GROUPS}


def _call_methods(rank: int, world_size: int, folder: str) -> None:
    store = dist.PrefixStore("methods", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    bare = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))  # type: ignore[attr-defined]
    faulttol.install(folder)
    for owner, of in (("bare", bare), ("group", dist.group.WORLD)):
        calls = callers.methods(of, rank)
        for kind in _OF_METHODS[owner]:
            faulttol.mark_step(3, phase=f"{owner} {kind}")
            calls[kind]().wait()
    faulttol.uninstall()


def test_every_kind_as_a_method_is_recorded_with_what_it_moves(tmp_path: Path) -> None:
    run_ranks(_call_methods, 2, str(tmp_path))
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


def _world_of_one(rank: int, world_size: int, folder: str) -> None:
    """What holds of the recorder in any process; one fork is cheaper than many."""
    checks = (_marks, _restores, _never_raises, _failures_are_told, _groups_of_one_name, _one_at_a_time, _rests, _forks)
    for check in (*checks, _ends_are_seen_in_passing):
        check(Path(folder) / check.__name__)
        faulttol.uninstall()


def test_the_recorder_keeps_its_promises_in_a_process(tmp_path: Path) -> None:
    run_ranks(_world_of_one, 1, str(tmp_path))


def _rests(folder: Path) -> None:
    """Works begun in backward are let go of here, never by a thread of gloo's: it would need Python's lock for that."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), bucket_cap_mb=1e-4)
    model(torch.ones(2, 8)).sum().backward()  # builds its buckets anew
    recorder = faulttol.install(folder, poll_s=30)
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


def _ends_are_seen_in_passing(folder: Path) -> None:
    """What nobody waits for in Python is ended by a mark and by the next collective, before the watcher looks."""
    recorder = faulttol.install(folder, poll_s=30)
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


def _marks(folder: Path) -> None:
    faulttol.mark_step(1)  # nothing is installed: nothing happens
    faulttol.install(folder)
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


def _restores(folder: Path) -> None:
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
        faulttol.install(folder)
        assert [vars(owner).get(name) for owner, name in places] != before
        dist.all_reduce(torch.ones(1))
        faulttol.uninstall()
        faulttol.uninstall()
        assert [vars(owner).get(name) for owner, name in places] == before
        dist.all_reduce(torch.ones(1))
        assert len(faulttol.read_ring(faulttol.ring_path(folder, 0)).events) == 1
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "BackendSelect")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("_c10d_functional::wait_tensor", "BackendSelect")
    assert not [thread for thread in threading.enumerate() if thread.name == "faulttol-recorder"]


def _never_raises(folder: Path) -> None:
    recorder = faulttol.install(folder)
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


def _failures_are_told(folder: Path) -> None:
    faulttol.install(folder)
    with pytest.raises((RuntimeError, ValueError)):
        dist.group.WORLD.scatter(torch.ones(2), [torch.ones(3)], 0).wait()  # type: ignore[union-attr]
    (event,) = faulttol.read_ring(faulttol.ring_path(folder, 0)).events
    assert (event.kind, event.state) == ("scatter", "failed")
    assert event.end_ns is not None


def _groups_of_one_name(folder: Path) -> None:
    """A group that is made anew under the name of one that is gone counts anew, under a name of its own."""
    faulttol.install(folder)
    for _ in range(3):
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        dist.all_reduce(torch.ones(1))
    events = faulttol.read_ring(faulttol.ring_path(folder, 0)).events
    assert [(event.group, event.seq) for event in events] == [("0", 1), ("0~2", 1), ("0~3", 1)]


def _one_at_a_time(folder: Path) -> None:
    faulttol.install(folder)
    with pytest.raises(RecorderError, match="is being recorded"):
        faulttol.install(folder)
    faulttol.uninstall()
    with pytest.raises(ValueError, match="rank: 3 is none of 2"):
        faulttol.install(folder, rank=3, world_size=2)
    with pytest.raises(ValueError, match="poll_s"):
        faulttol.install(folder, poll_s=0.0)
    faulttol.install(folder, generation=4)
    assert faulttol.ring_path(folder, 0, 4).exists()


def _forks(folder: Path) -> None:
    """A forked child does not write into its parent's ring."""
    faulttol.install(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        faulttol.mark_step(99)
        os._exit(0)
    os.waitpid(pid, 0)
    assert not faulttol.read_ring(faulttol.ring_path(folder, 0)).marks


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
