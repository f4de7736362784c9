"""The callers of the benchmark, and those that need more than torch."""

from __future__ import annotations

import torch

from faulttol.bench.parts.callers import CALLERS, Caller, compiled, small_model


def deepspeed_zero(stage: int) -> Caller:
    """Return a caller that trains under DeepSpeed."""

    def call(rank: int, world_size: int, device: str) -> None:
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=small_model(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "zero_allow_untested_optimizer": True,
            },
            dist_init_required=False,
        )
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 16)).sum())
            engine.step()
        engine.destroy()

    return call


QUICK = CALLERS
HEAVY: dict[str, Caller] = {"compiled, inductor": compiled("inductor")} | {
    f"DeepSpeed ZeRO {stage}": deepspeed_zero(stage) for stage in (1, 2, 3)
}
