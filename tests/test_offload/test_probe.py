"""The probe measures what is here and says what is not; CPU-less NUMA nodes are found in recorded trees."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload import NvmeTier, TierSpec, calibrate, movers
from offload.__main__ import main
from offload.numa import NumaNode, memory_only, numa_nodes
from offload.probe import Clock, Measurement
from tests.contracts.tier import spec as tier_spec

_ALWAYS = {
    "memory.copy_1",
    "cpu.adamw",
    "cpu.write",
    "cpu.read",
    "cpu.both",
    "cpu.latency",
    "cpu.tiered_adamw",
    "cpu.matmul",
    "cxl.read",
    "cxl.write",
    "cxl.both",
    "disk.write_fsync",
    "nvme.write",
    "nvme.read",
    "nvme.latency",
}


def _probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "offload", "probe", *arguments], capture_output=True, text=True, timeout=120
    )


def test_every_figure_is_measured_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, disk = tmp_path / "probe.json", tmp_path / "disk"
    disk.mkdir()
    size = ("--size", "1MiB", "--repeats", "2", "--emulate-cxl", "2GiB,1,50")
    assert main(["probe", "--path", str(disk), "--json", str(out), "--keep", str(tmp_path / "kept.json"), *size]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert json.loads((tmp_path / "kept.json").read_text()) == report
    rows = {row["metric"]: row for row in report["measurements"]}
    assert rows.keys() >= _ALWAYS
    for metric, row in rows.items():
        assert len(row["samples"]) == 2
        assert min(row["samples"]) > 0
        assert min(row["samples"]) <= row["value"] <= max(row["samples"])
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{metric} "))
        assert line.endswith(row["how"])
    tiers = {tier["name"]: TierSpec(**tier) for tier in report["tiers"]}
    assert tiers.keys() == {"cpu", "cxl", "nvme"}
    assert math.isclose(tiers["nvme"].read_bytes_per_s, rows["nvme.read"]["value"])
    assert [name for name, tier in tiers.items() if tier.emulated] == ["cxl"]
    assert "tier cxl (emulated): 2.1 GB" in printed
    io = movers.chosen("auto")
    assert f"\ndisk by {io}; io_uring " in printed
    assert f"NvmeTier by {io}, past the page cache" in rows["nvme.read"]["how"]
    assert all("emulated" in row["how"] for metric, row in rows.items() if metric.startswith("cxl."))
    # Slower than it was told to be is possible on a busy machine, faster is not.
    assert tiers["cxl"].read_bytes_per_s <= 1.001e9
    assert tiers["cxl"].latency_s >= 50e-6
    assert not os.listdir(disk)


def test_a_rate_is_an_amount_per_second_and_the_first_repeat_does_not_count() -> None:
    now = [0.0]
    durations = iter([100.0, 2.0, 4.0, 5.0])

    def work() -> None:
        now[0] += next(durations)

    row = Clock(repeats=3, now_s=lambda: now[0]).rate("copy", "B/s", 20.0, work, "how")
    assert row == Measurement("copy", "B/s", [10.0, 5.0, 4.0], "how")
    assert row.value == 5.0
    assert Measurement("copy", "B/s", [], "no disk").value is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_to_the_gpu_are_measured(tmp_path: Path) -> None:
    done = _probe("--path", str(tmp_path), "--size", "1MiB", "--repeats", "1", "--keep", str(tmp_path / "k.json"))
    assert done.returncode == 0, done.stderr
    for metric in ("cuda.host_to_device", "cuda.device_to_host", "cuda.both", "cuda.adamw"):
        assert f"\n{metric} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--path", "/nowhere"], "offload probe: --path: /nowhere is not a folder"),
        (["--size", "1 parsec"], "argument --size: '1 parsec' is not a size of at least 1 MiB"),
        (["--size", "4"], "argument --size: '4' is not a size of at least 1 MiB"),
        (["--emulate-cxl", "4GiB"], "argument --emulate-cxl: '4GiB' is not SIZE,GB/s,us"),
        (["--repeats", "0"], "argument --repeats: '0' is not a number of at least 1"),
        (["--path", "/proc", "--size", "1MiB", "--repeats", "1", "--keep", "/proc/k"], "offload probe: "),
    ],
)
def test_a_mistake_ends_with_2_and_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["offload", "probe", *arguments])
    with pytest.raises(SystemExit) as info:  # as `python -m offload` runs it
        runpy.run_path(str(Path(offload.__file__).with_name("__main__.py")), run_name="__main__")
    assert info.value.code == 2
    assert message in capsys.readouterr().err


def _node(folder: Path, index: int, cpus: str, kib: int) -> None:
    node = folder / f"node{index}"
    node.mkdir()
    (node / "cpulist").write_text(cpus + "\n")
    (node / "meminfo").write_text(f"Node {index} MemTotal:       {kib} kB\nNode {index} MemFree:         1 kB\n")


def test_memory_without_cpus_is_found(tmp_path: Path) -> None:
    _node(tmp_path, 0, "0-15,32-47", 1000)
    _node(tmp_path, 10, "", 2000)
    _node(tmp_path, 2, "", 0)  # a node without memory, as some kernels show for absent devices
    (tmp_path / "possible").write_text("0-10\n")
    nodes = numa_nodes(tmp_path)
    assert nodes == [
        NumaNode(0, "0-15,32-47", 1000 << 10),
        NumaNode(2, "", 0),
        NumaNode(10, "", 2000 << 10),
    ]
    assert memory_only(nodes) == [NumaNode(10, "", 2000 << 10)]


def test_a_machine_without_nodes_has_none(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path / "nowhere") == []


def test_rates_of_a_probe_serve_the_machine_that_it_was_made_on(tmp_path: Path) -> None:
    rows = {metric: 1e9 + number for number, metric in enumerate(calibrate._METRICS.values())}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"gpu": gpu, "cpus": len(os.sched_getaffinity(0))}
    path = tmp_path / "probe.json"

    def keep(machine: dict[str, Any], rows: dict[str, float]) -> None:
        measurements = [{"metric": metric, "value": value} for metric, value in rows.items()]
        path.write_text(json.dumps({"machine": machine, "measurements": measurements}))

    assert calibrate.kept(path) is None
    keep(machine, rows | {"nvme.read": 3e9, "nvme.write": 2e9})
    found = calibrate.kept(path)
    assert found is not None
    assert (found.cpu, found.stream_beside) == (1e9, 1e9 + 6)
    assert (found.tier_read, found.tier_write) == (3e9, 2e9)
    keep(machine | {"cpus": 1000}, rows)
    assert calibrate.kept(path) is None
    keep(machine, {"cpu.tiered_adamw": 1e9})
    assert calibrate.kept(path) is None


def test_calibration_measures_a_tier_and_leaves_it_empty(tmp_path: Path) -> None:
    slow = tier_spec(1 << 24, rate=1e8, emulated=True)
    with NvmeTier(slow, tmp_path, direct=False) as tier:
        rates = calibrate.calibrate(torch.device("cpu"), num_threads=1, numel=1 << 16, budget_s=0.05, tier=tier)
        assert tier.used_bytes == 0
    # Faster than it was told to be is not possible, slower on a busy machine is.
    assert 1e6 < rates.tier_read <= 1.001e8
    assert 1e6 < rates.tier_write <= 1.001e8
