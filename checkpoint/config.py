"""How often checkpoints are written and where to, what they may cost, and what an error does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """The memory tier: parts of the state in the RAM of agents that outlive the training processes."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    every: int = 0
    """Steps between two saves into memory; 0 has no such tier."""
    keep_last: int = 1
    """Newest sound checkpoints that stay in memory; at least 1. Memory for two more is needed while saving."""
    limit_bytes: int = 0
    """Memory that this host's agent may use, for all ranks of it and for its peers; 0 takes half of the host's."""
    peers: int = 1
    """Other hosts that hold a copy of each rank's part, so that a lost host restores from them; 0 keeps it at home."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteConfig:
    """The remote tier: committed local checkpoints are copied there in the background."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    url: str = ""
    """Any fsspec URL (`s3://bucket/run`); empty has no such tier.

    What the file system needs beside it comes from its own environment (`AWS_ENDPOINT_URL`, `FSSPEC_S3_…`)."""
    every: int = 1000
    """Steps between two copies, a multiple of the local cadence; at least 1."""
    keep_last: int = 2
    """Newest sound checkpoints that stay; at least 1."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 keeps none beyond `keep_last`."""
    retry_s: float = 3600.0
    """Seconds for which a failing copy is tried again, ever less often, before it is given up; above 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Cadence, cost, retention and failure policy of one Checkpointer."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    every: int = 100
    """Steps between two saves; 0 saves only at the end and when asked to stop."""
    keep_last: int = 2
    """Newest sound checkpoints that stay; at least 1. Nothing goes before its successor is committed."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 keeps none beyond `keep_last`."""
    on_error: Literal["raise", "warn"] = "raise"
    """What a failed save does to the training that asked for it."""
    staging_bytes: int | Literal["auto"] = "auto"
    """Host memory of this rank in which copies wait to be written.

    `auto` takes what a save needs, within a quarter of the memory that is free at the first one, which the ranks of
    a host (LOCAL_WORLD_SIZE) share. Less than a save needs works: its copies then wait for the disk, and the fence
    for them."""
    on_pressure: Literal["block", "skip"] = "block"
    """What `save` does while the two saves before it are still under way: wait for the older one, or save nothing."""
    writer: Literal["auto", "thread", "process"] = "auto"
    """Who hashes and writes: threads of this process, or one process of its own, replaced when it dies.

    `auto` takes a process for a state on a GPU, whose training loop needs the interpreter to keep the GPU busy, if the
    tiers can be opened from there (`memory://` cannot); threads for any other."""
    writer_threads: int = 2
    """Threads that hash and write; at least 1."""
    direct_io: bool = True
    """Whether local files are written past the kernel's cache, where the file system can."""
    delta: bool = False
    """Whether runs of 8 MiB that are as they were in the checkpoint before are referred to instead of written again.

    At least three checkpoints stay then, whatever `keep_last` says."""
    urgent_deadline_s: float = 25.0
    """Seconds within which an urgent save (preemption) must be committed, or it fails; above 0."""
    commit_timeout_s: float = 600.0
    """Seconds rank 0 waits for the other ranks' votes before the save fails, naming those missing; above 0.

    The others wait twice as long for rank 0, so that it is the one who tells what is missing."""
    load_buffer_bytes: int = 4 << 30
    """Host memory in which a load keeps bytes until all are verified; of local files at most half of what is free.

    The rest is read twice."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The tier before the local one."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """The tier behind the local one."""
