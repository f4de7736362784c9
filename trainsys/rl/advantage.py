"""Advantages: how much better each completion is than the others of its question. Pure functions of tensors."""

# Shapes: N groups, G completions of each.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_EPS = 1e-6


def group_advantages(rewards_NG: Tensor, *, divide_by_std: bool = True) -> Tensor:
    """Return rewards less their group's mean, [N, G]; over the group's standard deviation (of all G) if asked.

    The deviation gets an offset of 1e-6; a group with equal rewards has zeros exactly.
    """
    centred_NG = rewards_NG - rewards_NG.mean(1, keepdim=True)
    is_uniform_N1 = (rewards_NG == rewards_NG[:, :1]).all(1, keepdim=True)
    if divide_by_std:
        centred_NG = centred_NG / (rewards_NG.std(1, keepdim=True, correction=0) + _EPS)
    return centred_NG.masked_fill(is_uniform_N1, 0.0)  # the mean of equal rewards may be off by a rounding


def external_advantages(
    advantages: Tensor, rule: Literal["signed", "positive", "clipped"], *, limit: float = 1.0
) -> Tensor:
    """Return the advantages, of any shape, of completions that another policy drew, as `rl.loss.external` says."""
    if rule == "positive":
        return advantages.clamp(min=0)
    return advantages.clamp(-limit, limit) if rule == "clipped" else advantages


def overlong_penalty(num_tokens: Tensor, *, max_new_tokens: int, overlong_tokens: int) -> Tensor:
    """Return what is added to the reward of completions with these lengths (any shape): 0 down to -1.

    0 up to `overlong_tokens` before the limit, then linearly to -1 at the limit (DAPO, arXiv 2503.14476, eq. 13).
    """
    over = num_tokens.to(torch.get_default_dtype()) - (max_new_tokens - overlong_tokens)
    return -(over / overlong_tokens).clamp(0, 1)
