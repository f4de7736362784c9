"""Exports: one safetensors file, a Hugging Face folder, torch's DCP."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from checkpoint import Checkpointer, CorruptCheckpoint, StateMismatch, StorageError
from checkpoint.access import open_reader
from checkpoint.errors import InvalidState
from checkpoint.exporting import Format, HuggingFace, export
from tests.test_checkpoint.worlds import same, saved_by, values


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one checkpoint, saved by two ranks."""
    saved_by(tmp_path / "root", 2)
    return tmp_path / "root"


def damage(root: Path, name: str) -> None:
    """Flip a bit of a tensor."""
    reader = open_reader(root)
    row = reader.table.rows(name)[0]
    shard = Path(reader.url) / row.file
    data = bytearray(shard.read_bytes())
    data[row.byte_start] ^= 1
    shard.write_bytes(data)


def left_in(folder: Path) -> list[str]:
    """Names in a folder other than the root's."""
    return sorted(p.name for p in folder.iterdir() if p.name != "root")


def test_a_file_holds_whole_tensors(root: Path, tmp_path: Path):
    out = tmp_path / "new" / "all.safetensors"
    assert export(root, out) == sum(t.nbytes for t in values().values())
    assert same(load_file(out), values())
    export(root, f"file://{out}", "[fw]*")
    assert load_file(out).keys() == {"flat", "whole"}


def test_floating_point_tensors_are_converted_and_others_are_not(root: Path, tmp_path: Path):
    export(root, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    expected = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in values().items()}
    assert same(load_file(tmp_path / "half.safetensors"), expected)


def test_a_dtype_that_is_not_floating_point_is_refused(root: Path, tmp_path: Path):
    with pytest.raises(InvalidState, match="floating-point"):
        export(root, tmp_path / "out", dtype=torch.int32)


def test_a_prefix_is_stripped(root: Path, tmp_path: Path):
    export(root, tmp_path / "out", "flat", rename="fl")
    assert list(load_file(tmp_path / "out")) == ["at"]


def test_names_are_mapped_and_left_out(root: Path, tmp_path: Path):
    export(root, tmp_path / "out", rename=lambda name: f"x.{name}" if "a" in name else None)
    assert set(load_file(tmp_path / "out")) == {"x.flat", "x.scalar"}


def test_two_tensors_cannot_get_one_name(root: Path, tmp_path: Path):
    with pytest.raises(StateMismatch, match="would both be called 'same'"):
        export(root, tmp_path / "out", rename=lambda name: "same")


def test_nothing_to_export_is_an_error(root: Path, tmp_path: Path):
    with pytest.raises(StateMismatch, match="no tensor that is asked for"):
        export(root, tmp_path / "out", rename=lambda name: None)


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "dcp"])
def test_nothing_is_left_of_an_export_that_fails(root: Path, tmp_path: Path, format: Format):
    damage(root, "flat")
    with pytest.raises(CorruptCheckpoint, match="digest does not match"):
        export(root, tmp_path / "out", format=format)
    assert not left_in(tmp_path)


def test_an_export_that_fails_leaves_the_file_that_was_there(root: Path, tmp_path: Path):
    out = tmp_path / "all.safetensors"
    export(root, out)
    before = out.read_bytes()
    damage(root, "flat")
    with pytest.raises(CorruptCheckpoint):
        export(root, out)
    assert out.read_bytes() == before
    assert left_in(tmp_path) == ["all.safetensors"]


def test_an_export_into_nowhere_is_refused(root: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/out\.safetensors: cannot create: Not a directory"):
        export(root, tmp_path / "file" / "out.safetensors")
    with pytest.raises(StorageError, match="names a folder"):
        export(root, f"{tmp_path}/")


def test_shards_hold_no_more_than_told(root: Path, tmp_path: Path):
    export(root, tmp_path / "hf", format=HuggingFace(max_shard_bytes=1000))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(tmp_path / "hf" / file)
        assert sum(t.nbytes for t in shard.values()) <= 1000 or len(shard) == 1
        assert {index["weight_map"][name] for name in shard} == {file}
        found.update(shard)
    assert same(dict(sorted(found.items())), dict(sorted(values().items())))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in values().values())


def test_configuration_files_are_copied_through_links(root: Path, tmp_path: Path):
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/config.json").symlink_to(tmp_path / "blob")
    export(root, tmp_path / "hf", format=HuggingFace(config_from=tmp_path / "snapshot"))
    assert not (tmp_path / "hf/config.json").is_symlink()
    assert (tmp_path / "hf/config.json").read_text() == "{}"


def test_a_folder_in_use_is_refused(root: Path, tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    with pytest.raises(StorageError, match="is not empty"):
        export(root, tmp_path / "hf", format="huggingface")
    assert left_in(tmp_path / "hf") == ["config.json"]


def test_a_folder_in_an_object_store_has_its_index_last(root: Path):
    out = "memory://exports/model"
    export(root, out, format=HuggingFace(max_shard_bytes=1000))
    fs = fsspec.filesystem("memory")
    written = {p.rpartition("/")[2]: fs.created(p) for p in fs.find("/exports/model")}
    assert max(written, key=lambda name: written[name]) == "model.safetensors.index.json"
    fs.rm("/exports", recursive=True)


def test_transformers_opens_what_was_exported(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=48
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "config")
    (tmp_path / "config/model.safetensors").write_text("weights that are not copied")
    with Checkpointer(tmp_path / "root") as ck:
        ck.save(1, {f"net.{name}": tensor for name, tensor in model.state_dict().items()})
    how = HuggingFace(max_shard_bytes=8000, config_from=tmp_path / "config")
    export(tmp_path / "root", tmp_path / "hf", "net.*", format=how, rename="net.")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert same(loaded.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "remote"])
def test_dcp_opens_what_was_exported(root: Path, tmp_path: Path, is_remote: bool):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    out = f"memory://{uuid.uuid4()}/dcp" if is_remote else str(tmp_path / "dcp")
    export(root, out, format="dcp", dtype=torch.float32)
    expected = {n: t.float() if t.is_floating_point() else t for n, t in values().items()}
    found = {name: torch.full_like(tensor, -9) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=FsspecReader(out) if is_remote else None, checkpoint_id=out, no_dist=True)
    assert same(found, expected)


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "dcp"])
def test_progress_is_told(root: Path, tmp_path: Path, format: Format):
    told: list[tuple[int, int]] = []
    nbytes = export(root, tmp_path / "out", format=format, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (nbytes, nbytes)
    assert sorted(told) == told
