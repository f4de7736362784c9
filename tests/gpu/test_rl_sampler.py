"""What is drawn on a GPU, step by step from graphs, is what is drawn on a CPU without them."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from torch import nn

from tests.gpu.devices import needs_gpus
from trainsys import models
from trainsys.config import ModelConfig
from trainsys.models.decoder import Decoder
from trainsys.rl.sampler import Drawing, Sampler

pytestmark = needs_gpus(1)

_PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4], [20, 40]]
_SEEDS = [[10 * row + index for index in range(7)] for row in range(len(_PROMPTS))]


def _model() -> nn.Module:
    config = ModelConfig(num_layers=2, dim=64, num_heads=4, num_kv_heads=2, ffn_dim=128, tied_head=False)
    model = models.build(config, vocab_size=60, max_positions=256, recompute="none", seed=0).double()
    assert isinstance(model, Decoder)
    nn.init.normal_(model.head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("slots", [5, 64])
def test_graphs_draw_what_a_cpu_draws(slots: int) -> None:
    model, drawing = _model(), Drawing(8, 5, 200, 1.0)  # spans of two graphs
    wanted = Sampler(copy.deepcopy(model), slots=slots).draw(_PROMPTS, _SEEDS, drawing)
    on_gpu = model.cuda()
    graphs = Sampler(on_gpu, slots=slots)
    for _ in range(3):  # without graphs, captured, replayed
        found = graphs.draw(_PROMPTS, _SEEDS, drawing)
        for one, other in zip(chain(*found), chain(*wanted), strict=True):
            assert (one.tokens, one.finished) == (other.tokens, other.finished)
            assert one.log_probs == pytest.approx(other.log_probs, rel=1e-9)
    with torch.no_grad():  # in place, as an optimizer does
        for parameter in on_gpu.parameters():
            parameter.mul_(1.1)
    plain = Sampler(copy.deepcopy(on_gpu), slots=slots, cuda_graphs=False)
    found, wanted = graphs.draw(_PROMPTS, _SEEDS, drawing), plain.draw(_PROMPTS, _SEEDS, drawing)
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert (one.tokens, one.finished) == (other.tokens, other.finished)
        assert one.log_probs == pytest.approx(other.log_probs, rel=1e-9)  # captured products may add up differently


def test_policies_on_one_gpu_keep_their_own_graphs() -> None:
    drawing = Drawing(8, 5, 40, 1.0)
    first, second = _model().cuda(), _model().cuda()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.3)
    samplers = [Sampler(model, slots=8) for model in (first, second)]
    alone = [sampler.draw(_PROMPTS, _SEEDS, drawing) for sampler in samplers]
    assert alone[0] != alone[1]
    for _ in range(3):
        for sampler, wanted in zip(samplers, alone, strict=True):
            found = sampler.draw(_PROMPTS, _SEEDS, drawing)
            assert [one.tokens for one in chain(*found)] == [one.tokens for one in chain(*wanted)]
