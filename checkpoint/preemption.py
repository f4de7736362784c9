"""Saving at once when the machine is about to go, in the middle of a step.

After every update the state is *armed*: kept at hand, unchanged until the next fence. A wish to save may come at any
moment, from a signal's handler too. If no update is under way the armed state is saved there and then, by a thread
that waits for wishes; else as soon as the update is over. Ranks whose loops are a step apart when they are asked save
different steps first. So as long as nothing is committed, each step that is armed is saved in place of the one before:
one of them is the same everywhere.

Ranks meet in an attempt by its name, which is the same on all of them whatever came first there, the wish or the loop:
a wish that is granted before the loop asks for the step starts the very attempt that the loop's call then joins, even
if it has failed on this rank meanwhile. So a wish is granted once for a step, and tried again with the next one.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from checkpoint.errors import CheckpointError, SaveFailed
from checkpoint.handle import SaveHandle
from checkpoint.request import Request

_log = logging.getLogger(__name__)


class Preemption:
    """The state that may be saved at any moment, and the wish to do so."""

    def __init__(
        self,
        start: Callable[[Request, bool], SaveHandle],
        cancel: Callable[[SaveHandle, BaseException], None],
        deadline_s: float,
        *,
        is_alone: bool,
    ) -> None:
        """`start` starts a save, `cancel` lets one fail; `is_alone` says that there is one rank.

        The second argument of `start` says whether the loop has asked for that attempt, for other tiers, before.
        """
        self.lock = threading.Lock()
        """Held by whoever starts a save."""
        self.handle: SaveHandle | None = None
        """The last save that was started for a wish."""
        self.armed: Request | None = None
        """What may be saved at any moment."""
        self._start = start
        self._cancel = cancel
        self._deadline_s = deadline_s
        self._is_alone = is_alone
        self._is_updating = False
        self._is_wished = False
        self._last: SaveHandle | None = None
        self._ahead: SaveHandle | None = None
        """What was started for a wish and is what the loop's next save of that step will join."""
        self._wishes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def arm(self, request: Request) -> None:
        """Take a state that may be saved until the next fence; save it if that is wished and not done yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="checkpoint-preemption", daemon=True)
            self._thread.start()
        with self.lock:
            self.armed = replace(request, deadline_s=self._deadline_s)
            self._is_updating = False
            if self._is_wished and self._is_wanted(request.step):
                self._save(self.armed)

    def armed_at(self, step: int) -> Request | None:
        """Return the armed state if it is of this step, and no update has begun since."""
        return None if self.armed is None or self._is_updating or self.armed.step != step else self.armed

    def update_begins(self) -> None:
        """Let the armed state not be saved any more, unless its save has begun."""
        if self._thread is not None:
            with self.lock:
                self._is_updating = True

    def wish(self) -> None:
        """Ask for a save at once. Takes no lock: a signal's handler may call it."""
        self._is_wished = True
        self._wishes.put(True)

    def note(self, handle: SaveHandle) -> None:
        """Remember a save that the loop asked for: the same step need not be saved twice. With the lock held."""
        self._last = handle

    def join(self, step: int) -> SaveHandle | None:
        """Return what the loop's save of a step joins, once: the save that a wish started ahead. With the lock held."""
        ahead = self._ahead
        if ahead is None or ahead.step != step:
            return None
        self._ahead = None
        return ahead

    def close(self) -> None:
        """Stop listening, and drop the armed state. Idempotent."""
        if self._thread is not None:
            self._wishes.put(False)
            self._thread.join()
            self._thread = None
        self.armed = None

    def _serve(self) -> None:
        while self._wishes.get():
            with self.lock:
                if self.armed is None or self._is_updating or not self._is_wanted(self.armed.step):
                    continue
                try:
                    self._save(self.armed)
                except CheckpointError as error:
                    _log.warning("the urgent save of step %d did not start: %s", self.armed.step, error)

    def _is_wanted(self, step: int) -> bool:
        handle = self.handle
        if handle is None:
            return True
        if handle.failed:
            return not (handle.is_wished and handle.step == step)
        return not handle.done() and handle.step != step and not self._is_alone

    def _save(self, request: Request) -> None:
        last = self._last
        is_asked = last is not None and _is_good(last, request.step)
        if last is not None and is_asked:
            has = {outcome.tier for outcome in last.outcomes}
            if "local" in has:
                self.handle = last
                return
            request = replace(request, tiers=[(tier, storage) for tier, storage in request.tiers if tier not in has])
        older, self.handle = self.handle, self._start(request, is_asked)
        self.handle.is_wished = True
        if not is_asked:
            self._ahead = self.handle
        # What the loop asked for is asked for on every rank, and becomes a checkpoint everywhere.
        if older is not None and older.is_wished and not older.done():
            self._cancel(older, SaveFailed(f"step {older.step}: given up, since step {request.step} is saved instead"))


def _is_good(handle: SaveHandle, step: int) -> bool:
    """Whether a save is of this step, and may still become or has become a checkpoint."""
    return handle.step == step and not handle.failed
