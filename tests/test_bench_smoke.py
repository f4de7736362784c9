"""Every benchmark runs in its smallest form and writes the one JSON schema that all of them share."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests import warm
from tests.sources import PACKAGES, ROOT

_NUMBER = (int, float)
TOP: dict[str, Any] = {
    "name": str,
    "commit": str,
    "date": str,
    "machine": dict,
    "versions": dict,
    "parameters": dict,
    "results": list,
    "bounds": list,
    "gates": list,
}
ROWS: dict[str, dict[str, Any]] = {
    "results": {
        "case": str,
        "metric": str,
        "unit": str,
        "samples": list,
        "median": _NUMBER,
        "min": _NUMBER,
        "max": _NUMBER,
    },
    "bounds": {"metric": str, "value": _NUMBER, "unit": str, "how": str},
    "gates": {"name": str, "value": (*_NUMBER, str), "limit": (*_NUMBER, str), "ok": bool},
}


def benches(root: Path) -> list[str]:
    """Return every benchmark of the packages as a module name."""
    paths = (path for package in PACKAGES for path in sorted((root / package / "bench").glob("*.py")))
    return [".".join(path.relative_to(root).with_suffix("").parts) for path in paths if path.stem != "__init__"]


def faults(document: Any) -> list[str]:
    """Return what is wrong with the JSON that a benchmark wrote."""
    found = _key_faults("document", document, TOP)
    if found:
        return found
    for section, keys in ROWS.items():
        for index, row in enumerate(document[section]):
            found += _key_faults(f"{section}[{index}]", row, keys)
    if found:
        return found
    if not document["results"]:
        found.append("results is empty")
    for index, row in enumerate(document["results"]):
        found += _sample_faults(f"results[{index}]", row)
    return found


def _key_faults(where: str, row: Any, keys: dict[str, Any]) -> list[str]:
    if not isinstance(row, dict):
        return [f"{where} is not an object"]
    found = [f"{where}.{key} is unknown" for key in sorted(row.keys() - keys.keys())]
    found += [f"{where}.{key} is missing" for key in keys if key not in row]
    for key, kind in keys.items():
        if key in row and (not isinstance(row[key], kind) or (isinstance(row[key], bool) and kind is not bool)):
            found.append(f"{where}.{key} has the wrong type: {row[key]!r}")
    return found


def _sample_faults(where: str, row: dict[str, Any]) -> list[str]:
    samples = row["samples"]
    if not samples or not all(isinstance(sample, _NUMBER) and math.isfinite(sample) for sample in samples):
        return [f"{where}.samples are not finite numbers: {samples}"]
    expected = {"median": median(samples), "min": min(samples), "max": max(samples)}
    return [
        f"{where}.{key} is {row[key]}, its samples say {value}"
        for key, value in expected.items()
        if not math.isclose(row[key], value, rel_tol=1e-9)
    ]


@pytest.mark.parametrize("module", benches(ROOT))
def test_a_bench_runs_small_and_writes_the_schema(module: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = warm.run(
        module, ["--smoke", "--json", str(out)], cwd=tmp_path, folder=tmp_path, environ=environ, timeout_s=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not faults(json.loads(out.read_text()))


def test_benches_are_found(tmp_path: Path) -> None:
    for name in ("offload/bench/__init__.py", "offload/bench/copies.py", "offload/bench.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert benches(tmp_path) == ["offload.bench.copies"]


_GOOD = {
    "name": "copies",
    "commit": "abc",
    "date": "2026-01-01T00:00:00Z",
    "machine": {"cpus": 2},
    "versions": {"torch": "2"},
    "parameters": {},
    "results": [{"case": "a", "metric": "t", "unit": "s", "samples": [1, 2.0, 4], "median": 2.0, "min": 1, "max": 4}],
    "bounds": [{"metric": "copy", "value": 1.0, "unit": "B/s", "how": "measured"}],
    "gates": [{"name": "equal", "value": 0, "limit": 0, "ok": True}],
}


def test_the_schema_accepts_a_complete_document() -> None:
    assert not faults(_GOOD)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("commit",), None, "document.commit has the wrong type: None"),
        (("extra",), 1, "document.extra is unknown"),
        (("results",), [], "results is empty"),
        (("results", 0, "samples"), [], "results[0].samples are not finite numbers: []"),
        (("results", 0, "samples"), [float("nan")], "results[0].samples are not finite numbers: [nan]"),
        (("results", 0, "median"), 3.0, "results[0].median is 3.0, its samples say 2.0"),
        (("results", 0, "max"), True, "results[0].max has the wrong type: True"),
        (("bounds", 0, "how"), 1, "bounds[0].how has the wrong type: 1"),
        (("gates", 0), [], "gates[0] is not an object"),
        (("gates", 0, "ok"), 1, "gates[0].ok has the wrong type: 1"),
    ],
)
def test_the_schema_finds_a_fault(path: tuple[Any, ...], value: Any, message: str) -> None:
    document: Any = copy.deepcopy(_GOOD)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert faults(document) == [message]


def test_the_schema_finds_a_missing_key() -> None:
    document = {key: value for key, value in _GOOD.items() if key != "gates"}
    assert faults(document) == ["document.gates is missing"]
