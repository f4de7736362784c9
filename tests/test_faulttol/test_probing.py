"""Probes that an observer asks for, and what becomes of suspicions that they confirm or do not."""

from __future__ import annotations

import os
from pathlib import Path

from faulttol import sockets
from faulttol.config import DetectorConfig
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.localize import DelayMatrix, Link, explain
from faulttol.probing import Answering, Asking, Locator, remove
from tests.ranks import run_ranks

CONFIG = DetectorConfig()
SLOW = Finding(kind=FindingKind.COMMUNICATION_SLOW, suspects=(Suspect(3, 1.0),), summary="steps take longer")
LATE = Finding(kind=FindingKind.STRAGGLER, suspects=(Suspect(2, 1.0),), summary="rank 2 works longer")


def delays(*slow: Link) -> DelayMatrix:
    """Of four ranks."""
    links = [(a, b) for a in range(4) for b in range(4) if a != b]
    return DelayMatrix({link: 0.5 if link in slow else 1e-3 for link in links})


class Script:
    """Links that answer with what the test puts there."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.answer: DelayMatrix | None = None

    def ask(self) -> None:
        self.num_asked += 1
        self.answer = None

    def matrix(self) -> DelayMatrix | None:
        return self.answer


def test_a_suspicion_passes_once_two_probes_name_the_link() -> None:
    links = Script()
    locator = Locator(links, CONFIG)
    assert locator.look(0.0, (LATE, SLOW), is_settled=True) == (LATE,)
    assert locator.look(1.0, (LATE, SLOW), is_settled=True) == (LATE,), "nobody has answered"
    links.answer = delays((1, 0), (2, 3))
    assert locator.look(2.0, (SLOW,), is_settled=True) == ()
    links.answer = delays((1, 0))  # the other one was a busy moment
    (found,) = locator.look(3.0, (SLOW,), is_settled=True)
    assert found.suspects == (Suspect(1, 1.0, 0),)
    assert "slow is the link 1 -> 0" in found.summary
    assert locator.look(4.0, (SLOW,), is_settled=True) == (found,), "for as long as the steps are long"
    assert links.num_asked == 2


def test_a_suspicion_that_no_probe_confirms_accuses_nobody_and_is_probed_again() -> None:
    links = Script()
    locator = Locator(links, CONFIG)
    for second in range(12):
        assert locator.look(float(second), (SLOW,), is_settled=True) == ()
        links.answer = delays()
    assert 4 <= links.num_asked <= 6, "pairs of probes, five seconds apart"


def test_where_nobody_answers_the_suspicion_passes_as_it_is() -> None:
    locator = Locator(Script(), CONFIG)
    assert locator.look(0.0, (SLOW,), is_settled=True) == ()
    assert locator.look(29.0, (SLOW,), is_settled=True) == ()
    assert locator.look(31.0, (SLOW,), is_settled=True) == (SLOW,)


def test_links_that_were_always_slower_are_usual() -> None:
    links = Script()
    locator = Locator(links, CONFIG)
    assert locator.look(0.0, (), is_settled=False) == ()
    assert links.num_asked == 0, "nothing is known yet"
    locator.look(1.0, (), is_settled=True)
    links.answer = delays((0, 1), (1, 0))
    locator.look(2.0, (LATE,), is_settled=True)  # not while a rank is slow
    locator.look(3.0, (), is_settled=True)
    links.answer = delays((0, 1), (1, 0))
    locator.look(4.0, (), is_settled=True)
    assert links.num_asked == 2
    for _ in range(2):
        assert locator.look(5.0, (SLOW,), is_settled=True) == ()
        links.answer = delays((0, 1), (1, 0), (2, 3))
    (found,) = locator.look(6.0, (SLOW,), is_settled=True)
    assert found.suspects == (Suspect(2, 1.0, 3),)


def _answers(rank: int, world_size: int, folder: str) -> list[bool]:
    answering = Answering(Path(folder), rank, generation=3)
    asked = [answering.is_asked()]
    links = sockets.connections()
    if rank == 1:
        assert sockets.pace(links[2], 2_000_000) > 0
    answering.probe(step=7)
    return [*asked, answering.is_asked()]


def test_ranks_answer_through_the_folder_and_a_question_counts_only_answers_after_it(tmp_path: Path) -> None:
    asking = Asking(tmp_path, 4, generation=3)
    assert asking.matrix() is None
    asking.ask()
    assert run_ranks(_answers, 4, str(tmp_path)) == [[True, False]] * 4
    matrix = asking.matrix()
    assert matrix is not None
    assert len(matrix.seconds) == 12
    first = explain(matrix, DetectorConfig(link_floor_s=0.03))[0]
    assert (first.shape, first.sources, first.targets) == ("link", (1,), (2,))
    asking.ask()
    assert asking.matrix() is None, "those were of before"
    assert Asking(tmp_path, 4, generation=4).matrix() is None, "and of another generation"


def test_half_an_answer_and_a_damaged_one_are_none(tmp_path: Path) -> None:
    asking = Asking(tmp_path, 2, generation=0)
    asking.ask()
    whole = '{"step": 5, "seconds": [[0, 1, 0.001]]}'
    (tmp_path / "probe.generation0.rank00000.json").write_text(whole)
    assert asking.matrix() is None
    other = tmp_path / "probe.generation0.rank00001.json"
    for damaged in ("{", "[]", '{"step": 5}', '{"step": 4, "seconds": [[1, 0, 0.001]]}'):
        other.write_text(damaged)
        assert asking.matrix() is None, damaged
    other.write_text('{"step": 5, "seconds": [[1, 0, 0.002]]}')
    assert asking.matrix() == DelayMatrix({(0, 1): 0.001, (1, 0): 0.002})
    remove(tmp_path)
    assert os.listdir(tmp_path) == []
    remove(tmp_path / "none")
