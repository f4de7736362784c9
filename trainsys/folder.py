"""The folder of one run: what is in it, how a new one is chosen, and how an old one is taken up again.

RUN/config.json      resolved configuration with sources, versions, commit and run id; a recipe in itself
RUN/metrics.jsonl    one record a line
RUN/checkpoints/     see `checkpoint`
RUN/logs/            output of every rank
RUN/model/           the trained model, written at the end
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trainsys import recipe
from trainsys.config import RunConfig
from trainsys.errors import ConfigError, RunError
from trainsys.precision import Precision, with_precision

_PACKAGES = ("trainsys", "torch", "deepspeed", "ray", "pyarrow", "fsspec", "transformers", "wandb")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def exists(self) -> bool:
        """Return whether a run was started here."""
        return self.config.exists()

    def has_trained(self) -> bool:
        """Return whether a step was ever taken here."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    def write_record(self, resolved: recipe.Resolved) -> None:
        """Write `config.json`: a new run, or a new start of the run that is here, whose identity stays.

        That includes what `engine.precision = auto` came to.

        Raises:
            RunError: the folder cannot be written.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record: dict[str, Any] = {
            "config": recipe.to_tree(resolved.config),
            "sources": dict(resolved.sources),
            "run_id": uuid.uuid4().hex,
            "created": now,
            "starts": [now],
            "versions": versions(),
            "commit": _commit(),
        }
        if self.exists():
            before = self.record()
            record |= {"run_id": before["run_id"], "created": before["created"], "starts": [*before["starts"], now]}
            if resolved.config.engine.precision == "auto":
                record["config"]["engine"]["precision"] = before["config"]["engine"]["precision"]
                record["sources"]["engine.precision"] = before["sources"]["engine.precision"]
        self._write_record(record)

    def as_begun(self, config: RunConfig) -> RunConfig:
        """Return `config` with what `engine.precision = auto` came to in this run, if that is known."""
        if config.engine.precision != "auto" or not self.exists():
            return config
        return with_precision(config, self.record()["config"]["engine"]["precision"])

    def settle(self, precision: Precision) -> None:
        """Keep what `engine.precision = auto` came to, for this start and all later ones.

        Raises:
            RunError: as `write_record`.
        """
        record = self.record()
        if record["config"]["engine"]["precision"] != "auto":  # by a later start, while this one stood
            return
        record["config"]["engine"]["precision"] = precision
        record["sources"]["engine.precision"] += ": auto"
        self._write_record(record)

    def _write_record(self, record: dict[str, Any]) -> None:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            temporary = self.config.with_suffix(".tmp")
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self.config)
        except OSError as error:
            raise RunError(f"{self.path}: cannot hold a run: {error.strerror}; set --run_dir") from error

    def record(self) -> dict[str, Any]:
        """Return what `create` wrote.

        Raises:
            RunError: there is no run, or its record is damaged.
        """
        try:
            found: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(f"{self.path}: holds no run: {error.strerror} (config.json)") from error
        except json.JSONDecodeError as error:
            raise RunError(f"{self.config}: is damaged: {error}") from error
        if not isinstance(found, dict) or not {"config", "run_id", "starts"} <= found.keys():
            raise RunError(f"{self.config}: is not the record of a run; choose another --run_dir")
        return found

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process of this file system from training in this folder inside the block.

        The operating system lets go when this process ends, however it ends.

        Raises:
            RunError: another process holds it.
        """
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.path}: another process trains here; stop it first") from error
            yield


@contextlib.contextmanager
def open_run(resolved: recipe.Resolved, *, resume: bool) -> Iterator[RunFolder]:
    """Yield the folder for this start of a run, its record written; no other process can train in it meanwhile.

    Raises:
        RunError: as `choose`, or another process trains there.
        ConfigError: resuming would change what the run is (see `_IDENTITY`).
    """
    folder = choose(resolved.config, resume=resume)
    if resume:
        _require_same_run(folder, resolved)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder.path}: cannot hold a run: {error.strerror}; set --run_dir") from error
    with folder.held():
        folder.write_record(resolved)
        yield folder


_IDENTITY = ("model.", "data.", "optim.kind", "engine.precision", "seed")
_FREE = ("data.cache_dir",)


def _require_same_run(folder: RunFolder, resolved: recipe.Resolved) -> None:
    """Refuse a resume that would load a checkpoint into another model, precision or data order.

    `engine.precision = auto` is any precision: the record's stays. Where that is `auto` nothing is saved yet, but by
    the nodes of a swarm, each of which has decided for itself.
    """
    before = dict(recipe.leaves(folder.record()["config"]))
    is_free = before["engine.precision"] == "auto" and not (folder.path / "nodes").exists()
    problems = [
        f"{resolved.sources[key]}: {key}: {value!r}, but the run in {folder.path} has {before.get(key)!r}; "
        "a resumed run keeps it"
        for key, value in recipe.leaves(recipe.to_tree(resolved.config))
        if key.startswith(_IDENTITY) and key not in _FREE and before.get(key) != value
        if key != "engine.precision" or not (is_free or value == "auto")
    ]
    if problems:
        raise ConfigError(problems)


def as_begun(config: RunConfig, *, resume: bool) -> RunConfig:
    """Return `config` with what `engine.precision = auto` came to in the run that it resumes, if that is known."""
    try:
        return choose(config, resume=True).as_begun(config) if resume else config
    except RunError:  # whoever opens the run tells it
        return config


def choose(config: RunConfig, *, resume: bool) -> RunFolder:
    """Return the folder for `config`: a new one, or with `resume` the one to continue.

    Without `run_dir` a new run takes the next free of `runs/<name>`, `runs/<name>-2`, …; resuming takes the last.

    Raises:
        RunError: `run_dir` already holds a run and `resume` was not asked for, or there is no run to resume, or the
            last one never came to train and an earlier one did.
    """
    if config.run_dir:
        folder = RunFolder(Path(config.run_dir).absolute())
        if resume and not folder.exists():
            raise RunError(f"{folder.path}: holds no run to resume; start one without --resume")
        if not resume and folder.exists():
            raise RunError(f"{folder.path}: already holds a run; --resume continues it, another --run_dir starts one")
        return folder
    root = Path("runs").absolute()
    own = {number: path for number, path in _numbered(root, config.name).items() if _name_of(path) == config.name}
    if resume and not own:
        raise RunError(f"{root}: holds no run named {config.name!r} to resume; start one without --resume")
    if resume:
        return _newest([RunFolder(own[number]) for number in sorted(own)])
    number = max(own, default=0) + 1
    while (path := root / (config.name if number == 1 else f"{config.name}-{number}")).exists():
        number += 1  # another run's name, or no run
    return RunFolder(path)


def _newest(runs: list[RunFolder]) -> RunFolder:
    """Return the last run, unless it would begin anew where somebody may mean the one before it."""
    *earlier, newest = runs
    if not newest.has_trained():
        for run in reversed(earlier):
            if run.has_trained():
                raise RunError(
                    f"{newest.path}: ended before its first step, so there is nothing to resume; "
                    f"--run_dir={run.path} continues the run before it"
                )
    return newest


def _name_of(path: Path) -> str:
    name: str = RunFolder(path).record()["config"]["name"]
    return name


def _numbered(root: Path, name: str) -> dict[int, Path]:
    """Return the runs in folders called `name` or `name-<number>`, by number; `gpt-2` may be a run of that name."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = {}
    for entry in root.iterdir() if root.is_dir() else ():
        match = pattern.fullmatch(entry.name)
        if match and RunFolder(entry).exists():
            found[int(match[1] or 1)] = entry
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a run depends on; absent ones are left out."""
    import platform

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Return the commit of the checkout this package was imported from, or "" outside of one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
