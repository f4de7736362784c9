"""Changes under the copies are seen, whoever makes them; legitimate ones are not taken for such."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint import Checkpointer
from checkpoint.errors import TornSnapshot
from checkpoint.guard import Guard
from checkpoint.planning import Planner
from tests.test_checkpoint.stalls import poke, stalled

CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "through a view": lambda t: t.view(-1)[:3].zero_(),
    "through data": lambda t: t.data.fill_(3),
    "behind torch": poke,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_from_the_call_on_fails_the_save_and_names_the_tensor(tmp_path: Path, change: str):
    state = {"left": torch.arange(100.0), "changed": torch.arange(100.0), "right": torch.arange(100.0)}
    with Checkpointer(tmp_path) as ck:
        ck.prepare(state)
        with stalled(ck):
            handle = ck.save(1, state)
            CHANGES[change](state["changed"])
        with pytest.raises(TornSnapshot, match=r"'changed' changed .*; call fence\(\) before every update") as caught:
            handle.result(20)
        assert caught.value.names == ("changed",)
        assert ck.latest() is None
        assert ck.save(2, state).result(20).step == 2


def test_memory_that_is_freed_under_the_copy_fails_the_save(tmp_path: Path):
    state = {"w": torch.arange(100.0)}
    with Checkpointer(tmp_path) as ck:
        ck.prepare(state)
        with stalled(ck):
            handle = ck.save(1, state)
            state["w"].untyped_storage().resize_(0)
        with pytest.raises(TornSnapshot, match="'w' lost its memory"):
            handle.result(20)


def test_new_memory_for_a_parameter_is_no_change_of_the_old(tmp_path: Path):
    parameter = torch.nn.Parameter(torch.ones(100))
    with Checkpointer(tmp_path) as ck:
        ck.prepare({"w": parameter})
        with stalled(ck):
            handle = ck.save(1, {"w": parameter})
            parameter.data = torch.zeros(100)
        found = torch.zeros(100)
        ck.load(handle.result(20), {"w": found})
    assert (found == 1).all()


def test_an_update_of_a_group_that_is_copied_is_no_tear(tmp_path: Path):
    state = {name: torch.full((3_000_000,), float(i)) for i, name in enumerate("abc")}
    with Checkpointer(tmp_path) as ck:
        handle = ck.save(1, state, update_order=[["c"], ["a"], ["b"]])
        for group, name in enumerate("cab"):
            ck.fence(group)
            state[name].fill_(-1)
        found = {name: torch.zeros_like(t) for name, t in state.items()}
        ck.load(handle.result(20), found)
    assert [t[0].item() for t in found.values()] == [0, 1, 2]
    assert all((t == t[0]).all() for t in found.values())


def test_strided_and_tiny_tensors_are_sampled_inside_their_memory():
    tensors = {
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
        "byte": torch.ones(1, dtype=torch.uint8),
        "strided": torch.arange(40.0).reshape(5, 8)[:, ::3].T,
    }
    guard = Guard(Planner(0, 1).draft(tensors, ()))
    tensors["strided"].numpy()[-1, -1] = 5.0
    tensors["byte"].numpy()[0] = 5
    guard.settle(0)
    assert guard.changed == ("byte", "strided")
