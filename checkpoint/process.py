"""A Drain in a process of its own: hashing, writing and waiting for disks happen where no interpreter lock is shared.

The process is started as a plain interpreter, so a training script is never run a second time; it maps the arena,
and is told by lines of JSON what lies in which slot (`checkpoint.child`). It ends with its parent. When it dies, the
saves that it was writing fail, and the next one starts another.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import checkpoint
from checkpoint.arena import Arena, Slot
from checkpoint.errors import SaveFailed, StorageError
from checkpoint.shard import Parcel, ShardPlan
from checkpoint.spans import Span, Trace
from checkpoint.storage import Storage
from checkpoint.writer import Flow, Target

_START = """
import json, sys, types
settings = json.loads(sys.argv[1])
sys.path[:] = settings["path"]
package = types.ModuleType("checkpoint")
package.__path__ = settings["package"]
sys.modules["checkpoint"] = package
from checkpoint.child import main
main(settings)
"""
"""Runs `checkpoint.child` without the `__init__` of the package, which imports torch."""

_READ_BYTES = 1 << 16


class ProcessDrain:
    """One process with threads, started with the first shard, and again after it died or for another arena."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._retired: list[_Child] = []
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Process id of the writer; None before the first shard."""
        return self._child.pid if self._child else None

    def begin(self, plan: ShardPlan, arena: Arena, targets: Sequence[Target], trace: Trace) -> Flow:
        """As every Drain. Raises ValueError as `check_reachable` does."""
        check_reachable([target.storage for target in targets])
        described = [(target.tier, target.storage.reopening or {}, target.path) for target in targets]
        with self._lock:
            if self._closed:
                raise ValueError("begin: this drain is closed")
            if self._child is None or self._child.arena is not arena or self._child.is_gone:
                if self._child is not None:
                    self._child.retire()
                    self._retired = [child for child in self._retired if child.death is None] + [self._child]
                self._child = _Child(arena, self._num_threads)
            return self._child.begin(plan, described, trace)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            children, self._child, self._retired = [*self._retired, self._child], None, []
        for child in children:
            if child is not None:
                child.retire()
                child.join()


class _Child:
    """One process from its start to its end, followed by a thread that owns it."""

    def __init__(self, arena: Arena, num_threads: int) -> None:
        self.arena = arena
        self._process: subprocess.Popen[bytes] | None = None
        self.death: SaveFailed | None = None
        """Why nothing more comes from it."""
        self._flows: dict[int, _ProcessFlow] = {}
        """Those that have not ended for every tier."""
        self._numbers = itertools.count()
        self._is_retired = False
        self._slots: dict[int, tuple[Slot, Parcel, _ProcessFlow]] = {}
        """Those that the process may read, and what is in them."""
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        assert arena.descriptor >= 0, "the arena of a writer process is a file"
        self._arena_descriptor = os.dup(arena.descriptor)
        self._settings = {
            "parent": os.getpid(),
            "path": sys.path,
            "package": list(checkpoint.__path__),
            "num_slots": arena.num_slots,
            "slot_bytes": arena.slot_bytes,
            "num_threads": num_threads,
        }
        self._thread = threading.Thread(target=self._follow, name="checkpoint-process", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended, even if nobody has told it yet."""
        return self.death is not None or (self._process is not None and self._process.poll() is not None)

    def begin(
        self, plan: ShardPlan, targets: Sequence[tuple[str, Mapping[str, Any], str]], trace: Trace
    ) -> _ProcessFlow:
        flow = _ProcessFlow(self, next(self._numbers), [tier for tier, _, _ in targets], trace)
        with self._lock:
            death = self.death
            if death is None:
                self._flows[flow.number] = flow
        if death is not None:
            flow.die(death)
        header = base64.b64encode(plan.header).decode()
        parcels = [[parcel.file_start, [cut.nbytes for cut in parcel.cuts]] for parcel in plan.parcels]
        self.send("begin", flow.number, header, plan.nbytes, parcels, targets)
        return flow

    def put(self, flow: _ProcessFlow, parcel: Parcel, slot: Slot) -> None:
        with self._lock:
            is_alive = self.death is None
            if is_alive:
                self._slots[slot.index] = (slot, parcel, flow)
        if is_alive:
            self.send("put", flow.number, parcel.index, slot.index)
        else:
            self.arena.give_back(slot)

    def send(self, name: str, *values: object) -> None:
        self._outbox.put(json.dumps([name, *values]).encode() + b"\n")

    def retire(self) -> None:
        """Let the process exit as soon as all that was begun has ended; nothing is begun any more."""
        with self._lock:
            self._is_retired = True
            is_over = not self._flows
        if is_over:
            self.send("end")

    def join(self) -> None:
        """Wait for the end of the process."""
        self._thread.join()

    def _follow(self) -> None:
        # The kernel ends a child with the thread that started it, so this one stays as long as the process does.
        try:
            death = SaveFailed(self._run())
        except OSError as error:
            death = SaveFailed(f"the writer process cannot be started: {error}")
        except Exception as error:  # noqa: BLE001  carried to whoever waits for a flow
            death = SaveFailed(f"the writer process was not understood, and ended: {error!r}")
        finally:
            os.close(self._arena_descriptor)
        self._outbox.put(None)
        with self._lock:
            self.death = death
            flows, slots = list(self._flows.values()), [slot for slot, _, _ in self._slots.values()]
            self._flows.clear()
            self._slots.clear()
        for slot in slots:
            self.arena.give_back(slot)
        for flow in flows:
            flow.die(death)

    def _run(self) -> str:
        """Start the process, hear it to its end, and return how it ended."""
        their_commands, our_commands = os.pipe()
        our_reports, their_reports = os.pipe()
        diagnostics = os.memfd_create("checkpoint-writer-stderr", os.MFD_CLOEXEC)
        with open(our_reports, "rb", buffering=0) as reports, open(diagnostics, "r+b", buffering=0) as said:
            threading.Thread(target=self._send_all, args=(our_commands,), daemon=True).start()
            try:
                process = self._process = self._start(their_commands, their_reports, diagnostics)
            finally:
                os.close(their_commands)
                os.close(their_reports)
            try:
                for line in _lines(reports.fileno(), process.pid):
                    name, *values = json.loads(line)
                    self._hear(name, values)
            except BaseException:
                process.kill()  # whose slots are given back reads none of them
                raise
            finally:
                status = process.wait()
            said.seek(0)
            return _how_it_ended(status, said.read())

    def _start(self, commands: int, reports: int, diagnostics: int) -> subprocess.Popen[bytes]:
        settings = {**self._settings, "commands": commands, "reports": reports, "arena": self._arena_descriptor}
        return subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=diagnostics,
            pass_fds=(commands, reports, self._arena_descriptor),
            start_new_session=True,
        )

    def _send_all(self, commands: int) -> None:
        with open(commands, "wb", buffering=0) as file:
            while (line := self._outbox.get()) is not None:
                view = memoryview(line)
                try:
                    while view.nbytes:
                        view = view[file.write(view) :]
                except BrokenPipeError:
                    return  # the process is gone: whoever hears it tells

    def _hear(self, name: str, values: Sequence[Any]) -> None:
        number, *rest = values
        if name == "free":
            with self._lock:
                slot, parcel, owner = self._slots.pop(rest[0])
            owner.written_bytes += parcel.nbytes  # by this thread alone
            self.arena.give_back(slot)
            return
        flow = self._flows.get(number)  # none for what was still being done when the flow failed
        if flow is not None and flow.hear(name, rest):
            with self._lock:
                del self._flows[number]
                is_over = self._is_retired and not self._flows
            if is_over:
                self.send("end")


class _ProcessFlow:
    """A Flow that the process drains."""

    def __init__(self, child: _Child, number: int, tiers: Sequence[str], trace: Trace) -> None:
        self.number = number
        self.written_bytes = 0
        self._child = child
        self._trace = trace
        self._tiers = tuple(tiers)
        self._cancelled: BaseException | None = None
        self._ends: dict[str, list[int] | BaseException] = {}
        self._changed = threading.Condition()

    def put(self, parcel: Parcel, slot: Slot, digests: list[int] | None = None) -> None:
        assert digests is None, "the process digests"
        self._child.put(self, parcel, slot)

    def cancel(self, error: BaseException) -> None:
        with self._changed:
            self._cancelled = self._cancelled or error
        self._child.send("cancel", self.number, str(error))

    def wait(self, tier: str) -> list[int]:
        with self._changed:
            self._changed.wait_for(lambda: tier in self._ends)
            end = self._ends[tier]
        if isinstance(end, BaseException):
            raise end
        return end

    def hear(self, name: str, values: Sequence[Any]) -> bool:
        """Take a report of the process; return whether the flow has ended for every tier."""
        with self._changed:
            if name == "span":
                span, begin_s, end_s, thread, nbytes = values
                self._trace.add(Span(span, begin_s, end_s, thread, self._child.pid or 0, nbytes))
            elif name == "durable":
                tier, text = values
                self._ends[tier] = list(array("Q", base64.b64decode(text)))
            else:
                tier, kind, text = values
                is_ours = kind == SaveFailed.__name__  # all other errors are of the process's own
                self._ends[tier] = (is_ours and self._cancelled) or _error(kind, text)
            self._changed.notify_all()
            return len(self._ends) == len(self._tiers)

    def die(self, death: SaveFailed) -> None:
        """Fail what is not durable: the process is gone."""
        with self._changed:
            for tier in self._tiers:
                self._ends.setdefault(tier, self._cancelled or death)
            self._changed.notify_all()


def can_reach(storages: Iterable[Storage]) -> bool:
    """Whether a writer process can open all storages."""
    return not any(_unreachable(storage) for storage in storages)


def check_reachable(storages: Sequence[Storage]) -> None:
    """Raise ValueError, naming them, unless a writer process can reach all storages."""
    problems = [f"{storage.url}: {reason}" for storage in storages if (reason := _unreachable(storage))]
    if problems:
        raise ValueError(f"config.writer: a writer process cannot reach {'; '.join(problems)}; allowed is 'thread'")


def _unreachable(storage: Storage) -> str | None:
    """Say why a process that is told in JSON cannot open a storage; None if it can."""
    if storage.reopening is None:
        return "it lies in this process"
    try:
        json.dumps(storage.reopening)
    except TypeError as error:
        return f"its options are not JSON ({error})"
    return None


def _lines(reports: int, process: int) -> Iterator[bytes]:
    """Yield the whole lines that a process writes to a pipe, until it is gone.

    The end of the pipe does not tell: a worker that training forked while the process was started holds it open too.
    """
    gone, going = os.pipe()

    def watch() -> None:
        with contextlib.suppress(ChildProcessError):  # it has been waited for already
            os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        os.write(going, b".")

    watcher = threading.Thread(target=watch, name="checkpoint-process-end", daemon=True)
    watcher.start()
    os.set_blocking(reports, False)
    poll = select.poll()
    poll.register(reports, select.POLLIN)
    poll.register(gone, select.POLLIN)
    rest = b""  # of one killed in the middle of a word
    try:
        is_over = False
        while not is_over:
            is_over = any(descriptor == gone for descriptor, _ in poll.poll())
            with contextlib.suppress(BlockingIOError):
                while data := os.read(reports, _READ_BYTES):
                    *lines, rest = (rest + data).split(b"\n")
                    yield from lines
                is_over = True
    except BaseException:  # of who takes the lines: nothing ends before the process does
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        raise
    finally:
        watcher.join()
        os.close(gone)
        os.close(going)


def _error(kind: str, text: str) -> BaseException:
    """Return an error of the process as one of this package."""
    if kind == StorageError.__name__:
        return StorageError(text)
    return SaveFailed(f"the writer process failed: {kind}: {text}")


def _how_it_ended(status: int, diagnostics: bytes) -> str:
    if status < 0:
        name = next((s.name for s in signal.Signals if s == -status), f"signal {-status}")
        remedy = "; if memory ran out, lower staging_bytes" if -status == signal.SIGKILL else ""
        return f"the writer process was killed by {name}{remedy}; the next save starts another"
    said = diagnostics.decode(errors="replace").strip().splitlines()
    return (
        f"the writer process ended with status {status}{': ' + said[-1] if said else ''}; the next save starts another"
    )
