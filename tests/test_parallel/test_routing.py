"""Routing against the same rules written token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.moe_config import Routing
from parallel.routing import (
    balance_loss,
    choose,
    count,
    drop_over_capacity,
    moved_bias,
    sequence_balance_loss,
    within_groups,
    z_loss,
)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, groups))
    return Routing(
        num_experts=groups * size,
        top_k=draw(st.integers(1, top_groups * size)),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        scaling=draw(st.sampled_from([1.0, 2.5])),
        num_groups=groups,
        top_groups=top_groups,
    )


def _logits(num_tokens: int, routing: Routing, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, routing.num_experts, generator=generator, dtype=torch.float64)


def _expected(routing: Routing, logits: list[float], bias: list[float]) -> tuple[list[int], list[float]]:
    if routing.score == "softmax":
        total = sum(map(math.exp, logits))
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    preference = [s + b for s, b in zip(scores, bias, strict=True)]
    size = routing.num_experts // routing.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(routing.num_groups)]
    groups.sort(key=lambda group: -sum(sorted((preference[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: routing.top_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -preference[e])[: routing.top_k]
    total = sum(scores[e] for e in chosen)
    return chosen, [routing.scaling * scores[e] / total for e in chosen]


@given(routing=routings(), num_tokens=st.integers(0, 5), seed=st.integers(0, 999), biased=st.booleans())
@settings(deadline=None, max_examples=80)
def test_a_token_goes_to_the_best_experts_of_its_best_groups(
    routing: Routing, num_tokens: int, seed: int, biased: bool
) -> None:
    logits = _logits(num_tokens, routing, seed)
    bias = torch.linspace(-0.5, 0.5, routing.num_experts) * biased
    routes = choose(routing, logits, bias if biased else None)
    assert routes.expert_NK.shape == routes.weight_NK.shape == (num_tokens, routing.top_k)
    for token in range(num_tokens):
        experts, weights = _expected(routing, logits[token].tolist(), bias.double().tolist())
        assert routes.expert_NK[token].tolist() == experts
        assert routes.weight_NK[token].tolist() == pytest.approx(weights, rel=1e-12)
        assert float(routes.probability_NE[token].sum()) == pytest.approx(1)


def test_a_bias_changes_the_choice_and_no_weight() -> None:
    routing = Routing(num_experts=4, top_k=2, score="sigmoid")
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    plain, biased = (choose(routing, logits, torch.tensor(b)) for b in ([0.0] * 4, [-9.0, 0, 0, 0]))
    assert plain.expert_NK.tolist() == [[0, 1]]
    assert biased.expert_NK.tolist() == [[1, 2]]
    scores = logits[0].sigmoid()
    assert torch.allclose(biased.weight_NK[0], scores[1:3] / scores[1:3].sum())
    (grad,) = torch.autograd.grad(biased.weight_NK[0, 0], logits)
    assert grad[0].count_nonzero() == 2


def test_padding_goes_nowhere_and_counts_nowhere() -> None:
    routing = Routing(num_experts=3, top_k=2)
    logits = _logits(5, routing, 0)
    valid = torch.tensor([True, False, True, True, False])
    routes, of_valid = choose(routing, logits, valid_N=valid), choose(routing, logits[valid])
    assert (routes.expert_NK[~valid] == 3).all()
    assert routes.weight_NK[~valid].abs().max() == 0
    assert torch.equal(routes.expert_NK[valid], of_valid.expert_NK)
    counts = count(routes.expert_NK, 3)
    assert counts.sum() == 6
    ours = balance_loss(routes.probability_NE, counts, torch.tensor(3))
    assert torch.allclose(ours, balance_loss(of_valid.probability_NE, counts), rtol=1e-14)
    ours = z_loss(logits, torch.tensor(3), valid)
    assert torch.allclose(ours, z_loss(logits[valid], torch.tensor(3)), rtol=1e-14)


@given(
    routing=routings(),
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    factor=st.sampled_from([0.3, 0.5, 1.0, 1.25, 9.0]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=80)
def test_full_experts_drop_the_routes_that_come_last_over_all_ranks(
    routing: Routing, rows: list[int], factor: float, seed: int
) -> None:
    """Each rank's share, dropped with the counts of the others, is that of one process."""
    experts = choose(routing, _logits(sum(rows), routing, seed)).expert_NK
    total = count(experts, routing.num_experts)
    capacity = math.ceil(factor * experts.numel() / routing.num_experts)
    taken, expected = [0] * routing.num_experts, []
    for e in experts.flatten().tolist():
        taken[e] += 1
        expected.append(e if taken[e] <= capacity else routing.num_experts)
    before, kept = torch.zeros_like(total), []
    for own in experts.split(rows):
        kept.append(drop_over_capacity(own, total, before, factor))
        before = before + count(own, routing.num_experts)
    assert torch.cat(kept).flatten().tolist() == expected
    if factor > routing.num_experts:
        assert torch.equal(torch.cat(kept), experts)


@given(routing=routings(), rows=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_the_ranks_shares_of_a_loss_sum_to_that_of_all_tokens(routing: Routing, rows: list[int], seed: int) -> None:
    logits = _logits(sum(rows), routing, seed)
    routes = choose(routing, logits)
    counts, num_tokens = count(routes.expert_NK, routing.num_experts), torch.tensor(sum(rows))
    shares = [balance_loss(own, counts, num_tokens) for own in routes.probability_NE.split(rows)]
    z_shares = [z_loss(own, num_tokens) for own in logits.split(rows)]
    if sum(rows):
        assert float(sum(shares)) == pytest.approx(float(balance_loss(routes.probability_NE, counts)), rel=1e-12)
        assert float(sum(z_shares)) == pytest.approx(float(logits.logsumexp(-1).square().mean()), rel=1e-12)
    else:
        assert float(sum(shares)) == float(sum(z_shares)) == 0


def test_the_sequence_wise_loss_is_the_mean_of_each_sequences_own() -> None:
    routing = Routing(num_experts=4, top_k=2)
    routes = choose(routing, _logits(6, routing, 3))
    own = [
        balance_loss(probability, count(experts, 4))
        for probability, experts in zip(routes.probability_NE.split(3), routes.expert_NK.split(3), strict=True)
    ]
    ours = sequence_balance_loss(routes.probability_NE.view(2, 3, 4), routes.expert_NK.view(2, 3, 2))
    assert torch.allclose(ours, torch.stack(own).mean(), rtol=1e-14)


def test_a_bias_moves_towards_an_even_load_and_evens_it() -> None:
    assert moved_bias(torch.zeros(3), torch.tensor([4, 2, 3]), 0.1).tolist() == pytest.approx([-0.1, 0.1, 0])
    routing = Routing(num_experts=8, top_k=2, score="sigmoid", balance="bias")
    logits = _logits(512, routing, 0) * 0.3 + torch.linspace(-1, 1, 8)
    bias, spread = torch.zeros(8), []
    for _ in range(200):
        counts = count(choose(routing, logits, bias).expert_NK, 8)
        spread.append(float(counts.max() * 8 / counts.sum()))
        bias = moved_bias(bias, counts, 0.01)
    assert spread[0] > 2
    assert spread[-1] < 1.2


def test_groups_are_worth_their_two_best() -> None:
    preference = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.0, 0.6, 0.1, 0.1]])
    within = within_groups(preference, 3, 1)
    assert within.isfinite()[0].tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_sizes_that_do_not_fit_are_all_named() -> None:
    with pytest.raises(ValueError, match="num_groups: 3 does not divide num_experts \\(4\\)") as caught:
        Routing(num_experts=4, top_k=5, num_groups=3, z_weight=-1)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["num_groups", "top_k", "z_weight"]
    with pytest.raises(ValueError, match="top_groups: 1 of the groups have 2 experts, fewer than top_k"):
        Routing(num_experts=4, top_k=3, num_groups=2)
    fitting = Routing(num_experts=4, top_k=2, num_groups=2)
    with pytest.raises(ValueError, match="top_groups: 3 is out of range; allowed: 1 to num_groups \\(2\\)"):
        replace(fitting, top_groups=3)
