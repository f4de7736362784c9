"""What a round trains on, and what the reference implementation gets wrong about it."""

from __future__ import annotations

import random
from collections import Counter

from tests.test_trainsys.rollouts import group
from trainsys.rl.rollout import Group
from trainsys.rl.selection import Candidate, Quota, Selection, num_missing, select


def _candidate(seed: int, *, node: str = "anna", right: int = 2, arrived: int = 0, size: int = 4) -> Candidate:
    return Candidate(group(seed, node=node, right=right, size=size), f"{node}{seed}".encode(), arrived)


def _select(candidates: list[Candidate], quota: Quota, *, now: int = 0, seed: int = 0) -> Selection:
    return select([], candidates, quota, now_round=now, generator=random.Random(seed))


def test_groups_without_signal_are_cut_wherever_they_stand() -> None:
    # The reference implementation finds the first scoring group in the unsorted list and cuts the sorted one there.
    rights = [0, 3, 4, 1, 0, 2, 4, 0]
    candidates = [_candidate(seed, node=f"n{seed}", right=right) for seed, right in enumerate(rights)]
    for order in range(20):
        shuffled = random.Random(order).sample(candidates, len(candidates))
        found = _select(shuffled, Quota(num_local=0, num_external=8), seed=order)
        assert sorted(c.group.mean_reward for c in found.external) == [0.25, 0.5, 0.75]
        assert found.without_signal == 5


def test_a_higher_score_does_not_make_a_group_likelier() -> None:
    # The reference implementation keeps the highest total rewards: what is learnt already.
    candidates = [_candidate(seed, node=f"n{seed}", right=1 + seed % 3) for seed in range(6)]
    counts: Counter[bytes] = Counter()
    for seed in range(3000):
        counts.update(c.rollout_id for c in _select(candidates, Quota(num_local=0, num_external=2), seed=seed).external)
    assert all(900 < count < 1100 for count in counts.values())  # 1000 expected; 1100 is four deviations off
    assert len(counts) == 6


def test_groups_of_another_size_are_welcome() -> None:
    candidates = [_candidate(seed, node=f"n{seed}", size=size) for seed, size in enumerate((4, 3, 16))]
    assert len(_select(candidates, Quota(num_local=0, num_external=3)).external) == 3


def test_who_offers_most_gets_no_more_places_than_others() -> None:
    # Two peers that flood would have all four places nearly always where groups are drawn alike.
    loud = [_candidate(seed, node=node) for node in ("loud", "louder") for seed in range(64)]
    quiet = [_candidate(seed, node=node) for node in ("quiet", "calm") for seed in range(2)]
    for seed in range(50):
        found = _select(loud + quiet, Quota(num_local=0, num_external=4, per_peer=2), seed=seed)
        assert Counter(c.group.node for c in found.external) == dict.fromkeys(("loud", "louder", "quiet", "calm"), 1)
    first: Counter[str] = Counter()
    for seed in range(2000):
        first.update(
            c.group.node for c in _select(loud + quiet, Quota(num_local=0, num_external=1), seed=seed).external
        )
    assert all(420 < first[node] < 580 for node in ("loud", "louder", "quiet", "calm"))  # 500 +- four deviations


def test_places_that_some_do_not_fill_go_to_others() -> None:
    candidates = [_candidate(seed, node="anna") for seed in range(5)] + [_candidate(9, node="bert")]
    found = _select(candidates, Quota(num_local=0, num_external=4, per_peer=3))
    assert Counter(c.group.node for c in found.external) == {"anna": 3, "bert": 1}


def test_a_group_that_does_not_fit_gives_its_place_to_another() -> None:
    candidates = [_candidate(seed, node=f"n{seed % 2}") for seed in range(12)]
    asked = []

    def fits(found: Group) -> bool:
        asked.append(found)
        return found.question.seed >= 4

    found = select(
        [], candidates, Quota(num_local=0, num_external=4), now_round=0, generator=random.Random(0), fits=fits
    )
    assert Counter(c.group.node for c in found.external) == {"n0": 2, "n1": 2}
    assert all(c.group.question.seed >= 4 for c in found.external)
    assert found.unfit == sum(group.question.seed < 4 for group in asked)
    assert len(found.kept) == 12 - 4 - found.unfit


def test_one_peer_cannot_fill_a_round() -> None:
    candidates = [_candidate(seed, node="loud") for seed in range(50)] + [_candidate(99, node="quiet")]
    found = _select(candidates, Quota(num_local=0, num_external=8, per_peer=2))
    assert Counter(c.group.node for c in found.external) == {"loud": 2, "quiet": 1}
    assert len(found.kept) == 48


def test_what_is_too_old_is_dropped_by_our_own_rounds() -> None:
    candidates = [_candidate(seed, node=f"n{seed}", arrived=seed) for seed in range(10)]
    found = _select(candidates, Quota(num_local=0, num_external=10, max_age_rounds=3), now=9)
    assert sorted(c.arrived_round for c in found.external) == [6, 7, 8, 9]
    assert found.too_old == 6
    assert not found.kept


def test_a_candidate_is_chosen_kept_or_dropped_and_never_two_of_these() -> None:
    candidates = [_candidate(s, node=f"n{s % 3}", right=s % 5, arrived=s % 7) for s in range(60)]
    for seed in range(20):
        found = _select(candidates, Quota(num_local=0, num_external=4, max_age_rounds=4), now=6, seed=seed)
        ids = [c.rollout_id for c in (*found.external, *found.kept)]
        assert len(set(ids)) == len(ids) == len(candidates) - found.too_old - found.without_signal
        assert len(found.external) == 4


def test_own_groups_are_kept_as_they_are_unless_the_filter_is_asked_for() -> None:
    local = [group(seed, right=right) for seed, right in enumerate((0, 1, 4, 2))]
    for filtered, expected in ((False, 4), (True, 2)):
        quota = Quota(num_local=8, num_external=0, filter_local=filtered)
        assert len(select(local, [], quota, now_round=0, generator=random.Random(0)).local) == expected


def test_own_groups_take_the_places_that_others_leave_empty() -> None:
    random.seed(1)
    own = [group(100 + seed) for seed in range(10)]
    for _ in range(200):
        quota = Quota(num_local=4, num_external=random.randint(0, 6), max_age_rounds=4, per_peer=random.randint(1, 3))
        candidates = [
            _candidate(seed, node=f"n{seed % random.randint(1, 4)}", right=random.randint(0, 4), arrived=seed % 9)
            for seed in range(random.randint(0, 12))
        ]
        missing = num_missing(candidates, quota, now_round=8)
        for asked in (4 + missing, 10):
            found = select(own[:asked], candidates, quota, now_round=8, generator=random.Random(0))
            assert len(found.external) == quota.num_external - missing
            assert len(found.local) + len(found.external) == 4 + quota.num_external, "a whole round, and no more"
        few = select(own[:4], candidates, quota, now_round=8, generator=random.Random(0))
        assert sorted(few.local, key=lambda g: g.question.seed) == own[:4]


def test_without_the_filter_peers_groups_are_taken_as_they_come() -> None:
    candidates = [_candidate(seed, node=f"n{seed}", right=0) for seed in range(5)]
    assert len(_select(candidates, Quota(num_local=0, num_external=5, filter_external=False)).external) == 5


def test_fewer_candidates_than_asked_for_is_no_error() -> None:
    assert _select([], Quota(num_local=4, num_external=4)) == Selection((), (), (), 0, 0, 0)


def test_the_choice_follows_the_generator_alone() -> None:
    candidates = [_candidate(seed, node=f"n{seed}") for seed in range(20)]
    quota = Quota(num_local=0, num_external=4)
    assert _select(candidates, quota, seed=3) == _select(candidates, quota, seed=3)
    assert _select(candidates, quota, seed=3) != _select(candidates, quota, seed=4)
