"""Checkpoints of other libraries turned into ours: torch DCP, safetensors (Hugging Face too), DeepSpeed ZeRO.

One piece of one tensor is in memory at a time, padding is left out, and what can be joined becomes whole tensors.
Pickles are read without running what they say (`checkpoint.pickles`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from checkpoint import catalog, distcp, objects, weights, zero
from checkpoint.catalog import CheckpointInfo
from checkpoint.commit import Attempt
from checkpoint.errors import CheckpointNotFound, InvalidState
from checkpoint.names import COMMIT, AttemptName
from checkpoint.reader import Reader
from checkpoint.storage import Storage, open_storage
from checkpoint.stream import Contents, write_part

_TIMEOUT_S = 60.0
"""How long the storage may take to show the files that were just written to it."""


def import_from(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    step: int | None = None,
    trust_pickle: bool = False,
    source_options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CheckpointInfo:
    """Add a checkpoint of another library to a root; return the committed checkpoint.

    What `source` is, is seen by what lies there: a safetensors file; a folder of them, with a Hugging Face index
    or not; a folder that `torch.distributed.checkpoint.save` wrote; a folder that DeepSpeed's
    `engine.save_checkpoint` wrote under ZeRO 1, 2 or 3, with one tag in it or the one that `latest` names.

    Names: of safetensors and DCP as they are. Of DeepSpeed `model.<name>`, `optimizer.master.<name>` (the fp32
    weights, where the model's are not) and `optimizer.<state>.<name>`; learning rates, counters, schedulers and
    client state are in `shared["deepspeed"]`. What is imported from DCP can be loaded through `checkpoint.dcp`.

    Args:
        source: a path or URL; of DeepSpeed a local path.
        root: where to; a path or URL.
        step: of the checkpoint; by default the source's own where it has one, else 0.
        trust_pickle: whether the source may run code when it is read.
        source_options: for the fsspec file system of `source`.
        storage_options: for the fsspec file system of `root`.

    Raises:
        CheckpointNotFound: nothing there is known here. InvalidState: it is of this package already.
        UntrustedPickle: it cannot be read without running code that it names.
        CorruptCheckpoint: it is damaged or incomplete. Nothing is left in `root` by an import that fails.
    """
    if step is not None and step < 0:
        raise InvalidState(f"step: {step}; allowed are integers from 0")
    contents = _contents(os.fspath(source), source_options, trust_pickle)
    storage = open_storage(root, storage_options)
    run_id = secrets.token_hex(8)
    name = AttemptName.of(contents.step if step is None else step, 0, run_id)
    attempt = Attempt(storage, name, 0, 1, _TIMEOUT_S)
    try:
        text = objects.encode(dict(contents.objects), "objects")
        attempt.begin()
        attempt.vote(write_part(storage, name.folder, 0, contents.streams, text), "")
        shared = objects.to_json(dict(contents.shared), "shared")
        attempt.commit(run_id, shared, lambda: catalog.next_sequence(storage))
    except BaseException:
        storage.remove(name.folder)  # nobody else writes there or waits for it
        raise
    return catalog.info_of(Reader(storage, name.folder))


def _contents(source: str, options: Mapping[str, Any] | None, trust_pickle: bool) -> Contents:
    parent, _, name = source.rstrip("/").rpartition("/")
    if name.endswith(".safetensors"):
        folder = open_storage(parent or ("/" if source.startswith("/") else "."), options, follow_links=True)
        return weights.contents(folder, [name])
    storage = open_storage(source, options, follow_links=True)  # the cache of Hugging Face's hub is full of them
    names = {entry.name for entry in storage.entries("")}
    if COMMIT in names or any(map(AttemptName.parse, names)):
        raise InvalidState(f"{storage.url}: is of this package already; read, load and export take it as it is")
    if distcp.METADATA in names:
        return distcp.contents(storage, trust_pickle=trust_pickle)
    if any(n.endswith(".safetensors") for n in names):
        return weights.contents(storage, weights.files_of(storage))
    if zero.LATEST in names or any(zero.is_model_file(n) for n in names):
        return zero.contents(_local(storage), trust_pickle=trust_pickle)
    raise CheckpointNotFound(
        f"{storage.url}: is neither a safetensors file, nor a folder with *.safetensors, {distcp.METADATA} (torch "
        f"DCP), or *{zero.MODEL_ENDING} (DeepSpeed; or '{zero.LATEST}', which names the folder with them)"
    )


def _local(storage: Storage) -> str:
    if "://" in storage.url:
        raise InvalidState(f"{storage.url}: DeepSpeed's files are mapped into memory; copy them to a local folder")
    return storage.url
