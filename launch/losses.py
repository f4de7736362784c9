"""How what is seen of a rank becomes why it is lost, and how a job that fails calls that."""

from __future__ import annotations

from faulttol.fence import Fenced
from faulttol.health import Condition
from faulttol.policy import Loss, LossKind
from launch.errors import Reason

FENCED = Fenced.__name__
"""The error of a rank that met the fence of a newer generation."""

KINDS: dict[Condition, LossKind] = {
    Condition.DEAD: "dead",
    Condition.LOST: "lost",
    Condition.FROZEN: "frozen",
    Condition.STUCK: "stuck",
}
"""What the worst that is seen of a process makes of its rank, where it ends a generation."""

REASONS: dict[LossKind, Reason] = {
    "dead": "died",
    "lost": "died",
    "frozen": "frozen",
    "stuck": "frozen",
    "hung": "hung",
    "raised": "raised",
    "desync": "raised",
    "slow": "hung",
    "numeric": "raised",
}
"""How an error of the whole job calls it."""


def raised(rank: int, messages: tuple[str, ...]) -> Loss:
    """An error of the rank's own, by its messages."""
    return Loss(rank, "raised", messages[0], error=messages[0].partition(":")[0])
