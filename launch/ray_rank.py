"""One rank inside the Ray actor that runs it; the driver's side is `launch.ray_actors`."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import faulttol
from faulttol.agent import NodeAgent, Watched, answering, name_loop
from faulttol.health import Vitals
from faulttol.recovery import Member, Standing
from launch import entry, orders
from launch.orders import Order
from launch.placement import Home

_LOG_CHUNK_BYTES = 2**20
_GONE_TIMEOUT_S = 10.0


class RankActor:
    """Runs the entry in one thread while others answer the driver; what it prints goes to its own file."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="launch-"))
        self._log_path = log_path(self._folder)
        self._stop = threading.Event()
        self._seen = threading.Event()
        self._outcome: entry.Outcome | None = None
        self._member: Member | None = None
        self._standing: Standing | None = None
        _print_to(self._log_path)
        faulthandler.enable()

    def home(self) -> Home:
        """Where this actor lives."""
        import ray

        context = ray.get_runtime_context()
        return Home(
            node_id=context.get_node_id(),
            pid=os.getpid(),
            start_ticks=start_ticks(os.getpid()) or 0,
            folder=str(self._folder),
            gpu_ids=tuple(context.get_accelerator_ids().get("GPU", [])),
        )

    def run(self, description: dict[str, Any]) -> None:
        """Run the described entry to its end; `poll` tells how it ended."""
        name_loop()  # this is no actor's first thread
        os.environ.update(description["environ"])
        entry.extend_path(description["sys_path"])
        leaving = contextlib.ExitStack()
        if description.get("recovers"):
            self._member = Member(self._stand, entry.described)

        def joined() -> None:
            # A rank that freezes before the driver saw its first pulse would not be known to have joined.
            self._seen.wait()
            if self._member is not None:
                leaving.enter_context(answering(answers_path(self._folder)))

        with leaving:
            outcome = entry.execute(
                description["entry"],
                description["payload"],
                heartbeat_path=heartbeat_path(self._folder),
                heartbeat_interval_s=description["heartbeat_interval_s"],
                stop=self._stop,
                joined=joined,
                member=self._member,
            )
        sys.stdout.flush()
        self._outcome = outcome  # before the traceback is printed: see supervisor
        if isinstance(outcome, entry.Raised):
            sys.stderr.write(outcome.traceback)

    def poll(self, offset: int, seen: bool) -> dict[str, Any]:
        """The heartbeat, what was printed since `offset`, and the outcome once there is one.

        `seen` says that the driver had a pulse before; the entry is called only then.
        """
        if seen:
            self._seen.set()
        with open(self._log_path, "rb") as log:
            log.seek(offset)
            printed = log.read(_LOG_CHUNK_BYTES)
        try:
            view = faulttol.read_heartbeat(heartbeat_path(self._folder))
        except FileNotFoundError:  # not joined yet
            pulse = None
        else:
            pulse = (view.alive_count, view.progress_count, view.step, view.phase)
        outcome = None if self._outcome is None else entry.to_json(self._outcome)
        standing = None if self._standing is None else self._standing.to_json()
        return {"printed": printed, "pulse": pulse, "outcome": outcome, "standing": standing}

    def order(self, order: Order) -> None:
        """Take an order of a job with recovery."""
        assert self._member is not None, "the entry runs"
        orders.obey(self._member, order)

    def request_stop(self) -> None:
        """Let the entry's `stop_requested` be true."""
        self._stop.set()

    def dump_stacks(self) -> None:
        """Print the stacks of all threads."""
        faulthandler.dump_traceback(all_threads=True)

    def _stand(self, standing: Standing) -> None:
        self._standing = standing


class AgentActor:
    """The agent of one node, for members that live there; see `faulttol.agent`."""

    def __init__(self) -> None:
        self._agent = NodeAgent()

    def watch(self, member: int, home: Home) -> None:
        """Look after one more member."""
        folder = Path(home.folder)
        signs = heartbeat_path(folder), answers_path(folder)
        self._agent.watch(Watched(member, home.pid, home.start_ticks, *signs))

    def look(self) -> list[Vitals]:
        """What is seen of each member now."""
        return self._agent.look()

    def end(self, member: int) -> bool:
        """End a member's process, stopped or not; whether it is gone."""
        is_gone = self._agent.end(member)
        self._agent.forget(member)
        return is_gone


def bury(homes: list[Home], offsets: list[int], patience_s: list[float]) -> list[bytes]:
    """On the homes' node: see all processes end, remove the folders, return what was printed since `offsets`.

    A process that is on its way out gets its `patience_s` before it is killed. One that stays, in the kernel, is told
    of where it printed, and changes nothing for the others.
    """
    begun_s = time.monotonic()
    rest: list[bytes] = []
    for home, offset, patient_s in zip(homes, offsets, patience_s, strict=True):
        _wait_until_gone(home, begun_s + patient_s)
        _kill(home)
        told = b""
        if not _wait_until_gone(home, time.monotonic() + _GONE_TIMEOUT_S):
            told = f"[launch] process {home.pid} is still there {_GONE_TIMEOUT_S:g} s after SIGKILL\n".encode()
        with open(log_path(Path(home.folder)), "rb") as log:
            log.seek(offset)
            rest.append(log.read() + told)
        shutil.rmtree(home.folder, ignore_errors=bool(told))
    return rest


def log_path(folder: Path) -> Path:
    return folder / "log"


def heartbeat_path(folder: Path) -> Path:
    return folder / "heartbeat"


def answers_path(folder: Path) -> Path:
    return folder / "answers"


def start_ticks(pid: int) -> int | None:
    """When process `pid` began, in clock ticks since boot; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _wait_until_gone(home: Home, deadline_s: float) -> bool:
    while start_ticks(home.pid) == home.start_ticks:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def _kill(home: Home) -> None:
    if start_ticks(home.pid) != home.start_ticks:
        return
    try:
        if os.getpgid(home.pid) == home.pid:  # Ray makes each worker the leader of a group
            os.killpg(home.pid, signal.SIGKILL)
        else:
            os.kill(home.pid, signal.SIGKILL)
    except ProcessLookupError:  # it ended meanwhile
        return


def _print_to(path: Path) -> None:
    """Let this process and what it starts print to a new file at `path`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # Ray has given the worker text streams of its own; these are unbuffered enough to follow.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - as long as the process lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
