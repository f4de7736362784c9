"""The test's side of `driver`: send jobs, read what comes of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.sources import ROOT

TIMEOUT_S = 180.0


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Poll until the condition holds; fail by name when it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process is there, no zombie, and not just being reaped."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def noted_pids(folder: Path) -> list[int]:
    """The processes that the entries have noted."""
    return [int(path.read_text()) for path in sorted(folder.glob("*.pid")) if path.read_text()]


class Driver:
    """One driver process; use as a context manager."""

    def __init__(self, kind: str, environ: Mapping[str, str]) -> None:
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.test_launch.driver", kind],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.next()["event"] == "up"

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, *requests: Mapping[str, Any]) -> None:
        """Run one job in the driver's main thread, or several at once in others."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()

    def next(self) -> dict[str, Any]:
        """The next event."""
        return self._events.get(timeout=TIMEOUT_S)

    def until_output(self, text: str) -> None:
        """Wait until rank 0 has printed `text`."""
        seen = ""
        while text not in seen:
            event = self.next()
            assert event["event"] == "output", event
            seen += event["text"]

    def end(self) -> dict[str, Any]:
        """How the job ended, with all that rank 0 printed meanwhile under "output"."""
        output = ""
        while (event := self.next())["event"] == "output":
            output += event["text"]
        return {**event, "output": output}

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.submit(request)
        return self.end()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> list[psutil.Process]:
        """SIGKILL the driver alone; returns all processes that were below it."""
        below = psutil.Process(self.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        return below

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray's own messages are not
                self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()
