"""`torch.distributed.checkpoint` with our StorageWriter and StorageReader, on real ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import checkpoint
from checkpoint import BoxSlice, Checkpointer, CorruptCheckpoint, FlatSlice
from tests.ranks import RankFailed, run_ranks
from tests.test_checkpoint.worlds import ranks, same


def model_of(seed: int) -> torch.nn.Module:
    """A model whose sizes no small number of ranks divides."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model under FSDP2 with an optimizer that has a state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, Any]:
    """What DCP users save: DTensors, nested, with numbers and texts among them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {
        "model": weights,
        "optim": moments,
        "seen": seed,
        "note": {"text": ("a", b"b"), "tensor": torch.tensor(seed)},
    }


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights and moments as whole tensors, by flat name."""
    found = {f"model.{name}": tensor.full_tensor() for name, tensor in state["model"].items()}
    for name, entries in state["optim"]["state"].items():
        found.update({f"optim.{name}.{k}": v.full_tensor() for k, v in entries.items() if k != "step"})
    return found


def save_rank(rank: int, world_size: int, root: str, *seeds: int) -> dict[str, torch.Tensor]:
    """Save through DCP after each of some steps, the last time in the background; return the whole tensors."""
    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageWriter

    for seed in seeds:
        state = state_of(*trained(seed), seed)
        writer = StorageWriter(root, step=seed, commit_timeout_s=20)
        if seed == seeds[-1]:
            dcp.async_save(state, storage_writer=writer).result()
        else:
            dcp.save(state, storage_writer=writer)
    return whole(state)


def load_rank(rank: int, world_size: int, root: str, names_from: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Load through DCP into other values; return the whole tensors and the rest."""
    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageReader

    state = state_of(*trained(names_from), 0)
    dcp.load(state, storage_reader=StorageReader(root))
    return whole(state), (state["seen"], state["note"]["text"], int(state["note"]["tensor"]))


def test_fsdp_state_comes_back_on_another_number_of_ranks(tmp_path: Path):
    saved = run_ranks(save_rank, 3, str(tmp_path), 3, 4)[0]
    loaded, rest = run_ranks(load_rank, 2, str(tmp_path), 9)[1]
    assert same(loaded, saved)
    assert rest == (4, ("a", b"b"), 4)
    assert same(checkpoint.read(tmp_path, "model.*"), {n: t for n, t in saved.items() if n.startswith("model.")})
    assert checkpoint.verify(tmp_path).ok
    assert [(info.step, info.world_size) for info in Checkpointer(tmp_path).list()] == [(3, 3), (4, 3)]


def test_whole_tensors_can_be_opened_by_safetensors(tmp_path: Path):
    saved = run_ranks(save_rank, 1, str(tmp_path), 4)[0]
    (info,) = Checkpointer(tmp_path).list()
    found = load_file(Path(info.path) / "r00000.safetensors")
    assert same({n: found[n] for n in saved if n.startswith("model.")}, {n: saved[n] for n in saved if "model" in n})


def read_plain(rank: int, world_size: int, root: str) -> dict[str, torch.Tensor]:
    """Load plain tensors by flat name."""
    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageReader

    state = {"flat": torch.zeros(6, 5), "box": torch.zeros(6, 5), "same": torch.zeros(3, dtype=torch.float64)}
    dcp.load(state, storage_reader=StorageReader(root))
    return state


def test_dcp_loads_what_a_checkpointer_saved(tmp_path: Path):
    torch.manual_seed(0)
    a, b, c = torch.randn(6, 5), torch.randn(6, 5), torch.randn(3)

    def save(rank: int) -> None:
        with Checkpointer(tmp_path, rank=rank, world_size=2, run_id="run") as ck:
            flat = FlatSlice(a.flatten()[13 * rank : 13 + 17 * rank], (6, 5), 13 * rank)
            box = BoxSlice(b[:, 2 * rank : 2 + 3 * rank], (6, 5), (0, 2 * rank))
            ck.save(1, {"flat": flat, "box": box, "same": c}, {"rank": rank})

    ranks(2, save)
    for loaded in run_ranks(read_plain, 2, str(tmp_path)):
        assert same(loaded, {"flat": a, "box": b, "same": c.double()})


def test_nothing_is_overwritten_by_a_damaged_checkpoint(tmp_path: Path):
    run_ranks(save_rank, 2, str(tmp_path), 5, 6)
    newest = Path(Checkpointer(tmp_path).list()[-1].path)
    shard = newest / "r00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[4096] ^= 1
    shard.write_bytes(data)
    unchanged, error, seen = run_ranks(load_damaged, 1, str(tmp_path))[0]
    assert unchanged
    assert "digest does not match" in error
    assert seen == 5


def load_damaged(rank: int, world_size: int, root: str) -> tuple[bool, str, int]:
    """Load twice; return whether the first left the destinations as they were, its error, and what the second read."""
    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageReader

    state = state_of(*trained(9), 0)
    before = {name: tensor.clone() for name, tensor in whole(state).items()}
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(state, storage_reader=StorageReader(root))
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, CorruptCheckpoint)
    unchanged = same(whole(state), before)
    dcp.load(state, storage_reader=StorageReader(root))
    return unchanged, str(error), state["seen"]


def save_objects(rank: int, world_size: int, root: str, allow_pickle: bool) -> str:
    """Save what only pickle keeps; return the error."""
    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageReader, StorageWriter

    state = {"weight": torch.ones(2), "path": Path("a")}
    try:
        dcp.save(state, storage_writer=StorageWriter(root, allow_pickle=allow_pickle))
        dcp.load(state, storage_reader=StorageReader(root))
    except dcp.CheckpointException as error:
        return str(error.failures[0][0])
    return ""


def test_pickle_is_refused_at_both_ends(tmp_path: Path):
    assert (
        "'path': is a pathlib.PosixPath, which can only be pickled"
        in run_ranks(save_objects, 1, str(tmp_path), False)[0]
    )
    assert not Checkpointer(tmp_path).list()
    assert "'path': was pickled" in run_ranks(save_objects, 1, str(tmp_path), True)[0]
    assert len(Checkpointer(tmp_path).list()) == 1


def save_with_a_full_disk(rank: int, world_size: int, root: str) -> None:
    """Save; rank 1 has no space for its shard."""
    import resource

    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageWriter

    state = state_of(*trained(7), 7)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    dcp.save(state, storage_writer=StorageWriter(root, step=7, commit_timeout_s=20))


def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path: Path):
    run_ranks(save_rank, 2, str(tmp_path), 4)
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_with_a_full_disk, 2, str(tmp_path))
    assert caught.value.reports.keys() == {0, 1}
    assert all("raise the limit on file sizes" in report for report in caught.value.reports.values())
    assert [info.step for info in Checkpointer(tmp_path).list()] == [4]


def save_often(rank: int, world_size: int, root: str) -> None:
    """Save three times with DCP's cached plans into one `checkpoint_id`."""
    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageWriter

    writer = StorageWriter(keep_last=2)
    state = state_of(*trained(3), 3)
    for step in (1, 1, 2):
        writer.step = step
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, checkpoint_id=root, storage_writer=writer, planner=planner)


def test_a_root_is_saved_into_again_and_again(tmp_path: Path):
    run_ranks(save_often, 2, str(tmp_path / "root"))
    assert [info.step for info in Checkpointer(tmp_path / "root").list()] == [1, 2]
    assert checkpoint.verify(tmp_path / "root").ok


def test_importing_the_package_does_not_import_dcp():
    code = "import sys, checkpoint; sys.exit('torch.distributed.checkpoint' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
