"""Which worker runs which test, where several run at once: `pytest -n 2`.

A file's tests stay together, in order, so that what its fixtures share is made once. Files that start a Ray go one
after another through one worker: two of them at once would want more than two cores have.
"""

from __future__ import annotations

import functools
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


@functools.cache
def _starts_ray(path: str) -> bool:
    """Whether tests of this file are marked so; by its text, for who hands out files has imported none."""
    return "mark.ray" in (ROOT / path).read_text(encoding="utf-8")
