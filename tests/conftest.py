"""Set up once for every test: ranks start quickly, and nothing that a test started outlives it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.ranks import warm_up
from tests.workers import FilesInWorkers, longest_first, turn

_GRACE_S = 2.0

# A busy machine is no failure. On CI the parent is hypothesis' own profile: the same examples each time.
settings.register_profile("project", parent=settings.default, deadline=None, database=None)
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what takes too long to be asked for each time."""
    parser.addoption("--every-cell", action="store_true", help="train in all cells of the table of layouts")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let the fork server import torch while tests are collected, in each process that runs some."""
    # Ray starts its workers with a niceness of 15: beside tests of another worker they would hardly run.
    os.environ.update(RAY_worker_niceness="0")
    if not session.config.option.collectonly and session.config.option.dist == "no":  # so says a worker, too
        warm_up()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesInWorkers:
    """Decide who runs what."""
    return FilesInWorkers(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Decide what comes first."""
    longest_first(items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Decide when a test may run."""
    with turn(item.config, is_alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Fail a test that leaves a child process or a non-daemon thread behind."""
    processes, threads = _child_processes(), _threads()
    yield
    deadline = time.monotonic() + _GRACE_S
    while (left := _left(processes, threads)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        pytest.fail("left running: " + ", ".join(left), pytrace=False)


def _left(processes: set[int], threads: set[threading.Thread]) -> list[str]:
    stray = [f"process {pid} ({_command(pid)})" for pid in sorted(_child_processes() - processes)]
    return stray + [f"thread {thread.name}" for thread in _threads() - threads]


def _child_processes() -> set[int]:
    children: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread ended in between
            children.update(int(pid) for pid in path.read_text().split())
    return children


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    except FileNotFoundError:  # it ended in between
        return "gone"
