"""Prepared folders read the slow way, for comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainsys.config import DataConfig
from trainsys.data import prepare, read_prepared


def documents(folder: Path, split: str) -> list[list[int]]:
    """Every document of the split, in order, with its end token: rows as Python lists, joined by index."""
    found: list[list[int]] = []
    for path in sorted((folder / split).glob("*.arrow")):
        with pa.OSFile(str(path)) as file:
            for row in pa.ipc.open_file(file).read_all().to_pylist():
                if row["document"] == len(found):
                    found.append([])
                assert row["document"] == len(found) - 1
                found[-1] += row["tokens"]
    return found


def texts(folder: Path, split: str) -> list[bytes]:
    """Every document of the split as bytes, of a folder of byte tokens."""
    end = read_prepared(folder).end_of_document
    found = []
    for document in documents(folder, split):
        assert document[-1] == end
        assert end not in document[:-1]
        found.append(bytes(document[:-1]))
    return found


def window(folder: Path, split: str, index: int, sequence_length: int) -> tuple[list[int], list[int]]:
    """Tokens and document numbers of one window, by walking over the whole split."""
    stream = [(token, number) for number, document in enumerate(documents(folder, split)) for token in document]
    cut = stream[index * sequence_length : index * sequence_length + sequence_length + 1]
    return [token for token, _ in cut], [number - cut[0][1] for _, number in cut]


def write_lines(folder: Path, num_files: int, seed: int = 0) -> Path:
    """A folder of text files of 0 to 3000 bytes of printable characters and line ends."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(num_files):
        size = int(generator.integers(0, 3000))
        letters: NDArray[np.uint8] = generator.choice(np.frombuffer(b"abcdefghij \n", np.uint8), size)
        (folder / f"{index:04d}.txt").write_bytes(letters.tobytes())
    return folder


def prepared(source: Path | str, out_dir: Path, **settings: object) -> Path:
    """The folder prepared from `source` with data settings or arguments of `prepare`."""
    arguments = {name: settings.pop(name) for name in ("format", "shard_tokens", "on_progress") if name in settings}
    config = DataConfig(path=str(source), **settings)  # type: ignore[arg-type]
    return prepare(config, out_dir, **arguments).path  # type: ignore[arg-type]
