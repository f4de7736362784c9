"""Muon for hidden matrices and AdamW for the rest, in one optimizer that knows ZeRO's flat partitions."""

# Shapes: A rows, B columns of one matrix; any leading dimensions are a stack of matrices.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim.adamw import adamw

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration (Jordan 2024): steepest at zero while staying near one."""
_ITERATIONS = 5
_TINY = 1e-7


def orthogonalise(matrix_AB: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of the matrix's U S V^T, roughly: singular values end between 0.5 and 1.5; computed in `dtype`.

    Five steps of a quintic Newton-Schulz iteration on the matrix over its Frobenius norm.
    """
    a, b, c = _QUINTIC
    x: Tensor = matrix_AB.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_TINY)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def matched_update(stacked: Tensor, row_splits: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The step for `stacked` [..., sum(row_splits), B]: each logical matrix orthogonalised by itself.

    Scaled by 0.2 sqrt(max(A, B)), which gives an element the root mean square that AdamW's steps have
    (Moonlight, arXiv 2502.16982): one learning rate suits matrices of every shape.
    """
    updates = [
        orthogonalise(matrix, dtype).mul_(0.2 * math.sqrt(max(matrix.shape[-2:])))
        for matrix in torch.split(stacked, list(row_splits), dim=-2)
    ]
    return updates[0] if len(updates) == 1 else torch.cat(updates, dim=-2)


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of one parameter's elements, and where a flat partition (the holder) has it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element, in the flattened parameter."""
    offset: int
    """First element, in the holder."""
    numel: int


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz for groups of kind `muon`, AdamW for groups of kind `adamw`.

    Muon (Jordan 2024): m <- lerp(m, g, 1 - mu); step along `matched_update(lerp(g, m, mu))`; weight decay is
    decoupled. State per element: `momentum_buffer`; AdamW's groups keep `exp_avg`, `exp_avg_sq` and a `step`.

    Under ZeRO a group holds one flat partition instead of matrices. Tell `shard` what lies where: each step
    then sends the pieces of every matrix to one rank, which orthogonalises it once, and gets the pieces of
    the result back (two all-to-alls over the group's elements in the iteration's dtype; the same bits as
    unsharded).
    """

    def __init__(
        self, groups: list[dict[str, Any]], row_splits: Mapping[str, Sequence[int]], dtype: torch.dtype
    ) -> None:
        """Groups carry `kind`, `name` and their settings; those of kind `muon` also `names` of their parameters.

        `row_splits` maps each such name to the heights of the matrices stacked in it; `dtype` is the
        iteration's.
        """
        super().__init__(groups, {})
        self._row_splits = {name: tuple(heights) for name, heights in row_splits.items()}
        self._dtype = dtype
        self._names = {
            parameter: name
            for group in self.param_groups
            if group["kind"] == "muon"
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        self._exchanges: dict[Tensor, _Exchange] = {}

    def shard(
        self,
        holders: Sequence[tuple[Tensor, Sequence[Shard]]],
        process_group: dist.ProcessGroup,
        device: torch.device | None = None,
    ) -> None:
        """Works on flat partitions from now on, told what each holder of the `muon` groups has on this rank.

        Every rank of the group calls it, with its holders in the same order; ranks then also step together.
        Pieces are exchanged and orthogonalised on `device` (None: where the holder is), which must be one that
        `process_group` can send from.
        Raises: ValueError on every rank if the shards of all ranks do not make up whole matrices.
        """
        mine = [list(shards) for _, shards in holders]
        everyone: list[list[list[Shard]]] = [[] for _ in range(process_group.size())]
        dist.all_gather_object(everyone, mine, group=process_group)
        for index, (holder, _) in enumerate(holders):
            shards = [holders_of_rank[index] for holders_of_rank in everyone]
            self._exchanges[holder] = _Exchange(shards, process_group, device or holder.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient, at its group's `lr`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._step_muon(group)
            else:
                self._step_adamw(group)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        for holder in group["params"]:
            if holder.grad is None:
                continue
            state = self.state[holder]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(holder, memory_format=torch.preserve_format)
            momentum = state["momentum_buffer"]
            momentum.lerp_(holder.grad, 1 - group["momentum"])
            direction = holder.grad.lerp(momentum, group["momentum"])
            if holder in self._exchanges:
                update = self._exchanges[holder].apply(direction, self._dtype, self._update_of)
            elif holder in self._names:
                update = self._update_of(self._names[holder], direction)
            else:
                raise RuntimeError(f"group {group['name']} holds a flat partition; Muon.shard must describe it first")
            holder.mul_(1 - group["lr"] * group["weight_decay"])
            holder.add_(update, alpha=-group["lr"])

    def _update_of(self, name: str, direction: Tensor) -> Tensor:
        return matched_update(direction, self._row_splits[name], self._dtype)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class _Exchange:
    """Which rank orthogonalises which matrix of one holder, and the way of the pieces there and back."""

    def __init__(
        self, shards_by_rank: Sequence[Sequence[Shard]], process_group: dist.ProcessGroup, device: torch.device
    ) -> None:
        shards_by_rank = [[shard for shard in shards if shard.numel] for shards in shards_by_rank]
        self._group, self._device = process_group, device
        rank = process_group.rank()
        owners = _owners(shards_by_rank)
        # Pieces travel in the order (owner, name); what one rank sends first the owner receives first.
        by_owner = sorted(shards_by_rank[rank], key=lambda shard: (owners[shard.name], shard.name))
        self._mine = by_owner
        self._sent = [sum(s.numel for s in by_owner if owners[s.name] == r) for r in range(process_group.size())]
        arriving = [
            sorted((s for s in shards if owners[s.name] == rank), key=lambda shard: shard.name)
            for shards in shards_by_rank
        ]
        self._received = [sum(shard.numel for shard in shards) for shards in arriving]
        self._pieces = [shard for shards in arriving for shard in shards]
        self._shapes = {shard.name: shard.shape for shard in self._pieces}

    def apply(self, direction: Tensor, dtype: torch.dtype, update_of: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The update for this rank's holder, of which `direction` is the orthogonalisation's input."""
        holder_device = direction.device
        direction = direction.to(self._device, dtype)
        sent = torch.cat([direction[s.offset : s.offset + s.numel] for s in self._mine] or [direction[:0]])
        received = direction.new_empty(sum(self._received))
        dist.all_to_all_single(received, sent, self._received, self._sent, group=self._group)
        wholes = {name: direction.new_empty(math.prod(shape)) for name, shape in self._shapes.items()}
        for shard, piece in self._cut(received):
            wholes[shard.name][shard.start : shard.start + shard.numel] = piece
        updates = {name: update_of(name, whole.view(self._shapes[name])).reshape(-1) for name, whole in wholes.items()}
        for shard, piece in self._cut(received):
            piece.copy_(updates[shard.name][shard.start : shard.start + shard.numel])
        dist.all_to_all_single(sent, received, self._sent, self._received, group=self._group)
        update = torch.zeros_like(direction)  # between and behind the pieces is padding
        for shard, piece in zip(self._mine, torch.split(sent, [s.numel for s in self._mine]), strict=True):
            update[shard.offset : shard.offset + shard.numel] = piece
        return update.to(holder_device)

    def _cut(self, received: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        return zip(self._pieces, torch.split(received, [shard.numel for shard in self._pieces]), strict=True)


def _owners(shards_by_rank: Sequence[Sequence[Shard]]) -> dict[str, int]:
    """The rank that orthogonalises each matrix: where most of it lies already, else the least busy.

    Raises: ValueError if the shards of a parameter do not make it up.
    """
    held: dict[str, dict[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, shards in enumerate(shards_by_rank):
        for shard in shards:
            held.setdefault(shard.name, {}).setdefault(rank, 0)
            held[shard.name][rank] += shard.numel
            shapes[shard.name] = shard.shape
    for name, shape in shapes.items():
        if sum(held[name].values()) != math.prod(shape):
            raise ValueError(f"{name}: shards hold {sum(held[name].values())} of {math.prod(shape)} elements")
    busy = [0.0] * len(shards_by_rank)
    owners = {}
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        most = max(held[name].values())
        candidates = [rank for rank, numel in held[name].items() if numel >= 0.9 * most]
        owners[name] = min(candidates, key=lambda rank: (busy[rank], rank))
        busy[owners[name]] += math.prod(shapes[name]) * min(shapes[name][-2:])
    return owners
