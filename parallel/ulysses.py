"""Ulysses attention: every rank gets the whole sequence of a share of the heads, attends, and hands it back; exact.

One all-to-all carries queries, keys and values there, one the mixed values back. Query heads are shared evenly. Key and
value heads are too where the ranks divide their number; where their number divides the ranks instead, each goes to the
ranks that need it, which is the least that works. Follows DeepSpeed-Ulysses (arXiv 2309.14509).
"""

# Shapes: B batch, T tokens of this rank, H query heads, K key/value heads, E head width, R ranks, W all tokens.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel import kernels
from parallel.collectives import all_gather, exchange
from parallel.ring import in_order, outside_graphs


def shared_heads(num_heads: int, num_kv_heads: int, size: int) -> list[list[int]]:
    """Return the key/value heads that each rank needs for its even share of the query heads.

    Raises: ValueError if heads cannot be shared so that every rank has whole groups of one size.
    """
    fits = num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    if not fits:
        raise ValueError(
            f"parallel: attention: 'ulysses' cannot share {num_heads} query and {num_kv_heads} key/value heads among "
            f"{size} context ranks; allowed: query heads that the ranks divide, with key/value heads that they divide "
            "or that divide them, or 'ring'"
        )
    share, group = num_heads // size, num_heads // num_kv_heads
    return [list(range(rank * share // group, ((rank + 1) * share - 1) // group + 1)) for rank in range(size)]


class Ulysses:
    """The attention core of a rank that exchanges sequence for heads; all ranks of `group` must call alike."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._run: Callable[..., Tensor] = self._attend

    def prepare(
        self, document_ids_BT: Tensor | None, positions_BT: Tensor | None, like: Tensor
    ) -> kernels.Documents | None:
        """Return the documents of whole sequences; `document_ids_BT` are this rank's part of numbers that rise."""
        self._run = outside_graphs(self._attend)
        if document_ids_BT is None:
            return None
        numbers_RBT = all_gather(document_ids_BT[None].to(like.device, torch.int32), 0, self.group)
        return kernels.documents(in_order(numbers_RBT), like)

    def __call__(
        self,
        query_BTHE: Tensor,
        key_BTKE: Tensor,
        value_BTKE: Tensor,
        plan: kernels.Documents | None,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """Return the mixed values [B, T, H, E] of this rank's tokens; `scale` is of scores, by default E^-1/2."""
        scale = query_BTHE.shape[-1] ** -0.5 if scale is None else scale
        return self._run(query_BTHE, key_BTKE, value_BTKE, plan, scale)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: kernels.Documents | None, scale: float
    ) -> Tensor:
        size, share = self.group.size(), query.shape[2] // self.group.size()
        needed = shared_heads(query.shape[2], key.shape[2], size)
        sent_RBT = torch.stack(
            [
                torch.cat((query[:, :, rank * share : (rank + 1) * share], _heads(key, heads), _heads(value, heads)), 2)
                for rank, heads in enumerate(needed)
            ]
        )
        whole_BW = in_order(exchange(sent_RBT, self.group))
        kv_heads = len(needed[0])
        parts = torch.split(whole_BW, [share, kv_heads, kv_heads], 2)
        mixed_BW: Tensor = kernels.CausalAttention.apply(*parts, scale, plan)  # type: ignore[no-untyped-call]
        received_RBT = exchange(by_rank(mixed_BW, size), self.group)
        return received_RBT.movedim(0, 2).flatten(2, 3)


def by_rank(whole_BW: Tensor, size: int) -> Tensor:
    """Return [R, B, T, ...]: sequences [B, W, ...] as the zigzag parts of all ranks; undoes `in_order`."""
    first, second = torch.unflatten(whole_BW, 1, (2 * size, -1)).transpose(0, 1).chunk(2)
    return torch.cat((first, second.flip(0)), 2)


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    return x[:, :, heads[0] : heads[-1] + 1]
