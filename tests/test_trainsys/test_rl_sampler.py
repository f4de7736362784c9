"""What is drawn through slots and caches is what whole forwards would draw, token for token, and nobody's neighbour."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainsys import models
from trainsys.config import ModelConfig
from trainsys.models.decoder import Decoder
from trainsys.rl.errors import PolicyError
from trainsys.rl.sampler import Draw, Drawing, Sampler, choose, noise, slot_core

_ROWS, _VOCAB, _STOP = 60, 8, 5
"""Of the model, and how many of these may be drawn: so few that the stop token comes early now and then."""
_PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4], [20, 40]]
_SEEDS = [[10 * row + index for index in range(3)] for row in range(len(_PROMPTS))]


def _decoder(seed: int = 0) -> nn.Module:
    config = ModelConfig(num_layers=2, dim=32, num_heads=4, num_kv_heads=2, ffn_dim=64, tied_head=False)
    model = models.build(config, vocab_size=_ROWS, max_positions=24, recompute="none", seed=seed).double()
    assert isinstance(model, Decoder)
    nn.init.normal_(model.head.weight, std=0.25, generator=torch.Generator().manual_seed(seed))  # no flat softmax
    return model


def _huggingface(tmp_path: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=64, max_position_embeddings=24, tie_word_embeddings=True, initializer_range=0.4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    described = ModelConfig(kind="hf", path=str(tmp_path))
    model = models.build(described, vocab_size=_ROWS, max_positions=24, recompute="none", seed=0)
    slot_core(model)
    return model.double()


@torch.no_grad()
def _plain(model: Any, prompt: list[int], seed: int, drawing: Drawing) -> Draw:
    """One completion by a forward over everything so far for each token."""
    numbers = noise([seed], drawing.max_new_tokens)
    tokens, drawn, log_probs = list(prompt), [], []
    for index in range(drawing.max_new_tokens):
        positions = torch.arange(len(tokens))[None]
        logits = model(torch.tensor([tokens]), positions_BT=positions)[0][0, -1:, : drawing.vocab_size]
        token, log_prob = choose(logits, numbers[:, index : index + 1], drawing.temperature)
        tokens.append(int(token))
        drawn.append(int(token))
        log_probs.append(float(log_prob))
        if drawn[-1] == drawing.stop_token:
            break
    return Draw(tuple(drawn), tuple(log_probs), drawn[-1] == drawing.stop_token)


def _assert_same(found: list[list[Draw]], wanted: list[list[Draw]]) -> None:
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert (one.tokens, one.finished) == (other.tokens, other.finished)
        assert one.log_probs == pytest.approx(other.log_probs, rel=1e-10)


@pytest.mark.parametrize("kind", ["decoder", "hf"])
def test_cached_sampling_is_uncached_sampling_token_for_token(kind: str, tmp_path: Path) -> None:
    model = _decoder() if kind == "decoder" else _huggingface(tmp_path)
    for temperature in (1.0, 0.7, 0.0) if kind == "decoder" else (1.0,):
        drawing = Drawing(_VOCAB, _STOP, 12, temperature)
        wanted = [
            [_plain(model, prompt, seed, drawing) for seed in seeds]
            for prompt, seeds in zip(_PROMPTS, _SEEDS, strict=True)
        ]
        # Three slots are taken again and again, twenty are never all in use.
        for slots in (3, 20):
            _assert_same(Sampler(model, slots=slots).draw(_PROMPTS, _SEEDS, drawing), wanted)
        if temperature == 1:
            lengths = {len(one.tokens) for one in chain(*wanted)}
            assert len(lengths) > 2, "some end early, so slots change hands"
            assert any(one.finished for one in chain(*wanted))


def test_a_completion_depends_on_its_prompt_and_seed_alone() -> None:
    sampler, drawing = Sampler(_decoder(), slots=5), Drawing(_VOCAB, _STOP, 10, 1.0)
    together = sampler.draw(_PROMPTS, _SEEDS, drawing)
    for prompt, seeds, wanted in zip(_PROMPTS, _SEEDS, together, strict=True):
        for seed, one in zip(seeds, wanted, strict=True):
            _assert_same(sampler.draw([prompt], [[seed]], drawing), [[one]])
    assert len({one.tokens for one in together[0]}) > 1


def test_several_policies_on_one_device_do_not_know_of_each_other() -> None:
    drawing = Drawing(_VOCAB, _STOP, 10, 1.0)
    alone = [Sampler(_decoder(seed), slots=4).draw(_PROMPTS, _SEEDS, drawing) for seed in (1, 2)]
    samplers = [Sampler(_decoder(seed), slots=4) for seed in (1, 2)]
    for _ in range(2):
        for sampler, wanted in zip(samplers, alone, strict=True):
            _assert_same(sampler.draw(_PROMPTS, _SEEDS, drawing), wanted)
    assert alone[0] != alone[1]


def test_sampling_leaves_the_model_as_it_was_and_follows_its_weights() -> None:
    model = _decoder().train()
    tokens = torch.tensor([_PROMPTS[2]])
    before = model(tokens)[0]
    sampler, drawing = Sampler(model, slots=4), Drawing(_VOCAB, _STOP, 6, 1.0)
    first = sampler.draw(_PROMPTS, _SEEDS, drawing)
    assert model.training
    assert torch.equal(model(tokens)[0], before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    _assert_same(sampler.draw(_PROMPTS, _SEEDS, drawing), Sampler(model, slots=4).draw(_PROMPTS, _SEEDS, drawing))
    assert sampler.draw(_PROMPTS, _SEEDS, drawing) != first


def test_drawn_tokens_have_the_probabilities_that_are_told() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, float("-inf")]], dtype=torch.float64).expand(20_000, 4)
    tokens, log_probs = choose(logits, noise([3], 20_000).T, 1.0)
    shares = tokens.bincount(minlength=4) / len(tokens)
    # Four standard deviations of a share of 20,000 draws are under 0.015.
    torch.testing.assert_close(shares.double(), logits[0].softmax(-1), rtol=0, atol=0.015)
    assert shares[3] == 0
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    edge, _ = choose(logits[:1], torch.tensor([[1 - 2**-53]]), 1.0)
    assert edge.tolist() == [2], "the last token that has a probability"


def test_prompts_that_do_not_fit_are_refused_before_anything_is_drawn() -> None:
    sampler = Sampler(_decoder(), slots=2)
    with pytest.raises(PolicyError, match="a prompt is empty"):
        sampler.draw([[1], []], [[0], [0]], Drawing(_VOCAB, _STOP, 4, 1.0))
    with pytest.raises(PolicyError, match=r"prompt of 15 tokens and 10 new ones do not fit the model's 24 positions"):
        sampler.draw([[1] * 15], [[0]], Drawing(_VOCAB, _STOP, 10, 1.0))
    assert sampler.draw([], [], Drawing(_VOCAB, _STOP, 4, 1.0)) == []
