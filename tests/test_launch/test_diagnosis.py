"""What the launcher makes of the rings: what is old goes, and a disk that does not answer ends no job."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from faulttol import ring_path
from faulttol.config import DetectorConfig, HealthConfig
from faulttol.history import Follower
from launch.diagnosis import Diagnosis, Observation


def _observation(folder: Path, ship_to: str = "") -> Observation:
    return Observation(
        rings=folder / "rings",
        record=folder / "findings.jsonl",
        health=HealthConfig(),
        detector=DetectorConfig(),
        ship_to=ship_to,
    )


@pytest.mark.parametrize("ship_to", ["", "kept"])
def test_rings_of_the_last_two_generations_stay_and_all_where_they_are_shipped(tmp_path: Path, ship_to: str) -> None:
    (tmp_path / "rings").mkdir()
    diagnosis = Diagnosis(_observation(tmp_path, ship_to))
    for generation in range(4):
        diagnosis.begin(generation, 1)
        ring_path(tmp_path / "rings", 0, generation).touch()
    diagnosis.close()
    left = [0, 1, 2, 3] if ship_to else [2, 3]
    assert sorted((tmp_path / "rings").iterdir()) == [ring_path(tmp_path / "rings", 0, number) for number in left]


def test_rings_that_cannot_be_looked_at_now_are_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    diagnosis = Diagnosis(_observation(tmp_path))
    diagnosis.begin(0, 1)

    def stale(self: Follower, vitals: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Follower, "look", stale)
        for _ in range(3):
            assert not diagnosis.look(at_once=True)
    assert caplog.text.count("cannot be looked at now: [Errno 116] Stale file handle") == 1
    assert not diagnosis.look(at_once=True), "nobody records, and nothing is wrong"
    diagnosis.close()
