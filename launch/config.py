"""How the ranks of a job are started and watched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Where ranks run, what each may use, and how long they may stay silent."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    kind: Literal["local", "ray"] = "local"
    """`local`: processes of this machine; `ray`: one Ray actor per rank (extra `ray`)."""
    ray_address: str = ""
    """Ray cluster to join, e.g. `auto` or `10.0.0.1:6379`; empty: the cluster that runs this job, else a Ray
    of our own on this machine, ended with the run."""
    cpus_per_rank: float = 1.0
    """CPUs that Ray reserves for one rank; above 0."""
    gpus_per_rank: float = 0.0
    """GPUs that Ray reserves for one rank; 0 reserves none."""
    spares: int = 0
    """Ranks beside those of the layout that are started, imported and kept waiting, to take the place of lost ones;
    needs faulttol.mode = act. A lost process is replaced by a new spare. 0 or more."""
    start_timeout_s: float = 180.0
    """Seconds until every rank must have joined; past that the run ends and the missing ranks are named."""
    frozen_timeout_s: float = 30.0
    """Seconds without a sign of life from a rank's process before it counts as frozen."""
    hang_timeout_s: float = 1800.0
    """Seconds without progress of a rank's loop before it counts as hung; longer than the slowest single
    step, evaluation batch, compilation or data preparation."""
    stop_grace_s: float = 60.0
    """Seconds that ranks get to save and leave after a stop was asked for, before they are killed."""
