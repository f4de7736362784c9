"""An offload.TieredAdamW in the place of an engine's optimizer, and its state as named slices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.state import TensorLike
from offload import NvmeTier, Tier, TierSpec, Trace, calibrate, gates
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget
from parallel.data import DataParallel, Master
from parallel.hybrid import Hybrid
from trainsys.config import RunConfig
from trainsys.errors import ConfigError
from trainsys.partition import Fragment, Gradient, Partition, Slices
from trainsys.placement import Placement

_KINDS = ("exp_avg", "exp_avg_sq")


class Tiered:
    """The optimizer and what it lives in."""

    def __init__(
        self,
        adopted: torch.optim.Optimizer,
        module: nn.Module,
        data: DataParallel,
        config: RunConfig,
        trace: Trace | None = None,
    ) -> None:
        """Take over the parameter groups of an optimizer, which hold the masters of `data`.

        The trace gets what the optimizer moves, what is waited for it, and what the disk holds. Forward waits for the
        weights that it reads, module by module, while others are still being updated.
        """
        settings = config.offload
        self._tier = _disk(Path(settings.nvme_dir)) if settings.host_bytes else None
        budget = Budget(device_bytes=settings.device_bytes or 2 << 30, host_bytes=settings.host_bytes or None)
        # Ranks that share a machine measure together, as they will train; one alone can use what its probe has kept.
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        rates = calibrate.kept() if is_alone and torch.cuda.is_available() else None
        self.optimizer = TieredAdamW(
            adopted.param_groups,
            mode="defer",
            tiering=Tiering(budget=budget, tier=self._tier, rates=rates, trace=trace),
        )
        held = [holder for group in self.optimizer.param_groups for holder in group["params"]]
        by_tensor: dict[Tensor, Master] = {master.tensor: master for master in data.masters}
        self.masters = [by_tensor[holder] for holder in held]
        numbers = {master.name: number for number, master in enumerate(self.masters)}
        ids = {id(p): numbers[name] for name, p in module.named_parameters() if name in numbers}
        self._hooks = gates.attach(module, ids, self.optimizer)
        if trace is not None and self._tier is not None:
            trace.watch(self._tier)

    def close(self) -> None:
        """Finish all updates and give everything back."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer.close()
        if self._tier is not None:
            self._tier.close()


class TieredMasters(Partition):
    """The masters of a data-parallel model whose fp32 states are in tiers."""

    def __init__(self, hybrid: Hybrid, data: DataParallel, tiered: Tiered, place: Any, *, separate: bool) -> None:
        """`place(master, flat)` says where in the whole tensor a master's elements are."""
        placement = Placement(hybrid.mesh, hybrid.rank, hybrid.shards)
        super().__init__(hybrid.module, tiered.optimizer, placement, separate_master=separate)
        self._data, self._tiered, self._place = data, tiered, place
        self._steps_taken = 0.0
        self._given: dict[int, dict[str, Tensor]] = {}
        tiered.optimizer.register_step_pre_hook(self._forget)

    def weights(self) -> Slices:
        """Return this rank's part of every weight, after all updates, and the buffers."""
        self._tiered.optimizer.wait()
        found: dict[str, TensorLike] = {
            f"model.{master.name}": self._place(master, master.weight) for master in self._data.masters
        }
        return found | self._buffers()

    def slices(self) -> Slices:
        """Return weights and states, by name: views of what is in memory, copies of what is on a disk."""
        found = self.weights()
        for number, (_, kinds) in enumerate(self._tiered.optimizer.states()):
            master = self._tiered.masters[number]
            self._given[number] = {kind: tensor.view(-1) for kind, tensor in kinds.items()}
            for kind in (*_KINDS, *(["master"] if self._separate_master else [])):
                found[f"optimizer.{kind}.{master.name}"] = self._place(master, self._given[number][kind])
        return found

    def _forget(self, *_: Any) -> None:
        """Let go of copies of states that the next step makes old."""
        self._given.clear()

    def set_steps_taken(self, steps: float) -> None:
        """Set the update count that bias correction uses; `after_load` passes it on."""
        self._steps_taken = steps

    def after_load(self) -> None:
        """Take in what `slices` was overwritten with, wherever states live here; fp32 weights are their masters."""
        if not self._given:
            self.slices()
        state = {}
        for number, kinds in self._given.items():
            master = self._tiered.masters[number]
            own = kinds["master"] if self._separate_master else master.weight.detach().float()
            state[number] = {"step": self._steps_taken, **kinds, "master": own}
        self._given.clear()
        saved = torch.optim.Optimizer.state_dict(self._tiered.optimizer)  # without copies of the states
        self._tiered.optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        self._data.refresh()

    def groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for group in self._tiered.optimizer.param_groups:
            yield group, group["params"]

    def held(self) -> Iterator[tuple[dict[str, Any], Tensor, list[Fragment]]]:
        """Yield nothing: no update but the optimizer's own reads its states."""
        return iter(())

    def create_state(self) -> None:
        """Nothing: states are there from the start."""

    def gradients(self) -> Iterator[Gradient]:
        for master in self._data.masters:
            if master.tensor.grad is not None:
                yield Gradient(master.name, master.shard.local_shape, master.start, master.tensor.grad)

    def fenced(self) -> Any:
        """Return what checkpoint.Checkpointer.fence_on takes: an update may change anything."""
        return SimpleNamespace(optimizer=SimpleNamespace(optimizer=self._tiered.optimizer))


def _disk(folder: Path) -> Tier:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        problem = f"offload.nvme_dir: {str(folder)!r}: {error.strerror}; give a folder that exists"
        raise ConfigError([problem]) from error
    # The optimizer measures what it needs; nothing here looks at these rates.
    spec = TierSpec(name="nvme", capacity_bytes=free, read_bytes_per_s=1e9, write_bytes_per_s=1e9, latency_s=1e-4)
    return NvmeTier(spec, folder)
