"""The loop that watches a job which outlives its ranks: it replaces whom it loses, and lets the others go on.

    starting ──> running ──> ending a generation ──> deciding ──> running (the next generation)
                    │                                    └─────> given up
                    └──> finished

A generation ends as soon as one of its ranks cannot go on. It is fenced first; then the ranks at fault are ended and
all others told to leave their collectives. Whoever does not leave them in time is at fault too: that is how a rank
that hangs outside of a collective shows itself, whatever the others saw. Nothing is decided before every process of
the generation has left its groups or is gone.

`member` knows one process, `roster` all, `narration` tells, `isolation` ends a generation; here is what is done when.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from faulttol import fence, policy
from faulttol.finding import Finding, FindingKind
from faulttol.health import Condition
from faulttol.policy import Incident, Loss, Resume, Shrink, Situation, Stop
from faulttol.rules.numeric import lone_outlier
from launch import orders, signals
from launch.diagnosis import Diagnosis, told
from launch.entry import Returned
from launch.errors import LaunchError
from launch.fleet import Fleet, Recovery
from launch.isolation import Isolation
from launch.job import Job, JobResult
from launch.losses import FENCED
from launch.member import Ending, Member, Trouble
from launch.narration import Narrator
from launch.roster import POLL_S, Roster
from launch.slowness import Straggler
from launch.supervisor import StopWish
from launch.verdict import Limits

_STANDSTILLS = (FindingKind.HANG, FindingKind.COMMUNICATION_HANG, FindingKind.DESYNC)


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
    narrator = Narrator(job, care.recovery.record, on_output)
    roster = Roster(fleet, care.recovery.health, care.limits.start_timeout_s, narrator.tell)
    watch = _Watch(roster, job, care, narrator)
    stop = StopWish()
    stop_at_s: float | None = None
    with signals.caught(stop.note):
        if not watch.start(lambda: stop.requested):
            return watch.finish("stopped")
        while True:
            watch.look()
            if watch.has_finished and (stop_at_s is not None or not watch.ends_wrong()):
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
            time.sleep(POLL_S)


def refuse_if_begun(recovery: Recovery) -> None:
    """Raises: LaunchError where the run has come to a generation that this launch was to begin with, or further."""
    with contextlib.suppress(OSError, ValueError):  # there is none, or nobody can tell: then it is made anew
        current = fence.current_generation(recovery.fence)
        if current >= recovery.first_generation:
            raise LaunchError(
                f"{recovery.fence}: generation {current} of the run has begun, and this launch was to begin with "
                f"{recovery.first_generation}; let the other launch go on, or end it and resume; if none runs, "
                f"Recovery.first_generation is to be above {current}"
            )


class _Watch:
    """One generation of the job after another."""

    def __init__(self, roster: Roster, job: Job, care: Care, narrator: Narrator) -> None:
        self.generation = care.recovery.first_generation
        self._roster = roster
        self._job, self._limits, self._recovery = job, care.limits, care.recovery
        self._diagnosis = care.diagnosis
        self._narrator = narrator
        self._size = job.world_size
        self._is_recovering = False
        self._placed_s = 0.0
        self._resumed_step = -1
        self._first_step: int | None = None
        """That any rank was seen in since it got its place in this generation."""
        self._counts: dict[int, int] = {}
        """Of the members' progress when they got their places."""
        self._saved_when_whole: int | None = None
        self._last_saved, self._is_blind = -1, False
        self._straggler = self._new_straggler()
        self._incidents: list[Incident] = []

    @property
    def now_s(self) -> float:
        return self._roster.now_s

    @property
    def ranks(self) -> list[Member]:
        return self._roster.ranks

    @property
    def has_finished(self) -> bool:
        """Whether every rank did its work to the end."""
        return bool(self.ranks) and all(self._is_done(member) for member in self.ranks)

    def look(self) -> None:
        """Bring what is known up to date and pass on what rank 0 printed since."""
        self._roster.look()
        self._note_first_step()
        self._narrator.pass_on(self._roster)
        self._diagnose()

    def start(self, is_stopping: Callable[[], bool]) -> bool:
        """Form the first generation as soon as there are ranks enough; whether that was before a stop.

        Raises: RankFailed.
        """
        self._begin_fence()
        while True:
            self.look()
            ready, members = self._roster.ready, self._roster.members
            self._roster.num_kept = len(members)
            if len(ready) >= self._job.world_size:
                break
            if is_stopping():
                return False
            gone = [member for member in members if member.is_gone]
            if len(members) - len(gone) < self._job.world_size:
                self._fail({member.index: member.own_loss() for member in gone}, None)
            if self.now_s > self._limits.start_timeout_s:
                late = next(member for member in members if member not in ready and not member.is_gone)
                self._fail({late.index: Loss(late.index, "hung", "never joined")}, None)
            time.sleep(POLL_S)
        self._place(ready[: self._job.world_size])
        return True

    def find(self) -> bool:
        """Whether the current generation cannot go on."""
        return (
            any(self._trouble_of(member) for member in self.ranks)
            or self._finding(*_STANDSTILLS) is not None
            or self._outlier() is not None
        )

    def ends_wrong(self) -> bool:
        """Whether all that was recorded up to the end has a gradient that must not be gone on from."""
        self._diagnose(at_once=True)
        return self._outlier() is not None

    def planned(self) -> dict[int, Loss] | None:
        """What to change although the generation could go on, by member; None mostly.

        A slow rank that has cost more than its replacement; or nobody, where a run that shrank can be whole again and
        has just saved.
        """
        ready = self._roster.ready
        if self._size < self._job.world_size:
            if self._size + len(ready) < self._job.world_size:
                self._saved_when_whole = None
                return None
            saved = self._saved_step()
            if self._saved_when_whole is None:
                self._saved_when_whole = saved
            return {} if saved > self._saved_when_whole else None
        loss = self._straggler.look(self.now_s, self._roster.step, self._slow_rank())
        if loss is None or not ready or not self._recovery.total_steps:
            return None
        return {self.ranks[loss.rank].index: loss}

    def recover(self, is_stopping: Callable[[], bool], planned: Mapping[int, Loss] | None = None) -> None:
        """End the current generation, and form the next one; or wait until one can be formed.

        What is `planned` counts against no budget. Raises: RankFailed where recovery is given up.
        """
        self._is_recovering = True
        found = [self._trouble_of(member) for member in self.ranks]
        met = [loss for loss in found if isinstance(loss, Loss) and loss.error == FENCED]
        if self._is_overtaken():  # whatever befell the ranks: to fence now would end the other launch's
            over = f"{FENCED}: generation {self.generation} is over: another launch has the run"
            loss = met[0] if met else Loss(0, "raised", over, FENCED)
            self._fail({self.ranks[loss.rank].index: loss}, None)
        for loss in met:  # not by this launch: it has not fenced them yet
            self._narrator.say(f"rank {loss.rank}: {loss.detail}; but no other launch has taken the run over")
        is_stall = all(one in (None, "stalled") for one in found)
        ending = Ending(self.generation, self.now_s, is_stall)
        # Who was lost while it loaded lost no step: the run has got as far as where it resumed.
        step = max(self._roster.step, self._resumed_step)
        self._fence(self.generation + 1)
        self._roster.mark(ending, "fenced")
        outlier = self._outlier()
        isolation = Isolation(self._roster, ending, self._trouble_of, self._finding, self.look)
        isolation.accuse(planned or {}, outlier)
        isolation.run(
            self._recovery.policy.abort_timeout_s,
            lambda member: 1.0 if is_stopping() else self._patience(member),
            self._narrator.say,
        )
        self._distrust(outlier)  # ranks, which may write the same of what they compared, have left by now
        incident = Incident(ending.began_s, step, tuple(ending.losses.values()))
        is_whole = self._size == self._job.world_size
        self._narrator.end_of(self.generation, incident, self.ranks, is_whole=is_whole)
        before = dict(enumerate(self.ranks))
        self._roster.hurry()
        decision = self._decide(incident, before, is_stopping, self._incidents if planned is None else [])
        if planned is None:
            self._incidents.append(incident)
        if isinstance(decision, Stop):
            self._narrator.keep(self.generation, ending, incident, decision)
            self._fail(ending.losses or {self.ranks[0].index: Loss(0, "hung", "all lost one another")}, decision)
        if decision is None:
            return
        self._roster.mark(ending, "decided")
        seats = self._roster.seats(before, decision.world_size)
        for member in before.values():
            member.rank = None
        self.generation += 1
        self._place(seats)
        self._narrator.say(f"generation {self.generation}: {decision.summary}")
        self._roster.mark(ending, "assigned")
        self._refill()
        self._await_work(seats)
        self._roster.mark(ending, "rejoined")
        self._narrator.keep(self.generation, ending, incident, decision)

    def refill(self) -> None:
        """Start new spares for those that ended, while all ranks have work before them."""
        if not any(self._is_done(member) for member in self.ranks):
            self._refill()

    def finish(self, outcome: Literal["completed", "stopped"]) -> JobResult:
        """Let all leave, end what still runs, and tell how the job ended."""
        ranks, fleet = self.ranks, self._roster.fleet
        if not self.has_finished:
            self._tell_unsaved()
        ends_wrong = outcome == "stopped" and self.ends_wrong()
        if self.has_finished:
            for member in self._roster.members:
                if not member.is_gone:
                    fleet.order(member.index, orders.dismiss())
            deadline_s = self.now_s + self._limits.exit_timeout_s
            while self.now_s < deadline_s and not all(member.status.exit for member in ranks):
                time.sleep(POLL_S)
                self.look()
            lingering = [member for member in ranks if member.status.exit is None]
            if lingering and outcome == "completed":
                text = "its work is done, but its process has not ended"
                self._fail({member.index: Loss(member.number, "hung", text) for member in lingering}, None)
        self._kill()
        self._narrator.pass_on(self._roster)
        if ends_wrong:
            self._distrust(self._outlier())
        return JobResult(
            outcome=outcome,
            results=[m.status.outcome.value if isinstance(m.status.outcome, Returned) else None for m in ranks],
            killed=[m.rank for m in ranks if m.rank is not None and m.status.unfinished],
            duration_s=self.now_s,
        )

    # ---- what is seen

    def _finding(self, *kinds: FindingKind) -> Finding | None:
        """What holds now of these kinds, the gravest; None where nobody looks."""
        current = self._diagnosis.current if self._diagnosis is not None else ()
        return next((finding for finding in current if finding.kind in kinds), None)

    def _slow_rank(self) -> Finding | None:
        """A rank that is slow: in its work, or in all that it sends or receives. A link's two ends are not."""
        transfer = self._finding(FindingKind.COMMUNICATION_SLOW)
        is_rank = transfer is not None and len(transfer.suspects) == 1 and not transfer.suspects[0].is_link
        return self._finding(FindingKind.STRAGGLER) or (transfer if is_rank else None)

    def _outlier(self) -> Finding | None:
        """A gradient unlike the others' before they were added up, where one rank alone has it."""
        if self._diagnosis is None or not self._recovery.acts_on_outliers:
            return None
        later = (finding for finding in self._diagnosis.current if finding.step > self._resumed_step)
        return next((finding for finding in later if lone_outlier(finding) is not None), None)

    def _new_straggler(self) -> Straggler:
        return Straggler(self._recovery.policy, self._recovery.total_steps, self._saved_step)

    def _saved_step(self) -> int:
        """The newest step that the job could go on from; as it was, while the disk does not answer, which is told."""
        try:
            self._last_saved, self._is_blind = self._recovery.saved_step(), False
        except OSError as error:
            if not self._is_blind:
                self._narrator.say(f"cannot tell what is saved, and takes it for as much as before: {error}")
            self._is_blind = True
        return self._last_saved

    def _is_done(self, member: Member) -> bool:
        return member.is_done(self.generation)

    def _trouble_of(self, member: Member) -> Trouble | None:
        return member.trouble(self.generation, self.now_s - self._placed_s, self._recovery.health)

    def _patience(self, member: Member) -> float:
        """How many times as long as others it may take to leave: it may load, or compile, which nothing breaks off."""
        pulse, health = member.status.pulse, self._recovery.health
        if pulse is None or (member.health is not None and member.health.condition is not Condition.RUNNING):
            return 1.0
        # Where the first look came while it fetched its first data, it was still in the step that it resumed from.
        is_first_step = self._first_step is None or pulse.step <= self._first_step + 1
        return health.patience if is_first_step or pulse.phase in health.patient_phases else 1.0

    def _is_overtaken(self) -> bool:
        """Whether another launch published its generation; a rank that says so may have failed to read the fence."""
        try:
            return fence.current_generation(self._recovery.fence) != self.generation
        except (OSError, ValueError):  # where it cannot be written either, the next generation cannot be fenced
            return False

    # ---- what is done

    def _diagnose(self, *, at_once: bool = False) -> None:
        if self._diagnosis is None or self._is_recovering:
            return
        vitals = self._roster.vitals(self.generation, self._placed_s)
        for finding in self._diagnosis.look(vitals, at_once=at_once):
            if finding.kind.is_fault:
                self._narrator.say(told(finding))

    def _note_first_step(self) -> None:
        pulses = ((member, member.status.pulse) for member in self.ranks)
        steps = [
            pulse.step
            for member, pulse in pulses
            if pulse is not None
            and pulse.step > 0
            and pulse.phase not in self._recovery.health.patient_phases
            and pulse.progress_count != self._counts.get(member.index)
        ]
        if steps:
            self._first_step = min(steps if self._first_step is None else (*steps, self._first_step))

    def _distrust(self, outlier: Finding | None) -> None:
        """Let nothing go on from after an outlier. Raises: LaunchError where that cannot be written down."""
        if outlier is None:
            return
        step = outlier.step - 1
        try:
            self._recovery.distrust(step, outlier.summary)
        except OSError as error:
            raise LaunchError(
                f"cannot write down that no checkpoint after step {step} is to be gone on from ({outlier.summary}): "
                f"{error}; make room, remove those checkpoints, and resume"
            ) from error
        self._narrator.say(f"no checkpoint after step {step} is gone on from: {outlier.summary}")

    def _tell_unsaved(self) -> None:
        """Say why a stop that was asked for saves nothing, where that is so."""
        found = [loss for member in self.ranks if isinstance(loss := self._trouble_of(member), Loss)]
        if not self.ranks:
            self._narrator.say("stopped as asked before all its ranks were ready: nothing was trained since its start")
        elif found:
            told = "; ".join(f"rank {loss.rank} {loss.kind}: {loss.detail}" for loss in found)
            self._narrator.say(f"asked to stop, but {told}; the others cannot save without it and are ended")

    def _decide(
        self,
        incident: Incident,
        before: dict[int, Member],
        is_stopping: Callable[[], bool],
        incidents: Sequence[Incident],
    ) -> Resume | Shrink | Stop | None:
        """What to do, once something can be done and its pause is over; None if a stop was asked for meanwhile."""
        told, due_s = "", None
        while not is_stopping():
            ready = self._roster.ready
            in_place = [member for member in before.values() if not member.is_gone]
            alive = [member for member in self._roster.members if not member.is_gone]
            situation = Situation(
                now_s=self.now_s,
                full_size=self._job.world_size,
                ranks_left=len(in_place),
                spares_ready=len(ready),
                spares_starting=len(alive) - len(ready) - len(in_place),
                failed_starts=self._roster.num_failed,
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
                self._narrator.say(f"waits: {told}")
            self._refill()
            time.sleep(POLL_S)
            self.look()
        return None

    def _place(self, seats: list[Member]) -> None:
        """Give every rank of the current generation its place."""
        self._size = len(seats)
        recovery, self._is_recovering, self._placed_s = self._recovery, False, self.now_s
        self._first_step = None
        pulses = ((member, member.status.pulse) for member in seats)
        self._counts = {member.index: pulse.progress_count for member, pulse in pulses if pulse is not None}
        self._resumed_step = -1 if self.generation == recovery.first_generation else self._saved_step()
        self._saved_when_whole = None
        self._straggler = self._new_straggler()
        if self._diagnosis is not None:
            self._diagnosis.begin(self.generation, self._size)
        fleet = self._roster.fleet
        places = fleet.places([member.index for member in seats])
        for rank, (member, place) in enumerate(zip(seats, places, strict=True)):
            member.rank, member.has_had_place = rank, True
            fleet.order(member.index, orders.assign(self.generation, place))

    def _await_work(self, seats: list[Member]) -> None:
        """Return when all have taken their places, or one of them is in trouble again."""
        deadline_s = self.now_s + self._recovery.policy.abort_timeout_s
        while self.now_s < deadline_s and not self.find():
            standings = [member.standing for member in seats]
            if all(s is not None and s.generation == self.generation for s in standings):
                return
            time.sleep(POLL_S)
            self.look()

    def _refill(self) -> None:
        if self._roster.refill():
            self.look()

    def _begin_fence(self) -> None:
        """Keep out who is of an earlier launch. Raises: LaunchError where a later one has begun meanwhile."""
        refuse_if_begun(self._recovery)
        self._fence(self.generation)

    def _fence(self, generation: int) -> None:
        """Keep older generations out. Raises: LaunchError where that cannot be, and so nobody may go on."""
        try:
            fence.publish(self._recovery.fence, generation)
        except OSError as error:
            raise LaunchError(
                f"{self._recovery.fence}: cannot fence generation {generation}: {error}; nothing goes on that an older "
                "generation could overwrite: make room, and resume"
            ) from error

    def _kill(self) -> None:
        """End every member; one that stays is told of, and changes nothing of how the job went."""
        try:
            self._roster.fleet.kill()
        except LaunchError as error:
            self._narrator.say(str(error))

    def _fail(self, losses: Mapping[int, Loss], decision: Stop | None) -> NoReturn:
        """End every member and raise the RankFailed that tells of all, the one at fault first."""
        told = self.ranks or self._roster.members
        self._roster.collect_stacks([member for member in told if member.index in losses])
        self._kill()
        raise self._narrator.failure(self._roster, losses, decision)
