"""How a generation ends: the ranks at fault are ended, all others leave their groups; who does not is at fault too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from faulttol.finding import Finding, FindingKind
from faulttol.policy import Loss
from launch import orders
from launch.losses import FENCED
from launch.member import Ending, Member, Trouble
from launch.roster import POLL_S, Roster

_LAGGARD_S = 1.0  # for the last ones to leave a generation that stands still, once others have
_NAMED_LAGGARD_S = 0.1  # where those are whom the records name: who waits for nobody leaves no collective


class Isolation:
    """Ends one generation."""

    def __init__(
        self,
        roster: Roster,
        ending: Ending,
        trouble_of: Callable[[Member], Trouble | None],
        finding: Callable[..., Finding | None],
        look: Callable[[], None],
    ) -> None:
        """`finding` is the gravest one of some kinds that holds; `look` brings what is known up to date."""
        self._roster, self._ending = roster, ending
        self._trouble_of, self._finding, self._look = trouble_of, finding, look

    def accuse(self, planned: Mapping[int, Loss], outlier: Finding | None) -> None:
        """Take for lost whom the records of the generation, or the plan, name; their processes need not show it."""
        roster, ending = self._roster, self._ending
        desync = self._finding(FindingKind.DESYNC)
        for rank in (desync.culprits or (0,)) if desync is not None else ():
            assert desync is not None
            ending.losses[roster.ranks[rank].index] = Loss(rank, "desync", desync.summary)
        accused = dict(planned)
        if outlier is not None:
            (rank,) = outlier.culprits
            accused[roster.ranks[rank].index] = Loss(rank, "numeric", outlier.summary)
        for index, loss in accused.items():
            ending.losses[index] = loss
            roster.end(roster.members[index])

    def run(self, timeout_s: float, patience_of: Callable[[Member], float], say: Callable[[str], None]) -> None:
        """End the ranks at fault, and see all others leave their groups; who does not in time is at fault as well.

        `patience_of` is the factor on `timeout_s` for what a member does now; who is waited for for longer is said.
        """
        roster, ending = self._roster, self._ending
        ordered = has_told = False
        began_s, laggard_s = roster.now_s, math.inf
        while True:
            self._end_lost()
            if not ordered:
                roster.mark(ending, "isolated")
                for member in roster.ranks:
                    if not member.is_gone:
                        roster.fleet.order(member.index, orders.abort(ending.generation))
                ordered = True
            remaining = [member for member in roster.ranks if not member.has_left(ending.generation)]
            if not remaining:
                break
            if ending.is_stall and len(remaining) < len(roster.ranks):
                # They have all stood still for long: nobody is in the middle of something, but who has not left yet.
                named = hang.culprits if (hang := self._finding(FindingKind.HANG)) is not None else ()
                is_named = all(member.rank in named for member in remaining)
                laggard_s = min(laggard_s, roster.now_s + (_NAMED_LAGGARD_S if is_named else _LAGGARD_S))
            late = [
                member
                for member in remaining
                if roster.now_s > min(began_s + timeout_s * patience_of(member), laggard_s)
            ]
            if late:
                roster.collect_stacks(late)
                hang = self._finding(FindingKind.HANG)
                text = "it did not leave when its collectives were broken off" + (f"; {hang.summary}" if hang else "")
                for member in late:
                    ending.losses[member.index] = Loss(member.number, "hung", text)
                    roster.end(member)
                continue
            if roster.now_s > began_s + timeout_s and not has_told:
                has_told = True
                doing = ", ".join(f"rank {member.rank} ({_phase_of(member)})" for member in remaining)
                longest_s = timeout_s * max(patience_of(member) for member in remaining)
                say(f"waits for {doing} to leave, {longest_s:g} s at most: what it does cannot be broken off")
            time.sleep(POLL_S)
            self._look()
        roster.mark(ending, "quiesced")

    def _end_lost(self) -> None:
        """End the ranks that are in trouble of their own, or whose numbers others found to be wrong."""
        roster, ending = self._roster, self._ending
        for member in roster.ranks:
            found = self._trouble_of(member)
            # A fence that was met now is the one that ends this generation.
            if isinstance(found, Loss) and found.error != FENCED and member.index not in ending.losses:
                ending.losses[member.index] = found
                if found.kind != "raised":
                    roster.end(member)
                if found.kind == "dead" and member.status.exit is None:
                    self._look()  # its process was seen to be gone; now that it is reaped, it is known how it went
                    if member.status.exit is not None:
                        ending.losses[member.index] = member.own_loss()
        for witness in roster.ranks:
            for rank in witness.accuses(ending.generation) or ():
                member = roster.ranks[rank]
                if member.index not in ending.losses:  # it was broken off before it could tell as well
                    assert witness.standing is not None
                    ending.losses[member.index] = Loss(rank, "numeric", witness.standing.messages[0])
                    roster.end(member)


def _phase_of(member: Member) -> str:
    return member.status.pulse.phase if member.status.pulse is not None else "starts"
