"""What utilisation is measured against, by the name a GPU gives itself."""

from __future__ import annotations

import pytest
import torch

from trainsys import meter
from trainsys.meter import Utilisation, data_sheet_rate


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


def _utilisation(monkeypatch: pytest.MonkeyPatch, measured: list[float], stated: float = 0.0) -> Utilisation:
    """Against a peak that is measured as these, one after the other."""
    meter._measured.cache_clear()
    monkeypatch.setattr(meter, "_matmul_rate", lambda *where: measured.pop(0))
    try:
        return Utilisation(torch.device("cpu"), torch.float32, stated)
    finally:
        meter._measured.cache_clear()


def test_a_peak_that_a_job_passes_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [5e9, 3e9, 54e9, 60e9]
    utilisation = _utilisation(monkeypatch, measured)
    assert utilisation.of(4e9) == pytest.approx(0.8)
    assert utilisation.of(27e9) == pytest.approx(0.5)  # at the second attempt: another found the machine busy again
    assert utilisation.peak == meter.Peak(54e9, "measured")
    assert measured == [60e9]


def test_a_peak_is_not_measured_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [5e9] * 9
    utilisation = _utilisation(monkeypatch, measured)
    for _ in range(3):
        assert utilisation.of(10e9) == pytest.approx(2.0)
    assert len(measured) == 5


def test_a_stated_peak_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    utilisation = _utilisation(monkeypatch, [], stated=5e9)
    assert utilisation.of(10e9) == pytest.approx(2.0)
    assert utilisation.peak == meter.Peak(5e9, "recipe")
