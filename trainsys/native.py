"""The engine of torch alone: a rank's part of a model, its optimizer and data parallelism as a trainsys.engines.Engine.

Gradients are `parallel`'s to sum, replicated (ZeRO 0) or fully sharded (ZeRO 1 to 3), and so this engine runs what
DeepSpeed does not: ZeRO 2 and 3 in a pipeline, hybrid shard, experts under ZeRO 3. The optimizer, which is torch's own,
sees one flat tensor a parameter, this rank's part of the master weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from checkpoint.state import TensorLike
from offload import Trace
from parallel.data import DataParallel, Master, Replicated
from parallel.hybrid import Hybrid
from parallel.norm import Held, clip_factor, global_norm
from parallel.pipeline import Action
from parallel.pipeline.tied import Tied
from parallel.zero import FullySharded
from trainsys import muon
from trainsys.config import RunConfig
from trainsys.data import MicroBatch, StepBatch
from trainsys.engines import BuildOptimizer, Fencing, Shares, Update
from trainsys.errors import ConfigError, NumericsError
from trainsys.feed import Feed
from trainsys.models import blocks
from trainsys.muon import Muon
from trainsys.offloading import compute_device, engine_refusals
from trainsys.partition import STATE_KEYS, Fragment, Gradient, Partition, Slices
from trainsys.placement import Placement, elsewhere
from trainsys.streamed import Streamed
from trainsys.tiered import Tiered, TieredMasters

if TYPE_CHECKING:
    from trainsys.meter import Phases


class TorchEngine:
    """A trainsys.engines.Engine by torch: ZeRO 0 to 3 in any layout, in fp32 (or wider) and bf16."""

    def __init__(self, hybrid: Hybrid, config: RunConfig, build_optimizer: BuildOptimizer) -> None:
        """Take over this rank's part of the model, which is on its device; masters start from its values.

        Raises:
            ConfigError: a setting that only DeepSpeed has, naming each; a parameter that cannot be sharded.
        """
        _check(config, hybrid.tied_on_one_rank)
        module = hybrid.module
        self._hybrid, self._clip = hybrid, config.engine.gradient_clip_norm
        self._device = compute_device(config, next(module.parameters()).device)
        self._feed = Feed(hybrid, self._device)
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._optimizer = build_optimizer(module)
        self.trace: Trace | None = None
        """What offload moves and waits for, where the run asks for it."""
        if config.offload.parameters == "streamed" or config.offload.optimizer == "tiered":
            self.trace = Trace()
        self._data = _data_parallel(hybrid, config, self._device, self.trace)
        _adopt(self._optimizer, names, {master.name: master.tensor for master in self._data.masters})
        self._tied: list[Tied] = []
        if hybrid.pipeline is not None:
            hooks = _Hooks(self._data, hybrid.pipeline.schedule.stages_of(hybrid.pipeline.rank))
            self._tied = list(hybrid.pipeline.hand_over(hooks))
        masters = {master.name: master for master in self._data.masters}
        tied_names = [names[tied.parameter] for tied in self._tied]
        for tied, name in zip(self._tied, tied_names, strict=True):
            tied.parameter = masters[name].tensor
        placed = _Masters(hybrid, self._data, self._optimizer, frozenset(tied_names))
        self._masters: _Masters | TieredMasters = placed
        self._tiered: Tiered | None = None
        if config.offload.optimizer == "tiered":
            self._tiered = Tiered(self._optimizer, module, self._data, config, self.trace)
            self._optimizer = self._tiered.optimizer
            separate = config.engine.precision != "fp32"
            self._masters = TieredMasters(hybrid, self._data, self._tiered, placed.place, separate=separate)
        self._elsewhere = elsewhere(self._masters.slices, hybrid.groups.get("pipeline"))
        self._steps_taken = 0.0
        if isinstance(self._optimizer, Muon):
            self._describe_shards(self._optimizer)

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model; sharded parameters are DTensors outside of forward and backward."""
        return self._hybrid.module

    @property
    def device(self) -> torch.device:
        """Where losses are."""
        return self._device

    def train(self, batch: StepBatch, shares: Shares, phases: Phases) -> Tensor:
        """Run forward and backward of this rank's micro-batches; see trainsys.engines.Engine."""
        pipeline = self._hybrid.pipeline
        phase = self._phase(phases)
        self._data.begin()
        if pipeline is not None:
            with phases("pipeline"):
                seeds = shares.loss_factor, shares.auxiliary_factor
                told = pipeline.step([self._feed(micro) for micro in batch.micro_batches], lambda _: seeds)
                self._finish()
            return self._feed.told(torch.stack(told))
        summed = torch.zeros(2, dtype=torch.float64, device=self.device)  # read once: reading makes the host wait
        for index, micro in enumerate(batch.micro_batches):
            self._data.micro_batch(index + 1 == len(batch.micro_batches))
            with phase("forward"):
                loss, auxiliary = self.module(**self._feed(micro))
                share = shares.of(loss, auxiliary)
            with phase("backward"):
                share.backward()  # type: ignore[no-untyped-call]
            summed += torch.stack((loss.detach().double(), auxiliary.detach().double()))
        with phase("backward"):
            self._finish()
        return self._feed.told(summed)

    @torch.no_grad()
    def evaluate(self, micro: MicroBatch) -> Tensor:
        """Return the sums of one micro-batch without gradients."""
        fed = self._feed(micro)
        if self._hybrid.pipeline is not None:
            return self._feed.told(torch.stack(self._hybrid.pipeline.evaluate([fed])))
        loss, auxiliary = self.module(**fed)
        return self._feed.told(torch.stack((loss.double(), auxiliary.double())))

    def update(self, lr_factor: float) -> Update:
        """Clip, step the optimizer at `lr_factor` times each group's peak rate, clear gradients.

        Raises:
            NumericsError: the gradient norm is not finite; nothing has been updated.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        norm = self._norm()
        # The host waits here, where what it waits for is what the optimizer's kernels wait for too.
        if not norm < float("inf"):
            raise NumericsError(f"the gradient norm is {norm}; lower the learning rate, or inspect the last batch")
        if (factor := clip_factor(norm, self._clip)) < 1:
            gradients = [gradient.tensor for gradient in self._masters.gradients() if gradient.tensor.numel()]
            torch._foreach_mul_(gradients, factor)
        with self.trace.phase("update", self._device) if self.trace else contextlib.nullcontext():
            self._optimizer.step()
        self._data.refresh()
        self._steps_taken += 1
        self._hybrid.after_step()
        return Update(gradient_norm=norm, applied=True, loss_scale=1.0)

    def slices(self) -> Slices:
        """Return live views of this rank's weights and optimizer state, by logical name."""
        return {**self._masters.slices(), **self._elsewhere}

    def fence_with(self, checkpointer: Fencing) -> None:
        """Let a checkpointer fence before every update, for just what that updates."""
        checkpointer.fence_on(self._masters.fenced())

    def counters(self) -> dict[str, float]:
        """Return the numbers that go with `slices`: the updates applied."""
        return {"steps_taken": self._steps_taken}

    def after_load(self, counters: Mapping[str, float]) -> None:
        """Finish a load that overwrote `slices()`: restore `counters`, and let forward see the weights."""
        self._steps_taken = counters["steps_taken"]
        self._masters.set_steps_taken(self._steps_taken)
        self._masters.after_load()

    def close(self) -> None:
        """Release hooks; the model stays."""
        if self._tiered is not None:
            self._tiered.close()
        self._data.close()

    def _phase(self, phases: Phases) -> Callable[[str], AbstractContextManager[None]]:
        """Return what times a phase for the trainer, and for the trace of offload where there is one."""
        trace = self.trace
        if trace is None:
            return phases

        @contextlib.contextmanager
        def both(name: str) -> Iterator[None]:
            with phases(name), trace.phase(name, self._device):
                yield

        return both

    def _finish(self) -> None:
        """Sum gradients over data ranks, then over the stages that have a copy of one parameter."""
        self._data.finish()
        for tied in self._tied:
            tied.start()
        for tied in self._tied:
            tied.finish()

    @torch.no_grad()
    def _norm(self) -> float:
        copies = self._hybrid.copies_of_tied
        held = [
            Held(master.tensor.grad, master.shard, 0 if master.name in copies else master.num_copies, master.start)
            for master in self._data.masters
            if master.tensor.grad is not None
        ]
        group = self._data.host_group if isinstance(self._data, Streamed) else None
        group = group or dist.group.WORLD  # streamed gradients are in CPU memory
        assert group is not None
        return float(global_norm(held, group))

    def _describe_shards(self, optimizer: Muon) -> None:
        """Tell Muon which part of which matrix each flat tensor is, and who has the others."""
        self._masters.create_state()
        masters: dict[Tensor, Master] = {master.tensor: master for master in self._data.masters}
        for axes in sorted({master.parts for master in masters.values()}):
            holders = [
                (holder, [muon.Shard(part.name, part.shape, part.start, 0, part.master.numel()) for part in parts])
                for group, holder, parts in self._masters.held()
                if group["kind"] == "muon" and masters[holder].parts == axes
            ]
            if holders:
                optimizer.shard(holders, self._hybrid.groups.get(*axes), self.device)


class _Masters(Partition):
    """The masters of a data-parallel model, and what the optimizer keeps for them."""

    def __init__(
        self, hybrid: Hybrid, data: DataParallel, optimizer: torch.optim.Optimizer, tied: frozenset[str]
    ) -> None:
        separate = any(master.weight.dtype != master.tensor.dtype for master in data.masters)
        placement = Placement(hybrid.mesh, hybrid.rank, hybrid.shards)
        super().__init__(hybrid.module, optimizer, placement, separate_master=separate)
        self._data = data
        self._by_tensor: dict[Tensor, Master] = {master.tensor: master for master in data.masters}
        self._tied, self._copies_of_tied = tied, hybrid.copies_of_tied

    def weights(self) -> Slices:
        found: Slices = {f"model.{master.name}": self.place(master, master.weight) for master in self._data.masters}
        return found | self._buffers()

    def slices(self) -> Slices:
        """Return weights and optimizer state of this rank, by name."""
        self.create_state()
        found = self.weights()
        for master in self._data.masters:
            if self._separate_master:
                found[f"optimizer.master.{master.name}"] = self.place(master, master.tensor.detach())
        for group, holders in self.groups():
            for holder in holders:
                master = self._by_tensor[holder]
                for key in STATE_KEYS[group["kind"]]:
                    state = self._optimizer.state[holder][key]
                    found[f"optimizer.{key}.{master.name}"] = self.place(master, state)
        return found

    def groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for group in self._optimizer.param_groups:
            yield group, group["params"]

    def held(self) -> Iterator[tuple[dict[str, Any], Tensor, list[Fragment]]]:
        for group, holders in self.groups():
            for holder in holders:
                master = self._by_tensor[holder]
                kept = {key: self._optimizer.state[holder][key] for key in STATE_KEYS[group["kind"]]}
                shape = master.shard.local_shape
                yield group, holder, [Fragment(master.name, shape, master.start, 0, holder.detach(), kept)]

    def gradients(self) -> Iterator[Gradient]:
        for master in self._data.masters:
            if master.tensor.grad is not None:
                yield Gradient(master.name, master.shard.local_shape, master.start, master.tensor.grad)

    def after_load(self) -> None:
        self._data.refresh()

    def fenced(self) -> Any:
        """Return what checkpoint.Checkpointer.fence_on takes: the optimizer, and what is written behind its step."""
        if not self._separate_master:
            return self._optimizer
        # As DeepSpeed's optimizers look from outside. All weights are written at once: behind the first master.
        masters, weights = zip(*((m.tensor, m.weight) for m in self._data.masters), strict=True)
        wrapped = SimpleNamespace(
            optimizer=self._optimizer,
            single_partition_of_fp32_groups=[masters[0]],
            parallel_partitioned_bit16_groups=[weights],
        )
        return SimpleNamespace(optimizer=wrapped)

    def place(self, master: Master, flat: Tensor) -> TensorLike:
        """Return where in the whole tensor some elements of a master are."""
        copy, count = master.copy, master.num_copies
        if master.name in self._tied:  # another stage has it too
            copy, count = 2 * copy + (master.name in self._copies_of_tied), 2 * count
        return self._placement.part_of(master.name, flat, master.shard.local_shape, master.start, (copy, count))


class _Hooks:
    """Tells data parallelism which of this rank's stages a pipeline has finished with."""

    def __init__(self, data: DataParallel, own: Sequence[int]) -> None:
        self._data = data
        self._index = {stage: index for index, stage in enumerate(own)}

    def before(self, action: Action, *, last: bool) -> None:
        """Nothing: gradients are added up until the stage has finished."""

    def finished(self, stage: int) -> None:
        """Sum the gradients of the stage, while the schedule goes on."""
        self._data.stage_finished(self._index[stage])


def _data_parallel(hybrid: Hybrid, config: RunConfig, device: torch.device, trace: Trace | None) -> DataParallel:
    """Hand the model over to the data parallelism of the recipe."""
    module, settings = hybrid.module, config.engine
    compute_dtype = next(module.parameters()).dtype
    wide = torch.promote_types(compute_dtype, torch.float32)
    if config.offload.parameters == "streamed":
        return Streamed(module, config, hybrid.groups, (device, wide), trace)
    if config.offload.optimizer == "tiered":
        wide = compute_dtype  # the fp32 masters are the optimizer's
    overlap = config.parallel.overlap
    if settings.zero_stage == 0:
        return Replicated(
            module,
            hybrid.groups,
            stages=hybrid.stages,
            master_dtype=wide,
            bucket_numel=settings.bucket_numel,
            overlap=overlap,
        )
    for parameter in module.parameters():
        parameter.data = parameter.data.to(wide)  # the tensor changes, the parameter and its tag do not
    return FullySharded(
        module,
        blocks(module),
        hybrid.groups,
        zero_stage=settings.zero_stage,
        stages=hybrid.stages,
        compute_dtype=compute_dtype,
        overlap=overlap,
    )


def _adopt(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, nn.Parameter]) -> None:
    """Let the optimizer, which has no state yet, update these tensors instead of the parameters of the same names."""
    assert not optimizer.state, "the optimizer has stepped before its engine was made"
    for group in optimizer.param_groups:
        group["params"] = [tensors[names[parameter]] for parameter in group["params"]]


def _refused(config: RunConfig) -> list[str]:
    return [reason for backend, reason in engine_refusals(config).items() if backend == "torch"]


def _check(config: RunConfig, tied_on_one_rank: Sequence[str]) -> None:
    problems = []
    if tied_on_one_rank and config.engine.zero_stage:  # what a folder's model ties is known no earlier
        found = f"{config.engine.zero_stage}: two stages of a rank share {', '.join(tied_on_one_rank)}"
        allowed = "0, backend = deepspeed with 1, or a stages.schedule other than zbv and dualpipev"
        problems.append(f"config: engine.zero_stage: {found}, which FSDP2 cannot shard; allowed: {allowed}")
    if config.engine.precision == "fp16":
        problems.append(
            "config: engine.precision: fp16 needs the loss scaling of engine.backend = deepspeed; bf16, fp32"
        )
    problems += [f"config: engine.backend: torch: {reason}" for reason in _refused(config)]
    if problems:
        raise ConfigError(problems)
