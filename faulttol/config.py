"""What is watched while a job runs, and from when on it counts as wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

_PATIENT_PHASES = (
    "start",
    "standby",
    "rendezvous",
    "prepare",
    "build",
    "load",
    "compile",
    "warmup",
    "evaluate",
    "evaluation",
    "save",
    "checkpoint",
    "export",
    "probe",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """From when on a missing sign of life means something."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    lost_after_s: float = 5.0
    """Seconds without a report from a rank's machine until the rank counts as lost."""
    frozen_after_s: float = 1.5
    """Seconds without an answer of native code until a process that exists counts as frozen."""
    stuck_after_s: float = 5.0
    """Seconds without a sign of life of a Python thread until the rank counts as stuck in native code."""
    stalled_after_s: float = 600.0
    """Seconds without progress of the loop until the rank counts as stalled; longer than any healthy step takes, since
    the loop may show progress only once a step."""
    patience: float = 12.0
    """Factor on `stuck_after_s`, `stalled_after_s` and the detector's `hang_after_s` in `patient_phases`. In its first
    step a rank has as long until it hangs, and at most half of `stalled_after_s`: it may compile without saying so."""
    patient_phases: list[str] = field(default_factory=lambda: list(_PATIENT_PHASES))
    """What a rank may do for long without being ill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig:
    """Thresholds of the rules from events to findings; all durations are of one clock each."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    warmup_steps: int = 5
    """Steps after the start of a generation that no rule about speed looks at."""
    hang_after_s: float = 60.0
    """Seconds that a collective is open before it can count as hanging: a peer may compile its first step meanwhile,
    or have more to do than the others."""
    hang_factor: float = 10.0
    """A collective also has to be open for this many times what 19 of 20 of its kind and size take."""
    confirmations: int = 2
    """Views in a row that must agree before a finding about a hang or about speed is reported."""
    window_steps: int = 16
    """Steps that a rule about speed looks at, at least; up to four times as many, where it takes them to be sure."""
    window_least_s: float = 1.0
    """... and they last at least this many seconds: for less, the machine may have had no time for a rank."""
    fast_steps: int = 6
    """Steps of a shorter window, in which only what is much slower counts, if they last as long."""
    fast_excess: float = 1.0
    """Share of the step that counts there, instead of `straggler_excess`."""
    straggler_excess: float = 0.2
    """A straggler's local time exceeds its peers' by at least this share of the step."""
    straggler_floor_s: float = 0.002
    """... and by at least this many seconds."""
    straggler_share: float = 0.7
    """... in at least this share of the steps of the window."""
    straggler_chance: float = 1e-6
    """... and it comes last in so many of them as one of ranks that are late at random does with at most this
    probability, all ranks together."""
    cpu_wait_share: float = 0.7
    """Where steps grew and nobody's own work did, a rank is the straggler whose threads wait longer for a CPU than they
    did by this share of that, and than its peers'."""
    slow_excess: float = 0.3
    """A transfer is slow when it takes this share longer than it used to."""
    slow_floor_s: float = 0.001
    """... and at least this many seconds longer."""
    slow_windows: int = 4
    """Parts of a window that are compared apart; all but one have to be slow."""
    link_factor: float = 3.0
    """A cell of the delay matrix is slow at this multiple of its class's median."""
    link_floor_s: float = 0.001
    """... and at least this many seconds above it."""
    gradient_deviations: float = 8.0
    """A gradient norm this many (robust) deviations from its peers', on a log scale, is an outlier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """What recovery may cost, and when it is given up."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    restarts_per_hour: int = 6
    """Recoveries within an hour; one more ends the run. At least 0."""
    no_progress_limit: int = 3
    """Recoveries in a row between which no new step was finished; one more ends the run. At least 1."""
    backoff_s: float = 1.0
    """Seconds before the second recovery in a row without a new step; doubled with each further one."""
    backoff_limit_s: float = 60.0
    """The longest such pause."""
    same_error_limit: int = 2
    """An error of the same type in the same step this often is the program's, and ends the run. At least 1."""
    shrink: bool = True
    """Whether to go on with fewer ranks while no spare is there, where a smaller layout is allowed."""
    spare_wait_s: float = 20.0
    """Seconds to wait for a spare that is starting before the run shrinks."""
    failed_starts_limit: int = 6
    """Attempts in a row to start processes of which none got ready, while the run waits for one, after which it ends.
    Between two the pause doubles, from ten seconds on. At least 1."""
    abort_timeout_s: float = 5.0
    """Seconds that survivors get to leave their collectives; who has not is ended and replaced too. In the run's
    `health.patient_phases`, and in the first step, `health.patience` times as long: they may load or compile."""
    recovery_cost_s: float = 10.0
    """What a recovery is expected to cost beside the steps done again, to weigh against a slow rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionConfig:
    """Looking for numbers that are wrong while nothing raises; see faulttol.sdc."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    replicas_every: int = 0
    """Steps between two comparisons of the parameters of data-parallel replicas, to the bit, before the update; costs
    one reading of the parameters and an exchange of 8 bytes. 0 never compares; needs parallel.replicate above 1, and
    names the rank from 3 replicas on. A checkpoint counts as right once a comparison after it found nothing."""
    products_every: int = 0
    """Of each linear layer, every how-many-th product is checked against the sums of its factors; 0 checks none."""
    gradient_norms: bool = False
    """Whether each rank's gradient norm before the reduction is recorded, and one unlike the others' (from 3 ranks on,
    by detector.gradient_deviations) is a fault of its rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultTolConfig:
    """Watching ranks, and what becomes of what is seen."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    mode: Literal["off", "observe", "act"] = "off"
    """`off`: a rank that dies, freezes or stands still ends the run. `observe`: collectives are recorded and what
    is found is told and kept in `RUN/events`. `act`: also the run goes on without the rank at fault (launch.spares)."""
    heartbeat_interval_s: float = 0.5
    """Seconds between two signs of life of a rank's process; above 0, well under launch.frozen_timeout_s."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """mode=observe, act: from when on a missing sign of life means something."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    """mode=observe, act: from when on what was recorded counts as wrong."""
    probes: bool = True
    """mode=observe, act: whether ranks measure their links between two steps, once early and when steps grow: n ranks
    in n - 1 rounds of some milliseconds. Without, slow communication is told by what steps alone show."""
    ring_dir: str = ""
    """mode=observe, act: folder in which ranks record, in memory or on a local disk; empty takes `RUN/events`."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """mode=act: what recovery may cost."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """mode=observe, act: which wrong numbers are looked for. Found ones are told and kept; in mode=act also the rank
    is replaced, and the run goes on from the last checkpoint before them."""
    ship_to: str = ""
    """mode=observe, act: path or URL where all that ranks record is kept for good, as Arrow files; a ring keeps only
    the newest. Empty keeps nothing more."""
    drill: bool = False
    """Whether faults that `RUN/drill.jsonl` orders strike this run, to practise on."""
