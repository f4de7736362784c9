"""When a slow rank has cost enough to be replaced: what a straggler costs, followed from its finding on."""

from __future__ import annotations

from collections.abc import Callable

from faulttol import policy
from faulttol.config import PolicyConfig
from faulttol.finding import Finding
from faulttol.policy import Loss, Remedy, Slowness

_LOOK_S = 0.5


class Straggler:
    """Follows the straggler of one generation. Times are the caller's, `saved_step` says what is saved."""

    def __init__(self, config: PolicyConfig, total_steps: int, saved_step: Callable[[], int]) -> None:
        self._config, self._total_steps, self._saved_step = config, total_steps, saved_step
        self._pace: tuple[float, int] | None = None
        self._since: tuple[int, float] | None = None
        self._saved_when_due: int | None = None
        self._looked_s = -_LOOK_S

    def look(self, now_s: float, step: int, finding: Finding | None) -> Loss | None:
        """Return the rank to replace now, if it is worth it: at once, or because a checkpoint has just been made."""
        if self._pace is None and step >= 0:
            self._pace = now_s, step
        if finding is None or not finding.culprits:
            self._since = self._saved_when_due = None
            return None
        rank = finding.culprits[0]
        if self._since is None or self._since[0] != rank:
            self._since, self._saved_when_due = (rank, now_s), None
        if now_s - self._looked_s < _LOOK_S or self._pace is None or step <= self._pace[1]:
            return None
        self._looked_s = now_s
        saved = self._saved_step()
        remedy = self._remedy(now_s, step, saved, finding.slowdown)
        if remedy == "log":
            return None
        loss = Loss(rank, "slow", finding.summary)
        if remedy == "restart now":
            return loss
        if self._saved_when_due is None:
            self._saved_when_due = saved
        return loss if saved > self._saved_when_due else None

    def _remedy(self, now_s: float, step: int, saved: int, slowdown: float) -> Remedy:
        assert self._pace is not None
        assert self._since is not None
        step_s = (now_s - self._pace[0]) / (step - self._pace[1])
        slowness = Slowness(
            slowdown=slowdown,
            since_s=now_s - self._since[1],
            unsaved_s=max(0, step - saved) * step_s,
            remaining_s=max(0, self._total_steps - step) * step_s / max(slowdown, 1.0),
        )
        return policy.weigh(slowness, self._config)
