"""Real DeepSpeed engines on gloo ranks, small enough to start in a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist

from parallel import Mesh, ParallelConfig
from trainsys.deepspeed_setup import import_deepspeed, local_rank
from trainsys.partition import partition_of
from trainsys.placement import Placement


class Net(torch.nn.Module):
    """Odd sizes, so that everything is padded; a frozen and a tied parameter, a buffer, two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 5)
        self.frozen = torch.nn.Linear(5, 3, bias=False).requires_grad_(False)
        self.second = torch.nn.Linear(5, 7, bias=False)
        self.tied = torch.nn.Linear(5, 7, bias=False)
        self.tied.weight = self.second.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use every parameter."""
        hidden = torch.tanh(self.first(x)) * self.scale.to(x.dtype)
        return self.second(hidden).sum() + self.tied(hidden).square().mean() + self.frozen(hidden).sum()


def engine_of(
    stage: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    *,
    offload: bool = False,
    fp32_gradients: bool = False,
) -> Any:
    """Return an engine; the default group is there. Stage 1 with bf16 and fp32 gradients is another optimizer."""
    deepspeed = import_deepspeed("cpu")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    torch.manual_seed(seed)
    model = Net()
    decayed = [model.first.weight, model.second.weight]
    groups = [
        {"params": decayed, "weight_decay": 0.1, "kind": "adamw"},
        {"params": [model.first.bias], "weight_decay": 0.0, "kind": "adamw"},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 20,
            "offload_optimizer": {"device": "cpu" if offload else "none"},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32" if fp32_gradients else None},
    }
    with local_rank(0):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
        )
    return engine


def train(engine: Any, num_steps: int, seed: int = 0) -> list[float]:
    """Take some steps, on other data on each rank; return the losses."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    losses = []
    for _ in range(num_steps):
        dtype = next(engine.module.parameters()).dtype
        loss = engine(torch.randn(2, 7, generator=generator).to(dtype))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def slices(engine: Any, stage: int) -> dict[str, Any]:
    """Return this rank's part of parameters, masters and moments, as the trainer finds them in the engine's memory."""
    separate = next(engine.module.parameters()).dtype != torch.float32
    mesh = Mesh(ParallelConfig(replicate=dist.get_world_size()), dist.get_world_size())
    placement = Placement(mesh, dist.get_rank(), {})
    partition = partition_of(stage, engine.module, engine.optimizer, placement, separate_master=separate)
    return dict(partition.slices())
