"""The DeepSpeed adapter: one model, its optimizer and ZeRO behind six methods.

The only module of this package that imports DeepSpeed. Its configuration dict is built here from typed fields and
nothing else, because DeepSpeed accepts misspelt keys in silence. The optimizer is always ours, so nothing is
compiled at start (DeepSpeed's CPU Adam takes minutes to build, and a killed build leaves a lock that hangs every
later run).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from trainsys.check import accumulation_steps, data_ranks
from trainsys.compat import quiet_deepspeed
from trainsys.config import RunConfig
from trainsys.errors import MissingExtraError, NumericsError
from trainsys.muon import Muon, Shard
from trainsys.partition import Slices, partition_of

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_SCALE_GROWTH_STEPS = 1000
"""Steps without overflow after which fp16's loss scale is doubled."""
_NEVER = 2**62


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    gradient_norm: float
    """L2 norm over all parameters and ranks before clipping; not finite where fp16 overflowed."""
    applied: bool
    """False where fp16 overflowed and the step was skipped."""
    loss_scale: float


class Fencing(Protocol):
    """What fences before updates: a checkpoint.Checkpointer."""

    def fence_on(self, target: Any) -> object:
        """Fence before every update of an engine."""


class Engine:
    """Forward, backward and update of one model on this rank; every rank calls every method."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
        """Hand `model` (already on its device, in its dtype) and `optimizer` to DeepSpeed; `torch.distributed` is up.

        `optimizer`'s parameter groups carry `initial_lr` and `kind`, see `trainsys.optim`.
        """
        device = next(model.parameters()).device
        deepspeed = _import_deepspeed(device.type)
        settings = config.engine
        self._stage: int = settings.zero_stage
        self._clip = settings.gradient_clip_norm
        # DeepSpeed divides by the data ranks and the accumulation steps; our loss is already a share of the whole.
        self._undo_averaging = data_ranks(config.parallel) * accumulation_steps(config)
        self._scales_loss = settings.precision == "fp16"
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(),
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=settings.timeout_s),
        )
        with _local_rank(device.index or 0):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepspeed_settings(config), dist_init_required=False
            )
        self._partition = partition_of(
            self._stage,
            self._engine.module,
            self._engine.optimizer,
            separate_master=settings.precision != "fp32",
        )
        self._steps_taken = 0.0
        if isinstance(optimizer, Muon) and self._stage > 0:
            self._describe_shards(optimizer)

    @property
    def module(self) -> nn.Module:
        """The model; under ZeRO 3 its parameters are empty outside of forward and backward."""
        module: nn.Module = self._engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return torch.device(self._engine.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        return self._engine(*args, **kwargs)

    __call__: Callable[..., Any] = forward

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`: this micro-batch's share of the whole step's loss.

        Shares of all micro-batches and ranks add up to the step's loss, so gradients are summed, never averaged.
        """
        self._engine.backward(loss * self._undo_averaging)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # advances the micro-batch counter only

    def update(self, lr_factor: float) -> Update:
        """Clip, step the optimizer at `lr_factor` times each group's peak rate, clear gradients.

        Raises:
            NumericsError: the gradient norm is not finite (except where fp16's loss scaling handles it).
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        norm = self._clip_replicated() if self._stage == 0 else None
        scale = float(getattr(self._engine.optimizer, "cur_scale", 1.0))
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        self._steps_taken += applied
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        if not norm < float("inf") and not (self._scales_loss and not applied):
            raise NumericsError(f"the gradient norm is {norm}; lower the learning rate, or inspect the last batch")
        if self._scales_loss:
            self._grow_scale()
        return Update(gradient_norm=norm, applied=applied, loss_scale=scale)

    def slices(self) -> Slices:
        """Return live views of this rank's weights and optimizer state, by logical name."""
        return self._partition.slices()

    def fence_with(self, checkpointer: Fencing) -> None:
        """Let a checkpointer fence before every update, for just what that updates."""
        checkpointer.fence_on(self._engine)

    def counters(self) -> dict[str, float]:
        """Return the numbers that go with `slices`: the loss scaler, and the updates applied.

        Counted here, because the optimizer's own count lies on the device and reading it makes the host wait.
        """
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        kept = {key: float(getattr(scaler, key)) for key in _SCALER_FIELDS if hasattr(scaler, key)}
        return {"steps_taken": self._steps_taken, **kept}

    def after_load(self, counters: Mapping[str, float]) -> None:
        """Finish a load that overwrote `slices()`: restore `counters` and refresh what ZeRO caches."""
        self._steps_taken = counters["steps_taken"]
        self._partition.set_steps_taken(self._steps_taken)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for key in _SCALER_FIELDS:
            if key in counters and hasattr(scaler, key):
                setattr(scaler, key, type(getattr(scaler, key))(counters[key]))
        self._partition.after_load()

    def close(self) -> None:
        """Release hooks and buffers; the model stays."""
        self._engine.destroy()

    def _describe_shards(self, optimizer: Muon) -> None:
        """Tell Muon which part of which matrix lies where in the flat tensors that ZeRO gave it."""
        self._partition.create_state()
        holders = [
            (holder, [Shard(part.name, part.shape, part.start, part.offset, part.master.numel()) for part in parts])
            for group, holder, parts in self._partition.held()
            if group["kind"] == "muon"
        ]
        assert dist.group.WORLD is not None
        optimizer.shard(holders, dist.group.WORLD, self.device)

    def _grow_scale(self) -> None:
        """Double the loss scale after enough steps without overflow.

        DeepSpeed's own growth comes between a step's backward and its unscaling, and so applies half the gradient.
        """
        scaler = self._engine.optimizer.loss_scaler
        steps_since_overflow = scaler.cur_iter - scaler.last_overflow_iter - 1
        if steps_since_overflow > 0 and steps_since_overflow % _SCALE_GROWTH_STEPS == 0:
            scaler.cur_scale *= scaler.scale_factor
            scaler.cur_hysteresis = scaler.delayed_shift

    def _clip_replicated(self) -> float:
        """Clip already-reduced gradients (ZeRO 0, where DeepSpeed clips but does not tell the norm)."""
        limit = self._clip if self._clip > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """Return the DeepSpeed configuration of `config`; the only place that writes one."""
    settings = config.engine
    stage = settings.zero_stage
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": settings.bucket_numel,
        "allgather_bucket_size": settings.bucket_numel,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
    }
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if config.offload.optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    built: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_sequences,
        "gradient_accumulation_steps": accumulation_steps(config),
        "gradient_clipping": settings.gradient_clip_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": settings.precision == "bf16"},
        "fp16": {"enabled": settings.precision == "fp16", "loss_scale_window": _NEVER},
    }
    return built


def _import_deepspeed(device_type: str) -> Any:
    """Return DeepSpeed, made to work on the device that the model is on rather than on the best it finds."""
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtraError("training", "train") from error
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    if get_accelerator().device_name() != device_type:
        set_accelerator({"cpu": CPU_Accelerator, "cuda": CUDA_Accelerator}[device_type]())
    quiet_deepspeed(deepspeed)
    return deepspeed


@contextlib.contextmanager
def _local_rank(device_index: int) -> Iterator[None]:
    """Let DeepSpeed, which takes the device from LOCAL_RANK alone, use this one."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device_index)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a warning of DeepSpeed says more than what the recipe chose: no GPU, an optimizer of ours."""
    message = record.getMessage()
    return "Setting accelerator to CPU" not in message and "untested optimizer" not in message
