"""`python -m MODULE ARGS` as a fork of the ranks' server, where torch, DeepSpeed and trainsys are imported already.

A fresh interpreter spends 2 s of CPU on imports before `trainsys launch` does anything, and 4 s more in every rank
it starts. Here the command is forked from the server, and the ranks that it starts on this machine are forked from
it: processes like any others, with their own sessions, pipes, signals and ends, told apart from fresh ones by nothing
but the modules they begin with. What must be shown of fresh interpreters is shown by tests that start them.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil

from tests.ranks import server_context

_WORKER = "launch.worker"
_LAUNCH = [sys.executable, "-m", "trainsys", "launch"]
_STARTING_RUNS = ("trainsys.bench.soak",)
_POLL_S = 0.02
_GONE_TIMEOUT_S = 30


class Command:
    """A running command; the part of `subprocess.Popen` that tests use."""

    def __init__(
        self, module: str, args: Sequence[str], *, cwd: Path, stdout: Path, stderr: Path, environ: Mapping[str, str]
    ) -> None:
        self.args = [sys.executable, "-m", module, *args]
        job = (module, list(args), str(cwd), str(stdout), str(stderr), dict(environ))
        self._process = server_context().Process(target=_be_command, args=job)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or minus the signal's number; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """The same, once it has ended.

        Raises: subprocess.TimeoutExpired.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill_tree(self) -> None:
        """SIGKILL it and all its descendants, as a power cut would; return when they are gone."""
        kill_tree(self.pid)
        self._process.join(_GONE_TIMEOUT_S)


def run(
    module: str, args: Sequence[str], *, cwd: Path, folder: Path, environ: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with what it prints in files of `folder` meanwhile.

    Raises: subprocess.TimeoutExpired, after its whole tree was killed.
    """
    stdout, stderr = folder / "stdout", folder / "stderr"
    command = Command(module, args, cwd=cwd, stdout=stdout, stderr=stderr, environ=environ)
    try:
        code = command.wait(timeout_s)
    finally:
        if command.poll() is None:
            command.kill_tree()
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (stdout, stderr)]
    return subprocess.CompletedProcess(command.args, code, *texts)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants; return when they are gone."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=_GONE_TIMEOUT_S)


def _be_command(module: str, args: list[str], cwd: str, stdout: str, stderr: str, environ: dict[str, str]) -> None:
    """Be the command, in a process that was just forked from the server."""
    for path, number in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    # Processes that it has forked come from the same server, not from one of its own.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    starting: Any = SimpleNamespace(**{**vars(subprocess), "Popen": _popen, "run": _run})
    # Local ranks are started by the first module alone; whole runs by the second, and by benchmarks themselves.
    for name in ("launch.local", "trainsys.bench.training"):
        importlib.import_module(name).subprocess = starting  # type: ignore[attr-defined]
    if module in _STARTING_RUNS:
        sys.modules["subprocess"] = starting
    _run_module(module, args, environ)


def _popen(command: list[str], **options: Any) -> Any:
    """A rank or a run as a fork, if it is safe to fork; anything else as `subprocess.Popen` starts it."""
    if threading.active_count() == 1:
        if _WORKER in command:
            return _Worker(command, **options)
        if command[:4] == _LAUNCH:
            return _Launch(command, **options)
    return subprocess.Popen(command, **options)


def _run(command: list[str], **options: Any) -> Any:
    """As `subprocess.run`, a run that has to succeed as a fork."""
    if command[:4] != _LAUNCH or options != {"check": True}:
        return subprocess.run(command, **options)
    code = _popen(command).wait()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return subprocess.CompletedProcess(command, code)


class _Launch:
    """A run forked from the benchmark that starts it; the part of `subprocess.Popen` that benchmarks use."""

    def __init__(self, command: list[str], *, start_new_session: bool = False) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            with _ending_here():
                sys.modules["subprocess"] = subprocess
                if start_new_session:
                    os.setsid()
                _run_module(command[2], command[3:], dict(os.environ))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until_s = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until_s:
                raise subprocess.TimeoutExpired("trainsys launch", timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Worker:
    """A rank forked from its launcher; the part of `subprocess.Popen` that `launch.local` uses."""

    def __init__(
        self,
        command: list[str],
        *,
        stdin: int,
        stdout: Any,
        stderr: int,
        env: dict[str, str],
        pass_fds: Sequence[int],
        start_new_session: bool,
    ) -> None:
        assert (stdin, stderr, start_new_session) == (subprocess.DEVNULL, subprocess.STDOUT, True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_worker(command, stdout.fileno(), env, pass_fds)

    def wait(self) -> int:
        """Its exit code, or minus the signal's number."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _be_worker(command: list[str], output: int, env: dict[str, str], pass_fds: Sequence[int]) -> None:
    """Be the rank that `command` names: with nothing of its launcher but its memory. Does not return."""
    with _ending_here():
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _close_all_but({0, 1, 2, *pass_fds})
        # Both know of descriptors that were closed: they begin anew, in place, for functions bound to them are around.
        for known in (forkserver._forkserver, resource_tracker._resource_tracker):
            type(known).__init__(known)
        _run_module(_WORKER, command[command.index(_WORKER) + 1 :], env)


@contextlib.contextmanager
def _ending_here() -> Iterator[None]:
    """End this process with the block, much as an interpreter ends that has run it: it must not go on as its parent."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - this process ends here
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]  # as at the end of any interpreter
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))


def _run_module(module: str, args: list[str], environ: Mapping[str, str]) -> None:
    """Do what `python -u -m module args` does, in a process whose standard files are in place."""
    import torch

    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 - as long as the process
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.environ.clear()
    os.environ.update(environ)
    # Read at the start of a fresh interpreter.
    torch.set_num_threads(int(environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None
    loader = spec.loader
    assert isinstance(loader, importlib.abc.InspectLoader)
    code = loader.get_code(spec.name)
    assert code is not None
    main: Any = ModuleType("__main__")
    main.__spec__, main.__file__ = spec, spec.origin
    # By the second name its own forks call what they send back.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    sys.argv = [str(spec.origin), *args]
    exec(code, vars(main))
