"""Someone's own model, tokenizer and data through the whole trainer, and back into a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_trainsys import runs


def write_jsonl(folder: Path) -> Path:
    text = runs.write_text(folder / "texts", documents=30)
    path = folder / "corpus.jsonl"
    rows = (json.dumps({"id": file.stem, "body": file.read_text()}) for file in sorted(text.iterdir()))
    path.write_text("\n".join(rows))
    return path


def write_llama(folder: Path, corpus: Path) -> Path:
    """A random Llama of a few thousand weights with a BPE tokenizer of its own, as a hub would serve it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([json.loads(line)["body"] for line in corpus.read_text().splitlines()], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])
def test_a_llama_is_trained_on_jsonl_and_opens_in_transformers_again(tmp_path: Path, stage: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    corpus = write_jsonl(tmp_path)
    llama = write_llama(tmp_path / "llama", corpus)
    settings = [
        "--model.kind=hf",
        f"--data.path={corpus}",
        "--data.text_key=body",
        f"--data.tokenizer={llama}",
        "--optim.lr=1e-2",
        f"--engine.zero_stage={stage}",
    ]
    output = runs.succeed(
        "launch",
        *runs.arguments(*settings, f"--model.path={llama}", f"--run_dir={tmp_path / 'first'}"),
        cwd=tmp_path,
    )
    assert "sample:\ndef " in output
    losses = runs.losses(tmp_path / "first")
    assert losses[12] < losses[1] - 0.5

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "first/model")
    before = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first/model")
    tokens = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        new, old = (model(tokens, labels=tokens).loss for model in (trained, before))
    assert float(new) < float(old) - 0.5
    assert trained.lm_head.weight.data_ptr() == trained.model.embed_tokens.weight.data_ptr(), "still tied"

    # What was written is a model folder like any other: training goes on from its weights.
    runs.succeed(
        "launch",
        *runs.arguments(*settings, f"--model.path={tmp_path / 'first/model'}", f"--run_dir={tmp_path / 'second'}"),
        cwd=tmp_path,
    )
    assert runs.losses(tmp_path / "second")[1] < losses[1] - 0.5


def test_an_embedding_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    corpus = write_jsonl(tmp_path)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    done = runs.run(
        "launch",
        *runs.arguments(
            "--model.kind=hf",
            f"--model.path={tmp_path / 'small'}",
            f"--data.path={corpus}",
            "--data.text_key=body",
            "--parallel.replicate=1",
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "100" in done.stderr.splitlines()[0]
    assert "257" in done.stderr.splitlines()[0]
