"""A plan counts the bytes of every tier, predicts the step, and says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import PlacementError
from tests.test_trainsys.test_engine import configure
from trainsys import planning
from trainsys.config import RunConfig
from trainsys.errors import ConfigError
from trainsys.precision import ability_of

H200 = {
    "cpu.adamw": 5e9,
    "cpu.tiered_adamw": 5e9,
    "memory.copy_16": 52e9,
    "cuda.host_to_device": 55e9,
    "cuda.device_to_host": 55e9,
    "cuda.both": 101e9,
    "cuda.adamw": 1.2e11,
    "cuda.matmul": 790e12,
}
"""An H200 with 16 cores, as its probe found it."""

MODEL = (
    "--parallel.replicate=1",
    "--engine.zero_stage=2",
    "--engine.precision=bf16",
    "--engine.recompute=full",
    "--model.num_layers=24",
    "--model.dim=2560",
    "--model.num_heads=20",
    "--model.num_kv_heads=0",
    "--model.ffn_dim=6912",
    "--model.vocab_size=32768",
    "--data.sequence_length=2048",
    "--batch.global_sequences=4",
    "--batch.micro_sequences=4",
)


def probe_file(folder: Path, *, cpu_gb: float = 118.0, cards: int = 0) -> Path:
    def tier(name: str, size_gb: float, rate: float, **more: Any) -> dict[str, Any]:
        rates = {"read_bytes_per_s": rate, "write_bytes_per_s": rate, "latency_s": 1e-5}
        return {"name": name, "capacity_bytes": int(size_gb * 1e9), **rates, "emulated": False, **more}

    tiers = [tier("cpu", cpu_gb, 50e9), tier("nvme", 60.0, 1.8e9)]
    tiers += [tier(f"cxl{index}", 64.0, 20e9, emulated=True) for index in range(cards)]
    report = {
        "machine": {"memory_bytes": 128 << 30, "gpu_bytes": 140_000_000_000},
        "measurements": [{"metric": metric, "value": value} for metric, value in H200.items()],
        "tiers": tiers,
    }
    path = folder / "probe.json"
    path.write_text(json.dumps(report))
    return path


def large(*overrides: str) -> RunConfig:
    keys = {override.partition("=")[0] for override in overrides}
    return configure(*(setting for setting in MODEL if setting.partition("=")[0] not in keys), *overrides)


def described(folder: Path, *overrides: str, cards: int = 0, cpu_gb: float = 118.0) -> list[str]:
    machine = planning.read_probe(probe_file(folder, cards=cards, cpu_gb=cpu_gb))
    return planning.describe(large(*overrides), machine, utilisation=0.5, sources={}).splitlines()


DISK = "--offload.nvme_dir=/tmp"


def seconds(lines: list[str], start: str) -> float:
    (line,) = (line for line in lines if line.startswith(start))
    return float(line.rpartition(": ")[2].split()[0])


def gigabytes(lines: list[str], tier: str) -> float:
    (line,) = (line for line in lines if line.startswith(f"{tier}: ") and " GB" in line)
    return float(line.split(": ")[1].split()[0])


def test_a_plan_tells_bytes_time_and_efficiency_of_every_way_to_offload(tmp_path: Path) -> None:
    resident = described(tmp_path)
    count = float(resident[0].split("B parameters")[0].split()[-1]) * 1e9
    assert 1.9e9 < count < 2.2e9
    assert gigabytes(resident, "cpu") == 0
    # Weights and gradients in bf16, fp32 masters and moments: 16 bytes a parameter, and the activations.
    assert gigabytes(resident, "gpu") > 16 * count / 1e9
    deepspeed = described(tmp_path, "--offload.optimizer=deepspeed_cpu")
    assert gigabytes(deepspeed, "cpu") == pytest.approx(16 * count / 1e9, rel=1e-3)  # with its fp32 gradients
    tiered = described(tmp_path, "--offload.optimizer=tiered")
    # Two GiB of states are on the device or pass through it; gradients that the CPU reads and new weights are pinned.
    assert 12 * count - (2 << 30) < 1e9 * gigabytes(tiered, "cpu") < 14 * count
    text = "\n".join(tiered)
    for name in ("on the device", "passing through the device", "in host memory"):
        assert f"optimizer states {name}" in text
    assert "gradients on the host" in text
    assert "new weights on their way up" in text
    assert "out of core" not in text
    spilled = "\n".join(described(tmp_path, "--offload.optimizer=tiered", "--offload.host_bytes=4000000000", DISK))
    assert "optimizer states out of core" in spilled
    assert "on their way to and from the disk" in spilled
    assert any("efficiency with optimizer states over the link" in line for line in tiered)
    steps = {}
    for name, lines in (("none", resident), ("deepspeed", deepspeed), ("tiered", tiered)):
        (line,) = (line for line in lines if line.startswith("step: "))
        steps[name] = float(line.split()[1])
    assert steps["none"] < steps["tiered"] < steps["deepspeed"]
    assert seconds(deepspeed, "update: ") == pytest.approx(count / 5e9 + 4 * count / 55e9, rel=1e-3)


def test_a_plan_takes_auto_as_the_gpu_of_its_probe_would(tmp_path: Path) -> None:
    auto = described(tmp_path, "--engine.precision=auto", "--engine.device=auto")
    assert auto == described(tmp_path, "--engine.device=auto")
    assert "parameters a rank in bf16; " in auto[0]
    on_cpu = described(tmp_path, "--engine.precision=auto", "--engine.device=cpu")[0]
    taken = "bf16" if ability_of(torch.device("cpu")).multiplies_bf16 else "fp32"
    assert f"parameters a rank in {taken}; " in on_cpu


def test_streamed_weights_take_as_long_as_the_link_and_swapped_activations_go_to_cards(tmp_path: Path) -> None:
    lines = described(
        tmp_path,
        "--engine.zero_stage=0",
        "--engine.recompute=none",
        "--offload.parameters=streamed",
        "--offload.activations=swap",
        cards=2,
    )
    text = "\n".join(lines)
    assert "swapped activations" in text
    assert "cxl0 (emulated)" in text, "what is emulated says so"
    assert "striped over 2" in text
    count = float(lines[0].split("B parameters")[0].split()[-1]) * 1e9
    assert seconds(lines, "forward: ") >= 2 * count / 55e9


def test_what_does_not_fit_says_how_many_bytes_are_missing(tmp_path: Path) -> None:
    with pytest.raises(PlacementError) as info:
        described(tmp_path, "--model.num_layers=400", "--offload.optimizer=tiered")
    assert info.value.missing_bytes > 100e9
    assert "optimizer states in host memory: " in str(info.value)
    assert "more of cpu or cxl or nvme" in str(info.value)


def test_a_probe_that_is_not_there_or_no_probe_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--probe: .*nowhere is not there; measure this machine: python -m offload"):
        planning.read_probe(tmp_path / "nowhere")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"other\.json is not a probe's file \('measurements'\)"):
        planning.read_probe(tmp_path / "other.json")
    machine = planning.read_probe(probe_file(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 0 takes the tokenizer's"):
        planning.describe(
            large("--model.vocab_size=0", "--data.tokenizer=x.json"), machine, utilisation=0.5, sources={}
        )
