"""Updates lie under backward and forward, and the trace shows what they moved and who waited for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from offload import NvmeTier, Trace
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget, Mode
from offload.tracing import COMPUTE
from tests.contracts.tier import spec
from tests.test_offload.reference import HYPER

_WIDTH = 64
_NUMEL = _WIDTH * _WIDTH


pytestmark = pytest.mark.usefixtures("one_thread")


class _Held(torch.autograd.Function):
    """Backward stops here until the updates of all later layers are done."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, optimizer: TieredAdamW, done: list[int]) -> torch.Tensor:
        ctx.kept = optimizer, done  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        optimizer, done = ctx.kept  # type: ignore[attr-defined]
        round_ = optimizer.machine.round
        assert round_ is not None
        for task in round_.tasks[1:]:
            task.updated.result(30).wait()
            done.append(task.index)
        return gradient[0], None, None


def layers_of(count: int) -> nn.Sequential:
    """Return layers that are a subgroup each."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count)))


@pytest.mark.parametrize("slow", ["link", "disk"])
def test_updates_are_made_while_backward_goes_on(slow: str, tmp_path: Path) -> None:
    """Over a slow emulated link and through a slow emulated disk: all but the first layer's, whose gradient is last."""
    model, done = layers_of(6), list[int]()
    plain = layers_of(6)
    theirs = torch.optim.AdamW(plain.parameters(), **HYPER, fused=True)
    disk = NvmeTier(spec(1 << 24, name="disk", rate=2e7, emulated=True), tmp_path, direct=False)
    budget = Budget(device_bytes=0, host_bytes=0 if slow == "disk" else None)
    link_bytes_per_s = 1e7 if slow == "link" else None
    settings = Tiering(
        accumulation_steps=1,
        subgroup_numel=_NUMEL,
        budget=budget,
        tier=disk,
        num_threads=1,
        link_bytes_per_s=link_bytes_per_s,
    )
    x = torch.randn(4, _WIDTH)
    with disk, TieredAdamW(model.parameters(), **HYPER, mode="stream", tiering=settings) as optimizer:
        for _ in range(3):
            model[1:](_Held.apply(model[0](x), optimizer, done)).square().sum().backward()
            optimizer.step()
            plain(x).square().sum().backward()
            theirs.step()
            theirs.zero_grad()
        optimizer.wait()
        assert done == [1, 2, 3, 4, 5] * 3
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["sync", "defer", "spec"])
def test_the_trace_has_transfers_updates_and_stalls_over_compute(mode: Mode, tmp_path: Path) -> None:
    model, trace, num_steps = layers_of(6), Trace(), 3
    disk = NvmeTier(spec(1 << 24, name="disk", rate=1e8, emulated=True), tmp_path, direct=False)
    # One resident, then one of two streamed, and what four subgroups of host memory do not hold on the disk.
    settings = Tiering(
        accumulation_steps=1 if mode == "spec" else None,
        subgroup_numel=_NUMEL,
        interleave=2,
        budget=Budget(device_bytes=12 * _NUMEL * 2, host_bytes=12 * _NUMEL * 4, num_slots=1),
        tier=disk,
        num_tier_slots=2,
        num_threads=1,
        link_bytes_per_s=1e8,
        trace=trace,
    )
    x = torch.randn(4, _WIDTH)
    with disk, TieredAdamW(model.parameters(), mode=mode, max_norm=1.0, tiering=settings) as optimizer:
        optimizer.attach(model)
        paths = optimizer.machine.plan.paths
        assert {path: paths.count(path) for path in set(paths)} == {"resident": 1, "cpu": 2, "stream": 2, "tier": 1}
        for _ in range(num_steps):
            with trace.phase("forward", x.device):
                loss = model(x).square().sum()
            with trace.phase("backward", x.device):
                loss.backward()
            optimizer.step()
        optimizer.wait()
        optimizer.machine.settle()
    record = trace.step()
    again = num_steps if mode == "spec" else 0  # an update that the norm contradicts is made again
    bytes_of = record.moved_bytes
    assert bytes_of["gradients down"] == num_steps * 3 * 4 * _NUMEL
    assert num_steps * 3 * 4 * _NUMEL <= bytes_of["parameters up"] <= (num_steps * 3 + again * 2) * 4 * _NUMEL
    for lane in ("states up", "states down"):
        assert num_steps * 2 * 12 * _NUMEL <= bytes_of[lane] <= (num_steps + again) * 2 * 12 * _NUMEL
    assert bytes_of["disk (emulated) read"] >= 12 * _NUMEL
    assert bytes_of["disk (emulated) write"] == num_steps * 12 * _NUMEL
    assert record.busy_s["cpu update"] > 0
    assert record.busy_s["gpu update"] > 0
    assert set(record.stalls_s) <= {"cpu", "gpu", "disk (emulated)"}
    assert record.stalls_s, "a link of 0.1 GB/s makes somebody wait"
    rows = {event["args"].get("name") for event in json.loads(json.dumps(trace.chrome()))["traceEvents"]}
    assert {COMPUTE, "stall", "cpu update", "gpu update", "states up", "disk (emulated) read"} <= rows
