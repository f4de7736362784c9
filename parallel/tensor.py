"""Layers whose matrices the ranks of a group share, made in place of the layers of a model that is already built.

A plan names the modules and their styles (`parallel.plans` has plans for models); `parallelize` first asks whether all
of them fit, then replaces parameters by this rank's parts, tagged with what they are, and swaps the classes of the
modules. Names of modules and parameters stay. Sizes that the ranks do not divide:

    attention heads      refused
    key and value heads  fewer than ranks: each is copied to the ranks whose query heads use it, if that comes out even,
                         and gradients of copies are summed; else refused
    vocabulary           padded with rows that no logit and no target comes from
    feed-forward         padded with features that are zero and stay zero
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from parallel import collectives
from parallel.errors import PlanError
from parallel.loss import linear_cross_entropy
from parallel.overlap import column, row
from parallel.sequence import before_first_argument, enter, leave, own_tokens, share_gradients
from parallel.shards import DimShard, Run, Shard, even_dim, shard_of, tag, whole_dim
from parallel.styles import (
    Column,
    FirstBlock,
    HeadNorm,
    Heads,
    Plan,
    Region,
    Row,
    SequenceNorm,
    Style,
    VocabularyEmbedding,
    VocabularyHead,
)


def parallelize(model: nn.Module, plan: Plan, group: ProcessGroup, *, sequence: bool, overlap: bool) -> None:
    """Share the matrices of `model` over the ranks of `group`, in place; a group of one rank changes nothing.

    Every rank has the whole model with equal weights, or has it on the meta device. Shared parameters are new objects
    afterwards, so optimizers are made later.
    Raises: PlanError with all sizes that do not fit and all patterns that match nothing.
    """
    styled = _styled(model, plan)
    problems = [
        f"parallel.tensor: {name}: {problem}"
        for name, module, style in styled
        for problem in _problems(module, style, group.size())
    ]
    if problems:
        raise PlanError("\n".join(problems))
    if group.size() == 1:
        return
    placement = Placement(group, group.group_name, group.rank(), group.size(), sequence, overlap)
    parts = _Parts()
    for _, module, style in styled:
        _apply(module, style, placement, parts)


def stacked_dim(
    sizes: Sequence[int], rank: int, num_ranks: int, *, head_dim: int = 1, copied: Sequence[int] = ()
) -> DimShard:
    """Return rank's share of each of several stacked matrices, stacked.

    Heads of `head_dim` rows stay whole; of the matrices `copied` (indices) with fewer heads than ranks, neighbouring
    ranks get the same head. With `head_dim` 1 sizes are padded where they do not divide.
    Raises: PlanError if heads do not come out even.
    """
    runs: list[Run] = []
    start = local = 0
    for index, size in enumerate(sizes):
        heads = size // head_dim
        if head_dim == 1 or heads % num_ranks == 0:
            part = even_dim(size, rank, num_ranks)
        elif index in copied and num_ranks % heads == 0:
            copies = num_ranks // heads
            run = Run(0, rank // copies * head_dim, head_dim, rank % copies, copies)
            part = DimShard(size, head_dim, (run,))
        else:
            raise PlanError(f"parallel.tensor: {num_ranks} ranks cannot share {heads} heads; one must divide the other")
        runs += [Run(local + run.local, start + run.start, run.length, run.copy, run.num_copies) for run in part.runs]
        start, local = start + size, local + part.local_size
    return DimShard(start, local, tuple(runs))


@dataclass(frozen=True, slots=True)
class Placement:
    """Which ranks share the layers of a model, and how they talk."""

    group: ProcessGroup
    name: str
    rank: int
    size: int
    sequence: bool
    overlap: bool


class ParallelColumn(nn.Linear):
    """This rank's outputs of a linear layer."""

    placement: Placement
    entered: bool
    copied_rows: tuple[slice, ...]
    """Rows that other ranks have too."""
    num_copies: int

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, T, own features]."""
        at, weight = self.placement, _sum_copies(self.weight, self)
        bias = _sum_copies(self.bias, self) if self.bias is not None else None
        if self.entered:
            return functional.linear(input, weight, bias)
        y = column(input, weight, at.name, sequence=at.sequence, overlap=at.overlap)
        return y if bias is None else y + bias


class ParallelRow(nn.Linear):
    """A linear layer of this rank's inputs, summed over ranks."""

    placement: Placement

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, T, O], or this rank's part of the tokens."""
        at = self.placement
        y = row(input, self.weight, at.name, sequence=at.sequence, overlap=at.overlap)
        if self.bias is None:
            return y
        return y + (collectives.replicate(self.bias, at.group) if at.sequence else self.bias)


class ParallelEmbedding(nn.Embedding):
    """An embedding of which this rank has some rows."""

    placement: Placement
    start: int
    num_rows: int
    """Without padding."""
    scatters: bool

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of tokens [B, T]: of all, or of this rank's part."""
        at, index = self.placement, input - self.start
        elsewhere = (index < 0) | (index >= self.num_rows)
        if self.padding_idx is not None and 0 <= self.padding_idx - self.start < self.num_rows:
            rows = functional.embedding(index.masked_fill(elsewhere, 0), self.weight, self.padding_idx - self.start)
            rows = rows.masked_fill(elsewhere[..., None], 0)
        else:  # Tokens of other ranks are one more row, of zeros: what comes out is not read again to blank it.
            num_rows = len(self.weight)
            weight = functional.pad(self.weight, (0, 0, 0, 1))
            rows = functional.embedding(index.masked_fill(elsewhere, num_rows), weight, num_rows)
        return leave(rows, at.group, sequence=self.scatters, overlap=at.overlap)


class ParallelHead(nn.Linear):
    """The product with the vocabulary, of which this rank has some rows."""

    placement: Placement
    start: int
    num_rows: int
    """Without padding."""
    compiled: bool

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the summed cross-entropy of `targets` [B, T], or logits [B, T, whole vocabulary]; equal on all ranks.

        Of logits, which are gathered, the gradient is that of a loss that all ranks compute alike.
        """
        at = self.placement
        x = enter(input, at.group, sequence=at.sequence, overlap=at.overlap)
        if targets is None:
            return collectives.gather(functional.linear(x, self.weight, self.bias), -1, at.group)[
                ..., : self.out_features
            ]
        return linear_cross_entropy(
            x,
            self.weight[: self.num_rows],
            targets,
            bias=self.bias[: self.num_rows] if self.bias is not None else None,
            group=at.group,
            start=self.start,
            compiled=self.compiled,
        )


class _Parts:
    """The new parameter for each old one, so that layers which share one still do."""

    def __init__(self) -> None:
        self._new: dict[nn.Parameter, nn.Parameter] = {}

    def replace(self, module: nn.Module, leaf: str, *dims: DimShard) -> None:
        """Put this rank's part in the place of the module's parameter, if it has one."""
        old = module._parameters[leaf]
        if old is None:
            return
        shard = Shard(dims, ("tensor",))
        if old not in self._new:
            local = old.new_empty(shard.local_shape) if old.is_meta else shard.take(old.detach())
            self._new[old] = tag(nn.Parameter(local, requires_grad=old.requires_grad), shard)
        assert shard_of(self._new[old]) == shard, "layers that share a parameter take the same part of it"
        module._parameters[leaf] = self._new[old]


def _styled(model: nn.Module, plan: Plan) -> list[tuple[str, nn.Module, Style]]:
    styled, unused = [], set(plan)
    for name, module in model.named_modules():
        for pattern, styles in plan.items():
            if fnmatchcase(name, pattern):
                unused.discard(pattern)
                styled += [(name, module, style) for style in styles]
    if unused:
        lines = (f"parallel.tensor: {pattern}: no module has such a name" for pattern in sorted(unused))
        raise PlanError("\n".join(lines))
    return styled


def _problems(module: nn.Module, style: Style, num_ranks: int) -> Iterator[str]:
    kind = nn.Embedding if isinstance(style, VocabularyEmbedding) else nn.Linear
    if isinstance(style, Column | Row | VocabularyEmbedding | VocabularyHead) and not isinstance(module, kind):
        yield f"{type(module).__name__} is no {kind.__name__}, which alone can be shared as {type(style).__name__}"
    elif isinstance(style, VocabularyEmbedding | VocabularyHead):
        rows = len(module.weight)  # type: ignore[arg-type]
        if -(-rows // num_ranks) * (num_ranks - 1) >= rows:
            yield f"{num_ranks} ranks cannot share {rows} rows of a vocabulary: the last would have none"
    if isinstance(style, Heads):
        heads, kv_heads = style.num_heads, style.num_kv_heads
        allowed = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        if num_ranks not in allowed:
            yield (
                f"{num_ranks} ranks cannot share {heads} query heads and {kv_heads} key and value heads evenly; "
                f"allowed: parallel.tensor of {', '.join(map(str, allowed))}"
            )


def _apply(module: nn.Module, style: Style, at: Placement, parts: _Parts) -> None:
    match style:
        case Column():
            assert isinstance(module, nn.Linear)
            _share_rows(module, style, at, parts)
        case Row():
            assert isinstance(module, nn.Linear)
            width = stacked_dim([module.weight.shape[1]], at.rank, at.size, head_dim=style.head_dim)
            parts.replace(module, "weight", whole_dim(module.weight.shape[0]), width)
            _become(module, ParallelRow, placement=at)
        case VocabularyEmbedding() | VocabularyHead():
            assert isinstance(module, nn.Linear | nn.Embedding)
            _share_vocabulary(module, style, at, parts)
        case SequenceNorm():
            if at.sequence:
                share_gradients(module, at.group)
        case HeadNorm():
            share_gradients(module, at.group)
        case Heads():
            _set_heads(module, style, at.size)
        case Region():
            before_first_argument(module, lambda x: enter(x, at.group, sequence=at.sequence, overlap=at.overlap))
        case FirstBlock():
            if at.sequence:
                before_first_argument(module, lambda x: own_tokens(x, at.group))


def _share_rows(module: nn.Linear, style: Column, at: Placement, parts: _Parts) -> None:
    height, width = module.weight.shape
    sizes = style.row_splits or (height,)
    assert sum(sizes) == height, f"{sizes} are not the {height} rows of the layer"
    cuts = [
        stacked_dim([size], at.rank, at.size, head_dim=style.head_dim, copied=(0,) if index in style.copied else ())
        for index, size in enumerate(sizes)
    ]
    rows = stacked_dim(sizes, at.rank, at.size, head_dim=style.head_dim, copied=style.copied)
    parts.replace(module, "weight", rows, whole_dim(width))
    parts.replace(module, "bias", rows)
    if hasattr(module, "row_splits"):  # which an optimizer of whole matrices reads
        module.__dict__["row_splits"] = {"weight": tuple(cut.local_size for cut in cuts)}
    copies = [run for run in rows.runs if run.num_copies > 1]
    _become(
        module,
        ParallelColumn,
        placement=at,
        entered=style.entered,
        copied_rows=tuple(slice(run.local, run.local + run.length) for run in copies),
        num_copies=copies[0].num_copies if copies else 1,
    )


def _share_vocabulary(
    module: nn.Linear | nn.Embedding, style: VocabularyEmbedding | VocabularyHead, at: Placement, parts: _Parts
) -> None:
    height, width = module.weight.shape
    rows = even_dim(height, at.rank, at.size)
    parts.replace(module, "weight", rows, whole_dim(width))
    held = {"start": at.rank * rows.local_size, "num_rows": sum(run.length for run in rows.runs)}
    if isinstance(style, VocabularyEmbedding):
        _become(module, ParallelEmbedding, placement=at, scatters=style.scatters and at.sequence, **held)
    else:
        parts.replace(module, "bias", rows)
        _become(module, ParallelHead, placement=at, compiled=False, **held)


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Give a module another class, keeping its parameters, hooks and name."""
    module.__dict__.update(attributes)
    module.__class__ = kind


def _set_heads(module: nn.Module, style: Heads, num_ranks: int) -> None:
    heads, kv_heads = style.num_heads // num_ranks, max(1, style.num_kv_heads // num_ranks)
    counts = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
    }
    module.__dict__.update({name: count for name, count in counts.items() if hasattr(module, name)})


def _sum_copies(parameter: Tensor, layer: ParallelColumn) -> Tensor:
    """Return the parameter; gradients of the rows that several ranks hold are summed over these ranks."""
    if not layer.copied_rows:
        return parameter
    return _SumCopies.apply(parameter, layer.copied_rows, layer.num_copies, layer.placement.group)  # type: ignore[no-any-return, no-untyped-call]


class _SumCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[slice, ...], num_copies: int, group: ProcessGroup) -> Tensor:
        ctx.how = rows, num_copies, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, num_copies, group = ctx.how
        grad = grads[0].clone()
        mine = torch.cat([grad[part] for part in rows])
        everyone = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather_into_tensor(
            everyone.flatten(0, 1), mine, group=group
        )  # few rows: cheaper than groups of their own
        first = group.rank() // num_copies * num_copies
        summed = everyone[first : first + num_copies].sum(0)
        for part, whole in zip(rows, torch.split(summed, [part.stop - part.start for part in rows]), strict=True):
            grad[part] = whole
        return grad, None, None, None
