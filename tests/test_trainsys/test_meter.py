"""What utilisation is measured against, by the name a GPU gives itself."""

from __future__ import annotations

import pytest
import torch

from trainsys.meter import data_sheet_rate


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 836e12, 60e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
    ],
)
def test_a_known_gpu_is_measured_against_its_data_sheet(name: str, bf16: float, fp32: float) -> None:
    assert data_sheet_rate(name, torch.bfloat16) == bf16
    assert data_sheet_rate(name, torch.float16) == bf16
    assert data_sheet_rate(name, torch.float32) == fp32


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA GH200 480GB", "Tesla T4", ""])
def test_a_gpu_whose_name_only_contains_a_known_one_is_not_taken_for_it(name: str) -> None:
    assert data_sheet_rate(name, torch.bfloat16) is None
