"""What a Checkpointer may be opened with."""

from __future__ import annotations

from checkpoint.arena import SLOT_BYTES
from checkpoint.config import CheckpointConfig
from checkpoint.tiers import problems as tier_problems


def check_arguments(config: CheckpointConfig, rank: int, world_size: int, run_id: str) -> None:
    """Raise ValueError with everything that is wrong with a rank's arguments."""
    problems = tier_problems(config)
    if world_size < 1 or not 0 <= rank < world_size:
        problems.append(f"rank: {rank} is not a rank of a world of {world_size}")
    if world_size > 1 and not run_id:
        problems.append("run_id: needed with several ranks: a text equal on all and new for every launch")
    least_of = {"every": 0, "keep_last": 1, "keep_every": 0, "load_buffer_bytes": 0, "writer_threads": 1}
    for name, least in least_of.items():
        if getattr(config, name) < least:
            problems.append(f"config.{name}: {getattr(config, name)}; allowed are integers from {least}")
    times = {name: getattr(config, name) for name in ("commit_timeout_s", "urgent_deadline_s")}
    problems += [f"config.{name}: {s}; allowed are seconds above 0" for name, s in times.items() if s <= 0]
    if config.staging_bytes != "auto" and config.staging_bytes < SLOT_BYTES:
        problems.append(f"config.staging_bytes: {config.staging_bytes}; allowed are 'auto' and bytes from {SLOT_BYTES}")
    for name, choices in (("on_pressure", ("block", "skip")), ("writer", ("auto", "thread", "process"))):
        if getattr(config, name) not in choices:
            problems.append(f"config.{name}: {getattr(config, name)!r}; allowed are {' and '.join(map(repr, choices))}")
    if config.on_error not in ("raise", "warn"):
        problems.append(f"config.on_error: {config.on_error!r}; allowed are 'raise' and 'warn'")
    if problems:
        raise ValueError("; ".join(sorted(problems)))
