"""Streamed layers and swapped activations on a GPU give what the whole model gives there, to the bit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from offload import Budget, CpuTier, GpuTier, NvmeTier, TieredAdamW, Tiering
from offload.activations import Activations, Automatic
from offload.bench.cases.models import Decoder, batch, build
from offload.cap import capped
from offload.errors import BudgetError
from offload.streaming import LayerStream, fit
from offload.swap_plan import Choice
from offload.tracing import COMPUTE, Trace
from offload.transfer import CudaLanes, HostMemory
from tests.contracts.tier import TierContract, spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
STEPS = 3


class TestGpuTier(TierContract):
    def make(self, folder: Path) -> GpuTier:
        return GpuTier(spec(), CUDA)


class TestPinnedCpuTier(TierContract):
    def make(self, folder: Path) -> CpuTier:
        return CpuTier(spec(), pinned=True)


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", ["up", "down"])
def test_small_copies_pass_the_states_that_are_enqueued_after_them(way: str) -> None:
    lanes = CudaLanes(CUDA)
    states, small = (
        lanes.lane(name) for name in (f"states {way}", f"{'parameters' if way == 'up' else 'gradients'} {way}")
    )
    there = torch.zeros(1 << 26, dtype=torch.uint8, device=CUDA)
    with HostMemory(pinned=True) as memory:
        here = memory.empty(1 << 26, torch.uint8)
        target, source = (there, here) if way == "up" else (here, there)
        ends: list[torch.cuda.Event] = []

        def copy(count: int) -> None:
            target[:count].copy_(source[:count], non_blocking=True)
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()

        for _ in range(4):
            states.run(lambda: copy(1 << 26))
        small.run(lambda: copy(1 << 20))
        for _ in range(20):
            states.run(lambda: copy(1 << 26))
        lanes.close()
        assert ends[4].elapsed_time(ends[6]) > 0  # before the second of those that were enqueued after it


def test_states_that_come_early_change_no_bit_and_do_not_raise_the_peak() -> None:
    found, peaks, nums = [], [], []
    for prefetch in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(1024, 1024, device=CUDA, dtype=torch.bfloat16) for _ in range(8)]
        model = nn.Sequential(*layers, nn.Linear(1024, 16384, device=CUDA, dtype=torch.bfloat16))  # most is its output
        budget = Budget(device_bytes=2 * 12 << 20, num_slots=2)
        tiering = Tiering(
            accumulation_steps=1, subgroup_numel=1 << 20, interleave=1, budget=budget, num_threads=2, prefetch=prefetch
        )
        with TieredAdamW(model.parameters(), lr=1e-3, mode="defer", max_norm=1.0, tiering=tiering) as optimizer:
            optimizer.attach(model)
            torch.cuda.reset_peak_memory_stats()
            num = 0
            for step in range(6):
                generator = torch.Generator(CUDA).manual_seed(step)
                x = torch.randn(8192, 1024, device=CUDA, dtype=torch.bfloat16, generator=generator)
                model(x).float().square().mean().backward()
                num = max(num, len(optimizer.machine.prefetched))
                optimizer.step()
            peaks.append(torch.cuda.max_memory_allocated())
            nums.append(num)
            states = [value.cpu().clone() for _, kinds in optimizer.states() for value in kinds.values()]
            found.append([*states, *(parameter.detach().cpu() for parameter in model.parameters())])
        del model, layers, optimizer
        gc.collect()  # the optimizer is in a cycle with its hooks
    assert nums[0] == 0 < nums[1]
    assert peaks[1] <= peaks[0] * 1.01
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def make(*, recompute: bool = False) -> Decoder:
    return build(num_layers=6, dim=512, vocab=256, head_dim=64, device=CUDA, recompute=recompute)


def train(model: Decoder) -> list[float]:
    """Plain gradient descent at a power of two, which CPU and GPU round alike; two micro-batches a step."""
    told = []
    for step in range(STEPS):
        for micro in range(2):
            loss = model(*batch(rows=2, length=256, vocab=256, device=CUDA, seed=2 * step + micro))
            loss.backward()
            told.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-(2.0**-5))
                parameter.grad = None
    return told


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_streamed_training_equals_training_whole(window: int, recompute: bool) -> None:
    plain = make(recompute=recompute).to(CUDA)
    expected = train(plain)
    model, trace = make(recompute=recompute), Trace()
    with LayerStream(model, list(model.blocks), device=CUDA, window=window, trace=trace):
        with trace.device_span("step", COMPUTE):
            assert train(model) == expected
        record = trace.step()
    assert record.moved_bytes["cpu to gpu"] > record.moved_bytes["gpu to cpu"] > 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_model_runs_from_a_disk(tmp_path: Path) -> None:
    plain = make().requires_grad_(False).to(CUDA)
    tokens, _ = batch(rows=2, length=256, vocab=256, device=CUDA, seed=1)
    model = make().requires_grad_(False)
    with NvmeTier(spec(1 << 30), tmp_path) as home:
        with LayerStream(model, list(model.blocks), device=CUDA, window=2, home=home), torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(tokens), plain(tokens))
        assert home.used_bytes == 0


CHOICES: list[tuple[Choice, ...]] = [("swap",) * 6, ("keep", "swap", "recompute") * 2]


@pytest.mark.parametrize("choices", CHOICES, ids="-".join)
def test_swapped_activations_train_to_the_same_bits(choices: tuple[Choice, ...]) -> None:
    expected = train(make().to(CUDA))
    model = make().to(CUDA)
    with Activations(list(model.blocks), choices, device=CUDA) as activations:
        activations.attach()
        assert train(model) == expected
        assert activations.swapped_bytes > 0
    model = make().to(CUDA)
    with Automatic(model, list(model.blocks), device=CUDA, budget_bytes=64 << 20) as automatic:
        assert train(model) == expected
        assert automatic.plan is not None


def test_streamed_layers_swap_to_the_same_bits() -> None:
    expected = train(make().to(CUDA))
    model = make()
    blocks = list(model.blocks)
    with (
        Activations(blocks, CHOICES[1], device=CUDA) as activations,
        LayerStream(model, blocks, device=CUDA, window=2, saved=activations),
    ):
        assert train(model) == expected


def test_swapping_lowers_the_peak() -> None:
    def peak(choice: Choice) -> int:
        model = make().to(CUDA)
        with Activations(list(model.blocks), [choice] * 6, device=CUDA) as activations:
            activations.attach()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            given = batch(rows=16, length=256, vocab=256, device=CUDA, seed=1)
            model(*given).backward()
            return torch.cuda.max_memory_allocated() - before

    assert peak("swap") < peak("keep")


def test_a_cap_holds() -> None:
    model = make(recompute=True)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    cap = torch.cuda.memory_allocated() + (256 << 20)
    with (
        capped(CUDA, cap) as usage,
        fit(model, list(model.blocks), device=CUDA, budget_bytes=weights * 3 // 4) as stream,
    ):
        train(model)
        assert stream.device_bytes <= weights * 3 // 4
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
    assert 0 < usage.peak_bytes <= cap
    with pytest.raises(BudgetError, match="cap: cpu has no memory of its own"), capped(torch.device("cpu"), 1):
        pass
