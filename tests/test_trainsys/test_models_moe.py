"""The decoder's mixtures of experts: what a configuration may say, and what training keeps of a router."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.expert import after_step
from trainsys.check import check
from trainsys.config import ModelConfig, MoEConfig, RunConfig
from trainsys.data import load_tokenizer
from trainsys.errors import ConfigError
from trainsys.models import build, load_pretrained, save_pretrained
from trainsys.models.decoder import Decoder
from trainsys.models.moe import MoE, routing_of

DEEPSEEK = MoEConfig(
    num_experts=8,
    top_k=2,
    num_shared_experts=1,
    ffn_dim=8,
    score="sigmoid",
    routed_scaling=2.5,
    num_groups=4,
    top_groups=2,
    balance="bias",
    bias_rate=0.01,
)
SMALL = ModelConfig(num_layers=2, dim=16, num_heads=4, moe=DEEPSEEK)
TOKENS = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))


def _make(config: ModelConfig, *, checkpointing: bool = False) -> Decoder:
    model = build(config, vocab_size=32, max_positions=12, recompute="full" if checkpointing else "none", seed=3)
    assert isinstance(model, Decoder)
    return model


def _routers(model: nn.Module) -> list[Any]:
    return [module.router for module in model.modules() if isinstance(module, MoE)]


def _biases(model: nn.Module) -> list[Tensor]:
    return [router.bias.clone() for router in _routers(model)]


def test_every_setting_reaches_the_routing() -> None:
    routing = routing_of(replace(DEEPSEEK, capacity_factor=1.5, balance_weight=0.2, z_weight=0.3))
    assert (routing.score, routing.scaling, routing.num_groups, routing.top_groups) == ("sigmoid", 2.5, 4, 2)
    assert (routing.capacity_factor, routing.balance, routing.bias_rate) == (1.5, "bias", 0.01)
    assert (routing.num_experts, routing.top_k, routing.balance_weight, routing.z_weight) == (8, 2, 0.2, 0.3)


def test_biases_move_after_a_step_alike_with_recomputation_and_not_in_evaluation() -> None:
    moved = []
    for checkpointing in (False, True):
        model = _make(SMALL, checkpointing=checkpointing)
        logits, auxiliary = model(TOKENS)
        assert float(auxiliary.detach()) == 0
        logits.sum().backward()
        after_step(model)
        moved.append(_biases(model))
    for plain, recomputed in zip(*moved, strict=True):
        assert torch.equal(plain, recomputed)
        assert {round(float(b), 6) for b in plain} <= {-0.01, 0.0, 0.01}
        assert plain.count_nonzero() > 0
    before = _biases(model)
    with torch.no_grad():
        model(TOKENS)
    model.eval()(TOKENS)
    after_step(model)
    assert all(torch.equal(a, b) for a, b in zip(before, _biases(model), strict=True))


def test_biases_keep_their_dtype_and_values_whatever_the_model_becomes() -> None:
    model = _make(SMALL)
    for router in _routers(model):
        router.bias.fill_(0.001)
    model.to(torch.bfloat16)
    assert all(torch.equal(bias, torch.full((8,), 0.001)) for bias in _biases(model))
    with torch.device("meta"):
        empty = Decoder(model.config, max_positions=12, recompute="none")
    empty.to_empty(device="cpu")
    assert all(torch.equal(bias, torch.zeros(8)) for bias in _biases(empty))
    assert all(not router.load.any() for router in _routers(empty))


def test_biases_are_saved_with_the_weights(tmp_path: Path) -> None:
    model = build(SMALL, vocab_size=257, max_positions=12, recompute="none", seed=3).eval()
    for router in _routers(model):
        router.bias.copy_(torch.linspace(0, 1, 8))
    state = model.state_dict()
    assert [name for name in state if name.endswith("router.bias")]
    assert not [name for name in state if name.endswith("router.load")]
    save_pretrained(SMALL, state, tmp_path, load_tokenizer("bytes"), max_positions=12)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    assert all(torch.equal(bias, torch.linspace(0, 1, 8)) for bias in _biases(loaded))
    without = {name: tensor for name, tensor in state.items() if not name.endswith("router.bias")}
    with pytest.raises(ConfigError, match=r"router\.bias: missing"):
        save_pretrained(SMALL, without, tmp_path, load_tokenizer("bytes"), max_positions=12)


def test_experts_over_capacity_drop_tokens_and_losses_add_up() -> None:
    plain = replace(DEEPSEEK, balance="none", num_shared_experts=0)
    outputs, losses = {}, {}
    for name, moe in {
        "dropless": plain,
        "roomy": replace(plain, capacity_factor=8.0),
        "tight": replace(plain, capacity_factor=0.25),
        "losses": replace(plain, balance="loss", balance_weight=0.5, z_weight=0.25),
    }.items():
        logits, auxiliary = _make(replace(SMALL, moe=moe))(TOKENS)
        outputs[name], losses[name] = logits.detach(), float(auxiliary.detach())
    assert torch.equal(outputs["dropless"], outputs["roomy"])
    assert not torch.allclose(outputs["dropless"], outputs["tight"])
    assert torch.equal(outputs["dropless"], outputs["losses"])
    assert losses["dropless"] == losses["tight"] == 0
    assert losses["losses"] > 0


@pytest.mark.parametrize(
    ("moe", "problem"),
    [
        ({"num_groups": 3}, "model.moe.num_groups: 3 does not divide num_experts (8)"),
        ({"top_groups": 5}, "model.moe.top_groups: 5 is out of range; allowed: 1 to num_groups (4)"),
        ({"top_k": 5}, "model.moe.top_groups: 2 of the groups have 4 experts, fewer than top_k (5)"),
        ({"num_groups": 0}, "model.moe.num_groups: 0 is out of range; allowed: 1 or more"),
        ({"capacity_factor": -1.0}, "model.moe.capacity_factor: -1.0 is out of range; allowed: 0 or more"),
        ({"routed_scaling": 0.0}, "model.moe.routed_scaling: 0.0 is out of range; allowed: above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(moe: dict[str, Any], problem: str) -> None:
    config = RunConfig(name="a", steps=100, model=replace(SMALL, moe=replace(DEEPSEEK, **moe)))
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()] == [problem]
