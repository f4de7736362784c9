"""What a save writes and where it lies in memory, worked out once for all states of one structure.

Checking, dividing among ranks and laying out a state of a thousand tensors takes tens of milliseconds; looking
whether it has the structure of the state before takes one. Nothing here keeps a tensor alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from checkpoint import objects as plain
from checkpoint.errors import InvalidState
from checkpoint.format import CHUNK_BYTES, DTYPES, fingerprint
from checkpoint.shard import ShardPlan, plan_shard, whole_parts
from checkpoint.state import (
    BoxSlice,
    FlatSlice,
    LayoutSlice,
    Piece,
    RankLocal,
    Replica,
    TensorLike,
    pieces_of,
    written_by,
)

UpdateOrder = Sequence[Sequence[str]]
"""Names of the tensors of each group, in the order in which the groups are updated."""
Places = tuple[int, tuple[int, ...]]
"""How many bytes of a tensor are looked at in a place, and how far from its first byte the places are."""
LOOK_BYTES = 16
"""Bytes looked at in a place, if there are as many side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """How the state of one structure is saved by one rank."""

    pieces: tuple[Piece, ...]
    """What this rank writes; their tensors are on the meta device."""
    bases: tuple[int, ...]
    """For each piece, which entry of the state it is a part of."""
    offsets: tuple[int, ...]
    """For each piece, the bytes between the first of its entry and its own."""
    groups: tuple[int, ...]
    """For each piece, in which turn it is updated."""
    shard: ShardPlan
    """All of it, as one file."""
    replicated: str
    """Fingerprint of what all ranks must agree on."""
    names: tuple[str, ...]
    """Of the entries."""
    watched: tuple[tuple[int, ...], ...]
    """For each group, the entries that are copied in its turn."""
    devices: tuple[torch.device, ...]
    """The devices of the pieces, but for the host."""
    places: Mapping[int, Places]
    """Where to look at each watched entry of host memory that is not empty."""


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """One state of a structure: a blueprint and the tensors it is for."""

    blueprint: Blueprint
    tensors: Sequence[Tensor]
    """The memory of the entries: it stays even if an entry is given other memory (`parameter.data = …`)."""
    addresses: Sequence[int]
    """Where the entries started: memory may be freed or moved while it is copied."""
    versions: Sequence[int]
    """How often each entry had been changed in place."""

    def piece(self, index: int) -> Piece:
        """Return a piece with its tensor, a view."""
        shape = self.blueprint.pieces[index]
        base = self.tensors[self.blueprint.bases[index]]
        offset = base.storage_offset() + self.blueprint.offsets[index] // max(1, base.element_size())
        meta = shape.tensor
        return replace(shape, tensor=base.as_strided(meta.shape, meta.stride(), offset))


class Planner:
    """Plans states, quickly where one has the structure of the one before."""

    def __init__(self, rank: int, world_size: int, device_parcel_bytes: int = CHUNK_BYTES) -> None:
        """Plan for one rank; in parcels of `device_parcel_bytes` if the first state has something on a GPU."""
        self._rank = rank
        self._world_size = world_size
        self._device_parcel_bytes = device_parcel_bytes
        self._parcel_bytes: int | None = None
        self._key: object = None
        self._blueprint: Blueprint | None = None

    def draft(self, tensors: Mapping[str, TensorLike], update_order: UpdateOrder) -> Draft:
        """Return how to save these tensors. Raises InvalidState, naming every offending entry."""
        key, bases, addresses = _structure(tensors, update_order)
        if key is not None and self._blueprint is not None and key == self._key:
            return Draft(self._blueprint, bases, addresses, _versions(bases))
        pieces = pieces_of(tensors)
        groups = _groups(tensors, update_order)
        self._blueprint = self._plan(pieces, tensors, groups)
        self._key = key
        bases = [base_of(value) for value in tensors.values()]
        return Draft(self._blueprint, bases, [base.data_ptr() for base in bases], _versions(bases))

    def _plan(self, held: Sequence[Piece], tensors: Mapping[str, TensorLike], groups: Mapping[str, int]) -> Blueprint:
        pieces = written_by(self._rank, self._world_size, held)
        entry = {name: i for i, name in enumerate(tensors)}
        values = list(tensors.values())
        bases = [entry[p.name] for p in pieces]
        turns = [min(groups.get(name, 0) for name in (p.name, *p.aliases)) for p in pieces]
        own = {i: base_of(values[i]) for i in set(bases)}
        offsets = [
            p.tensor.data_ptr() - own[i].data_ptr() if p.nbytes else 0 for p, i in zip(pieces, bases, strict=True)
        ]
        shapes = [replace(p, tensor=_without_memory(p.tensor)) for p in pieces]
        devices = {p.tensor.device for p in pieces if p.tensor.device.type != "cpu" and p.nbytes}
        if self._parcel_bytes is None:  # once: there is one arena for all states, and its slots have one size
            self._parcel_bytes = self._device_parcel_bytes if devices else CHUNK_BYTES
        shard = plan_shard(shapes, whole_parts(shapes), turns, self._rank, self._parcel_bytes)
        watched: list[dict[int, None]] = [{} for _ in range(shard.num_groups)]
        for base, turn in zip(bases, turns, strict=True):
            watched[turn][base] = None
        return Blueprint(
            tuple(shapes),
            tuple(bases),
            tuple(offsets),
            tuple(turns),
            shard,
            _agreed(held),
            tuple(tensors),
            tuple(tuple(entries) for entries in watched),
            tuple(sorted(devices, key=str)),
            {i: _places(t) for i, t in own.items() if t.device.type == "cpu" and t.numel()},
        )


def base_of(value: Any) -> Tensor:
    """Return the tensor in which an entry's values lie."""
    while not isinstance(value, Tensor):
        value = value.value if isinstance(value, Replica) else value.tensor
    local: Any = value
    if hasattr(value, "placements"):
        with torch.no_grad():
            local = local.to_local()
    base: Tensor = local.detach()
    return base


def _places(tensor: Tensor) -> Places:
    """Return where to look at a host tensor: in its middle and at its end, nowhere outside of it."""
    size = tensor.element_size()
    if tensor.is_contiguous():
        nbytes = tensor.numel() * size
        length = min(LOOK_BYTES, nbytes)
        return length, ((nbytes - length) // 2, nbytes - length)
    steps = [(n, stride * size) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return size, (sum(n // 2 * step for n, step in steps), sum((n - 1) * step for n, step in steps))


def _structure(tensors: Mapping[str, TensorLike], update_order: UpdateOrder) -> tuple[object, list[Tensor], list[int]]:
    """Return what decides how a state is saved, comparable by ==, the entries' tensors and addresses.

    None for rare kinds.
    """
    facts: list[object] = []
    bases: list[Tensor] = []
    addresses: list[int] = []
    seen: dict[int, int] = {}
    for name, value in tensors.items():
        base, more = _anatomy(value)
        if (
            type(base) not in _PLAIN
            or base.layout is not torch.strided
            or base.is_conj()
            or base.is_neg()
            or base.is_nested
            or (not base.untyped_storage().nbytes() and base.numel())
        ):
            return None, [], []
        bases.append(base.detach())
        address = base.data_ptr()
        addresses.append(address)
        first = seen.setdefault(address, len(facts))  # tied tensors are written once
        facts.append((name, more, base.dtype, base.shape, base.stride(), base.device, first))
    return (facts, [list(names) for names in update_order]), bases, addresses


_PLAIN = (Tensor, torch.nn.Parameter)


def _anatomy(value: Any) -> tuple[Any, object]:
    """Return the tensor in which an entry's values lie, and what else decides how they are saved."""
    kind = type(value)
    if kind in _PLAIN:
        return value, None
    if kind is FlatSlice:
        return value.tensor, (kind, value.global_shape, value.start)
    if kind is BoxSlice:
        return value.tensor, (kind, value.global_shape, value.offset)
    if kind is LayoutSlice:
        return value.tensor, (kind, value.layout, value.start)
    if kind is RankLocal:
        return value.tensor, kind
    if kind is Replica:
        base, more = _anatomy(value.value)
        return base, (kind, value.index, value.count, more)
    if hasattr(value, "placements"):  # a DTensor: importing its class takes 0.6 s
        return base_of(value), (kind, value.shape, value.placements, value.device_mesh)
    return None, None


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [version(t) for t in tensors]


def version(tensor: Tensor) -> int:
    """Return how often a tensor, or what shares its counter, was changed in place; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def _groups(tensors: Mapping[str, TensorLike], update_order: UpdateOrder) -> dict[str, int]:
    """Return the group of every name that the order lists."""
    groups: dict[str, int] = {}
    problems = []
    for group, names in enumerate(update_order):
        for name in names:
            if name not in tensors:
                problems.append(f"{name!r} is not one of the tensors")
            elif name in groups:
                problems.append(f"{name!r} is listed twice")
            groups[name] = group
    if problems:
        raise InvalidState("update_order: " + "; ".join(sorted(problems)))
    return groups


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _agreed(pieces: Sequence[Piece]) -> str:
    """Return the fingerprint of what all ranks must agree on: the replicated tensors' names, types and shapes."""
    lines = sorted((p.name, DTYPES[p.tensor.dtype], *p.global_shape) for p in pieces if p.kind == "replicated")
    return fingerprint(plain.canonical(lines))
