"""DeepSpeed imported and configured: its dict from typed fields, its device from the model's.

The dict is built here and nowhere else, because DeepSpeed accepts misspelt keys in silence.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from trainsys.check import accumulation_steps
from trainsys.compat import compiled_when_called, quiet_deepspeed
from trainsys.config import RunConfig
from trainsys.errors import ConfigError, MissingExtraError

_NEVER = 2**62


def owns_norm(config: RunConfig) -> bool:
    """Return whether ranks hold different parameters, so that DeepSpeed's gradient norm may count some twice."""
    degrees = config.parallel
    return max(degrees.tensor, degrees.pipeline, degrees.expert) > 1


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """Return the DeepSpeed configuration of `config`; the only place that writes one."""
    settings = config.engine
    stage = settings.zero_stage
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    # In a pipeline it knows nothing of backward, and reduces once a step.
    in_backward = config.parallel.pipeline == 1
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": settings.bucket_numel,
        "allgather_bucket_size": settings.bucket_numel,
        "overlap_comm": on_gpu and in_backward and config.parallel.overlap,
        "contiguous_gradients": True,
    }
    own_norm = owns_norm(config)
    if own_norm and stage in (1, 2) and settings.precision != "fp16" and config.offload.optimizer == "none":
        zero["compute_grad_norm"] = False
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    for kind, where in (("optimizer", config.offload.optimizer), ("param", config.offload.parameters)):
        if where.startswith("deepspeed_"):
            zero[f"offload_{kind}"] = {"device": where.removeprefix("deepspeed_"), "pin_memory": on_gpu}
        if where == "deepspeed_nvme":
            zero[f"offload_{kind}"]["nvme_path"] = config.offload.nvme_dir
    built: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_sequences,
        "gradient_accumulation_steps": accumulation_steps(config) if in_backward else 1,
        "gradient_clipping": settings.gradient_clip_norm if stage > 0 and not own_norm else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": settings.precision == "bf16"},
        "fp16": {"enabled": settings.precision == "fp16", "loss_scale_window": _NEVER},
    }
    return built


def check_nvme(config: RunConfig) -> None:
    """Raise where DeepSpeed cannot reach a disk; its own message comes from inside a build."""
    keys = [key for key in ("optimizer", "parameters") if getattr(config.offload, key) == "deepspeed_nvme"]
    if not keys:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"config: offload.{key}: deepspeed_nvme builds DeepSpeed's async_io, which needs libaio's headers "
            "(Debian: apt install libaio-dev); or choose optimizer = tiered with nvme_dir"
            for key in keys
        )


def import_deepspeed(device_type: str) -> Any:
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
    from deepspeed.runtime import compiler

    with compiled_when_called(compiler):
        import deepspeed.runtime.zero.muon.original_muon  # else imported by its first engine
    return deepspeed


@contextlib.contextmanager
def local_rank(device_index: int) -> Iterator[None]:
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
