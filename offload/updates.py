"""The two threads that work on an optimizer step.

A `Round` has a task for every subgroup. The host's worker updates what is in DRAM or in a tier; the device's worker
what is resident or streamed. Of what has arrived both take the lowest subgroup first, because the next forward needs it
first; of what has not, the highest, whose gradient comes first. The host may ask for a step long before the device has
come to the end of backward: nothing may wait for the last gradient then while others are there.

What a task's gradient is multiplied with is the round's verdict, which exists when the norm of all gradients does. A
speculative round does not wait for it: it takes 1, writes to the store's other side, and is right if the verdict says
the same; otherwise the subgroup is updated again from the side that still counts.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from offload.kernels import Kernel, States
from offload.rounds import Backlog, Prefetched, Round, Run, Task, Verdict
from offload.schedule import Piece
from offload.states import StateStore, TierCache
from offload.tracing import Trace
from offload.transfer import TIMEOUT_S, Lanes, Ring, Ticket


@dataclass(frozen=True, slots=True)
class Workplace:
    """What both workers use."""

    store: StateStore
    lanes: Lanes
    parameters: Sequence[torch.Tensor]
    """Flat views of the parameters' values, which updates write."""
    runs: Callable[[Task, float], list[Run]]
    """Returns a task's runs, given what its gradients are multiplied with."""
    trace: Trace | None = None


class Worker:
    """A thread that takes tasks from a backlog until it is closed."""

    def __init__(self, name: str, place: Workplace) -> None:
        self.backlog = Backlog()
        self.place = place
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End, when all tasks are done; a second call does nothing."""
        self.backlog.close()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_S)

    def _serve(self) -> None:
        raise NotImplementedError

    def _scale(self, round_: Round, task: Task) -> Verdict:
        """Return the verdict, or in a speculative round what it is expected to be.

        States on the device and in a tier have no other side, so they always wait for it.
        """
        if round_.speculates and task.path in ("cpu", "stream") and not round_.verdict.done():
            return Verdict(1.0)
        return round_.wait()

    def _settle(self, round_: Round, task: Task, used: Verdict, ticket: Ticket) -> None:
        """Publish the ticket, keep it for the verdict, or do the task again."""
        with round_.lock:
            if not round_.verdict.done():
                task.speculated, task.wrote = ticket, True
                return
            if round_.verdict.result() != used:
                task.wrote = True
                task.tickets.append(ticket)  # what comes instead waits for what is given up
                self.backlog.put(round_, task)
                return
        self._publish(task, ticket)

    def _publish(self, task: Task, ticket: Ticket) -> None:
        task.gradients.clear()
        task.updated.set_result(ticket)

    def _restore(self, round_: Round, task: Task) -> None:
        """End a task of a step that is not made."""
        self._publish(
            task, write_back(self.place, task, awaited(round_, task)) if task.wrote else self.place.lanes.now()
        )

    def _guarded(self, round_: Round, task: Task, work: Callable[[Round, Task], None]) -> None:
        """Do a part of a task; what goes wrong becomes the task's own."""
        try:
            with torch.no_grad():
                work(round_, task)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            if not task.updated.done():
                task.updated.set_exception(error)


def write_back(place: Workplace, task: Task, after: Sequence[Ticket]) -> Ticket:
    """Write the parameters of a subgroup from its masters, which are in host memory or on the device."""
    master = place.store.read(task.index).master

    def write() -> None:
        for piece in task.subgroup.pieces:
            target = place.parameters[piece.parameter].narrow(0, piece.start, piece.count)
            target.copy_(master.narrow(0, piece.offset, piece.count))

    return place.lanes.lane("parameters up").run(write, after=after, num_bytes=4 * task.subgroup.count)


def awaited(round_: Round, task: Task) -> list[Ticket]:
    """Return what has to be done before the parameters are written."""
    return [*task.tickets, *([] if round_.may_write is None else [round_.may_write])]


@dataclass(frozen=True, slots=True)
class _Sent:
    """A ticket for work that another thread enqueues."""

    enqueued: Future[Ticket]

    def wait(self) -> None:
        self.enqueued.result(TIMEOUT_S).wait()

    def done(self) -> bool:
        return self.enqueued.done() and self.enqueued.result().done()


class HostWorker(Worker):
    """Updates subgroups in DRAM and in a tier, on the CPU."""

    def __init__(self, place: Workplace, kernel: Kernel, outs: Ring, tier: TierCache | None) -> None:
        super().__init__("offload-host", place)
        self._kernel = kernel
        self._outs = outs
        self._tier = tier
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="offload-send")

    def close(self) -> None:
        """End, when all tasks are done and on their way; a second call does nothing."""
        super().close()
        self._sender.shutdown()

    def _serve(self) -> None:
        while (taken := self.backlog.take(wait=True)) is not None:
            self._guarded(*taken, self._update)

    def _update(self, round_: Round, task: Task) -> None:
        if self._tier is not None and task.path == "tier":
            self._tier.stage(task.index)
            for other in self.backlog.upcoming():
                if other.path == "tier" and not self._tier.stage(other.index):
                    break
        for ticket in task.tickets:
            ticket.wait()
        used = self._scale(round_, task)
        if used.skip:
            if self._tier is not None and task.path == "tier":
                self._tier.take(task.index)
                self._tier.drop(task.index)
            self._restore(round_, task)
            return
        runs = self.place.runs(task, used.scale)
        index, buffer = self._outs.take()
        dtype = self.place.parameters[task.subgroup.pieces[0].parameter].dtype
        out = buffer[: task.subgroup.count * dtype.itemsize].view(dtype)
        if self._tier is not None and task.path == "tier":
            states = into = self._tier.take(task.index)
        else:
            states, into = self.place.store.current(task.index), self.place.store.next(task.index)
        self._compute(task, runs, out, states, into)
        if self._tier is not None and task.path == "tier":
            self._tier.give(task.index, keep=task.index in round_.keep)
        sent: Future[Ticket] = Future()
        self._outs.give(index, _Sent(sent))
        self._sender.submit(self._guarded, round_, task, functools.partial(self._finish, used, out, sent))

    def _finish(self, used: Verdict, out: torch.Tensor, sent: Future[Ticket], round_: Round, task: Task) -> None:
        """Send the new parameters and settle the task, while the worker goes on with the next one."""
        try:
            ticket = self._send(round_, task, out)
        except BaseException as error:
            sent.set_exception(error)
            raise
        sent.set_result(ticket)
        self._settle(round_, task, used, ticket)

    def _compute(self, task: Task, runs: Sequence[Run], out: torch.Tensor, states: States, into: States) -> None:
        gradient = task.host_gradient
        assert gradient is not None
        trace = self.place.trace
        with trace.span(f"subgroup {task.index}", "cpu update") if trace else contextlib.nullcontext():
            for run in runs:
                target = into.narrow(run.offset, run.count)
                mine = states.narrow(run.offset, run.count)
                part = slice(run.offset, run.offset + run.count)
                self._kernel.adamw(mine, gradient[part], out[part], run.step, None if into is states else target)
            if into is not states:
                _copy_rest(task, runs, states, into)

    def _send(self, round_: Round, task: Task, out: torch.Tensor) -> Ticket:
        pieces = [piece for piece in task.subgroup.pieces if piece.parameter in task.present]

        def write() -> None:
            for piece in pieces:
                target = self.place.parameters[piece.parameter].narrow(0, piece.start, piece.count)
                target.copy_(out.narrow(0, piece.offset, piece.count), non_blocking=True)

        return self.place.lanes.lane("parameters up").run(write, after=awaited(round_, task), num_bytes=out.nbytes)


def _copy_rest(task: Task, runs: Sequence[Run], states: States, into: States) -> None:
    """Copy the states that no run updates to the side that will count."""
    covered = {run.offset: run.count for run in runs}
    offset = 0
    while offset < task.subgroup.count:
        if offset in covered:
            offset += covered[offset]
            continue
        end = min((start for start in covered if start > offset), default=task.subgroup.count)
        into.narrow(offset, end - offset).copy_(states.narrow(offset, end - offset))
        offset = end


@dataclass(slots=True)
class _Staged:
    round: Round
    task: Task
    slot: int | None = None
    states: States | None = None
    up: Ticket | None = None
    early: Prefetched | None = None


class DeviceWorker(Worker):
    """Updates subgroups on the device: resident ones, and others whose states it streams there and back."""

    def __init__(self, place: Workplace, kernel: Kernel, slots: Ring | None) -> None:
        super().__init__("offload-device", place)
        self._kernel = kernel
        self._slots = slots
        self._down: dict[int, Ticket] = {}
        self._slot_down: dict[int, Ticket] = {}
        self._staged: deque[_Staged] = deque()
        self._early: list[Prefetched] = []

    def returned(self, index: int) -> None:
        """Wait until a subgroup's states are back in host memory."""
        if index in self._down:
            self._down[index].wait()

    def prefetch(self, task: Task, states: States) -> None:
        """Bring a subgroup's states to memory that the caller's current stream has given."""
        home = self.place.store.current(task.index)
        after = [self.place.lanes.now(), *([self._down[task.index]] if task.index in self._down else [])]
        up = self.place.lanes.lane("states up").run(
            lambda: states.copy_(home, non_blocking=True), after=after, num_bytes=home.nbytes
        )
        task.prefetched = Prefetched(states, up)
        self._early.append(task.prefetched)

    @property
    def num_early(self) -> int:
        """Subgroups that have memory which was lent to them."""
        return len(self._early)

    def release(self) -> int:
        """Wait until states that were prefetched are back, let go of them, and return how many bytes they took."""
        num_bytes = 0
        for early in [early for early in self._early if early.is_over]:
            early.last.wait()
            self._early.remove(early)
            num_bytes += early.states.nbytes
        return num_bytes

    def _serve(self) -> None:
        ahead = len(self._slots) if self._slots is not None else 1
        while True:
            taken = self.backlog.take(wait=not self._staged) if len(self._staged) < ahead else None
            if taken is not None:
                self._guarded(*taken, self._stage)
            elif self._staged:
                staged = self._staged.popleft()
                self._guarded(staged.round, staged.task, functools.partial(self._update, staged))
                del staged  # which would keep memory on the device that was lent
            else:
                return

    def _stage(self, round_: Round, task: Task) -> None:
        staged = _Staged(round_, task)
        if task.prefetched is not None:
            staged.early, task.prefetched = task.prefetched, None
            staged.states, staged.up = staged.early.states, staged.early.last
        elif task.path == "stream":
            assert self._slots is not None
            staged.slot, slot = self._slots.take()
            staged.states = slot.narrow(0, task.subgroup.count)
            home = self.place.store.current(task.index)
            target = staged.states
            # The host has waited for the slot's last update only; the lane waits until it has left the slot, too.
            before = [self._down[task.index]] if task.index in self._down else []
            before += [self._slot_down[staged.slot]] if staged.slot in self._slot_down else []
            staged.up = self.place.lanes.lane("states up").run(
                lambda: target.copy_(home, non_blocking=True), after=before, num_bytes=home.nbytes
            )
        self._staged.append(staged)

    def _update(self, staged: _Staged, round_: Round, task: Task) -> None:
        used = self._scale(round_, task)
        if used.skip:
            if staged.slot is not None and staged.up is not None and self._slots is not None:
                self._slots.give(staged.slot, staged.up)
            if staged.early is not None:
                staged.early.is_over = True
            self._restore(round_, task)
            return
        states = staged.states or self.place.store.current(task.index)
        runs = self.place.runs(task, used.scale)
        gradients = dict(task.gradients)  # the task's are dropped when it is done, which is before the device is
        after = [*([] if staged.up is None else [staged.up]), *awaited(round_, task)]
        ticket = self.place.lanes.lane("gpu update").run(
            lambda: self._compute(task, gradients, runs, states), after=after, uses=list(gradients.values())
        )
        if task.path == "stream":
            home = self.place.store.next(task.index)
            down = self.place.lanes.lane("states down").run(
                lambda: home.copy_(states, non_blocking=True), after=[ticket], num_bytes=home.nbytes
            )
            self._down[task.index] = down
            if staged.early is not None:
                staged.early.last, staged.early.is_over = down, True
            if staged.slot is not None and self._slots is not None:
                self._slot_down[staged.slot] = down
                self._slots.give(staged.slot, ticket)
        self._settle(round_, task, used, ticket)

    def _compute(self, task: Task, gradients: dict[int, torch.Tensor], runs: Sequence[Run], states: States) -> None:
        for run in runs:
            for piece in task.subgroup.pieces:
                part = _overlap(piece, run)
                if part is not None:
                    start = piece.start + part.offset - piece.offset
                    out = self.place.parameters[piece.parameter].narrow(0, start, part.count)
                    gradient = gradients[piece.parameter].narrow(0, start, part.count)
                    self._kernel.adamw(states.narrow(part.offset, part.count), gradient, out, run.step)


def _overlap(piece: Piece, run: Run) -> Run | None:
    start = max(piece.offset, run.offset)
    count = min(piece.offset + piece.count, run.offset + run.count) - start
    return Run(start, count, run.step) if count > 0 else None
