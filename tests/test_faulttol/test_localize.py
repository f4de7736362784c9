"""A delay matrix is read: cell, row, column, both, block."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faulttol import localize, sockets
from faulttol.config import DetectorConfig
from faulttol.finding import Finding, FindingKind
from faulttol.localize import DelayMatrix, Link, explain, from_backlogs, passive, refine, rounds
from faulttol.view import JobView
from tests.ranks import run_ranks
from tests.test_faulttol.scenes import MS, Scene, message

CONFIG = DetectorConfig()
SLOW_S = 0.020


def matrix(num_ranks: int, slow: set[Link], seed: int = 0) -> DelayMatrix:
    chance = random.Random(seed)
    links = [(i, j) for i in range(num_ranks) for j in range(num_ranks) if i != j]
    return DelayMatrix({link: (SLOW_S if link in slow else 0.0005) * chance.uniform(1, 1.5) for link in links})


def row(rank: int, num_ranks: int) -> set[Link]:
    return {(rank, other) for other in range(num_ranks) if other != rank}


def column(rank: int, num_ranks: int) -> set[Link]:
    return {link[::-1] for link in row(rank, num_ranks)}


@pytest.mark.parametrize(
    ("slow", "shape", "suspects"),
    [
        ({(1, 2)}, "link", ["link 1->2"]),
        ({(1, 2), (2, 1)}, "pair", ["link 1->2", "link 2->1"]),
        (row(3, 6), "sender", ["rank 3"]),
        (column(3, 6), "receiver", ["rank 3"]),
        (row(0, 6) | column(0, 6), "rank", ["rank 0"]),
        (row(3, 6) - {(3, 1)}, "sender", ["rank 3"]),
    ],
    ids=["cell", "pair", "row", "column", "row and column", "row but for one cell"],
)
def test_slow_cells_are_explained_by_what_they_have_in_common(slow: set[Link], shape: str, suspects: list[str]) -> None:
    (found,) = explain(matrix(6, slow), CONFIG)
    assert found.shape == shape
    assert [str(suspect) for suspect in found.suspects] == suspects
    assert found.factor > 10


def test_what_hangs_between_two_switches_is_a_block() -> None:
    blocks = [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    slow = {(i, j) for i in blocks[0] for j in blocks[2]}
    (found,) = explain(matrix(9, slow), CONFIG, blocks=blocks)
    assert (found.shape, found.sources, found.targets) == ("block", (0, 1, 2), (6, 7, 8))


def test_two_faults_are_two_explanations() -> None:
    found = explain(matrix(8, row(2, 8) | {(5, 6)}), CONFIG)
    assert [(one.shape, one.sources) for one in found] == [("sender", (2,)), ("link", (5,))]


def test_links_are_compared_with_their_own_kind() -> None:
    """Between machines everything takes 20 times as long; one link inside does so too."""
    seconds = {(i, j): 0.0005 if i // 4 == j // 4 else 0.010 for i in range(8) for j in range(8) if i != j}
    classes = {link: "within" if link[0] // 4 == link[1] // 4 else "between" for link in seconds}
    assert not explain(DelayMatrix(seconds, classes), CONFIG)
    (found,) = explain(DelayMatrix({**seconds, (1, 2): 0.010}, classes), CONFIG)
    assert (found.shape, found.sources, found.targets) == ("link", (1,), (2,))


def test_of_two_ranks_an_earlier_matrix_tells_which_direction() -> None:
    usual = DelayMatrix({(0, 1): 0.001, (1, 0): 0.004})
    (found,) = explain(DelayMatrix({(0, 1): 0.010, (1, 0): 0.004}), CONFIG, usual=usual)
    assert (found.shape, found.sources, found.targets) == ("link", (0,), (1,))


@given(st.integers(3, 12), st.integers(0, 10_000))
def test_noise_is_no_link(num_ranks: int, seed: int) -> None:
    assert not explain(matrix(num_ranks, set(), seed), CONFIG)


@given(st.permutations(range(6)), st.sampled_from(["cell", "row", "column"]))
def test_names_of_ranks_do_not_matter(names: list[int], shape: str) -> None:
    slow = {"cell": {(1, 2)}, "row": row(1, 6), "column": column(2, 6)}[shape]
    plain = matrix(6, slow)
    renamed = DelayMatrix({(names[i], names[j]): value for (i, j), value in plain.seconds.items()})
    (one,), (other,) = explain(plain, CONFIG), explain(renamed, CONFIG)
    assert other.shape == one.shape
    assert {(names[s.rank], names[s.to_rank] if s.is_link else -1) for s in one.suspects} == {
        (s.rank, s.to_rank) for s in other.suspects
    }


@given(st.integers(2, 17))
def test_every_pair_meets_once_and_nobody_twice_a_round(num_ranks: int) -> None:
    found = rounds(num_ranks)
    assert len(found) == num_ranks - 1 + num_ranks % 2
    for pairs in found:
        members = [rank for pair in pairs for rank in pair]
        assert len(members) == len(set(members))
    met = sorted(pair for pairs in found for pair in pairs)
    assert met == [(i, j) for i in range(num_ranks) for j in range(i + 1, num_ranks)]


def test_a_finding_takes_the_suspects_that_the_matrix_names() -> None:
    vague = Finding(kind=FindingKind.COMMUNICATION_SLOW, suspects=(), summary="slow")
    named = refine(vague, explain(matrix(4, {(2, 0)}), CONFIG))
    assert [str(suspect) for suspect in named.suspects] == ["link 2->0"]
    assert refine(vague, []) is vague


def test_messages_of_the_job_fill_the_matrix() -> None:
    """What the receiver had open the shortest time: then the message was on its way already."""
    records = Scene().run(1)
    done = {"state": "ended", "begin_ns": 0}
    for rank, kind, peer, seq, end_ns in ((0, "send", 1, 1, 10), (1, "recv", 0, 1, 9 * MS), (1, "recv", 0, 2, 7 * MS)):
        event = message(rank, kind, peer, seq=seq, end_ns=end_ns, **done)
        records[rank] = replace(records[rank], events=(*records[rank].events, event))
    sent = message(0, "send", 1, seq=2, end_ns=10, **done)
    records[0] = replace(records[0], events=(*records[0].events, sent))
    assert passive(JobView(records)).seconds == {(0, 1): 0.007}
    assert passive(JobView(records), num_bytes=1 << 30).seconds == {}


def test_what_waits_in_the_connections_names_the_link() -> None:
    found = from_backlogs({0: {}, 1: {2: 60_000, 3: 40}, 2: {1: 0}})
    assert [str(suspect) for one in found for suspect in one.suspects] == ["link 1->2", "link 1->3"]


def test_ends_of_connections_find_each_other() -> None:
    a, b, c = ("h", 1), ("h", 2), ("h", 3)
    ends = {0: [(7, a, b), (8, a, ("x", 9))], 1: [(5, b, a), (6, c, c)]}
    assert sockets.peers(ends, 0) == {1: [7]}
    assert sockets.peers(ends, 1) == {0: [5]}


def _probe(rank: int, world_size: int) -> tuple[dict[Link, float], dict[Link, float]]:
    healthy = localize.probe(repeats=3)
    links = sockets.connections()
    if rank == 1:
        assert sockets.pace(links[2], 2_000_000) > 0
    paced = localize.probe(repeats=3)
    return healthy, paced


def test_a_probe_between_real_ranks_finds_the_paced_link() -> None:
    results = run_ranks(_probe, 4)
    healthy, paced = (DelayMatrix({link: s for one in results for link, s in one[i].items()}) for i in range(2))
    assert len(healthy.seconds) == len(paced.seconds) == 12
    found = explain(paced, DetectorConfig(link_floor_s=0.03), usual=healthy)  # far above the machine's noise
    assert (found[0].shape, found[0].sources, found[0].targets) == ("link", (1,), (2,))
    assert paced.seconds[1, 2] > 0.04  # 256 KiB at 2 MB/s, a quarter of it at once
