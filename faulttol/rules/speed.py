"""What slows a job down: a rank that works longer than it should, a transfer that takes longer than it did.

A job's ranks wait for each other, so all steps take equally long and only their composition differs. A straggler is
late because its own work grew, its peers' time in collectives grows instead; when the steps grow and nobody's own work
does, the transfers did. Both are sums of differences on one clock each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import correlation, fmean, linear_regression, median, median_low

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.rules.pace import Pace, paces
from faulttol.view import JobView, match

_VARIES = 0.05
"""Relative spread from which on tokens can explain anything."""
TransferKey = tuple[str, str, int, int, int]
"""Group, kind, bits of the size, sender, receiver; the last two -1 for a collective."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What was usual while nothing was wrong, in seconds a step or an operation."""

    local_s: Mapping[int, float]
    span_s: float
    transfer_s: Mapping[TransferKey, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """The last steps that all ranks have behind them."""

    steps: tuple[int, ...]
    paces: Mapping[int, Mapping[int, Pace]]
    """By rank, then by step."""
    transfers_s: Mapping[TransferKey, tuple[tuple[int, float], ...]]
    """(step, shortest time that a member had it open) of every operation, in order."""

    @property
    def span_s(self) -> float:
        """Median over the steps of the median over the ranks."""
        return median(median(own[step].span_s for own in self.paces.values()) for step in self.steps)

    @property
    def duration_s(self) -> float:
        """How long its steps took together."""
        return sum(median(own[step].span_s for own in self.paces.values()) for step in self.steps)

    def locals_s(self) -> dict[int, list[float]]:
        """Each rank's local time in every step."""
        return {rank: [own[step].local_s for step in self.steps] for rank, own in self.paces.items()}

    def last(self, num_steps: int) -> Window:
        """The last steps of the window as one of their own."""
        steps = self.steps[-num_steps:]
        kept = {key: tuple(v for v in values if v[0] >= steps[0]) for key, values in self.transfers_s.items()}
        return Window(steps, self.paces, {key: values for key, values in kept.items() if values})

    def baseline(self) -> Baseline:
        """What is usual, taking this window for a healthy one."""
        return Baseline(
            {rank: median(values) for rank, values in self.locals_s().items()},
            self.span_s,
            {key: median(s for _, s in values) for key, values in self.transfers_s.items()},
        )


def window(view: JobView, first_step: int, config: DetectorConfig, health: HealthConfig) -> Window | None:
    """Return the last `window_steps` steps that can be compared; None while there are fewer.

    Left out are the warm-up after `first_step`, and steps in which a rank did something else than train.
    """
    if len(view.records) < 2:
        return None
    begin = first_step + config.warmup_steps
    all_paces = {rank: paces(record, begin) for rank, record in view.records.items()}
    common = set.intersection(*(set(own) for own in all_paces.values()))
    patient = set(health.patient_phases)
    usable = sorted(step for step in common if not any(own[step].phases & patient for own in all_paces.values()))
    if len(usable) < config.window_steps:
        return None
    steps = tuple(usable[-config.window_steps :])
    chosen = {rank: {step: own[step] for step in steps} for rank, own in sorted(all_paces.items())}
    return Window(steps, chosen, _transfers(view, steps))


def slow(found: Window, baseline: Baseline | None, config: DetectorConfig) -> list[Finding]:
    """Return what makes the steps of the window long; without a baseline, only what peers tell.

    What is much slower shows in the window's last steps alone already, if they are no moment only: of short steps so
    few can all fall into a third of a second in which the machine ran something else than a rank.
    """
    findings = _slow(found, baseline, config)
    recent = found.last(config.fast_steps)
    if baseline is None or recent.duration_s < config.fast_least_s or any(one.kind.is_fault for one in findings):
        return findings
    fast = replace(config, straggler_excess=config.fast_excess, straggler_share=1.0, slow_windows=config.fast_steps)
    at_once = [finding for finding in _slow(recent, baseline, fast) if finding.kind.is_fault]
    return at_once or findings


def _slow(found: Window, baseline: Baseline | None, config: DetectorConfig) -> list[Finding]:
    locals_s, explained = _without_tokens(found, config)
    raw = _late(found, found.locals_s(), baseline, config)
    late = _late(found, locals_s, baseline, config) if explained else raw
    stragglers = _stragglers(late, config)
    if explained:  # the part that tokens explain is known only roughly
        stragglers = {rank: times for rank, times in stragglers.items() if median(times) > median(raw[rank]) / 2}
    if stragglers:
        return [_straggler(found, stragglers, baseline)]
    findings = []
    if explained and any(_is_mostly(times, config) for times in raw.values()):
        findings.append(_imbalance(found, raw, "its ranks' times follow their tokens"))
    elif _is_mostly([max(times) for times in zip(*raw.values(), strict=True)], config):
        findings.append(_imbalance(found, raw, "ranks come late in turn"))
    if baseline is not None and (transfer := _slow_transfer(found, baseline, config)):
        findings.append(transfer)
    return findings


def _transfers(view: JobView, steps: tuple[int, ...]) -> dict[TransferKey, tuple[tuple[int, float], ...]]:
    first, last = steps[0], steps[-1]
    chosen = [
        event
        for record in view.records.values()
        for event in record.events
        if event.state == "ended" and first <= event.step <= last
    ]
    found: dict[TransferKey, list[tuple[int, float]]] = {}
    for key, operation in sorted(match(chosen).items()):
        if operation.absent:
            continue
        events = list(operation.events.values())
        shortest_s = min((event.duration_ns or 0) / 1e9 for event in events)
        kind = "message" if operation.is_message else events[0].kind
        name = (key.group, kind, events[0].bytes.bit_length(), key.source, key.target)
        found.setdefault(name, []).append((events[0].step, shortest_s))
    return {name: tuple(values) for name, values in found.items()}


def _without_tokens(found: Window, config: DetectorConfig) -> tuple[dict[int, list[float]], bool]:
    """Each rank's local times as if all had the same tokens, and whether tokens explain what they differ by.

    They do where times follow tokens, or where within each step what a rank needs more than others follows what it has
    more: what holds up all ranks in some steps is no matter of tokens.
    """
    locals_s = found.locals_s()
    tokens = {
        rank: [count for step in found.steps if (count := own[step].tokens) is not None]
        for rank, own in found.paces.items()
    }
    if any(len(counts) < len(found.steps) for counts in tokens.values()):
        return locals_s, False
    mean = fmean(count for counts in tokens.values() for count in counts)
    slope = _slope(tokens, locals_s, mean, config)
    if slope is None:
        slope = _slope(_beyond_step(tokens), _beyond_step(locals_s), mean, config)
    if slope is None:
        return locals_s, False
    return {
        rank: [local_s - slope * (count - mean) for count, local_s in zip(tokens[rank], values, strict=True)]
        for rank, values in locals_s.items()
    }, True


def _slope(
    tokens: Mapping[int, Sequence[float]], locals_s: Mapping[int, Sequence[float]], mean: float, config: DetectorConfig
) -> float | None:
    """Seconds a token; None where times do not follow tokens, or those hardly vary.

    Of medians of a rank's steps of as many tokens: what held up a single step says nothing of tokens.
    """
    groups: dict[tuple[int, float], list[float]] = {}
    for rank, counts in tokens.items():
        for count, local_s in zip(counts, locals_s[rank], strict=True):
            groups.setdefault((rank, count), []).append(local_s)
    pairs = [(count, median(values)) for (_, count), values in groups.items() for _ in values]
    x, y = [float(count) for count, _ in pairs], [local_s for _, local_s in pairs]
    if max(x) - min(x) <= _VARIES * mean or max(y) == min(y):
        return None
    return linear_regression(x, y).slope if correlation(x, y) >= config.imbalance_correlation else None


def _beyond_step(values: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """Each rank's values less the median over the ranks in the same step."""
    usual = [median(row) for row in zip(*values.values(), strict=True)]
    return {rank: [value - one for value, one in zip(row, usual, strict=True)] for rank, row in values.items()}


def _late(
    found: Window, locals_s: Mapping[int, list[float]], baseline: Baseline | None, config: DetectorConfig
) -> dict[int, list[float]]:
    """By how many seconds each rank's work exceeds what was to be expected, in each step, less the tolerance.

    Expected is what its peers of equal role need, and what it needed itself, times what all need more today.
    """
    usual = {rank: median(values) for rank, values in locals_s.items()}
    roles = {rank: own[found.steps[-1]].role for rank, own in found.paces.items()}
    common = 1.0
    if baseline is not None:
        common = max(1.0, median_low(usual[r] / max(baseline.local_s.get(r, usual[r]), 1e-9) for r in usual))
    late = {}
    for rank, values in locals_s.items():
        expected = []
        peers = [other for other in usual if other != rank and roles[other] == roles[rank]]
        before = None if baseline is None else baseline.local_s.get(rank)
        if peers:
            expected.append([median(locals_s[other][i] for other in peers) for i in range(len(found.steps))])
        if before is not None:
            expected.append([before * common] * len(found.steps))
        excess = [max(values[i] - row[i] for row in expected) if expected else 0.0 for i in range(len(found.steps))]
        step_s = found.span_s - max(0.0, median(excess))
        tolerance_s = max(config.straggler_floor_s, config.straggler_excess * step_s)
        late[rank] = [value - tolerance_s for value in excess]
    return late


def _stragglers(late: Mapping[int, list[float]], config: DetectorConfig) -> dict[int, list[float]]:
    """Who is late for itself: in most of the steps in which it would not be if it were late as often as the others are.

    Of ranks that are late in turn each has its share of steps anyway, and a few more are no fault.
    """
    often = {rank: _share(times) for rank, times in late.items()}
    found = {}
    for rank, times in late.items():
        in_turn = median_low([share for other, share in often.items() if other != rank])
        if often[rank] > in_turn and often[rank] - in_turn >= config.straggler_share * (1 - in_turn):
            found[rank] = times
    return found


def _share(times: Sequence[float]) -> float:
    return sum(value > 0 for value in times) / len(times)


def _is_mostly(times: Sequence[float], config: DetectorConfig) -> bool:
    return _share(times) >= config.straggler_share


def _straggler(found: Window, late: Mapping[int, list[float]], baseline: Baseline | None) -> Finding:
    locals_s = found.locals_s()
    most = max(median(times) for times in late.values())
    ranked = sorted(late, key=lambda rank: -median(late[rank]))
    first = ranked[0]
    others = [median(values) for rank, values in locals_s.items() if rank not in late] or [0.0]
    usual_s = median(others) if baseline is None else baseline.local_s.get(first, median(others))
    own_s = median(locals_s[first])
    waits = [own[step].communication_s for rank, own in found.paces.items() if rank not in late for step in found.steps]
    return Finding(
        kind=FindingKind.STRAGGLER,
        suspects=tuple(Suspect(rank, max(0.0, median(late[rank])) / most if most > 0 else 1.0) for rank in ranked),
        summary=f"rank {first} works {own_s * 1e3:.1f} ms a step, others {median(others) * 1e3:.1f} ms",
        evidence={
            "local time, s": own_s,
            "usual local time, s": usual_s,
            "local time of the others, s": median(others),
            "time of the others in collectives, s": median(waits) if waits else 0.0,
            "step, s": found.span_s,
            "steps": len(found.steps),
        },
        step=found.steps[-1],
        slowdown=own_s / usual_s if usual_s > 0 else 1.0,
    )


def _imbalance(found: Window, late: Mapping[int, list[float]], why: str) -> Finding:
    often = {rank: _share(times) for rank, times in late.items()}
    ranked = sorted((rank for rank in often if often[rank] > 0), key=lambda rank: (-often[rank], rank))
    return Finding(
        kind=FindingKind.DATA_IMBALANCE,
        suspects=tuple(Suspect(rank, often[rank]) for rank in ranked),
        summary=f"the steps wait for uneven work: {why}",
        evidence={f"late steps of rank {rank}, share": round(often[rank], 3) for rank in ranked},
        step=found.steps[-1],
    )


def _slow_transfer(found: Window, baseline: Baseline, config: DetectorConfig) -> Finding | None:
    """The steps grew in most parts of the window, and neither did anybody's own work by as much, nor everybody's."""
    parts = _parts(found.steps, config.slow_windows)
    least_s = max(config.slow_floor_s, config.straggler_excess * baseline.span_s)
    known = {rank: baseline.local_s[rank] for rank in found.paces if rank in baseline.local_s}
    unexplained_s = {}
    for step in found.steps:
        own_s = {rank: found.paces[rank][step].local_s for rank in known}
        common = median_low(own_s[rank] / max(known[rank], 1e-9) for rank in known) if known else 1.0
        longest_s = max((own_s[rank] - known[rank] for rank in known), default=0.0)
        span_s = median(own[step].span_s for own in found.paces.values())
        unexplained_s[step] = span_s - baseline.span_s - max(0.0, longest_s, (common - 1) * baseline.span_s)
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


def _parts(steps: tuple[int, ...], num_parts: int) -> list[tuple[int, ...]]:
    size = max(1, len(steps) // num_parts)
    return [steps[i : i + size] for i in range(0, len(steps) - size + 1, size)]
