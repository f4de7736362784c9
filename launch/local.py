"""Ranks as processes of this machine, one process group each."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import faulttol
from faulttol.agent import NodeAgent, Watched, start_ticks
from faulttol.recovery import Standing
from launch import context, entry
from launch.config import LaunchConfig
from launch.errors import LaunchError
from launch.fleet import MemberReport, member_log
from launch.job import Job
from launch.orders import Order
from launch.rankenv import RankEnv
from launch.supervisor import log_path
from launch.verdict import Exit, Pulse, RankReport

log = logging.getLogger(__name__)

_GONE_TIMEOUT_S = 30.0
_IN_KERNEL_S = 2.0  # that a killed process waits in the kernel, without a break, until it is not waited for
_LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def start(job: Job, config: LaunchConfig, heartbeat_interval_s: float) -> Iterator[LocalRanks]:
    """The running ranks of `job`; leaving the block ends what is left of them."""
    with tempfile.TemporaryDirectory(prefix="launch-") as folder, _Guardian(folder) as guardian:
        listener = context.listen(_LOOPBACK)
        ranks = LocalRanks(guardian)
        try:
            for rank in range(job.world_size):
                env = RankEnv(
                    rank=rank,
                    world_size=job.world_size,
                    local_rank=rank,
                    local_world_size=job.world_size,
                    store_host=_LOOPBACK,
                    store_port=listener.getsockname()[1],
                    store_is_served=True,
                )
                ranks.add(_Process(job, env, config, heartbeat_interval_s, Path(folder), log_path(job.log_dir, rank)))
            # Ranks import torch meanwhile; those that are faster wait in the listener's queue.
            store = context.serve_store(listener, job.world_size)
            yield ranks
            del store
        finally:
            listener.close()
            _end_rest(ranks)


@contextlib.contextmanager
def start_fleet(job: Job, config: LaunchConfig, heartbeat_interval_s: float) -> Iterator[LocalFleet]:
    """The running members of `job`, its spares among them; leaving the block ends what is left of them."""
    with tempfile.TemporaryDirectory(prefix="launch-") as folder, _Guardian(folder) as guardian:
        listener = context.listen(_LOOPBACK)
        port = listener.getsockname()[1]
        fleet = LocalFleet(guardian, job, config, heartbeat_interval_s, (Path(folder), port))
        try:
            for _ in range(job.world_size + config.spares):
                fleet.add()
            store = context.serve_store(listener, job.world_size)
            yield fleet
            del store
        finally:
            listener.close()
            _end_rest(fleet)


def _end_rest(ranks: LocalRanks | LocalFleet) -> None:
    """End what is left; what stays all the same must not hide why the job ended."""
    try:
        ranks.kill()
    except LaunchError as error:
        log.warning("%s", error)


class LocalRanks:
    """See `supervisor.Ranks`."""

    def __init__(self, guardian: _Guardian) -> None:
        self._guardian = guardian
        self._processes: list[_Process] = []

    def add(self, process: _Process) -> None:
        self._processes.append(process)
        self._guardian.guard(process.pid)

    def poll(self) -> list[RankReport]:
        reports = [process.report() for process in self._processes]
        self._forget_ended()
        return reports

    def request_stop(self) -> None:
        for process in self._processes:
            process.tell(b"stop\n")

    def dump_stacks(self) -> None:
        for process in self._processes:
            process.tell(b"stacks\n")

    def kill(self) -> None:
        """Raises: LaunchError for processes that stay, once all others are gone; once for each."""
        for process in self._processes:
            process.kill()
        deadline_s = time.monotonic() + _GONE_TIMEOUT_S
        left = [process for process in self._processes if not process.is_gone_by(0.0 if process.stays else deadline_s)]
        self._forget_ended()
        pids = [str(process.pid) for process in left if not process.stays]
        for process in left:
            process.stays = True
        if pids:
            raise LaunchError(
                f"process {', '.join(pids)} still there after SIGKILL: in the kernel, as on a disk that does not "
                "answer; it ends when that returns"
            )

    def _forget_ended(self) -> None:
        for process in self._processes:
            if process.exit is not None:
                self._guardian.forget(process.pid)


class LocalFleet:
    """See `fleet.Fleet`."""

    def __init__(
        self,
        guardian: _Guardian,
        job: Job,
        config: LaunchConfig,
        heartbeat_interval_s: float,
        place: tuple[Path, int],
    ) -> None:
        """`place` is the folder for notes, and the port of the store."""
        self._job, self._config, self._heartbeat_interval_s = job, config, heartbeat_interval_s
        self._folder, self._port = place
        self._ranks = LocalRanks(guardian)
        self._processes: list[_Process] = []
        self._agent = NodeAgent()

    def add(self) -> None:
        index = len(self._processes)
        log_file = member_log(self._job, index)
        env = RankEnv(store_host=_LOOPBACK, store_port=self._port, store_is_served=True)
        start = functools.partial(_Process, self._job, env, self._config, self._heartbeat_interval_s, self._folder)
        process = start(log_file, member=index)
        try:
            began = start_ticks(process.pid)
        except OSError:
            process.kill()
            process.is_gone_by(time.monotonic() + _GONE_TIMEOUT_S)
            raise
        self._processes.append(process)
        self._ranks.add(process)
        self._agent.watch(Watched(index, process.pid, began, *process.signs))

    def look(self) -> list[MemberReport]:
        vitals = {seen.rank: seen for seen in self._agent.look()}
        reports = self._ranks.poll()
        for index, process in enumerate(self._processes):
            if process.exit is not None:
                self._agent.forget(index)
        return [
            MemberReport(report, process.standing(), vitals.get(index))
            for index, (process, report) in enumerate(zip(self._processes, reports, strict=True))
        ]

    def places(self, members: Sequence[int]) -> list[dict[str, Any]]:
        size = len(members)
        envs = (
            RankEnv(
                rank=rank,
                world_size=size,
                local_rank=rank,
                local_world_size=size,
                store_host=_LOOPBACK,
                store_port=self._port,
                store_is_served=True,
            )
            for rank in range(size)
        )
        return [asdict(env) for env in envs]

    def order(self, member: int, order: Order) -> None:
        self._processes[member].tell(json.dumps(order).encode() + b"\n")

    def end(self, member: int) -> None:
        process = self._processes[member]
        process.kill()
        if not process.is_gone_by(time.monotonic() + _GONE_TIMEOUT_S) and not process.stays:
            process.stays = True
            log.warning("process %d is still there after SIGKILL: it is in the kernel, and does no more", process.pid)

    def request_stop(self) -> None:
        self._ranks.request_stop()

    def dump_stacks(self, members: Sequence[int]) -> None:
        for member in members:
            self._processes[member].tell(b"stacks\n")

    def kill(self) -> None:
        self._ranks.kill()
        self._agent.close()


class _Process:
    """One rank's process, from start to reaped."""

    def __init__(
        self,
        job: Job,
        env: RankEnv,
        config: LaunchConfig,
        heartbeat_interval_s: float,
        folder: Path,
        log_file: Path,
        member: int | None = None,
    ) -> None:
        """`member` is its number in a job with recovery."""
        self.exit: Exit | None = None
        self.stays = False
        """Whether it is known that it was there long after it was killed."""
        name = f"rank{env.rank}" if member is None else f"member{member}"
        self._heartbeat_path = folder / f"{name}.heartbeat"
        self._outcome_path = folder / f"{name}.outcome.json"
        self._standing_path = folder / f"{name}.standing.json"
        self._answers_path = folder / f"{name}.answers"
        self._last: RankReport | None = None
        """What is known of it once it has ended."""
        self._standing: Standing | None = None
        self._standing_stamp = (0, 0)
        self._outcome: entry.Outcome | None = None
        description_path = folder / f"{name}.job.json"
        self._notes = (description_path, self._heartbeat_path, self._outcome_path, self._standing_path, *self.signs[1:])
        recovery = {"standing_path": str(self._standing_path), "answers_path": str(self._answers_path)}
        description_path.write_text(
            json.dumps(
                {
                    "entry": job.entry,
                    "payload": dict(job.payload),
                    "sys_path": [os.path.abspath(path) for path in sys.path],
                    "heartbeat_path": str(self._heartbeat_path),
                    "heartbeat_interval_s": heartbeat_interval_s,
                    "outcome_path": str(self._outcome_path),
                    **({} if member is None else recovery),
                }
            )
        )
        # torch takes every core for itself unless told: the same number that Ray sets for an actor.
        threads = {"OMP_NUM_THREADS": str(max(1, int(config.cpus_per_rank)))}
        read_fd, write_fd = os.pipe()
        self._control: IO[bytes] = open(write_fd, "wb", buffering=0)  # noqa: SIM115 - open as long as the rank lives
        try:
            with open(log_file, "wb") as output:
                self._popen = subprocess.Popen(
                    [sys.executable, "-u", "-m", "launch.worker", str(description_path), str(read_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**threads, **os.environ, **env.to_environ()},
                    pass_fds=(read_fd,),
                    start_new_session=True,
                )
        except BaseException:
            self._control.close()
            raise
        finally:
            os.close(read_fd)

    @property
    def pid(self) -> int:
        """Of the process, and of the group it leads."""
        return self._popen.pid

    def report(self) -> RankReport:
        if self._last is not None:
            return self._last
        ended = self._look_for_exit()  # before the outcome, which the rank writes before it exits
        if self._outcome is None and self._outcome_path.exists():
            self._outcome = entry.from_json(json.loads(self._outcome_path.read_text()))
        pulse: Pulse | None = None
        with contextlib.suppress(FileNotFoundError):  # not joined yet
            view = faulttol.read_heartbeat(self._heartbeat_path)
            pulse = Pulse(view.alive_count, view.progress_count, view.step, view.phase)
        report = RankReport(pulse, self._outcome, ended)
        if ended is not None:
            self.standing()
            self._last = report
            self._remove_notes()
        return report

    @property
    def signs(self) -> tuple[Path, Path]:
        """Where its heartbeat is, and where its native code answers."""
        return self._heartbeat_path, self._answers_path

    def standing(self) -> Standing | None:
        """What the process said last of how it stands; None before its first word."""
        if self._last is not None:
            return self._standing
        with contextlib.suppress(FileNotFoundError):
            stat = self._standing_path.stat()
            stamp = stat.st_ino, stat.st_mtime_ns  # every word is a file of its own
            if stamp != self._standing_stamp:
                self._standing = Standing.from_json(json.loads(self._standing_path.read_text()))
                self._standing_stamp = stamp
        return self._standing

    def tell(self, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # it is gone, or was reaped and its pipe closed
            self._control.write(message)

    def kill(self) -> None:
        """End the process and all of its group; unless it is reaped, which leaves no group behind."""
        if self.exit is None:
            os.killpg(self.pid, signal.SIGKILL)

    def is_gone_by(self, deadline_s: float) -> bool:
        """Whether the killed process ends by then; waits for it, unless it waits in the kernel itself."""
        began_s = time.monotonic()
        while self._look_for_exit() is None:
            now_s = time.monotonic()
            if not _is_in_kernel(self.pid):
                began_s = now_s
            if now_s > deadline_s or now_s > began_s + _IN_KERNEL_S:
                return False
            time.sleep(0.005)
        return True

    def _remove_notes(self) -> None:
        for path in self._notes:
            with contextlib.suppress(OSError):  # the folder goes with the launcher
                path.unlink(missing_ok=True)

    def _look_for_exit(self) -> Exit | None:
        """How the process ended; it is reaped here, after what it left running in its group was ended."""
        if self.exit is not None:
            return self.exit
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        # Unreaped, it still holds its group's number: this cannot hit a stranger.
        os.killpg(self.pid, signal.SIGKILL)
        code = self._popen.wait()
        self._control.close()
        self.exit = Exit(code=code) if code >= 0 else Exit(signal=-code)
        return self.exit


def _is_in_kernel(pid: int) -> bool:
    """Whether a thread of the process waits in the kernel for what nothing interrupts (state D)."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if (thread / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"D":
                    return True
    return False


class _Guardian:
    """The process that outlives a killed launcher long enough to end its ranks; see `launch.guardian`."""

    def __init__(self, folder: str) -> None:
        self._guarded: set[int] = set()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "launch.guardian", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def guard(self, group: int) -> None:
        self._guarded.add(group)
        self._tell("+", group)

    def forget(self, group: int) -> None:
        if group in self._guarded:
            self._guarded.remove(group)
            self._tell("-", group)

    def _tell(self, what: str, group: int) -> None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(f"{what}{group}\n".encode())
        except BrokenPipeError:
            # No reason to end days of work, though its ranks would now outlive a launcher that is killed.
            log.warning("the guardian process %d of this launch has ended", self._popen.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(_GONE_TIMEOUT_S)
