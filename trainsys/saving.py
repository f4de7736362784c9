"""The checkpoints of a run as its loop sees them: armed after every step, saved on the cadence, told when durable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch.distributed import ProcessGroup

import checkpoint as ck
from checkpoint.tiers import TierName
from trainsys import snapshot
from trainsys.engines import Engine
from trainsys.hostmemory import gather_on
from trainsys.metrics import checkpoint_record
from trainsys.snapshot import Progress

_TRIES = 2
"""At the last step: an urgent save of it that failed is what the first try joins."""

Write = Callable[[int, Mapping[str, float]], None]
"""(step, record) to the metrics."""


class Saver:
    """Saves one rank's part of the run; every rank calls the same methods after the same steps.

    A save only registers what is to be copied. The copies run during the next forward and backward, and the engine's
    update waits for those of what it changes.
    """

    def __init__(
        self,
        checkpointer: ck.Checkpointer,
        engine: Engine,
        write: Write,
        *,
        control: ProcessGroup,
        lasting: Sequence[TierName],
        saved_step: int,
    ) -> None:
        """Work for one run. `lasting` are the tiers that outlast it, `saved_step` the last step that is saved there."""
        self._checkpointer = checkpointer
        self._engine = engine
        self._write = write
        self._gather = gather_on(control)
        self._lasting = lasting
        self._saved_step = saved_step
        self._pending: ck.SaveHandle | None = None
        self._told: ck.SaveHandle | None = None
        engine.fence_with(checkpointer)

    def after_step(self, place: Progress) -> None:
        """Keep the state of this step at hand for a save at any moment until the next update; save it if it is due.

        Raises checkpoint.CheckpointError if an earlier save failed and the configuration says so.
        """
        self._checkpointer.poll()
        self._tell(place.step)
        state = snapshot.state_of(self._engine, place)
        self._checkpointer.arm(place.step, state.tensors, state.objects, shared=state.shared)
        if self._checkpointer.should_save(place.step):
            self._save(state)

    def preempt(self) -> None:
        """Start an urgent save of the last step; any thread may call it, in the middle of the next step."""
        self._checkpointer.preempt()

    def finish(self, place: Progress) -> None:
        """Save the last step where it outlasts the run, unless it is saved there, and wait until it is durable."""
        for _ in range(_TRIES):
            if not any(self._gather(not self._is_kept(place.step))):
                break
            self._save(snapshot.state_of(self._engine, place), self._lasting)
        if self._pending is not None:
            self._pending.result()  # the commit has a time limit of its own
            self._tell(place.step)

    def _is_kept(self, step: int) -> bool:
        """Whether the last save was of this step, went to the local tier, and became a checkpoint; waits for that."""
        handle = self._pending
        if handle is None or handle.step != step or all(outcome.tier != "local" for outcome in handle.outcomes):
            return step == self._saved_step
        return handle.exception() is None and handle.at("local").exception() is None

    def _save(self, state: snapshot.State, tiers: Sequence[TierName] | None = None) -> None:
        self._pending = self._checkpointer.save(
            state.place.step, state.tensors, state.objects, shared=state.shared, tiers=tiers
        )

    def _tell(self, step: int) -> None:
        """Write where the time of the last save went, once, when it has ended."""
        handle = self._pending
        if handle is None or handle is self._told or not handle.done():
            return
        self._told = handle
        self._checkpointer.poll()  # an error is the checkpointer's to tell
        if handle.exception() is None:
            self._write(step, checkpoint_record(handle.step, handle.stats()))
