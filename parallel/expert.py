"""Mixture of experts, and its experts spread over ranks.

Shapes: B sequences, T tokens of one, N tokens of this rank (B x T), D width, E experts, F width of one expert.

Where things are, for a mesh with `tensor` and `expert` axes: a layer's experts are spread over expert x tensor
ranks, E / (expert x tensor) whole ones each, and every one of these ranks routes tokens of its own. Tensor ranks share
the tokens of their data rank: with `sequence` they have their shares already, else the layer takes a share and gathers
the outcome. So nothing is computed or sent twice, and no expert is stored twice within a group.

What is summed where:

    parameter         complete after backward over      left to the engine: sum over
    experts.*         expert and tensor (all tokens     expert_data and context, the ranks that hold the same experts
                      that came here, from any rank)    (`expert_parameters`)
    router, shared    tensor                            replicate x shard and context, as every other parameter

    value             over
    loads for the     replicate, shard, context and tensor: all tokens of the micro-batch. Each rank returns its
    balance losses    tokens' share times the number of data ranks (replicate x shard), equal on tensor ranks: the sum
                      over context ranks and the mean over data ranks is the loss of one process, so is its gradient
    loads for biases  the same, once a step (`after_step`)
    capacity          the same, in the order of ranks: one process with the ranks' tokens in a row drops the same
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from parallel import collectives
from parallel.dispatch import Dispatcher, DispatchStats, grouped_product
from parallel.groups import MeshGroups
from parallel.mesh import Axis
from parallel.moe_config import Routing
from parallel.routing import Routes, balance_loss, choose, count, drop_over_capacity, moved_bias, z_loss
from parallel.shards import Shard, even_dim, shard_of, tag, whole_dim
from parallel.stacked import StackedExperts, check_known, stacked_experts

_AXES: tuple[Axis, ...] = ("expert", "tensor")


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The ranks that a layer of experts talks to; groups of one rank are no communication."""

    experts: ProcessGroup
    """Over which the experts are spread: expert x tensor."""
    tensor: ProcessGroup
    """Which share the tokens of a data rank."""
    tokens: ProcessGroup
    """Whose tokens make up a micro-batch: replicate x shard x context x tensor."""
    num_data: int
    """Replicate x shard."""

    @classmethod
    def of(cls, groups: MeshGroups) -> ExpertGroups:
        """Return this rank's groups; collective like `MeshGroups.get`."""
        return cls(
            groups.get(*_AXES),
            groups.get("tensor"),
            groups.get("replicate", "shard", "context", "tensor"),
            groups.mesh.data_size,
        )


class Router(nn.Module):
    """Chooses the experts of every token, in at least fp32.

    With balance=bias it has a buffer `bias` [E] of at least fp32, whatever the module is converted to, that is saved
    and equal on all ranks.
    """

    bias: Tensor | None
    load: Tensor

    def __init__(self, dim: int, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.num_experts, dim))
        self.tensor_group: ProcessGroup | None = None
        biases = torch.zeros(routing.num_experts, dtype=torch.float32, device="cpu")
        self.register_buffer("bias", biases if routing.balance == "bias" else None)
        # Routes to each expert since the last step; recomputation in backward counts them again, all alike.
        load = torch.zeros(routing.num_experts, dtype=torch.int64, device="cpu")
        self.register_buffer("load", load, persistent=False)

    def forward(self, x_ND: Tensor, valid_N: Tensor | None = None) -> tuple[Tensor, Routes]:
        """Return the logits [N, E] and the routes."""
        weight = self.weight if self.tensor_group is None else collectives.replicate(self.weight, self.tensor_group)
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        logits_NE = functional.linear(x_ND.to(dtype), weight.to(dtype))
        return logits_NE, choose(self.routing, logits_NE, self.bias, valid_N)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Convert as usual, but keep the dtype and the values of the buffers, which are not set anew afterwards."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            device = self.weight.device
            self._buffers[name] = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        return self


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
        gate, up = grouped_product(x_RD, self.gate_up, counts_E).chunk(2, dim=-1)
        return grouped_product(functional.silu(gate) * up, self.down, counts_E)


class MoE(nn.Module):
    """Routed experts weighted by their router, plus `shared` ones that see every token, and the balancing loss."""

    def __init__(self, dim: int, ffn_dim: int, routing: Routing, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.routing = routing
        self.router = Router(dim, routing)
        self.experts = Experts(dim, ffn_dim, routing.num_experts)
        self.shared = shared
        self.dispatcher = Dispatcher(routing.num_experts)
        self.groups: ExpertGroups | None = None
        self.sequence = False
        """Whether tensor ranks come with tokens of their own."""

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mapped tokens, and the weighted auxiliary loss of these tokens (a scalar of at least fp32).

        Tokens that are not valid go to no routed expert and count nowhere.
        """
        x_ND = x_BTD.flatten(0, -2)
        valid_N = None if valid_BT is None else valid_BT.flatten()
        shares_tokens = self.groups is not None and self.groups.tensor.size() > 1 and not self.sequence
        if not shares_tokens:
            mapped_ND, loss = self._map(x_ND, valid_N)
            return mapped_ND.view_as(x_BTD), loss
        assert self.groups is not None
        own_ND, own_valid_N = _own_tokens(x_ND, valid_N, self.groups.tensor)
        mapped_ND, loss = self._map(own_ND, own_valid_N)
        return collectives.gather(mapped_ND, 0, self.groups.tensor)[: len(x_ND)].view_as(x_BTD), loss

    def _map(self, x_ND: Tensor, valid_N: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_NE, routes = self.router(x_ND, valid_N)
        expert_NK, loss = self._limit(logits_NE, routes, valid_N)
        shared = self.shared
        mapped_ND, shared_ND = self.dispatcher(
            x_ND,
            expert_NK,
            routes.weight_NK,
            self.experts,
            None if shared is None else lambda: shared(x_ND),
            dropless=valid_N is None and not self.routing.capacity_factor,
        )
        return (mapped_ND if shared_ND is None else mapped_ND + shared_ND), loss

    @property
    def _balances(self) -> bool:
        return self.routing.balance == "loss" and self.routing.balance_weight > 0

    def _limit(self, logits_NE: Tensor, routes: Routes, valid_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the experts of every token within their capacity, and the weighted auxiliary loss."""
        routing, expert_NK = self.routing, routes.expert_NK
        counts_E = count(expert_NK, routing.num_experts)
        if routing.balance == "bias" and self.training and torch.is_grad_enabled():
            self.router.load += counts_E
        loss = logits_NE.new_zeros(())
        if not (self._balances or routing.z_weight or routing.capacity_factor):
            return expert_NK, loss
        total_E, before_E = _over_ranks(counts_E, self.groups, order_matters=routing.capacity_factor > 0)
        num_tokens = total_E.sum() // routing.top_k
        if self._balances:
            loss = loss + routing.balance_weight * balance_loss(routes.probability_NE, total_E, num_tokens)
        if routing.z_weight:
            loss = loss + routing.z_weight * z_loss(logits_NE, num_tokens, valid_N)
        if self.groups is not None:
            loss = collectives.sum_ranks(loss * self.groups.num_data, self.groups.tensor)
        if routing.capacity_factor:
            expert_NK = drop_over_capacity(expert_NK, total_E, before_E, routing.capacity_factor)
        return expert_NK, loss


def parallelize(
    model: nn.Module, groups: ExpertGroups, *, sequence: bool = False, node_size: int = 0, overlap: bool = False
) -> None:
    """Keep this rank's experts in every `MoE` of the model (or the model itself) and let it talk to the others.

    Also without expert or tensor ranks, so that loads are those of all data and context ranks. Names of parameters
    stay; what is cut carries its `Shard`. Works on the meta device too. `sequence` says that tensor ranks come with
    shares [B, T / tensor, D] of the tokens. `node_size` ranks that share experts make a node to which a token is sent
    once. `overlap` computes shared experts while tokens are on their way.

    Raises:
        ValueError: the ranks cannot share the experts evenly, or nodes the ranks; experts are to be spread and the
            model has none, or of a kind that is not known.
    """
    _parallelize_stacked(model, groups, node_size)
    for layer in _layers(model):
        layer.dispatcher = Dispatcher(layer.routing.num_experts, groups.experts, node_size, overlap)
        layer.groups, layer.sequence = groups, sequence
        layer.router.tensor_group = groups.tensor
        for name in ("gate_up", "down"):
            setattr(layer.experts, name, own_experts(getattr(layer.experts, name), groups.experts))
        if layer.shared is not None and groups.tensor.size() > 1:
            _sum_gradients(layer.shared, groups.tensor)


def _parallelize_stacked(model: nn.Module, groups: ExpertGroups, node_size: int) -> None:
    """Do the same for the experts of a Hugging Face model, which are left alone where none are to be spread."""
    num_ranks = groups.experts.size() // groups.tensor.size()
    found = list(stacked_experts(model))
    if num_ranks > 1 and not found and not any(True for _ in _layers(model)):
        raise ValueError(f"parallel.expert: {num_ranks}: no experts are known in {type(model).__name__}; allowed: 1")
    if groups.experts.size() == 1:
        return
    if found and groups.tensor.size() > 1:
        raise ValueError("parallel.tensor: with experts of a Hugging Face model; allowed: 1")
    for parent, name, experts in found:
        check_known(experts)
        parameters = dict(experts.named_parameters())
        dispatcher = Dispatcher(len(parameters["down_proj"]), groups.experts, node_size)
        for key, parameter in parameters.items():
            setattr(experts, key, own_experts(parameter, groups.experts))
        setattr(parent, name, StackedExperts(experts, dispatcher))


def has_experts(model: nn.Module) -> bool:
    """Return whether there is anything for `parallelize` to do."""
    return any(True for _ in _layers(model)) or any(True for _ in stacked_experts(model))


def own_experts(parameter: nn.Parameter, group: ProcessGroup) -> nn.Parameter:
    """Return this rank's part of experts stacked along the first dimension, tagged, in memory of its own."""
    first, *others = parameter.shape
    dim = even_dim(first, group.rank(), group.size())
    shard = Shard((dim, *map(whole_dim, others)), _AXES if group.size() > 1 else ())
    with torch.no_grad():
        local = shard.take(parameter.detach())
    return tag(nn.Parameter(local, requires_grad=parameter.requires_grad), shard)


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name of which ranks of an expert group hold different parts.

    Their gradients are to be summed over the ranks that hold the same experts: expert_data and context.
    """
    return {name: parameter for name, parameter in model.named_parameters() if "expert" in shard_of(parameter).axes}


@torch.no_grad()
def after_step(model: nn.Module) -> None:
    """Move the biases of all routers by the loads since the last call (balance=bias); once an optimizer step.

    Every rank must call: the loads of all layers are summed in one all-reduce over the ranks of the tokens.
    """
    layers = [layer for layer in _layers(model) if layer.router.bias is not None]
    if not layers:
        return
    loads_LE = [layer.router.load for layer in layers]
    flat = torch.cat(loads_LE)
    groups = layers[0].groups
    if groups is not None and groups.tokens.size() > 1:
        dist.all_reduce(flat, group=groups.tokens)
    for layer, load_E in zip(layers, torch.split(flat, [len(load) for load in loads_LE]), strict=True):
        bias = layer.router.bias
        assert bias is not None
        bias.copy_(moved_bias(bias, load_E, layer.routing.bias_rate))
        layer.router.load.zero_()


def dispatch_stats(model: nn.Module) -> DispatchStats:
    """Return what all layers of the model sent from this rank since they were made."""
    total = DispatchStats()
    for layer in model.modules():
        if isinstance(layer, MoE | StackedExperts):
            for name in DispatchStats.__slots__:
                setattr(total, name, getattr(total, name) + getattr(layer.dispatcher.stats, name))
    return total


class WholeLinear(nn.Module):
    """A product with a matrix that all tensor ranks have, each for tokens of its own: gradients are summed."""

    def __init__(self, linear: nn.Linear, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = linear.weight
        self.group = group
        self.row_splits = getattr(linear, "row_splits", {})

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension."""
        return functional.linear(x, collectives.replicate(self.weight, self.group))


def _sum_gradients(shared: nn.Module, group: ProcessGroup) -> None:
    """Let the gradients of shared experts be those of all tensor ranks' tokens."""
    for parent in list(shared.modules()):
        for name, child in list(parent.named_children()):
            if type(child).forward is nn.Linear.forward and child.bias is None:
                assert isinstance(child, nn.Linear)
                setattr(parent, name, WholeLinear(child, group))
            elif any(True for _ in child.parameters(recurse=False)):
                what = f"shared experts with a {type(child).__name__} are not known"
                raise ValueError(f"parallel.expert: {what}; allowed: linear layers without bias")


def _layers(model: nn.Module) -> Iterator[MoE]:
    return (module for module in model.modules() if isinstance(module, MoE))


def _own_tokens(x_ND: Tensor, valid_N: Tensor | None, group: ProcessGroup) -> tuple[Tensor, Tensor | None]:
    """Return this rank's share of tokens that all ranks of the group have; padding is not valid."""
    padding = -len(x_ND) % group.size()
    if padding:
        if valid_N is None:
            valid_N = torch.ones(len(x_ND), dtype=torch.bool, device=x_ND.device)
        x_ND, valid_N = functional.pad(x_ND, (0, 0, 0, padding)), functional.pad(valid_N, (0, padding))
    own_valid_N = None if valid_N is None else collectives.own_part(valid_N, 0, group)
    return collectives.split(x_ND, 0, group), own_valid_N


def _over_ranks(counts_E: Tensor, groups: ExpertGroups | None, *, order_matters: bool) -> tuple[Tensor, Tensor]:
    """Return the counts of all ranks, and of those before this one (zeros unless their order matters)."""
    if groups is None or groups.tokens.size() == 1:
        return counts_E, torch.zeros_like(counts_E)
    if not order_matters:
        total_E = counts_E.clone()
        dist.all_reduce(total_E, group=groups.tokens)
        return total_E, torch.zeros_like(counts_E)
    counts_PE = collectives.all_gather(counts_E[None], 0, groups.tokens)
    return counts_PE.sum(0), counts_PE[: groups.tokens.rank()].sum(0)
