"""Advantages, losses and log-probabilities are what their formulas say, and so are their gradients."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from trainsys.rl import logprob
from trainsys.rl.advantage import external_advantages, group_advantages, overlong_penalty
from trainsys.rl.logprob import chosen_log_probs, log_probs_of_logits
from trainsys.rl.loss import importance_weights, kl_penalty, policy_loss, token_weights


def _doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_advantages_are_rewards_less_the_mean_over_the_deviation() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.4, 0.6, 0.8]], dtype=torch.float64)
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    torch.testing.assert_close(group_advantages(rewards), wanted, rtol=1e-12, atol=0)
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, divide_by_std=False), centred, rtol=1e-12, atol=0)


def test_a_uniform_group_has_no_advantage_whatever_rounding_does() -> None:
    rewards = torch.full((1, 7), 0.1)
    assert not group_advantages(rewards).any()
    assert not group_advantages(rewards, divide_by_std=False).any()


def test_external_advantages_follow_their_rule() -> None:
    advantages = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    assert external_advantages(advantages, "signed").tolist() == [-2.0, -0.5, 0.0, 3.0]
    assert external_advantages(advantages, "positive").tolist() == [0.0, 0.0, 0.0, 3.0]
    assert external_advantages(advantages, "clipped", limit=1.0).tolist() == [-1.0, -0.5, 0.0, 1.0]


def test_the_overlong_penalty_falls_linearly_before_the_limit() -> None:
    penalties = overlong_penalty(torch.tensor([1, 12, 14, 16]), max_new_tokens=16, overlong_tokens=4)
    assert penalties.tolist() == [0.0, 0.0, -0.5, -1.0]


def test_token_weights_sum_as_each_loss_counts() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    sizes: dict[str, Any] = {"num_completions": 2, "num_tokens": 5, "longest": 8}
    assert token_weights(mask, "grpo", **sizes).sum(1).tolist() == [0.5, 0.5]
    assert token_weights(mask, "dapo", **sizes).sum(1).tolist() == [0.8, 0.2]
    assert token_weights(mask, "dr_grpo", **sizes).sum(1).tolist() == [4 / 16, 1 / 16]
    assert not token_weights(mask & False, "grpo", **sizes).any()


def _terms() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities whose ratios lie on both sides of the clip, and none on its edge."""
    log_probs = -_doubles(3, 5).abs() - 0.1
    start = log_probs + torch.tensor([-0.6, -0.1, 0.0, 0.1, 0.6], dtype=torch.float64)
    advantages = torch.tensor([[1.5], [-0.7], [0.3]], dtype=torch.float64).expand(3, 5).contiguous()
    weights = torch.full((3, 5), 0.1, dtype=torch.float64)
    weights[2, 3:] = 0
    return log_probs, start, advantages, weights


def test_the_policy_loss_clips_each_side_of_each_sign_as_its_formula_says() -> None:
    log_probs, start, advantages, weights = _terms()
    loss, ratios = policy_loss(log_probs, start, advantages, weights, clip_low=0.2, clip_high=0.28)
    wanted, clipped = 0.0, 0
    for row in range(3):
        for column in range(5):
            ratio = float((log_probs - start)[row, column].exp())
            advantage, weight = float(advantages[row, column]), float(weights[row, column])
            bounded = min(max(ratio, 0.8), 1.28)
            wanted -= weight * min(ratio * advantage, bounded * advantage)
            clipped += weight != 0 and bounded * advantage < ratio * advantage
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    assert int(ratios.clipped) == clipped > 0
    assert int(ratios.num_tokens) == 13


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_the_losses_are_those_of_finite_differences(weighted: bool) -> None:
    log_probs, start, advantages, weights = _terms()
    importance = importance_weights(start, _doubles(3, 5, seed=1) - 1, limit=2.0) if weighted else None

    def total(own: Tensor) -> Tensor:
        loss, _ = policy_loss(own, start, advantages, weights, importance_BT=importance)
        return loss + 0.3 * kl_penalty(own, start - 0.2, weights)

    assert torch.autograd.gradcheck(total, (log_probs.requires_grad_(),), eps=1e-7, atol=1e-7, rtol=1e-6)


def test_with_equal_policies_the_gradient_is_that_of_reinforce() -> None:
    log_probs, _, advantages, weights = _terms()
    log_probs.requires_grad_()
    loss, ratios = policy_loss(log_probs, log_probs.detach(), advantages, weights)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, -(weights * advantages), rtol=1e-12, atol=0)
    assert float(ratios.clipped) == float(ratios.kl_to_start) == 0


def test_what_does_not_count_may_be_anything_finite() -> None:
    log_probs, start, advantages, weights = _terms()
    other = torch.where(weights == 0, 700.0, log_probs)
    for fn in (lambda x: policy_loss(x, start, advantages, weights)[0], lambda x: kl_penalty(x, start, weights)):
        left, right = fn(log_probs), fn(other)
        assert torch.equal(left, right)


def test_importance_is_truncated() -> None:
    weights = importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-5.0, -0.5]), limit=2.0)
    assert weights.tolist() == pytest.approx([2.0, 0.6065], abs=1e-4)


def test_the_kl_estimate_is_positive_and_zero_for_equal_policies() -> None:
    log_probs, start, _, weights = _terms()
    assert float(kl_penalty(log_probs, start, weights)) > 0 == float(kl_penalty(log_probs, log_probs, weights))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_log_probs_equal_plain_ones_with_their_gradients(
    temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprob._CHUNK_BYTES, "cpu", 7 * 50 * 8)  # several chunks, the last one smaller
    x, weight = _doubles(23, 16).to(dtype).requires_grad_(), _doubles(50, 16, seed=1).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (23,), generator=torch.Generator().manual_seed(2))
    factors = _doubles(23, seed=3)
    ours = chosen_log_probs(x, weight, targets, temperature)
    plain = log_probs_of_logits(x @ weight.t(), targets, temperature)
    assert ours.dtype == plain.dtype == torch.promote_types(dtype, torch.float32)
    # In bf16 both round each logit's gradient, but in another order; the rest is computed alike.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    for one, other in zip(
        torch.autograd.grad(ours, (x, weight), factors.to(ours.dtype)),
        torch.autograd.grad(plain, (x, weight), factors.to(plain.dtype)),
        strict=True,
    ):
        largest = float(other.double().abs().max())
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_a_loss_cut_into_micro_batches_is_the_same(kind: Literal["grpo", "dr_grpo", "dapo"]) -> None:
    log_probs, start, advantages, _ = _terms()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    weights = token_weights(mask, kind, num_completions=3, num_tokens=10, longest=8)
    whole, _ = policy_loss(log_probs, start, advantages, weights)
    parts = [
        policy_loss(log_probs[i : i + 1], start[i : i + 1], advantages[i : i + 1], weights[i : i + 1])[0]
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-12, atol=0)
