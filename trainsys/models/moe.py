"""Mixture of experts: each token goes to the experts its router prefers."""

from __future__ import annotations

from parallel import expert
from parallel.expert import Experts, Router
from parallel.moe_config import Routing
from parallel.routing import balance_loss
from trainsys.config import MoEConfig
from trainsys.models.layers import SwiGLU

__all__ = ["Experts", "MoE", "Router", "balance_loss", "routing_of"]


class MoE(expert.MoE):
    """Routed experts weighted by their router, plus shared experts, and the loss that balances the routes."""

    def __init__(self, config: MoEConfig, dim: int) -> None:
        # Experts that all see every token are one wider expert.
        shared = SwiGLU(dim, config.num_shared_experts * config.ffn_dim) if config.num_shared_experts else None
        super().__init__(dim, config.ffn_dim, routing_of(config), shared)


def routing_of(config: MoEConfig) -> Routing:
    """How the tokens of a configuration choose their experts."""
    return Routing(
        num_experts=config.num_experts,
        top_k=config.top_k,
        score=config.score,
        scaling=config.routed_scaling,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        capacity_factor=config.capacity_factor,
        balance=config.balance,
        balance_weight=config.balance_weight,
        bias_rate=config.bias_rate,
        z_weight=config.z_weight,
    )
