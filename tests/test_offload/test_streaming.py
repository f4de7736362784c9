"""A model of which a window alone is on the device computes what it computes whole, to the bit."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload import CpuTier, CxlTier, NvmeTier, Tier
from offload.errors import BudgetError, StreamError
from offload.streaming import LayerStream, fit
from offload.tracing import Trace
from offload.window import LayerCost, Window, choose_window, largest_window, predicted_s
from tests.contracts.tier import spec
from tests.test_offload.streamed_models import Block, Model, differing, pair, train

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def streamed(model: Model, window: Window | int, **settings: object) -> Iterator[LayerStream]:
    with LayerStream(model, list(model.blocks), device=CPU, window=window, **settings) as stream:  # type: ignore[arg-type]
        yield stream


@pytest.mark.parametrize(
    ("window", "recompute"),
    [
        (1, "none"),
        (2, "none"),
        (2, "inside"),
        (2, "outside"),
        (Window(num_layers=5, resident=3, moved=2), "none"),
        (Window(num_layers=5, resident=4, moved=3), "inside"),
        (5, "none"),
    ],
    ids=["1", "2", "2 inside", "2 outside", "3 by 2", "4 by 3 inside", "all"],
)
def test_training_in_a_window_equals_training_whole(window: Window | int, recompute: str) -> None:
    plain, model = pair(recompute=recompute)
    expected = train(plain)
    with streamed(model, window) as stream:
        assert train(model) == expected
        assert not differing(model, plain)
        assert len(stream.resident) <= stream.window.resident
    assert not differing(model, plain)


def test_bf16_frozen_layers_and_set_to_none_false_are_as_exact() -> None:
    plain, model = pair(dtype=torch.bfloat16)
    for each in (plain, model):
        each.blocks[2].requires_grad_(False)
        each.blocks[4].get_submodule("norm").requires_grad_(False)
    with streamed(model, 2):
        assert train(plain) == train(model)
        assert not differing(model, plain)


def test_weights_at_rest_and_their_gradients_are_on_the_host_in_one_piece() -> None:
    _, model = pair()
    with streamed(model, 2) as stream:
        model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        assert not stream.resident
        first = model.blocks[0]
        assert first.get_parameter("widen.weight").untyped_storage().data_ptr() == (
            first.get_parameter("narrow.weight").untyped_storage().data_ptr()
        )
        gradient = first.get_parameter("widen.weight").grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
        assert first.get_parameter("unused").grad is None
        assert stream.host_bytes == 2 * 5 * stream.layer_bytes


def test_weights_that_were_changed_at_rest_are_fetched_again() -> None:
    plain, model = pair()
    tokens = torch.arange(8).view(1, 8)
    with streamed(model, 5), torch.no_grad():
        for _ in range(2):
            assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
            for each in (model, plain):
                each.blocks[3].get_parameter("narrow.weight").mul_(2)
        model.load_state_dict(Model().double().state_dict())
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens), plain(tokens))


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise KeyError


def _fail(x: torch.Tensor) -> Any:
    return _Fails.apply(x)  # type: ignore[no-untyped-call]


def test_a_backward_that_raises_leaves_a_stream_that_works() -> None:
    plain, model = pair()
    tokens = torch.arange(8).view(1, 8)
    with streamed(model, 2):
        model(tokens).sum().backward()
        handle = model.blocks[1].register_forward_hook(lambda *given: (_fail(given[2][0]), given[2][1]))
        out = model(tokens)
        with pytest.raises(KeyError):
            out.sum().backward()
        handle.remove()
        with torch.no_grad():
            model(tokens)  # the first that comes after it
        assert all(parameter.grad is None for block in model.blocks for parameter in block.parameters())
        model.zero_grad()
        assert train(model) == train(plain)


def tier_in(folder: Path, kind: str) -> Tier:
    size = 1 << 20
    if kind == "memory":
        return CpuTier(spec(size))
    if kind == "node":
        return CxlTier(spec(size), node=0)
    return CxlTier(spec(size, emulated=True)) if kind == "emulated" else NvmeTier(spec(size), folder)


@pytest.mark.parametrize("kind", ["memory", "node"])
def test_weights_train_from_any_memory_that_has_addresses(tmp_path: Path, kind: str) -> None:
    plain, model = pair()
    with tier_in(tmp_path, kind) as home, streamed(model, 2, home=home):
        assert home.used_bytes > 0
        assert train(model) == train(plain)
        assert not differing(model, plain)
    assert not differing(model, plain)


@pytest.mark.parametrize("kind", ["memory", "node", "emulated", "disk"])
@pytest.mark.parametrize("window", [1, 3])
def test_a_model_runs_from_any_tier(tmp_path: Path, kind: str, window: int) -> None:
    plain, model = pair()
    tokens = torch.arange(8).view(1, 8)
    model.requires_grad_(False)
    expected = plain.eval()(tokens)
    with tier_in(tmp_path, kind) as home:
        with streamed(model.eval(), window, home=home):
            for _ in range(3):
                assert torch.equal(model(tokens), expected)
        assert home.used_bytes == 0
    assert not differing(model, plain)  # closing brought the weights back


def test_training_from_a_disk_is_refused(tmp_path: Path) -> None:
    _, model = pair()
    with NvmeTier(spec(name="disk"), tmp_path) as home, pytest.raises(StreamError, match="tier disk: it cannot be"):
        LayerStream(model, list(model.blocks), device=CPU, window=2, home=home)


def test_gradients_are_handed_on_once_a_backward_from_the_last_layer_to_the_first() -> None:
    plain, model = pair()
    tokens = torch.arange(8).view(1, 8)
    names = {parameter: name for name, parameter in model.named_parameters()}
    told: list[tuple[int, list[str]]] = []
    fails = False

    def landed(index: int, gradients: Mapping[nn.Parameter, torch.Tensor | None]) -> None:
        if fails:
            raise KeyError(index)
        told.append((index, [names[parameter] for parameter, gradient in gradients.items() if gradient is None]))
        for gradient in gradients.values():
            if gradient is not None:
                gradient.mul_(2)

    with streamed(model, 2, landed=landed):
        for factor in (2, 3):  # g and 2g in the plain model, 2g and 2(2g + g) here
            for each in (plain, model):
                each.eval()(tokens).sum().backward()
            assert told == [(index, [f"blocks.{index}.unused"]) for index in reversed(range(5))]
            told.clear()
            expected, found = (each.get_parameter("blocks.3.narrow.weight").grad for each in (plain, model))
            assert expected is not None
            assert found is not None
            assert torch.equal(found, factor * expected)
        fails = True
        with pytest.raises(KeyError, match="4"):
            model(tokens).sum().backward()
        assert all(parameter.grad is None for block in model.blocks for parameter in block.parameters())
        fails = False
        model.zero_grad()
        plain.zero_grad()
        assert train(model.train()) != train(plain.train()), "gradients are doubled"


def test_a_layer_is_handed_on_while_backward_is_at_others() -> None:
    _, model = pair()
    last_landed = threading.Event()
    for block in model.blocks:
        block.get_parameter("unused").requires_grad_(False)
    with streamed(model, 2, landed=lambda index, _: last_landed.set() if index == 4 else None):
        x = model.embedding(torch.arange(8).view(1, 8))
        waited = []
        x.register_hook(lambda _: waited.append(last_landed.wait(30)))
        for block in model.blocks:
            x, _ = block(x, weight=torch.ones((), dtype=x.dtype))
        x.sum().backward()
        assert waited == [True]


def test_a_trace_tells_every_byte_that_moved() -> None:
    _, model = pair()
    trace = Trace()
    with streamed(model, 2, trace=trace) as stream:
        model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        record = trace.step()
        # Down to the layers: those of the last window stay at the turn. Up: every gradient, without the padding.
        assert record.moved_bytes["cpu to gpu"] == (5 + 3) * stream.layer_bytes
        gradients = sum(p.nbytes for block in model.blocks for p in block.parameters() if p.grad is not None)
        assert record.moved_bytes["gpu to cpu"] == gradients


def test_a_model_keeps_to_its_budget_or_says_what_is_missing() -> None:
    plain, model = pair()
    with fit(model, list(model.blocks), device=CPU, budget_bytes=32_000) as stream:
        assert 1 <= stream.window.resident < 5
        assert stream.device_bytes <= 32_000 < stream.device_bytes + stream.layer_bytes
        assert train(model) == train(plain)
    _, other = pair()
    with pytest.raises(BudgetError, match=r"window: 4000 bytes of device memory hold no layer: \d+ are taken") as info:
        fit(other, list(other.blocks), device=CPU, budget_bytes=4000)
    missing = int(str(info.value).split("give it ")[1].split()[0])
    with fit(other, list(other.blocks), device=CPU, budget_bytes=4000 + missing) as stream:
        assert stream.window.resident == 1
    with pytest.raises(BudgetError):
        fit(other, list(other.blocks), device=CPU, budget_bytes=4000 + missing - 1)


def test_layers_that_cannot_be_streamed_are_refused() -> None:
    _, model = pair()
    blocks = list(model.blocks)
    with pytest.raises(StreamError, match=r"layer 1: unused is also a parameter of layer 0"):
        LayerStream(model, [blocks[0], blocks[0]], device=CPU, window=1)
    with pytest.raises(StreamError, match="layer 0: it has no parameters to stream"):
        LayerStream(model, [nn.GELU()], device=CPU, window=1)
    with pytest.raises(StreamError, match=r"layer 0: unused has no values yet"):
        LayerStream(model, [Block(4, recompute=False).to("meta")], device=CPU, window=1)
    with pytest.raises(BudgetError, match="window: num_layers: 3, but there are 5 layers"):
        LayerStream(model, blocks, device=CPU, window=Window(num_layers=3, resident=1))
    compiled = Block(4, recompute=False)
    compiled._compiled_call_impl = compiled.forward  # as Module.compile leaves it
    with pytest.raises(StreamError, match="layer 0: it is compiled"):
        LayerStream(model, [compiled], device=CPU, window=1)


def test_a_closed_stream_leaves_an_ordinary_model() -> None:
    plain, model = pair()
    with streamed(model, 2) as stream:
        pass
    stream.close()
    gc.collect()
    assert train(model) == train(plain)


def test_the_window_is_the_smallest_that_hides_its_transfers() -> None:
    def chosen(transfer_s: float, budget_bytes: int = 90) -> Window:
        cost = LayerCost(num_bytes=10, compute_s=1.0, transfer_s=transfer_s)
        return choose_window(cost, num_layers=8, other_bytes=5, budget_bytes=budget_bytes, training=True)

    assert chosen(0.5).resident == 2
    assert chosen(2.5).resident == 4
    assert chosen(100.0, 80).resident == 6  # nothing hides it: all that fits, beside a layer of gradients
    assert chosen(0.5, 1000).resident == 8  # it all fits
    with pytest.raises(BudgetError, match="give it 3 bytes more"):
        chosen(0.5, 22)
    assert largest_window(num_layers=4, layer_bytes=10, other_bytes=0, budget_bytes=35, training=False).resident == 3
    for resident, moved in ((0, 1), (9, 1), (3, 3), (3, 0)):
        with pytest.raises(BudgetError, match="window: "):
            Window(num_layers=8, resident=resident, moved=moved)


@pytest.mark.parametrize(
    ("resident", "transfer_s", "inference_s", "training_s"),
    [
        (1, 0.5, 6.0, 6.0 + 9.5),  # in turns: four layers come in forward, three in backward
        (2, 0.5, 4.0, 0.5 + 4.0 + 8.0),  # hidden, but for the first
        (2, 3.0, 12.0, 12.0 + 8.0),  # the link decides forward, and backward is as long as compute
        (4, 0.5, 4.0, 0.5 + 4.0 + 8.0),  # all stay, until an update makes them old
    ],
)
def test_a_pass_is_predicted_from_compute_and_transfers(
    resident: int, transfer_s: float, inference_s: float, training_s: float
) -> None:
    window = Window(num_layers=4, resident=resident)
    cost = LayerCost(num_bytes=1, compute_s=1.0, transfer_s=transfer_s)
    assert predicted_s(window, cost, training=False) == inference_s
    assert predicted_s(window, cost, training=True) == training_s
