"""What stops a job: processes that are gone, frozen or stuck, hangs, and collectives that do not fit together."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from statistics import quantiles

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.events import CollectiveEvent, RankRecord
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.health import Condition, Health, assess
from faulttol.rules.program import deviation, mismatches
from faulttol.rules.waiting import Chain, chains
from faulttol.view import JobView

_LAST = 8
"""Of a dead rank's events, those that can have been open when it died."""
_OF_ANOTHER = 2
"""How the record of a rank ends that died of an operation that failed."""
_SOON_S = 0.5
_BY_CONDITION = {
    Condition.DEAD: FindingKind.CRASH,
    Condition.LOST: FindingKind.CRASH,
    Condition.FROZEN: FindingKind.FREEZE,
    Condition.STUCK: FindingKind.STUCK,
}


def stops(view: JobView, config: DetectorConfig, health: HealthConfig) -> list[Finding]:
    """Return what keeps the job from getting further.

    Where all that are gone died of another just now, that one may be on its way out: a busy machine takes a killed
    process apart more slowly than its peers die of it. Nobody is accused for half a second then.

    Who is gone, frozen or stuck explains why others wait; so hangs are reported only when no rank is. What does not
    fit together explains why ranks died of it; so does an operation that a rank never made before and that failed.
    """
    conditions = [assess(vitals, health) for _, vitals in sorted(view.vitals.items())]
    sick = [found for found in conditions if found.condition in _BY_CONDITION]
    if _may_be_victims(view, sick):
        sick = []
    unwell = _unwell(view, sick)
    wrong = mismatches(view, config) or _refused(view, [found.rank for found in sick])
    if wrong:
        victims = {rank for rank, record in view.records.items() if _death(record) > 0}
        accused = {rank for finding in wrong for rank in finding.culprits}
        return wrong + [finding for finding in unwell if not set(finding.culprits) <= victims | accused]
    if unwell:
        return unwell
    hangs = [_hang(view, chain) for chain in chains(view) if chain.age_s > patience_s(view, chain, config, health)]
    return hangs or _idle(view, conditions)


def patience_s(view: JobView, chain: Chain, config: DetectorConfig, health: HealthConfig) -> float:
    """For how many seconds an operation may be open before it hangs."""
    example = next(iter(chain.operation.events.values()))
    usual_s = _usual_s(view, example, config, health)
    limit_s = max(config.hang_after_s, config.hang_factor * usual_s)
    if any(_phase(view, rank) in health.patient_phases for rank in chain.ranks):
        return limit_s * health.patience
    if chain.kind == "sink" and _opens(view, chain.ranks[0]):  # others give a standing loop up at `stalled_after_s`
        return max(limit_s, min(limit_s * health.patience, health.stalled_after_s / 2))
    return limit_s


def _opens(view: JobView, rank: int) -> bool:
    """Whether a rank that marks its steps is in its first one, in which it may compile for long."""
    record = view.records.get(rank)
    if record is None:
        return False
    steps = {mark.step for mark in record.marks if mark.kind == "step_begin"}
    return len(steps) == 1 and not any(mark.kind == "step_end" for mark in record.marks)


def _usual_s(view: JobView, like: CollectiveEvent, config: DetectorConfig, health: HealthConfig) -> float:
    """What 19 of 20 operations of this kind and size (to a factor of 2) took at most; 0 before there are five.

    Not the longest: a job that has stood before, or was slow for a while, would else be allowed to stand for longer.
    """
    size = like.bytes.bit_length()
    durations_s = [
        event.duration_ns / 1e9
        for record in view.records.values()
        for event in record.events
        if event.duration_ns is not None
        and event.state == "ended"
        and event.kind == like.kind
        and event.bytes.bit_length() == size
        and event.step >= config.warmup_steps
        and event.phase not in health.patient_phases
    ]
    return quantiles(durations_s, n=20)[18] if len(durations_s) >= 5 else 0.0


def _phase(view: JobView, rank: int) -> str:
    """What the rank last said that it is doing."""
    record = view.records.get(rank)
    if record is None or not record.marks:
        vitals = view.vitals.get(rank)
        return vitals.phase if vitals else ""
    return record.marks[-1].phase


def _death(record: RankRecord | None) -> int:
    """How a dead rank's record ends: 0 outside of any operation, 1 inside one, 2 in one that failed.

    A rank that dies takes others with it, whose operations fail; it may itself die inside of one.
    """
    if record is None or not record.events:
        return 0
    if any(event.state == "failed" for event in record.events[-_LAST:]):
        return _OF_ANOTHER
    return int(any(event.state == "begun" for event in record.events[-_LAST:]))


def _unwell(view: JobView, conditions: Iterable[Health]) -> list[Finding]:
    """One finding for each class; of several dead, only those that did not die of the others."""
    by_kind: dict[FindingKind, list[Health]] = {}
    for health in conditions:
        by_kind.setdefault(_BY_CONDITION[health.condition], []).append(health)
    found = []
    for kind, group in by_kind.items():
        suspects = group
        if kind is FindingKind.CRASH:
            deaths = {health.rank: _death(view.records.get(health.rank)) for health in group}
            suspects = [health for health in group if deaths[health.rank] == min(deaths.values())]
        score = 1.0 / len(suspects)
        found.append(
            Finding(
                kind=kind,
                suspects=tuple(Suspect(h.rank, score) for h in suspects),
                summary="; ".join(f"rank {h.rank}: {h.reason}" for h in suspects),
                evidence={f"age of rank {h.rank}, s": round(h.age_s, 3) for h in suspects}
                | {"ranks of the class": len(group)},
                step=max((view.vitals[h.rank].step for h in suspects), default=-1),
            )
        )
    return found


def _may_be_victims(view: JobView, sick: Iterable[Health]) -> bool:
    """Whether all that are not well died, as far as that is known just now, of an operation that failed."""
    ages_s = [view.vitals[one.rank].gone_age_s if one.condition is Condition.DEAD else None for one in sick]
    ends = [_death(view.records.get(one.rank)) for one in sick]
    return all(age_s is not None and age_s < _SOON_S for age_s in ages_s) and set(ends) == {_OF_ANOTHER}


def _refused(view: JobView, unwell: Collection[int]) -> list[Finding]:
    """Return at most one finding: of the dead those whose last operation failed and was none of their usual ones.

    A backend refuses at once what it cannot do; others, who are elsewhere, never come to it, and die in an operation
    of every step. Where somebody is gone whose operations did not fail, that explains what failed.
    """
    ends = {
        rank: view.records[rank].events[-1] for rank in unwell if rank in view.records and view.records[rank].events
    }
    if len(ends) < len(unwell) or any(event.state != "failed" for event in ends.values()):
        return []
    told = {rank: how for rank in ends if (how := deviation(view, rank))}
    if not told:
        return []
    refused = {rank: ends[rank] for rank in told}
    first = refused[min(told)]
    said = [f"rank {rank} died of an operation that it never made before: {how}" for rank, how in told.items()]
    return [
        Finding(
            kind=FindingKind.DESYNC,
            suspects=tuple(Suspect(rank, 1.0 / len(told)) for rank in told),
            summary="; ".join(said),
            evidence={f"last operation of rank {rank}": event.kind for rank, event in refused.items()},
            group=first.group,
            sequence=first.seq,
            step=max(event.step for event in refused.values()),
        )
    ]


def _hang(view: JobView, chain: Chain) -> Finding:
    operation = chain.operation
    example = next(iter(operation.events.values()))
    where = f"{example.kind} {operation.key.seq} of {operation.key.group}"
    evidence: dict[str, float | int | str] = {
        "open for, s": round(chain.age_s, 3),
        "ranks that wait": chain.num_waiting,
        "operation": where,
        "bytes": example.bytes,
    }
    if chain.kind == "cycle":
        return _deadlock(view, chain, where, evidence)
    if chain.kind == "entered":
        kind = FindingKind.COMMUNICATION_HANG
        key = operation.key
        if operation.is_message:
            suspects: tuple[Suspect, ...] = (Suspect(key.source, 1.0, key.target),)
        else:
            late = [rank for rank in operation.members if operation.events[rank].state == "begun"]
            suspects = tuple(Suspect(rank, 1.0 / len(late)) for rank in late)
        summary = f"all entered {where} and it does not end ({chain.age_s:.1f} s)"
    else:
        (rank,) = chain.ranks
        if how := deviation(view, rank):
            return _left_out(rank, where, how, evidence)
        if any(deviation(view, other) for other in chain.circle):
            return _deadlock(view, replace(chain, ranks=chain.circle), where, evidence)
        kind, suspects = FindingKind.HANG, (Suspect(rank, 1.0),)
        doing = _phase(view, rank)
        summary = f"rank {rank} has not entered {where} for {chain.age_s:.1f} s" + (f" (in {doing})" if doing else "")
    return Finding(
        kind=kind,
        suspects=suspects,
        summary=summary,
        evidence=evidence,
        group=operation.key.group,
        sequence=operation.key.seq,
        step=example.step,
    )


def _deadlock(view: JobView, chain: Chain, where: str, evidence: dict[str, float | int | str]) -> Finding:
    """A cycle: whose operations are not those of its earlier steps is the likelier to have left the order."""
    strange = {rank for rank in chain.ranks if deviation(view, rank)}
    scores = {rank: (1.0 if rank in strange else 0.1) if strange else 1.0 for rank in chain.ranks}
    total = sum(scores.values())
    ranked = sorted(scores, key=lambda rank: (-scores[rank], rank))
    return Finding(
        kind=FindingKind.DESYNC,
        suspects=tuple(Suspect(rank, scores[rank] / total) for rank in ranked),
        summary=f"ranks {', '.join(map(str, chain.ranks))} wait for each other in a circle, from {where}",
        evidence=evidence,
        group=chain.operation.key.group,
        sequence=chain.operation.key.seq,
    )


def _left_out(rank: int, where: str, how: str, evidence: dict[str, float | int | str]) -> Finding:
    return Finding(
        kind=FindingKind.DESYNC,
        suspects=(Suspect(rank, 1.0),),
        summary=f"rank {rank} has not entered {where} and left the order of its earlier steps: {how}",
        evidence=evidence | {"deviation": how},
    )


def _idle(view: JobView, conditions: list[Health]) -> list[Finding]:
    """Ranks that do not advance although nobody waits in a collective for anybody."""
    stalled = [health for health in conditions if health.condition is Condition.STALLED]
    waiting = {rank for rank, record in view.records.items() if any(event.state == "begun" for event in record.events)}
    if not stalled or waiting:
        return []
    return [
        Finding(
            kind=FindingKind.HANG,
            suspects=tuple(Suspect(health.rank, 1.0 / len(stalled)) for health in stalled),
            summary="; ".join(f"rank {health.rank}: {health.reason}" for health in stalled),
            evidence={f"age of rank {health.rank}, s": round(health.age_s, 3) for health in stalled},
        )
    ]
