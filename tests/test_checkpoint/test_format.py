"""Shards are plain safetensors files with page-aligned data; digests find what the parts of a file hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import CorruptCheckpoint, UnsupportedFormat
from checkpoint.format import (
    ALIGN_BYTES,
    CODES,
    DIGEST_BYTES,
    DTYPES,
    FORMAT,
    Entry,
    check_version,
    chunk_count,
)
from checkpoint.format import encode_header as header_of


def random_bytes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any dtype, from random bits."""
    generator = torch.Generator().manual_seed(1)
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - {torch.complex128}, key=str), ids=str)
def test_safetensors_reads_a_shard_of_every_dtype(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "a": random_bytes(dtype, 3, 5),
        "scalar": random_bytes(dtype),
        "empty": random_bytes(dtype, 0, 4),
    }
    header = header_of([Entry(k, DTYPES[dtype], tuple(t.shape)) for k, t in tensors.items()], {"format": "pt"})
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    (tmp_path / "shard.safetensors").write_bytes(header + data)
    for name, found in load_file(tmp_path / "shard.safetensors").items():
        assert found.dtype == dtype
        assert found.shape == tensors[name].shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("count", [0, 1, 50, 500])
def test_data_starts_on_a_page(count: int):
    header = header_of([Entry(f"tensor-{i}", "F32", (i,)) for i in range(count)], {})
    assert len(header) % ALIGN_BYTES == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8


def test_every_code_names_one_dtype():
    assert len(CODES) == len(DTYPES)


def test_chunks_are_a_multiple_of_every_element():
    assert all(DIGEST_BYTES % dtype.itemsize == 0 for dtype in DTYPES)
    assert [chunk_count(n) for n in (0, 1, DIGEST_BYTES, DIGEST_BYTES + 1)] == [0, 1, 1, 2]


def test_another_version_is_told_from_another_thing():
    check_version(FORMAT, "COMMIT.json")
    with pytest.raises(UnsupportedFormat, match=r"COMMIT\.json: format checkpoint/2 is not known here"):
        check_version("checkpoint/2", "COMMIT.json")
    for other in ("zip", None, 7):
        with pytest.raises(CorruptCheckpoint, match=r"COMMIT\.json: format: .* is not a format of this package"):
            check_version(other, "COMMIT.json")
