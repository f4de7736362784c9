"""The links of a job that runs, measured when somebody asks, through the folder in which its ranks record.

Whoever watches asks with a file. The ranks look for it before each step and agree by a vote, which may ride on any
collective of theirs, that all of them probe now (`faulttol.localize.probe`); each answers with a file. A rank that sees
the question late makes them probe once more, and nobody waits for anybody outside of collectives.
"""

from __future__ import annotations

import json
import logging
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
_PATIENCE_S = 30.0
"""For an answer; then what the steps alone tell has to do."""
_AGAIN_S = 5.0
"""Between two probes that name no link, while the steps stay long."""


class Answering:
    """A rank's side."""

    def __init__(self, folder: Path, rank: int, generation: int) -> None:
        self._question = _question(folder, generation)
        self._answer = _answer(folder, rank, generation)
        self._answered_ns = 0

    def is_asked(self) -> bool:
        """Return whether there is a question that this rank has not answered; costs a look at a name."""
        return self._asked_ns() > self._answered_ns

    def probe(self, step: int, *, group: dist.ProcessGroup | None = None, device: str = "cpu") -> None:
        """Measure this rank's links, which all ranks of the group do together, and answer; `step` names the answer."""
        self._answered_ns = max(self._answered_ns, self._asked_ns())
        row = localize.probe(group, device=device)
        told = {"step": step, "seconds": [[source, target, seconds] for (source, target), seconds in row.items()]}
        try:
            _publish(self._answer, json.dumps(told))
        except OSError:  # a full disk must not end training
            _LOG.warning("%s: the answer to a probe is lost", self._answer, exc_info=True)

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

    def ask(self) -> None:
        """Ask for a probe; answers of before count no more."""
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
                found.append((int(told["step"]), {(int(a), int(b)): float(s) for a, b, s in told["seconds"]}))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found


class Links(Protocol):
    """Where a matrix of delays is to be had: `Asking`."""

    def ask(self) -> None:
        """Ask for one."""

    def matrix(self) -> DelayMatrix | None:
        """Return it, once it is there."""


class Locator:
    """Lets a suspicion of slow communication through once two probes say which link, sender or receiver it is.

    The lesser of the two counts, so that one busy moment accuses nobody. What is usual it measures once, while nothing
    is wrong. Where nobody answers, the suspicion passes as it is. Times are the caller's.
    """

    def __init__(self, links: Links, config: DetectorConfig) -> None:
        self._links, self._config = links, config
        self._asked_for: Literal["usual", "suspicion"] | None = None
        self._asked_s = 0.0
        self._usual: DelayMatrix | None = None
        self._first: DelayMatrix | None = None
        self._said: Sequence[Explanation] | None = None
        self._said_s = 0.0
        self._is_deaf = False

    def look(self, now_s: float, findings: tuple[Finding, ...], *, is_settled: bool) -> tuple[Finding, ...]:
        """Return the findings, located; `is_settled`: it is known what steps usually take."""
        suspicion = next((one for one in findings if one.kind is FindingKind.COMMUNICATION_SLOW), None)
        matrix = self._links.matrix() if self._asked_for is not None else None
        if suspicion is None:
            self._learn(now_s, matrix, is_healthy=is_settled and not any(one.kind.is_fault for one in findings))
            return findings
        self._ask_about(now_s, matrix)
        others = tuple(one for one in findings if one is not suspicion)
        if self._said:
            return (*others, localize.refine(replace(suspicion, suspects=()), self._said))
        return findings if self._is_deaf else others

    def _learn(self, now_s: float, matrix: DelayMatrix | None, *, is_healthy: bool) -> None:
        self._first = self._said = None
        if self._asked_for == "usual" and matrix is not None and is_healthy:
            self._usual, self._asked_for, self._is_deaf = matrix, None, False
        elif self._asked_for == "suspicion" or not is_healthy:
            self._asked_for = None
        if self._usual is None and self._asked_for is None and is_healthy:
            self._ask(now_s, "usual")

    def _ask_about(self, now_s: float, matrix: DelayMatrix | None) -> None:
        if self._asked_for == "usual":
            self._asked_for = None
        if self._asked_for is None:
            if self._said is None or (not self._said and now_s - self._said_s > _AGAIN_S):
                self._ask(now_s, "suspicion")
        elif matrix is not None and self._first is None:
            self._first = matrix
            self._ask(now_s, "suspicion")
        elif matrix is not None and self._first is not None:
            self._said = localize.explain(self._first | matrix, self._config, usual=self._usual)
            self._said_s, self._asked_for, self._first, self._is_deaf = now_s, None, None, False
        elif now_s - self._asked_s > _PATIENCE_S:
            self._is_deaf = True

    def _ask(self, now_s: float, what: Literal["usual", "suspicion"]) -> None:
        try:
            self._links.ask()
        except OSError:
            _LOG.warning("cannot ask the ranks for a probe of their links", exc_info=True)
            self._is_deaf = True
            return
        self._asked_for, self._asked_s = what, now_s


def remove(folder: Path) -> None:
    """Remove the questions and answers of an earlier launch from a run's folder of rings; it need not exist."""
    for path in folder.glob("probe.generation*"):
        path.unlink(missing_ok=True)


def _question(folder: Path, generation: int) -> Path:
    return folder / f"probe.generation{generation}"


def _answer(folder: Path, rank: int, generation: int) -> Path:
    return folder / f"probe.generation{generation}.rank{rank:05d}.json"


def _publish(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text)
    unfinished.rename(path)
