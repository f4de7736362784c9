"""What a state is: tensors by name, each whole, a slice, or one rank's own.

Names are opaque: nothing here or below joins or parses them.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash

from checkpoint.errors import InvalidState
from checkpoint.format import CHUNK_BYTES, DTYPES
from checkpoint.layout import Block, Layout, blocks, of_dtensor, share
from checkpoint.region import Region, Shape, intersect
from checkpoint.reshard import view


@dataclass(frozen=True, slots=True, eq=False)
class FlatSlice:
    """Elements [start, start + n) of the row-major flattened tensor of `global_shape`: a ZeRO partition."""

    tensor: torch.Tensor
    """One dimension, n elements; n may be 0."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Position of the first element in the flattened whole; free when n is 0."""


@dataclass(frozen=True, slots=True, eq=False)
class BoxSlice:
    """The box of `tensor`'s shape at `offset` of a tensor of `global_shape`: a tensor-parallel shard."""

    tensor: torch.Tensor
    """The box; any strides."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Position of the box's first element, per dimension."""


@dataclass(frozen=True, slots=True, eq=False)
class RankLocal:
    """A tensor of this rank alone, such as a random generator's state; kept under (name, rank)."""

    tensor: torch.Tensor
    """The tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class LayoutSlice:
    """A tensor whose place in the whole one is declared dimension by dimension: fused, padded, strided.

    `checkpoint.layout` makes the dimensions.
    """

    tensor: torch.Tensor
    """All of the local tensor in any strides; with `start` some of its elements, flattened."""
    layout: Layout
    """One DimLayout for each dimension of the local tensor; make it once and keep it."""
    start: int | None = None
    """Position of the first element in the flattened local tensor: a ZeRO partition of a tensor-parallel shard."""


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """One of `count` equal copies of a slice, held by as many ranks: each element is written by one of them.

    Say so for slices that data-parallel ranks have in common; a plain tensor is everybody's anyhow.
    """

    value: torch.Tensor | FlatSlice | BoxSlice | LayoutSlice
    """The slice; a plain tensor only if it is a DTensor."""
    index: int
    """Which copy this is, from 0."""
    count: int
    """How many there are."""


TensorLike = torch.Tensor | FlatSlice | BoxSlice | LayoutSlice | Replica | RankLocal

Kind = Literal["replicated", "sliced", "local"]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A region of a named tensor and the memory that holds it: the one form that the rest of the package knows.

    A name has several pieces where its local tensor is several blocks of the whole one.
    """

    name: str
    kind: Kind
    tensor: torch.Tensor
    """The region's elements: of its box's shape in any strides, or in one dimension, in order."""
    global_shape: Shape
    region: Region
    copy: int = 0
    """Which of the equal copies of a sliced piece this is."""
    num_copies: int = 1
    """How many ranks hold the piece."""
    aliases: tuple[str, ...] = ()
    """Other names of the same memory, which is written once for all of them."""

    @property
    def nbytes(self) -> int:
        return self.region.numel * self.tensor.element_size()

    @property
    def is_empty_part(self) -> bool:
        """Whether this holds nothing of a tensor that is not empty itself: other ranks hold all of it."""
        return self.kind == "sliced" and not self.region.numel and math.prod(self.global_shape) > 0


def pieces_of(tensors: Mapping[str, TensorLike]) -> list[Piece]:
    """Return the pieces of a state in the order given, everything that this rank holds.

    Raises InvalidState, naming every offending entry.
    """
    pieces: list[Piece] = []
    problems = []
    for name, value in tensors.items():
        try:
            pieces += _pieces(name, value)
        except InvalidState as error:
            problems.append(f"{name!r}: {error}")
    if problems:
        raise InvalidState("tensors: " + "; ".join(sorted(problems)))
    return pieces


def written_by(rank: int, world_size: int, pieces: Sequence[Piece]) -> list[Piece]:
    """Return what a rank writes of the pieces it holds: each element once in all ranks together.

    Every rank decides alone, from what all of them know. Pieces of the same memory are written once.
    """
    held = fold_tied(pieces)
    # A replicated tensor of more than a rank's fair share is divided among all, the others are given out whole.
    fair = max(2 * CHUNK_BYTES, sum(p.nbytes for p in held if p.kind == "replicated") // world_size)
    owner = owners((p for p in held if p.nbytes <= fair or not p.tensor.is_contiguous()), world_size)
    mine = []
    for piece in held:
        if piece.kind == "replicated" and piece.name in owner:
            if owner[piece.name] == rank:
                mine.append(piece)
        elif piece.kind == "replicated":
            mine += _own_share(dataclasses.replace(piece, copy=rank, num_copies=world_size))
        elif not piece.is_empty_part:
            mine += _own_share(piece)
    return mine


def fold_tied(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces without those whose memory is another's, whose aliases they become."""
    names: dict[object, list[str]] = {}
    keys = [_memory(piece) for piece in pieces]
    for key, piece in zip(keys, pieces, strict=True):
        names.setdefault(key, []).append(piece.name)
    folded = []
    for key, piece in zip(keys, pieces, strict=True):
        first, *others = names.pop(key, [""])
        if first:
            folded.append(dataclasses.replace(piece, aliases=tuple(others)) if others else piece)
    return folded


def owners(pieces: Iterable[Piece], world_size: int) -> dict[str, int]:
    """Return which rank writes each replicated tensor: largest first, to the least loaded rank.

    Every rank computes the same answer from the same tensors; nothing is communicated.
    """
    ranked = sorted((p for p in pieces if p.kind == "replicated"), key=lambda p: (-p.nbytes, p.name))
    loads = [(0, rank) for rank in range(world_size)]
    owner = {}
    for piece in ranked:
        load, rank = heapq.heappop(loads)
        owner[piece.name] = rank
        heapq.heappush(loads, (load + piece.nbytes, rank))
    return owner


def _memory(piece: Piece) -> object:
    """Return what pieces of the same bytes in the same place of equal tensors have in common."""
    tensor = piece.tensor
    if not piece.region.numel:
        return id(piece)
    place = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (place, piece.kind, piece.global_shape, piece.region, piece.copy, piece.num_copies)


def _own_share(piece: Piece) -> list[Piece]:
    """Return the part of a piece that this holder of a copy of it writes; large ones are divided among them."""
    if piece.num_copies == 1:
        return [piece]
    # Where the division leaves somebody without a chunk, it is not always the same one.
    turn = (piece.copy + xxhash.xxh3_64_intdigest(piece.name.encode())) % piece.num_copies
    if piece.tensor.is_contiguous():
        per_chunk = CHUNK_BYTES // piece.tensor.element_size()
        start, stop = share(piece.region.numel, per_chunk, turn, piece.num_copies)
    else:  # no part of it is a view of one dimension
        start, stop = 0, piece.region.numel if turn == 0 else 0
    if (start, stop) == (0, piece.region.numel):
        return [piece]
    if start == stop:
        return []
    part = piece.tensor.view(-1)[start:stop]
    return [dataclasses.replace(piece, tensor=part, region=piece.region.part(start, stop))]


def _pieces(name: object, value: object) -> Iterator[Piece]:
    """Yield the pieces of one entry, at least one."""
    if not isinstance(name, str) or not name:
        raise InvalidState("is not a name; names are non-empty strings")
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        raise InvalidState("is not a name; it has half of a surrogate pair")
    if isinstance(value, Replica):
        yield from _replicas(name, value)
    elif isinstance(value, RankLocal):
        tensor = _tensor(value.tensor)
        shape = tuple(tensor.shape)
        yield Piece(name, "local", tensor, shape, Region.whole(shape))
    elif isinstance(value, FlatSlice):
        yield _flat(name, value)
    elif isinstance(value, BoxSlice):
        tensor = _tensor(value.tensor)
        region = Region.box(tuple(value.offset), tuple(tensor.shape))
        yield _inside(Piece(name, "sliced", tensor, tuple(value.global_shape), region))
    elif isinstance(value, LayoutSlice):
        shape = tuple(dim.size for dim in value.layout)
        yield from _blocks(name, _tensor(value.tensor), shape, value)
    elif _is_dtensor(value):
        yield from _dtensor(name, value)
    else:
        tensor = _tensor(value)
        shape = tuple(tensor.shape)
        yield Piece(name, "replicated", tensor, shape, Region.whole(shape))


def _replicas(name: str, value: Replica) -> Iterator[Piece]:
    if not 0 <= value.index < value.count:
        raise InvalidState(f"Replica: index {value.index} is not one of {value.count} copies")
    for piece in _pieces(name, value.value):
        if piece.kind != "sliced":
            raise InvalidState(f"Replica: holds a {piece.kind} tensor; allowed are slices and DTensors")
        copy, num_copies = piece.copy * value.count + value.index, piece.num_copies * value.count
        yield dataclasses.replace(piece, copy=copy, num_copies=num_copies)


def _dtensor(name: str, value: Any) -> Iterator[Piece]:
    shape = tuple(value.shape)
    found = of_dtensor(value)
    with torch.no_grad():
        local = _tensor(value.to_local())
    if found is None:
        nothing = Region.box((0,) * len(shape), (0,) * len(shape))
        yield Piece(name, "sliced", local.new_empty(nothing.shape), shape, nothing)
        return
    for piece in _blocks(name, local, shape, LayoutSlice(local, found.layout)):
        copy, num_copies = piece.copy * found.num_copies + found.copy, piece.num_copies * found.num_copies
        yield dataclasses.replace(piece, copy=copy, num_copies=num_copies)


def _blocks(name: str, tensor: torch.Tensor, shape: Shape, value: LayoutSlice) -> Iterator[Piece]:
    """Yield the pieces of a declared layout; an empty one if the tensor holds nothing but padding."""
    local_shape = tuple(dim.local_size for dim in value.layout)
    if value.start is None:
        if tuple(tensor.shape) != local_shape:
            raise InvalidState(f"has shape {list(tensor.shape)}, its layout {list(local_shape)}")
        held = Region.whole(local_shape)
    else:
        if tensor.dim() != 1:
            raise InvalidState(f"a part of a LayoutSlice holds one dimension, this one {tensor.dim()}")
        start = value.start if tensor.numel() else 0
        held = Region((0,) * len(local_shape), local_shape, start, start + tensor.numel())
        problem = held.problem(local_shape)
        if problem:
            raise InvalidState(problem)
    num_pieces = 0
    for block in blocks(value.layout):
        for part, region in _in_block(tensor, held, block):
            num_pieces += 1
            yield Piece(name, "sliced", part, shape, region, block.copy, block.num_copies)
    if not num_pieces:
        nothing = Region.box((0,) * len(shape), (0,) * len(shape))
        yield Piece(name, "sliced", tensor.new_empty(nothing.shape), shape, nothing)


def _in_block(tensor: torch.Tensor, held: Region, block: Block) -> Iterator[tuple[torch.Tensor, Region]]:
    """Yield the views of a tensor, which holds `held` of its local whole, that lie in a block, and their places."""
    if held.shape[1:] == block.shape[1:] and not held.is_box:  # a block of whole rows is one run of the flattened
        inner = math.prod(held.shape[1:])
        begin = block.local[0] * inner
        start, stop = max(held.start, begin), min(held.stop, begin + block.shape[0] * inner)
        if start < stop:
            whole = Region.box(block.offset, block.shape)
            yield tensor[start - held.start : stop - held.start], whole.part(start - begin, stop - begin)
        return
    for local, shape in intersect(held, Region.box(block.local, block.shape)):
        offset = tuple(o + n - b for o, n, b in zip(block.offset, local, block.local, strict=True))
        yield view(tensor, held, local, shape), Region.box(offset, shape)


def _flat(name: str, value: FlatSlice) -> Piece:
    tensor, shape = _tensor(value.tensor), tuple(value.global_shape)
    if tensor.dim() != 1:
        raise InvalidState(f"a FlatSlice holds one dimension, this one {tensor.dim()}; pass tensor.flatten()")
    start = value.start if tensor.numel() else 0
    whole = Region.whole(shape)
    region = Region(whole.offset, shape, start, start + tensor.numel())
    return _inside(Piece(name, "sliced", tensor, shape, region))


def _inside(piece: Piece) -> Piece:
    if any(n < 0 for n in piece.global_shape):
        raise InvalidState(f"global_shape {list(piece.global_shape)} has a negative size")
    problem = piece.region.problem(piece.global_shape)
    if problem:
        raise InvalidState(problem)
    return piece


def _tensor(value: object) -> torch.Tensor:
    if _is_dtensor(value):
        raise InvalidState("is a DTensor inside of another slice; pass it as it is")
    if not isinstance(value, torch.Tensor):
        raise InvalidState(
            f"is a {type(value).__name__}; allowed are torch.Tensor, DTensor, FlatSlice, BoxSlice, LayoutSlice, "
            "Replica and RankLocal (numbers and strings go into objects)"
        )
    if torch.nn.parameter.is_lazy(value):
        raise InvalidState("is a parameter without a shape yet; run a forward pass first")
    if value.is_nested:
        raise InvalidState("is a nested tensor; only dense tensors are saved")
    if value.layout is not torch.strided:
        raise InvalidState(f"has layout {value.layout}; only dense tensors are saved")
    if value.dtype not in DTYPES:
        allowed = ", ".join(sorted(str(d).removeprefix("torch.") for d in DTYPES))
        raise InvalidState(f"has dtype {value.dtype}; allowed are {allowed}")
    if value.device.type == "meta":
        raise InvalidState("is on the meta device and holds no values")
    if value.is_conj() or value.is_neg():
        raise InvalidState("is a lazy conjugate or negative; pass tensor.resolve_conj().resolve_neg()")
    if not _has_memory(value):
        raise InvalidState(
            f"is a {type(value).__name__} without memory of its own (a wrapper, a fake, or its storage was freed); "
            "pass the plain tensor that holds the values"
        )
    return value.detach()


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether all elements lie in the tensor's storage: what is copied by address must be there."""
    if not tensor.numel():
        return True
    try:
        storage = tensor.untyped_storage()
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = (tensor.storage_offset() + last + 1) * tensor.element_size()
        return storage.device.type != "meta" and bool(storage.data_ptr()) and end <= storage.nbytes()
    except RuntimeError:  # a wrapper's storage cannot be asked
        return False


def _is_dtensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "placements")  # importing DTensor takes 0.6 s
