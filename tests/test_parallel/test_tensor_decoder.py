"""The built-in decoder shared over tensor ranks against one process, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.ranks import run_ranks
from tests.test_parallel.tensor_models import ALL, How, Trained, assert_equal, train, train_shared
from trainsys.config import ModelConfig
from trainsys.models import build
from trainsys.models.decoder import Decoder

SMALL = ModelConfig(num_layers=2, dim=16, num_heads=4, num_kv_heads=4, ffn_dim=24, vocab_size=32, tied_head=False)
VARIANTS = {
    "even": SMALL,
    "tied, grouped": replace(SMALL, num_kv_heads=2, tied_head=True),
    "one key head, odd feed-forward and vocabulary": replace(SMALL, num_kv_heads=1, ffn_dim=23, vocab_size=33),
    "odd and tied": replace(SMALL, num_kv_heads=2, ffn_dim=9, vocab_size=35, tied_head=True),
}


def make(config: ModelConfig) -> Decoder:
    model = build(config, vocab_size=30, max_positions=64, activation_checkpointing=False, seed=1)
    assert isinstance(model, Decoder)
    return model.double()


def _train_all(rank: int, world_size: int, config: ModelConfig, hows: list[How]) -> list[Trained]:
    return [train_shared(make(config), 30, how) for how in hows]


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, 2) for name in VARIANTS] + [(name, 4) for name in VARIANTS],
)
def test_a_shared_decoder_trains_as_one_process_does(name: str, world_size: int) -> None:
    model = make(VARIANTS[name])
    one = train(model, 30, {})
    for ranks in zip(*run_ranks(_train_all, world_size, VARIANTS[name], ALL), strict=True):
        assert_equal(list(ranks), one)
