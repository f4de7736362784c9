"""Parameter groups: who is decayed, who is orthogonalised, under which name; and AdamW as torch has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainsys.config import ModelConfig, MoEConfig, OptimConfig
from trainsys.models import build, hidden_matrices
from trainsys.optim import build_optimizer, parameter_groups

SMALL = ModelConfig(num_layers=2, dim=16, num_heads=4, num_kv_heads=2, ffn_dim=24, vocab_size=32)
EXPERTS = replace(SMALL, tied_head=False, moe=MoEConfig(num_experts=4, ffn_dim=8, first_dense_layers=1))
ADAMW = OptimConfig(lr=1e-3, weight_decay=0.5)
MUON = OptimConfig(kind="muon", lr=1e-3, muon_lr=1e-2)


def make(config: ModelConfig = SMALL) -> nn.Module:
    return build(config, vocab_size=32, max_positions=16, recompute="none", seed=0)


def names(model: nn.Module, config: OptimConfig) -> dict[str, list[str]]:
    """Names of the parameters by group, looked up from the tensors themselves."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: [known[p] for p in group["params"]] for group in parameter_groups(model, config)}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        logits, aux_loss = model(tokens)
        (nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + aux_loss).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("config", [ADAMW, replace(ADAMW, decay_embeddings=True), MUON])
@pytest.mark.parametrize("model_config", [SMALL, EXPERTS])
def test_every_trainable_parameter_is_in_one_group(model_config: ModelConfig, config: OptimConfig) -> None:
    model = make(model_config)
    model.get_parameter("norm.weight").requires_grad_(False)
    grouped = [name for members in names(model, config).values() for name in members]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_matrices_are_decayed_and_norms_and_embeddings_are_not() -> None:
    grouped = names(make(), ADAMW)
    assert all("norm" in name or name == "embedding.weight" for name in grouped["no_decay"])
    assert not any("norm" in name or "embedding" in name for name in grouped["decay"])
    assert "embedding.weight" in names(make(), replace(ADAMW, decay_embeddings=True))["decay"]
    assert "head.weight" in names(make(EXPERTS), ADAMW)["decay"]


def test_a_step_without_gradient_decays_the_matrices_by_lr_times_decay_and_nothing_else() -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, ADAMW).step()
    decayed = names(model, ADAMW)["decay"]
    for name, parameter in model.named_parameters():
        wanted = before[name] * (1 - 1e-3 * 0.5) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-7, atol=0)


def test_muon_takes_the_matrices_between_embedding_and_head_and_no_router() -> None:
    model = make(EXPERTS)
    grouped = names(model, MUON)
    assert sorted(grouped["muon"]) == sorted(hidden_matrices(model))
    assert "blocks.1.feed_forward.experts.gate_up" in grouped["muon"]
    assert grouped["decay"] == ["blocks.1.feed_forward.router.weight", "head.weight"]
    assert "embedding.weight" in grouped["no_decay"]


def test_fused_projections_are_told_apart_by_the_heights_of_their_matrices() -> None:
    splits = hidden_matrices(make(EXPERTS))
    assert splits["blocks.0.attention.qkv.weight"] == (16, 8, 8)
    assert splits["blocks.0.feed_forward.gate_up.weight"] == (24, 24)
    assert splits["blocks.1.feed_forward.experts.gate_up"] == (8, 8)
    assert splits["blocks.1.feed_forward.experts.down"] == (16,)


def test_groups_carry_what_schedules_and_checkpoints_go_by() -> None:
    optimizer = build_optimizer(make(EXPERTS), MUON)
    seen = [(g["name"], g["kind"], g["initial_lr"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert seen == [
        ("muon", "muon", 1e-2, 1e-2, 0.1),
        ("decay", "adamw", 1e-3, 1e-3, 0.1),
        ("no_decay", "adamw", 1e-3, 1e-3, 0.0),
    ]


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_training_twice_gives_the_same_bits(config: OptimConfig) -> None:
    runs = []
    for _ in range(2):
        model = make(EXPERTS)
        runs.append(train(model, build_optimizer(model, config), 5))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_adamw_follows_its_formula() -> None:
    config = OptimConfig(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    model = make().double()
    optimizer = build_optimizer(model, config)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    wanted = [p.detach().clone() for p in model.parameters()]
    first = [torch.zeros_like(p) for p in wanted]
    second = [torch.zeros_like(p) for p in wanted]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        for i, parameter in enumerate(model.parameters()):
            grad = parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            first[i] = 0.8 * first[i] + 0.2 * grad
            second[i] = 0.9 * second[i] + 0.1 * grad**2
            wanted[i] *= 1 - 1e-2 * (0.3 if id(parameter) in decayed else 0)
            wanted[i] -= 1e-2 * (first[i] / (1 - 0.8**step)) / ((second[i] / (1 - 0.9**step)).sqrt() + 1e-6)
        optimizer.step()
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_a_loaded_state_continues_with_the_same_bits(config: OptimConfig) -> None:
    straight, resumed = make(EXPERTS), make(EXPERTS)
    wanted = train(straight, build_optimizer(straight, config), 4)
    first = build_optimizer(resumed, config)
    train(resumed, first, 2)
    second = build_optimizer(resumed, config)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(train(resumed, second, 2), wanted, strict=True))


def test_a_hugging_face_model_is_grouped_the_same_way(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.MixtralConfig(**sizes, **heads, num_local_experts=4).save_pretrained(tmp_path)
    model = make(ModelConfig(kind="hf", path=str(tmp_path)))
    grouped = names(model, MUON)
    assert grouped["decay"] == ["causal_lm.model.layers.0.mlp.gate.weight", "causal_lm.lm_head.weight"]
    assert "causal_lm.model.embed_tokens.weight" in grouped["no_decay"]
    assert "causal_lm.model.layers.0.mlp.experts.gate_up_proj" in grouped["muon"]
    assert "causal_lm.model.layers.0.self_attn.q_proj.weight" in grouped["muon"]
