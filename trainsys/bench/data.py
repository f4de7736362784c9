"""Data must never be what training waits for: tokens/s out of the loader, MB/s into shards, seconds to resume.

Claims and baselines, each on the source text of the standard library as byte tokens:

    read      BatchLoader (seeded order, document masks, targets, prefetch thread), against what small trainers do:
              random windows of one flat numpy memmap, stacked into a torch tensor (no order, no documents, no resume)
              tokens/s = steps * sequences * T / seconds
    prepare   listing, reading, hold-out, tokens, counts, digests, fsync, publish; against reading every file and
              writing its bytes as uint16 to one file, fsync
              MB/s = bytes of source text / seconds
    resume    a new BatchLoader's first step in the middle of epoch 10^6, against its first step at position 0

The page cache is warm in every case: both sides read what a first, untimed pass has read. Gate: the loader's tokens
equal those cut from the flat file by the order's own indices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.bench import commit
from trainsys.config import DataConfig
from trainsys.data import BatchLoader, Order, TokenDataset, prepare, read_prepared
from trainsys.data.source import find_files

SEQUENCES = 16
LENGTHS = (256, 2048)
FAR_EPOCH = 10**6


def main(arguments: list[str]) -> int:
    """Runs the benchmark and prints its table; 1 where the correctness gate fails."""
    parser = argparse.ArgumentParser(prog="python -m trainsys.bench.data", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of every case (default 7)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="one pass over a part of the text: does it run?")
    chosen = parser.parse_args(arguments)
    repeats, steps = (1, 5) if chosen.smoke else (chosen.repeats, 400)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        bench = Bench(Path(folder), _source(smoke=chosen.smoke), steps)
        for repeat in range(repeats + 1):  # the first pass warms up and is not counted
            bench.measure(keep=repeat > 0)
        document = bench.document({"repeats": repeats, "steps": steps, "smoke": chosen.smoke})
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    _print(document)
    return 0 if all(gate["ok"] for gate in document["gates"]) else 1


def _source(*, smoke: bool) -> str:
    return str(Path(json.__file__).parent) if smoke else "stdlib"


class Bench:
    """The cases and their samples."""

    def __init__(self, folder: Path, source: str, steps: int) -> None:
        self._folder = folder
        self._source = source
        self._steps = steps
        self._samples: dict[tuple[str, str, str], list[float]] = {}
        self._prepared = prepare(self._config(), folder / "prepared").path
        self._flat = self._flatten()
        self._mismatches = sum(self._mismatched(length) for length in LENGTHS)

    def measure(self, *, keep: bool) -> None:
        """One pass over every case, baseline and candidate in turn."""
        text_bytes = sum(file.size or 0 for file in find_files(self._source))
        cases: list[tuple[str, str, str, Callable[[], float]]] = []
        for length in LENGTHS:
            tokens = self._steps * SEQUENCES * length
            cases += [
                (f"read T={length}", "numpy memmap", "tokens/s", _rate(tokens, partial(self._memmap, length))),
                (f"read T={length}", "BatchLoader", "tokens/s", _rate(tokens, partial(self._loader, length))),
            ]
        cases += [
            ("prepare", "plain copy", "MB/s", _rate(text_bytes / 1e6, self._copy)),
            ("prepare", "prepare", "MB/s", _rate(text_bytes / 1e6, self._prepare)),
            ("resume", "at position 0", "s", lambda: self._first_step(0)),
            ("resume", f"in epoch {FAR_EPOCH}", "s", lambda: self._first_step(FAR_EPOCH)),
        ]
        for case, metric, unit, run in cases:
            sample = run()
            if keep:
                self._samples.setdefault((case, metric, unit), []).append(sample)

    def document(self, parameters: dict[str, object]) -> dict[str, Any]:
        """Everything measured, in the schema that all benchmarks share."""
        info = read_prepared(self._prepared)
        return {
            "name": "trainsys.data",
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
            "versions": {name: version(name) for name in ("torch", "numpy", "pyarrow", "fsspec", "xxhash")},
            "parameters": parameters
            | {"sequences": SEQUENCES, "lengths": list(LENGTHS), "source": self._source, "tokens": info.train.tokens},
            "results": [
                {
                    "case": case,
                    "metric": metric,
                    "unit": unit,
                    "samples": samples,
                    "median": statistics.median(samples),
                    "min": min(samples),
                    "max": max(samples),
                }
                for (case, metric, unit), samples in self._samples.items()
            ],
            "bounds": [_copy_bound(), self._write_bound()],
            "gates": [
                {"name": "tokens that differ from the flat file", "value": self._mismatches, "limit": 0}
                | {"ok": self._mismatches == 0}
            ],
        }

    def _config(self) -> DataConfig:
        return DataConfig(path=self._source, validation_fraction=0.0)

    def _flatten(self) -> Path:
        """The whole training split as one file of uint16, written from the mapped shards."""
        path = self._folder / "flat.bin"
        dataset = TokenDataset(self._prepared, "train", 1)
        with path.open("wb") as file:
            for view in dataset.views(0, dataset.num_tokens):
                file.write(view.data)
        return path

    def _memmap(self, length: int) -> None:
        flat = np.memmap(self._flat, np.uint16, "r")
        generator = torch.Generator().manual_seed(0)
        for _ in range(self._steps):
            starts = torch.randint(len(flat) - length - 1, (SEQUENCES,), generator=generator).tolist()
            torch.stack([torch.from_numpy(flat[i : i + length].astype(np.int64)) for i in starts])
            torch.stack([torch.from_numpy(flat[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])

    def _loader(self, length: int) -> None:
        with self._open(length) as loader:
            for step in range(self._steps):
                loader.step(step * SEQUENCES)

    def _open(self, length: int) -> BatchLoader:
        dataset = TokenDataset(self._prepared, "train", length)
        return BatchLoader(
            dataset,
            Order(len(dataset), seed=0),
            global_sequences=SEQUENCES,
            micro_sequences=SEQUENCES,
            data_rank=0,
            data_ranks=1,
            document_mask=True,
        )

    def _copy(self) -> None:
        target = self._folder / "copy.bin"
        with target.open("wb") as copy:
            for file in find_files(self._source):
                copy.write(np.frombuffer(Path(file.path).read_bytes(), np.uint8).astype(np.uint16).data)
            copy.flush()
            os.fsync(copy.fileno())
        target.unlink()

    def _prepare(self) -> None:
        target = self._folder / "again"
        prepare(self._config(), target)
        shutil.rmtree(target)

    def _first_step(self, epoch: int) -> float:
        length = LENGTHS[0]
        position = epoch * len(TokenDataset(self._prepared, "train", length)) + 1
        began_s = time.perf_counter()
        with self._open(length) as loader:
            loader.step(position)
            return time.perf_counter() - began_s

    def _mismatched(self, length: int) -> int:
        flat = np.memmap(self._flat, np.uint16, "r")
        order = Order((len(flat) - 1) // length, seed=0)
        wrong = 0
        with self._open(length) as loader:
            for step in range(5):
                (batch,) = loader.step(step * SEQUENCES).micro_batches
                starts = order.samples(step * SEQUENCES, SEQUENCES) * length
                expected = np.stack([flat[start : start + length] for start in starts])
                wrong += int((batch.tokens.numpy() != expected).sum())
        return wrong

    def _write_bound(self) -> dict[str, object]:
        block = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
        began_s = time.perf_counter()
        with (self._folder / "bound.bin").open("wb") as file:
            file.write(block.data)
            file.flush()
            os.fsync(file.fileno())
        rate = len(block) / 1e6 / (time.perf_counter() - began_s)
        return {"metric": "disk write", "value": rate, "unit": "MB/s", "how": "16 MiB, one file, fsync"}


def _rate(amount: float, run: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        began_s = time.perf_counter()
        run()
        return amount / (time.perf_counter() - began_s)

    return timed


def _copy_bound() -> dict[str, object]:
    """Tokens/s that one core widens from uint16 to int64, in memory, in one piece."""
    tokens = np.zeros(1 << 22, np.uint16)
    out = np.zeros(len(tokens), np.int64)
    rates = []
    for _ in range(5):
        began_s = time.perf_counter()
        np.copyto(out, tokens)
        rates.append(len(tokens) / (time.perf_counter() - began_s))
    how = "best of 5 copies of 4 Mi tokens from uint16 to int64"
    return {"metric": "widening copy", "value": max(rates), "unit": "tokens/s", "how": how}


def _print(document: dict[str, Any]) -> None:
    for row in document["results"]:
        print(
            f"{row['case']:14} {row['metric']:20} {row['median']:14,.4f} {row['unit']:9}"
            f" ({row['min']:,.4f} to {row['max']:,.4f}, {len(row['samples'])} samples)"
        )
    for bound in document["bounds"]:
        print(f"{'bound':14} {bound['metric']:20} {bound['value']:14,.4f} {bound['unit']:9} ({bound['how']})")
    for gate in document["gates"]:
        print(f"gate: {gate['name']}: {gate['value']} (limit {gate['limit']}): {'ok' if gate['ok'] else 'FAILED'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
