"""What the detector says of a job while it runs: from the rings that ranks record into to findings, each told once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faulttol import probing
from faulttol.config import DetectorConfig, HealthConfig
from faulttol.detector import Memory, observe
from faulttol.finding import Finding
from faulttol.health import Vitals
from faulttol.history import Follower
from faulttol.probing import Asking, Locator
from faulttol.ring import remove_rings
from faulttol.unrecorded import without_unrecorded
from launch.records import append_line

_LOOK_S = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """Where the ranks record, and what is made of it."""

    rings: Path
    """Folder of the rings, which this machine sees; see `faulttol.install`."""
    record: Path
    """File that gets a JSON line for each finding."""
    health: HealthConfig
    detector: DetectorConfig
    probes: bool = True
    """Whether the ranks answer when they are asked for the delays of their links; see `faulttol.probing`."""
    ship_to: str = ""
    """Path or URL where all that ranks record is kept; see `faulttol.ship`. Empty keeps nothing more than the rings."""


class Diagnosis:
    """Looks at the rings of one generation at a time. One thread uses it."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self._follower: Follower | None = None
        self._locator: Locator | None = None
        self._generation = -1
        self._memory = Memory()
        self._told: set[object] = set()
        self._looked_s, self._is_blind = 0.0, False
        self._current: tuple[Finding, ...] = ()

    def begin(self, generation: int, world_size: int) -> None:
        """Turn to another generation; of the one before, what was recorded stays, of older ones where it is kept."""
        self.close()
        self._generation = generation
        observation = self._observation
        self._follower = Follower(observation.rings, range(world_size), generation)
        asking = Asking(observation.rings, world_size, generation)
        self._locator = Locator(asking, observation.detector) if observation.probes and world_size > 1 else None
        self._memory, self._told, self._current = Memory(), set(), ()
        try:
            probing.remove(observation.rings, before=generation - 1)
            if not observation.ship_to:  # who ships them removes them
                remove_rings(observation.rings, before=generation - 1)
        except OSError as error:
            log.warning("%s: what older generations recorded stays there: %s", observation.rings, error)

    def look(self, vitals: Iterable[Vitals] = (), *, at_once: bool = False) -> Sequence[Finding]:
        """Return the findings that were not there before, now and then or `at_once`; nothing in between."""
        now_s = time.monotonic()
        if self._follower is None or (now_s - self._looked_s < _LOOK_S and not at_once):
            return ()
        self._looked_s = now_s
        observation = self._observation
        try:
            view = self._follower.look(vitals)
        except OSError as error:  # what is found is what was: a disk that does not answer ends no job
            if not self._is_blind:
                log.warning("%s: cannot be looked at now: %s", observation.rings, error)
            self._is_blind = True
            return ()
        self._is_blind = False
        self._memory, found = observe(self._memory, view, observation.detector, observation.health)
        found = without_unrecorded(view, found)
        if self._locator is not None:
            found = self._locator.look(now_s, found, is_settled=self._memory.baseline is not None)
        self._current = found
        fresh = [finding for finding in self._current if finding.key not in self._told]
        self._told.update(finding.key for finding in fresh)
        for finding in fresh:
            self._keep(finding)
        return fresh

    @property
    def current(self) -> tuple[Finding, ...]:
        """What held at the last look, the gravest first."""
        return self._current

    def close(self) -> None:
        """Let go of the rings. Idempotent."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    def _keep(self, finding: Finding) -> None:
        line = {"time": round(time.time(), 3), "generation": self._generation, **asdict(finding)}
        append_line(self._observation.record, line)


def told(finding: Finding) -> str:
    """One line on a finding for a person."""
    suspects = ", ".join(f"{suspect} ({suspect.score:.2f})" for suspect in finding.suspects[:4])
    return f"found {finding.kind.value}: {finding.summary}" + (f"; suspected: {suspects}" if suspects else "")
