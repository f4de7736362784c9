"""Which groups a round trains on: I of its own and J of other nodes'. Pure: values in, values out.

Follows SAPO (arXiv 2509.08721): groups whose rewards are all equal are dropped, the rest are chosen at random. Differs:
what is too old is dropped, and peers are drawn from evenly, whatever they offer. Where all groups are drawn alike, who
offers most gets most places, up to `per_peer`: two peers that send many true groups of one task may hold half a round.
And where too few groups have come, own ones fill the round: peers that say nothing, or nothing true, cost samples then,
and less of what is learned.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainsys.rl.rollout import Group


@dataclass(frozen=True, slots=True)
class Candidate:
    """A validated group of a peer, waiting to be chosen."""

    group: Group
    rollout_id: bytes
    arrived_round: int
    """This node's round when it arrived: age is counted in our rounds, whatever the sender's clock or version says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """What one round may take."""

    num_local: int
    num_external: int
    max_age_rounds: int = 8
    """Rounds of ours that a candidate may have waited."""
    per_peer: int = 2
    """Groups of one peer in one round; 1 or more."""
    filter_local: bool = False
    """Also of our own only groups with signal are trained on."""
    filter_external: bool = True
    """Of peers only groups with signal are trained on."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What to train on, and what came of the candidates."""

    local: tuple[Group, ...]
    external: tuple[Candidate, ...]
    kept: tuple[Candidate, ...]
    """Candidates for later rounds: neither chosen, nor too old, nor without signal."""
    too_old: int
    """Candidates dropped for their age."""
    without_signal: int
    """Candidates dropped because all their rewards are equal."""
    unfit: int
    """Candidates dropped because they are nothing for this policy."""


def num_missing(candidates: Sequence[Candidate], quota: Quota, *, now_round: int) -> int:
    """Return how many places for others' groups would stay empty: so many more a node asks itself."""
    useful = _useful(_young(candidates, quota, now_round), quota)
    offers = Counter(candidate.group.node for candidate in useful)
    return max(0, quota.num_external - sum(min(quota.per_peer, offer) for offer in offers.values()))


def select(
    local: Sequence[Group],
    candidates: Sequence[Candidate],
    quota: Quota,
    *,
    now_round: int,
    generator: random.Random,
    fits: Callable[[Group], bool] = lambda group: True,
) -> Selection:
    """Choose at random among what may be chosen; fewer than asked for where there are not enough.

    Every peer that has something gets one place before any gets its second; which peers, where places are few, and
    which of a peer's groups is as likely for each. No order counts: of the same groups in another order the choice is
    as likely. `fits` is asked only of groups that would be chosen; another takes the place of one that does not. What
    others leave empty goes to own groups, as far as there are more than `num_local`.
    """
    own = [group for group in local if group.has_signal or not quota.filter_local]
    young = _young(candidates, quota, now_round)
    useful = _useful(young, quota)
    taken: Counter[str] = Counter()
    external: list[Candidate] = []
    kept: list[Candidate] = []
    for candidate in _in_turn(useful, generator):
        node = candidate.group.node
        if len(external) >= quota.num_external or taken[node] >= quota.per_peer:
            kept.append(candidate)
        elif fits(candidate.group):
            taken[node] += 1
            external.append(candidate)
    num_own = min(len(own), quota.num_local + quota.num_external - len(external))
    return Selection(
        local=tuple(generator.sample(own, num_own)),
        external=tuple(external),
        kept=tuple(kept),
        too_old=len(candidates) - len(young),
        without_signal=len(young) - len(useful),
        unfit=len(useful) - len(external) - len(kept),
    )


def _young(candidates: Sequence[Candidate], quota: Quota, now_round: int) -> list[Candidate]:
    return [candidate for candidate in candidates if now_round - candidate.arrived_round <= quota.max_age_rounds]


def _useful(candidates: Sequence[Candidate], quota: Quota) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.group.has_signal or not quota.filter_external]


def _in_turn(candidates: Sequence[Candidate], generator: random.Random) -> list[Candidate]:
    """Return candidates so that each peer's first comes before any peer's second, and so on; else in random order."""
    nodes = sorted({candidate.group.node for candidate in candidates})
    place = {node: index for index, node in enumerate(generator.sample(nodes, len(nodes)))}
    turn: Counter[str] = Counter()
    ordered = []
    for candidate in generator.sample(candidates, len(candidates)):
        node = candidate.group.node
        ordered.append((turn[node], place[node], candidate))
        turn[node] += 1
    return [candidate for _, _, candidate in sorted(ordered, key=lambda item: item[:2])]
