"""What must be equal before anything is timed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from offload.bench.cases.transformer import Shape, build
from offload.kernels import KernelName, States, Step, TorchKernel, make_kernel
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget, Interleave, Mode

_NUMEL = 100_003
_BYTES_EACH = 2 * (2 + 2 + 12) + 2
"""bf16 weight and gradient and three fp32 states, in each of two engines; a gradient on its way."""
_SHAPE = Shape(layers=2, width=64, heads=2, vocabulary=128)


def differences(device: torch.device, kernel: KernelName) -> Iterator[tuple[str, float]]:
    """Yield comparisons and how many elements differ in each; all must be 0."""
    yield from _kernels(device, kernel)
    schedules: list[tuple[Mode, Interleave, int]] = [
        ("sync", 1, 1),
        ("defer", "cpu", 0),
        ("defer", 2, 2),
        ("stream", 2, 2),
        ("spec", 2, 2),
    ]
    for max_norm in (None, 0.5):
        wanted = _trained(device, "sync", "cpu", 0, max_norm, kernel)
        for mode, interleave, resident in schedules:
            if mode == "stream" and max_norm is not None:
                continue
            got = _trained(device, mode, interleave, resident, max_norm, kernel)
            count = sum(int((a != b).sum()) for a, b in zip(wanted, got, strict=True))
            yield f"parameters, {mode}, interleave {interleave}, max_norm {max_norm}", float(count)


def too_large(shape: Shape) -> str:
    """Return what is wrong with a model that host memory does not hold twice, tiered and plain; else nothing."""
    needed = shape.num_parameters * _BYTES_EACH
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"without a GPU {shape.num_parameters / 1e9:.3g}G parameters take {needed / 1e9:.3g} GB of host memory, and "
        f"{free / 1e9:.3g} GB are free"
        if needed > free
        else ""
    )


def _kernels(device: torch.device, name: KernelName) -> Iterator[tuple[str, float]]:
    """Compare the kernels of the CPU and of the device with the reference."""
    generator = torch.Generator().manual_seed(0)
    master, first, gradient = (torch.randn(_NUMEL, generator=generator) for _ in range(3))
    second, narrow = torch.rand(_NUMEL, generator=generator), gradient.bfloat16()
    step = Step(7, 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.37)
    results = []
    for kernel, place in (
        (TorchKernel(), torch.device("cpu")),
        (make_kernel(name, torch.device("cpu"), num_threads=2), torch.device("cpu")),
        (make_kernel(name, device, num_threads=2), device),
    ):
        states = States(*(tensor.clone().to(place) for tensor in (master, first, second)))
        out = torch.empty(_NUMEL, dtype=torch.bfloat16, device=place)
        kernel.adamw(states, narrow.to(place), out, step)
        results.append([tensor.cpu() for tensor in (*states.tensors, out)])
        kernel.close()
    for index, place_name in ((1, "CPU"), (2, device.type)):
        count = sum(int((a != b).sum()) for a, b in zip(results[0], results[index], strict=True))
        yield f"kernel {name} on {place_name}", float(count)


def _trained(
    device: torch.device, mode: Mode, interleave: Interleave, resident: int, max_norm: float | None, kernel: KernelName
) -> list[torch.Tensor]:
    """Return parameters and states of a small model after a few steps."""
    numel = 4096
    slots = 0 if interleave == "cpu" else 2
    tiering = Tiering(
        accumulation_steps=1,
        subgroup_numel=numel,
        interleave=interleave,
        budget=Budget(device_bytes=12 * numel * (slots + resident), num_slots=2),
        num_threads=2,
        kernel=kernel,
    )
    model = build(_SHAPE, device, torch.bfloat16)
    with TieredAdamW(model.parameters(), lr=1e-2, mode=mode, max_norm=max_norm, tiering=tiering) as optimizer:
        optimizer.attach(model)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            loss = model(torch.randint(_SHAPE.vocabulary, (2, 64), generator=generator).to(device))
            loss.backward()
            optimizer.step()
        found = [parameter.detach().cpu().float() for parameter in model.parameters()]
        for _, kinds in optimizer.states():
            found += [tensor.cpu().clone() for tensor in kinds.values()]
    return found
