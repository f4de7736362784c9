"""The ways to train that the benchmark of iterations compares, behind one interface.

The rivals run at what their documentation says is best: pinned memory, overlapped communication, fused kernels,
SuperOffload with its ratio and core share. All have bf16 weights on the device and fp32 masters.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offload.bench.cases.transformer import Block, Shape, Transformer, build
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Mode

HYPER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(slots=True)
class Engine:
    """A model under one way to train."""

    name: str
    model: Any
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    wait: Callable[[], None]
    """Return when the parameters may be read."""
    clip: Callable[[float | None], None]
    """Set the largest norm; None: no clipping."""
    close: Callable[[], None]
    optimizer: Any = None
    resting_bytes: int = field(default=0)
    """Device memory that it holds between iterations."""


def tiered(shape: Shape, device: torch.device, dtype: torch.dtype, mode: Mode, tiering: Tiering) -> Engine:
    """Return our optimizer on a plain model. Its clipping is set by `switch`."""
    model = build(shape, device, dtype)
    optimizer = TieredAdamW(model.parameters(), **HYPER, mode=mode, tiering=tiering)  # type: ignore[arg-type]
    optimizer.attach(model)
    return Engine(
        f"tiered {mode}",
        model,
        model,
        _backward,
        lambda: optimizer.step(),
        optimizer.wait,
        lambda max_norm: optimizer.switch(optimizer.mode, max_norm),
        optimizer.close,
        optimizer,
    )


def resident(shape: Shape, device: torch.device, dtype: torch.dtype) -> Engine:
    """Return torch's fused AdamW with everything on the device: fp32 masters beside bf16 weights."""
    model = build(shape, device, dtype)
    weights: list[Tensor] = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(masters, **HYPER, fused=True)  # type: ignore[arg-type]
    limit: list[float | None] = [None]

    @torch.no_grad()
    def step() -> None:
        gradients = [weight.grad for weight in weights]
        wide: list[Tensor] = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(wide, gradients)  # type: ignore[arg-type]
        for master, weight, gradient in zip(masters, weights, wide, strict=True):
            master.grad, weight.grad = gradient, None
        if limit[0] is not None:
            torch.nn.utils.clip_grad_norm_(masters, limit[0])
        optimizer.step()
        torch._foreach_copy_(weights, masters)
        optimizer.zero_grad()

    def clip(max_norm: float | None) -> None:
        limit[0] = max_norm

    return Engine("resident", model, model, _backward, step, _nothing, clip, _nothing, optimizer)


def deepspeed_engine(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, zero: dict[str, Any]) -> Engine:
    """Return DeepSpeed with a `zero_optimization` block."""
    import deepspeed

    _single_rank()
    model = build(shape, device, dtype)
    betas: Any = HYPER["betas"]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {**HYPER, "betas": list(betas), "torch_adam": False}},
        "gradient_clipping": 1.0 if zero.get("clip") else 0.0,
        "steps_per_print": 1 << 30,
    }
    config["zero_optimization"] = {key: value for key, value in zero.items() if key != "clip"}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def clip(max_norm: float | None) -> None:
        engine.optimizer.clip_grad = max_norm or 0.0

    return Engine(
        name,
        engine.module,
        engine,
        functools.partial(_deepspeed_backward, engine),
        engine.step,
        _nothing,
        clip,
        engine.destroy,
        engine.optimizer,
    )


_OFFLOAD = {"device": "cpu", "pin_memory": True}
ZERO: dict[str, dict[str, Any]] = {
    "zero2": {
        "stage": 2,
        "offload_optimizer": _OFFLOAD,
        "overlap_comm": True,
        "contiguous_gradients": True,
    },
    "zero3": {
        "stage": 3,
        "offload_optimizer": {**_OFFLOAD, "ratio": 0.5},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 100_000_000,
    },
    "superoffload": {
        "stage": 3,
        "offload_optimizer": {**_OFFLOAD, "ratio": 0.9, "super_offload": True, "cpuadam_cores_perc": 0.8},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 100_000_000,
    },
}


def fsdp(shape: Shape, device: torch.device, dtype: torch.dtype) -> Engine:
    """Return FSDP2 with CPUOffloadPolicy: fp32 weights on the CPU, torch's fused AdamW there."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    _single_rank()
    torch.distributed.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    model: Transformer = build(shape, device, dtype).to("cpu").float()  # drawn there: on a CPU that takes minutes
    # Gradients are reduced in bf16, so that 2 bytes of each travel.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in (*(m for m in model.modules() if isinstance(m, Block)), model):
        fully_shard(module, mp_policy=precision, offload_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER, fused=True)  # type: ignore[arg-type]
    limit: list[float | None] = [None]

    def step() -> None:
        if limit[0] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit[0])
        optimizer.step()
        optimizer.zero_grad()

    def clip(max_norm: float | None) -> None:
        limit[0] = max_norm

    def close() -> None:
        torch.distributed.destroy_process_group()

    return Engine("FSDP2 CPUOffload", model, model, _backward, step, _nothing, clip, close, optimizer)


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _deepspeed_backward(engine: Any, loss: Tensor) -> None:
    engine.backward(loss)


def _nothing() -> None:
    """Nothing to wait for, and nothing to close."""


def _single_rank() -> None:
    """Say who we are, in the variables that torch and DeepSpeed read; a job of one process."""
    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29531",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "DS_PIN_MEMORY_BACKEND": "native",
    }.items():
        os.environ.setdefault(key, value)


def parameters_of(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_deepspeed_ops() -> None:
    """Build DeepSpeed's CPU optimizer, which its engines would do at their start."""
    _single_rank()
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()
