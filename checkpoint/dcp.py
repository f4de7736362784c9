"""Our format for those who save with `torch.distributed.checkpoint`: a StorageWriter and a StorageReader.

    dcp.save(state, storage_writer=StorageWriter("checkpoints", step=100))
    dcp.load(state, storage_reader=StorageReader("checkpoints"))

DCP plans who writes what and tells the ranks' failures to each other; what it plans is written, verified and
committed as a `Checkpointer`'s save: `checkpoint.read`, `latest` and `python -m checkpoint` know it. Every
checkpoint of this package can be loaded so, whoever saved it: the reader shows DCP each tensor as one whole piece
and reshards by itself. Not imported by `import checkpoint`.
"""

from __future__ import annotations

import dataclasses
import io
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint import storage as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.futures import Future

from checkpoint import catalog, objects, retention
from checkpoint.access import open_reader
from checkpoint.commit import Attempt
from checkpoint.distcp import own_name, own_tensor
from checkpoint.errors import CorruptCheckpoint
from checkpoint.manifest import SHARED
from checkpoint.names import ABORT, COMMIT, AttemptName
from checkpoint.reader import Reader
from checkpoint.region import Region
from checkpoint.state import BoxSlice, Piece, pieces_of
from checkpoint.storage import Storage, open_storage
from checkpoint.stream import Stream, write_part
from checkpoint.tree import Packer, Unpacker

_BUFFER_BYTES = 4 << 30
"""Host memory in which a load from remote storage keeps bytes until all are verified."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Role:
    """What the coordinator tells a rank through its plan."""

    run_id: str
    rank: int
    world_size: int


class StorageWriter(dcp.StorageWriter):
    """Saves what DCP plans as a checkpoint of this package. Can be pickled, as `async_save` in a process needs."""

    def __init__(
        self,
        root: str | os.PathLike[str] = "",
        *,
        step: int = 0,
        keep_last: int | None = None,
        allow_pickle: bool = False,
        commit_timeout_s: float = 60.0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Write into a root, which DCP's `checkpoint_id` overrides; every rank gives the same arguments.

        Args:
            root: a path or fsspec URL. Nothing in it is overwritten: a save adds a checkpoint.
            step: of the checkpoint.
            keep_last: after a commit older checkpoints are removed, down to so many; None removes nothing.
            allow_pickle: whether values that are not tensors and not plain may be pickled.
            commit_timeout_s: how long the coordinator looks for the files that other ranks have written.
            storage_options: for the fsspec file system.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last: {keep_last}; allowed are None and integers from 1")
        self.step = step
        """Of the next save; may be set between saves."""
        self._root = os.fspath(root)
        self._keep_last = keep_last
        self._allow_pickle = allow_pickle
        self._timeout_s = commit_timeout_s
        self._options = dict(storage_options or {})
        self._attempt: Attempt | None = None
        self._run_id = ""

    @property
    def checkpoint_id(self) -> str:
        """The root."""
        return self._root

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save."""
        if checkpoint_id:
            self._root = os.fspath(checkpoint_id)
        self._attempt = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raise unless the ranks coordinate."""
        if not kwargs.get("use_collectives", True):
            raise ValueError("use_collectives: False; this writer needs it: one commit is for all ranks")
        if not self._root:
            raise ValueError("StorageWriter: no root; give it one, or pass checkpoint_id to DCP")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank its place in this save."""
        run_id = secrets.token_hex(8)
        return [dataclasses.replace(p, storage_data=_Role(run_id, i, len(plans))) for i, p in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[dcp.WriteResult]]:
        """Write this rank's items, durable when it returns, and vote for them."""
        role: _Role = plan.storage_data
        storage = open_storage(self._root, self._options)
        name = _free_name(storage, self.step, role.run_id)
        attempt = Attempt(storage, name, role.rank, role.world_size, self._timeout_s)
        self._attempt, self._run_id = attempt, role.run_id
        try:
            attempt.begin()
            packer = Packer(allow_pickle=self._allow_pickle)
            values = {i.index.fqn: _value(i, planner, packer) for i in plan.items if i.type is WriteItemType.BYTE_IO}
            streams = [_stream(i, planner) for i in plan.items if i.type is not WriteItemType.BYTE_IO]
            streams += [own_tensor(role.rank, n, tensor) for n, tensor in enumerate(packer.tensors)]
            kept = objects.encode({"values": values, "pickled": packer.pickled}, "values that are not tensors")
            attempt.vote(write_part(storage, attempt.folder, role.rank, streams, kept), "")
        except BaseException as error:
            attempt.abandon(error)
            raise
        done: Future[list[dcp.WriteResult]] = Future()
        done.set_result([dcp.WriteResult(i.index, i.tensor_storage_size() or 0, i.type.name) for i in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[dcp.WriteResult]]) -> None:
        """Commit: from here the checkpoint exists."""
        assert self._attempt is not None
        attempt = self._attempt
        storage = open_storage(self._root, self._options)
        bytes_name = WriteItemType.BYTE_IO.name
        holders = {r.index.fqn: rank for rank, mine in enumerate(results) for r in mine if r.storage_data == bytes_name}
        told = {"dcp": {"values": holders, "planner_data": metadata.planner_data}}
        try:
            shared = objects.to_json(told, "planner_data")
            attempt.commit(self._run_id, shared, lambda: catalog.next_sequence(storage))
        except BaseException as error:
            attempt.abandon(error)
            raise
        if self._keep_last is not None:
            for removal in retention.removable(
                storage, keep_last=self._keep_last, keep_every=0, abandoned=lambda name: False
            ):
                retention.remove(storage, removal)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be a root."""
        return bool(os.fspath(checkpoint_id))


class StorageReader(dcp.StorageReader):
    """Loads a checkpoint of this package through DCP; nothing is overwritten before it is verified."""

    def __init__(
        self,
        place: str | os.PathLike[str] = "",
        *,
        trust_pickle: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Read a checkpoint's folder, or the newest checkpoint of a root; DCP's `checkpoint_id` overrides it.

        Ranks choose each for itself: while another job saves into the root, give a checkpoint's folder.
        `trust_pickle` unpickles what was saved with `allow_pickle`.
        """
        self._place = os.fspath(place)
        self._trust_pickle = trust_pickle
        self._options = dict(storage_options or {})
        self._reader: Reader | None = None

    @property
    def checkpoint_id(self) -> str:
        """The place."""
        return self._place

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load."""
        if checkpoint_id:
            self._place = os.fspath(checkpoint_id)
        self._reader = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint holds, each tensor as one whole piece."""
        if not self._place:
            raise ValueError("StorageReader: no place; give it one, or pass checkpoint_id to DCP")
        self._reader = reader = open_reader(self._place, self._options)
        told = _told(reader)
        known: dict[str, Any] = {name: BytesStorageMetadata() for name in told["values"]}
        for name, owner in reader.table.keys():  # noqa: SIM118  not a mapping
            if owner == SHARED:
                dtype, shape = reader.spec(name)
                whole = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
                known[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [whole])
        return Metadata(known, planner_data=told["planner_data"] or {name: (name,) for name in known})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for; a checkpoint found damaged is marked, so that it is not chosen again."""
        reader = self._reader
        assert reader is not None
        try:
            values = self._values(reader, [i for i in plan.items if i.type is LoadItemType.BYTE_IO])
            _fill(reader, [i for i in plan.items if i.type is LoadItemType.TENSOR], planner)
        except CorruptCheckpoint as error:
            reader.condemn(0, error)
            raise
        for item, value in values:
            planner.load_bytes(item, value)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be a place."""
        return bool(os.fspath(checkpoint_id))

    def _values(self, reader: Reader, items: Sequence[ReadItem]) -> list[tuple[ReadItem, io.BytesIO]]:
        """Return the values that are not tensors, as DCP's planners take them."""
        holders = _told(reader)["values"]
        parts: dict[int, Mapping[str, Any]] = {}
        found = []
        for item in items:
            name = item.storage_index.fqn
            rank = holders[name]
            if rank not in parts:
                parts[rank] = reader.objects(rank)["values"]
            unpacker = Unpacker(partial(_read_inner, reader, rank), trust_pickle=self._trust_pickle)
            value = io.BytesIO()
            torch.save(unpacker.unpack(parts[rank][name], repr(name)), value)
            value.seek(0)
            found.append((item, value))
        return found


def lazy_planner(read: Callable[[str], torch.Tensor]) -> SavePlanner:
    """Return a planner that asks for each tensor when it is written; the state dict's own may be on `meta`."""

    class Lazy(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            return read(write_item.index.fqn)

    return Lazy()


def _free_name(storage: Storage, step: int, run_id: str) -> AttemptName:
    """Return the first attempt of this run that did not end yet: DCP's cached plans bring an old run_id again."""
    ordinal = 0
    while True:
        name = AttemptName.of(step, ordinal, run_id)
        if all(storage.size(f"{name.folder}/{end}") is None for end in (COMMIT, ABORT)):
            return name
        ordinal += 1


def _value(item: WriteItem, planner: SavePlanner, packer: Packer) -> Any:
    """Return a value that is no tensor, without its pickle; DCP hands it over pickled."""
    pickled = planner.resolve_data(item)
    assert isinstance(pickled, io.BytesIO)
    pickled.seek(0)
    # These bytes were made in this process, by the planner, of the caller's own objects.
    return packer.pack(torch.load(pickled, weights_only=False), repr(item.index.fqn))


def _stream(item: WriteItem, planner: SavePlanner) -> Stream:
    data = item.tensor_data
    assert data is not None

    def tensors() -> Iterator[torch.Tensor]:
        found = planner.resolve_data(item)
        assert isinstance(found, torch.Tensor)
        yield found

    box = Region.box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return Stream(item.index.fqn, data.properties.dtype, tuple(data.size), box, tensors)


def _read_inner(reader: Reader, rank: int, number: int) -> torch.Tensor:
    return reader.assemble(own_name(number), rank)


def _told(reader: Reader) -> Mapping[str, Any]:
    """Return what a save through DCP says about itself; of others, that it says nothing."""
    shared = reader.shared
    told = shared.get("dcp") if isinstance(shared, dict) else None
    return told if isinstance(told, dict) else {"values": {}, "planner_data": None}


def _fill(reader: Reader, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
    """Read what the items want into the caller's tensors."""
    wanted: list[Piece] = []
    targets = []
    for item in items:
        name = item.storage_index.fqn
        target = planner.resolve_tensor(item).detach()
        dtype, shape = reader.spec(name)
        # DCP converts dtypes while it loads; so do we, by way of a copy.
        holder = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype, device=target.device)
        wanted += pieces_of({name: BoxSlice(holder, shape, tuple(item.storage_offsets))})
        targets.append((item, target, holder))
    reader.load(wanted, 0, strict=False, buffer_bytes=_BUFFER_BYTES)
    for item, target, holder in targets:
        if holder is not target:
            target.copy_(holder)
        planner.commit_tensor(item, target)
