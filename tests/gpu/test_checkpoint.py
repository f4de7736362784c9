"""Checkpoints of tensors on a GPU: the values of the call, whatever the stream does next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointConfig, Checkpointer
from checkpoint.arena import SLOT_BYTES
from checkpoint.digest import DEVICE_CHUNK_BYTES, SMALL_BYTES
from checkpoint.errors import TornSnapshot
from tests.gpu.devices import needs_gpus
from tests.test_checkpoint.stalls import stalled
from tests.test_checkpoint.worlds import wait_until

pytestmark = needs_gpus(1)


def state_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return many small tensors, some of several slots, of several types and strides, and one on the host."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    return {
        **{f"bias{i}": randn(i % 7 + 1) for i in range(300)},
        "weight": randn(5_000_000),
        "half": randn(9_000_001).bfloat16(),
        "strided": randn(1500, 2000).T,
        "part": randn(400, 300)[::3, 5:250:2],
        "scalar": torch.tensor(seed, device="cuda"),
        "empty": torch.empty(0, 3, device="cuda"),
        "flags": randn(1001) > 0,
        "host": torch.full((3_000_000,), float(seed)),
    }


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the values, for a comparison later."""
    return {name: t.clone() for name, t in state.items()}


def blanks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return destinations on the same devices."""
    return {name: torch.empty_like(t).fill_(0) for name, t in state.items()}


def overwrite(state: dict[str, torch.Tensor]) -> None:
    """Change everything in place."""
    for tensor in state.values():
        tensor.fill_(0 if tensor.dtype is torch.bool else -7)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two states hold the same bits."""
    return all(torch.equal(left[name], right[name]) for name in right)


def busy() -> None:
    """Keep the current stream busy for some tens of milliseconds, without waiting for it."""
    torch.cuda._sleep(100_000_000)


@pytest.fixture
def ck(tmp_path: Path) -> Iterator[Checkpointer]:
    """A Checkpointer that keeps all."""
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=9)) as ck:
        yield ck


def test_the_load_gives_the_values_at_the_call(ck: Checkpointer):
    state = state_of()
    expected, found = copies(state), blanks(state)
    ck.prepare(state)
    handle = ck.save(1, state)
    ck.fence()
    overwrite(state)
    ck.load(handle.result(60), found)
    assert same(found, expected)


def test_a_large_state_is_copied_in_few_large_orders(ck: Checkpointer):
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = [40_000_000, 3, 25_000_001, 1024, 300_000, 17_000_000]
    state = {
        f"{kind}{i}": torch.randn(n, device="cuda", generator=generator).to(dtype)
        for i, n in enumerate(sizes)
        for kind, dtype in (("master", torch.float32), ("half", torch.bfloat16))
    }
    state["strided"] = torch.randn(5000, 6000, device="cuda", generator=generator).T
    expected, found = copies(state), blanks(state)
    ck.prepare(state)
    handle = ck.save(1, state)
    ck.fence()
    overwrite(state)
    ck.load(handle.result(60), found)
    assert same(found, expected)
    draft = ck._planner.draft(state, ())
    nbytes = sum(t.nbytes for t in state.values())
    assert len(draft.blueprint.shard.parcels) <= -(-nbytes // DEVICE_CHUNK_BYTES) + 1
    large = [c for p in draft.blueprint.shard.parcels for c in p.cuts if c.nbytes > SMALL_BYTES]
    assert len(large) < 20


def test_the_fence_does_not_wait_for_the_copies(ck: Checkpointer):
    state = state_of()
    del state["host"]  # this one's copies the fence waits for
    expected, found = copies(state), blanks(state)
    ck.prepare(state)
    ck.save(0, state).result(60)
    for _ in range(20):
        busy()
    handle = ck.save(1, state)
    ck.fence()
    assert not handle.staged()
    overwrite(state)
    ck.load(handle.result(60), found)
    assert same(found, expected)


def test_a_fence_that_comes_at_once_still_lets_the_stream_wait_for_every_copy(ck: Checkpointer):
    state = {f"w{i}": torch.zeros(20_000_000, device="cuda") for i in range(12)}
    ck.prepare(state)
    for step in range(5):
        for tensor in state.values():
            tensor.fill_(step)
        handle = ck.save(step, state)
        ck.fence()
        for tensor in state.values():
            tensor.fill_(-1)
        found = blanks(state)
        ck.load(handle.result(60), found)
        assert all((t == step).all() for t in found.values())


def test_the_copy_waits_for_what_was_ordered_before_the_save(ck: Checkpointer):
    state = state_of()
    ck.prepare(state)
    busy()
    for tensor in state.values():
        tensor.fill_(1)
    handle = ck.save(1, state)
    ck.fence()
    busy()
    overwrite(state)
    found = blanks(state)
    ck.load(handle.result(60), found)
    assert all((t == 1).all() for t in found.values())


def test_the_fence_holds_for_the_stream_it_is_called_on(ck: Checkpointer):
    state = state_of()
    expected, found = copies(state), blanks(state)
    ck.prepare(state)
    handle = ck.save(1, state)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ck.fence()
        overwrite(state)
    ck.load(handle.result(60), found)
    assert same(found, expected)


def test_a_save_on_a_side_stream_is_of_what_that_stream_made(ck: Checkpointer):
    state, side = state_of(), torch.cuda.Stream()
    ck.prepare(state)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy()
        overwrite(state)
        handle = ck.save(1, state)
    found = blanks(state)
    ck.load(handle.result(60), found)
    torch.cuda.synchronize()
    assert same(found, state)


@pytest.mark.parametrize("slots", [1, 3])
def test_an_arena_smaller_than_the_state_only_takes_longer(tmp_path: Path, slots: int):
    state = state_of()
    expected, found = copies(state), blanks(state)
    with Checkpointer(tmp_path, config=CheckpointConfig(staging_bytes=slots * SLOT_BYTES)) as ck:
        handle = ck.save(1, state)
        ck.fence()
        overwrite(state)
        assert handle.stats(60).pressure_s > 0
        ck.load(handle.result(), found)
    assert same(found, expected)


def test_groups_may_be_updated_one_after_the_other(ck: Checkpointer):
    state = state_of()
    expected, found = copies(state), blanks(state)
    names = list(state)
    order = [names[:150], names[150:302], names[302:]]
    ck.prepare(state, order)
    handle = ck.save(1, state, update_order=order)
    for group, members in enumerate(order):
        ck.fence(group)
        overwrite({name: state[name] for name in members})
    ck.load(handle.result(60), found)
    assert same(found, expected)


def test_saves_that_follow_each_other_do_not_mix(ck: Checkpointer):
    state = state_of()
    ck.prepare(state)
    handles = []
    for step in range(4):
        ck.fence()
        for tensor in state.values():
            tensor.fill_(step % 2 if tensor.dtype is torch.bool else step)
        handles.append(ck.save(step, state))
    found = blanks(state)
    for step, handle in enumerate(handles):
        ck.load(handle.result(60), found)
        assert all((t == (step % 2 if t.dtype is torch.bool else step)).all() for t in found.values())


@pytest.mark.parametrize("name", ["weight", "bias3", "strided"])
def test_a_change_without_a_fence_is_seen(ck: Checkpointer, name: str):
    state = state_of()
    ck.prepare(state)
    with stalled(ck):
        handle = ck.save(1, state)
        wait_until(lambda: handle._snapshot.has_parcels)
        state[name].data.fill_(5)  # torch counts no change
    error = handle.exception(60)
    assert isinstance(error, TornSnapshot)
    assert error.names == (name,)
    ck.poll()
    assert ck.save(2, state).result(60).step == 2


def test_memory_of_tensors_that_are_gone_is_kept_until_it_is_copied(ck: Checkpointer):
    state = state_of()
    expected, found = copies(state), blanks(state)
    ck.prepare(state)
    busy()
    handle = ck.save(1, state)
    del state
    junk = [torch.full((5_000_000,), 9.0, device="cuda") for _ in range(20)]
    ck.load(handle.result(60), found)
    assert same(found, expected)
    assert len(junk) == 20


def test_hooked_optimizers_update_at_once_and_the_save_is_of_before(ck: Checkpointer):
    parameters = {f"p{i}": torch.nn.Parameter(torch.randn(100_000, device="cuda")) for i in range(30)}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    ck.fence_on(optimizer)
    ck.prepare(parameters)
    for step in range(5):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        expected = {name: p.detach().clone() for name, p in parameters.items()}
        handle = ck.save(step, parameters)
        optimizer.step()
        found = {name: torch.empty_like(p) for name, p in expected.items()}
        ck.load(handle.result(60), found)
        assert same(found, expected)


def test_a_tensor_on_each_of_two_gpus_is_saved_by_one_rank(tmp_path: Path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    state = {f"on{i}": torch.full((4_000_000,), float(i), device=f"cuda:{i}") for i in range(2)}
    with Checkpointer(tmp_path) as ck:
        handle = ck.save(1, state)
        ck.fence()
        overwrite(state)
        found = blanks(state)
        ck.load(handle.result(60), found)
    assert [found[f"on{i}"].unique().item() for i in range(2)] == [0, 1]
