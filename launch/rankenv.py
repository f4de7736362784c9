"""Who a rank is among the ranks, read from and written to the variables that torch itself reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnv:
    """One rank's place in the job, and where its rendezvous store listens."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    store_host: str = ""
    """Empty for a single rank that needs nobody."""
    store_port: int = 0
    store_is_served: bool = False
    """Whether the launcher serves the store; if not, rank 0 does."""
    device_index: int = -1
    """Which of the GPUs that it sees is this rank's own; -1: the one of its local rank."""
    attempt: int = 0
    """How often torchrun has restarted the ranks; keys of one attempt are not seen by the next."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """The place that torchrun or our launchers have described; a single rank when none has.

        Raises: ValueError naming every variable that is missing beside others, or that makes no sense.
        """
        present = [name for name in _REQUIRED if name in environ]
        if not any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            return cls()
        missing = sorted(set(_REQUIRED) - set(present))
        if missing:
            raise ValueError(
                f"environment: {', '.join(missing)}: not set beside {', '.join(present)}; "
                "start ranks with torchrun or `launch`, or unset them all"
            )
        lonely = environ["MASTER_ADDR"] == "" and environ["WORLD_SIZE"] == "1"
        numbers = _integers(
            environ,
            {
                "RANK": 0,
                "WORLD_SIZE": 1,
                "LOCAL_RANK": 0,
                "MASTER_PORT": 0 if lonely else 1,
                "LOCAL_WORLD_SIZE": 1,
                "GROUP_RANK": 0,
                "TORCHELASTIC_RESTART_COUNT": 0,
            },
        )
        rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
        if not environ["MASTER_ADDR"] and not lonely:
            raise ValueError(f"environment: MASTER_ADDR: empty, though WORLD_SIZE is {world_size}")
        local_rank = numbers["LOCAL_RANK"]
        local_world_size = numbers.get("LOCAL_WORLD_SIZE", world_size)
        if rank >= world_size:
            raise ValueError(f"environment: RANK: {rank} is not below WORLD_SIZE {world_size}")
        if local_rank >= local_world_size:
            raise ValueError(f"environment: LOCAL_RANK: {local_rank} is not below LOCAL_WORLD_SIZE {local_world_size}")
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            node_rank=numbers.get("GROUP_RANK", 0),
            store_host=environ["MASTER_ADDR"],
            store_port=numbers["MASTER_PORT"],
            store_is_served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=numbers.get("TORCHELASTIC_RESTART_COUNT", 0),
        )

    def to_environ(self) -> dict[str, str]:
        """The variables that `from_environ`, torch and DeepSpeed read this place from."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.store_host,
            "MASTER_PORT": str(self.store_port),
            "TORCHELASTIC_USE_AGENT_STORE": str(self.store_is_served),
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
        }


def _integers(environ: Mapping[str, str], minimum_by_name: Mapping[str, int]) -> dict[str, int]:
    """The integer value of each name that is set; one error for all that are not integers or too small."""
    values: dict[str, int] = {}
    wrong: list[str] = []
    for name, minimum in minimum_by_name.items():
        text = environ.get(name)
        if text is None:
            continue
        if text.isascii() and text.isdigit() and int(text) >= minimum:
            values[name] = int(text)
        else:
            wrong.append(f"environment: {name}: {text!r} is not an integer of at least {minimum}")
    if wrong:
        raise ValueError("\n".join(sorted(wrong)))
    return values
