"""Checkpoints that turn out to be wrong though whole: passed over in every tier, whoever copies them meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, CorruptCheckpoint, MemoryConfig, StorageError
from checkpoint.__main__ import main
from checkpoint.catalog import PROMOTION
from checkpoint.config import RemoteConfig
from checkpoint.local import LocalStorage
from checkpoint.names import MARK
from checkpoint.promotion import marked
from checkpoint.reader import Reader
from checkpoint.storage import open_storage
from checkpoint.tiers import Tier, Tiers
from tests.test_checkpoint.fleets import fleet
from tests.test_checkpoint.test_promotion import Broken, folders, promote, promoter, three_steps
from tests.test_checkpoint.worlds import ranks, saved_by


def promote_one(local: Path, remote: str, folder: str) -> None:
    """Copy one checkpoint."""
    one = promoter(local, remote)
    one.announce(folder)
    one.submit(folder).result(60)
    assert one.close(60)


def distrust(root: Path, after_step: int, remote: Path | None = None) -> int:
    """Be the launch that learns that checkpoints are wrong; it has no promoter of its own."""
    with Checkpointer(root) as ck:
        if remote is not None:
            ck._tiers = Tiers([*ck._tiers.tiers, Tier("remote", open_storage(remote))])
        return ck.distrust(after_step, "a bit had flipped")


@pytest.mark.parametrize("moment", ["before", "first file", "last file", "commit", "committed"])
def test_a_distrusted_checkpoint_is_not_recovered_from_its_copy_whenever_it_is_marked(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
):
    root, remote = tmp_path / "local", tmp_path / "remote"
    for step in (1, 2):
        saved_by(root, 2, step, seed=step)
    good, bad = folders(root)
    promote_one(root, str(remote), good)
    marks = {"first file": ("create_at", "r00000.o"), "last file": ("write", "slices"), "commit": ("write_new", "")}
    done: list[int] = []

    def watch(call: str, path: str) -> bool:
        if not done and moment in marks and call == marks[moment][0] and marks[moment][1] in path:
            done.append(distrust(root, 1, remote))
        return False

    promoter(root, str(remote)).announce(bad)
    if moment == "before":
        done.append(distrust(root, 1, remote))
    if moment == "committed":  # and then killed, before it looked
        shutil.copytree(root / bad, remote / bad)
        (remote / bad / PROMOTION).unlink()
        done.append(distrust(root, 1))
    one = promoter(root, Broken(remote, watch))  # as the next launch does
    assert one.close(20)
    assert done == [1]
    assert marked(open_storage(root)) == []
    assert folders(remote) == ([good] if moment not in ("commit", "committed") else [good, bad])
    shutil.rmtree(root)
    tiers = Tiers([Tier("local", open_storage(root)), Tier("remote", open_storage(remote))])
    found = tiers.latest()
    assert found is not None
    assert found.reader.folder == good


def test_a_copy_committed_while_its_checkpoint_is_being_marked_is_marked_too(tmp_path: Path):
    root, remote = tmp_path / "local", tmp_path / "remote"
    saved_by(root, 1)
    (bad,) = folders(root)

    class Late(LocalStorage):
        """A local tier whose checkpoint is copied, committed and looked at by another before its mark is there."""

        def write(self, path: str, data: bytes) -> None:
            if path.endswith(MARK):
                promote_one(root, str(remote), bad)
            super().write(path, data)

    with Checkpointer(root) as ck:
        ck._tiers = Tiers([Tier("local", Late(root)), Tier("remote", open_storage(remote))])
        assert ck.distrust(0, "a bit had flipped") == 2
        with pytest.raises(CorruptCheckpoint, match=r"rank 0 distrusts it, though it is whole: a bit had flipped"):
            ck.latest()


def test_damage_of_the_local_one_does_not_condemn_the_copy(tmp_path: Path):
    local = tmp_path / "local"
    saved_by(local, 2)
    (folder,) = folders(local)
    promote(local, str(tmp_path / "remote"))
    Reader(open_storage(local), folder).condemn(0, CorruptCheckpoint("a digest does not match"))
    promoter(local, str(tmp_path / "remote")).announce(folder)
    assert promoter(local, str(tmp_path / "remote")).close(20)
    assert checkpoint.verify(tmp_path / "remote").ok
    assert marked(open_storage(local)) == []


def test_a_distrusted_one_does_not_push_out_one_that_waits(tmp_path: Path):
    root, remote = tmp_path / "local", tmp_path / "remote"
    first, second, third = three_steps(root)
    for folder in (first, second, third):
        (root / folder / PROMOTION).write_bytes(b'{"state":"waits"}')
    assert distrust(root, 2) == 1
    made = [promoter(root, str(remote), rank, 2) for rank in range(2)]
    assert all(ranks(2, lambda rank: made[rank].close(20)))
    assert second in folders(remote)
    assert third not in folders(remote)
    assert marked(open_storage(root)) == []


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"frozen": torch.arange(9.0), "trained": torch.full((5,), float(step))}


def test_every_tier_passes_over_what_is_distrusted_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, remote = tmp_path / "local", tmp_path / "remote"
    config = CheckpointConfig(
        delta=True,
        every=1,
        keep_last=9,
        memory=MemoryConfig(every=1, keep_last=9),
        remote=RemoteConfig(url=str(remote), every=1, keep_last=9),
    )
    with fleet(tmp_path / "agents", 2) as agents:
        with Checkpointer(root, config=config, memory=agents.storage(peers=1)) as ck:
            for step in (1, 2, 3):
                ck.save(step, weights(step), tiers=("memory", "local", "remote")).at("remote").result(20)
        with Checkpointer(root, config=config, memory=agents.storage(peers=1)) as ck:
            assert ck.distrust(1, "a bit had flipped") == 6
            assert ck.distrust(1, "a bit had flipped") == 6
            (bad, good) = ck.list()[-1].folder, ck.list()[0].folder
            assert agents.holders(f"{bad}/{MARK}") == [0, 1]
            filled = {name: torch.zeros_like(value) for name, value in weights(0).items()}
            loaded = ck.recover(filled)
            assert loaded is not None
            assert (loaded.step, float(filled["trained"][0])) == (1, 1.0)
            assert len(loaded.skipped) == 6
            assert all("distrusts it, though it is whole: a bit had flipped" in why for why in loaded.skipped)
            assert [info.step for info in ck.list()] == [1] * 3 + [2] * 3 + [3] * 3
            # What is saved next is compared with the newest that nobody distrusts, whatever the others hold.
            made = ck.save(2, weights(3), tiers=("local",)).result(20)
            assert {file.path.rpartition("/")[0] for file in Reader(open_storage(root), made.folder).record.files} == {
                "",
                good,
            }
            latest = ck.latest()
            assert latest is not None
            assert latest.folder == made.folder
    assert main(["ls", str(root)]) == 1
    printed = capsys.readouterr()
    states = [line.split()[-2] for line in printed.out.splitlines()[1:]]
    assert states == ["ok", "distrusted", "distrusted", "ok"]
    assert printed.err.count("rank 0 distrusts it, though it is whole: a bit had flipped; remove BAD.json there") == 2


def test_what_cannot_be_marked_is_named_after_the_rest_was_marked(tmp_path: Path):
    steps = three_steps(tmp_path)

    def refuse(call: str, path: str) -> bool:
        return path == f"{steps[1]}/{MARK}"

    with Checkpointer(tmp_path) as ck:
        ck._tiers = Tiers([Tier("local", Broken(tmp_path, refuse))])
        with pytest.raises(StorageError, match=rf"not all checkpoints after step 0 .*{steps[1]} bears no mark: .*link"):
            ck.distrust(0, "a bit had flipped")
    assert [(tmp_path / step / MARK).exists() for step in steps] == [True, False, True]


def test_damage_found_later_does_not_take_the_distrust_away(tmp_path: Path):
    saved_by(tmp_path, 1)
    (folder,) = folders(tmp_path)
    assert distrust(tmp_path, 0) == 1
    reader = Reader(open_storage(tmp_path), folder)
    reader.condemn(0, CorruptCheckpoint("a digest does not match"))
    assert reader.is_distrusted()
    shutil.rmtree(tmp_path / folder)
    assert not reader.distrust(0, "too late")
    assert not (tmp_path / folder).exists()
