"""Ranks as Ray actors, on a Ray that one driver process keeps for all these tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from tests.test_launch.client import Driver
from tests.test_launch.contract import LauncherContract

pytestmark = pytest.mark.ray
RAY_GONE_S = 20.0


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """A home of its own, where Ray puts the token that it makes for a new cluster."""
    return {"HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def driver(environ: Mapping[str, str]) -> Iterator[Driver]:
    with Driver("ray", environ) as driver:
        yield driver


class TestRayActors(LauncherContract):
    """The contract, and what only Ray actors promise."""

    kind = "ray"
    cpus_per_rank = 0.5
