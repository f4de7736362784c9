"""Mixture of experts: each token goes to the experts its router prefers; none is dropped."""

# Shapes: B batch, T tokens, N tokens of all rows (B x T), R routes (N x k, one a token and chosen expert),
# D model width, E experts, F width of one expert.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainsys.config import MoEConfig
from trainsys.models.layers import SwiGLU, swiglu


class Router(nn.Module):
    """Chooses `top_k` experts a token by softmax, in at least fp32."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.top_k = top_k

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities [N, E]; the chosen experts [N, k] and their weights [N, k], which sum to 1."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        probability_NE = functional.linear(x_ND.to(dtype), self.weight.to(dtype)).softmax(-1)
        weight_NK, expert_NK = probability_NE.topk(self.top_k, dim=-1)
        return probability_NE, expert_NK, weight_NK / weight_NK.sum(-1, keepdim=True)


class Experts(nn.Module):
    """The routed experts, stacked: `gate_up` [E, 2F, D] and `down` [E, D, F].

    Stacked, so that under ZeRO 3 every rank gathers the same parameters in the same order whatever its tokens
    chose, and an expert without tokens gets a gradient of zeros.
    """

    def __init__(self, dim: int, ffn_dim: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * ffn_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))
        self.row_splits = {"gate_up": (ffn_dim, ffn_dim)}

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Maps rows sorted by expert, `counts_E[e]` of them for expert e."""
        return _grouped_product(swiglu(_grouped_product(x_RD, self.gate_up, counts_E)), self.down, counts_E)


def _grouped_product(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix; rows are sorted by expert."""
    if x_RI.dtype == torch.bfloat16 and x_RI.shape[1] % 8 == weight_EOI.shape[1] % 8 == 0:
        # One kernel, for which the host need not know the counts; torch has it for bf16.
        return functional.grouped_mm(x_RI, weight_EOI.mT, offs=counts_E.cumsum(0).to(torch.int32))
    rows = torch.split(x_RI, counts_E.tolist())
    return torch.cat([functional.linear(x, w) for x, w in zip(rows, weight_EOI.unbind(), strict=True)])


class MoE(nn.Module):
    """Routed experts weighted by their router, plus shared experts, and the loss that balances the routes."""

    def __init__(self, config: MoEConfig, dim: int) -> None:
        super().__init__()
        self.balance_weight = config.balance_weight
        self.router = Router(dim, config.num_experts, config.top_k)
        self.experts = Experts(dim, config.ffn_dim, config.num_experts)
        # Experts that all see every token are one wider expert.
        self.shared = SwiGLU(dim, config.num_shared_experts * config.ffn_dim) if config.num_shared_experts else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The mapped tokens, and the weighted balance loss of these tokens (at least fp32)."""
        x_ND = x_BTD.flatten(0, 1)
        probability_NE, expert_NK, weight_NK = self.router(x_ND)
        expert_R = expert_NK.flatten()
        order_R = expert_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x_BTD.device))
        counts_E = expert_R.bincount(minlength=probability_NE.shape[1])
        sorted_RD: Tensor = _Dispatch.apply(x_ND, order_R, inverse_R)  # type: ignore[no-untyped-call]
        mapped_RD = self.experts(sorted_RD, counts_E)
        routed_RD: Tensor = _Restore.apply(mapped_RD, order_R, inverse_R)  # type: ignore[no-untyped-call]
        routed_NKD = routed_RD.view(*weight_NK.shape, -1)
        mapped_ND = (weight_NK.to(x_BTD.dtype)[:, None, :] @ routed_NKD)[:, 0]
        mapped_BTD = mapped_ND.view_as(x_BTD)
        if self.shared is not None:
            mapped_BTD = mapped_BTD + self.shared(x_BTD)
        return mapped_BTD, self.balance_weight * balance_loss(probability_NE, counts_E)


def balance_loss(probability_NE: Tensor, counts_E: Tensor) -> Tensor:
    """E x sum over experts of (share of routes x mean probability); 1 when balanced.

    Follows Switch Transformer (arXiv 2101.03961), eq. 4 to 6; differs: with k routes a token the shares are
    of all routes, so that they still sum to 1.
    """
    share_E = counts_E.to(probability_NE.dtype) / counts_E.sum()
    return len(counts_E) * (share_E * probability_NE.mean(0)).sum()


class _Dispatch(torch.autograd.Function):
    """Each token's row once a route, sorted by expert.

    The backward is a gather and a sum over a token's routes: deterministic on every device, unlike the
    scatter-add of plain indexing.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.num_tokens = len(x_ND)
        return x_ND[order_R // (len(order_R) // len(x_ND))]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return (
            grad_outputs[0][inverse_R].view(ctx.num_tokens, -1, grad_outputs[0].shape[-1]).sum(1),
            None,
            None,
        )


class _Restore(torch.autograd.Function):
    """Rows sorted by expert back in the order of the routes; the backward swaps the two orders."""

    @staticmethod
    def forward(ctx: Any, routed_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return routed_RD[inverse_R]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return grad_outputs[0][order_R], None, None
