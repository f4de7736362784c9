"""What a job that outlives its ranks tells: lines as it goes on, a record of each recovery, the error at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from faulttol.policy import Incident, Loss, Resume, Shrink, Stop
from launch.entry import Raised
from launch.errors import RankFailed, RankNote
from launch.fleet import member_log
from launch.job import Job
from launch.losses import REASONS
from launch.member import Ending, Member
from launch.records import append_line
from launch.roster import Roster
from launch.supervisor import read_from, tail


class Narrator:
    """Tells of one job."""

    def __init__(self, job: Job, record: Path, on_output: Callable[[bytes], None]) -> None:
        self._job, self._record, self._on_output = job, record, on_output
        self._read_bytes: dict[int, int] = {}

    def say(self, text: str) -> None:
        """Pass on a line of the supervisor's own."""
        self._on_output(f"[{self._job.name}] {text}\n".encode())

    def tell(self, text: str, member: Member | None = None) -> None:
        """Pass on a line of the supervisor's own, on a process that has no place where one is given."""
        if member is not None:
            path = member_log(self._job, member.index)
            text = f"{path.stem}: {text} (log: {path})"
        self.say(text)

    def pass_on(self, roster: Roster) -> None:
        """Pass on what the member that is rank 0 printed since."""
        first = next((member for member in roster.members if member.rank == 0), None)
        if first is None:
            return
        new = read_from(member_log(self._job, first.index), self._read_bytes.get(first.index, 0))
        if new:
            self._read_bytes[first.index] = self._read_bytes.get(first.index, 0) + len(new)
            self._on_output(new)

    def end_of(self, generation: int, incident: Incident, ranks: Sequence[Member], *, is_whole: bool) -> None:
        """Say why a generation ended; `is_whole` where it had all its ranks."""
        if not incident.losses and not is_whole:
            self.say(f"generation {generation} ends at step {incident.step}: the run can be whole again")
            return
        told = "; ".join(f"rank {loss.rank} {loss.kind}: {loss.detail}" for loss in incident.losses)
        if not told:
            said = "; ".join(f"rank {one.number} said {one.afterwards}" for one in ranks if one.afterwards)
            told = "the ranks lost one another" + (f"; {said}" if said else "")
        self.say(f"generation {generation} ended at step {incident.step}: {told}")

    def keep(self, generation: int, ending: Ending, incident: Incident, decision: Resume | Shrink | Stop) -> None:
        """Append a recovery, to this generation, to the record; or that there is none, after this generation."""
        told, size = decision.summary, 0
        if isinstance(decision, Stop):
            told = f"recovery is given up ({decision.cause}): {told}"
        else:
            size = decision.world_size
        line = {
            "time": round(time.time(), 3),
            "generation": generation,
            "step": incident.step,
            "losses": [asdict(loss) for loss in incident.losses],
            "decision": told,
            "world_size": size,
            "after_s": ending.times,
        }
        append_line(self._record, line)

    def failure(self, roster: Roster, losses: Mapping[int, Loss], decision: Stop | None) -> RankFailed:
        """The error that tells of all members, the one at fault first."""
        index, first = next(iter(losses.items()))
        why = {member: f"{loss.kind}: {loss.detail}" for member, loss in losses.items()}
        if decision is not None:
            why[index] += f"; recovery was given up ({decision.cause}): {decision.summary}"
        ended = roster.members[index].status.exit
        return RankFailed(
            job_name=self._job.name,
            rank=first.rank,
            reason=REASONS[first.kind],
            exit_code=ended.code if ended is not None else None,
            signal=ended.signal if ended is not None else None,
            notes=[self._note(member, why.get(member.index, "")) for member in roster.ranks or roster.members],
        )

    def _note(self, member: Member, why: str) -> RankNote:
        path = member_log(self._job, member.index)
        outcome, standing = member.status.outcome, member.standing
        text = standing.traceback if standing is not None and (why or member.afterwards) else ""
        if isinstance(outcome, Raised):
            text = outcome.traceback
        pulse = member.status.pulse
        where = f"at step {pulse.step} ({pulse.phase})" if pulse is not None else "had not joined yet"
        where += f"; when its generation had ended: {member.afterwards}" if member.afterwards else ""
        return RankNote(rank=member.number, summary=why or where, traceback=text, log=str(path), log_tail=tail(path))
