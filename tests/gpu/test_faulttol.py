"""The recorder on CUDA never waits for the device."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

import faulttol
from tests.gpu.devices import needs_gpus
from tests.ranks import run_ranks

pytestmark = needs_gpus(1)
STEPS = 20
CYCLES = 4_000_000_000
"""Two seconds and more."""


def busy_rank(rank: int, world_size: int, folder: str) -> tuple[bool, list[str]]:
    """Record steps while the device is held up; return whether it still was afterwards, and how the records stood."""
    x = torch.ones(1024, device="cuda")
    recorder = faulttol.install(folder)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    torch.cuda.set_sync_debug_mode("error")
    for step in range(STEPS):
        faulttol.mark_step(step)
        dist.all_reduce(x)
        faulttol.mark_step_end(loss=0.5)
    torch.cuda.set_sync_debug_mode("default")
    time.sleep(0.2)  # looks of the recorder's thread
    states = [event.state for event in faulttol.read_ring(recorder.ring.path).events if event.step >= 0]
    is_busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    deadline_s = time.monotonic() + 10
    while recorder.num_pending and time.monotonic() < deadline_s:
        time.sleep(0.001)
    faulttol.uninstall()
    return is_busy, states


def test_recording_never_waits_for_the_gpu(tmp_path: Path) -> None:
    ((is_busy, states),) = run_ranks(busy_rank, 1, str(tmp_path), backend="nccl", timeout_s=300)
    assert is_busy
    assert states == ["begun"] * STEPS
    events = [event for event in faulttol.read_ring(faulttol.ring_path(tmp_path, 0)).events if event.step >= 0]
    assert [event.state for event in events] == ["ended"] * STEPS
    assert all(event.device_ns is not None for event in events)
