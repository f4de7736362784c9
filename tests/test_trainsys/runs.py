"""Whole runs from the command line, in processes of their own, for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tests import warm
from trainsys import metrics

SMALL = (
    "--launch.kind=local",
    "--steps=12",
    "--optim.kind=adamw",
    "--optim.lr=2e-3",
    "--model.num_layers=2",
    "--model.dim=32",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.ffn_dim=64",
    "--data.sequence_length=32",
    "--batch.global_sequences=8",
    "--batch.micro_sequences=2",
    "--engine.precision=fp32",
    "--engine.device=cpu",
    "--schedule.warmup_steps=3",
    "--checkpoint.every=3",
    "--evaluation.every=6",
    "--evaluation.sequences=6",
    "--evaluation.sample_tokens=8",
    "--metrics.peak_flops_per_s=1e11",  # measuring it takes a third of a second
    # A slow machine, or a debugger, must not look like a fault.
    "--launch.start_timeout_s=300",
    "--launch.frozen_timeout_s=60",
)
"""Settings that make `tiny` a run of seconds; combine with `--data.path`."""


def arguments(*overrides: str) -> list[str]:
    """`tiny` made small, with `overrides` in place of settings of the same key."""
    keys = {override.partition("=")[0] for override in overrides}
    return ["tiny", *(setting for setting in SMALL if setting.partition("=")[0] not in keys), *overrides]


def write_text(folder: Path, *, documents: int = 40) -> Path:
    """A folder of small text files with enough regularity to be learnt from."""
    folder.mkdir(parents=True)
    for index in range(documents):
        lines = [f"line {index * 7 % 13} of {index}: the quick brown fox jumps over {index % 5} dogs" for _ in range(6)]
        (folder / f"{index:03d}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


class Fresh(subprocess.Popen[bytes]):
    """A command in a new interpreter."""

    def kill_tree(self) -> None:
        """SIGKILL it and all its descendants; return when they are gone."""
        warm.kill_tree(self.pid)
        self.wait()


def _has_gpus() -> bool:
    import torch

    return torch.cuda.device_count() > 0


def run(
    command: str, *args: str, cwd: Path, timeout_s: float = 180, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `trainsys COMMAND ARGS` to its end; `fresh` in a new interpreter, else as a fork, see `tests.warm`.

    Beside GPUs always in a new one: the forks' server looks for them as it imports DeepSpeed, and then its forks find
    none.
    """
    if fresh or _has_gpus():
        return subprocess.run(
            [sys.executable, "-m", "trainsys", command, *args],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        return warm.run(
            "trainsys", [command, *args], cwd=cwd, folder=Path(folder), environ=os.environ, timeout_s=timeout_s
        )


def succeed(command: str, *args: str, cwd: Path, timeout_s: float = 180, fresh: bool = False) -> str:
    """Run `trainsys COMMAND ARGS`, which must exit with 0, and return its standard output."""
    done = run(command, *args, cwd=cwd, timeout_s=timeout_s, fresh=fresh)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def running(command: str, *args: str, cwd: Path) -> Iterator[warm.Command | Fresh]:
    """`trainsys COMMAND ARGS` in the background, as `run` starts it; its whole process tree is gone afterwards."""
    path = cwd / "background.log"
    process: warm.Command | Fresh
    if _has_gpus():
        with path.open("wb") as log:
            process = Fresh([sys.executable, "-m", "trainsys", command, *args], cwd=cwd, stdout=log, stderr=log)
    else:
        process = warm.Command("trainsys", [command, *args], cwd=cwd, stdout=path, stderr=path, environ=os.environ)
    try:
        yield process
    finally:
        process.kill_tree()


class Alive(Protocol):
    """A process that `wait_for_step` watches."""

    def poll(self) -> int | None: ...


def wait_for_step(process: Alive, run_dir: Path, step: int, timeout_s: float = 120) -> None:
    """Return when the run has recorded `step`."""
    wait_until(lambda: last_step(run_dir) >= step, process, run_dir, timeout_s)


def wait_until(done: Callable[[], bool], process: Alive, run_dir: Path, timeout_s: float = 120) -> None:
    """Return when `done` says so of what the run has written."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if done():
            return
        assert process.poll() is None, f"ended early with {process.poll()}: {logs(run_dir)}"
        time.sleep(0.02)
    raise AssertionError(f"not reached in {timeout_s} s: {logs(run_dir)}")


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max((record["step"] for record in metrics.read(path)), default=0) if path.exists() else 0


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step; a step that is recorded twice fails."""
    found: dict[int, float] = {}
    for record in metrics.read(run_dir / "metrics.jsonl"):
        if "train/loss" in record:
            assert record["step"] not in found, f"step {record['step']} is recorded twice"
            found[record["step"]] = record["train/loss"]
    return found


def logs(run_dir: Path) -> str:
    texts: Sequence[str] = [path.read_text(errors="replace")[-3000:] for path in sorted(run_dir.glob("logs/*.log"))]
    return "\n".join(texts)
