"""What becomes superfluous in one tier, as one launch sees it, and is removed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from checkpoint import catalog
from checkpoint.commit import AttemptName
from checkpoint.config import CheckpointConfig
from checkpoint.errors import CheckpointError
from checkpoint.storage import Storage

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Retention:
    """Removes superseded checkpoints and abandoned attempts of one tier."""

    keep_last: int
    keep_every: int
    known: catalog.Known = field(default_factory=catalog.Known)
    """What was read of the tier's checkpoints before."""
    failed: set[AttemptName] = field(default_factory=set)
    """Attempts of this launch that failed here."""
    _first_write_s: float | None = None

    @classmethod
    def of(cls, config: CheckpointConfig, tier: str) -> Retention:
        """Return what a configuration asks of a tier."""
        keep_last = config.memory.keep_last if tier == "memory" else config.keep_last
        # A save under way may refer to what the checkpoint before the newest one has.
        keep_last = max(3, keep_last) if config.delta else keep_last
        return cls(keep_last, 0 if tier == "memory" else config.keep_every)

    def collect(self, storage: Storage, committed: AttemptName) -> None:
        """Remove what the newest checkpoint supersedes, and attempts that can no longer become one.

        Of this launch these are the attempts that failed here: every rank voted since, so none still writes
        to them. Of other launches, what was last written before anything of this launch's first checkpoint.
        What cannot be removed is warned about, and tried again after the next save.
        """
        try:
            if self._first_write_s is None:
                times = catalog.write_times(storage, committed.folder)
                self._first_write_s = min((t for t in times if t is not None), default=0.0)
            first_write_s = self._first_write_s

            def abandoned(name: AttemptName) -> bool:
                if name.launch == committed.launch:
                    return name in self.failed
                return catalog.is_idle_since(storage, name, first_write_s)

            removals = catalog.removable(
                storage,
                keep_last=self.keep_last,
                keep_every=self.keep_every,
                abandoned=abandoned,
                known=self.known,
            )
            for removal in removals:
                catalog.remove(storage, removal)
        except CheckpointError as error:
            _log.warning("superseded checkpoints stay, the next save tries again: %s", error)
