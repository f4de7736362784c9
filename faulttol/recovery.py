"""One process's side of recovery: it works in one generation of a job after another, without being started again.

The job's supervisor gives orders, the process tells how it stands:

    supervisor                          process
    assign(generation, place)   ->      STANDBY -> WORKING
                                <-      FINISHED, or FAILED where its work raised
    abort(generation)           ->      its connections are shut, pending collectives raise
                                <-      QUIESCED: the work has ended, its groups are gone
    assign(generation + 1, …)   ->      WORKING: the same work is called again, and restores by itself
    dismiss                     ->      `run` returns

Between two generations the supervisor fences the older one (`faulttol.fence`), ends the processes that are at fault,
and decides who takes whose place (`faulttol.policy`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from faulttol.abort import Connections, abort_devices, quiesce
from faulttol.errors import Corrupted

_AGAIN_S = 0.05  # between two attempts at freeing the work: groups may be in the making when the first one comes

State = Literal["standby", "working", "finished", "failed", "quiesced"]
T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A process's place in one generation."""

    generation: int
    place: Mapping[str, Any]
    """Whatever the supervisor tells; JSON values."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a process stands; JSON values."""

    generation: int
    """The last one it took part in; -1 before the first."""
    state: State
    messages: tuple[str, ...] = ()
    """FAILED, and QUIESCED after it: `Type: text` of the error and of those it came from."""
    traceback: str = ""
    corrupted: tuple[int, ...] | None = None
    """FAILED, and QUIESCED after it, because wrong numbers were found: the ranks that have them; see `Corrupted`."""
    was_aborted: bool = False
    """FAILED, and QUIESCED after it, with an error that came after the order to end: that may be its cause."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Standing:
        corrupted = fields["corrupted"]
        return cls(
            fields["generation"],
            fields["state"],
            tuple(fields["messages"]),
            fields["traceback"],
            None if corrupted is None else tuple(corrupted),
            fields["was_aborted"],
        )


class Member:
    """A process of a job that survives the loss of others. One thread works, any other may give orders."""

    def __init__(
        self,
        publish: Callable[[Standing], None],
        describe: Callable[[BaseException], tuple[tuple[str, ...], str]],
    ) -> None:
        """`publish` tells the supervisor, `describe` puts an error into (messages, traceback)."""
        self.connections = Connections()
        """Record in it while groups are made."""
        self._publish = publish
        self._describe = describe
        self._changed = threading.Condition()
        self._next: Assignment | None = None
        self._generation = -1
        self._aborted = -1
        self._is_working = False
        self._has_finished = False
        self._is_dismissed = False
        self._num_freeing = 0
        """Threads that break off what the work may wait for."""
        self._releases: list[Callable[[], None]] = []

    def assign(self, assignment: Assignment) -> None:
        """Order: work in this generation, once the one before is over."""
        with self._changed:
            self._next = assignment
            self._changed.notify_all()

    def abort(self, generation: int) -> None:
        """Order: let the work of this generation, or an older one, end now.

        Returns at once; where there is no room for one more thread, when the work has ended.
        """
        with self._changed:
            self._aborted = max(self._aborted, generation)
            self._num_freeing += 1
            self._changed.notify_all()
        freeing = threading.Thread(target=self._free, args=(generation,), name="faulttol-abort", daemon=True)
        try:
            freeing.start()
        except RuntimeError as error:  # the machine has no room for one more thread
            log.warning("generation %d is broken off by the thread that takes orders: %s", generation, error)
            self._free(generation)

    def dismiss(self) -> None:
        """Order: let `run` return."""
        with self._changed:
            self._is_dismissed = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def releasing(self, release: Callable[[], None]) -> Iterator[None]:
        """Inside the block, call `release` on an abort, perhaps often and from another thread.

        For waits that no connection of the process groups ends.
        """
        with self._changed:
            self._releases.append(release)
        try:
            yield
        finally:
            with self._changed:
                self._releases.remove(release)

    def run(self, work: Callable[[Assignment], T]) -> T | None:
        """Call `work` in each generation that this process is assigned to; return its last result once dismissed.

        None for a process that never worked to the end. An Exception of the work is told to the supervisor, which
        decides what comes of it; anything else passes through.
        """
        result: T | None = None
        gc.collect()
        gc.freeze()  # what is imported by now stays: survivors collect twice, at 0.2 s each with it and 0.02 s without
        self._publish(Standing(-1, "standby"))
        while (assignment := self._await_assignment()) is not None:
            self._publish(Standing(self._generation, "working"))
            try:
                result = work(assignment)
                told = Standing(self._generation, "finished")
            except Exception as error:  # noqa: BLE001  told to the supervisor, which owns it
                log.info("generation %d: the work ended with %s: %s", self._generation, type(error).__name__, error)
                result = None
                was_aborted = self._is_aborted()
                messages, text = self._describe(error)
                told = Standing(self._generation, "failed", messages, text, _corrupted(error), was_aborted)
                self._publish(told)
                quiesce(error)
                told = replace(told, state="quiesced")
            self._rest(has_finished=told.state == "finished")
            self._publish(told)
        return result

    def _await_assignment(self) -> Assignment | None:
        """Return the next place to work in; None when there will be none."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_dismissed or self._next is not None or self._overtaken())
                if self._is_dismissed:
                    return None
                if self._next is not None:
                    assignment, self._next = self._next, None
                    self._generation = assignment.generation
                    self._has_finished = False
                    if assignment.generation > self._aborted:
                        self._is_working = True
                        return assignment
                generation = self._generation = self._aborted
                self._has_finished = False
            # It was over before the work began, or after it had finished.
            quiesce(None)
            self._publish(Standing(generation, "quiesced"))

    def _is_aborted(self) -> bool:
        with self._changed:
            return self._aborted >= self._generation

    def _overtaken(self) -> bool:
        """Whether a generation was aborted that this process had finished its work in."""
        return self._has_finished and self._aborted >= self._generation

    def _rest(self, *, has_finished: bool) -> None:
        """Note that the work has ended, and return when nobody breaks off any more: the next groups are not theirs."""
        with self._changed:
            self._is_working, self._has_finished = False, has_finished
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_freeing == 0)
        self.connections.forget()

    def _free(self, generation: int) -> None:
        """Break everything that the work may wait for, until it has ended."""
        failed: set[Callable[[], None]] = set()
        try:
            while (releases := self._to_release(generation)) is not None:
                self.connections.shut()
                for release in (*releases, abort_devices):
                    try:
                        release()
                    except Exception:  # the others, and the next attempt, must come all the same
                        if release not in failed:
                            log.exception("generation %d: a wait could not be broken off", generation)
                        failed.add(release)
                with self._changed:
                    self._changed.wait_for(lambda: not self._is_working, _AGAIN_S)
        finally:
            with self._changed:
                self._num_freeing -= 1
                self._changed.notify_all()

    def _to_release(self, generation: int) -> list[Callable[[], None]] | None:
        """What to call so that the work of this generation ends; None where it has ended."""
        with self._changed:
            is_over = not self._is_working or self._generation > generation
            return None if is_over else list(self._releases)


def _corrupted(error: BaseException) -> tuple[int, ...] | None:
    """The ranks whose wrong numbers the error, or one that it came from, is about."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, Corrupted):
            return link.ranks
        link = link.__cause__
    return None
