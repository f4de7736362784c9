"""Time, throughput, utilisation and memory of the training loop."""

from __future__ import annotations

import functools
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_GPU_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2.25e15, 75e12),
    ("H200 NVL", 836e12, 60e12),
    ("H200", 989e12, 67e12),
    ("H100 NVL", 836e12, 60e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165e12, 82.6e12),
    ("MI300X", 1307e12, 163.4e12),
)
"""(Words of the device's name, bf16 and fp16 matrix rate without sparsity, fp32 rate) of the vendors' data sheets.

The fp32 rate is the plain one: torch computes fp32 products in TF32 only when told to, and the trainer does not."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The rate that utilisation is measured against."""

    flops_per_s: float
    how: str
    """`recipe`, `data sheet` or `measured`."""


def peak_of(device: torch.device, dtype: torch.dtype, stated: float) -> Peak:
    """Return `stated` if given, else the data sheet's figure of a known GPU, else a measured matrix product."""
    if stated > 0:
        return Peak(stated, "recipe")
    if device.type == "cuda":
        known = data_sheet_rate(torch.cuda.get_device_name(device), dtype)
        if known is not None:
            return Peak(known, "data sheet")
    return Peak(_measured(device, dtype), "measured")


class Utilisation:
    """Model FLOP utilisation (MFU) of a job: the work that counts over what its devices could do in that time.

    A peak that was measured while something else ran is too low. Where a job does more than that, it is measured again.
    """

    _AGAIN = 3  # at most: it takes 0.3 s each

    def __init__(self, device: torch.device, dtype: torch.dtype, stated: float) -> None:
        """`stated` is the peak of one device in FLOP/s; 0 to find it out, as `peak_of` says."""
        self.peak = peak_of(device, dtype, stated)
        self._where = device, dtype
        self._left = self._AGAIN if self.peak.how == "measured" else 0

    def of(self, flops_per_s: float) -> float:
        """Return the share of the peak that a device reaches with `flops_per_s` of useful work, 0 to 1.

        It is above 1 where the peak was stated too low, or measured too low over and over.
        """
        while flops_per_s > self.peak.flops_per_s and self._left:
            self._left -= 1
            self.peak = Peak(max(self.peak.flops_per_s, _matmul_rate(*self._where)), "measured")
        return flops_per_s / self.peak.flops_per_s


def data_sheet_rate(name: str, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s that the data sheet of the GPU of this name promises; None for one not known here."""
    for words, low_precision, fp32 in _GPU_PEAKS:
        if re.search(rf"\b{words}\b", name):
            return fp32 if dtype == torch.float32 else low_precision
    return None


@functools.cache  # a process may start training more than once
def _measured(device: torch.device, dtype: torch.dtype) -> float:
    return _matmul_rate(device, dtype)


def _matmul_rate(device: torch.device, dtype: torch.dtype, budget_s: float = 0.3) -> float:
    """Return the best FLOP/s of a square matrix product over `budget_s`."""
    size = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # the global one belongs to the training
    left = torch.rand(size, size, device=device, generator=own).to(dtype)
    right = torch.rand(size, size, device=device, generator=own).to(dtype)
    best, end = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_peak_bytes(device: torch.device) -> int:
    """Return the high-water mark: of CUDA allocations on a GPU, of the process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Phases:
    """Seconds spent in named phases of one step.

    On a GPU the phases are marked with events and read by `take`, so that nothing waits inside the step.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        if self._cuda:
            start, end = _event(), _event()
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Return the seconds per phase since the last call; waits for the GPU."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        taken, self._seconds, self._events = self._seconds, {}, []
        return taken


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


class Throughput:
    """Tokens per second and time to the end, over the last `window` steps."""

    def __init__(self, total_steps: int, window: int = 20) -> None:
        self._total = total_steps
        self._window = window
        self._marks: list[tuple[float, int]] = []
        self._tokens = 0

    def mark(self, tokens: int) -> None:
        """Note that a step over `tokens` tokens (all ranks) just ended; the first call only starts the clock."""
        self._tokens += tokens
        self._marks = [*self._marks[-self._window :], (time.perf_counter(), self._tokens)]

    def skip(self, seconds: float) -> None:
        """Leave `seconds` that were no training (an evaluation) out of the rate."""
        self._marks = [(at + seconds, tokens) for at, tokens in self._marks]

    @property
    def tokens_per_s(self) -> float:
        """0 until two steps have ended."""
        if len(self._marks) < 2:
            return 0.0
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(last - first, 1e-9)

    def eta_s(self, step: int) -> float:
        """Return the seconds until the last step at the present rate; 0 where no rate is known."""
        if len(self._marks) < 2:
            return 0.0
        per_step = (self._marks[-1][0] - self._marks[0][0]) / (len(self._marks) - 1)
        return max(0.0, per_step * (self._total - step))
