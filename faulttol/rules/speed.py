"""What slows a job down: a rank that works longer than it should, a transfer that takes longer than it did.

A job's ranks wait for each other, so all steps take equally long and only their composition differs. A straggler is
late because its own work grew, its peers' time in collectives grows instead; when the steps grow and nobody's own work
does, the transfers did. Both are sums of differences on one clock each.

What only chance or uneven work makes late falls on all ranks alike: in a step each of g ranks is as likely the latest
as any other, so that one of them is it in k of n steps with a probability of the binomial tail P(B(n, 1/g) >= k). A
straggler is one where that is less than `straggler_chance`, divided by the number of ranks and of ways to look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, median_low

from faulttol.config import DetectorConfig
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.rules.chance import all_of, at_least
from faulttol.rules.starved import starved
from faulttol.rules.window import Baseline, TransferKey, Window

_LOOKS = 6
"""A rank is looked at so often: in three windows, against its peers and against its own past."""
_MORE_TOKENS = 2.0
"""Work grows at most with this power of the tokens, as attention's does."""
_Seconds = Mapping[int, list[float]]
"""Of every rank in every step of a window."""
_Groups = tuple[tuple[int, ...], ...]
"""Ranks that chance falls on alike."""


def slow(found: Window, baseline: Baseline | None, config: DetectorConfig) -> list[Finding]:
    """Return what makes the last steps long; without a baseline, only what peers tell.

    What is much slower shows in few steps already, if they are no moment only: of short steps so few can all fall into
    a third of a second in which the machine ran something else than a rank. What shows in some of the steps only, or
    on one of two ranks, takes more of them to tell from chance.
    """
    num = found.num_lasting(config.window_steps, config.window_least_s)
    recent = found.last(num)
    for part in (recent, found.last(2 * num)):
        if stragglers := _stragglers(part, baseline, config):
            return [_straggler(part, stragglers, baseline)]
    if baseline is not None and (stragglers := _at_once(found, baseline, config)):
        return [_straggler(found.last(config.fast_steps), stragglers, baseline)]
    findings = _imbalances(recent, baseline, config)
    if baseline is not None and (found_slow := _slow_transfer(recent, baseline, config)):
        transfer, part = found_slow
        findings.append(starved(part, baseline, config) or transfer)
    return findings


def _comparisons(
    found: Window, baseline: Baseline | None, *, tokens: bool
) -> tuple[tuple[_Groups, _Seconds], tuple[_Groups, _Seconds]]:
    """By how many seconds each rank's work exceeds that of its peers in each step; and what it needed in the past.

    The past times what all need more today; and, if tokens count, of a rank that has more of them than others in the
    step, as much more as they can explain.
    """
    locals_s, past = found.locals_s(), {} if baseline is None else baseline.local_s
    common = _common(locals_s, past)
    roles: dict[int, list[int]] = {}
    for rank, own in found.paces.items():
        roles.setdefault(own[found.steps[-1]].role, []).append(rank)
    of_role = {rank: tuple(group) for group in roles.values() for rank in group}
    by_peers, by_past = dict[int, list[float]](), dict[int, list[float]]()
    for rank, values in locals_s.items():
        peers = [other for other in of_role[rank] if other != rank]
        others = peers or [other for other in locals_s if other != rank]
        allowed = _allowed(found, rank, others) if tokens else [1.0] * len(values)
        if peers:
            usual = [median(row) for row in zip(*(locals_s[other] for other in peers), strict=True)]
            by_peers[rank] = [now - s * more for now, s, more in zip(values, usual, allowed, strict=True)]
        if rank in past:
            by_past[rank] = [now - past[rank] * common * more for now, more in zip(values, allowed, strict=True)]
    groups = tuple(tuple(group) for group in roles.values() if len(group) > 1)
    return (groups, by_peers), ((tuple(by_past),) if by_past else (), by_past)


def _common(locals_s: _Seconds, past: Mapping[int, float]) -> float:
    """How many times what they needed before all ranks need today, at least 1."""
    ratios = [median(values) / max(past[rank], 1e-9) for rank, values in locals_s.items() if rank in past]
    return max(1.0, median_low(ratios)) if ratios else 1.0


def _allowed(found: Window, rank: int, others: Sequence[int]) -> list[float]:
    """How many times the work of others the rank's tokens explain, in each step."""
    allowed = []
    for step in found.steps:
        own = found.paces[rank][step].tokens
        theirs = [count for other in others if (count := found.paces[other][step].tokens) is not None]
        ratio = 1.0 if own is None or not theirs else own / max(1.0, median(theirs))
        allowed.append(max(1.0, ratio) ** _MORE_TOKENS)
    return allowed


def _late(found: Window, excess: _Seconds, share: float, config: DetectorConfig) -> dict[int, list[bool]]:
    """In which steps each rank is late: by a share of what the step takes without it."""
    late = {}
    for rank, row in excess.items():
        tolerance_s = _tolerance_s(found, row, share, config)
        late[rank] = [value > tolerance_s for value in row]
    return late


def _tolerance_s(found: Window, row: Sequence[float], share: float, config: DetectorConfig) -> float:
    return max(config.straggler_floor_s, share * (found.span_s - max(0.0, median(row))))


def _holds_up(found: Window, by_peers: Sequence[float] | None, config: DetectorConfig) -> bool:
    """Whether a rank that is late by its past is so by its peers, if there are any.

    Where all became slower it may only be one of them.
    """
    return by_peers is None or median(by_peers) > _tolerance_s(found, by_peers, config.straggler_excess, config)


def _stragglers(found: Window, baseline: Baseline | None, config: DetectorConfig) -> _Seconds:
    """Who is late in most steps, and among the latest in so many that it is neither its turn nor chance.

    Of m ranks that are late in most steps each has to be among the m latest; if they are over half of those that are
    compared, it is no fault of theirs.
    """
    stragglers: dict[int, list[float]] = {}
    comparisons = _comparisons(found, baseline, tokens=True)
    by_peers = comparisons[0][1]
    for groups, excess in comparisons:
        late = _late(found, excess, config.straggler_excess, config)
        for group in groups:
            often = [rank for rank in group if _share(late[rank]) >= config.straggler_share]
            most = max(1, len(group) // 2)
            for rank in often if len(often) <= most else ():
                num = sum(
                    late[rank][i] and sum(excess[other][i] > excess[rank][i] for other in group) < len(often)
                    for i in range(len(found.steps))
                )
                chance = at_least(num, len(found.steps), len(often) / max(2, len(group)))
                is_chance = chance * most * len(found.paces) * _LOOKS > config.straggler_chance
                if not is_chance and _holds_up(found, by_peers.get(rank), config):
                    stragglers.setdefault(rank, excess[rank])
    return stragglers


def _at_once(found: Window, baseline: Baseline, config: DetectorConfig) -> _Seconds:
    """Who was late by a whole step in all of the last few, as hardly anybody was before.

    They last a while, and it is no chance that of all steps of all ranks just these are so late.
    """
    stragglers: dict[int, list[float]] = {}
    comparisons = _comparisons(found, baseline, tokens=True)
    by_peers = comparisons[0][1]
    for _, excess in comparisons:
        late = _late(found, excess, config.fast_excess, config)
        num_late = sum(map(sum, late.values()))
        for rank, row in late.items():
            num = next((i for i, is_late in enumerate(reversed(row)) if not is_late), len(row))
            if num < config.fast_steps or found.last(num).duration_s < config.window_least_s:
                continue
            chance = all_of(num, num_late, len(late) * len(found.steps)) * len(found.paces) * _LOOKS
            last = by_peers[rank][-num:] if rank in by_peers else None
            if chance <= config.straggler_chance and _holds_up(found.last(num), last, config):
                stragglers.setdefault(rank, excess[rank][-config.fast_steps :])
    return stragglers


def _imbalances(found: Window, baseline: Baseline | None, config: DetectorConfig) -> list[Finding]:
    """Ranks that are late for what they have to do, or in turn."""
    late = _late_at_all(found, baseline, config, tokens=False)
    most = max(map(_share, late.values()), default=0.0)
    beyond = max(map(_share, _late_at_all(found, baseline, config, tokens=True).values()), default=0.0)
    if beyond < config.straggler_share <= most:
        return [_imbalance(found, late, "its ranks' times follow their tokens")]
    if late and _share([any(row) for row in zip(*late.values(), strict=True)]) >= config.straggler_share:
        return [_imbalance(found, late, "ranks come late in turn")]
    return []


def _late_at_all(
    found: Window, baseline: Baseline | None, config: DetectorConfig, *, tokens: bool
) -> dict[int, list[bool]]:
    """In which steps each rank is late by its peers or by its past."""
    by_peers, by_past = (
        _late(found, excess, config.straggler_excess, config)
        for _, excess in _comparisons(found, baseline, tokens=tokens)
    )
    never = [False] * len(found.steps)
    return {
        rank: [a or b for a, b in zip(by_peers.get(rank, never), by_past.get(rank, never), strict=True)]
        for rank in found.paces
    }


def _share(row: Sequence[bool]) -> float:
    return sum(row) / len(row)


def _straggler(found: Window, excess: _Seconds, baseline: Baseline | None) -> Finding:
    locals_s = found.locals_s()
    most = max(median(values) for values in excess.values())
    ranked = sorted(excess, key=lambda rank: -median(excess[rank]))
    first = ranked[0]
    others = [median(values) for rank, values in locals_s.items() if rank not in excess] or [0.0]
    own_s = median(locals_s[first])
    usual_s = max(0.0, own_s - median(excess[first]))
    waits = [
        own[step].communication_s for rank, own in found.paces.items() if rank not in excess for step in found.steps
    ]
    before = {} if baseline is None else {"local time before, s": baseline.local_s.get(first, usual_s)}
    return Finding(
        kind=FindingKind.STRAGGLER,
        suspects=tuple(Suspect(rank, max(0.0, median(excess[rank])) / most if most > 0 else 1.0) for rank in ranked),
        summary=f"rank {first} works {own_s * 1e3:.1f} ms a step, others {median(others) * 1e3:.1f} ms",
        evidence={
            "local time, s": own_s,
            "usual local time, s": usual_s,
            "local time of the others, s": median(others),
            "time of the others in collectives, s": median(waits) if waits else 0.0,
            "step, s": found.span_s,
            "steps": len(found.steps),
        }
        | before,
        step=found.steps[-1],
        slowdown=own_s / usual_s if usual_s > 0 else 1.0,
    )


def _imbalance(found: Window, late: Mapping[int, Sequence[bool]], why: str) -> Finding:
    often = {rank: _share(row) for rank, row in late.items()}
    ranked = sorted((rank for rank in often if often[rank] > 0), key=lambda rank: (-often[rank], rank))
    return Finding(
        kind=FindingKind.DATA_IMBALANCE,
        suspects=tuple(Suspect(rank, often[rank]) for rank in ranked),
        summary=f"the steps wait for uneven work: {why}",
        evidence={f"late steps of rank {rank}, share": round(often[rank], 3) for rank in ranked},
        step=found.steps[-1],
    )


def _slow_transfer(found: Window, baseline: Baseline, config: DetectorConfig) -> tuple[Finding, Window] | None:
    """The steps grew, or the last few by much, and neither did the longest of the ranks' own work, nor everybody's.

    Returns also the steps that say so.
    """
    if finding := _longer(found, baseline, config.straggler_excess, config.slow_windows, config):
        return finding, found
    recent = found.last(config.fast_steps)
    if recent.duration_s < config.window_least_s:
        return None
    finding = _longer(recent, baseline, config.fast_excess, config.fast_steps, config)
    return None if finding is None else (finding, recent)


def _longer(found: Window, baseline: Baseline, share: float, num_parts: int, config: DetectorConfig) -> Finding | None:
    """The steps are longer than their work explains, in all parts of the window but one."""
    parts = found.parts(num_parts)
    least_s = max(config.slow_floor_s, share * baseline.span_s)
    known = {rank: baseline.local_s[rank] for rank in found.paces if rank in baseline.local_s}
    unexplained_s = {}
    for step, span_s in zip(found.steps, found.spans_s, strict=True):
        own_s = {rank: found.paces[rank][step].local_s for rank in found.paces}
        common = median_low(own_s[rank] / max(known[rank], 1e-9) for rank in known) if known else 1.0
        longer_s = max(own_s.values()) - baseline.longest_s
        unexplained_s[step] = span_s - baseline.span_s - max(0.0, longer_s, (common - 1) * baseline.span_s)
    num_slow = sum(median(unexplained_s[step] for step in part) > least_s for part in parts)
    if num_slow < max(1, len(parts) - 1):
        return None
    suspects, evidence = _slowest(found, baseline, config)
    rise_s = found.span_s - baseline.span_s
    return Finding(
        kind=FindingKind.COMMUNICATION_SLOW,
        suspects=suspects,
        summary=f"a step takes {rise_s * 1e3:.1f} ms longer than it did, and nobody's own work does",
        evidence={"step, s": found.span_s, "usual step, s": baseline.span_s, "slow parts": num_slow} | evidence,
        group=str(evidence.get("group", "")),
        step=found.steps[-1],
        slowdown=found.span_s / baseline.span_s if baseline.span_s > 0 else 1.0,
    )


def _slowest(
    found: Window, baseline: Baseline, config: DetectorConfig
) -> tuple[tuple[Suspect, ...], dict[str, float | int | str]]:
    """The links whose messages grew, and the kind of operation that grew most; ranks only a probe can tell."""
    grown: dict[TransferKey, float] = {}
    for key, values in found.transfers_s.items():
        usual_s = baseline.transfer_s.get(key)
        if usual_s is None:
            continue
        now_s = median(s for _, s in values)
        if now_s > (1 + config.slow_excess) * usual_s and now_s - usual_s > config.slow_floor_s:
            grown[key] = now_s - usual_s
    if not grown:
        return (), {}
    worst = max(grown, key=lambda key: grown[key])
    links = {key: rise for key, rise in grown.items() if key[3] >= 0}
    most = max(links.values(), default=0.0)
    ranked = sorted(links, key=lambda key: -links[key])
    suspects = {(key[3], key[4]): Suspect(key[3], links[key] / most, key[4]) for key in reversed(ranked)}
    evidence: dict[str, float | int | str] = {
        "group": worst[0],
        "operation": worst[1],
        "transfer, s": median(s for _, s in found.transfers_s[worst]),
        "usual transfer, s": baseline.transfer_s[worst],
    }
    return tuple(sorted(suspects.values(), key=lambda suspect: -suspect.score)), evidence
