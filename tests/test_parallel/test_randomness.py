"""Streams of random numbers: equal along some axes, different along others, and going on where they were left."""

from __future__ import annotations

import pytest
import torch

from parallel.mesh import Coordinates
from parallel.randomness import Streams, stream_seed

APART = {"alike": ("replicate", "shard", "context", "pipeline"), "own": Coordinates._fields}


def streams(**coordinates: int) -> Streams:
    return Streams(7, Coordinates(**coordinates), APART, torch.device("cpu"))


def draw(of: Streams, name: str) -> torch.Tensor:
    with of.use(name):
        return torch.nn.functional.dropout(torch.ones(64), 0.5)


def test_tensor_ranks_drop_alike_what_they_have_alike_and_apart_what_they_have_apart() -> None:
    one, other, elsewhere = streams(tensor=0), streams(tensor=1), streams(tensor=1, shard=1)
    assert torch.equal(draw(one, "alike"), draw(other, "alike"))
    assert not torch.equal(draw(one, "own"), draw(other, "own"))
    assert not torch.equal(draw(one, "alike"), draw(elsewhere, "alike"))


def test_a_stream_goes_on_where_it_was_left_and_leaves_the_outside_alone() -> None:
    one, whole = streams(), streams()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(one, "own")
    draw(one, "alike")
    second = draw(one, "own")
    assert torch.equal(torch.get_rng_state(), before)
    with whole.use("own"):
        wanted = [torch.nn.functional.dropout(torch.ones(64), 0.5) for _ in range(2)]
    assert torch.equal(torch.stack([first, second]), torch.stack(wanted))
    resumed = streams()
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(draw(resumed, "own"), draw(one, "own"))


def test_an_axis_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no axis rows; axes are pipeline, replicate, shard, context, tensor"):
        stream_seed(0, Coordinates(), ["rows"])
