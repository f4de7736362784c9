"""The loop that watches a job which outlives its ranks: it replaces whom it loses, and lets the others go on.

    starting ──> running ──> ending a generation ──> deciding ──> running (the next generation)
                    │                                    └─────> given up
                    └──> finished

A generation ends as soon as one of its ranks cannot go on. It is fenced first; then the ranks at fault are ended and
all others told to leave their collectives. Whoever does not leave them in time is at fault too: that is how a rank
that hangs outside of a collective shows itself, whatever the others saw. Nothing is decided before every process of
the generation has left its groups or is gone.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NoReturn

from faulttol import fence, policy
from faulttol.finding import Finding, FindingKind
from faulttol.health import Condition, Health, Vitals, assess
from faulttol.policy import Incident, Loss, Resume, Shrink, Situation, Stop
from faulttol.recovery import Standing
from launch import orders, signals, verdict
from launch.diagnosis import Diagnosis, told
from launch.entry import Raised, Returned
from launch.errors import RankFailed, RankNote
from launch.fleet import Fleet, MemberReport, Recovery, member_log
from launch.job import Job, JobResult
from launch.losses import KINDS, REASONS, raised
from launch.slowness import Straggler
from launch.supervisor import LONGEST_TICK_S, STACKS_S, StopWish, tail
from launch.verdict import Limits, RankStatus

_POLL_S = 0.02
_REFILL_S = 10.0  # until another spare is started for one that ended soon after its start
_LAGGARD_S = 1.0  # for the last ones to leave a generation that stands still, once others have
_STOPPED_S = 0.5  # for how long a process must be stopped until that is not somebody looking at it

_STANDSTILLS = (FindingKind.HANG, FindingKind.COMMUNICATION_HANG, FindingKind.DESYNC)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    """One process as the supervisor has seen it."""

    index: int
    status: RankStatus
    standing: Standing | None = None
    vitals: Vitals | None = None
    health: Health | None = None
    rank: int | None = None
    """In the current generation, until that has ended for it."""
    is_ended: bool = False
    """By the supervisor."""

    @property
    def number(self) -> int:
        """What messages call it."""
        return self.index if self.rank is None else self.rank

    @property
    def is_gone(self) -> bool:
        return self.is_ended or self.status.exit is not None or self.status.outcome is not None

    def has_left(self, generation: int) -> bool:
        """Whether it is gone, or out of this generation's groups."""
        standing = self.standing
        return self.is_gone or (
            standing is not None and standing.state == "quiesced" and standing.generation >= generation
        )


@dataclass(slots=True)
class _Trouble:
    """How a generation ended, as far as it is known."""

    generation: int
    began_s: float
    is_stall: bool
    """Nobody failed: all stand still, one of them because of itself."""
    losses: dict[int, Loss] = field(default_factory=dict)
    """By member."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds from its begin to each state of recovery."""


@dataclass(frozen=True, slots=True)
class Care:
    """How a job is looked after."""

    limits: Limits
    recovery: Recovery
    diagnosis: Diagnosis | None = None
    """What its ranks record, and what is found in it."""


def supervise(
    fleet: Fleet, job: Job, care: Care, *, stop_grace_s: float, on_output: Callable[[bytes], None]
) -> JobResult:
    """Keep the job going until all its ranks have returned, a stop is over, or going on is pointless; none is left.

    Raises: RankFailed.
    """
    watch = _Watch(fleet, job, care, on_output)
    stop = StopWish()
    stop_at_s: float | None = None
    with signals.caught(stop.note):
        if not watch.start(lambda: stop.requested):
            return watch.finish("stopped")
        while True:
            watch.look()
            if watch.has_finished:
                return watch.finish("completed" if stop_at_s is None else "stopped")
            if stop.requested and stop_at_s is None:
                stop_at_s = watch.now_s
                fleet.request_stop()
            if stop_at_s is not None:
                if stop.impatient or watch.now_s - stop_at_s > stop_grace_s or watch.find():
                    return watch.finish("stopped")
            elif watch.find():
                watch.recover(lambda: stop.requested)
            elif (change := watch.planned()) is not None:
                watch.recover(lambda: stop.requested, change)
            else:
                watch.refill()
            time.sleep(_POLL_S)


class _Watch:
    """All members of the job, and which of them are its ranks."""

    def __init__(self, fleet: Fleet, job: Job, care: Care, on_output: Callable[[bytes], None]) -> None:
        self.fleet = fleet
        self.now_s = 0.0
        self.generation = 0
        self._job, self._limits, self._recovery = job, care.limits, care.recovery
        self._diagnosis = care.diagnosis
        self._on_output = on_output
        self._members: list[_Member] = []
        self._size = job.world_size
        self._is_recovering = False
        self._placed_s = 0.0
        self._resumed_step = -1
        self._saved_when_whole: int | None = None
        self._straggler = self._new_straggler()
        self._num_kept = self._num_before_refill = 0
        self._refilled_s = -_REFILL_S
        self._incidents: list[Incident] = []
        self._read_bytes: dict[int, int] = {}
        self._looked_s = time.monotonic()

    @property
    def ranks(self) -> list[_Member]:
        """The members that have a place in the current generation, by rank."""
        placed = [member for member in self._members if member.rank is not None]
        return sorted(placed, key=lambda member: member.rank or 0)

    @property
    def has_finished(self) -> bool:
        """Whether every rank did its work to the end."""
        return bool(self.ranks) and all(self._is_done(member) for member in self.ranks)

    def look(self) -> None:
        """Bring what is known up to date and pass on what rank 0 printed since."""
        reports = self.fleet.look()
        looked_s = time.monotonic()
        self.now_s += min(looked_s - self._looked_s, LONGEST_TICK_S)
        self._looked_s = looked_s
        for index, report in enumerate(reports):
            if index == len(self._members):
                self._members.append(_Member(index, RankStatus(rank=index)))
            self._learn(self._members[index], report)
        self._pass_on()
        if self._diagnosis is None or self._is_recovering:
            return
        for finding in self._diagnosis.look(self._vitals()):
            if finding.kind.is_fault:
                self._say(told(finding))

    def start(self, is_stopping: Callable[[], bool]) -> bool:
        """Form the first generation as soon as there are ranks enough; whether that was before a stop.

        Raises: RankFailed.
        """
        fence.publish(self._recovery.fence, 0)
        while True:
            self.look()
            ready = self._ready()
            self._num_kept = len(self._members)
            if len(ready) >= self._job.world_size:
                break
            if is_stopping():
                return False
            for member in self._members:
                if member.is_gone:
                    self._fail({member.index: self._own_loss(member)}, None)
            if self.now_s > self._limits.start_timeout_s:
                late = next(member for member in self._members if member not in ready)
                self._fail({late.index: Loss(late.index, "hung", "never joined")}, None)
            time.sleep(_POLL_S)
        self._place(ready[: self._job.world_size])
        return True

    def find(self) -> bool:
        """Whether the current generation cannot go on."""
        return any(self._trouble_of(member) for member in self.ranks) or self._finding(*_STANDSTILLS) is not None

    def planned(self) -> dict[int, Loss] | None:
        """What to change although the generation could go on, by member; None mostly.

        A slow rank that has cost more than its replacement; or nobody, where a run that shrank can be whole again and
        has just saved.
        """
        ready, step = self._ready(), max((m.status.pulse.step for m in self.ranks if m.status.pulse), default=-1)
        if self._size < self._job.world_size:
            if self._size + len(ready) < self._job.world_size:
                self._saved_when_whole = None
                return None
            saved = self._recovery.saved_step()
            if self._saved_when_whole is None:
                self._saved_when_whole = saved
            return {} if saved > self._saved_when_whole else None
        loss = self._straggler.look(self.now_s, step, self._finding(FindingKind.STRAGGLER))
        if loss is None or not ready or not self._recovery.total_steps:
            return None
        return {self.ranks[loss.rank].index: loss}

    def recover(self, is_stopping: Callable[[], bool], planned: Mapping[int, Loss] | None = None) -> None:
        """End the current generation, and form the next one; or wait until one can be formed.

        What is `planned` counts against no budget. Raises: RankFailed where recovery is given up.
        """
        self._is_recovering = True
        found = [self._trouble_of(member) for member in self.ranks]
        is_stall = all(one in (None, "stalled") for one in found)
        trouble = _Trouble(self.generation, self.now_s, is_stall)
        desync = self._finding(FindingKind.DESYNC)
        if desync is not None:
            for rank in desync.culprits or (0,):
                trouble.losses[self.ranks[rank].index] = Loss(rank, "desync", desync.summary)
        # Who was lost while it loaded lost no step: the run has got as far as where it resumed.
        pulses = (member.status.pulse for member in self.ranks)
        step = max((pulse.step for pulse in pulses if pulse is not None), default=-1)
        step = max(step, self._resumed_step)
        fence.publish(self._recovery.fence, self.generation + 1)
        self._mark(trouble, "fenced")
        for index, loss in (planned or {}).items():
            trouble.losses[index] = loss
            self._end(self._members[index])
        self._end_generation(trouble)
        incident = Incident(trouble.began_s, step, tuple(trouble.losses.values()))
        self._say(self._story(incident))
        before = dict(enumerate(self.ranks))
        decision = self._decide(incident, before, is_stopping, self._incidents if planned is None else [])
        if planned is None:
            self._incidents.append(incident)
        if isinstance(decision, Stop):
            self._fail(trouble.losses or {self.ranks[0].index: Loss(0, "hung", "all lost one another")}, decision)
        if decision is None:
            return
        self._mark(trouble, "decided")
        seats = self._seats(before, decision.world_size)
        for member in before.values():
            member.rank = None
        self.generation += 1
        self._place(seats)
        self._say(f"generation {self.generation}: {decision.summary}")
        self._mark(trouble, "assigned")
        self._refill()
        self._await_work(seats)
        self._mark(trouble, "rejoined")
        self._keep_record(trouble, incident, decision)

    def refill(self) -> None:
        """Start new spares for those that ended, while all ranks have work before them."""
        if not any(self._is_done(member) for member in self.ranks):
            self._refill()

    def finish(self, outcome: Literal["completed", "stopped"]) -> JobResult:
        """Let all leave, end what still runs, and tell how the job ended."""
        ranks = self.ranks
        if self.has_finished:
            for member in self._members:
                if not member.is_gone:
                    self.fleet.order(member.index, orders.dismiss())
            deadline_s = self.now_s + self._limits.exit_timeout_s
            while self.now_s < deadline_s and not all(member.status.exit for member in ranks):
                time.sleep(_POLL_S)
                self.look()
            lingering = [member for member in ranks if member.status.exit is None]
            if lingering and outcome == "completed":
                text = "its work is done, but its process has not ended"
                self._fail({member.index: Loss(member.number, "hung", text) for member in lingering}, None)
        self.fleet.kill()
        self._pass_on()
        return JobResult(
            outcome=outcome,
            results=[m.status.outcome.value if isinstance(m.status.outcome, Returned) else None for m in ranks],
            killed=[m.rank for m in ranks if m.rank is not None and m.status.unfinished],
            duration_s=self.now_s,
        )

    # ---- what is seen

    def _vitals(self) -> list[Vitals]:
        """Of the ranks that have not finished, under their numbers in this generation."""
        since_s = self.now_s - self._placed_s
        return [
            replace(vitals, rank=member.rank, progress_age_s=min(vitals.progress_age_s or 0.0, since_s))
            for member in self.ranks
            if (vitals := member.vitals) is not None and member.rank is not None and not self._is_done(member)
        ]

    def _new_straggler(self) -> Straggler:
        recovery = self._recovery
        return Straggler(recovery.policy, recovery.total_steps, recovery.saved_step)

    def _finding(self, *kinds: FindingKind) -> Finding | None:
        """What holds now of these kinds, the gravest; None where nobody looks."""
        current = self._diagnosis.current if self._diagnosis is not None else ()
        return next((finding for finding in current if finding.kind in kinds), None)

    def _learn(self, member: _Member, report: MemberReport) -> None:
        member.vitals = report.vitals
        member.status = verdict.observe(member.status, report.report, self.now_s)
        if report.standing is not None:
            member.standing = report.standing
        member.health = None if report.vitals is None else assess(report.vitals, self._recovery.health)

    def _is_done(self, member: _Member) -> bool:
        if isinstance(member.status.outcome, Returned):
            return True
        standing = member.standing
        return standing is not None and standing.state == "finished" and standing.generation == self.generation

    def _trouble_of(self, member: _Member) -> Loss | Literal["complaint", "stalled"] | None:
        """What keeps a rank from going on: a fault of its own, a peer's that it tells of, or that it stands still."""
        if self._is_done(member):
            return None if not member.is_gone or isinstance(member.status.outcome, Returned) else self._own_loss(member)
        if member.is_gone:
            return self._own_loss(member)
        health = member.health
        if health is not None and health.condition in KINDS:
            is_stopped = health.condition is Condition.FROZEN and health.age_s < _STOPPED_S
            return None if is_stopped else Loss(member.number, KINDS[health.condition], health.reason)
        standing = member.standing
        if standing is not None and standing.generation == self.generation and standing.messages:
            if verdict.tells_of_lost_peer(standing.messages):
                return "complaint"
            return raised(member.number, standing.messages)
        # What it did not do while it waited for this generation to be formed says nothing.
        has_had_time = self.now_s - self._placed_s > self._recovery.health.stalled_after_s
        if health is not None and health.condition is Condition.STALLED and has_had_time:
            return "stalled"
        return None

    def _own_loss(self, member: _Member) -> Loss:
        outcome, ended = member.status.outcome, member.status.exit
        if isinstance(outcome, Raised):
            return raised(member.number, outcome.messages)
        if isinstance(outcome, Returned):
            return Loss(member.number, "dead", "it left before the others")
        return Loss(member.number, "dead", ended.summary if ended is not None else "ended")

    def _ready(self) -> list[_Member]:
        """Members that wait for a place, in the order of their start."""
        return [
            member
            for member in self._members
            if member.rank is None
            and not member.is_gone
            and member.standing is not None
            and member.standing.state in ("standby", "quiesced")
            and (member.health is None or member.health.condition not in KINDS)
        ]

    # ---- what is done

    def _end_generation(self, trouble: _Trouble) -> None:
        """End the ranks at fault, and see all others leave their groups; who does not is at fault."""
        ordered = False
        deadline_s = self.now_s + self._recovery.policy.abort_timeout_s
        while True:
            for member in self.ranks:
                found = self._trouble_of(member)
                if isinstance(found, Loss) and member.index not in trouble.losses:
                    trouble.losses[member.index] = found
                    if found.kind != "raised":
                        self._end(member)
            if not ordered:
                self._mark(trouble, "isolated")
                for member in self.ranks:
                    if not member.is_gone:
                        self.fleet.order(member.index, orders.abort(self.generation))
                ordered = True
            remaining = [member for member in self.ranks if not member.has_left(self.generation)]
            if not remaining:
                break
            if trouble.is_stall and len(remaining) < len(self.ranks):
                # They have all stood still for long: nobody is in the middle of something, but who has not left yet.
                deadline_s = min(deadline_s, self.now_s + _LAGGARD_S)
            if self.now_s > deadline_s:
                self._collect_stacks(remaining)
                for member in remaining:
                    hang = self._finding(FindingKind.HANG)
                    text = "it did not leave when its collectives were broken off"
                    if hang is not None:
                        text += f"; {hang.summary}"
                    trouble.losses[member.index] = Loss(member.number, "hung", text)
                    self._end(member)
                break
            time.sleep(_POLL_S)
            self.look()
        self._mark(trouble, "quiesced")

    def _decide(
        self,
        incident: Incident,
        before: dict[int, _Member],
        is_stopping: Callable[[], bool],
        incidents: Sequence[Incident],
    ) -> Resume | Shrink | Stop | None:
        """What to do, once something can be done and its pause is over; None if a stop was asked for meanwhile."""
        told, due_s = "", None
        while not is_stopping():
            ready = self._ready()
            in_place = [member for member in before.values() if not member.is_gone]
            alive = [member for member in self._members if not member.is_gone]
            situation = Situation(
                now_s=self.now_s,
                full_size=self._job.world_size,
                ranks_left=len(in_place),
                spares_ready=len(ready),
                spares_starting=len(alive) - len(ready) - len(in_place),
                smaller_sizes=self._recovery.smaller_sizes,
            )
            decision = policy.decide(incident, incidents, situation, self._recovery.policy)
            if isinstance(decision, Stop):
                return decision
            if isinstance(decision, Resume | Shrink):
                due_s = self.now_s + decision.after_s if due_s is None else due_s
                if self.now_s >= due_s:
                    return decision
            elif not told:
                told = decision.summary
                self._say(f"waits: {told}")
            self._refill()
            time.sleep(_POLL_S)
            self.look()
        return None

    def _pause(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            time.sleep(_POLL_S)
            self.look()

    def _seats(self, before: dict[int, _Member], size: int) -> list[_Member]:
        """Who is which rank now: survivors stay where they were, spares fill the gaps; with fewer ranks all move up."""
        staying = {rank: member for rank, member in before.items() if not member.is_gone}
        spares = self._ready()
        if size < len(before):
            return [*(staying[rank] for rank in sorted(staying)), *spares][:size]
        rest = iter(spares)
        return [staying[rank] if rank in staying else next(rest) for rank in range(size)]

    def _place(self, seats: list[_Member]) -> None:
        """Give every rank of the current generation its place."""
        self._size = len(seats)
        self._is_recovering, self._placed_s = False, self.now_s
        self._resumed_step = self._recovery.saved_step() if self.generation else -1
        self._saved_when_whole = None
        self._straggler = self._new_straggler()
        if self._diagnosis is not None:
            self._diagnosis.begin(self.generation, self._size)
        places = self.fleet.places([member.index for member in seats])
        for rank, (member, place) in enumerate(zip(seats, places, strict=True)):
            member.rank = rank
            self.fleet.order(member.index, orders.assign(self.generation, place))

    def _await_work(self, seats: list[_Member]) -> None:
        """Return when all have taken their places, or one of them is in trouble again."""
        deadline_s = self.now_s + self._recovery.policy.abort_timeout_s
        while self.now_s < deadline_s and not self.find():
            standings = [member.standing for member in seats]
            if all(s is not None and s.generation == self.generation for s in standings):
                return
            time.sleep(_POLL_S)
            self.look()

    def _refill(self) -> None:
        """Start new spares for the members that are gone; not at once again when one of the last ones is."""
        missing = self._num_kept - sum(not member.is_gone for member in self._members)
        has_failed = any(member.is_gone for member in self._members[self._num_before_refill :])
        if missing > 0 and not (has_failed and self.now_s < self._refilled_s + _REFILL_S):
            for member in self._members:
                if member.is_gone and not member.is_ended and member.status.exit is None:
                    self._end(member)  # its process lingers in the place that its successor takes
            self._refilled_s, self._num_before_refill = self.now_s, len(self._members)
            for _ in range(missing):
                self.fleet.add()
            self.look()

    def _end(self, member: _Member) -> None:
        self.fleet.end(member.index)
        member.is_ended = True

    def _collect_stacks(self, members: Sequence[_Member]) -> None:
        self.fleet.dump_stacks([member.index for member in members if not member.is_gone])
        self._pause(STACKS_S)

    # ---- what is told

    def _say(self, text: str) -> None:
        self._on_output(f"[{self._job.name}] {text}\n".encode())

    def _story(self, incident: Incident) -> str:
        if not incident.losses and self._size < self._job.world_size:
            return f"generation {self.generation} ends at step {incident.step}: the run can be whole again"
        if not incident.losses:
            return f"generation {self.generation} ended at step {incident.step}: the ranks lost one another"
        told = "; ".join(f"rank {loss.rank} {loss.kind}: {loss.detail}" for loss in incident.losses)
        return f"generation {self.generation} ended at step {incident.step}: {told}"

    def _mark(self, trouble: _Trouble, state: str) -> None:
        trouble.times[state] = round(time.monotonic() - self._looked_s + self.now_s - trouble.began_s, 4)

    def _keep_record(self, trouble: _Trouble, incident: Incident, decision: Resume | Shrink) -> None:
        line = {
            "time": round(time.time(), 3),
            "generation": self.generation,
            "step": incident.step,
            "losses": [asdict(loss) for loss in incident.losses],
            "decision": decision.summary,
            "world_size": decision.world_size,
            "after_s": trouble.times,
        }
        self._recovery.record.parent.mkdir(parents=True, exist_ok=True)
        with open(self._recovery.record, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _fail(self, losses: Mapping[int, Loss], decision: Stop | None) -> NoReturn:
        """End every member and raise the RankFailed that tells of all, the one at fault first."""
        index, first = next(iter(losses.items()))
        why = {member: f"{loss.kind}: {loss.detail}" for member, loss in losses.items()}
        if decision is not None:
            why[index] += f"; recovery was given up ({decision.cause}): {decision.summary}"
        told = self.ranks or self._members
        self._collect_stacks([member for member in told if member.index in losses])
        self.fleet.kill()
        ended = self._members[index].status.exit
        raise RankFailed(
            job_name=self._job.name,
            rank=first.rank,
            reason=REASONS[first.kind],
            exit_code=ended.code if ended is not None else None,
            signal=ended.signal if ended is not None else None,
            notes=[self._note(member, why.get(member.index, "")) for member in told],
        )

    def _note(self, member: _Member, why: str) -> RankNote:
        path = member_log(self._job, member.index)
        outcome, standing = member.status.outcome, member.standing
        text = standing.traceback if standing is not None and why else ""
        if isinstance(outcome, Raised):
            text = outcome.traceback
        pulse = member.status.pulse
        where = f"at step {pulse.step} ({pulse.phase})" if pulse is not None else "had not joined yet"
        return RankNote(rank=member.number, summary=why or where, traceback=text, log=str(path), log_tail=tail(path))

    def _pass_on(self) -> None:
        """Pass on what the member that is rank 0 printed since."""
        first = next((member for member in self._members if member.rank == 0), None)
        if first is None:
            return
        with open(member_log(self._job, first.index), "rb") as file:
            file.seek(self._read_bytes.get(first.index, 0))
            new = file.read()
        if new:
            self._read_bytes[first.index] = self._read_bytes.get(first.index, 0) + len(new)
            self._on_output(new)
