"""A decoder written to a folder comes back whole, and what is not whole is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainsys.config import ModelConfig, MoEConfig
from trainsys.data import load_tokenizer
from trainsys.errors import ConfigError
from trainsys.models import build, load_pretrained, save_pretrained
from trainsys.models.decoder import Decoder

safetensors = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")

TIED = ModelConfig(num_layers=2, dim=16, num_heads=4, num_kv_heads=2)
UNTIED = replace(TIED, tied_head=False, head_dim=6, ffn_dim=24, norm_eps=1e-3, rope_theta=50.0)
EXPERTS = replace(TIED, moe=MoEConfig(num_experts=4, ffn_dim=8, num_shared_experts=1, first_dense_layers=1))
BYTES = load_tokenizer("bytes")
TOKENS = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(0))


def make(config: ModelConfig) -> Decoder:
    model = build(config, vocab_size=257, max_positions=12, recompute="none", seed=3)
    assert isinstance(model, Decoder)
    return model


def parameters(model: Decoder) -> dict[str, Tensor]:
    """As training names them: a shared tensor once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [TIED, UNTIED, EXPERTS], ids=["tied", "untied", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_decoder_comes_back_with_the_same_logits(
    tmp_path: Path, config: ModelConfig, dtype: torch.dtype
) -> None:
    model = make(config).to(dtype).eval()
    save_pretrained(config, parameters(model), tmp_path, BYTES, max_positions=12)
    loaded = load_pretrained(tmp_path)
    assert not loaded.training
    for wanted, got in zip(model(TOKENS), loaded(TOKENS), strict=True):
        assert torch.equal(wanted, got)
    assert parameters(model).keys() == dict(loaded.named_parameters()).keys()
    with pytest.raises(ValueError, match="13 tokens do not fit the model's limit of 12"):
        loaded(torch.zeros(1, 13, dtype=torch.int64))


def test_a_loaded_tied_head_is_still_the_embedding(tmp_path: Path) -> None:
    save_pretrained(TIED, parameters(make(TIED)), tmp_path, BYTES)
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, Decoder)
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.max_positions is None


def test_a_whole_state_dict_is_accepted_too(tmp_path: Path) -> None:
    model = make(TIED)
    save_pretrained(TIED, model.state_dict(), tmp_path, BYTES)
    assert torch.equal(load_pretrained(tmp_path)(TOKENS)[0], model(TOKENS)[0])


def test_the_folder_describes_itself(tmp_path: Path) -> None:
    save_pretrained(TIED, parameters(make(TIED)), tmp_path, BYTES, max_positions=12)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["model_type"] == "trainsys-decoder"
    assert described["tokenizer"] == "bytes"
    assert described["dtype"] == "float32"
    assert described["model"]["vocab_size"] == 320
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_the_tokenizer_goes_with_the_decoder(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the extra hf is not installed")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    config = replace(TIED, vocab_size=320)
    save_pretrained(config, parameters(make(config)), tmp_path / "out", tokenizer)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert load_tokenizer(str(tmp_path / "out" / described["tokenizer"])).digest == tokenizer.digest


def test_weights_that_are_not_the_whole_model_are_refused_by_name(tmp_path: Path) -> None:
    state = parameters(make(TIED))
    state["blocks.0.attention.qkv.weight"] = torch.zeros(3, 16)
    state["blocks.9.attention.qkv.weight"] = torch.zeros(3, 16)
    del state["norm.weight"]
    with pytest.raises(ConfigError) as caught:
        save_pretrained(TIED, state, tmp_path, BYTES)
    assert caught.value.problems == [
        "weights: blocks.0.attention.qkv.weight: (3, 16), the model has (32, 16)",
        "weights: blocks.9.attention.qkv.weight: not of this model",
        "weights: norm.weight: missing",
    ]
    assert not (tmp_path / "config.json").exists()


def test_a_folder_whose_weights_were_cut_is_refused_at_loading(tmp_path: Path) -> None:
    state = parameters(make(TIED))
    save_pretrained(TIED, state, tmp_path, BYTES)
    safetensors.save_file({"norm.weight": state["norm.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"weights: embedding\.weight: missing"):
        load_pretrained(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json; give a folder written by save_pretrained"):
        load_pretrained(tmp_path)
