"""Models with targets, and what their blocks compute again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from trainsys.config import ModelConfig, MoEConfig
from trainsys.models import build, materialise

SMALL = ModelConfig(num_layers=2, dim=16, num_heads=4, num_kv_heads=2, ffn_dim=24, vocab_size=32)
EXPERTS = MoEConfig(num_experts=4, top_k=2, ffn_dim=8)
TOKENS = torch.randint(0, 32, (2, 10), generator=torch.Generator().manual_seed(1))
TARGETS = torch.where(torch.arange(20).view(2, 10) % 7 == 3, -100, TOKENS.roll(-1, 1))


def make(config: ModelConfig = SMALL, recompute: Any = "none") -> nn.Module:
    return build(config, vocab_size=32, max_positions=64, recompute=recompute, seed=0)


def by_hand(model: nn.Module) -> tuple[Tensor, Tensor]:
    logits, aux_loss = model(TOKENS)
    return functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum"), aux_loss


def gradients(model: nn.Module, losses: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(losses[0] / 20 + losses[1], list(model.parameters())))


def transformer(folder: Path, kind: str, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    getattr(transformers, kind)(**{**sizes, **heads, **changes}).save_pretrained(folder)
    return make(ModelConfig(kind="hf", path=str(folder)))


def check(model: nn.Module) -> None:
    with_targets = model(TOKENS, targets_BT=TARGETS)
    torch.testing.assert_close(with_targets, by_hand(model), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(model, with_targets), gradients(model, by_hand(model)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, tied_head=False), replace(SMALL, moe=EXPERTS)])
def test_with_targets_a_decoder_gives_the_loss_of_its_logits(config: ModelConfig) -> None:
    check(make(config).double())


def test_with_targets_a_model_of_transformers_gives_the_loss_of_its_logits(tmp_path: Path) -> None:
    check(transformer(tmp_path / "plain", "Qwen2Config").double())
    scaled = transformer(tmp_path / "scaled", "CohereConfig", logit_scale=0.5)  # its logits are not the head's product
    check(scaled.double())


def test_experts_of_transformers_keep_their_auxiliary_loss_with_targets(tmp_path: Path) -> None:
    model = transformer(tmp_path, "MixtralConfig", num_local_experts=4, router_aux_loss_coef=0.5)
    loss, aux_loss = model(TOKENS, targets_BT=TARGETS)
    torch.testing.assert_close((loss, aux_loss), by_hand(model))
    assert float(aux_loss.detach()) > 0


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, dropout=0.3), replace(SMALL, moe=EXPERTS)])
def test_what_is_computed_again_changes_no_bit(config: ModelConfig) -> None:
    found = []
    for recompute in ("none", "selective", "full"):
        model = make(config, recompute)
        torch.manual_seed(0)
        found.append(gradients(model, model(TOKENS, targets_BT=TARGETS)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_the_selective_way_computes_no_product_twice_and_keeps_less_than_all() -> None:
    flops, kept = {}, {}
    for recompute in ("none", "selective", "full"):
        model = make(replace(SMALL, tied_head=False), recompute)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = model(TOKENS, targets_BT=TARGETS)
        kept[recompute] = sum(sizes.values())
        with FlopCounterMode(display=False) as counter:
            loss.backward()  # type: ignore[no-untyped-call]
        flops[recompute] = counter.get_total_flops()
    assert flops["none"] == flops["selective"] < flops["full"]
    assert kept["full"] < kept["none"]


def test_a_setting_that_is_no_way_to_recompute_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute is 'some'; allowed: none, selective, full"):
        make(SMALL, "some")


@pytest.mark.parametrize("moe", [MoEConfig(), EXPERTS])
def test_a_model_that_comes_to_be_part_by_part_is_the_one_that_is_built_whole(moe: MoEConfig) -> None:
    config = replace(SMALL, moe=moe)
    with torch.device("meta"):
        model = make(config)
    materialise(model, torch.device("cpu"), torch.float32, 0)
    whole = make(config).state_dict()
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
