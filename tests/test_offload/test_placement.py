"""What the CPU walks goes to DRAM, what is copied to CXL, the rest to a disk; a refusal says what is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import PlacementError, TierSpec
from offload.placement import Kind, TensorUse, TierOffer, Walker, efficiency, place


def offer(kind: Kind, capacity_bytes: int, *, name: str = "", rate: float = 1e9, emulated: bool = False) -> TierOffer:
    spec = TierSpec(
        name=name or kind,
        capacity_bytes=capacity_bytes,
        read_bytes_per_s=rate,
        write_bytes_per_s=rate,
        latency_s=0.0,
        emulated=emulated,
    )
    return TierOffer(kind=kind, spec=spec)


def use(name: str, num_bytes: int, walker: Walker, **more: float) -> TensorUse:
    return TensorUse(name=name, num_bytes=num_bytes, walker=walker, **more)  # type: ignore[arg-type]


STATES = [use(name, 100, "cpu") for name in ("master", "exp_avg", "exp_avg_sq")]


def where(tensors: list[TensorUse], offers: list[TierOffer]) -> dict[str, dict[str, int]]:
    found = place(tensors, offers)
    return {a.tensor.name: {part.tier: part.num_bytes for part in a.parts} for a in found.assignments}


def test_walked_tensors_take_dram_and_copied_ones_are_striped_over_cards() -> None:
    tensors = [use("activations", 90, "dma"), *STATES, use("weights", 50, "gpu")]
    cards = [
        offer("cxl", 1000, name="cxl0", rate=1e9, emulated=True),
        offer("cxl", 1000, name="cxl1", rate=2e9, emulated=True),
    ]
    found = where(tensors, [offer("gpu", 60), offer("cpu", 300), *cards])
    assert found == {
        "activations": {"cxl0 (emulated)": 30, "cxl1 (emulated)": 60},
        "master": {"cpu": 100},
        "exp_avg": {"cpu": 100},
        "exp_avg_sq": {"cpu": 100},
        "weights": {"gpu": 50},
    }
    text = place(tensors, [offer("gpu", 60), offer("cpu", 300), *cards]).table()
    assert "activations  cxl0 (emulated)" in text
    assert "only copied; leaves DRAM to what the CPU walks; striped over 2" in text


def test_without_cards_copied_tensors_get_what_dram_has_left_and_then_a_disk() -> None:
    tensors = [use("activations", 300, "dma"), *STATES]
    found = where(tensors, [offer("cpu", 350), offer("nvme", 1000)])
    assert found["activations"] == {"cpu": 50, "nvme": 250}
    assert found["exp_avg_sq"] == {"cpu": 100}


def test_walked_tensors_that_dram_does_not_hold_spill_to_cards_then_to_a_disk() -> None:
    found = where(STATES, [offer("nvme", 1000), offer("cxl", 60), offer("cpu", 220)])
    assert found == {
        "master": {"cpu": 100},
        "exp_avg": {"cpu": 100},
        "exp_avg_sq": {"cpu": 20, "cxl": 60, "nvme": 20},
    }


def test_what_is_touched_most_often_comes_first() -> None:
    tensors = [use("seldom", 100, "cpu", reads_per_step=0.1, writes_per_step=0.0), use("often", 100, "cpu")]
    found = where(tensors, [offer("cpu", 100), offer("nvme", 100)])
    assert found == {"seldom": {"nvme": 100}, "often": {"cpu": 100}}


def test_an_indivisible_tensor_is_not_cut() -> None:
    whole = TensorUse(name="whole", num_bytes=100, walker="dma", divisible=False)
    assert where([whole], [offer("cpu", 90), offer("nvme", 100)]) == {"whole": {"nvme": 100}}


def test_what_does_not_fit_is_refused_with_the_bytes_that_are_missing() -> None:
    with pytest.raises(PlacementError) as info:
        place([use("weights", 80, "gpu"), *STATES], [offer("gpu", 50), offer("cpu", 150), offer("nvme", 100)])
    assert info.value.missing_bytes == 80
    assert str(info.value).splitlines() == [
        "weights: 30 bytes of 80 have no room (gpu has 0 of 50 left); give 30 bytes more of gpu",
        "exp_avg_sq: 50 bytes of 100 have no room (cpu has 0 of 150 left; nvme has 0 of 100 left); "
        "give 50 bytes more of cpu or cxl or nvme",
        "80 bytes are missing in all; add them as above, or use fewer parameters, smaller micro-batches, or more ranks "
        "that share the state",
    ]


def test_a_tier_s_time_is_that_of_its_slower_direction() -> None:
    tensor = use("master", 100, "cpu", reads_per_step=2.0, writes_per_step=1.0)
    found = place([tensor], [offer("cpu", 60, rate=10.0), offer("nvme", 40, rate=1.0)])
    assert found.step_s == {"cpu": 12.0, "nvme": 80.0}
    assert found.used_bytes == {"cpu": 60, "nvme": 40}


_KINDS: list[Kind] = ["gpu", "cpu", "cxl", "nvme"]
_WALKERS: list[Walker] = ["gpu", "cpu", "dma"]


@given(
    st.lists(st.tuples(st.sampled_from(_KINDS), st.integers(0, 100), st.integers(1, 9)), max_size=6),
    st.lists(st.tuples(st.sampled_from(_WALKERS), st.integers(1, 80), st.booleans()), max_size=8),
)
def test_nothing_is_lost_and_no_tier_holds_more_than_it_can(
    tiers: list[tuple[Kind, int, int]], wanted: list[tuple[Walker, int, bool]]
) -> None:
    offers = [offer(kind, size, name=f"{kind}{i}", rate=float(rate)) for i, (kind, size, rate) in enumerate(tiers)]
    tensors = [
        TensorUse(name=f"t{i}", num_bytes=size, walker=walker, divisible=divisible)
        for i, (walker, size, divisible) in enumerate(wanted)
    ]
    found, missing = None, 0
    try:
        found = place(tensors, offers)
    except PlacementError as error:
        missing = error.missing_bytes
    assert (found is None) == (missing > 0)
    if found is None:
        return
    for assignment in found.assignments:
        assert sum(part.num_bytes for part in assignment.parts) == assignment.tensor.num_bytes
    used = found.used_bytes
    assert all(used[each.spec.label] <= each.spec.capacity_bytes for each in offers)


def test_the_efficiency_is_that_of_the_paper_s_examples() -> None:
    """ZeRO-Infinity at a peak of 70 TFLOP/s: 70 GB/s for 1,024 tokens of parameters and gradients gives half of it."""
    tokens = 1024
    # ait of parameters and gradients is the number of tokens: 8 operations a parameter and token, 8 bytes a parameter.
    half = efficiency(flops=8.0 * tokens, moved_bytes=8.0, bytes_per_s=70e9, peak_flops_per_s=70e12)
    assert half == pytest.approx(0.506, abs=1e-3)
    # ait of optimizer states is a quarter of it: 1.5 TB/s for two rows.
    most = efficiency(flops=8.0 * 2 * tokens, moved_bytes=32.0, bytes_per_s=1.5e12, peak_flops_per_s=70e12)
    assert most == pytest.approx(0.916, abs=1e-3)
    assert efficiency(flops=1.0, moved_bytes=0.0, bytes_per_s=1.0, peak_flops_per_s=1.0) == 1.0
