"""The links of a job that runs, measured when somebody asks, through the folder in which its ranks record.

Whoever watches asks with a file. The ranks look for it before each step and agree by a vote, which may ride on any
collective of theirs, that all of them probe now (`faulttol.localize.probe`); each answers with a file. A rank that sees
the question late makes them probe once more, and nobody waits for anybody outside of collectives.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from faulttol import localize
from faulttol.config import DetectorConfig
from faulttol.finding import Finding, FindingKind
from faulttol.localize import DelayMatrix, Explanation

if TYPE_CHECKING:
    import torch.distributed as dist

_LOG = logging.getLogger(__name__)
_OF_GENERATION = re.compile(r"probe\.generation(\d+)")
_PATIENCE_S = 30.0
"""For an answer; then what the steps alone tell has to do, and the ranks are asked again."""
_AGAIN_S = 5.0
"""Between two probes that name no link, while the steps stay long."""
_PAUSE = 4.0
"""... and so many times what the answers took, which is up to a step."""

_FOREMOST = 0.1
"""Of the rise of the delay that rose most: what others rose by less is left out."""


class Answering:
    """A rank's side."""

    def __init__(self, folder: Path, rank: int, generation: int) -> None:
        self._question = _question(folder, generation)
        self._answer = _answer(folder, rank, generation)
        self._answered_ns = 0
        self._complained = False

    def is_asked(self) -> bool:
        """Return whether there is a question that this rank has not answered; costs a look at a name."""
        return self._asked_ns() not in (0, self._answered_ns)  # a clock may be set back

    def probe(self, step: int, *, group: dist.ProcessGroup | None = None, device: str = "cpu") -> None:
        """Measure this rank's links, which all ranks of the group do together, and answer; `step` names the answer."""
        self._answered_ns = self._asked_ns() or self._answered_ns
        row = localize.probe(group, device=device)
        told = {"step": step, "seconds": [[source, target, seconds] for (source, target), seconds in row.items()]}
        try:
            _publish(self._answer, json.dumps(told))
        except OSError as error:  # a full disk must not end training
            if not self._complained:
                self._complained = True
                _LOG.warning("the answer to a probe is lost, and it may not be the last: %s", error)

    def _asked_ns(self) -> int:
        try:
            return self._question.stat().st_mtime_ns
        except OSError:
            return 0


class Asking:
    """The observer's side, of one generation."""

    def __init__(self, folder: Path, num_ranks: int, generation: int) -> None:
        self._question = _question(folder, generation)
        self._answers = [_answer(folder, rank, generation) for rank in range(num_ranks)]
        self._after_step = -1

    def ask(self, *, again: bool = False) -> None:
        """Ask for a probe; answers of before count no more. `again`, where one may be lost: those since the last do."""
        if not again:
            self._after_step = max((step for step, _ in self._read()), default=-1)
        _publish(self._question, "")

    def matrix(self) -> DelayMatrix | None:
        """Return what all ranks have measured in one step since the question; None before they have."""
        rows = self._read()
        steps = {step for step, _ in rows}
        if len(rows) < len(self._answers) or len(steps) > 1 or steps.pop() <= self._after_step:
            return None
        return DelayMatrix({link: seconds for _, row in rows for link, seconds in row.items()})

    def _read(self) -> list[tuple[int, dict[localize.Link, float]]]:
        found = []
        for path in self._answers:
            try:
                told = json.loads(path.read_text())
                row = {(int(a), int(b)): float(s) for a, b, s in told["seconds"]}
                step = int(told["step"])
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
            if all(0 <= seconds < math.inf for seconds in row.values()):
                found.append((step, row))
        return found


class Links(Protocol):
    """Where a matrix of delays is to be had: `Asking`."""

    def ask(self, *, again: bool = False) -> None:
        """Ask for one; `again` for the one that was asked for last, of which an answer may be lost."""

    def matrix(self) -> DelayMatrix | None:
        """Return it, once it is there."""


class Locator:
    """Lets a suspicion of slow communication through once probes say which link, sender or receiver it is.

    The lesser of two counts, so that one busy moment accuses nobody. What is usual it measures once, while nothing
    is wrong. Where nobody answers, the suspicion passes as it is. Times are the caller's.
    """

    def __init__(self, links: Links, config: DetectorConfig) -> None:
        self._links, self._config = links, config
        self._asked_for: Literal["usual", "suspicion"] | None = None
        self._asked_s = 0.0
        self._took_s = 0.0
        """From a question to its answer, the lesser of the last two."""
        self._ask_after_s = 0.0
        self._usual: DelayMatrix | None = None
        self._first: DelayMatrix | None = None
        self._said: Sequence[Explanation] | None = None
        self._said_s = 0.0
        self._is_deaf = False
        self._complained = False

    def look(self, now_s: float, findings: tuple[Finding, ...], *, is_settled: bool) -> tuple[Finding, ...]:
        """Return the findings, located; `is_settled`: it is known what steps usually take."""
        suspicion = next((one for one in findings if one.kind is FindingKind.COMMUNICATION_SLOW), None)
        if suspicion is None:
            self._learn(now_s, is_healthy=is_settled and not any(one.kind.is_fault for one in findings))
            return findings
        if self._is_due(now_s):
            matrix = self._measured(now_s, "suspicion")
            if matrix is not None:
                self._said = localize.explain(_foremost(matrix, self._usual), self._config, usual=self._usual)
                self._said_s = now_s
        others = tuple(one for one in findings if one is not suspicion)
        if self._said:
            return (*others, localize.refine(replace(suspicion, suspects=()), self._said))
        return findings if self._is_deaf else others

    def _is_due(self, now_s: float) -> bool:
        """Whether to measure; not all the time, since steps with probes are none that rules about speed look at."""
        if self._said is None or self._asked_for == "suspicion":
            return True
        return not self._said and now_s - self._said_s > max(_AGAIN_S, _PAUSE * self._took_s)

    def _learn(self, now_s: float, *, is_healthy: bool) -> None:
        if self._said:  # nothing that was named is kept; a suspicion that nothing confirmed may be back at once
            self._said = None
        if is_healthy and self._usual is None:
            self._usual = self._measured(now_s, "usual")
        elif self._asked_for is not None:  # the answer will be of a time in which that changed
            self._asked_for, self._ask_after_s = None, self._asked_s + _AGAIN_S

    def _measured(self, now_s: float, what: Literal["usual", "suspicion"]) -> DelayMatrix | None:
        """Return the lesser of two probes, once both are there; ask for what is missing."""
        if self._asked_for != what:
            self._asked_for = self._first = None
            self._ask(now_s, what)
            return None
        matrix = self._links.matrix()
        if matrix is None:
            if now_s - self._asked_s > _PATIENCE_S:
                self._is_deaf = self._is_deaf or what == "suspicion"
                self._ask(now_s, what, again=True)
            return None
        took_s, self._is_deaf = now_s - self._asked_s, False
        first, self._first, self._asked_for = self._first, matrix, None
        self._took_s = took_s if first is None else min(took_s, self._took_s)  # the other may have met an evaluation
        if first is not None:
            return first | matrix
        self._ask(now_s, what)
        return None

    def _ask(self, now_s: float, what: Literal["usual", "suspicion"], *, again: bool = False) -> None:
        if now_s < self._ask_after_s:
            return
        try:
            self._links.ask(again=again)
        except OSError as error:
            if not self._complained:
                self._complained = True
                _LOG.warning("cannot ask the ranks for a probe of their links; it is tried again: %s", error)
            self._ask_after_s = now_s + _AGAIN_S
            self._asked_for, self._is_deaf = None, True
            return
        self._asked_for, self._asked_s = what, now_s


def _foremost(matrix: DelayMatrix, usual: DelayMatrix | None) -> DelayMatrix:
    """Return the matrix with the usual delay of cells that rose by little beside the one that rose most.

    They are not why the steps are long: a machine that is busy, or which waits for what is slow, has such.
    """
    if usual is None:
        return matrix
    before = {link: usual.seconds.get(link, seconds) for link, seconds in matrix.seconds.items()}
    least_s = _FOREMOST * max((seconds - before[link] for link, seconds in matrix.seconds.items()), default=0.0)
    risen = {link: seconds for link, seconds in matrix.seconds.items() if seconds - before[link] >= least_s}
    return DelayMatrix(before | risen, matrix.classes)


def remove(folder: Path, before: int | None = None) -> None:
    """Remove questions and answers from a folder of rings, which need not exist; or those of generations `before`.

    Raises: OSError.
    """
    for path in folder.glob("probe.generation*"):
        named = _OF_GENERATION.match(path.name)
        if before is None or (named is not None and int(named[1]) < before):
            path.unlink(missing_ok=True)


def _question(folder: Path, generation: int) -> Path:
    return folder / f"probe.generation{generation}"


def _answer(folder: Path, rank: int, generation: int) -> Path:
    return folder / f"probe.generation{generation}.rank{rank:05d}.json"


def _publish(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text)
    unfinished.rename(path)
