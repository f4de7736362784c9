"""A run that is killed or stopped and taken up again equals one that never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import checkpoint as ck
from tests.test_trainsys import runs
from trainsys import RunError, folder, recipe


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, which must be whole and undamaged."""
    with ck.Checkpointer(run_dir / "checkpoints") as checkpointer:
        info = checkpointer.latest(verify="deep")
    assert info is not None
    return ck.read(info, "*")


def assert_equal_state(left: Path, right: Path) -> None:
    expected, found = final_state(left), final_state(right)
    assert expected.keys() == found.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in expected)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), f"{name} differs"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_stopped_once_and_killed_once_ends_with_the_same_bits(tmp_path: Path, text: Path, stage: int) -> None:
    """fp32; with dropout, so that a generator that did not come back would show in the losses."""
    settings = runs.arguments(f"--data.path={text}", f"--engine.zero_stage={stage}", "--model.dropout=0.1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.succeed("launch", *settings, f"--run_dir={whole}", cwd=tmp_path)

    args = [*settings, f"--run_dir={broken}"]
    with runs.running("launch", *args, cwd=tmp_path) as process:
        runs.wait_for_step(process, broken, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 3, runs.logs(broken)
    stopped_at = runs.last_step(broken)
    assert stopped_at < 12
    assert final_state(broken), "a stopped run has saved where it stopped"

    with runs.running("launch", *args, "--resume", cwd=tmp_path) as process:
        runs.wait_for_step(process, broken, min(stopped_at + 4, 11))
        process.kill_tree()
    runs.succeed("launch", *args, "--resume", cwd=tmp_path)

    assert runs.losses(broken) == runs.losses(whole)
    assert_equal_state(whole, broken)
    assert (broken / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks_and_another_stage(tmp_path: Path, text: Path) -> None:
    settings = runs.arguments(f"--data.path={text}")
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    runs.succeed("launch", *settings, f"--run_dir={whole}", cwd=tmp_path)
    with runs.running("launch", *settings, f"--run_dir={changed}", cwd=tmp_path) as process:
        runs.wait_for_step(process, changed, 4)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    runs.succeed(
        "launch",
        *settings,
        f"--run_dir={changed}",
        "--parallel.replicate=1",
        "--engine.zero_stage=3",
        "--resume",
        cwd=tmp_path,
    )
    expected, found = runs.losses(whole), runs.losses(changed)
    assert expected.keys() == found.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), f"step {step}"


def flip_a_bit(checkpoint: Path, rank: int) -> None:
    """Damage the shard that `rank` wrote, somewhere in its tensors."""
    (shard,) = checkpoint.glob(f"*{rank}.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks_and_never_trained_from(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    settings = runs.arguments(f"--data.path={text}", f"--run_dir={run}", "--steps=6", "--evaluation.sequences=0")
    runs.succeed("launch", *settings, cwd=tmp_path)
    before = runs.losses(run)
    older, newest = sorted((run / "checkpoints").glob("step-*"))
    flip_a_bit(newest, rank=1)
    output = runs.succeed("launch", *settings, "--resume", cwd=tmp_path)
    assert "resumes after step 3" in output
    assert runs.losses(run) == before, "steps 4 to 6 were made again, from a whole checkpoint"
    assert f"skipped: {newest}: rank 1: CorruptCheckpoint" in runs.logs(run)

    for checkpoint in (run / "checkpoints").glob("step-*"):
        if checkpoint != newest:
            flip_a_bit(checkpoint, rank=0)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    for attempt in ("finds the damage", "finds it marked"):
        done = runs.run("launch", *settings, "--resume", cwd=tmp_path)
        assert done.returncode == 1, attempt
        assert "no checkpoint is whole: " in done.stderr.splitlines()[0], attempt
        assert older.name in done.stderr.splitlines()[0], attempt
    assert {path.name for path in (run / "checkpoints").iterdir()} == kept, "a run that cannot resume deletes nothing"


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tmp_path: Path, text: Path) -> None:
    settings = runs.arguments(f"--data.path={text}")
    runs.succeed("launch", *settings, f"--run_dir={tmp_path / 'ours'}", cwd=tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "trainsys"),
            *("train", *settings, f"--run_dir={tmp_path / 'torchrun'}"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert runs.losses(tmp_path / "torchrun") == runs.losses(tmp_path / "ours")
    assert_equal_state(tmp_path / "ours", tmp_path / "torchrun")


def test_resuming_as_another_run_is_refused_before_anything_starts(tmp_path: Path, text: Path) -> None:
    settings = runs.arguments(
        f"--data.path={text}", "--steps=4", "--parallel.replicate=1", f"--run_dir={tmp_path / 'r'}"
    )
    runs.succeed("launch", *settings, cwd=tmp_path)
    again = runs.run("launch", *settings, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr == (
        f"{tmp_path / 'r'}: already holds a run; --resume continues it, another --run_dir starts one\n"
    )
    other = runs.run("launch", *settings, "--seed=5", "--resume", cwd=tmp_path)
    assert other.returncode == 2
    assert other.stderr == (f"command line: seed: 5, but the run in {tmp_path / 'r'} has 0; a resumed run keeps it\n")
    missing = runs.run("launch", *runs.arguments(f"--run_dir={tmp_path / 'none'}"), "--resume", cwd=tmp_path)
    assert missing.returncode == 1
    assert missing.stderr == f"{tmp_path / 'none'}: holds no run to resume; start one without --resume\n"


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path: Path) -> None:
    resolved = recipe.load(["tiny"], [f"--run_dir={tmp_path / 'run'}"])
    with (
        folder.open_run(resolved, resume=False),
        pytest.raises(RunError, match="another process trains here; stop it first"),
        folder.open_run(resolved, resume=True),
    ):
        raise AssertionError("unreachable")
    with folder.open_run(resolved, resume=True) as again:
        assert len(again.record()["starts"]) == 2


def test_resuming_takes_the_last_run_of_that_name_and_no_other_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt-2", "gpt", "gpt"):
        with folder.open_run(recipe.load(["tiny"], [f"--name={name}"]), resume=False):
            pass
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["gpt", "gpt-2", "gpt-3"]
    with folder.open_run(recipe.load(["tiny"], ["--name=gpt"]), resume=True) as last:
        assert last.path.name == "gpt-3"
    with folder.open_run(recipe.load(["tiny"], ["--name=gpt-2"]), resume=True) as other:
        assert other.path.name == "gpt-2"


def test_a_run_that_never_came_to_train_is_not_resumed_in_the_place_of_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resolved = recipe.load(["tiny"], [])
    with folder.open_run(resolved, resume=False) as run:
        pass
    with folder.open_run(resolved, resume=True) as again:  # there is no other that could be meant
        assert again == run
    run.metrics.write_text('{"step": 1}\n')
    with folder.open_run(resolved, resume=False):
        pass
    with pytest.raises(RunError, match=f"nothing to resume; --run_dir={run.path} continues the run before it"):
        folder.choose(resolved.config, resume=True)


def test_a_folder_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(RunError, match="is not the record of a run"),
        folder.open_run(recipe.load(["tiny"], [f"--run_dir={tmp_path}"]), resume=True),
    ):
        raise AssertionError("unreachable")


@pytest.mark.slow
def test_ranks_that_did_not_save_in_time_are_no_clean_stop(tmp_path: Path, text: Path) -> None:
    settings = runs.arguments(
        f"--data.path={text}", f"--run_dir={tmp_path / 'run'}", "--steps=100000", "--launch.stop_grace_s=1"
    )
    with runs.running("launch", *settings, cwd=tmp_path) as process:
        runs.wait_for_step(process, tmp_path / "run", 2)
        for rank in psutil.Process(process.pid).children(recursive=True):
            if os.getsid(rank.pid) == rank.pid and "launch.guardian" not in rank.cmdline():
                rank.suspend()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    printed = (tmp_path / "background.log").read_text()
    assert code == 1, printed
    assert "were killed; --resume continues from the last checkpoint before" in printed
