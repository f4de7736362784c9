"""A causal language model with the losses of this package as its forward: what an engine trains."""

# Shapes: B completions with their prompts, T tokens, N tokens with a target, D features.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainsys.data.batch import IGNORE
from trainsys.rl.config import LossConfig
from trainsys.rl.logprob import chosen_log_probs, log_probs_of_logits
from trainsys.rl.loss import Ratios, kl_penalty, policy_loss

PREFIX = "policy."
"""What the names of parameters have before those of the model inside."""


class PolicyModel(nn.Module):
    """Maps tokens and targets to (summed loss, auxiliary loss), as every model of trainsys does."""

    def __init__(self, policy: nn.Module, *, vocab_size: int, temperature: float, loss: LossConfig) -> None:
        """Wrap a built model. Ids from `vocab_size` on have no probability; `temperature` is that of sampling."""
        super().__init__()
        self.policy: Any = policy
        self.config = policy.config
        self._vocab_size, self._temperature, self._loss = vocab_size, temperature, loss
        self._ratios: list[Ratios] = []

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        advantages_BT: Tensor | None = None,
        **terms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """With advantages the policy loss of `terms` (`loss_terms`), without the cross-entropy of the targets."""
        assert positions_BT is document_ids_BT is None, "rows are whole sequences"
        if advantages_BT is None:
            log_probs_BT, auxiliary = self.log_probs(tokens_BT, targets_BT, 1.0)
            return -log_probs_BT.sum(), auxiliary
        log_probs_BT, auxiliary = self.log_probs(tokens_BT, targets_BT, self._temperature)
        return self._policy_loss(log_probs_BT, advantages_BT, **terms), auxiliary

    def log_probs(
        self, tokens_BT: Tensor, targets_BT: Tensor, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (log-probability of each target, [B, T] with 0 where there is none, fp32 or wider; auxiliary loss).

        The temperature is by default that of sampling.
        """
        temperature = self._temperature if temperature is None else temperature
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        counts_BT = targets_BT != IGNORE
        head = self.policy.head
        if head is not None and head.bias is None:
            x_BTD, auxiliary = self.policy.features(tokens_BT, positions_BT=positions_BT)
            weight_VD = head.weight[: self._vocab_size]
            chosen_N = chosen_log_probs(x_BTD[counts_BT], weight_VD, targets_BT[counts_BT], temperature)
        else:
            logits_BTV, auxiliary = self.policy(tokens_BT, positions_BT=positions_BT)
            logits_NV = logits_BTV[counts_BT][:, : self._vocab_size]
            chosen_N = log_probs_of_logits(logits_NV, targets_BT[counts_BT], temperature)
        result_BT = chosen_N.new_zeros(tokens_BT.shape).masked_scatter(counts_BT, chosen_N)
        return result_BT, auxiliary

    def take_ratios(self) -> list[Ratios]:
        """Return what the policy losses since the last call found, one a forward."""
        taken, self._ratios = self._ratios, []
        return taken

    def _policy_loss(
        self,
        log_probs_BT: Tensor,
        advantages_BT: Tensor,
        weights_BT: Tensor,
        start_BT: Tensor | None = None,
        importance_BT: Tensor | None = None,
        reference_BT: Tensor | None = None,
    ) -> Tensor:
        dtype = log_probs_BT.dtype
        weights_BT, advantages_BT = weights_BT.to(dtype), advantages_BT.to(dtype)
        loss, ratios = policy_loss(
            log_probs_BT,
            log_probs_BT.detach() if start_BT is None else start_BT.to(dtype),
            advantages_BT,
            weights_BT,
            clip_low=self._loss.clip_low,
            clip_high=self._loss.clip_high,
            importance_BT=None if importance_BT is None else importance_BT.to(dtype),
        )
        self._ratios.append(ratios)
        if reference_BT is not None:
            loss = loss + self._loss.kl_weight * kl_penalty(log_probs_BT, reference_BT.to(dtype), weights_BT)
        return loss
