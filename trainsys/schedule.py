"""Learning rate over the steps: pure functions of the step."""

from __future__ import annotations

import math

from trainsys.config import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate that step 1 to `steps` uses; a schedule that `check` accepts.

    Warm-up is linear and its first step already moves: 1/w, 2/w, …, 1. Then `constant` stays at 1; `cosine`
    falls along half a cosine to `final_ratio` at the last step; `wsd` stays, and over the last
    `decay_steps` falls linearly to `final_ratio`.
    """
    assert 1 <= step <= steps, (step, steps)
    if step < schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        start = schedule.warmup_steps
        fallen = (step - start) / max(1, steps - start)
        return schedule.final_ratio + (1 - schedule.final_ratio) * (1 + math.cos(math.pi * fallen)) / 2
    decay = _decay_steps(schedule, steps)
    fallen = max(0, step - (steps - decay)) / decay
    return 1 - (1 - schedule.final_ratio) * fallen


def check(schedule: ScheduleConfig, steps: int) -> list[str]:
    """What keeps the schedule from running over `steps` steps, one message a key, sorted; empty when it can."""
    wrong = []
    room = steps - (_decay_steps(schedule, steps) if schedule.kind == "wsd" else 0)
    if schedule.kind == "cosine":
        room -= 1
    if not 0 <= schedule.warmup_steps <= room:
        wrong.append(
            f"schedule.warmup_steps: {schedule.warmup_steps} does not fit a {schedule.kind} run"
            f" of {steps} steps; allowed: 0 to {max(0, room)}"
        )
    if not 0 <= schedule.decay_steps <= steps:
        wrong.append(f"schedule.decay_steps: {schedule.decay_steps} does not fit {steps} steps; allowed: 0 to {steps}")
    return sorted(wrong)


def _decay_steps(schedule: ScheduleConfig, steps: int) -> int:
    return schedule.decay_steps or max(1, steps // 5)
