"""Dumps that torch's flight recorder analyser reads: `python -m torch.distributed.flight_recorder.fr_trace FOLDER`.

Torch's own dumps of gloo have no members of groups, no messages and no times, and its analyser stops on them. These
have all that, on every backend, also of ranks that are stopped or dead. What the analyser compares by shape is told
in elements: shapes are not recorded. Each pair of ranks gets a group of its own for its messages in one direction,
because the analyser expects all members of a group in whatever is done in it; a receipt from any source is left out.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faulttol.events import CollectiveEvent, RankRecord

_VERSION = "2.10"
_NAMES = {
    "all_gather": "all_gather",
    "all_gather_coalesced": "all_gather",
    "all_gather_into_tensor": "_all_gather_base",
    "all_gather_into_tensor_coalesced": "all_gather_into_tensor_coalesced",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "allreduce_coalesced",
    "all_to_all": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "all_reduce_barrier",
    "broadcast": "broadcast",
    "gather": "gather",
    "monitored_barrier": "all_reduce_barrier",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced",
    "scatter": "scatter",
}
"""What the analyser calls them."""
_KNOWN_BACKENDS = frozenset({"gloo", "nccl", "xccl"})
_ITEM_BYTES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float16": 2, "bfloat16": 2, "int16": 2}
_ITEM_BYTES |= {"uint8": 1, "int8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}


def dump(records: Sequence[RankRecord], folder: Path, prefix: str = "faulttol_rank") -> list[Path]:
    """Write one dump a rank into `folder`, which is made; return their paths.

    Of every group the part that all of its ranks still have is told: the analyser takes a difference in the beginning
    for a difference between the ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    firsts = _firsts(records)
    paths = []
    for record in records:
        path = folder / f"{prefix}{record.rank}"
        path.write_bytes(pickle.dumps(document(record, firsts)))
        paths.append(path)
    return paths


def document(record: RankRecord, firsts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return one rank's dump; of every group only what comes from its first number on, if one is given."""
    entries: list[dict[str, Any]] = []
    groups: dict[str, dict[str, str]] = {}
    enqueued: dict[str, int] = {}
    completed: dict[str, int] = {}
    for event in record.events:
        name = _group(event)
        if name is None or event.seq < (firsts or {}).get(name, 0):
            continue
        ranks = _ranks(event)
        groups[name] = {"name": name, "desc": "undefined", "ranks": str(list(ranks))}
        entries.append(_entry(event, name, ranks, len(entries)))
        enqueued[name] = event.seq
        if event.state == "ended":
            completed[name] = event.seq
    return {
        "version": _VERSION,
        "entries": entries,
        "pg_config": groups,
        "pg_status": {
            name: {"last_enqueued_collective": last, "last_completed_collective": completed.get(name, 0)}
            for name, last in enqueued.items()
        },
        "rank": record.rank,
    }


def _entry(event: CollectiveEvent, name: str, ranks: tuple[int, ...], number: int) -> dict[str, Any]:
    given, got = _elements(event, len(ranks))
    library = event.backend if event.backend in _KNOWN_BACKENDS else "gloo"
    ends = _ends(event)
    if ends is not None:
        source, target = ranks.index(ends[0]), ranks.index(ends[1])
        called = f"send {source}->{target}" if event.kind == "send" else f"recv {target}<-{source}"
    else:
        called = _NAMES[event.kind]
    dtype = event.dtype or "float32"
    return {
        "record_id": number,
        "pg_id": 0,
        "process_group": (name, "undefined"),
        "collective_seq_id": event.seq,
        "p2p_seq_id": event.seq if event.is_message else 0,
        "op_id": event.index,
        "profiling_name": f"{library}:{called}",
        "time_created_ns": event.begin_ns,
        "duration_ms": None if event.duration_ns is None else event.duration_ns / 1e6,
        "input_sizes": [[given]],
        "input_dtypes": [dtype],
        "output_sizes": [[got]],
        "output_dtypes": [dtype],
        "state": "completed" if event.state == "ended" else "started",
        "time_discovered_started_ns": event.started_ns,
        "time_discovered_completed_ns": event.end_ns,
        "retired": event.state != "begun",
        "timeout_ms": 0,
        "is_p2p": event.is_message,
        "frames": [],
    }


def _elements(event: CollectiveEvent, num_ranks: int) -> tuple[int, int]:
    """Return how many elements a rank gave and got."""
    given = max(1, event.bytes // _ITEM_BYTES.get(event.dtype, 4))
    if event.kind.startswith("all_gather"):
        return given, given * num_ranks
    if event.kind.startswith("reduce_scatter"):
        return given, given // num_ranks
    return given, given


def _group(event: CollectiveEvent) -> str | None:
    """Return the group that the analyser is told; None for what it is not told of."""
    if not event.is_message:
        return event.group
    ends = _ends(event)
    return None if ends is None else f"{event.group}: {ends[0]} to {ends[1]}"


def _ranks(event: CollectiveEvent) -> tuple[int, ...]:
    return tuple(sorted(_ends(event) or event.group_ranks))


def _ends(event: CollectiveEvent) -> tuple[int, int] | None:
    """Return sender and receiver of a message whose sender was named."""
    if event.source is None or event.target is None or event.kind == "recv_any_source":
        return None
    return event.source, event.target


def _firsts(records: Iterable[RankRecord]) -> dict[str, int]:
    """Return by group the first number that all ranks which have any of it still have."""
    found: dict[str, int] = {}
    for record in records:
        own: dict[str, int] = {}
        for event in record.events:
            name = _group(event)
            if name is not None:
                own.setdefault(name, event.seq)
        for name, seq in own.items():
            found[name] = max(found.get(name, 0), seq)
    return found
