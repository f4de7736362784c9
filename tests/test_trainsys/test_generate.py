"""Generation with a cache equals generation without, and the seed decides everything."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainsys.config import ModelConfig, MoEConfig
from trainsys.data import load_tokenizer
from trainsys.generate import generate, sample
from trainsys.models import build
from trainsys.models.decoder import Decoder
from trainsys.models.initialisation import initialise

SMALL = ModelConfig(num_layers=2, dim=16, num_heads=4, num_kv_heads=2, ffn_dim=24)
EXPERTS = MoEConfig(num_experts=4, top_k=2, ffn_dim=8)
BYTES = load_tokenizer("bytes")


def make(config: ModelConfig = SMALL, *, max_positions: int = 32) -> Decoder:
    model = build(config, vocab_size=257, max_positions=max_positions, recompute="none", seed=0)
    assert isinstance(model, Decoder)
    initialise(model, num_layers=1, seed=0, std=0.4)
    return model.double().eval()


def make_huggingface(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.4,
    ).save_pretrained(folder)
    config = ModelConfig(kind="hf", path=str(folder))
    return build(config, vocab_size=257, max_positions=32, recompute="none", seed=0).double()


def without_cache(model: nn.Module, context: list[int], num_tokens: int, seed: int, limit: int = 32) -> list[int]:
    """The same draw, every token from a forward over all before it; half of a full context is forgotten."""
    generator = torch.Generator().manual_seed(seed)
    seen, added = list(context), []
    for _ in range(num_tokens):
        if len(seen) > limit:
            seen = seen[-(limit // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([seen]))[0][0, -1, :257]
        added.append(int(torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)))
        seen.append(added[-1])
    return added


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, moe=EXPERTS)], ids=["dense", "experts"])
def test_logits_from_the_cache_equal_those_of_the_whole_sequence(config: ModelConfig) -> None:
    model = make(config)
    tokens = torch.randint(0, 257, (3, 30))
    wanted, _ = model(tokens)
    cache = model.new_cache()
    pieces: list[Tensor] = [model(part, cache=cache)[0] for part in tokens.split([1, 7, 1, 1, 20], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=1e-12, atol=1e-12)


def test_a_cache_that_grows_keeps_what_it_holds() -> None:
    model = make(max_positions=400)
    tokens = torch.randint(0, 257, (1, 400))
    wanted, _ = model(tokens)
    cache = model.new_cache()
    pieces = [model(part, cache=cache)[0] for part in tokens.split([100, 100, 1, 199], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, moe=EXPERTS)], ids=["dense", "experts"])
def test_sampling_with_the_cache_equals_sampling_without_beyond_the_positions(config: ModelConfig) -> None:
    model = make(config)
    stream = sample(model, [1, 2, 3], vocab_size=257, temperature=0.7, seed=4)
    assert list(islice(stream, 70)) == without_cache(model, [1, 2, 3], 70, seed=4)


def test_sampling_from_a_hugging_face_model_equals_sampling_without_its_cache(tmp_path: Path) -> None:
    model = make_huggingface(tmp_path).eval()
    stream = sample(model, [1, 2, 3], vocab_size=257, temperature=0.7, seed=4)
    assert list(islice(stream, 50)) == without_cache(model, [1, 2, 3], 50, seed=4)


def test_a_context_longer_than_the_positions_counts_from_its_end() -> None:
    model = make()
    context = [i % 257 for i in range(50)]
    assert next(sample(model, context, vocab_size=257, temperature=0, seed=0)) == next(
        sample(model, context[-16:], vocab_size=257, temperature=0, seed=0)
    )


def test_the_seed_decides_the_text() -> None:
    model = make()
    texts = [generate(model, BYTES, "ab", 20, 1.0, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("ab")


def test_temperature_0_takes_the_most_likely_token_whatever_the_seed() -> None:
    model = make()
    logits, _ = model(torch.tensor([[97, 98]]))
    first = {next(sample(model, [97, 98], vocab_size=257, temperature=0, seed=seed)) for seed in range(5)}
    assert first == {int(logits[0, -1, :257].argmax())}


def test_top_k_chooses_among_the_k_most_likely() -> None:
    model = make()
    likely = set(model(torch.tensor([[97]]))[0][0, -1, :257].topk(3).indices.tolist())
    drawn = {next(sample(model, [97], vocab_size=257, temperature=5.0, seed=seed, top_k=3)) for seed in range(60)}
    assert drawn == likely


def test_rows_beyond_the_vocabulary_are_never_chosen() -> None:
    model = make()
    with torch.no_grad():
        model.embedding.weight[257:] *= 1000
    stream = sample(model, [1], vocab_size=257, temperature=3.0, seed=0)
    assert max(islice(stream, 60)) < 257


def test_generation_stops_at_the_end_of_a_document_when_asked() -> None:
    model = make(replace(SMALL, num_layers=1, tied_head=False))
    with torch.no_grad():
        model.head.weight.zero_()  # every token is equally likely
    drawn = list(islice(sample(model, [97], vocab_size=257, temperature=1.0, seed=5), 40))
    end = drawn.index(256)
    assert generate(model, BYTES, "a", 40, 1.0, 5, stop_at_end=True) == BYTES.decode([97, *drawn[:end]])
    assert generate(model, BYTES, "a", 40, 1.0, 5) == BYTES.decode([97, *drawn])


def test_an_empty_prompt_begins_a_document() -> None:
    model = make()
    first = next(sample(model, [256], vocab_size=257, temperature=0, seed=0))
    assert generate(model, BYTES, "", 1, 0, 0) == BYTES.decode([first])


def test_generation_leaves_the_mode_and_the_global_generator_alone() -> None:
    model = make(replace(SMALL, dropout=0.5)).train()
    before = torch.get_rng_state()
    texts = {generate(model, BYTES, "ab", 20, 1.0, 0) for _ in range(2)}
    assert len(texts) == 1
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
