"""Which worker runs which test, where several run at once: `pytest -n 2`.

A file's tests stay together, in order, so that what its fixtures share is made once. Files that start a Ray go one
after another through one worker: two of them at once would want more than two cores have. While a test runs that is
marked as `alone`, no other worker runs any: it tells who has no CPU, or has three Ray nodes to feed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.sources import ROOT

_RAY = "files that start a Ray"


class FilesInWorkers(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Hands out files in their order as workers become free; those that start a Ray as if they were one."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return _RAY if _starts_ray(path) else path


def longest_first(items: list[pytest.Item]) -> None:
    """Sort files by how many of their tests are marked as slow, the Rays before all others.

    A file of long tests that comes last would leave the other workers idle.
    """
    slow: dict[str, int] = {}
    for item in items:
        path = item.nodeid.partition("::")[0]
        slow[path] = slow.get(path, 0) + (item.get_closest_marker("slow") is not None)
    rank = {path: (_starts_ray(path), num_slow) for path, num_slow in slow.items()}
    items.sort(key=lambda item: rank[item.nodeid.partition("::")[0]], reverse=True)


@contextlib.contextmanager
def turn(config: pytest.Config, *, is_alone: bool) -> Iterator[None]:
    """Wait until a test may run, and keep others from it while it runs alone; at once where there is one process.

    Whoever waits stands in a queue, so that a test that wants to be alone is not passed by all others.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None:
        yield
        return
    folder = Path(tempfile.gettempdir(), f"trainsys-tests-{worker['testrunuid']}")
    folder.mkdir(exist_ok=True)
    with (folder / "room").open("w") as room:
        with (folder / "queue").open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        yield


@functools.cache
def _starts_ray(path: str) -> bool:
    """Whether tests of this file are marked so; by its text, for who hands out files has imported none."""
    return "mark.ray" in (ROOT / path).read_text(encoding="utf-8")
