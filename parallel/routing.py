"""Which experts each token goes to, and what keeps their loads even. Pure functions of tensors.

Shapes: N tokens, E experts, K experts a token goes to, G groups of experts (the experts of one node). A route is one
token on its way to one expert. A route to expert number E goes nowhere: its token is padding, or the expert was full.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from parallel.moe_config import Routing


class Routes(NamedTuple):
    """Where the tokens go."""

    expert_NK: Tensor
    """Chosen experts; E where a route goes nowhere."""
    weight_NK: Tensor
    """What each expert's output is multiplied with; of the logits' dtype."""
    probability_NE: Tensor
    """Scores of all experts, which sum to 1 for a token and to 0 for padding."""


def choose(routing: Routing, logits_NE: Tensor, bias_E: Tensor | None = None, valid_N: Tensor | None = None) -> Routes:
    """Return the routes of every token; those of tokens that are not valid go nowhere.

    Follows DeepSeek-V3 (arXiv 2412.19437), eq. 12 to 16: `bias_E` counts in the choice and not in the weights.
    Equal scores fall to whichever expert `torch.topk` takes.
    """
    if routing.score == "softmax":
        score_NE = probability_NE = logits_NE.softmax(-1)
    else:
        score_NE = logits_NE.sigmoid()
        probability_NE = score_NE / score_NE.sum(-1, keepdim=True)
    if bias_E is None and routing.top_groups == routing.num_groups:
        chosen_NK, expert_NK = score_NE.topk(routing.top_k, dim=-1)
    else:
        preference_NE = score_NE.detach() if bias_E is None else score_NE.detach() + bias_E.to(score_NE.dtype)
        expert_NK = within_groups(preference_NE, routing.num_groups, routing.top_groups).topk(routing.top_k, dim=-1)[1]
        chosen_NK = score_NE.gather(-1, expert_NK)
    weight_NK = chosen_NK / chosen_NK.sum(-1, keepdim=True)
    if routing.scaling != 1:
        weight_NK = weight_NK * routing.scaling
    if valid_N is not None:
        expert_NK = expert_NK.masked_fill(~valid_N[:, None], routing.num_experts)
        weight_NK, probability_NE = weight_NK * valid_N[:, None], probability_NE * valid_N[:, None]
    return Routes(expert_NK, weight_NK, probability_NE)


def within_groups(preference_NE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """Return the preferences with all outside of each token's best groups at minus infinity.

    A group is worth the sum of its two best experts.
    """
    if top_groups == num_groups:
        return preference_NE
    num_tokens, num_experts = preference_NE.shape
    preference_NGI = preference_NE.view(num_tokens, num_groups, num_experts // num_groups)
    worth_NG = preference_NGI.topk(min(2, preference_NGI.shape[-1]), dim=-1)[0].sum(-1)
    best_NM = worth_NG.topk(top_groups, dim=-1)[1]
    outside_NG = torch.ones_like(worth_NG, dtype=torch.bool).scatter(-1, best_NM, value=False)
    return preference_NGI.masked_fill(outside_NG[..., None], -math.inf).flatten(-2)


def count(expert_NK: Tensor, num_experts: int) -> Tensor:
    """Return the routes to each expert, [E] of int64; the host does not wait for it."""
    flat_R = expert_NK.flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_R.device)
    return counts.scatter_add_(0, flat_R, torch.ones_like(flat_R))[:num_experts]


def drop_over_capacity(expert_NK: Tensor, counts_E: Tensor, before_E: Tensor, capacity_factor: float) -> Tensor:
    """Return the routes with those to full experts going nowhere.

    An expert takes the first ceil(factor x routes of all ranks / E) routes in their order: rank by rank, token by
    token, a token's best expert first. `counts_E` are the chosen routes of all ranks, `before_E` those of the ranks
    before this one.
    """
    num_experts = len(counts_E)
    capacity = (counts_E.sum() * capacity_factor / num_experts).ceil().to(torch.int64)
    flat_R = expert_NK.flatten()
    order_R = flat_R.argsort(stable=True)
    sorted_R = flat_R[order_R]
    own_E = count(expert_NK, num_experts)
    # How many routes of this rank lie before an expert's first; the last entry is for those that go nowhere.
    starts = functional.pad(own_E.cumsum(0), (1, 0))
    place_R = torch.arange(len(flat_R), device=flat_R.device) - starts[sorted_R]
    full_R = place_R + functional.pad(before_E, (0, 1))[sorted_R] >= capacity
    return flat_R.scatter(0, order_R, sorted_R.masked_fill(full_R, num_experts)).view_as(expert_NK)


def balance_loss(probability_NE: Tensor, counts_E: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """Return E x sum over experts of (share of routes x mean probability); 1 when balanced.

    Follows Switch Transformer (arXiv 2101.03961), eq. 4 to 6; differs: with k routes a token the shares are of all
    routes, so that they still sum to 1. With the counts and number of tokens of all ranks the sum over the ranks is
    the loss of all tokens: the shares are constants, and the mean probability is a sum.
    """
    total = probability_NE.shape[0] if num_tokens is None else num_tokens.clamp(min=1)
    share_E = counts_E.to(probability_NE.dtype) / counts_E.sum().clamp(min=1)
    return len(counts_E) * (share_E * (probability_NE.sum(0) / total)).sum()


def sequence_balance_loss(probability_BTE: Tensor, expert_BTK: Tensor) -> Tensor:
    """Return the mean over sequences of each one's own balance loss; tokens of a sequence lie on one rank.

    Follows DeepSeek-V3 (arXiv 2412.19437), eq. 17 to 20, without its weight.
    """
    num_experts = probability_BTE.shape[-1]
    chosen_BTE = functional.one_hot(expert_BTK, num_experts + 1)[..., :num_experts].sum(-2).to(probability_BTE.dtype)
    share_BE = chosen_BTE.sum(1) / chosen_BTE.sum((1, 2)).clamp(min=1)[:, None]
    return num_experts * (share_BE * probability_BTE.mean(1)).sum(-1).mean()


def z_loss(logits_NE: Tensor, num_tokens: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Return the sum of squared log-sum-exps of these tokens' logits over the number of tokens of all ranks.

    Follows ST-MoE (arXiv 2202.08906), eq. 5.
    """
    squares_N = logits_NE.logsumexp(-1).square()
    if valid_N is not None:
        squares_N = squares_N * valid_N
    return squares_N.sum() / num_tokens.clamp(min=1)


def moved_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """Return the biases after a step that sent `counts_E` routes: up by `rate` under the mean load, down above it.

    Follows auxiliary-loss-free balancing (arXiv 2408.15664), algorithm 1. Exact: loads are compared as integers.
    """
    return bias_E + rate * (counts_E.sum() - len(counts_E) * counts_E).sign().to(bias_E.dtype)
