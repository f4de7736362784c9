"""A tier: a kind of memory that holds blocks of bytes and moves them asynchronously."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import torch

from offload.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class TierSpec:
    """What a tier can hold and how fast it is: all that a placement needs to know of it.

    Raises:
        SpecError: a value is out of range; all of them at once.
    """

    name: str
    """Unique among the tiers of a process; errors, plans and metrics use it."""
    capacity_bytes: int
    """Most bytes it holds; at least 0."""
    read_bytes_per_s: float
    """Rate of large reads, with as many at once as the tier runs; above 0."""
    write_bytes_per_s: float
    """Rate of large writes, likewise; above 0."""
    latency_s: float
    """Time that the smallest read takes; finite, at least 0."""
    emulated: bool = False
    """In place of a device that this machine lacks: transfers are slowed to the rates and the latency above, and
    the label, and so every error, plan and figure, says `emulated`."""

    def __post_init__(self) -> None:
        wrong = [
            f"{key}: {getattr(self, key)}; {allowed}"
            for key, allowed, right in (
                ("capacity_bytes", "at least 0", self.capacity_bytes >= 0),
                ("latency_s", "finite, at least 0", 0 <= self.latency_s < math.inf),
                ("read_bytes_per_s", "above 0", self.read_bytes_per_s > 0),
                ("write_bytes_per_s", "above 0", self.write_bytes_per_s > 0),
            )
            if not right
        ]
        if wrong:
            raise SpecError("\n".join(f"tier {self.name}: {problem}" for problem in wrong))

    @property
    def label(self) -> str:
        """The name, with `(emulated)` behind it where that is so."""
        return f"{self.name} (emulated)" if self.emulated else self.name


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A place for `num_bytes` bytes in one tier; made by `Tier.allocate` and equal only to itself."""

    tier_name: str
    num_bytes: int
    owner: str = ""
    """Whose bytes these are, such as a tensor's name; errors say it."""


class Tier(Protocol):
    """Holds blocks; transfers run in the background, those of one block in the order they were asked for.

    Every method may be called from any thread. A transfer is a `Future`: `result(timeout)` waits for it and
    raises what went wrong (`TierError`, `BlockError`). A context manager: leaving the `with` block closes it.
    """

    @property
    def spec(self) -> TierSpec:
        """What the tier can hold and how fast it is."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes of the capacity that blocks take, rounded up to what the tier gives out at once."""
        ...

    def allocate(self, num_bytes: int, owner: str = "") -> Block:
        """Return a new block, which holds nothing until it is written. Raises `TierFull`."""
        ...

    def view(self, block: Block) -> torch.Tensor | None:
        """Return the block's own bytes as a flat uint8 tensor where the CPU can address them, else None.

        For work in place, such as an optimizer's. From then on the block counts as written and carries no
        digest; order against transfers of the block is the caller's. Invalid once the block is freed.
        """
        ...

    def write(self, block: Block, source: torch.Tensor) -> Future[None]:
        """Copy the bytes of `source` into the block.

        `source` is contiguous, on the CPU, as large as the block; nobody changes it until the future is done.
        After a failed write the block holds nothing: reads of it fail too, until a write succeeds.
        """
        ...

    def read(self, block: Block, into: torch.Tensor) -> Future[None]:
        """Copy what the last write of the block asked for into `into`, which is contiguous and on the CPU.

        Nobody reads or changes `into` until the future is done. After a failed read its content is undefined.
        """
        ...

    def free(self, block: Block) -> None:
        """Give the block's room back; waits for its transfers."""
        ...

    def close(self) -> None:
        """End all transfers and drop everything held; a second call does nothing.

        Raises:
            TierError: a write had failed, and no later write of that block succeeded.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
