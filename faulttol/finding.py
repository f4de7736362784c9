"""What a detector says: a kind, who is suspected and how strongly, and the numbers it goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FindingKind(StrEnum):
    """The classes of what can be wrong with a job."""

    CRASH = "crash"
    """A process is gone, or its machine."""
    FREEZE = "freeze"
    """A process exists and does not run: stopped, swapped out, stuck in the kernel."""
    STUCK = "stuck"
    """Native code runs and Python does not: the GIL is held."""
    HANG = "hang"
    """Everybody waits for a rank that is not in a collective (non-communication hang)."""
    COMMUNICATION_HANG = "communication_hang"
    """Everybody entered the same collective and it does not end."""
    DESYNC = "desync"
    """Ranks called different collectives: an error of the program, which a restart repeats."""
    COMMUNICATION_SLOW = "communication_slow"
    """The transfer itself became slower: a link, a sender, a receiver."""
    STRAGGLER = "straggler"
    """One rank comes later than the others, always the same (non-communication slow)."""
    DATA_IMBALANCE = "data_imbalance"
    """Ranks come late in turn, or in proportion to their tokens. Not a fault."""
    NUMERIC = "numeric"
    """A rank computed something else than its replicas, or something not finite."""

    @property
    def is_fault(self) -> bool:
        """False for what is only worth knowing."""
        return self is not FindingKind.DATA_IMBALANCE

    @property
    def is_stop(self) -> bool:
        """True when the job cannot get further by itself."""
        return self in _STOPS


_STOPS = frozenset(
    {
        FindingKind.CRASH,
        FindingKind.FREEZE,
        FindingKind.STUCK,
        FindingKind.HANG,
        FindingKind.COMMUNICATION_HANG,
        FindingKind.DESYNC,
    }
)


@dataclass(frozen=True, slots=True)
class Suspect:
    """A rank, or the directed link between two, with how well it explains the evidence."""

    rank: int
    """The rank; of a link, its sender."""
    score: float
    """Between 0 and 1; the suspects of a finding are sorted, the strongest first."""
    to_rank: int = -1
    """Receiver of a suspected link; -1 for a suspected rank."""

    @property
    def is_link(self) -> bool:
        """True for a link."""
        return self.to_rank >= 0

    def __str__(self) -> str:
        return f"link {self.rank}->{self.to_rank}" if self.is_link else f"rank {self.rank}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One statement about the job, derived from one view of it."""

    kind: FindingKind
    suspects: tuple[Suspect, ...]
    """The strongest first; empty when only the kind is known."""
    summary: str
    """One line for a person."""
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)
    """The numbers that the rule compared, by name with unit."""
    group: str = ""
    """The process group that shows it, if one does."""
    sequence: int = -1
    """Which operation of that group; -1 if it is not about one."""
    step: int = -1
    """The step it was seen in; -1 if not known."""
    slowdown: float = 1.0
    """Of a slow fault: measured time over usual time."""

    @property
    def culprits(self) -> tuple[int, ...]:
        """The suspected ranks, the strongest first; of a link its two ends."""
        ranks: dict[int, None] = {}
        for suspect in self.suspects:
            ranks[suspect.rank] = None
            if suspect.is_link:
                ranks[suspect.to_rank] = None
        return tuple(ranks)

    @property
    def key(self) -> tuple[FindingKind, tuple[tuple[int, int], ...]]:
        """What makes two findings of two views the same one: the kind and who is suspected."""
        return self.kind, tuple(sorted((suspect.rank, suspect.to_rank) for suspect in self.suspects))
