"""How a recorded step's time is shared out."""

from __future__ import annotations

from typing import Any

import pytest

from trainsys.bench.utilisation import kind_of, losses, shares


def _event(name: str, start: float, duration: float, cat: str = "kernel", tid: int = 0) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "cat": cat, "tid": tid}


_STEP = _event("ProfilerStep#3", 0, 100, "user_annotation")


def test_every_instant_belongs_to_one_kind_and_hidden_communication_to_none() -> None:
    share = shares(
        [
            _STEP,
            _event("nvjet_hsh_128x256", 0, 40),
            _event("ncclDevKernel_AllReduce", 20, 40),
            _event("vectorized_elementwise_kernel", 60, 10),
            _event("Memcpy DtoD", 65, 10, "gpu_memcpy"),
            _event("nvjet_late", 95, 50),
        ]
    )
    expected = {"products": 0.45, "communication": 0.2, "copies": 0.1, "other": 0.05, "idle": 0.2}
    assert share == pytest.approx({"attention": 0, "optimizer": 0, **expected})


def test_on_a_cpu_the_innermost_operator_counts() -> None:
    share = shares(
        [
            _STEP,
            _event("aten::linear", 0, 50, "cpu_op"),
            _event("aten::mm", 10, 30, "cpu_op"),
            _event("aten::copy_", 15, 5, "cpu_op"),
            _event("aten::mul", 60, 10, "cpu_op", tid=1),
            _event("aten::_to_copy", 62, 3, "cpu_op", tid=1),
        ]
    )
    assert share["products"] == pytest.approx(0.45)  # aten::linear is a product too, but for the copy inside
    assert share["copies"] == pytest.approx(0.05)
    assert share["other"] == pytest.approx(0.1)
    assert share["idle"] == pytest.approx(0.4)


def test_arithmetic_and_losses_add_up_to_the_step() -> None:
    share = {"products": 0.6, "attention": 0.1, "optimizer": 0.05, "copies": 0, "other": 0.1, "communication": 0.05}
    found = losses({**share, "idle": 0.1}, 0.5)
    assert found["products and attention below peak"] == pytest.approx(0.2)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication"),
        ("triton_red_fused__to_copy_add_mul_rms_norm", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind
