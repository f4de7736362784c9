"""AdamW over one subgroup: gradient in, new states and parameter out, in one pass.

Every kernel computes the same operations in the same order with the same roundings, so where a subgroup is updated
does not change a bit of the result. They are those of torch.optim.AdamW(fused=True) on a CPU with fused multiply-add,
to the bit. `native` is C on a CPU and CUDA C++ on a GPU; `torch` is the same in torch's operations on any device,
many times slower: for machines without a compiler, and what the tests compare with.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from offload import building
from offload.errors import KernelError

KernelName = Literal["native", "torch"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class States:
    """fp32 master, first and second moment of the same elements: flat, contiguous, on one device."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def narrow(self, start: int, count: int) -> States:
        """Return the states of some of the elements, in the same memory."""
        return States(*(tensor.narrow(0, start, count) for tensor in self.tensors))

    def copy_(self, source: States, *, non_blocking: bool = False) -> None:
        """Copy the values of other states into these."""
        for mine, other in zip(self.tensors, source.tensors, strict=True):
            mine.copy_(other, non_blocking=non_blocking)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three of them."""
        return self.master, self.exp_avg, self.exp_avg_sq

    @property
    def nbytes(self) -> int:
        """Bytes of the three of them."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @classmethod
    def empty(cls, count: int, device: torch.device | str = "cpu") -> States:
        """Return states without values."""
        return cls(*torch.empty(3, count, device=device).unbind())


class Hyper(ctypes.Structure):
    """The scalars of a step, rounded once from double precision."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("scale", "decay", "weight", "beta2", "weight2", "correction", "eps", "step_size")
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("p", "m", "v", "new_p", "new_m", "new_v", "grad", "out")),
        ("grad_type", ctypes.c_int),
        ("out_type", ctypes.c_int),
        ("count", ctypes.c_long),
        ("hyper", Hyper),
        ("squares", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class Step:
    """What one update needs beside its tensors."""

    number: int
    """1 for the first."""
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float = 1.0
    """Multiplies the gradient: the inverse loss scale times the factor of clipping."""

    def hyper(self) -> Hyper:
        """Return the scalars as the kernels take them."""
        beta1, beta2 = self.betas
        return Hyper(
            scale=self.scale,
            decay=1 - self.lr * self.weight_decay,
            weight=1 - beta1,
            beta2=beta2,
            weight2=1 - beta2,
            correction=math.sqrt(1 - beta2**self.number),
            eps=self.eps,
            step_size=-self.lr / (1 - beta1**self.number),
        )


class Kernel(Protocol):
    """Updates states; everything is flat, contiguous, of one length and on the kernel's device."""

    def adamw(
        self, states: States, grad: torch.Tensor, out: torch.Tensor | None, step: Step, into: States | None = None
    ) -> None:
        """Write the new states to `into` (default: in place) and the new parameter, rounded, to `out`.

        On a GPU it is enqueued on the current stream.
        """
        ...

    def close(self) -> None:
        """End its threads; a second call does nothing."""
        ...


def make_kernel(name: KernelName, device: torch.device, *, num_threads: int = 1) -> Kernel:
    """Return the kernel for a device; `num_threads` count on the CPU alone. Raises KernelError."""
    if name == "torch":
        return TorchKernel()
    if device.type == "cpu":
        return HostKernel(num_threads)
    if device.type == "cuda":
        return CudaKernel(device)
    raise KernelError(f"kernel: 'native' has no form for {device.type} devices; choose kernel='torch'")


class HostKernel:
    """The C kernel with a pool of threads of its own. One update at a time; others wait."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise KernelError(f"num_threads: {num_threads}; at least 1")
        self._library = building.library(building.HOST)
        self._library.tier_pool_open.restype = ctypes.c_void_p
        self._library.tier_pool_open.argtypes = [ctypes.c_int]
        self._library.tier_pool_close.argtypes = [ctypes.c_void_p]
        self._library.tier_adamw.restype = ctypes.c_double
        self._library.tier_adamw.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Job)]
        self._has_fp16 = bool(self._library.tier_has_fp16())
        self._lock = threading.Lock()
        self._pool: int | None = self._library.tier_pool_open(num_threads)
        if not self._pool:
            raise KernelError(f"num_threads: {num_threads} threads cannot be started; lower it")

    def adamw(
        self, states: States, grad: torch.Tensor, out: torch.Tensor | None, step: Step, into: States | None = None
    ) -> None:
        """Update; returns when it is done."""
        self.squared_adamw(states, grad, out, step, into)

    def squared_adamw(
        self, states: States, grad: torch.Tensor, out: torch.Tensor | None, step: Step, into: States | None = None
    ) -> float:
        """Update, and return the sum of squares of the unscaled gradient from the same pass."""
        if not self._has_fp16 and torch.float16 in (grad.dtype, None if out is None else out.dtype):
            raise KernelError("float16 needs a C compiler with _Float16 (gcc 12, clang 15), or kernel='torch'")
        job = _job(states, grad, out, step, into)
        with self._lock:
            if self._pool is None:
                raise KernelError("the kernel is closed")
            squares: float = self._library.tier_adamw(self._pool, ctypes.byref(job))
        if squares < 0:
            raise MemoryError(f"no memory for an update of {job.count} parameters")
        return squares

    def close(self) -> None:
        """End its threads; a second call does nothing."""
        with self._lock:
            if self._pool is not None:
                self._library.tier_pool_close(self._pool)
                self._pool = None


class CudaKernel:
    """The CUDA kernel, on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._library = building.library(building.cuda_recipe(torch.cuda.get_device_capability(device)))
        self._library.tier_adamw_cuda.argtypes = [ctypes.POINTER(_Job), ctypes.c_void_p]

    def adamw(
        self, states: States, grad: torch.Tensor, out: torch.Tensor | None, step: Step, into: States | None = None
    ) -> None:
        """Enqueue the update on the current stream of its device."""
        job = _job(states, grad, out, step, into)
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device).cuda_stream
            code = self._library.tier_adamw_cuda(ctypes.byref(job), stream)
        if code:
            raise KernelError(f"adamw.cu: the launch failed with CUDA error {code}")

    def close(self) -> None:
        """Nothing to do: it has no threads."""


class TorchKernel:
    """The same in torch's operations, in some forty passes through memory."""

    def adamw(
        self, states: States, grad: torch.Tensor, out: torch.Tensor | None, step: Step, into: States | None = None
    ) -> None:
        """Update with torch's operations."""
        new = states if into is None else into
        hyper = step.hyper()
        # Divisors and the like are tensors: by a number, a GPU multiplies with the reciprocal instead.
        weight, weight2, correction, step_size = (
            torch.tensor(value, device=grad.device)
            for value in (hyper.weight, hyper.weight2, hyper.correction, hyper.step_size)
        )
        g, m, v = grad.to(torch.float32) * hyper.scale, states.exp_avg, states.exp_avg_sq
        near = abs(hyper.weight) < 0.5
        first = _fused_multiply_add(weight if near else weight - 1, g - m, m if near else g)
        second = _fused_multiply_add(weight2 * g, g, v * hyper.beta2)
        denominator = second.double().sqrt().float() / correction + hyper.eps
        new.master.copy_(states.master * hyper.decay + step_size * first / denominator)
        new.exp_avg.copy_(first)
        new.exp_avg_sq.copy_(second)
        if out is not None:
            out.copy_(new.master)

    def close(self) -> None:
        """Nothing to do: it has no threads."""


def _fused_multiply_add(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return x * y + z, of float32, rounded once.

    The product is exact in double precision. Its sum with z is rounded to odd, which makes the second rounding, to
    float32, the same as one of the exact sum.
    """
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)  # what the addition lost, exactly
    bits = total.view(torch.int64)
    odd = torch.where((rest > 0) == (total > 0), bits + 1, bits - 1).view(torch.float64)
    inexact = (rest != 0) & (bits % 2 == 0) & total.isfinite()
    return torch.where(inexact, odd, total).float()


def _job(states: States, grad: torch.Tensor, out: torch.Tensor | None, step: Step, into: States | None) -> _Job:
    new = states if into is None else into
    count = states.master.numel()
    for tensor in (*states.tensors, *new.tensors, grad, *([] if out is None else [out])):
        if tensor.numel() != count or not tensor.is_contiguous() or tensor.device != states.master.device:
            raise KernelError(
                f"an update of {count} parameters on {states.master.device} got a tensor of {tensor.numel()} on "
                f"{tensor.device}, {'' if tensor.is_contiguous() else 'not '}contiguous"
            )
    wrong = {tensor.dtype for tensor in (grad, out) if tensor is not None and tensor.dtype not in _TYPES}
    if wrong:
        raise KernelError(f"dtypes: {', '.join(map(str, wrong))}; allowed: float32, bfloat16, float16")
    job = _Job(grad_type=_TYPES[grad.dtype], out_type=0 if out is None else _TYPES[out.dtype], count=count)
    job.p, job.m, job.v = (tensor.data_ptr() for tensor in states.tensors)
    job.new_p, job.new_m, job.new_v = (tensor.data_ptr() for tensor in new.tensors)
    job.grad, job.out = grad.data_ptr(), None if out is None else out.data_ptr()
    job.hyper = step.hyper()
    return job
