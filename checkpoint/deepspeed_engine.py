"""DeepSpeed's `save_checkpoint` and `load_checkpoint` through this package: lazy, verified, committed or not there.

    engine, *_ = deepspeed.initialize(...)
    engine.checkpoint_engine = checkpoint_engine(engine)
    engine.save_checkpoint("run", save_latest=False)  # `latest` is written when the checkpoint is durable

DeepSpeed 0.19.8 asks its `engine.checkpoint_engine` to `create` a checkpoint, to `save` some state dicts under file
names, and to `commit`. Here the state dicts of a rank become one part of one save into the root `run`: tensors go
into the rank's shard, the rest becomes typed JSON. Under DeepSpeed's file names lie a few bytes that say which
tag is meant, because it looks for these files when it loads.

With `save_latest=False` the call returns when everything is referred to. The copies run beside the next forward and
backward: before the optimizer's step DeepSpeed asks a decoupled engine whether there is something to commit, and
there this one fences, reports the errors of saves before, and names in `latest` what has become durable. With
`save_latest=True` DeepSpeed itself writes `latest` when `commit` returns: then the call waits until the checkpoint
is durable. Either way `latest` never names a checkpoint that is not.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from checkpoint import catalog, objects
from checkpoint.checkpointer import Checkpointer
from checkpoint.config import CheckpointConfig
from checkpoint.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, SaveAborted, UnsupportedFormat
from checkpoint.handle import SaveHandle
from checkpoint.reader import Reader
from checkpoint.state import RankLocal
from checkpoint.storage import open_storage
from checkpoint.tree import Packer, Unpacker

_FORMAT = "checkpoint.deepspeed_engine/1"
_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What DeepSpeed puts into its state dicts beside tensors and plain values."""
_LIVE = frozenset({"module", "optimizer", "optimizer_state_dict", "frozen_param_fragments"})
"""Entries of its state dicts that refer to what only the optimizer's step mutates; the rest is copied at once."""
_KEEP_ALL = 1 << 62

_log = logging.getLogger(__name__)


def checkpoint_engine(
    engine: Any, *, config: CheckpointConfig | None = None, allow_pickle: bool = False, trust_pickle: bool = False
) -> Any:
    """Return what takes the place of a DeepSpeed engine's `checkpoint_engine`; every rank calls it.

    Args:
        engine: what `deepspeed.initialize` returned.
        config: of the saves; by default every checkpoint stays, as DeepSpeed has it. With a `keep_last`, older tags
            can no longer be loaded.
        allow_pickle: whether values that only pickle keeps (in `client_state`, schedulers) may be pickled; the
            checkpoint's objects then list them under `pickled`.
        trust_pickle: whether a load may unpickle what was saved so.

    Raises:
        ValueError: the engine keeps state where it is not told to its checkpoint engine.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    if engine.zero_nvme_offload_optimizer() or engine.use_node_local_storage():
        raise ValueError(
            "checkpoint_engine: with the optimizer on NVMe, or node-local storage, DeepSpeed copies files by itself, "
            "which no commit covers; set neither"
        )
    kind = type("VerifiedCheckpointEngine", (_Engine, CheckpointEngine), {"__doc__": _Engine.__doc__})
    made: Any = kind(engine, config or CheckpointConfig(keep_last=_KEEP_ALL))
    made.allow_pickle, made.trust_pickle = allow_pickle, trust_pickle
    return made


class _Engine:
    """What DeepSpeed calls; the other methods of its base class stay as they are."""

    allow_pickle: bool
    trust_pickle: bool

    def __init__(self, engine: Any, config: CheckpointConfig) -> None:
        self.name = "checkpoint"
        self._engine = engine
        self._config = config
        self._root = ""
        self._checkpointer: Checkpointer | None = None
        self._files: dict[str, Any] = {}
        self._is_saving = False
        self._pending: list[tuple[SaveHandle, str]] = []

    # What DeepSpeed asks while it saves

    def create(self, info: Any) -> None:
        """Begin a checkpoint."""
        root = os.path.abspath(info.save_dir)
        if root != self._root or self._checkpointer is None:
            self.cleanup()
            self._root = root
            self._checkpointer = Checkpointer(
                root, config=self._config, rank=dist.get_rank(), world_size=dist.get_world_size(), run_id=self._run_id()
            )
        self._checkpointer.fence()  # should this save fail half-way, the next step has no fence
        self._settle()
        self._files = {}
        self._is_saving = True

    def save(self, state_dict: Any, path: str) -> None:
        """Take a state dict; nothing is copied of what only the optimizer mutates."""
        if os.path.dirname(os.path.abspath(path)) == self._root:
            _save_for_others(state_dict, path)
            return
        self._files[path] = state_dict

    def commit(self, info: Any) -> bool:
        """Start the save of all that was taken; wait for its commit if DeepSpeed will write `latest` next.

        Raises:
            InvalidState: a state dict holds what is not kept; on the other ranks SaveAborted.
        """
        self._is_saving = False
        files, self._files = self._files, {}
        packer = Packer(_CLASSES, allow_pickle=self.allow_pickle)
        error: CheckpointError | None = None
        try:
            packed = {
                os.path.basename(path): packer.pack(_owned(sd), os.path.basename(path)) for path, sd in files.items()
            }
            for path in files:
                self._point(path, info.tag)
        except CheckpointError as found:  # told to every rank before it is raised on this one
            packed, error = {}, found
        if not self._agree(bool(files), error):
            return True  # no rank had any: all was for others
        assert self._checkpointer is not None
        tensors = {name: RankLocal(tensor) for name, tensor in zip(packer.names, packer.tensors, strict=True)}
        handle = self._checkpointer.save(
            int(self._engine.global_steps),
            tensors,
            {"files": packed, "names": packer.names, "pickled": packer.pickled},
            shared={"deepspeed": {"tag": info.tag}},
        )
        if info.save_latest:
            handle.result()
        else:
            self._pending.append((handle, info.tag))
        return True

    # What it asks before each step of the optimizer, and at the end

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed asks before each step; not while it saves: then it is to call `commit` at once."""
        return not self._is_saving

    def get_commit_info(self) -> None:
        """Let the optimizer step: fence, report errors, name what is durable. There is nothing left to commit."""
        if self._checkpointer is not None:
            self._checkpointer.fence()
            self._settle()

    def cleanup(self) -> None:
        """Wait for the saves under way, report their errors, name the last in `latest`. Idempotent."""
        if self._checkpointer is not None:
            checkpointer, self._checkpointer = self._checkpointer, None
            try:
                checkpointer.close()
            finally:
                self._name_durable(self._pending)

    def preserves_storage_sharing(self) -> bool:
        """Whether a view is saved with all that its storage holds: no, so DeepSpeed need not copy tensors first."""
        return False

    # What it asks while it loads

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return a state dict, verified, on the CPU or where `map_location` names a device.

        Raises:
            CheckpointNotFound: the tag was never committed. CorruptCheckpoint: bytes are not what was committed;
            UnsupportedFormat: another engine wrote the file.
        """
        pointer = _pointer(path)
        reader = _find(os.path.normpath(os.path.join(os.path.dirname(path), pointer["root"])), pointer["tag"])
        rank = pointer["rank"]
        try:
            kept = reader.objects(rank)
            names = kept["names"]
            device = map_location if isinstance(map_location, str | torch.device) else None

            def tensor(number: int) -> torch.Tensor:
                found = reader.assemble(names[number], rank)
                return found if device is None else found.to(device)

            unpacker = Unpacker(tensor, _CLASSES, trust_pickle=self.trust_pickle)
            return unpacker.unpack(kept["files"][os.path.basename(path)], os.path.basename(path))
        except KeyError as error:
            raise CorruptCheckpoint(f"{reader.url}: does not hold {os.path.basename(path)} of rank {rank}") from error
        except CorruptCheckpoint as error:
            reader.condemn(rank, error)
            raise

    # The rest is this class's own

    def _run_id(self) -> str:
        """Return a new text that is equal on all ranks."""
        number = torch.tensor([secrets.randbits(62)], device=self._engine.device)
        dist.broadcast(number, 0)
        return f"{int(number):016x}"

    def _agree(self, has_files: bool, error: CheckpointError | None) -> bool:
        """Return whether any rank has files; raise on all if one had an error."""
        rank = dist.get_rank()
        told = torch.tensor([int(has_files), rank + 1 if error else 0], device=self._engine.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        if error:
            raise error
        any_files, failed = told.tolist()
        if failed:
            raise SaveAborted(f"rank {failed - 1} cannot save its state; its own error says why", failed - 1)
        return bool(any_files)

    def _point(self, path: str, tag: str) -> None:
        """Leave at DeepSpeed's file name what `load` needs to find the content; equal for every save of the tag."""
        up = os.path.relpath(self._root, os.path.dirname(os.path.abspath(path)))
        text = json.dumps({"format": _FORMAT, "root": up, "tag": tag, "rank": dist.get_rank()})
        folder, _, name = path.rpartition("/")
        open_storage(folder).write(name, text.encode())

    def _settle(self) -> None:
        """Report errors, and name what has become durable."""
        assert self._checkpointer is not None
        ended = [pending for pending in self._pending if pending[0].done()]  # before poll: it is to see their errors
        try:
            self._checkpointer.poll()
        finally:
            self._name_durable(ended)

    def _name_durable(self, ended: Sequence[tuple[SaveHandle, str]]) -> None:
        """Rank 0: write `latest` for the newest of the saves that ended, if one was committed."""
        self._pending = [pending for pending in self._pending if pending not in ended]
        committed = [tag for handle, tag in ended if handle.exception() is None]
        if committed and dist.get_rank() == 0:
            open_storage(self._root).write("latest", committed[-1].encode())


def _owned(state_dict: Any) -> Any:
    """Return a state dict whose tensors nobody mutates but the optimizer: of the others there are copies."""
    if not isinstance(state_dict, dict):
        return state_dict
    return {key: value if key in _LIVE else _copied(value) for key, value in state_dict.items()}


def _copied(value: Any) -> Any:
    """Return a value whose tensors, inside of plain containers, are copies."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _save_for_others(state_dict: Any, path: str) -> None:
    """Write the torch file that `save_16bit_model` is for; it appears whole or not at all."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        torch.save(state_dict, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _pointer(path: str) -> Mapping[str, Any]:
    """Return what `_point` left."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(4096))
        if found["format"] != _FORMAT or type(found["rank"]) is not int or set(Path(found["root"]).parts) != {".."}:
            raise ValueError("is of another format")
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedFormat(
            f"{path}: was not saved through this engine ({error}); load it with DeepSpeed's own, or turn it into a "
            "checkpoint of this package by checkpoint.import_from"
        ) from error
    return dict(found)


def _find(root: str, tag: str) -> Reader:
    """Return the newest checkpoint of a tag that verifies; warn about those that do not."""
    storage = open_storage(root)
    reasons = []
    for reader in reversed(catalog.scan(storage).committed):
        shared = objects.from_json(reader.record.shared, reader.url)
        if not isinstance(shared, dict) or shared.get("deepspeed") != {"tag": tag}:
            continue
        try:
            catalog.check(reader, "quick")
        except CorruptCheckpoint as error:
            _log.warning("%s is skipped: %s", reader.folder, error)
            reasons.append(str(error))
        else:
            return reader
    if reasons:
        raise CorruptCheckpoint(f"{root}: no checkpoint of tag {tag!r} is whole: {'; '.join(reasons)}")
    raise CheckpointNotFound(f"{root}: no checkpoint of tag {tag!r} was committed (or retention removed it)")
