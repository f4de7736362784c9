"""Survivors leave collectives that never end and form groups anew; older generations may not write."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, not in __all__
from torch.distributed import distributed_c10d as c10d

import checkpoint as ck
from faulttol import fence
from faulttol.abort import abort_devices, quiesce
from faulttol.errors import Corrupted
from faulttol.recovery import Assignment, Member, Standing
from tests.ranks import run_ranks

_TIMEOUT_S = 60.0


def _store(port: int, *, is_served: bool = False) -> TCPStore:
    return TCPStore("127.0.0.1", port, None, is_served, timedelta(seconds=_TIMEOUT_S), wait_for_workers=False)


def _described(error: BaseException) -> tuple[tuple[str, ...], str]:
    return (f"{type(error).__name__}: {error}",), ""


class _Rank:
    """A member whose work is to add up ranks, over all and over a group of two; rank 2 stays away the first time."""

    def __init__(self, port: int) -> None:
        self.standings: list[Standing] = []
        self.member = Member(self.standings.append, _described)
        self.entered = threading.Event()
        self._port = port

    def work(self, assignment: Assignment) -> list[float]:
        rank, world_size = assignment.place["rank"], assignment.place["world_size"]
        with self.member.connections.recording():
            store = PrefixStore(f"generation{assignment.generation}", _store(self._port))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            pair = dist.new_group([0, 1])
        sums = []
        for group in (pair, dist.group.WORLD):
            if group is pair and rank > 1:
                continue
            if group is not pair and assignment.generation == 0:
                if rank == 2:
                    self.entered.set()
                    threading.Event().wait(_TIMEOUT_S)  # hangs outside of any collective
                self.entered.set()
            total = torch.full((1000,), float(rank + 1))
            dist.all_reduce(total, group=group)
            sums.append(float(total[0]))
        dist.destroy_process_group()
        return sums


def _survive(rank: int, world_size: int, port: int) -> tuple[list[float] | None, list[tuple[int, str]], float]:
    dist.destroy_process_group()  # the one that run_ranks made
    told = _store(port)
    if rank == 2:
        # Ends with its process, at the end of the function: as a rank that is ended.
        one = _Rank(port)
        threading.Thread(target=one.member.run, args=(one.work,), daemon=True).start()
        one.member.assign(Assignment(0, {"rank": rank, "world_size": world_size}))
        told.wait(["over"], timedelta(seconds=_TIMEOUT_S))
        return None, [], 0.0
    one = _Rank(port)
    one.member.assign(Assignment(0, {"rank": rank, "world_size": world_size}))
    freed_s: list[float] = []

    def supervise() -> None:
        one.entered.wait(_TIMEOUT_S)
        time.sleep(0.1)  # well inside the collective, which never ends: any moment will do
        one.member.abort(0)
        began_s = time.monotonic()
        _until(lambda: Standing(0, "quiesced") in [Standing(s.generation, s.state) for s in one.standings])
        freed_s.append(time.monotonic() - began_s)
        one.member.assign(Assignment(1, {"rank": rank, "world_size": 2}))
        _until(lambda: one.standings[-1].state == "finished")
        one.member.dismiss()

    threading.Thread(target=supervise, daemon=True).start()
    result = one.member.run(one.work)
    told.add("done", 1)
    if rank == 0:
        _until(lambda: told.add("done", 0) == 2)
        told.set("over", "")
    return result, [(s.generation, s.state) for s in one.standings], freed_s[0]


def _until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_survivors_of_a_rank_that_hangs_leave_their_collective_and_form_groups_anew() -> None:
    # Served here, as a launcher does: a rank that served it would shut it with its own connections.
    store = _store(0, is_served=True)
    results = run_ranks(_survive, 3, store.port)
    states = [(-1, "standby"), (0, "working"), (0, "failed"), (0, "quiesced"), (1, "working"), (1, "finished")]
    for rank in range(2):
        sums, told, freed_s = results[rank]
        assert sums == [3.0, 3.0], "over the pair, and over the two that are left"
        assert told == states
        assert freed_s < 5.0, "gloo's own timeout is half an hour"


def test_a_rank_whose_group_never_came_to_be_meets_fresh_ranks_in_the_next() -> None:
    with pytest.raises(dist.DistError) as caught:  # as when a rank is lost while groups are formed
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=2, timeout=timedelta(seconds=0.05))
    quiesce(caught.value)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        assert dist.group.WORLD.group_name == "0"
    finally:
        dist.destroy_process_group()


def test_an_assignment_that_was_aborted_before_it_began_is_not_worked_on() -> None:
    told: list[Standing] = []
    member = Member(told.append, _described)
    member.assign(Assignment(3, {}))
    member.abort(3)
    worked: list[int] = []
    threading.Thread(target=lambda: (_until(lambda: len(told) == 2), member.dismiss()), daemon=True).start()
    assert member.run(lambda assignment: worked.append(assignment.generation)) is None
    assert not worked
    assert [(standing.generation, standing.state) for standing in told] == [(-1, "standby"), (3, "quiesced")]


def test_a_fence_admits_the_current_generation_alone(tmp_path: Path) -> None:
    path = tmp_path / "generation"
    old = fence.Fence(path, 0)
    with pytest.raises(fence.Fenced, match="cannot tell the current generation"):
        old.check()
    fence.publish(path, 0)
    old.check()
    fence.publish(path, 1)
    fence.Fence(path, 1).check()
    with pytest.raises(fence.Fenced, match=r"generation 0 is over, the job is in generation 1"):
        old.check()
    path.write_text("damaged")
    with pytest.raises(fence.Fenced):
        old.check()


def test_a_zombie_commits_no_checkpoint_and_removes_none(tmp_path: Path) -> None:
    """A rank of generation 0 wakes up after generation 1 began: what it saves does not become a checkpoint."""
    path = tmp_path / "generation"
    fence.publish(path, 0)
    config = ck.CheckpointConfig(keep_last=1, on_error="warn")
    state = {"w": torch.arange(10.0)}
    with ck.Checkpointer(tmp_path / "root", config=config) as zombie:
        zombie.admit_with(fence.Fence(path, 0).check)
        zombie.save(1, state).result()
        fence.publish(path, 1)
        with ck.Checkpointer(tmp_path / "root", config=config) as successor:
            successor.admit_with(fence.Fence(path, 1).check)
            successor.save(2, state).result()
            refused = zombie.save(3, state)
            assert isinstance(refused.exception(), fence.Fenced)
            assert [info.step for info in successor.list()] == [2]
            latest = successor.latest(verify="deep")
            assert latest is not None
            assert latest.step == 2


def test_saves_that_wait_for_a_lost_ranks_vote_are_given_up_when_cancelled(tmp_path: Path) -> None:
    config = ck.CheckpointConfig(on_error="warn")
    began_s = time.monotonic()
    with ck.Checkpointer(tmp_path / "root", config=config, world_size=2, run_id="a") as alone:
        handle = alone.save(1, {"w": torch.arange(10.0)})
        lost = ck.SaveFailed("rank 1 is lost")
        alone.cancel(lost)
        assert handle.exception() is lost
    assert time.monotonic() - began_s < config.commit_timeout_s / 10


def test_an_abort_reaches_groups_of_devices_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the communicators of NCCL do with it takes GPUs; that they are found, and gloo's are not, does not."""
    aborted: list[str] = []

    class _Group:
        def __init__(self, name: str) -> None:
            self.abort = lambda: aborted.append(name)

    groups = {_Group(name): (name, None) for name in ("nccl", "gloo", "cpu:gloo,cuda:nccl")}
    abort_devices()
    assert not aborted, "nothing is initialised here"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(c10d, "_world", SimpleNamespace(pg_map=groups))
    abort_devices()
    assert aborted == ["nccl", "cpu:gloo,cuda:nccl"]
    assert callable(dist.ProcessGroup.abort), "what a real one has"


def test_wrong_numbers_are_told_with_their_ranks_through_json() -> None:
    told: list[Standing] = []
    member = Member(
        lambda standing: told.append(Standing.from_json(json.loads(json.dumps(standing.to_json())))), _described
    )

    def work(assignment: Assignment) -> None:
        try:
            raise Corrupted("a bit", (2,))
        except Corrupted as error:
            raise RuntimeError("in step 3") from error

    member.assign(Assignment(0, {}))
    threading.Thread(target=lambda: (_until(lambda: len(told) == 4), member.dismiss()), daemon=True).start()
    member.run(work)
    assert [(standing.state, standing.corrupted) for standing in told[2:]] == [("failed", (2,)), ("quiesced", (2,))]
    assert told[0].corrupted is None


def test_the_next_generation_begins_when_nobody_breaks_off_the_one_before_any_more() -> None:
    standings: list[Standing] = []
    member = Member(standings.append, _described)
    order: list[str] = []
    entered, freed = threading.Event(), threading.Event()

    def late() -> None:
        freed.set()  # the work ends now, and the thread that broke it off is still at it
        time.sleep(0.3)
        order.append("broken off")

    def broken() -> None:
        raise RuntimeError("a release with a mistake")

    def work(assignment: Assignment) -> int:
        order.append(f"work {assignment.generation}")
        if assignment.generation == 0:
            with member.releasing(broken), member.releasing(late):
                entered.set()
                assert freed.wait(_TIMEOUT_S), "another release failed, and so this one was never called"
                raise RuntimeError("broken off")
        return assignment.generation

    def give_orders() -> None:
        member.assign(Assignment(0, {}))
        entered.wait(_TIMEOUT_S)
        member.abort(0)
        freed.wait(_TIMEOUT_S)
        member.assign(Assignment(1, {}))
        _until(lambda: standings[-1].state == "finished")
        member.dismiss()

    orders = threading.Thread(target=give_orders)
    orders.start()
    assert member.run(work) == 1
    orders.join()
    assert order == ["work 0", "broken off", "work 1"]


@pytest.mark.parametrize("was_aborted", [False, True])
def test_a_standing_tells_whether_the_error_came_after_the_order_to_end(was_aborted: bool) -> None:
    standings: list[Standing] = []
    member = Member(standings.append, _described)

    def work(assignment: Assignment) -> None:
        if was_aborted:
            member.abort(0)
        member.dismiss()
        raise KeyError("lost")

    member.assign(Assignment(0, {}))
    member.run(work)
    told = {standing.state: standing for standing in standings}
    assert told["failed"].was_aborted is told["quiesced"].was_aborted is was_aborted
    assert Standing.from_json(told["quiesced"].to_json()) == told["quiesced"]


def test_work_is_broken_off_and_the_next_begun_though_the_machine_has_no_room_for_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    standings: list[Standing] = []
    member = Member(standings.append, _described)
    freed = threading.Event()

    def work(assignment: Assignment) -> int:
        if assignment.generation == 0:
            with member.releasing(freed.set):
                assert freed.wait(_TIMEOUT_S)
                raise RuntimeError("broken off")
        member.dismiss()
        return assignment.generation

    def give_orders() -> None:
        member.assign(Assignment(0, {}))
        _until(lambda: bool(standings) and standings[-1].state == "working")
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Thread", Refused)
            member.abort(0)
        member.assign(Assignment(1, {}))

    orders = threading.Thread(target=give_orders)
    orders.start()
    assert member.run(work) == 1
    orders.join()
