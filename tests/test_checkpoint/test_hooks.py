"""Fences that nobody calls: the hooks of torch optimizers and of DeepSpeed engines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoint import CheckpointConfig, Checkpointer, RankLocal
from checkpoint.errors import TornSnapshot
from checkpoint.hooks import fence_on
from checkpoint.staging import storage_address
from tests.ranks import run_ranks
from tests.test_checkpoint.stalls import stalled
from tests.test_checkpoint.worlds import wait_until

CASES = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
"""ZeRO stages, with the optimizer on its GPU and on the CPU."""


class Watched:
    """A Checkpointer's fences; the first one lets stalled copies go on, behind its back."""

    def __init__(self, ck: Checkpointer, release: Callable[[], None]) -> None:
        self.calls: list[set[int]] = []
        self._ck = ck
        self._release = release

    def fence(self) -> None:
        self.calls.append(set())
        threading.Thread(target=self._release).start()
        self._ck.fence()

    def fence_storages(self, addresses: Callable[[], set[int]]) -> None:
        self.calls.append(addresses())
        threading.Thread(target=self._release).start()
        self._ck.fence_storages(addresses)


def test_a_hooked_optimizer_waits_for_the_copies_of_what_it_updates(tmp_path: Path):
    first, second = torch.nn.Parameter(torch.ones(50)), torch.nn.Parameter(torch.ones(50))
    optimizers = [torch.optim.AdamW([p], lr=0.1) for p in (first, second)]
    for parameter, optimizer in zip((first, second), optimizers, strict=True):
        parameter.grad = torch.ones(50)
        optimizer.step()
    saved = {
        "first": first,
        "second": second,
        **{f"{i}.{key}": v for i, o in enumerate(optimizers) for key, v in next(iter(o.state.values())).items()},
    }
    order = [[n for n in saved if n == "first" or n[0] == "0"], [n for n in saved if n == "second" or n[0] == "1"]]
    expected = {name: t.detach().clone() for name, t in saved.items()}
    with Checkpointer(tmp_path) as ck:
        ck.prepare(saved, order)
        with stalled(ck) as release:
            watched = Watched(ck, release)
            hooks = [fence_on(optimizer, watched) for optimizer in optimizers]
            handle = ck.save(1, saved, update_order=order)
            optimizers[1].step()
            optimizers[0].step()
        found = {name: torch.zeros_like(t) for name, t in saved.items()}
        ck.load(handle.result(20), found)
        assert all(torch.equal(found[name], expected[name]) for name in saved)
        assert not torch.equal(second, expected["second"])
        states = [{p, *o.state[p].values()} for p, o in zip((first, second), optimizers, strict=True)]
        assert watched.calls == [{storage_address(t) for t in held} for held in reversed(states)]
        for hook in hooks:
            hook.remove()
        optimizers[0].step()
        assert len(watched.calls) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of what dynamo imports
def test_a_compiled_step_waits_for_the_copies_and_is_not_traced_into_them(tmp_path: Path):
    parameter = torch.nn.Parameter(torch.ones(50))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(50)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    with Checkpointer(tmp_path) as ck:
        ck.prepare({"w": parameter})
        with stalled(ck) as release:
            fence_on(optimizer, Watched(ck, release))
            handle = ck.save(1, {"w": parameter})
            compiled()
        found = torch.zeros(50)
        ck.load(handle.result(20), {"w": found})
    assert (found == 1).all()
    assert not torch.equal(parameter, found)
    (hook,) = optimizer._optimizer_step_pre_hooks.values()
    assert getattr(hook, "_torchdynamo_disable", False)  # traced, it fails only if the copies take their time just then


def test_an_optimizer_of_dtensors_waits_for_the_copies_of_their_memory(tmp_path: Path):
    assert run_ranks(_step_dtensors, 1, tmp_path) == [None]


def _step_dtensors(rank: int, world_size: int, root: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    plain = torch.ones(50)
    parameter = torch.nn.Parameter(distribute_tensor(plain, init_device_mesh("cpu", (1,)), [Replicate()]))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["nested"] = {"more": [torch.zeros(3)]}  # as third parties keep them
    parameter.grad = parameter.detach().clone()
    with Checkpointer(root) as ck:
        ck.prepare({"w": parameter})
        with stalled(ck) as release:
            watched = Watched(ck, release)
            fence_on(optimizer, watched)
            handle = ck.save(1, {"w": parameter})
            optimizer.step()
        ck.load(handle.result(20), {"w": plain.zero_()})
    assert (plain == 1).all()
    assert len(watched.calls[0]) == 2


def test_a_step_without_its_hook_fails_the_save_and_not_the_training(tmp_path: Path):
    parameter = torch.nn.Parameter(torch.ones(50))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(50)
    with Checkpointer(tmp_path) as ck:
        ck.prepare({"w": parameter})
        hook = ck.fence_on(optimizer)
        hook.remove()
        with stalled(ck):
            handle = ck.save(1, {"w": parameter})
            optimizer.step()
        with pytest.raises(TornSnapshot, match="'w' changed before the copies were over"):
            handle.result(20)
        ck.fence_on(optimizer)
        second = ck.save(2, {"w": parameter})
        optimizer.step()
        assert second.result(20).step == 2


def test_a_second_optimizer_of_an_engine_is_fenced_as_well(tmp_path: Path):
    class Halves:
        def __init__(self) -> None:
            self.parameters = [torch.nn.Parameter(torch.ones(50)) for _ in range(2)]
            self.optimizer, self.backup_optimizer = (torch.optim.SGD([p], lr=0.1) for p in self.parameters)

    halves = Halves()
    saved = dict(zip("ab", halves.parameters, strict=True))
    with Checkpointer(tmp_path) as ck:
        ck.prepare(saved)  # type: ignore[arg-type]
        with stalled(ck) as release:
            watched = Watched(ck, release)
            hook = fence_on(SimpleNamespace(optimizer=halves), watched)
            handle = ck.save(1, saved)
            halves.parameters[1].grad = torch.ones(50)
            halves.backup_optimizer.step()
            handle.result(20)
        hook.remove()
        halves.backup_optimizer.step()
    assert len(watched.calls) == 1


def test_what_has_no_optimizer_is_refused(tmp_path: Path):
    with Checkpointer(tmp_path) as ck, pytest.raises(TypeError, match=r"Linear has no torch optimizer; allowed are"):
        ck.fence_on(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_engines_of_every_stage_fence_what_they_update(tmp_path: Path):
    for found in run_ranks(_engines, 2, str(tmp_path), timeout_s=200):
        assert found == ["saved as it was, then torn"] * len(CASES)


def _engines(rank: int, world_size: int, root: str) -> list[str]:
    return [_engine(rank, world_size, f"{root}/{stage}-{off}", stage, off) for stage, off in CASES]


def _engine(rank: int, world_size: int, root: str, stage: int, offload: bool) -> str:
    from tests.test_checkpoint.engines import engine_of, train

    engine = engine_of(stage, offload=offload)
    train(engine, 2)
    order = _groups(engine, stage)
    saved = {name: RankLocal(t) for group in order for name, t in group.items()}
    names = [list(group) for group in order]
    expected = {name: value.tensor.clone() for name, value in saved.items()}
    config = CheckpointConfig(commit_timeout_s=60)
    with Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id="run", on_error="warn") as ck:
        ck.prepare(saved, names)
        with stalled(ck) as release:
            watched = Watched(ck, release)
            hook = fence_on(engine, watched)
            handle = ck.save(1, saved, update_order=names)
            train(engine, 1, seed=1)
        info = handle.result(60)
        found = {name: RankLocal(torch.zeros_like(t)) for name, t in expected.items()}
        ck.load(info, found)
        assert all(_bits(found[name].tensor) == _bits(t) for name, t in expected.items())
        assert any(_bits(saved[name].tensor) != _bits(t) for name, t in expected.items())
        if stage:
            assert len(watched.calls) == len(order) > 1
            for group, storages in zip(order, watched.calls, strict=True):
                assert {storage_address(t) for t in group.values()} <= storages
        hook.remove()
        with stalled(ck):
            handle = ck.save(2, saved, update_order=names)
            wait_until(lambda: handle._snapshot.has_parcels)
            train(engine, 1, seed=2)
        error = handle.exception(60)
    assert isinstance(error, TornSnapshot)
    return "saved as it was, then torn"


def _bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes: padding may be nan, which equals nothing."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def _groups(engine: Any, stage: int) -> list[dict[str, torch.Tensor]]:
    """Return masters, their optimizer states, and the 16-bit weights, by the group in which they are updated."""
    wrapper = engine.optimizer
    inner = wrapper.optimizer if stage else wrapper
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not stage:
        tensors = {f"p{i}": p for i, p in enumerate(engine.module.parameters()) if p.requires_grad}
        states = [(i, s) for i, s in enumerate(inner.state.values())]
        return [tensors | {f"{i}.{k}": v for i, s in states for k, v in s.items() if torch.is_tensor(v)}]
    if stage < 3:
        masters, weights = wrapper.single_partition_of_fp32_groups, wrapper.parallel_partitioned_bit16_groups
    else:
        masters, weights = wrapper.fp32_partitioned_groups_flat, [[w] for w in wrapper.fp16_partitioned_groups_flat]
    groups = []
    for i, (master, flats) in enumerate(zip(masters, weights, strict=True)):
        group = {f"{i}.master": master} | {f"{i}.weight{k}": w for k, w in enumerate(flats)}
        groups.append(group | {f"{i}.{k}": v for k, v in inner.state[master].items() if torch.is_tensor(v)})
    return groups
