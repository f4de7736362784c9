"""Experts spread over ranks against one process with all tokens, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from parallel.config import ParallelConfig
from parallel.dispatch import DispatchStats
from parallel.expert import (
    ExpertGroups,
    MoE,
    after_step,
    dispatch_stats,
    expert_parameters,
    parallelize,
)
from parallel.groups import MeshGroups
from parallel.mesh import Mesh
from parallel.moe_config import Routing
from parallel.shards import gather_state, shards_of
from tests.ranks import run_ranks

DIM, FFN = 6, 5
PLAIN = Routing(num_experts=8, top_k=3, balance_weight=0.3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is compared."""

    degrees: dict[str, int]
    routing: Routing = PLAIN
    rows: tuple[int, ...] = (2, 2)
    """Sequences of each data rank."""
    length: int = 6
    shared: bool = True
    sequence: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    """Whether some tokens are padding."""
    steps: int = 3

    @property
    def mesh(self) -> Mesh:
        config = ParallelConfig(**self.degrees)
        return Mesh(config, config.replicate * config.shard * config.context * config.tensor)


class Shared(nn.Module):
    """Two layers that every token goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, FFN, bias=False)
        self.down = nn.Linear(FFN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.up(x)))
        return y


def _layer(case: Case) -> MoE:
    layer = MoE(DIM, FFN, case.routing, Shared() if case.shared else None).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer


def _tokens(case: Case, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, what outputs are multiplied with for the loss, and which tokens are valid, of all data ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (sum(case.rows), case.length, DIM)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    # A common direction, so that loads are uneven.
    x = x + torch.linspace(-1, 1, DIM, dtype=torch.float64)
    valid = torch.rand(shape[:2], generator=generator) < 0.7 if case.masked else None
    return x, weight, valid


@dataclass
class Outcome:
    """What a run leaves, of one rank or of all."""

    outputs: list[Tensor]
    input_grads: list[Tensor]
    losses: list[float]
    grads: dict[str, Tensor]
    """Of the first step."""
    state: dict[str, Tensor]
    buffers: dict[str, Tensor]
    stats: DispatchStats
    shards: dict[str, Any] = field(default_factory=dict)


def _train(layer: MoE, case: Case, groups: MeshGroups | None) -> Outcome:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    outcome = Outcome([], [], [], {}, {}, {}, DispatchStats(), dict(shards_of(layer)))
    for step in range(case.steps):
        x, weight, valid = (None if t is None else _own(t, case, groups) for t in _tokens(case, step))
        assert x is not None
        assert weight is not None
        x = x.clone().requires_grad_()
        y, auxiliary = layer(x, valid)
        own = (y * weight).sum()
        # Without `sequence` all tensor ranks compute the loss alike.
        (own + auxiliary / (case.mesh.data_size if groups else 1)).backward()
        assert x.grad is not None
        losses = torch.stack((own.detach(), auxiliary.detach()))
        if groups is not None:
            losses[1] /= groups.mesh.data_size
            if case.sequence:
                dist.all_reduce(losses[:1], group=groups.get("tensor"))
            dist.all_reduce(losses, group=groups.get("replicate", "shard", "context"))
            _sum_gradients(layer, groups)
        if step == 0:
            outcome.grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        outcome.outputs.append(y.detach())
        outcome.input_grads.append(x.grad)
        outcome.losses.append(float(losses.sum()))
        optimizer.step()
        optimizer.zero_grad()
        after_step(layer)
    outcome.state = {n: p.detach() for n, p in layer.named_parameters()}
    outcome.buffers = dict(layer.named_buffers())
    outcome.stats = dispatch_stats(layer)
    return outcome


def _own(tensor: Tensor, case: Case, groups: MeshGroups | None) -> Tensor:
    if groups is None:
        return tensor
    at = groups.mesh.coordinates(groups.rank)
    own = tensor.split(list(case.rows))[groups.mesh.data_rank(groups.rank)]
    own = own.chunk(groups.mesh.size("context"), 1)[at.context]
    return own.chunk(groups.mesh.size("tensor"), 1)[at.tensor] if case.sequence else own


def _sum_gradients(layer: MoE, groups: MeshGroups) -> None:
    """What the engine does."""
    experts = expert_parameters(layer)
    for name, parameter in layer.named_parameters():
        axes = ("expert_data", "context") if name in experts else ("replicate", "shard", "context")
        assert parameter.grad is not None, name
        dist.all_reduce(parameter.grad, group=groups.get(*axes))


def _one_rank(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Outcome]:
    outcomes = {}
    for name, case in cases.items():
        with MeshGroups(case.mesh) as groups:
            layer = _layer(case)
            parallelize(layer, ExpertGroups.of(groups), sequence=case.sequence, **case.options)
            outcomes[name] = _train(layer, case, groups)
    return outcomes


def _assemble(ranks: list[Outcome], case: Case, what: str, step: int) -> Tensor:
    """All ranks' tokens in the order of one process."""
    mesh, parts = case.mesh, []
    for data in range(mesh.data_size):
        members = [r for r in range(mesh.world_size) if mesh.data_rank(r) == data]
        if not case.sequence:
            members = [r for r in members if mesh.coordinates(r).tensor == 0]
        parts.append(torch.cat([getattr(ranks[r], what)[step] for r in members], 1))
    return torch.cat(parts)


def _close(ours: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=lambda message: f"{what}: {message}")


def _compare(ranks: list[Outcome], expected: Outcome, case: Case) -> None:
    for step in range(case.steps):
        _close(_assemble(ranks, case, "outputs", step), expected.outputs[step], f"outputs of step {step}")
        _close(_assemble(ranks, case, "input_grads", step), expected.input_grads[step], f"input gradients, {step}")
    for outcome in ranks:
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-12, abs=1e-12)
    for what in ("grads", "state"):
        found = gather_state([(outcome.shards, getattr(outcome, what)) for outcome in ranks])
        assert found.keys() == getattr(expected, what).keys()
        for name, tensor in getattr(expected, what).items():
            _close(found[name], tensor, f"{what} of {name}")
        # Whatever several ranks hold is equal on them.
        for name, shard in expected.shards.items():
            assert shard.axes == ()
            for outcome in ranks:
                mine = outcome.shards[name].take(found[name])
                assert torch.equal(getattr(outcome, what)[name], mine), f"{what} of {name} differs between ranks"
    for outcome in ranks:
        for name, tensor in expected.buffers.items():
            assert torch.equal(outcome.buffers[name], tensor), name


def _check(world_size: int, cases: dict[str, Case]) -> dict[str, list[Outcome]]:
    per_rank = run_ranks(_one_rank, world_size, cases, timeout_s=120)
    ranks = {name: [outcomes[name] for outcomes in per_rank] for name in cases}
    for name, case in cases.items():
        expected = _train(_layer(case), case, None)
        try:
            _compare(ranks[name], expected, case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return ranks


def test_two_ranks_with_experts_equal_one_process() -> None:
    two = {"replicate": 2, "expert": 2}
    bias = Routing(num_experts=8, top_k=3, score="sigmoid", scaling=2.5, balance="bias", bias_rate=0.05)
    _check(
        2,
        {
            "dropless": Case(degrees=two, steps=10),
            "z-loss": Case(degrees=two, routing=replace(PLAIN, z_weight=0.1)),
            "capacity": Case(degrees=two, routing=replace(PLAIN, capacity_factor=0.8), rows=(1, 3)),
            "bias": Case(degrees=two, routing=bias, steps=10),
            "no token for most experts": Case(
                degrees=two, routing=replace(PLAIN, top_k=1), rows=(1, 1), length=1, shared=False
            ),
            "no token on a rank": Case(degrees=two, rows=(0, 3)),
            "capacity, no token on a rank": Case(
                degrees=two, routing=replace(PLAIN, capacity_factor=0.5), rows=(3, 0), shared=False
            ),
            "padding": Case(degrees=two, masked=True, routing=replace(PLAIN, z_weight=0.1, capacity_factor=1.0)),
            "overlap": Case(degrees=two, options={"overlap": True}),
            "experts on every rank": Case(degrees={"replicate": 2}, routing=replace(bias, balance="loss")),
        },
    )


def test_four_ranks_of_every_grid_equal_one_process() -> None:
    bias = replace(PLAIN, score="sigmoid", balance="bias", bias_rate=0.05)
    tensor = {"replicate": 2, "expert": 2, "tensor": 2}
    _check(
        4,
        {
            "expert": Case(degrees={"replicate": 2, "shard": 2, "expert": 4}, rows=(1, 0, 2, 1), steps=10),
            "expert x data": Case(degrees={"replicate": 4, "expert": 2}, rows=(1, 2, 1, 1), routing=bias, steps=10),
            "expert x context": Case(degrees={"shard": 2, "context": 2, "expert": 2}),
            "expert x tensor": Case(
                degrees=tensor,
                rows=(1, 2),
                length=5,
                steps=10,
                routing=replace(PLAIN, z_weight=0.1, capacity_factor=0.8),
            ),
            "expert x tensor, sequence": Case(
                degrees=tensor, sequence=True, steps=10, routing=replace(PLAIN, z_weight=0.1)
            ),
            "tensor, sequence, capacity": Case(
                degrees={"replicate": 2, "tensor": 2},
                rows=(1, 1),
                sequence=True,
                routing=replace(bias, capacity_factor=0.9),
                options={"overlap": True},
            ),
        },
    )


def test_a_token_goes_once_to_a_node_and_the_outcome_is_the_same() -> None:
    four = {"replicate": 4, "expert": 4}
    limited = replace(PLAIN, num_groups=2, top_groups=1)
    cases = {
        "anywhere": Case(degrees=four, rows=(2, 1, 1, 2)),
        "by node": Case(degrees=four, rows=(2, 1, 1, 2), options={"node_size": 2}),
        "limited": Case(degrees=four, rows=(2, 0, 1, 2), routing=limited),
        "limited, by node, capacity, overlapped": Case(
            degrees=four,
            rows=(2, 0, 1, 2),
            routing=replace(limited, capacity_factor=0.9),
            options={"node_size": 2, "overlap": True},
        ),
        "nodes of one rank": Case(degrees=four, rows=(1, 1, 1, 1), options={"node_size": 1}),
    }
    ranks = _check(4, cases)
    row_bytes = DIM * 8
    for name, case in cases.items():
        for outcome, rows in zip(ranks[name], case.rows, strict=True):
            stats = outcome.stats
            assert stats.tokens == case.steps * rows * case.length
            assert stats.routes <= stats.tokens * case.routing.top_k
            if case.options:
                # A token has experts on at most top_groups nodes, of which it may be at home on one.
                most = stats.tokens * case.routing.top_groups if case.routing.num_groups > 1 else None
                assert stats.between_bytes <= stats.between_bytes_per_route
                assert most is None or stats.between_bytes <= most * row_bytes
        sent, per_route = (
            sum(getattr(outcome.stats, what) for outcome in ranks[name])
            for what in ("between_bytes", "between_bytes_per_route")
        )
        assert (sent < per_route) == bool(case.options), name
        dropped = sum(o.stats.tokens * case.routing.top_k - o.stats.routes for o in ranks[name])
        assert (dropped > 0) == (case.routing.capacity_factor > 0), name


def _without_memory(rank: int, world_size: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Shapes and shards of a layer on the meta device, and of one with memory."""
    found = []
    with MeshGroups(Mesh(ParallelConfig(replicate=2, expert=2), world_size)) as groups:
        for device in ("meta", "cpu"):
            with torch.device(device):
                layer = MoE(DIM, FFN, PLAIN, Shared())
            parallelize(layer, ExpertGroups.of(groups))
            assert all(parameter.device.type == device for parameter in layer.parameters())
            found.append(({n: tuple(p.shape) for n, p in layer.named_parameters()}, dict(shards_of(layer))))
    return found


def test_experts_without_memory_are_shared_out_alike_and_keep_their_names() -> None:
    with torch.device("meta"):
        whole = {name: tuple(p.shape) for name, p in MoE(DIM, FFN, PLAIN, Shared()).named_parameters()}
    for meta, cpu in run_ranks(_without_memory, 2):
        assert meta == cpu
        shapes, shards = meta
        assert {name: shard.global_shape for name, shard in shards.items()} == whole
        assert shapes["experts.gate_up"] == (4, 2 * FFN, DIM)
        assert shards["experts.down"].axes == ("expert", "tensor")
        assert [name for name in whole if shards[name].axes] == ["experts.gate_up", "experts.down"]


def _uneven(rank: int, world_size: int) -> list[str]:
    messages = []
    with MeshGroups(Mesh(ParallelConfig(replicate=2, expert=2), world_size)) as groups:
        for num_experts, options in ((5, {}), (4, {"node_size": 3})):
            layer = MoE(DIM, FFN, Routing(num_experts=num_experts, top_k=1))
            with pytest.raises(ValueError, match="parallel") as caught:
                parallelize(layer, ExpertGroups.of(groups), **options)
            messages.append(str(caught.value))
    return messages


def test_ranks_that_cannot_share_the_experts_evenly_are_refused() -> None:
    for messages in run_ranks(_uneven, 2):
        assert messages == [
            "parallel.expert: 2 ranks cannot share 5 experts evenly; allowed: a divisor of the number of experts",
            "parallel.expert: node_size: nodes of 3 ranks do not divide the 2 that share the experts; "
            "allowed: a divisor, or 0",
        ]
