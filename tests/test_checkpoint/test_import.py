"""Imports: safetensors, torch's DCP, and DeepSpeed's own checkpoints made by real engines."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    InvalidState,
    UnsupportedFormat,
)
from checkpoint.errors import UntrustedPickle
from checkpoint.importing import import_from
from checkpoint.zero import place_each, place_groups
from tests.ranks import run_ranks
from tests.test_checkpoint import engines
from tests.test_checkpoint.worlds import same, values


def shard_of(root: Path) -> dict[str, torch.Tensor]:
    """What plain safetensors sees of the newest checkpoint."""
    return load_file(Path(Checkpointer(root).list()[-1].path) / "r00000.safetensors")


def nothing_in(root: Path) -> bool:
    """Whether a root holds no folder."""
    return not root.exists() or not list(root.iterdir())


def read_or_refused(source: Path, root: Path) -> None:
    """Import, which ends with a sound checkpoint, or with an error of ours and nothing."""
    try:
        info = import_from(source, root)
    except CheckpointError:
        assert nothing_in(root)
    else:
        assert checkpoint.verify(info).ok


# --- safetensors


def test_a_safetensors_file_becomes_a_checkpoint(tmp_path: Path):
    save_file(values(3), tmp_path / "model.safetensors")
    info = import_from(tmp_path / "model.safetensors", tmp_path / "root", step=7)
    assert info.step == 7
    assert same(checkpoint.read(info), values(3))
    assert same(shard_of(tmp_path / "root"), values(3))
    assert checkpoint.verify(info).ok


def test_an_index_says_which_files_belong_together(tmp_path: Path):
    whole = values(3)
    split = {"a.safetensors": ["flat", "box"], "b.safetensors": ["whole", "scalar", "empty"]}
    (tmp_path / "hf").mkdir()
    for file, names in split.items():
        save_file({n: whole[n] for n in names}, tmp_path / "hf" / file)
    save_file({"flat": torch.zeros(1)}, tmp_path / "hf" / "stray.safetensors")
    weight_map = {n: file for file, names in split.items() for n in names}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    import_from(tmp_path / "hf", tmp_path / "root")
    assert same(checkpoint.read(tmp_path / "root"), whole)
    (tmp_path / "hf/model.safetensors.index.json").unlink()
    with pytest.raises(CorruptCheckpoint, match="holds tensor 'flat' twice"):
        import_from(tmp_path / "hf", tmp_path / "again")
    assert nothing_in(tmp_path / "again")


def test_what_export_writes_import_reads(tmp_path: Path):
    with Checkpointer(tmp_path / "one") as ck:
        ck.save(1, values(5))
    checkpoint.export(tmp_path / "one", tmp_path / "hf", format=checkpoint.HuggingFace(max_shard_bytes=1000))
    import_from(tmp_path / "hf", tmp_path / "two")
    assert same(checkpoint.read(tmp_path / "two"), values(5))


def test_checkpoints_of_this_package_are_not_imported_again(tmp_path: Path):
    with Checkpointer(tmp_path / "one") as ck:
        ck.save(1, values(5))
    for source in (tmp_path / "one", Checkpointer(tmp_path / "one").list()[0].path):
        with pytest.raises(InvalidState, match="is of this package already"):
            import_from(source, tmp_path / "two")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "no readable header"),
        (b"[]", "no readable header"),
        (b'{"a": 1}', "malformed"),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}', "lies at"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "lies at"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', "has 4 bytes, its shape needs 36"),
        (b'{"a": {"dtype": "F32", "shape": [9223372036854775808, 0], "data_offsets": [0, 0]}}', "no tensor can have"),
    ],
)
def test_a_malformed_safetensors_file_is_refused(tmp_path: Path, header: bytes, message: str):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CorruptCheckpoint, match=message):
        import_from(tmp_path / "x.safetensors", tmp_path / "root")
    assert nothing_in(tmp_path / "root")


@settings(max_examples=60)
@given(data=st.data())
def test_a_safetensors_file_with_bytes_changed_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int8)}, folder / "x.safetensors")
    content = bytearray((folder / "x.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_refused(folder / "x.safetensors", folder / "root")


def test_a_header_larger_than_its_file_is_refused(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptCheckpoint, match="cut short"):
        import_from(tmp_path / "x.safetensors", tmp_path / "root")


def test_links_are_followed_as_the_hub_lays_its_cache_out(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(values(3), tmp_path / "blobs/5f1e")
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/5f1e")
    for source in (tmp_path / "snapshot", tmp_path / "snapshot/model.safetensors"):
        info = import_from(source, tmp_path / "root")
        assert same(checkpoint.read(info), values(3))


def test_a_model_without_what_zero_saves_is_refused(tmp_path: Path):
    torch.save({}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for model in ([1, 2], {"module": {}}):
        torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
        with pytest.raises(CorruptCheckpoint, match="is not what DeepSpeed"):
            import_from(tmp_path, tmp_path / "root")


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path):
    save_file(values(3), tmp_path / "secret.safetensors")
    (tmp_path / "hf").mkdir()
    save_file(values(3), tmp_path / "hf/a.safetensors")
    index = {"weight_map": {"flat": "../secret.safetensors"}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match="which the folder does not hold"):
        import_from(tmp_path / "hf", tmp_path / "root")


def test_a_folder_of_nothing_known_is_told_so(tmp_path: Path):
    with pytest.raises(CheckpointNotFound, match="is neither a safetensors file"):
        import_from(tmp_path, tmp_path / "root")


# --- torch DCP


def dcp_state() -> dict[str, Any]:
    """A state over a mesh: rows, columns, whole, an optimizer-like tree, numbers and texts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place = {"flat": [Shard(0)], "box": [Shard(1)], "whole": [Replicate()]}
    whole = values(4)
    state: dict[str, Any] = {n: distribute_tensor(whole[n], mesh, p) for n, p in place.items()}
    inner = {"exp_avg": distribute_tensor(whole["flat"], mesh, [Shard(0)]), "step": torch.tensor(3.0)}
    return {"model": state, "optim": {"state": inner, "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99)}]}}


def save_dcp(rank: int, world_size: int, out: str) -> None:
    """Save with torch's own writer."""
    import torch.distributed.checkpoint as dcp

    dcp.save(dcp_state(), checkpoint_id=out)


def load_dcp(rank: int, world_size: int, root: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Load through our reader what was imported; return some of it whole."""
    import torch.distributed.checkpoint as dcp

    from checkpoint.dcp import StorageReader

    state = dcp_state()
    for tensor in [*state["model"].values(), *state["optim"]["state"].values()]:
        tensor.fill_(-9)
    state["optim"]["param_groups"][0].update(lr=0, betas=())
    dcp.load(state, storage_reader=StorageReader(root))
    whole = {n: t.full_tensor() for n, t in state["model"].items()}
    return whole, state["optim"]["param_groups"]


@pytest.fixture(scope="module")
def dcp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `torch.distributed.checkpoint.save` wrote on three ranks."""
    folder = tmp_path_factory.mktemp("dcp")
    run_ranks(save_dcp, 3, str(folder))
    return folder


def test_a_dcp_folder_becomes_a_checkpoint(dcp_folder: Path, tmp_path: Path):
    import_from(dcp_folder, tmp_path)
    whole = {n: t for n, t in values(4).items() if n in ("flat", "box", "whole")}
    assert same(checkpoint.read(tmp_path, "model.*"), {f"model.{n}": t for n, t in whole.items()})
    assert torch.equal(shard_of(tmp_path)["model.flat"], whole["flat"])
    loaded, groups = run_ranks(load_dcp, 2, str(tmp_path))[1]
    assert same(loaded, whole)
    assert groups == [{"lr": 0.5, "betas": (0.9, 0.99)}]


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_not_run(dcp_folder: Path, tmp_path: Path):
    shutil.copytree(dcp_folder, tmp_path / "dcp")
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(UntrustedPickle, match=r"\.metadata: needs posix\.mkdir, which may run code"):
        import_from(tmp_path / "dcp", tmp_path / "root")
    assert not (tmp_path / "ran").exists()
    assert nothing_in(tmp_path / "root")


def fields_of(thing: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside DCP's metadata."""
    if isinstance(thing, dict):
        items: Any = list(thing.items())
    elif isinstance(thing, list):
        items = list(enumerate(thing))
    else:
        items = list(vars(thing).items()) if hasattr(thing, "__dict__") else []
    for key, value in items:
        yield (*path, key)
        yield from fields_of(value, (*path, key))


def put(thing: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set the value at a place inside DCP's metadata."""
    for key in path[:-1]:
        thing = thing[key] if isinstance(thing, dict | list) else getattr(thing, key)
    if isinstance(thing, dict | list):
        thing[path[-1]] = value
    else:
        object.__setattr__(thing, path[-1], value)


ODD = [
    None,
    -1,
    3,
    1 << 60,
    0.5,
    "",
    "../../secret",
    b"x",
    [],
    [7],
    {},
    (),
    (2, 2),
    (-1, 1 << 60),
    torch.float16,
    {1, 2},
]


@settings(max_examples=60)
@given(data=st.data())
def test_dcp_metadata_that_makes_no_sense_is_read_or_refused(
    dcp_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(dcp_folder, folder / "dcp")
    metadata = pickle.loads((dcp_folder / ".metadata").read_bytes())
    place = data.draw(st.sampled_from(list(fields_of(metadata))))
    put(metadata, place, data.draw(st.sampled_from(ODD)))
    try:
        pickled = pickle.dumps(metadata)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return  # DCP's own classes cannot even be written so
    (folder / "dcp/.metadata").write_bytes(pickled)
    read_or_refused(folder / "dcp", folder / "root")


def test_a_dcp_file_that_was_cut_short_is_found(dcp_folder: Path, tmp_path: Path):
    shutil.copytree(dcp_folder, tmp_path / "dcp")
    shard = tmp_path / "dcp/__1_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CorruptCheckpoint, match=r"lies outside of '__1_0\.distcp'"):
        import_from(tmp_path / "dcp", tmp_path / "root")


def test_a_dcp_item_that_is_no_tensor_file_is_told_from_an_untrusted_one(dcp_folder: Path, tmp_path: Path):
    shutil.copytree(dcp_folder, tmp_path / "dcp")
    for shard in (tmp_path / "dcp").glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CorruptCheckpoint, match=r"\.distcp: "):
        import_from(tmp_path / "dcp", tmp_path / "root")


# --- DeepSpeed


ZERO = {"1": (1, torch.bfloat16), "2": (2, torch.bfloat16), "3": (3, torch.bfloat16), "3 in fp32": (3, torch.float32)}
"""Stages and the types that the model computes with."""


def save_zero(rank: int, world_size: int, out: str) -> None:
    """Train, and save with DeepSpeed and, as the truth, with a Checkpointer what the trainer finds in its memory."""
    for case, (stage, dtype) in ZERO.items():
        engine = engines.engine_of(stage, dtype)
        engines.train(engine, 3)
        client_state = {"note": {"a": (1, None)}, "rng": torch.arange(5)}
        engine.save_checkpoint(f"{out}/{case}/deepspeed", client_state=client_state)
        with Checkpointer(f"{out}/{case}/truth", rank=rank, world_size=world_size, run_id=case) as ck:
            ck.save(3, engines.slices(engine, stage))
        engine.destroy()


def save_fp32_gradients(rank: int, world_size: int, out: str) -> None:
    """As save_zero, of the optimizer that keeps gradients in fp32; the truth is what DeepSpeed gathers."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = engines.engine_of(1, fp32_gradients=True)
    engines.train(engine, 3)
    engine.save_checkpoint(f"{out}/deepspeed")
    truth = {}
    for name, weight in engine.module.named_parameters():
        if weight.requires_grad:
            truth[f"optimizer.master.{name}"] = safe_get_full_fp32_param(weight).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                truth[f"optimizer.{key}.{name}"] = safe_get_full_optimizer_state(weight, key).clone()
    with Checkpointer(f"{out}/truth", rank=rank, world_size=world_size, run_id="run") as ck:
        ck.save(3, truth)
    engine.destroy()


@pytest.fixture(scope="module")
def zero_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks saved under every stage."""
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(save_zero, 3, str(folder), timeout_s=180)
    return folder


@pytest.mark.parametrize("case", ZERO)
def test_a_deepspeed_folder_becomes_a_checkpoint(zero_folders: Path, tmp_path: Path, case: str):
    shutil.copytree(zero_folders / case, tmp_path, dirs_exist_ok=True)
    info = import_from(tmp_path / "deepspeed", tmp_path / "root")
    truth, found = checkpoint.read(tmp_path / "truth"), checkpoint.read(info)
    assert torch.equal(found.pop("deepspeed.rng"), torch.arange(5))
    assert torch.equal(found.pop("model.tied.weight"), truth["model.second.weight"])
    assert same(dict(sorted(found.items())), dict(sorted(truth.items())))
    assert (info.step, info.shared["deepspeed"]["note"]) == (3, {"a": (1, None)})
    optimizer = info.shared["deepspeed"]["optimizer"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.1, 0.0]
    assert {state["step"] for state in optimizer["state"]} == {3.0}
    assert same(shard_of(tmp_path / "root"), checkpoint.read(info))

    tag = tmp_path / "deepspeed/global_step3"
    assert same(checkpoint.read(import_from(tag, tmp_path / "tag")), checkpoint.read(info))
    max(tag.glob("*_optim_states.pt")).unlink()
    with pytest.raises(CorruptCheckpoint, match="ranks saved optimizer states"):
        import_from(tag, tmp_path / "missing")
    (tag / "layer_00-model_states.pt").touch()
    with pytest.raises(UnsupportedFormat, match="of no kind that is imported"):
        import_from(tag, tmp_path / "missing")
    assert nothing_in(tmp_path / "missing")


def test_a_deepspeed_folder_with_gradients_in_fp32_becomes_a_checkpoint(tmp_path: Path):
    run_ranks(save_fp32_gradients, 2, str(tmp_path), timeout_s=180)
    assert list(tmp_path.glob("deepspeed/*/bf16_zero_pp_rank_1_*"))
    found = checkpoint.read(import_from(tmp_path / "deepspeed", tmp_path / "root"), "optimizer.*")
    assert same(dict(sorted(found.items())), dict(sorted(checkpoint.read(tmp_path / "truth").items())))


def test_a_deepspeed_file_that_runs_code_is_not_run(tmp_path: Path):
    (tmp_path / "ds").mkdir()
    torch.save({"module": Bomb(tmp_path / "ran")}, tmp_path / "ds/mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "ds/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(UntrustedPickle, match=r"needs posix\.mkdir, which may run code"):
        import_from(tmp_path / "ds", tmp_path / "root")
    assert not (tmp_path / "ran").exists()


def test_places_of_groups_skip_padding():
    groups = [{"a": (3,), "b": (2, 2)}, {"c": (1,)}]
    a, b, c = place_groups(groups, [[1, 0], [0]], [4, 1], 2)
    assert [(cut.rank, cut.vector, cut.start, cut.numel) for cut in a.cuts] == [(0, 0, 0, 3)]
    assert [(cut.rank, cut.vector, cut.start, cut.numel) for cut in b.cuts] == [(1, 0, 0, 4)]
    assert [(cut.rank, cut.vector, cut.start, cut.numel) for cut in c.cuts] == [(0, 1, 0, 1)]
    with pytest.raises(CorruptCheckpoint, match="group 0 has 6 elements, its parameters need 8"):
        place_groups(groups, [[1, 0], [0]], [3, 1], 2)


def test_places_of_single_parameters_leave_padding_out():
    a, b = place_each([{"a": (5,), "b": (1,)}], 3)
    assert [(cut.rank, cut.start, cut.numel) for cut in a.cuts] == [(0, 0, 2), (1, 0, 2), (2, 0, 1)]
    assert [(cut.rank, cut.start, cut.numel) for cut in b.cuts] == [(0, 2, 1)]
