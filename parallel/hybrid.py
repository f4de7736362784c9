"""All kinds of parallelism on one model, in the one order in which they compose.

    1. tensor    matrices are cut by plan; sequence parallel with it
    2. expert    whole experts are dealt out; what tensor parallel leaves alone
    3. context   attention gets the core that sees other ranks' tokens
    4. pipeline  blocks that are not this rank's are dropped, the others become stages
    5. data      an engine takes over what is left (`trainsys.engines`)

Each step finds the modules of the one before where they were, by the same names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from parallel import expert, tensor
from parallel.config import ParallelConfig
from parallel.context import Context, Core
from parallel.groups import MeshGroups
from parallel.mesh import Along, Mesh
from parallel.pipeline import Layer, Schedule, build, num_stages, split
from parallel.pipeline.runtime import Inputs, Pipeline
from parallel.pipeline.split import check_layers
from parallel.pipeline.tied import Tied
from parallel.plans import plan_for
from parallel.shards import Shard, shards_of

GROUPS: tuple[tuple[Along, ...], ...] = (
    ("pipeline",),
    ("replicate",),
    ("shard",),
    ("context",),
    ("tensor",),
    ("shard", "context"),
    ("pipeline", "tensor"),
    ("expert", "tensor"),
    ("expert_data", "context"),
    ("pipeline", "tensor", "expert"),
    ("replicate", "shard", "context"),
    ("replicate", "shard", "context", "tensor"),
)
"""What layers and engines talk over, for MeshGroups.prepare."""


class Anatomy(Protocol):
    """What must be known of a kind of model to take it apart; whoever knows the model says so."""

    def share_sequences(self, model: nn.Module, core: Core) -> None:
        """Let all attention layers attend by `core`."""

    def layers(self, model: nn.Module) -> tuple[Sequence[Layer], Layer, Layer]:
        """Return the costs of the blocks, first to last, of the embedding, and of the head."""

    def stage(self, model: nn.Module, first: int, end: int) -> nn.Module:
        """Return blocks [first, end) as parallel.pipeline.runtime calls a stage, parameters named as in `model`.

        The first stage has the embedding too, the last one the head. A parameter that both have is tied.
        """

    def stream(self, stages: Sequence[nn.Module], inputs: Inputs, num_ranks: int) -> Tensor:
        """Return an uninitialised tensor like what flows between stages, whose tokens `num_ranks` ranks share."""


@dataclass(slots=True, eq=False)
class Hybrid:
    """One rank's part of a model, and what an engine must know of the layout."""

    module: nn.Module
    """This rank's parameters, by the names that they have in the whole model."""
    groups: MeshGroups
    shards: Mapping[str, Shard]
    """Which part of the whole each parameter is."""
    context: Context | None = None
    """Cuts batches; None where every rank has whole sequences."""
    stages: Sequence[nn.Module] = ()
    """Of a pipeline: this rank's, first to last; `module` holds their parameters."""
    pipeline: Pipeline | None = None
    """Runs forward and backward of the stages; None where the module is called."""
    tied: Mapping[str, int] = field(default_factory=dict)
    """Parameters that the first and the last stage both have, on different ranks: which copy is here, 0 or 1."""
    tied_on_one_rank: Sequence[str] = ()
    """Parameters that the first and the last stage both have, on the same rank; all ranks know of them."""

    @property
    def copies_of_tied(self) -> frozenset[str]:
        """Parameters of which another stage has the copy that counts."""
        return frozenset(name for name, copy in self.tied.items() if copy)

    @property
    def mesh(self) -> Mesh:
        return self.groups.mesh

    @property
    def rank(self) -> int:
        return self.groups.rank

    @property
    def tells(self) -> bool:
        """Whether this rank's losses count: ranks along the tensor and pipeline axes have the same."""
        at = self.mesh.coordinates(self.rank)
        return at.tensor == 0 and at.pipeline == 0

    def after_step(self) -> None:
        """Do what the model's layers do once an optimizer step; every rank calls it."""
        expert.after_step(self.module)

    def close(self) -> None:
        """End the pipeline's communicators."""
        if self.pipeline is not None:
            self.pipeline.close()


def apply(
    model: nn.Module,
    groups: MeshGroups,
    anatomy: Anatomy,
    *,
    num_micro_batches: int = 1,
    place: Callable[[nn.Module], nn.Module] = lambda module: module,
    timeout_s: float = 600.0,
) -> Hybrid:
    """Return this rank's part of `model`, which is whole and the same on every rank, and is used up.

    `place` brings what is left of it to the device and dtype of the training. A pipeline runs `num_micro_batches` a
    step and waits `timeout_s` for a message. Every rank calls it.

    Raises:
        ParallelError, ValueError: the model cannot be shared that way; with the sizes that do not fit.
    """
    degrees = groups.mesh.degrees
    if degrees.tensor > 1:
        group = groups.get("tensor")
        tensor.parallelize(model, plan_for(model), group, sequence=degrees.sequence, overlap=degrees.overlap)
    if degrees.expert > 1 or expert.has_experts(model):
        expert.parallelize(
            model,
            expert.ExpertGroups.of(groups),
            sequence=degrees.tensor > 1 and degrees.sequence,
            node_size=degrees.node_size,
            overlap=degrees.overlap,
        )
    context = None
    if degrees.context > 1:
        context = Context(groups.get("context"), degrees.attention)
        anatomy.share_sequences(model, context.core)
    if degrees.pipeline == 1:
        module = place(model)
        return Hybrid(module, groups, shards_of(module), context)
    return _cut(model, groups, anatomy, context, num_micro_batches, place, timeout_s)


def stage_sizes(degrees: ParallelConfig, layers: Sequence[Layer], embedding: Layer, head: Layer) -> list[int]:
    """Return how many layers each stage of the pipeline has.

    Raises:
        PipelineError: fewer layers than stages, or `stages.layers` does not fit the model.
    """
    stages = num_stages(degrees.stages.schedule, degrees.pipeline, degrees.stages.per_rank)
    if degrees.stages.layers:
        check_layers(degrees.stages.layers, stages, len(layers))
        return degrees.stages.layers
    return split(layers, stages, embedding=embedding, head=head)


def _cut(
    model: nn.Module,
    groups: MeshGroups,
    anatomy: Anatomy,
    context: Context | None,
    num_micro_batches: int,
    place: Callable[[nn.Module], nn.Module],
    timeout_s: float,
) -> Hybrid:
    """Keep this rank's stages and make the pipeline that runs them."""
    degrees, group = groups.mesh.degrees, groups.get("pipeline")
    sizes = stage_sizes(degrees, *anatomy.layers(model))
    ends = list(itertools.accumulate(sizes))
    schedule = build(degrees.stages.schedule, degrees.pipeline, num_micro_batches, per_rank=degrees.stages.per_rank)
    own = schedule.stages_of(group.rank())
    stages = [anatomy.stage(model, ends[stage] - sizes[stage], ends[stage]) for stage in own]
    tied_names = _tied_names(model)  # while they are one parameter: `place` may give each stage its own
    module = place(Part(stages))
    tied = _tie(tied_names, stages, own, schedule, groups)
    tokens_shared = degrees.tensor if degrees.sequence else 1
    pipeline = Pipeline(
        stages,
        schedule,
        group,
        new_x=lambda inputs: anatomy.stream(stages, inputs, tokens_shared),
        device=next(module.parameters()).device,
        tied=list(tied.values()),
        overlap=degrees.overlap,
        timeout_s=timeout_s,
    )
    copies = {name: int(not each.is_counted) for name, each in tied.items()}
    together = tied_names if schedule.rank_of[0] == schedule.rank_of[-1] else ()
    return Hybrid(module, groups, shards_of(module), context, stages, pipeline, copies, together)


class Part(nn.Module):
    """The modules of several stages under the names that they have in the whole model; called by nobody.

    Has the `config` of the stages, if they have one.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = getattr(stages[0], "config", None)
        for stage in stages:
            _merge(stage, self)


def _merge(source: nn.Module, target: nn.Module) -> None:
    """Add what `source` holds to `target`; of two modules of one name the children are put together in a third."""
    for name, parameter in source.named_parameters(recurse=False):
        target.register_parameter(name, parameter)
    for name, child in source.named_children():
        known = target._modules.get(name)
        if known is None or known is child:
            target.add_module(name, child)
            continue
        both = nn.Module()
        _merge(known, both)
        _merge(child, both)
        target.add_module(name, both)


def _tie(
    names: Sequence[str], stages: Sequence[nn.Module], own: Sequence[int], schedule: Schedule, groups: MeshGroups
) -> dict[str, Tied]:
    """Return the parameters that the first and the last stage both have, on different ranks, if one of them is here."""
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    members = groups.mesh.group(groups.rank, "pipeline")
    tied: dict[str, Tied] = {}
    for name in names if first != last else ():
        for stage, module in zip(own, stages, strict=True):
            if stage in (0, schedule.num_stages - 1):
                pair = groups.of((members[first], members[last]), f"tied {name}")
                tied[name] = Tied(dict(module.named_parameters())[name], stage, pair)
    return tied


def _tied_names(model: nn.Module) -> list[str]:
    """Return the parameters that have several names, by their first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [several[0] for several in names.values() if len(several) > 1]
