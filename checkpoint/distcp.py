"""Folders that `torch.distributed.checkpoint.save` wrote, as the source of an import. Does not import DCP."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from checkpoint.errors import CorruptCheckpoint, UnsupportedFormat
from checkpoint.pickles import Record, load_metadata, load_torch
from checkpoint.region import Region, Shape
from checkpoint.storage import Source, Storage
from checkpoint.stream import Contents, Stream
from checkpoint.tree import Packer

METADATA = ".metadata"
_READ_BYTES = 1 << 20
"""Small reads of an item, its directory and the like, are made together up to this."""
_MODULE = "torch.distributed.checkpoint"
_CLASSES = (
    *(
        f"{_MODULE}.metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_MODULE}.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)


@dataclass(frozen=True, slots=True)
class _Blob:
    """Where one item lies: what torch.save wrote of it, inside a file."""

    file: str
    start: int
    nbytes: int


def contents(storage: Storage, *, trust_pickle: bool) -> Contents:
    """Return what a DCP folder holds. Raises CorruptCheckpoint, UntrustedPickle, UnsupportedFormat."""
    source = f"{storage.url}/{METADATA}"
    metadata = load_metadata(io.BytesIO(storage.read(METADATA)), source, _CLASSES, trust=trust_pickle)
    try:
        known: Mapping[str, Any] = dict(metadata.state_dict_metadata)
        blobs = _blobs(storage, metadata.storage_data, source)
        streams: list[Stream] = []
        values: dict[str, Any] = {}
        packer = Packer(allow_pickle=trust_pickle)
        for name, entry in known.items():
            if hasattr(entry, "chunks"):
                streams += _streams(storage, name, entry, blobs, trust_pickle)
            else:
                value = _load(storage, blobs[name, None], trust_pickle)
                values[name] = packer.pack(value, repr(name))
        planner_data = getattr(metadata, "planner_data", None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"{source}: does not describe a DCP checkpoint ({error!r})") from error
    streams += [own_tensor(0, n, tensor) for n, tensor in enumerate(packer.tensors)]
    return Contents(
        step=0,
        streams=streams,
        objects={"values": values, "pickled": packer.pickled},
        shared={"dcp": {"values": dict.fromkeys(values, 0), "planner_data": planner_data}},
    )


def own_tensor(rank: int, number: int, tensor: torch.Tensor) -> Stream:
    """Return a tensor that was found inside a value that is none, as a rank's own."""
    whole = Stream.of(own_name(number), tensor.detach())
    return Stream(whole.name, whole.dtype, whole.global_shape, whole.region, whole.tensors, owner=rank)


def own_name(number: int) -> str:
    """Return what `own_tensor` calls a tensor."""
    return f"tensor {number} of the values"


def _blobs(storage: Storage, storage_data: Any, source: str) -> dict[tuple[str, Shape | None], _Blob]:
    files = {entry.name: entry.nbytes for entry in storage.entries("") if not entry.is_folder}
    blobs = {}
    for index, info in storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise UnsupportedFormat(f"{source}: {index.fqn!r} went through stream transforms; save it without them")
        blob = _Blob(info.relative_path, info.offset, info.length)
        if type(blob.start) is not int or type(blob.nbytes) is not int or type(index.fqn) is not str:
            raise ValueError(f"{index.fqn!r} lies at {blob}")
        if blob.file not in files:
            raise CorruptCheckpoint(f"{source}: {index.fqn!r} lies in {blob.file!r}, which the folder does not hold")
        if min(blob.start, blob.nbytes) < 0 or blob.start + blob.nbytes > files[blob.file]:
            raise CorruptCheckpoint(f"{source}: {index.fqn!r} lies outside of {blob.file!r}; was it cut short?")
        offset = getattr(index, "offset", None)
        blobs[index.fqn, None if offset is None else tuple(offset)] = blob
    return blobs


def _streams(
    storage: Storage, name: str, entry: Record, blobs: Mapping[tuple[str, Shape | None], _Blob], trust: bool
) -> Iterator[Stream]:
    """Yield a tensor as one whole if its chunks follow each other in row-major order, else chunk by chunk."""
    shape = _shape(entry.size)  # type: ignore[attr-defined]  # of a Record
    properties = entry.properties  # type: ignore[attr-defined]
    dtype = properties.state[0] if isinstance(properties, Record) else properties.dtype
    chunks = sorted((_shape(c.offsets), _shape(c.sizes)) for c in entry.chunks)  # type: ignore[attr-defined]
    problems = [Region.box(*chunk).problem(shape) for chunk in chunks]
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype) or any(problems):
        raise ValueError(f"{name!r}: {next(filter(None, problems), 'has no name or dtype')}")
    chunks = [(offset, size) for offset, size in chunks if math.prod(size)] or chunks[:1]
    read = {offset: partial(_read, storage, name, blobs[name, offset], (dtype, size), trust) for offset, size in chunks}

    def joined() -> Iterator[torch.Tensor]:
        for offset, _ in chunks:
            yield from read[offset]()

    if _are_rows(shape, chunks):
        yield Stream(name, dtype, shape, Region.whole(shape), joined)
        return
    for offset, size in chunks:
        yield Stream(name, dtype, shape, Region.box(offset, size), read[offset])


def _shape(value: Any) -> Shape:
    shape = tuple(value)
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{value!r} is no shape")
    return shape


def _are_rows(shape: Shape, chunks: Sequence[tuple[Shape, Shape]]) -> bool:
    """Whether chunks, sorted by offset, are consecutive runs of whole rows that make up the tensor."""
    position = 0
    for offset, size in chunks:
        if not shape:
            return len(chunks) == 1
        if offset != (position, *(0,) * (len(shape) - 1)) or size[1:] != shape[1:]:
            return False
        position += size[0]
    return not shape or position == shape[0]


def _read(
    storage: Storage, name: str, blob: _Blob, expected: tuple[torch.dtype, Shape], trust: bool
) -> Iterator[torch.Tensor]:
    tensor = _load(storage, blob, trust)
    dtype, size = expected
    if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, size):
        raise CorruptCheckpoint(f"{storage.url}/{blob.file}: does not hold {name!r} as {METADATA} describes it")
    yield tensor


def _load(storage: Storage, blob: _Blob, trust: bool) -> Any:
    with storage.open(blob.file) as data:
        window = io.BufferedReader(_Window(data, blob.start, blob.nbytes), _READ_BYTES)
        return load_torch(window, f"{storage.url}/{blob.file}", {}, trust=trust)


class _Window(io.RawIOBase):
    """A part of a file as a file, read as it is asked for."""

    def __init__(self, source: Source, start: int, nbytes: int) -> None:
        super().__init__()
        self._source = source
        self._start = start
        self._nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._nbytes - self._position)]
        count = self._source.read_into(self._start + self._position, view) if view.nbytes else 0
        self._position += count
        return count
