"""Wrong numbers are named on every rank alike, and from where to go on is written down before anybody leaves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

import faulttol
from checkpoint.names import COMMIT, AttemptName
from faulttol import fence, preflight
from faulttol.errors import Corrupted
from tests.ranks import run_ranks
from trainsys import ConfigError, RunError, elastic, recipe
from trainsys.check import check
from trainsys.corruption import Inspector
from trainsys.distrust import distrust, heed
from trainsys.folder import RunFolder

_RUN = ("--optim.kind=adamw", "--engine.backend=torch", "--engine.zero_stage=0", "--engine.precision=fp32")


def _config(*settings: str) -> Any:
    keys = {setting.partition("=")[0] for setting in settings}
    rest = [setting for setting in _RUN if setting.partition("=")[0] not in keys]
    return recipe.load(["tiny"], [*rest, *settings]).config


def _inspected(rank: int, world_size: int, folder: str, mode: str, damage: str) -> tuple[Any, list[str]]:
    """Three steps of generation 0; what is wrong is wrong in the third."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = _config(
        f"--faulttol.mode={mode}", "--faulttol.corruption.replicas_every=1", "--faulttol.corruption.products_every=1"
    )
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    mesh = SimpleNamespace(size=lambda *axes: world_size)
    shared: Any = SimpleNamespace(
        config=config,
        rank=rank,
        mesh=mesh,
        groups=SimpleNamespace(get=lambda *axes: dist.group.WORLD),
        control=dist.group.WORLD,
        folder=RunFolder(Path(folder)),
    )
    engine: Any = SimpleNamespace(module=module, slices=lambda: dict(module.named_parameters()))
    said: list[str] = []
    admit = fence.Fence(Path(folder) / "generation", 0).check
    inspector = Inspector(engine, shared, right_step=0, drill=None, say=said.append, admit=admit)
    try:
        for step in (1, 2, 3):
            inspector.begin(step)
            if step == 3 and rank == world_size - 1:
                if damage == "bit":
                    module[2].weight.data.view(torch.int32)[1, 3] ^= 1 << 20
                else:
                    module[0].register_forward_hook(lambda module, inputs, output: output + 1.0, prepend=True)
            module(torch.ones(2, 8))
            inspector.before_update()
    except Corrupted as error:
        return (error.ranks, str(error)), said
    except fence.Fenced as error:
        return str(error), said
    finally:
        inspector.close()
    return None, said


@pytest.mark.parametrize(("damage", "what"), [("bit", "element 11 of 2.weight"), ("product", "product of 0 is wrong")])
def test_every_rank_learns_whose_numbers_are_wrong(tmp_path: Path, damage: str, what: str) -> None:
    fence.publish(tmp_path / "generation", 0)
    for (ranks, text), said in run_ranks(_inspected, 3, str(tmp_path), "act", damage):
        assert ranks == (2,)
        assert what in text
        assert "the state after step 1 was right" in text
        assert not said
    assert json.loads((tmp_path / "distrusted.json").read_text())["after_step"] == 1


def test_of_two_replicas_none_is_named_and_a_run_that_observes_is_only_told(tmp_path: Path) -> None:
    fence.publish(tmp_path / "generation", 0)
    for (ranks, text), _ in run_ranks(_inspected, 2, str(tmp_path), "act", "bit"):
        assert ranks == ()
        assert "one of the replicas, which nobody can tell" in text
    (tmp_path / "distrusted.json").unlink()
    for error, said in run_ranks(_inspected, 3, str(tmp_path), "observe", "bit"):
        assert error is None
        (line,) = said
        assert line.startswith("found numeric: numbers of rank 2 are wrong in step 3")
    assert not (tmp_path / "distrusted.json").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["--faulttol.corruption.products_every=5"], "faulttol.corruption: nothing is looked for; set faulttol.mode"),
        (
            ["--faulttol.mode=act", "--parallel.replicate=1", "--faulttol.corruption.replicas_every=1"],
            "replicas_every: 1: there are no replicas",
        ),
        (
            ["--faulttol.mode=act", "--faulttol.corruption.replicas_every=1", "--engine.zero_stage=2"],
            "replicas_every: 1: no rank keeps a replica of all parameters at engine.zero_stage = 2",
        ),
        (
            ["--faulttol.mode=act", "--faulttol.corruption.replicas_every=7", "--checkpoint.every=2"],
            r"replicas_every: 7: no checkpoint of before .* needs checkpoint.keep_last \(now 2\) above 4",
        ),
        (["--faulttol.ship_to=kept"], "faulttol.ship_to: nothing is recorded"),
        (["--faulttol.mode=observe", "--faulttol.ship_to=nowhere://kept"], "faulttol.ship_to: .*nowhere"),
    ],
)
def test_looking_that_cannot_work_is_refused_with_the_reason(settings: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(_config(*settings))


def test_each_mode_says_what_becomes_of_the_run() -> None:
    assert "ends the run; --resume continues it" in elastic.promise(_config())
    observed = _config("--faulttol.mode=observe", "--faulttol.corruption.products_every=3")
    assert "wrong numbers by every 3. product of a layer are told" in elastic.promise(observed)
    acted = _config("--faulttol.mode=act", "--launch.spares=2")
    assert "replaced, by 2 spare(s) that wait or one that is started, else the run goes on with fewer" in (
        elastic.promise(acted)
    )


def test_a_machine_or_a_link_that_fails_its_check_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = preflight.Check("disk", False, "nothing that was written can be read", 0.1)
    monkeypatch.setattr(preflight, "check_machine", lambda folder: [bad])
    with pytest.raises(RunError, match="preflight failed:\nFAILED disk"):
        elastic.warm_up(_config(), RunFolder(tmp_path))
    slow = preflight.Check("links", False, "between ranks 0 and 2", 0.1)
    monkeypatch.setattr(preflight, "check_links", lambda **settings: slow)
    shared: Any = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(RunError, match="between ranks 0 and 2"):
        elastic.check_links(shared)


def test_generations_go_on_from_those_of_earlier_launches_and_damage_is_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert elastic.next_generation(folder) == 0
    elastic.keep_out_earlier(folder)
    assert elastic.next_generation(folder) == 0, "there was none to keep out"
    (tmp_path / "generation").write_text("3\n")
    elastic.keep_out_earlier(folder)
    assert elastic.next_generation(folder) == 5
    (tmp_path / "generation").write_text("three")
    with pytest.raises(RunError, match="cannot tell the last generation of the run"):
        elastic.next_generation(folder)


def test_a_checkpoint_that_is_distrusted_counts_as_none_before_a_generation_has_heeded_that(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert elastic.saved_step(folder) == -1
    (folder.checkpoints / AttemptName.of(16, 0, "run").folder).mkdir(parents=True)  # not committed
    for step in (4, 8, 12):
        attempt = folder.checkpoints / AttemptName.of(step, 0, "run").folder
        attempt.mkdir(parents=True)
        (attempt / COMMIT).touch()
    assert elastic.saved_step(folder) == 12
    distrust(folder, 9, "an outlier in step 10")
    distrust(folder, 11, "replicas differ in step 12")
    assert elastic.saved_step(folder) == 8, "who writes later makes no later checkpoint right"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "distrusted.json"}
    heed(folder, cast(Any, SimpleNamespace(distrust=lambda after_step, why: 1)))
    assert elastic.saved_step(folder) == 12, "what was heeded is marked at the checkpoint itself"


def test_a_note_of_distrust_that_is_damaged_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "distrusted.json").touch()
    with pytest.raises(
        RunError, match=r"distrusted\.json: cannot tell from which step on .* remove those that are not"
    ):
        elastic.saved_step(RunFolder(tmp_path))


def test_a_rank_of_an_older_generation_distrusts_nothing(tmp_path: Path) -> None:
    fence.publish(tmp_path / "generation", 1)
    ((error, said),) = run_ranks(_inspected, 1, str(tmp_path), "act", "product")
    assert "generation 0 is over, the job is in generation 1" in error
    assert not said
    assert not (tmp_path / "distrusted.json").exists()


def test_a_rank_whose_ring_has_no_room_trains_unrecorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    context: Any = SimpleNamespace(env=SimpleNamespace(rank=0, world_size=1), generation=0)
    with elastic.recorded(_config("--faulttol.mode=observe"), RunFolder(tmp_path), context):
        faulttol.mark_step(1)
    assert "rank 0 trains unrecorded" in caplog.text
    assert not list((tmp_path / "events").iterdir())
