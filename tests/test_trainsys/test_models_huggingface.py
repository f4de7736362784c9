"""Hugging Face models behind our contract: parity with transformers, packing, refusals, the way back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainsys.config import ModelConfig
from trainsys.data import load_tokenizer
from trainsys.errors import ConfigError
from trainsys.models import blocks, build, flops_per_token, load_pretrained, num_parameters, save_pretrained

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral, window of 4": ("MistralConfig", {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "router_aux_loss_coef": 0.5}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
DENSE = [name for name in CONFIGS if "mixtral" not in name and "moe" not in name]
TOKENS = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[7] * 3 + [8] * 7 + [7] * 2, [1] * 12])


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    config_type, extra = CONFIGS[name]
    getattr(transformers, config_type)(**{**SIZES, **extra, **changes}).save_pretrained(folder)
    return folder


def make(folder: Path, *, seed: int = 0, vocab_size: int = 257, **changes: Any) -> nn.Module:
    settings = {"max_positions": 32, "recompute": "none", **changes}
    return build(ModelConfig(kind="hf", path=str(folder)), vocab_size=vocab_size, seed=seed, **settings)


@pytest.mark.parametrize("name", DENSE)
def test_packed_documents_give_the_logits_each_document_gives_alone(tmp_path: Path, name: str) -> None:
    model = make(write_config(tmp_path, name)).double().eval()
    packed, aux_loss = model(TOKENS, document_ids_BT=DOCUMENTS)
    for row, start, stop in ((0, 0, 3), (0, 3, 10), (0, 10, 12), (1, 0, 12)):
        alone, _ = model(TOKENS[row : row + 1, start:stop])
        torch.testing.assert_close(packed[row : row + 1, start:stop], alone, rtol=1e-12, atol=1e-12)
    assert float(aux_loss) == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_packing_holds_with_experts_in_fp32(tmp_path: Path, name: str) -> None:
    model = make(write_config(tmp_path, name)).eval()
    packed, _ = model(TOKENS, document_ids_BT=DOCUMENTS)
    for start, stop in ((0, 3), (3, 10), (10, 12)):
        alone, _ = model(TOKENS[:1, start:stop])
        # transformers' grouped products know no float64; another number of rows regroups sums of 48 terms.
        torch.testing.assert_close(packed[:1, start:stop], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_documents_the_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = make(write_config(tmp_path, name))
    logits, _ = model(TOKENS)
    assert torch.equal(logits, model.causal_lm(input_ids=TOKENS).logits)


def test_the_auxiliary_loss_is_the_models_own_times_its_own_weight(tmp_path: Path) -> None:
    model = make(write_config(tmp_path, "mixtral"))
    _, aux_loss = model(TOKENS)
    own = model.causal_lm(input_ids=TOKENS, output_router_logits=True).aux_loss
    assert float(aux_loss.detach()) == pytest.approx(0.5 * float(own.detach()))
    aux_loss.backward()
    gate = next(p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert gate.grad is not None
    assert gate.grad.abs().max() > 0


def test_weights_without_files_depend_on_the_seed_alone(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    before = torch.get_rng_state()
    one, again, other = (list(make(folder, seed=seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_opens_in_transformers_with_the_same_logits(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    folder = write_config(tmp_path / "in", name)
    model = make(folder).to(dtype)
    state = {key: tensor + torch.randn_like(tensor) / 100 for key, tensor in model.named_parameters()}
    save_pretrained(ModelConfig(kind="hf", path=str(folder)), state, tmp_path / "out", load_tokenizer("bytes"))

    model.load_state_dict(state, strict=False)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.dtype == dtype
    with torch.no_grad():
        assert torch.equal(opened(input_ids=TOKENS).logits, model(TOKENS)[0])
        if dtype == torch.float32:
            assert torch.equal(load_pretrained(tmp_path / "out")(TOKENS)[0], model.eval()(TOKENS)[0])
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_a_folder_with_weights_continues_from_them(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "qwen2")
    first = make(folder, seed=5)
    first.causal_lm.save_pretrained(tmp_path)
    second = make(folder, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second.training


def test_the_tokenizers_files_go_with_the_model(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = write_config(tmp_path / "in", "llama")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    described = {
        "eos_token": "</s>",
        "chat_template": "{{ messages }}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    state = dict(make(folder).named_parameters())

    save_pretrained(ModelConfig(kind="hf", path=str(folder)), state, tmp_path / "out", load_tokenizer(str(folder)))

    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("abba")["input_ids"] == [0, 1, 1, 0]
    assert opened.chat_template == "{{ messages }}"
    other = tmp_path / "other"
    backend.add_tokens(["ab"])
    other.mkdir()
    backend.save(str(other / "tokenizer.json"))
    save_pretrained(ModelConfig(kind="hf", path=str(folder)), state, tmp_path / "out2", load_tokenizer(str(other)))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out2")("abba")["input_ids"] == [3, 1, 0]


def test_recomputation_changes_no_bit_of_the_gradient(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    results = []
    for checkpointing in (False, True):
        model = make(folder, recompute="full" if checkpointing else "none")
        model(TOKENS, document_ids_BT=DOCUMENTS)[0].square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_blocks_parameters_and_flops_of_a_llama_are_those_of_our_decoder(tmp_path: Path) -> None:
    model = make(write_config(tmp_path, "llama"))
    same = ModelConfig(num_layers=2, dim=32, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=300, tied_head=False)
    decoder = build(same, vocab_size=300, max_positions=32, recompute="none", seed=0)
    assert len(blocks(model)) == 2
    assert num_parameters(model) == num_parameters(decoder)
    assert flops_per_token(model, 16) == flops_per_token(decoder, 16)


def test_flops_count_the_experts_a_token_visits(tmp_path: Path) -> None:
    all_visited = make(write_config(tmp_path / "all", "mixtral", num_experts_per_tok=4))
    two_visited = make(write_config(tmp_path / "two", "mixtral", num_experts_per_tok=2))
    one_expert = 3 * 32 * 48
    assert flops_per_token(all_visited, 16) - flops_per_token(two_visited, 16) == 6 * 2 * 2 * one_expert


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda folder: "meta-llama/Llama-3",
            "'meta-llama/Llama-3' is no folder; no hub is asked: give a local folder",
        ),
        (lambda folder: folder, "has no config.json"),
        (lambda folder: _text(folder, "{"), "config.json: "),
        (lambda folder: _text(folder, '{"model_type": "unheard"}'), "config.json: .*unheard"),
        (lambda folder: _config(folder, "T5Config"), "holds a t5 model; a causal language model is wanted"),
        (lambda folder: _config(folder, "BertConfig", num_hidden_layers=1), "bert models see later tokens"),
        (lambda folder: _weights(folder, "pytorch_model.bin"), r"pickled weights \(\*\.bin\).*safetensors"),
    ],
    ids=[
        "a hub name",
        "no config",
        "broken config",
        "unknown type",
        "encoder-decoder",
        "not causal",
        "pickle",
    ],
)
def test_what_is_no_causal_language_model_is_refused(tmp_path: Path, prepare: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"config: model.path: .*{message}"):
        make(prepare(tmp_path))


def _text(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def _config(folder: Path, config_type: str, **changes: Any) -> Path:
    getattr(transformers, config_type)(**changes).save_pretrained(folder)
    return folder


def _weights(folder: Path, name: str) -> Path:
    write_config(folder, "llama")
    (folder / name).write_bytes(b"")
    return folder


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    make(folder).causal_lm.save_pretrained(folder)
    write_config(folder, "llama", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"not this model's: missing_keys \['model\.layers\.2\."):
        make(folder)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    with pytest.raises(ConfigError, match="has 300 rows, under the tokenizer's 301 tokens"):
        make(folder, vocab_size=301)


def test_sequences_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 65 is over the model's 64 positions"):
        make(folder, max_positions=65)


def test_a_model_that_mixes_documents_is_refused_when_it_is_given_some(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "ffn_dim": 48,
    }
    model = make(_config(tmp_path, "OPTConfig", word_embed_proj_dim=32, **sizes))
    model(TOKENS)
    with pytest.raises(ConfigError, match=r"data\.document_mask: opt models cannot keep documents apart"):
        model(TOKENS, document_ids_BT=DOCUMENTS)


def test_rotary_frequencies_stay_in_fp32_when_the_weights_do_not(tmp_path: Path) -> None:
    model = make(write_config(tmp_path, "llama"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.bfloat16()
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert any("inv_freq" in name for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
