"""Layers that swap, keep or recompute give the same bits; the plan is the best of all there are."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import CpuTier, NvmeTier
from offload.activations import Activations, Automatic
from offload.errors import BudgetError, StreamError
from offload.streaming import LayerStream
from offload.swap_plan import Choice, LayerActivations, Links, evaluate, plan_activations
from tests.contracts.tier import spec
from tests.test_offload.streamed_models import differing, pair, train

CPU = torch.device("cpu")
CHOICES: list[tuple[Choice, ...]] = [
    ("swap",) * 5,
    ("recompute",) * 5,
    ("keep", "swap", "recompute", "swap", "keep"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("where", ["memory", "tier", "disk"])
@pytest.mark.parametrize("choices", CHOICES, ids="-".join)
def test_every_choice_trains_to_the_same_bits(choices: Sequence[Choice], where: str, tmp_path: Path) -> None:
    plain, model = pair()
    expected = train(plain)
    room = spec(1 << 22)
    tier = None if where == "memory" else CpuTier(room) if where == "tier" else NvmeTier(room, tmp_path)
    with Activations(list(model.blocks), choices, device=CPU, tier=tier, min_bytes=0) as activations:
        activations.attach()
        assert train(model) == expected
        assert (activations.swapped_bytes > 0) == ("swap" in choices)
        if tier is not None:
            gc.collect()
            assert tier.used_bytes == 0, "what backward has used is freed"
    if tier is not None:
        tier.close()
    assert not differing(model, plain)
    assert train(model) == train(plain), "closing leaves an ordinary model"


@pytest.mark.parametrize("choices", CHOICES, ids="-".join)
def test_streamed_layers_swap_and_recompute_to_the_same_bits(choices: Sequence[Choice]) -> None:
    plain, model = pair()
    blocks = list(model.blocks)
    with (
        Activations(blocks, choices, device=CPU, min_bytes=0) as activations,
        LayerStream(model, blocks, device=CPU, window=2, saved=activations),
    ):
        assert train(model) == train(plain)
    assert not differing(model, plain)


def test_what_is_swapped_is_not_on_the_device_and_moves_once() -> None:
    _, model = pair()
    blocks = list(model.blocks)
    with Activations(blocks, ["swap"] * 5, device=CPU, min_bytes=0) as activations:
        activations.attach()
        x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
        loss = x
        for block in blocks:
            loss, _ = block(loss, weight=torch.ones((), dtype=torch.float64))
        moved = activations.swapped_bytes
        saved = list(_kept_tensors(loss.grad_fn))
        # Weights, and what is too small or belongs to nobody, stay; nothing of a layer's width does.
        weights = {p.data_ptr() for p in model.parameters()}
        assert not [t.shape for t in saved if t.data_ptr() not in weights and t.numel() >= 8 * 16]
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert activations.swapped_bytes == moved
        del loss, saved
        gc.collect()
        for _ in range(2):  # host memory is used again, and bounded
            before = activations._buffers.num_bytes
            out, _ = blocks[0](x, weight=torch.ones((), dtype=torch.float64))
            out.sum().backward()
        del out
        assert activations._buffers.num_bytes == before


def _kept_tensors(node: object) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a graph holds: what hooks have replaced is not among them."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for each in raw if isinstance(raw, tuple | list) else [raw]:
                    data = getattr(each, "data", None)
                    if isinstance(data, torch.Tensor):
                        yield data
        waiting += [function for function, _ in node.next_functions]  # type: ignore[attr-defined]


def test_host_memory_has_a_limit_that_is_told() -> None:
    _, model = pair()
    blocks = list(model.blocks)
    with Activations(blocks, ["swap"] * 5, device=CPU, min_bytes=0, host_bytes=5000) as activations:
        activations.attach()
        with pytest.raises(StreamError, match=r"activations: no room for \d+ bytes beside \d+ of 5000 in CPU memory"):
            model(torch.zeros(4, 8, dtype=torch.int64))


def test_memory_of_sizes_that_are_not_needed_any_more_goes_back_to_the_system() -> None:
    _, model = pair()
    blocks = list(model.blocks)
    with Activations(blocks, ["swap"] * 5, device=CPU, min_bytes=0) as activations:
        activations.attach()
        most = 0
        for length in (8, 7, 6, 5, 4):
            before = activations.swapped_bytes
            model(torch.zeros(4, length, dtype=torch.int64)).sum().backward()
            most = max(most, activations.swapped_bytes - before)
            gc.collect()
            assert activations._buffers.num_bytes <= most


def test_at_the_limit_storages_wait_for_those_that_are_on_their_way_to_a_tier(tmp_path: Path) -> None:
    plain, model = pair()
    expected = train(plain)
    slow = spec(1 << 24, rate=2e7, emulated=True)
    limit = 60_000  # of 400 000 bytes a step, each of them 1 ms or more on its way
    with (
        NvmeTier(slow, tmp_path, direct=False) as tier,
        Activations(
            list(model.blocks), ["swap"] * 5, device=CPU, tier=tier, min_bytes=0, host_bytes=limit
        ) as activations,
    ):
        activations.attach()
        assert train(model) == expected
        assert activations.swapped_bytes > 3 * limit
        assert activations._buffers.num_bytes <= limit
    assert not differing(model, plain)


def test_automatic_choices_train_to_the_same_bits_within_the_budget() -> None:
    plain, model = pair()
    expected = train(plain)
    with Automatic(model, list(model.blocks), device=CPU, budget_bytes=100_000, min_bytes=0) as automatic:
        assert train(model) == expected
        assert automatic.plan is not None
        assert automatic.plan.kept_bytes <= 100_000
        assert set(automatic.plan.choices) != {"keep"}
    assert not differing(model, plain)


def test_choices_and_layers_are_as_many() -> None:
    _, model = pair()
    with pytest.raises(StreamError, match="activations: 1 choices for 5 layers"):
        Activations(list(model.blocks), ["keep"], device=CPU)


_LAYER = st.builds(
    LayerActivations,
    num_bytes=st.integers(1, 100),
    input_bytes=st.integers(0, 5),
    forward_s=st.integers(1, 10).map(float),
)
_LINKS = st.builds(
    Links,
    down=st.sampled_from([1.0, 10.0, 100.0]),
    up=st.sampled_from([1.0, 10.0, 100.0]),
    host_bytes=st.sampled_from([None, 0, 100]),
    disk_write=st.sampled_from([0.0, 5.0]),
    disk_read=st.sampled_from([5.0]),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), _LAYER, _LINKS, st.integers(0, 500))
def test_equal_layers_get_the_best_of_all_plans(count: int, layer: LayerActivations, links: Links, budget: int) -> None:
    layers = [layer] * count
    choices: list[Choice] = ["keep", "swap", "recompute"]
    every = [
        evaluate(layers, links, combination, backward_s=2.0 * count)
        for combination in itertools.product(choices, repeat=count)
    ]
    fits = [plan.forward_s + plan.backward_s for plan in every if plan.kept_bytes <= budget]
    fits = [cost for cost in fits if cost < float("inf")]
    if not fits:
        with pytest.raises(BudgetError, match=r"activations: \d+ bytes of device memory, and at least \d+ are needed"):
            plan_activations(layers, links, backward_s=2.0 * count, budget_bytes=budget)
        return
    found = plan_activations(layers, links, backward_s=2.0 * count, budget_bytes=budget)
    assert found.kept_bytes <= budget
    assert found.forward_s + found.backward_s == pytest.approx(min(fits))


@settings(max_examples=60, deadline=None)
@given(st.lists(_LAYER, min_size=1, max_size=5), st.integers(0, 300))
def test_unequal_layers_get_a_plan_near_the_best(layers: list[LayerActivations], budget: int) -> None:
    """Greedy by benefit, as the paper's: a knapsack solved so is off by no more than one layer's time."""
    links = Links(down=10.0, up=10.0)
    choices: list[Choice] = ["keep", "swap", "recompute"]
    every = [
        evaluate(layers, links, combination, backward_s=10.0)
        for combination in itertools.product(choices, repeat=len(layers))
    ]
    fits = [plan.forward_s + plan.backward_s for plan in every if plan.kept_bytes <= budget]
    try:
        found = plan_activations(layers, links, backward_s=10.0, budget_bytes=budget)
    except BudgetError:
        return
    slack = max(max(layer.forward_s, 2 * layer.num_bytes / 10.0) for layer in layers)
    assert found.forward_s + found.backward_s <= min(fits) + 2 * slack


def test_a_fast_link_swaps_and_a_slow_one_recomputes() -> None:
    layers = [LayerActivations(num_bytes=100, input_bytes=10, forward_s=1.0)] * 8
    fast = plan_activations(layers, Links(down=1000.0, up=1000.0), backward_s=16.0, budget_bytes=300)
    slow = plan_activations(layers, Links(down=1.0, up=1.0), backward_s=16.0, budget_bytes=300)
    assert fast.choices == ("swap",) * 7 + ("keep",)  # two in flight, one kept, and the last one is needed first
    assert set(slow.choices) <= {"recompute", "keep"}
    assert fast.forward_s + fast.backward_s < slow.forward_s + slow.backward_s
