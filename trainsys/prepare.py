"""`trainsys data prepare`: text to token shards, with progress on the way."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal, cast

from trainsys import data, recipe
from trainsys.check import check
from trainsys.errors import ConfigError

_FORMATS = ("arrow", "parquet")


def prepare_data(overrides: list[str], out: Path, file_format: str) -> data.PreparedInfo:
    """Prepare what the `data` section with `overrides` (`--data.key=value`) describes, printing progress on stderr.

    Raises:
        ConfigError: an override is wrong or belongs to another section; data.DataError: the text cannot be used.
    """
    if file_format not in _FORMATS:
        raise ConfigError([f"command line: --format: {file_format!r} is not a choice; allowed: 'arrow', 'parquet'"])
    foreign = [argument for argument in overrides if not argument.startswith("--data.")]
    if foreign:
        raise ConfigError(f"command line: {argument}: not a setting of the data section" for argument in foreign)
    resolved = recipe.load([], ["--name=prepare", "--steps=21", "--evaluation.sequences=0", *overrides])
    check(resolved.config, sources=resolved.sources)
    config = resolved.config.data
    show = Meter()
    info = data.prepare(config, out, on_progress=show, format=cast(Literal["arrow", "parquet"], file_format))
    show.finish(info)
    return info


@dataclasses.dataclass(slots=True)
class Meter:
    """Prints progress at most once a second."""

    last_s: float = 0.0

    def __call__(self, progress: data.PrepareProgress) -> None:
        now = time.monotonic()
        if now - self.last_s < 1.0:
            return
        self.last_s = now
        total = f" of {progress.total_bytes / 1e6:,.1f}" if progress.total_bytes else ""
        _say(
            f"{progress.documents:,} documents, {progress.bytes / 1e6:,.1f}{total} MB, {progress.tokens:,} tokens, "
            f"{progress.bytes_per_s / 1e6:,.1f} MB/s"
        )

    def finish(self, info: data.PreparedInfo) -> None:
        """Print what was made."""
        _say(
            f"{info.path}: {info.train.tokens:,} training and {info.validation.tokens:,} validation tokens of "
            f"{info.train.documents + info.validation.documents:,} documents; unigram entropy "
            f"{info.unigram_entropy:.4f} nats/token\ntrain from it: --data.path={info.path}"
        )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
