"""Tokens to the ranks of their experts and back.

Shapes: N tokens of this rank, D width, E experts, K routes a token, P ranks, L experts of a rank (E / P), M nodes,
R rows: routes in the order of their experts, S slots of a token that a row may come from.

Rank p has experts p x L to (p + 1) x L - 1. A rank sorts its routes by expert, tells every other how many rows come
for each of its experts, and sends the rows; they return by the same way and are summed by weight where they came from.
Ranks may have any number of tokens, none too.

With nodes (`node_size` consecutive ranks each) a token goes once to every node that has experts of its choice, to the
rank that stands there where its own rank stands here; that rank sends it on within the node and sums what returns, so
that one row goes back as well (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from parallel import collectives
from parallel.routing import count

Mapped = Callable[[Tensor, Tensor], Tensor]
"""Rows [R, D] sorted by expert and the number for each of the rank's experts [L] -> mapped rows [R, D]."""


@dataclass(slots=True)
class DispatchStats:
    """What this rank sent to experts, one way (as much comes back, and both again in backward)."""

    tokens: int = 0
    """Tokens routed here."""
    routes: int = 0
    """Rows that their experts were to compute."""
    between_bytes: int = 0
    """Activations sent to other nodes; without nodes every rank is one."""
    between_bytes_per_route: int = 0
    """The same had every route been sent by itself."""
    within_bytes: int = 0
    """Activations sent to other ranks of this node."""


@dataclass(slots=True)
class Dispatcher:
    """Computes experts of tokens, wherever they are."""

    num_experts: int
    group: ProcessGroup | None = None
    """The ranks over which the experts are spread; None has them all here."""
    node_size: int = 0
    """Ranks of one node; 0 sends every route by itself."""
    overlap: bool = False
    """Whether what a call is given to do `meanwhile` runs while tokens are on their way."""
    stats: DispatchStats = field(default_factory=DispatchStats)

    def __post_init__(self) -> None:
        if self.num_experts % self.num_ranks:
            problem = f"{self.num_ranks} ranks cannot share {self.num_experts} experts evenly"
            raise ValueError(f"parallel.expert: {problem}; allowed: a divisor of the number of experts")
        if self.node_size and self.num_ranks % self.node_size:
            problem = f"nodes of {self.node_size} ranks do not divide the {self.num_ranks} that share the experts"
            raise ValueError(f"parallel.expert: node_size: {problem}; allowed: a divisor, or 0")

    @property
    def num_ranks(self) -> int:
        """Over how many ranks the experts are spread."""
        return 1 if self.group is None else self.group.size()

    def __call__(
        self,
        x_ND: Tensor,
        expert_NK: Tensor,
        weight_NK: Tensor,
        experts: Mapped,
        meanwhile: Callable[[], Tensor] | None = None,
        *,
        dropless: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum over each token's routes of weight x expert(token), [N, D]; and what `meanwhile` returned.

        Routes to expert E go nowhere; `dropless` promises that there are none, which spares the host a wait where all
        experts are here. All ranks of the group must call.
        """
        self.stats.tokens += x_ND.shape[0]
        task = _Task(meanwhile)
        if self.num_ranks == 1:
            counts_E = count(expert_NK, self.num_experts)
            rows = _sort(expert_NK, expert_NK.numel() if dropless else int(counts_E.sum()))
            self.stats.routes += len(rows.slot_R)
            mapped_ND = _weigh(_collect(experts(_spread(x_ND, rows), counts_E), rows), weight_NK)
        elif self.node_size:
            mapped_ND = self._by_node(x_ND, expert_NK, weight_NK, experts, task)
        else:
            mapped_ND = self._by_route(x_ND, expert_NK, weight_NK, experts, task)
        return mapped_ND, task.result()

    def _by_route(
        self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, experts: Mapped, task: _Task, *, counted: bool = False
    ) -> Tensor:
        """Send every route to the rank of its expert."""
        assert self.group is not None
        counts_PL = count(expert_NK, self.num_experts).view(self.num_ranks, -1)
        coming_PL = torch.empty_like(counts_PL)
        dist.all_to_all_single(coming_PL, counts_PL, group=self.group)
        # The host needs the sums: it waits for the device here.
        send, receive = torch.stack((counts_PL.sum(1), coming_PL.sum(1))).tolist()
        self._count_sent(send, x_ND, counted=counted)
        rows = _sort(expert_NK, sum(send))
        came_RD = self._exchange(_spread(x_ND, rows), send, receive, task)
        # They came by rank and expert; the products want them by expert.
        expert_R = torch.arange(coming_PL.shape[1], device=x_ND.device).repeat(self.num_ranks)
        order_R = expert_R.repeat_interleave(coming_PL.flatten(), output_size=sum(receive)).argsort(stable=True)
        inverse_R = _inverse(order_R)
        mapped_RD = experts(_permute(came_RD, order_R, inverse_R), coming_PL.sum(0))
        back_RD = self._exchange(_permute(mapped_RD, inverse_R, order_R), receive, send, None)
        return _weigh(_collect(back_RD, rows), weight_NK)

    def _by_node(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, experts: Mapped, task: _Task) -> Tensor:
        """Send every token once to each node it has experts in, and from there to its experts."""
        assert self.group is not None
        num_nodes, size = self.num_ranks // self.node_size, self.node_size
        node_NK = expert_NK // (self.num_experts // num_nodes)  # num_nodes where a route goes nowhere
        visited_NM = torch.zeros(len(x_ND), num_nodes + 1, dtype=torch.bool, device=x_ND.device)
        visited_NM = visited_NM.scatter_(1, node_NK, value=True)[:, :num_nodes]
        key_NM = torch.arange(num_nodes, device=x_ND.device).expand_as(visited_NM).masked_fill(~visited_NM, num_nodes)
        # To the rank of each node that stands where this one does; nothing to the others.
        counts_MS = torch.zeros(num_nodes, size, dtype=torch.int64, device=x_ND.device)
        index = self.group.rank() % size
        counts_MS[:, index] = visited_NM.sum(0)
        coming_P = torch.empty_like(counts_MS.flatten())
        dist.all_to_all_single(coming_P, counts_MS.flatten(), group=self.group)
        routes_P = torch.zeros_like(counts_MS)
        routes_P[:, index] = count(node_NK, num_nodes)
        send, receive, routes = torch.stack((counts_MS.flatten(), coming_P, routes_P.flatten())).tolist()
        self._count_between(send, routes, x_ND)
        rows = _sort(key_NM, sum(send))
        token_R, here_R = rows.slot_R // num_nodes, rows.slot_R % num_nodes
        mine_RK = node_NK[token_R] == here_R[:, None]
        expert_RK = expert_NK[token_R].masked_fill(~mine_RK, self.num_experts)
        came_RD = self._exchange(_spread(x_ND, rows), send, receive, task)
        weight_RK = self._exchange(_spread(weight_NK, rows) * mine_RK, send, receive, None)
        expert_RK = self._exchange(expert_RK, send, receive, None)
        mapped_RD = self._by_route(came_RD, expert_RK, weight_RK, experts, _Task(None), counted=True)
        return _collect(self._exchange(mapped_RD, receive, send, None), rows).sum(1)

    def _exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int], task: _Task | None) -> Tensor:
        assert self.group is not None
        if not self.overlap or task is None or task.done:
            return collectives.exchange(x, self.group, send, receive)
        journey = _Journey(self.group, send, receive)
        token = _Depart.apply(x, journey)  # type: ignore[no-untyped-call]
        task.result()
        return _Arrive.apply(token, journey)  # type: ignore[no-any-return, no-untyped-call]

    def _count_sent(self, send: list[int], x_ND: Tensor, *, counted: bool) -> None:
        """Add what goes by route; `counted` says that the way between the nodes was counted before."""
        assert self.group is not None
        here, size = self.group.rank(), self.node_size or 1
        row_bytes = x_ND.shape[-1] * x_ND.element_size()
        near = sum(n for rank, n in enumerate(send) if rank // size == here // size and rank != here)
        self.stats.within_bytes += near * row_bytes
        if not counted:
            far = sum(n for rank, n in enumerate(send) if rank // size != here // size)
            self.stats.routes += sum(send)
            self.stats.between_bytes += far * row_bytes
            self.stats.between_bytes_per_route += far * row_bytes

    def _count_between(self, send: list[int], routes: list[int], x_ND: Tensor) -> None:
        assert self.group is not None
        row_bytes = x_ND.shape[-1] * x_ND.element_size()
        here = self.group.rank()
        self.stats.routes += sum(routes)
        self.stats.between_bytes += (sum(send) - send[here]) * row_bytes
        self.stats.between_bytes_per_route += (sum(routes) - routes[here]) * row_bytes


def grouped_product(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Return each expert's rows times its matrix, [R, O]; rows are sorted by expert, `counts_E[e]` for expert e.

    An expert without rows gets a gradient of zeros.
    """
    if x_RI.dtype == torch.bfloat16 and x_RI.shape[1] % 8 == weight_EOI.shape[1] % 8 == 0 and len(x_RI):
        # One kernel, for which the host need not know the counts; torch has it for bf16.
        return functional.grouped_mm(x_RI, weight_EOI.mT, offs=counts_E.cumsum(0).to(torch.int32))
    rows = torch.split(x_RI, counts_E.tolist())
    return torch.cat([functional.linear(x, w) for x, w in zip(rows, weight_EOI.unbind(), strict=True)])


def _weigh(routed_NKD: Tensor, weight_NK: Tensor) -> Tensor:
    return (weight_NK.to(routed_NKD.dtype)[:, None, :] @ routed_NKD)[:, 0]


class _Task:
    """Work that is done once, early if there is something to wait for."""

    def __init__(self, work: Callable[[], Tensor] | None) -> None:
        self._work = work
        self._result: Tensor | None = None

    @property
    def done(self) -> bool:
        return self._work is None

    def result(self) -> Tensor | None:
        if self._work is not None:
            work, self._work = self._work, None
            self._result = work()
        return self._result


class _Rows(NamedTuple):
    """Rows that were taken from some slots of some tokens."""

    slot_R: Tensor
    """Which slot (token x S + slot) each row comes from."""
    place_NS: Tensor
    """The row of each slot; R where it has none."""


def _sort(key_NS: Tensor, num_rows: int) -> _Rows:
    """Take the `num_rows` slots with the smallest keys, by key, then by slot."""
    order = key_NS.flatten().argsort(stable=True)
    return _Rows(order[:num_rows], _inverse(order).clamp(max=num_rows).view_as(key_NS))


def _inverse(order_R: Tensor) -> Tensor:
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def _spread(x_ND: Tensor, rows: _Rows) -> Tensor:
    """Return the token of every row, [R, D]."""
    return _Spread.apply(x_ND, *rows)  # type: ignore[no-any-return, no-untyped-call]


def _collect(x_RD: Tensor, rows: _Rows) -> Tensor:
    """Return the row of every slot, [N, S, D]; zeros where it has none."""
    return _Collect.apply(x_RD, *rows)  # type: ignore[no-any-return, no-untyped-call]


def _permute(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    return _Permute.apply(x_RD, order_R, inverse_R)  # type: ignore[no-any-return, no-untyped-call]


def _by_slot(x_RD: Tensor, place_NS: Tensor) -> Tensor:
    if len(x_RD) < place_NS.numel():
        x_RD = torch.cat((x_RD, x_RD.new_zeros(1, *x_RD.shape[1:])))
    return x_RD[place_NS]


# The backward of plain indexing adds to rows in no fixed order on a GPU; these gather and then sum.


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, slot_R: Tensor, place_NS: Tensor) -> Tensor:
        ctx.save_for_backward(place_NS)
        return x_ND[slot_R // place_NS.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place_NS,) = ctx.saved_tensors
        return _by_slot(grads[0], place_NS).sum(1), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, slot_R: Tensor, place_NS: Tensor) -> Tensor:
        ctx.save_for_backward(slot_R)
        return _by_slot(x_RD, place_NS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_R,) = ctx.saved_tensors
        return grads[0].flatten(0, 1)[slot_R], None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD[order_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0][inverse_R], None, None


class _Journey:
    """An all-to-all under way, and the one that takes its gradient back."""

    def __init__(self, group: ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> None:
        self._group, self._send, self._receive = group, list(send), list(receive)
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def depart(self, x: Tensor, *, back: bool) -> Tensor:
        """Send, and return a token [0] that only says what comes first."""
        send, receive = (self._receive, self._send) if back else (self._send, self._receive)
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(out, x, receive, send, group=self._group, async_op=True)
        self._under_way = (work, x, out)  # x must live as long as it is read
        return x.new_empty(0)

    def arrive(self) -> Tensor:
        """Return what came."""
        assert self._under_way is not None
        work, _, out = self._under_way
        self._under_way = None
        work.wait()
        return out


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.depart(x, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.arrive(), None


class _Arrive(torch.autograd.Function):
    """Waits for what departed; in backward it departs, and what was done meanwhile is again."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.depart(grads[0], back=True), None
