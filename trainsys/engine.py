"""The DeepSpeed adapter: one rank's part of a model, its optimizer and ZeRO as a trainsys.engines.Engine.

`trainsys.deepspeed_setup` imports and configures it, `trainsys.deepspeed_layout` tells it of the ranks. The optimizer
is always ours, so nothing is compiled at start (DeepSpeed's CPU Adam takes minutes to build, and a killed build leaves
a lock that hangs every later run).

DeepSpeed knows of the layout what it needs to reduce gradients and to shard optimizer state: which ranks hold the same
parameters, and which the same experts. Everything else is done around it. A pipeline's schedule runs forward and
backward without the engine, which then reduces what lies in `.grad` once a step. Where ranks hold different
parameters (tensor, pipeline and expert parallel) the gradient norm is ours, because DeepSpeed's counts a copied head
once for every copy and takes the mean over experts' ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from parallel.hybrid import Hybrid
from parallel.mesh import Axis
from parallel.norm import Held, clip_factor, global_norm
from parallel.shards import Shard
from trainsys import muon
from trainsys.check import accumulation_steps
from trainsys.config import RunConfig
from trainsys.data import MicroBatch, StepBatch
from trainsys.deepspeed_layout import EXPERTS, Units, forget_groups, set_apart, shown_experts
from trainsys.deepspeed_setup import check_nvme, deepspeed_settings, import_deepspeed, local_rank, owns_norm
from trainsys.engines import BuildOptimizer, Fencing, Shares, Update
from trainsys.errors import NumericsError
from trainsys.feed import Feed
from trainsys.muon import Muon
from trainsys.partition import Slices, partition_of
from trainsys.placement import Placement, elsewhere

if TYPE_CHECKING:
    from trainsys.meter import Phases

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_SCALE_GROWTH_STEPS = 1000
"""Steps without overflow after which fp16's loss scale is doubled."""
_TIED = "_tied"
"""Ending of the names of parameter groups that hold what two stages have."""


class DeepSpeedEngine:
    """A trainsys.engines.Engine by DeepSpeed: ZeRO 0 to 3, with a pipeline 0 and 1, with experts 0 to 2."""

    def __init__(self, hybrid: Hybrid, config: RunConfig, build_optimizer: BuildOptimizer) -> None:
        """Hand this rank's part of the model (on its device, in its dtype) and its optimizer to DeepSpeed."""
        model, settings = hybrid.module, config.engine
        device = next(model.parameters()).device
        deepspeed = import_deepspeed(device.type)
        check_nvme(config)
        self._hybrid = hybrid
        self._feed = Feed(hybrid, device)
        self._stage: int = settings.zero_stage
        self._clip = settings.gradient_clip_norm
        self._bucket_numel = settings.bucket_numel
        self._scales_loss = settings.precision == "fp16"
        degrees = config.parallel
        self._own_norm = owns_norm(config)
        # DeepSpeed divides by the data ranks and the accumulation steps; our loss is already a share of the whole.
        ranks = hybrid.mesh.size("replicate", "shard", "context")
        self._undo_averaging = ranks * (1 if hybrid.pipeline else accumulation_steps(config))
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(),
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=settings.timeout_s),
        )
        optimizer = build_optimizer(model)
        self._units = Units(hybrid.groups)
        self._experts = contextlib.ExitStack()
        if degrees.expert > 1:
            self._experts.enter_context(shown_experts(model, optimizer, hybrid))
        # Alone in a flat tensor, so that ZeRO gives both stages the same parts of it.
        set_apart(optimizer, set(hybrid.tied), model, _TIED)
        with local_rank(device.index or 0):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                mpu=self._units,
                config=deepspeed_settings(config),
                dist_init_required=False,
            )
        if self._stage == 0:
            # Reduced here, by its function for a list of gradients: its own call has no float64, and looks for experts.
            self._engine.enable_backward_allreduce = False
            self._engine.communication_data_type = next(model.parameters()).dtype
        self._placement = Placement(hybrid.mesh, hybrid.rank, hybrid.shards, hybrid.tied)
        self._partition = partition_of(
            self._stage,
            self._engine.module,
            self._engine.optimizer,
            self._placement,
            separate_master=settings.precision != "fp32",
        )
        self._elsewhere = elsewhere(self._partition.slices, hybrid.groups.get("pipeline"))
        self._steps_taken = 0.0
        if isinstance(optimizer, Muon) and self._stage > 0:
            self._describe_shards(optimizer)

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model; under ZeRO 3 its parameters are empty outside of forward and backward."""
        module: nn.Module = self._engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Where losses are."""
        return torch.device(self._engine.device)

    def train(self, batch: StepBatch, shares: Shares, phases: Phases) -> Tensor:
        """Run forward and backward of this rank's micro-batches; see trainsys.engines.Engine."""
        if self._hybrid.pipeline is not None:
            with phases("pipeline"):
                scale = self._undo_averaging * self._loss_scale
                seeds = (scale * shares.loss_factor, scale * shares.auxiliary_factor)
                fed = [self._feed(micro) for micro in batch.micro_batches]
                sums = self._hybrid.pipeline.step(fed, lambda _: seeds)
                self._reduce()
            return self._feed.told(torch.stack(sums))
        summed = torch.zeros(2, dtype=torch.float64, device=self.device)  # read once: reading makes the host wait
        for micro in batch.micro_batches:
            with phases("forward"):
                loss, auxiliary = self._engine(**self._feed(micro))
                share = shares.of(loss, auxiliary) * self._undo_averaging
            with phases("backward"):
                self._engine.backward(share)
                if not self._engine.is_gradient_accumulation_boundary():
                    self._engine.step()  # advances the micro-batch counter only
            summed += torch.stack((loss.detach().double(), auxiliary.detach().double()))
        if self._stage == 0:
            with phases("backward"):
                self._reduce()
        return self._feed.told(summed)

    @torch.no_grad()
    def evaluate(self, micro: MicroBatch) -> Tensor:
        """Return the sums of one micro-batch without gradients."""
        fed = self._feed(micro)
        if self._hybrid.pipeline is not None:
            return self._feed.told(torch.stack(self._hybrid.pipeline.evaluate([fed])))
        loss, auxiliary = self._engine(**fed)
        return self._feed.told(torch.stack((loss.double(), auxiliary.double())))

    def update(self, lr_factor: float) -> Update:
        """Clip, step the optimizer at `lr_factor` times each group's peak rate, clear gradients.

        Raises:
            NumericsError: the gradient norm is not finite (except where fp16's loss scaling handles it).
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        scale = self._loss_scale
        norm = None
        if self._own_norm:
            norm = self._clip_sharded(scale)
        elif self._stage == 0:
            norm = self._clip_replicated()
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        self._steps_taken += applied
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        if not norm < float("inf") and not (self._scales_loss and not applied):
            raise NumericsError(f"the gradient norm is {norm}; lower the learning rate, or inspect the last batch")
        if self._scales_loss:
            self._grow_scale()
        self._hybrid.after_step()
        return Update(gradient_norm=norm, applied=applied, loss_scale=scale)

    def slices(self) -> Slices:
        """Return live views of this rank's weights and optimizer state, by logical name."""
        return {**self._partition.slices(), **self._elsewhere}

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
        self._experts.close()
        forget_groups(self._units)

    @property
    def _loss_scale(self) -> float:
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0))

    def _reduce(self) -> None:
        """Reduce what has been accumulated in `.grad`; ZeRO 1 keeps its part."""
        if self._stage > 0:
            self._engine.optimizer.setup_buckets()  # which a hook does in its own backward, if one fires
            self._engine.allreduce_gradients()
            return
        for group, parameters in self._by_group():
            for parameter in parameters:
                if parameter.grad is None:  # unused here, perhaps not on another rank
                    parameter.grad = torch.zeros_like(parameter)
            self._engine.allreduce_no_retain(
                [parameter.grad for parameter in parameters],
                dp_group=group,
                numel_per_bucket=self._bucket_numel,
                dp_world_size=self._units.data.size(),
            )

    def _by_group(self) -> Iterator[tuple[dist.ProcessGroup, list[nn.Parameter]]]:
        """Yield the ranks that hold the same parameters, with these."""
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        is_expert = {name for name, shard in self._hybrid.shards.items() if "expert" in shard.axes}
        for group, chosen in ((self._units.data, False), (self._units.expert_data, True)):
            parameters = [p for name, p in trained if (name in is_expert) == chosen]
            if parameters and self._units.data.size() > 1:
                yield group, parameters

    def _describe_shards(self, optimizer: Muon) -> None:
        """Tell Muon which part of which matrix lies where in the flat tensors that ZeRO gave it."""
        self._partition.create_state()
        groups = {False: self._units.data, True: self._units.expert_data}
        for holds_experts, group in groups.items():
            holders = [
                (
                    holder,
                    [muon.Shard(part.name, part.shape, part.start, part.offset, part.master.numel()) for part in parts],
                )
                for settings, holder, parts in self._partition.held()
                if settings["kind"] == "muon" and settings["name"].endswith(EXPERTS) == holds_experts
            ]
            if holders:
                optimizer.shard(holders, group, self.device)

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

    @torch.no_grad()
    def _clip_sharded(self, scale: float) -> float:
        """Clip reduced gradients of which ranks hold different parts; gradients are `scale` times too large."""
        gradients = list(self._partition.gradients())
        partitioned = self._partition.partitioned
        held = []
        for gradient in gradients:
            shard = self._placement.shard(gradient.name, gradient.shape)
            holders = self._num_holders(gradient.name, shard)
            held.append(Held(gradient.tensor, shard, holders, gradient.start))
        world = dist.group.WORLD
        assert world is not None
        group = world if partitioned else self._hybrid.groups.get("pipeline", "tensor", "expert")
        norm = float(global_norm(held, group)) / scale
        if norm < float("inf") and (factor := clip_factor(norm, self._clip)) < 1:
            torch._foreach_mul_([gradient.tensor for gradient in gradients if gradient.tensor.numel()], factor)
        return norm

    def _num_holders(self, name: str, shard: Shard) -> int:
        """Return how many ranks of those that add up the norm hold the same elements; 0 if another tells."""
        if name in self._hybrid.copies_of_tied:
            return 0
        if self._partition.partitioned:
            return self._placement.num_holders(shard, partitioned=True)
        axes: tuple[Axis, ...] = ("tensor", "expert")
        return math.prod(self._hybrid.mesh.size(axis) for axis in axes if axis not in shard.axes)
