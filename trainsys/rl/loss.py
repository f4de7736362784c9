"""Policy-gradient losses over tokens. Pure functions of tensors; the sums over ranks are the caller's."""

# Shapes: B completions, T tokens of each; without a target `weights_BT` is 0 and the rest may be anything finite.

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Ratios(NamedTuple):
    """What a loss found out about its tokens: sums over those that count, detached; divide by `num_tokens`."""

    num_tokens: Tensor
    clipped: Tensor
    """Tokens whose gradient the clip took away."""
    kl_to_start: Tensor
    """Estimate of KL(round's start || policy), in nats."""
    ratio: Tensor
    importance: Tensor
    """Weights of `importance_weights`."""


def policy_loss(
    log_probs_BT: Tensor,
    start_log_probs_BT: Tensor,
    advantages_BT: Tensor,
    weights_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    importance_BT: Tensor | None = None,
) -> tuple[Tensor, Ratios]:
    """Return the clipped surrogate loss, a scalar: sum of `weights_BT` x -min(ratio x A, clip(ratio) x A).

    `log_probs_BT` are those of the drawn tokens under the policy in training, `start_log_probs_BT` under the policy
    the clip is around (detached); equal ones make the ratio 1 and the gradient that of A x log-probability.
    `importance_BT` weighs tokens further. Follows PPO's surrogate with DAPO's asymmetric clip.
    """
    counts_BT = weights_BT != 0
    difference_BT = torch.where(counts_BT, log_probs_BT - start_log_probs_BT, 0.0)
    ratio_BT = difference_BT.exp()
    bounded_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    gain_BT = torch.minimum(ratio_BT * advantages_BT, bounded_BT * advantages_BT)
    factors_BT = weights_BT if importance_BT is None else weights_BT * importance_BT
    with torch.no_grad():
        # Where the bounded product is the smaller one and the clamp is active, nothing flows back.
        lost_BT = counts_BT & (bounded_BT != ratio_BT) & (bounded_BT * advantages_BT < ratio_BT * advantages_BT)
        ratios = Ratios(
            num_tokens=counts_BT.sum(),
            clipped=lost_BT.sum(),
            kl_to_start=(torch.expm1(difference_BT) - difference_BT).sum(),
            ratio=(ratio_BT * counts_BT).sum(),
            importance=(counts_BT if importance_BT is None else importance_BT * counts_BT).sum(),
        )
    return -(factors_BT * gain_BT).sum(), ratios


def kl_penalty(log_probs_BT: Tensor, reference_log_probs_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Return the weighted sum of KL(policy || reference) by Schulman's unbiased, positive estimate, a scalar.

    exp(d) - d - 1 with d = reference - policy, for tokens that the policy drew.
    """
    difference_BT = torch.where(weights_BT != 0, reference_log_probs_BT - log_probs_BT, 0.0)
    return (weights_BT * (torch.expm1(difference_BT) - difference_BT)).sum()


def importance_weights(start_log_probs_BT: Tensor, behaviour_log_probs_BT: Tensor, *, limit: float) -> Tensor:
    """Return min(pi_start / pi_behaviour, limit) of each token, [B, T]: truncated importance sampling."""
    return (start_log_probs_BT - behaviour_log_probs_BT).exp().clamp(max=limit)


def token_weights(
    mask_BT: Tensor, kind: Literal["grpo", "dr_grpo", "dapo"], *, num_completions: int, num_tokens: int, longest: int
) -> Tensor:
    """Return what each token counts, [B, T] in float64; 0 outside `mask_BT`.

    Over all completions of the round (`num_completions`, with `num_tokens` together) the weights sum to 1 for `grpo`
    and `dapo`. `dr_grpo` divides by `longest`, the limit of new tokens, whatever a completion's length.
    """
    mask = mask_BT.double()
    if kind == "dapo":
        return mask / max(num_tokens, 1)
    per_completion = mask.sum(1, keepdim=True).clamp(min=1) if kind == "grpo" else float(longest)
    return mask / per_completion / max(num_completions, 1)
