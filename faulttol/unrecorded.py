"""Ranks that take part and record nothing, as one whose ring has no room: of a hang they are not accused.

Who waits for whom is read from records, and a rank without one seems never to have come. While all ranks record, this
changes nothing. Of a rank that does not, only its signs of life tell that it stands still.
"""

from __future__ import annotations

from collections.abc import Iterable

from faulttol.finding import Finding, FindingKind
from faulttol.view import JobView

_ROOTED = frozenset({"broadcast", "reduce", "scatter", "gather"})  # over for some members before others have come


def without_unrecorded(view: JobView, findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings but for hangs of ranks without a record that were in collectives which others ended.

    Before the others have ended any with it, a rank without a record may well be one that never began.
    """
    return tuple(
        finding
        for finding in findings
        if finding.kind is not FindingKind.HANG
        or not finding.culprits
        or not all(_takes_part_unrecorded(view, rank) for rank in finding.culprits)
    )


def _takes_part_unrecorded(view: JobView, rank: int) -> bool:
    return rank not in view.records and any(
        event.state == "ended" and rank in event.group_ranks and not event.is_message and event.kind not in _ROOTED
        for record in view.records.values()
        for event in record.events
    )
