"""Probes that an observer asks for, and what becomes of suspicions that they confirm or do not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from torch import distributed as dist

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
        self.num_again = 0
        self.answer: DelayMatrix | None = None
        self.is_broken = False

    def ask(self, *, again: bool = False) -> None:
        self.num_asked += 1
        self.num_again += again
        self.answer = None
        if self.is_broken:
            raise OSError("no space left")

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


def test_a_suspicion_that_comes_and_goes_and_one_about_long_steps_are_not_probed_all_the_time() -> None:
    links = Script()
    locator = Locator(links, CONFIG)
    locator.look(0.0, (), is_settled=False)
    for second in range(20):
        links.answer = delays()
        locator.look(second, (SLOW,), is_settled=False)
        if second > 2:
            assert locator.look(second + 0.5, (), is_settled=False) == ()
    assert links.num_asked <= 6, "it was found to be nothing"

    links, step_s, asked_s = Script(), 60.0, -1.0
    locator = Locator(links, CONFIG)
    for look in range(600):  # of half a minute each: the ranks answer in the step after
        before = links.num_asked
        locator.look(look * 30.0, (SLOW,), is_settled=True)
        if links.num_asked > before:
            asked_s = look * 30.0
        elif look * 30.0 - asked_s >= step_s - 30.0:
            links.answer = delays()
    assert 0.1 < links.num_asked / (600 * 30.0 / step_s) < 0.5, "most steps are without probes"


def test_an_answer_that_came_after_an_evaluation_delays_no_later_probe() -> None:
    links = Script()
    locator = Locator(links, CONFIG)
    for second in (0.0, 25.0, 26.0, 32.0):
        locator.look(second, (SLOW,), is_settled=True)
        links.answer = delays()
    assert links.num_asked == 3


def test_an_answer_that_was_lost_is_asked_for_again() -> None:
    links = Script()
    locator = Locator(links, CONFIG)
    for second in (0.0, 20.0, 40.0):
        locator.look(second, (), is_settled=True)
    assert (links.num_asked, links.num_again) == (2, 1), "what is usual"
    for second in (50.0, 70.0):
        assert locator.look(second, (SLOW,), is_settled=True) == ()
    assert locator.look(90.0, (SLOW,), is_settled=True) == (SLOW,)
    assert (links.num_asked, links.num_again) == (4, 2)
    for second in (91.0, 92.0):
        links.answer = delays((1, 0))
        found = locator.look(second, (SLOW,), is_settled=True)
    assert found[0].suspects == (Suspect(1, 1.0, 0),)


def test_where_nobody_can_be_asked_it_is_told_once_and_the_suspicion_passes(caplog: pytest.LogCaptureFixture) -> None:
    links = Script()
    links.is_broken = True
    locator = Locator(links, CONFIG)
    for half_seconds in range(40):
        assert locator.look(half_seconds / 2, (), is_settled=True) == ()
    assert locator.look(20.0, (SLOW,), is_settled=True) == (SLOW,)
    assert links.num_asked <= 5
    assert len(caplog.records) == 1
    links.is_broken = False
    for second in (25.0, 26.0, 27.0):
        found = locator.look(second, (SLOW,), is_settled=True)
        links.answer = delays((1, 0))
    assert found[0].suspects == (Suspect(1, 1.0, 0),)


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
    locator.look(6.0, (), is_settled=True)
    for second in (7.0, 8.0):
        links.answer = delays((0, 1), (1, 0), *([(2, 3)] if second == 7.0 else []))  # a busy moment
        locator.look(second, (), is_settled=True)
    assert links.num_asked == 3
    for _ in range(2):
        assert locator.look(9.0, (SLOW,), is_settled=True) == ()
        links.answer = delays((0, 1), (1, 0), (2, 3))
    (found,) = locator.look(10.0, (SLOW,), is_settled=True)
    assert found.suspects == (Suspect(2, 1.0, 3),)


def test_noise_beside_a_slow_receiver_accuses_nobody() -> None:
    """A receiver of three ranks that share two cores, as measured: what is noise rose to 4 ms."""
    usual = DelayMatrix({(a, b): 4e-4 for a in range(3) for b in range(3) if a != b})
    links = Script()
    locator = Locator(links, CONFIG)
    for second in range(3):
        links.answer = usual
        locator.look(float(second), (), is_settled=True)
    for second in range(3, 6):
        found = locator.look(float(second), (SLOW,), is_settled=True)
        noisy = {(0, 2): 4e-3, (2, 0): 1.9e-3, (0, 1): 0.197, (2, 1): 0.197}
        links.answer = DelayMatrix({**usual.seconds, **noisy})
    assert [suspect for one in found for suspect in one.suspects] == [Suspect(1, 1.0)]


def _answers_into_nothing(rank: int, world_size: int, folder: str) -> list[str]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("faulttol.probing").addHandler(handler)
    answering = Answering(Path(folder), rank, generation=0)
    for step in range(3):
        answering.probe(step)
    return told


def test_an_answer_that_cannot_be_written_ends_nothing_and_is_told_of_once(tmp_path: Path) -> None:
    for told in run_ranks(_answers_into_nothing, 2, str(tmp_path / "none")):
        (line,) = told
        assert "the answer to a probe is lost" in line
        assert "No such file" in line


def _answers(rank: int, world_size: int, folder: str) -> list[bool]:
    answering = Answering(Path(folder), rank, generation=3)
    asked = [answering.is_asked()]
    links = sockets.connections()
    if rank == 1:
        assert sockets.pace(links[2], 2_000_000) > 0
    answering.probe(step=7)
    asked.append(answering.is_asked())
    dist.barrier()
    os.utime(Path(folder, "probe.generation3"), (1e9, 1e9))  # the next question, of a clock that was set back
    return [*asked, answering.is_asked()]


def test_ranks_answer_through_the_folder_and_a_question_counts_only_answers_after_it(tmp_path: Path) -> None:
    asking = Asking(tmp_path, 4, generation=3)
    assert asking.matrix() is None
    asking.ask()
    assert run_ranks(_answers, 4, str(tmp_path)) == [[True, False, True]] * 4
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
    endless = '{"step": Infinity, "seconds": []}', '{"step": 5, "seconds": [[1, 0, 1e999]]}', "[" * 100_000
    numbers = '{"step": 5, "seconds": [[1, 0, NaN]]}', '{"step": 5, "seconds": [[1, 0, -1]]}'
    halves = (
        "",
        "{",
        "[]",
        "null",
        '{"step": 5}',
        '{"step": 4, "seconds": [[1, 0, 0.001]]}',
        '{"step": 5, "seconds": [[]]}',
    )
    for damaged in (*endless, *numbers, *halves):
        other.write_text(damaged)
        assert asking.matrix() is None, damaged
    other.write_text('{"step": 5, "seconds": [[1, 0, 0.002]]}')
    assert asking.matrix() == DelayMatrix({(0, 1): 0.001, (1, 0): 0.002})
    asking.ask(again=True)
    assert asking.matrix() is not None, "an answer since the question"
    asking.ask()
    assert asking.matrix() is None
    remove(tmp_path)
    assert os.listdir(tmp_path) == []
    remove(tmp_path / "none")
