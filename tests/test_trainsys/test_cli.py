"""The command line: what each command prints, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faulttol import compiled
from tests.test_trainsys import runs
from tests.test_trainsys.wandb_file import history
from trainsys import recipe
from trainsys.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps from prepared data, with its standard output beside it."""
    folder = tmp_path_factory.mktemp("cli")
    text = runs.write_text(folder / "corpus")
    prepared = runs.run("data", "prepare", f"--data.path={text}", "--out", str(folder / "tokens"), cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    assert f"train from it: --data.path={folder / 'tokens'}" in prepared.stderr
    output = runs.succeed(
        "launch",
        *runs.arguments(
            f"--data.path={folder / 'tokens'}",
            "--steps=4",
            "--checkpoint.every=2",
            "--evaluation.every=2",
            "--profile.start_step=2",
            "--profile.num_steps=1",
            "--metrics.wandb.mode=offline",
            "--evaluation.sample_prompt=line ",
        ),
        cwd=folder,
        fresh=True,
    )
    (folder / "output.txt").write_text(output)
    return folder


def test_a_run_says_what_a_person_wants_to_know(finished: Path) -> None:
    output = (finished / "output.txt").read_text()
    assert "2 rank(s) on cpu" in output
    assert "nats/token (unigram entropy)" in output
    assert "step 4/4  loss " in output
    assert " tokens/s  " in output
    assert "ETA " in output
    assert "step 4/4  validation loss " in output
    assert "sample:\nline " in output


def test_a_run_s_folder_holds_what_it_promises(finished: Path) -> None:
    run = finished / "runs" / "tiny"
    record = json.loads((run / "config.json").read_text())
    assert record["sources"]["steps"] == "command line"
    assert record["sources"]["optim.muon_lr"] == "tiny.toml"
    assert {"python", "torch", "deepspeed", "trainsys"} <= record["versions"].keys()
    assert len(record["run_id"]) == 32
    assert recipe.load([str(run / "config.json")]).config.steps == 4
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [entry for entry in records if "train/loss" in entry]
    assert [entry["step"] for entry in train] == [1, 2, 3, 4]
    for entry in train:
        assert entry["memory/peak_bytes"] > 1e6
        assert entry["time/forward_s"] > 0
        assert entry["time/backward_s"] > 0
        assert entry["time/update_s"] > 0
        assert entry["time/data_wait_s"] >= 0
    assert train[-1]["speed/tokens_per_s"] > 0
    assert train[-1]["speed/mfu"] > 0
    assert sum("validation/loss" in entry for entry in records) == 2
    assert sum("checkpoint/blocked_s" in entry for entry in records) == 2
    assert {path.name for path in (run / "logs").iterdir()} >= {"rank0.log", "rank1.log"}


def test_the_profiled_step_is_a_trace_of_every_rank(finished: Path) -> None:
    for rank in (0, 1):
        trace = json.loads((finished / "runs/tiny/profile" / f"rank{rank}.json").read_text())
        assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_an_offline_wandb_run_holds_the_logged_values(finished: Path) -> None:
    (path,) = (finished / "runs/tiny/wandb").glob("offline-run-*/run-*.wandb")
    logged = {entry["_step"]: entry["train/loss"] for entry in history(path) if "train/loss" in entry}
    assert logged == pytest.approx(runs.losses(finished / "runs/tiny"))


def test_report_summarises_a_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = output_of(monkeypatch, capsys, "report", str(finished / "runs/tiny"))
    assert "step 4 of 4" in report
    assert "2 saves" in report
    assert "tokens/s" in report


def test_a_second_run_of_the_same_name_gets_a_folder_of_its_own(finished: Path) -> None:
    runs.succeed("launch", *runs.arguments("--data.path=tokens", "--steps=4", "--parallel.replicate=1"), cwd=finished)
    assert (finished / "runs" / "tiny-2" / "model").is_dir()


def output_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command that succeeds prints; run inside this process."""
    monkeypatch.setattr("sys.argv", ["trainsys", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps(tmp_path: Path) -> None:
    text = runs.write_text(tmp_path / "corpus")
    settings = runs.arguments(
        f"--data.path={text}", "--steps=4", "--model.num_layers=1", "--parallel.replicate=1", "--evaluation.sequences=0"
    )
    runs.succeed("launch", *settings, "--run_dir=eager", cwd=tmp_path)
    runs.succeed("launch", *settings, "--run_dir=compiled", "--engine.compile=true", cwd=tmp_path, timeout_s=400)
    assert runs.losses(tmp_path / "compiled") == pytest.approx(runs.losses(tmp_path / "eager"), rel=1e-5)


def test_config_prints_every_setting_with_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = output_of(monkeypatch, capsys, "config", "--seed", "5", "tiny").splitlines()
    assert len(lines) == len(recipe.schema())
    assert any(line.split() == ["seed", "=", "5", "#", "command", "line"] for line in lines)
    assert any(line.startswith("name ") and line.endswith("# tiny.toml") for line in lines)
    assert any(line.startswith("optim.eps") and line.endswith("# default") for line in lines)
    assert any(line.split() == ["engine.precision", "=", '"auto"', "#", "tiny.toml"] for line in lines)


def test_help_says_of_every_command_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ((), ("job",), ("data",)):
        help_text = output_of(monkeypatch, capsys, *command, "--help")
        assert "..." not in help_text.partition("Commands:")[2]  # no sentence is cut off


def test_env_says_where_each_package_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = output_of(monkeypatch, capsys, "env")
    for package in ("trainsys", "parallel", "checkpoint", "offload", "faulttol", "launch"):
        assert f"{package}/__init__.py" in output


def test_env_says_where_collectives_are_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "python -m faulttol build" in output_of(monkeypatch, capsys, "env")
    compiled.library_path().parent.mkdir()
    compiled.library_path().touch()
    assert f"recorder     in C++, {tmp_path}" in output_of(monkeypatch, capsys, "env")


def test_recipes_lists_what_ships(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tiny  " in output_of(monkeypatch, capsys, "recipes")


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        (["launch", "tinny"], 2, "tinny: no such recipe; did you mean 'tiny'?"),
        (["launch", "tiny", "--stepz=1"], 2, "command line: stepz: unknown key; did you mean 'steps'?"),
        (["launch", "tiny", "--stepz", "1"], 2, "command line: stepz: unknown key; did you mean 'steps'?"),
        (["launch", "tiny", "steps=1"], 2, "command line: steps=1: neither a recipe nor an override; write --steps=1"),
        (["train", "tiny"], 2, "config: parallel: degrees multiply to 2 but there is 1 rank"),
        (["launch", "tiny", "--batch.global_sequences=3"], 2, "batch.global_sequences: 3 is not a multiple"),
        (["report", "nowhere"], 1, "nowhere: holds no run"),
        (["data", "prepare", "--steps=3"], 2, "command line: --steps=3: not a setting of the data section"),
        (["data", "prepare", "--format", "csv"], 2, "command line: --format: 'csv' is not a choice"),
        (["data", "prepare", "--data.path=nothing/*.txt"], 1, "nothing/*.txt"),
    ],
)
def test_a_mistake_ends_with_one_message_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    code: int,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trainsys", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err
    assert ended.value.code == code, message
    assert expected in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_fails_is_named_first_with_its_reason(tmp_path: Path) -> None:
    text = runs.write_text(tmp_path / "corpus", documents=2)
    settings = runs.arguments(f"--data.path={text}", "--data.sequence_length=4096", "--parallel.replicate=1")
    done = runs.run("launch", *settings, cwd=tmp_path)
    assert done.returncode == 1
    first, last = done.stderr.splitlines()  # what a user can cause needs no traceback
    assert first.startswith("tiny: rank 0 of 1: raised TooFewTokensError: "), done.stderr
    log = Path(last.removeprefix("(traceback: ").removesuffix(")"))
    assert "TooFewTokensError" in log.read_text()
