"""What a state is: tensors by name, each whole, a slice, or one rank's own.

Names are opaque: nothing here or below joins or parses them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from checkpoint.errors import InvalidState
from checkpoint.format import DTYPES
from checkpoint.region import Region, Shape


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


TensorLike = torch.Tensor | FlatSlice | BoxSlice | RankLocal

Kind = Literal["replicated", "sliced", "local"]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One named entry of a state, in the one form that the rest of the package knows."""

    name: str
    kind: Kind
    tensor: torch.Tensor
    global_shape: Shape
    region: Region

    @property
    def nbytes(self) -> int:
        return self.region.numel * self.tensor.element_size()

    @property
    def is_empty_part(self) -> bool:
        """Whether this holds nothing of a tensor that is not empty itself: other ranks hold all of it."""
        return self.kind == "sliced" and not self.region.numel and math.prod(self.global_shape) > 0


def pieces_of(tensors: Mapping[str, TensorLike]) -> list[Piece]:
    """Return the entries of a state in the order given.

    Raises InvalidState, naming every offending entry.
    """
    pieces, problems = [], []
    for name, value in tensors.items():
        try:
            pieces.append(_piece(name, value))
        except InvalidState as error:
            problems.append(f"{name!r}: {error}")
    if problems:
        raise InvalidState("tensors: " + "; ".join(sorted(problems)))
    return pieces


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


def _piece(name: object, value: object) -> Piece:
    if not isinstance(name, str) or not name:
        raise InvalidState("is not a name; names are non-empty strings")
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        raise InvalidState("is not a name; it has half of a surrogate pair")
    if isinstance(value, RankLocal):
        tensor = _tensor(value.tensor)
        shape = tuple(tensor.shape)
        return Piece(name, "local", tensor, shape, Region.whole(shape))
    if isinstance(value, FlatSlice):
        return _flat(name, value)
    if isinstance(value, BoxSlice):
        tensor = _tensor(value.tensor)
        region = Region.box(tuple(value.offset), tuple(tensor.shape))
        return _inside(Piece(name, "sliced", tensor, tuple(value.global_shape), region))
    tensor = _tensor(value)
    shape = tuple(tensor.shape)
    return Piece(name, "replicated", tensor, shape, Region.whole(shape))


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
    if isinstance(value, torch.Tensor) and hasattr(value, "placements"):  # importing DTensor takes 0.6 s
        raise InvalidState("is a DTensor; pass BoxSlice(t.to_local(), global_shape, offset)")
    if not isinstance(value, torch.Tensor):
        raise InvalidState(
            f"is a {type(value).__name__}; allowed are torch.Tensor, FlatSlice, BoxSlice and RankLocal "
            "(numbers and strings go into objects)"
        )
    if value.layout is not torch.strided:
        raise InvalidState(f"has layout {value.layout}; only dense tensors are saved")
    if value.dtype not in DTYPES:
        allowed = ", ".join(sorted(str(d).removeprefix("torch.") for d in DTYPES))
        raise InvalidState(f"has dtype {value.dtype}; allowed are {allowed}")
    if value.device.type == "meta":
        raise InvalidState("is on the meta device and holds no values")
    return value.detach()
