"""How tokens choose experts, in numbers that are checked. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """How tokens choose experts.

    Raises:
        ValueError: the numbers do not fit each other. All problems at once.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over all experts, or a `sigmoid` for each; the weights of the chosen sum to `scaling` either way."""
    scaling: float = 1.0
    """What the weights of a token's experts sum to."""
    num_groups: int = 1
    """Groups of consecutive experts."""
    top_groups: int = 1
    """Groups that a token's experts may lie in: those with the largest sum of their two best scores."""
    capacity_factor: float = 0.0
    """An expert takes at most this many times its even share of the routes; 0 drops none."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """`loss` adds the balance loss, `bias` moves a bias of every expert that counts in the choice alone."""
    balance_weight: float = 0.01
    """balance=loss: weight of that loss."""
    bias_rate: float = 0.001
    """balance=bias: by how much a step moves a bias."""
    z_weight: float = 0.0
    """Weight of the mean squared log-sum-exp of a token's logits; 0 leaves it out."""

    def __post_init__(self) -> None:
        names = ("capacity_factor", "balance_weight", "bias_rate", "z_weight")
        problems = size_problems(self.num_experts, self.top_k, self.num_groups, self.top_groups) + [
            (name, f"{getattr(self, name)} is out of range; allowed: 0 or more")
            for name in names
            if not getattr(self, name) >= 0
        ]
        if problems:
            raise ValueError("\n".join(f"parallel.routing: {key}: {problem}" for key, problem in sorted(problems)))


def size_problems(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> list[tuple[str, str]]:
    """Return (field of `Routing`, what is wrong with it; what is allowed) for sizes that do not fit each other."""
    found = []
    if not 1 <= top_k <= num_experts:
        found.append(("top_k", f"{top_k} is out of range; allowed: 1 to num_experts ({num_experts})"))
    if num_groups < 1 or num_experts % num_groups:
        found.append(("num_groups", f"{num_groups} does not divide num_experts ({num_experts})"))
    elif not 1 <= top_groups <= num_groups:
        found.append(("top_groups", f"{top_groups} is out of range; allowed: 1 to num_groups ({num_groups})"))
    elif top_k <= num_experts and top_k > top_groups * (num_experts // num_groups):
        within = top_groups * (num_experts // num_groups)
        found.append(("top_groups", f"{top_groups} of the groups have {within} experts, fewer than top_k ({top_k})"))
    return found
