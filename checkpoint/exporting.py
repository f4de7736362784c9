"""Checkpoints turned into what other tools open: one safetensors file, a Hugging Face folder, torch's DCP.

One tensor is in memory at a time, verified before it is written. A result appears whole or not at all: under a
temporary name until it is, or where a folder cannot be renamed (object stores) with the file without which it does
not open written last.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoint.access import Place, open_reader, select
from checkpoint.errors import InvalidState, StateMismatch, StorageError
from checkpoint.format import DTYPES, Entry
from checkpoint.reader import Reader
from checkpoint.storage import Storage, open_storage
from checkpoint.stream import Item, write_file

Format = Literal["safetensors", "huggingface", "dcp"]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are to do."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_COMPANIONS = (".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt")
"""Endings of what lies beside the weights of a Hugging Face model and is not weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFace:
    """How a Hugging Face folder is written."""

    max_shard_bytes: int = 5_000_000_000
    """A file takes tensors up to this size together; a larger tensor has a file of its own."""
    config_from: str | os.PathLike[str] | None = None
    """A folder whose configuration and tokenizer files are copied; its weights are not."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor to export."""

    source: str
    """Its name in the checkpoint."""
    name: str
    """Its name in the export."""
    saved: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def entry(self) -> Entry:
        return Entry(self.name, DTYPES[self.dtype], self.shape)


def export(
    place: Place,
    out: str | os.PathLike[str],
    names: str | Iterable[str] = "*",
    *,
    format: Format | HuggingFace = "safetensors",
    dtype: torch.dtype | None = None,
    rename: str | Callable[[str], str | None] = "",
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write whole tensors in another format; return the bytes of the tensors written.

    Args:
        place: the checkpoint.
        out: `safetensors`: the file. `huggingface`, `dcp`: a folder that does not exist or is empty.
        names: a glob over the names, or names to be taken literally.
        format: `huggingface` writes `model.safetensors`, or files of at most 5 GB with an index;
            `HuggingFace(...)` says otherwise. `dcp` is what `torch.distributed.checkpoint.load` reads.
        dtype: floating-point tensors are converted to it; others stay as they are.
        rename: a prefix to strip from the names that have it; or what gives a tensor's new name, None to leave
            it out.
        storage_options: for the fsspec file system of `place`.
        progress: told how far it is.

    Raises:
        StateMismatch: no tensor has such a name, or two exported ones would share one.
        CorruptCheckpoint: bytes are not what was committed; nothing is left at `out`.
        StorageError: `out` is in use or cannot be written.
    """
    if dtype is not None and (dtype not in DTYPES or not dtype.is_floating_point):
        raise InvalidState(f"dtype: {dtype}; allowed are the floating-point types that safetensors knows")
    reader = open_reader(place, storage_options)
    tensors = _chosen(reader, names, dtype, rename)
    write = _Writing(reader, sum(t.entry.nbytes for t in tensors), progress)
    if isinstance(format, HuggingFace) or format == "huggingface":
        _huggingface(write, out, tensors, format if isinstance(format, HuggingFace) else HuggingFace())
    elif format == "dcp":
        _dcp(write, out, tensors)
    elif format == "safetensors":
        folder, _, file = os.fspath(out).rpartition("/")
        if not file:
            raise StorageError(f"{os.fspath(out)}: names a folder; name the file in it")
        write.file(open_storage(folder or ("/" if os.fspath(out).startswith("/") else ".")), file, tensors)
    else:
        raise ValueError(f"format: {format!r}; allowed are 'safetensors', 'huggingface' and 'dcp'")
    return write.total


class _Writing:
    """One export under way."""

    def __init__(self, reader: Reader, total: int, progress: Progress | None) -> None:
        self.total = total
        self._reader = reader
        self._progress = progress
        self._done = 0

    def read(self, tensor: _Tensor) -> torch.Tensor:
        """Return a tensor as it is exported."""
        return self._reader.assemble(tensor.source).to(tensor.dtype)

    def add(self, nbytes: int) -> None:
        """Say that so many bytes more were written."""
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self.total)

    def file(self, storage: Storage, path: str, tensors: Sequence[_Tensor]) -> None:
        """Write one safetensors file."""
        write_file(storage, path, [Item(t.entry, partial(self._stream, t)) for t in tensors], self.add)

    def _stream(self, tensor: _Tensor) -> Iterator[torch.Tensor]:
        yield self.read(tensor)


def _chosen(
    reader: Reader,
    names: str | Iterable[str],
    dtype: torch.dtype | None,
    rename: str | Callable[[str], str | None],
) -> list[_Tensor]:
    """Return the tensors asked for, under their new names."""
    chosen: dict[str, _Tensor] = {}
    for source, _ in select(reader, names):
        name = source.removeprefix(rename) if isinstance(rename, str) else rename(source)
        if name is None:
            continue
        saved, shape = reader.spec(source)
        target = dtype if dtype and saved.is_floating_point else saved
        if not name or name == "__metadata__":
            raise StateMismatch(f"{reader.url}: {source!r} would be called {name!r}, which is no name; rename it")
        if name in chosen:
            raise StateMismatch(f"{reader.url}: {chosen[name].source!r} and {source!r} would both be called {name!r}")
        chosen[name] = _Tensor(source, name, saved, target, shape)
    if not chosen:
        raise StateMismatch(f"{reader.url}: holds no tensor that is asked for")
    return list(chosen.values())


@contextlib.contextmanager
def _new_folder(out: str | os.PathLike[str]) -> Iterator[Storage]:
    """Yield the storage of a folder that appears when the block ends well, and leaves nothing otherwise."""
    target = open_storage(out)
    if target.entries(""):
        raise StorageError(f"{target.url}: is not empty; export into a new folder")
    if "://" in target.url:
        try:
            yield target
        except BaseException:
            target.remove("")
            raise
        return
    path = Path(target.url)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield open_storage(temporary)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is left of it if the block ended well


def _huggingface(write: _Writing, out: str | os.PathLike[str], tensors: Sequence[_Tensor], how: HuggingFace) -> None:
    """Write a folder that `from_pretrained` opens, if `config_from` or the caller gives it a config.json."""
    if how.max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: {how.max_shard_bytes}; allowed are integers from 1")
    companions = _companions(how.config_from)
    shards = _packed(tensors, how.max_shard_bytes)
    with _new_folder(out) as storage:
        for name, data in companions.items():
            storage.write(name, data)
        if len(shards) == 1:
            write.file(storage, _WEIGHTS, shards[0])
            return
        weight_map = {}
        for i, shard in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write.file(storage, file, shard)
            weight_map.update({tensor.name: file for tensor in shard})
        index = {"metadata": {"total_size": write.total}, "weight_map": dict(sorted(weight_map.items()))}
        storage.write(_INDEX, json.dumps(index, indent=2).encode())


def _companions(folder: str | os.PathLike[str] | None) -> dict[str, bytes]:
    if folder is None:
        return {}
    source = open_storage(folder, follow_links=True)
    names = [entry.name for entry in source.entries("") if not entry.is_folder]
    kept = [n for n in names if n.endswith(_COMPANIONS) and not n.endswith(".index.json")]
    if not kept:
        raise StorageError(f"{source.url}: config_from: holds no configuration files")
    return {name: source.read(name) for name in kept}


def _packed(tensors: Sequence[_Tensor], max_bytes: int) -> list[list[_Tensor]]:
    """Return the tensors in files, in their order, none larger than `max_bytes` unless it holds a single one."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.entry.nbytes
    return shards


def _dcp(write: _Writing, out: str | os.PathLike[str], tensors: Sequence[_Tensor]) -> None:
    """Let torch write its own format, each tensor read when it is asked for."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    from checkpoint.dcp import lazy_planner

    with _new_folder(out) as storage:
        whole = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors}
        sources = {t.name: t for t in tensors}

        def read(name: str) -> torch.Tensor:
            tensor = write.read(sources[name])
            write.add(tensor.nbytes)
            return tensor

        # Of all tensors that go into one file, torch keeps every one in memory until the file is written.
        is_remote = "://" in storage.url  # what is closed there is durable
        make = FsspecWriter if is_remote else FileSystemWriter
        writer = make(storage.url, single_file_per_rank=False, sync_files=not is_remote)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is meant so
                save(whole, storage_writer=writer, planner=lazy_planner(read), no_dist=True)
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                raise cause from error
            raise
