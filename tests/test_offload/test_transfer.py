"""Lanes keep order and carry errors; an emulated link shows what is hidden behind what."""

from __future__ import annotations

import threading

import pytest
import torch

from offload.calibrate import calibrate
from offload.errors import TierFull
from offload.optimizer import TieredAdamW, Tiering
from offload.transfer import HostMemory, Ring, ThreadLanes, finished


def test_a_lane_runs_in_order_and_waits_for_the_tickets_of_others() -> None:
    lanes = ThreadLanes()
    seen: list[str] = []
    gate = threading.Event()
    first = lanes.lane("a").run(lambda: (gate.wait(10), seen.append("a"))[1])
    second = lanes.lane("b").run(lambda: seen.append("b"), after=[first], num_bytes=3)
    third = lanes.lane("b").run(lambda: seen.append("c"), num_bytes=4)
    assert not second.done()
    gate.set()
    third.wait()
    assert seen == ["a", "b", "c"]
    assert lanes.lane("b").num_bytes == 7
    lanes.hold(second)
    lanes.now().wait()
    lanes.close()
    lanes.close()


def test_what_goes_wrong_in_a_lane_is_raised_by_its_ticket_and_by_those_after_it() -> None:
    lanes = ThreadLanes()

    def fail() -> None:
        raise RuntimeError("broken")

    broken = lanes.lane("a").run(fail)
    after = lanes.lane("b").run(lambda: None, after=[broken])
    for ticket in (broken, after):
        with pytest.raises(RuntimeError, match="broken"):
            ticket.wait()
    lanes.lane("a").run(lambda: None).wait()
    lanes.close()


def test_host_memory_is_bounded_page_aligned_and_zero() -> None:
    with HostMemory(pinned=False, limit_bytes=1 << 20) as memory:
        tensor = memory.empty(1000, torch.float32)
        assert tensor.data_ptr() % 4096 == 0
        assert not tensor.any()
        assert memory.num_bytes == 4000
        with pytest.raises(TierFull, match="give it 4000 more"):
            memory.empty(1 << 20, torch.uint8)
    tensor.fill_(1)
    assert memory.pinned_bytes == 0


def test_a_ring_gives_a_buffer_again_when_its_ticket_is_done() -> None:
    ring = Ring(["a", "b"])
    lanes = ThreadLanes()
    gate = threading.Event()
    index, buffer = ring.take()
    ring.give(index, lanes.lane("x").run(lambda: (gate.wait(10), None)[1]))
    assert (buffer, ring.take()[1]) == ("a", "b")
    threading.Timer(0.0, gate.set).start()
    assert ring.take() == (0, "a")
    assert gate.is_set()
    lanes.close()
    finished().wait()


def test_under_a_slow_link_the_caller_waits_for_the_first_module_alone() -> None:
    """An emulated link on a CPU: `sync` waits for the whole update, `defer` for what the module needs."""
    waits = {}
    for mode in ("sync", "defer"):
        layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(8)]
        # 8 x 16 KiB of parameters; each takes 8 ms on this link.
        settings = Tiering(subgroup_numel=4096, num_threads=1, link_bytes_per_s=2e6)
        parameters = [layer.weight for layer in layers]
        with TieredAdamW(parameters, mode=mode, tiering=settings) as optimizer:  # type: ignore[arg-type]
            optimizer.attach(torch.nn.Sequential(*layers))
            sum(weight.sum() for weight in parameters).backward()  # type: ignore[union-attr]
            optimizer.step()
            layers[0](torch.zeros(64))
            waits[mode] = optimizer.stall_s
            lane = optimizer.machine.lanes.lane("parameters up")
            optimizer.wait()
            assert lane.num_bytes == 8 * 4 * 4096
    # The first of 8 parameters against all 8, and gradients on their way down before in both.
    assert waits["defer"] < 0.75 * waits["sync"]


def test_rates_are_measured_with_the_optimizers_own_kernels() -> None:
    rates = calibrate(torch.device("cpu"), num_threads=1, numel=1 << 16, budget_s=0.05)
    assert rates.cpu > 1e6
    assert rates.up > 1e6
