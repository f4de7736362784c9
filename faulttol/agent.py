"""What can be seen of the ranks of one machine from beside them: an agent that looks, and may end them.

Four levels, each by a sign of its own: the process table, an answer of native code that needs no GIL, a Python thread's
stamp, and the loop's. `faulttol.health` says what they prove. The agent waits for nobody: a question that is not
answered stays asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faulttol import heartbeat
from faulttol.errors import HeartbeatError
from faulttol.health import Vitals

_QUESTION = b"POST /handler/ping HTTP/1.1\r\nHost: rank\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_ASK_S = 0.2  # between two questions
_BLIND_S = 0.5  # that a time without a look counts at most: the observer was away, which proves nothing
_STOPPED_S = 0.1  # for how long a process must stand: who stops it for moments only makes it slower
_GONE_POLL_S = 0.002
_WAIT_EVERY_S = 0.1  # between two looks at how long threads wait for a CPU
_RENAMED_LOOKS = 10  # between two looks at what a thread that was none of these is called now
_LOOP = "rank_loop"
_WAITS_FOR_CONNECTIONS = ("do_epoll_wait", "ep_poll")  # functions of the kernel
_TALKING = (_LOOP, "gloo", "pt_gloo", "pt_autograd", "NCCL ")  # NCCL names its threads with NCCL_SET_THREAD_NAME=1


@dataclass(frozen=True, slots=True)
class Watched:
    """One process that the agent looks after."""

    rank: int
    """Whatever number its observer knows it by."""
    pid: int
    start_ticks: int
    """When it began, in the kernel's count: with `pid` it names one process for ever."""
    heartbeat: Path
    answers: Path
    """Socket at which its native code answers (`answering`), once it is there."""


class NodeAgent:
    """Looks at the processes of its machine. One thread uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._patients: dict[int, _Patient] = {}

    def watch(self, process: Watched) -> None:
        """Look after one more process."""
        self._patients[process.rank] = _Patient(process, self._clock())

    def forget(self, rank: int) -> None:
        """Look after it no more. Idempotent."""
        patient = self._patients.pop(rank, None)
        if patient is not None:
            patient.close()

    def look(self) -> list[Vitals]:
        """Return what is seen of each process now; returns at once, whatever state they are in."""
        return [patient.look(self._clock()) for patient in self._patients.values()]

    def end(self, rank: int, timeout_s: float = 10.0) -> bool:
        """Kill the process, stopped or not, with the group that it leads; whether it is gone within the timeout."""
        patient = self._patients.get(rank)
        if patient is None:
            return True
        end_process(patient.process.pid, patient.process.start_ticks)
        deadline_s = time.monotonic() + timeout_s
        while process_state(patient.process.pid, patient.process.start_ticks) is not None:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_GONE_POLL_S)
        return True

    def close(self) -> None:
        """Forget all. Idempotent."""
        for rank in list(self._patients):
            self.forget(rank)


class _Patient:
    """One process, and when each of its signs was last seen to change, on the observer's clock."""

    def __init__(self, process: Watched, now_s: float) -> None:
        self.process = process
        self._asked: socket.socket | None = None
        self._asked_at_s = -_ASK_S
        self._answered = False
        self._waits_since_s: float | None = None
        """When the first question was asked that no answer has followed."""
        self._stop: tuple[int, float] | None = None
        """How often it had been put off its processor when it was first seen in this stop, and when that was."""
        self._python_at_s = self._progress_at_s = self._looked_at_s = now_s
        self._counts = (-1, -1)
        self._step, self._phase = -1, ""
        self._gone_at_s: float | None = None
        self._waits = _CpuWaits(process.pid)

    def look(self, now_s: float) -> Vitals:
        state = process_state(self.process.pid, self.process.start_ticks)
        if state is None:
            self.close()
            if self._gone_at_s is None:
                self._gone_at_s = now_s
            return Vitals(
                rank=self.process.rank,
                process_alive=False,
                gone_age_s=now_s - self._gone_at_s,
                step=self._step,
                phase=self._phase,
            )
        self._forgive(now_s)
        with contextlib.suppress(FileNotFoundError, HeartbeatError):  # not there yet
            self._read(heartbeat.read(self.process.heartbeat), now_s)
        self._ask(now_s)
        joined = self._counts[0] >= 0
        return Vitals(
            rank=self.process.rank,
            process_state="" if state in "Tt" and not self._stands(now_s) else state,
            native_age_s=self._native_age_s(now_s),
            python_age_s=now_s - self._python_at_s if joined else None,
            progress_age_s=now_s - self._progress_at_s if joined else None,
            cpu_wait_s=self._waits.look(now_s),
            step=self._step,
            phase=self._phase,
        )

    def close(self) -> None:
        if self._asked is not None:
            self._asked.close()
            self._asked = None

    def _forgive(self, now_s: float) -> None:
        """Hold no silence against the process that the observer did not watch, as when it was stopped itself."""
        blind_s = max(0.0, now_s - self._looked_at_s - _BLIND_S)
        self._looked_at_s = now_s
        self._python_at_s += blind_s
        self._progress_at_s += blind_s
        if self._waits_since_s is not None:
            self._waits_since_s += blind_s

    def _stands(self, now_s: float) -> bool:
        """Whether a process that is stopped now has been for `_STOPPED_S` without a break; each break is counted."""
        count = _switches(self.process.pid)
        if self._stop is None or self._stop[0] != count:
            self._stop = count, now_s
        return now_s - self._stop[1] >= _STOPPED_S

    def _native_age_s(self, now_s: float) -> float | None:
        """For how long a question has had no answer; 0 if there is none, None before the first."""
        if self._waits_since_s is not None:
            return now_s - self._waits_since_s
        return 0.0 if self._answered else None

    def _read(self, view: heartbeat.HeartbeatView, now_s: float) -> None:
        alive, progress = view.alive_count, view.progress_count
        if alive != self._counts[0] or progress != self._counts[1]:
            self._python_at_s = now_s
        if progress != self._counts[1]:
            self._progress_at_s = now_s
        self._counts, self._step, self._phase = (alive, progress), view.step, view.phase

    def _ask(self, now_s: float) -> None:
        """Take the answer to the last question if it is there; ask again when it is time."""
        if self._asked is not None:
            try:
                self._answered |= bool(self._asked.recv(4096))
            except BlockingIOError:
                return
            except OSError:  # broken off, which takes a process that runs
                pass
            self.close()
            self._waits_since_s = None
        if now_s - self._asked_at_s < _ASK_S or not self.process.answers.exists():
            return
        self._asked_at_s = now_s
        asked = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            asked.connect(str(self.process.answers))
            asked.send(_QUESTION)
        except BlockingIOError:  # a full queue of questions is an answer that does not come; the age tells
            asked.close()
        except OSError:  # nobody is there to answer, or no more: the process table tells which
            asked.close()
            self._waits_since_s = None
            return
        else:
            self._asked = asked
        if self._waits_since_s is None:
            self._waits_since_s = now_s  # from here on it can be missed


class _CpuWaits:
    """For how long the threads of a process that others wait for are ready to run while no CPU is free for them.

    By the kernel's count, of the first thread, the one that trains (`name_loop`) and those of backends and autograd:
    what works in the background may wait, and holds nobody up. Gloo's own thread has a name in torch 2.13, none in
    2.11: there it is known by the process's name and by what it rests in, a wait for connections. Other loops that wait
    for connections and have no name of their own, as fsspec's, count with it.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._waited_ns: dict[str, int] = {}
        """By thread, of those that others wait for."""
        self._others: dict[str, int] = {}
        """In how many looks each other thread was seen: it may name itself after it began."""
        self._total_ns = 0
        self._looked_s = -_WAIT_EVERY_S

    def look(self, now_s: float) -> float | None:
        """Return the seconds, since the first look; None where nobody counts."""
        if now_s - self._looked_s >= _WAIT_EVERY_S:
            self._looked_s = now_s
            try:
                threads = os.listdir(f"/proc/{self._pid}/task")
            except OSError:  # it has ended, or there is no such folder here
                threads = []
            before, self._waited_ns = self._waited_ns, {}
            self._others = {thread: num for thread, num in self._others.items() if thread in threads}
            for thread in threads:
                self._add(thread, before.get(thread))
        return self._total_ns / 1e9 if self._waited_ns else None

    def _add(self, thread: str, before_ns: int | None) -> None:
        """Count what the thread waited since the last look; of a new one nothing yet."""
        folder = f"/proc/{self._pid}/task/{thread}"
        try:
            if before_ns is None and not self._counts(thread, folder):
                return
            waited_ns = int(_read(f"{folder}/schedstat").split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel keeps no count
            return
        if before_ns is not None:
            self._total_ns += max(0, waited_ns - before_ns)
        self._waited_ns[thread] = waited_ns

    def _counts(self, thread: str, folder: str) -> bool:
        if thread == str(self._pid):
            return True
        num = self._others[thread] = self._others.get(thread, -1) + 1
        is_due = num < _RENAMED_LOOKS or num % _RENAMED_LOOKS == 0
        if not is_due:
            return False
        name = _read(f"{folder}/comm")
        if name.startswith(_TALKING):
            return True
        is_unnamed = name == _read(f"/proc/{self._pid}/comm")
        return is_unnamed and _read(f"{folder}/wchan") in _WAITS_FOR_CONNECTIONS


def name_loop() -> None:
    """Let agents know this thread for the one that trains, where that is not the process's first."""
    if threading.get_native_id() != os.getpid():
        with contextlib.suppress(OSError):  # no such folder here
            Path("/proc/thread-self/comm").write_text(_LOOP)


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


@contextlib.contextmanager
def answering(path: Path) -> Iterator[None]:
    """Let native code of this process answer at a socket inside the block, whoever holds the GIL; imports torch."""
    from torch._C._distributed_c10d import _WorkerServer

    path.unlink(missing_ok=True)
    with _quiet():
        server = _WorkerServer(str(path))
    try:
        yield
    finally:
        with _quiet():
            server.shutdown()
            del server


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from telling of the server on standard error, as a warning."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def start_ticks(pid: int) -> int:
    """Return when a process that runs began, in the kernel's count; 0 if it has ended."""
    fields = _stat(pid)
    return 0 if fields is None else int(fields[19])


def process_state(pid: int, ticks: int) -> str | None:
    """Return the letter of the state of the process that began at `ticks`; None if it has ended."""
    fields = _stat(pid)
    return None if fields is None or int(fields[19]) != ticks else fields[0]


def end_process(pid: int, ticks: int) -> None:
    """SIGKILL the process that began at `ticks`, and the group that it leads, unless it has ended."""
    if process_state(pid, ticks) is None:
        return
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def _switches(pid: int) -> int:
    """Return how often the process's first thread gave its processor up, -1 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None if it has ended, a zombie included."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields
