"""Which tensor goes into which tier, and why: pure.

Follows the CXL paper (arXiv 2507.03305): what a CPU walks through word by word (masters, moments and gradients of an
optimizer on the CPU) waits for every cache line, so it goes to local DRAM first; what only a copy engine touches is
streamed, so it goes to CXL memory, striped over the cards so that their rates add up, and leaves DRAM to the others.
What is left over goes to a disk (ZeRO-Infinity, arXiv 2104.07857), where a CPU-walked tensor is staged through DRAM.
Differs: tensors that are touched most often for their size come first, and the last one that fits is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from offload.errors import PlacementError, SpecError
from offload.tier import TierSpec

Walker = Literal["gpu", "cpu", "dma"]
"""Who goes through a tensor: kernels on the GPU, instructions of a CPU, or a copy engine."""
Kind = Literal["gpu", "cpu", "cxl", "nvme"]
When = Literal["forward", "backward", "update", "save"]

_PREFERENCES: dict[Walker, tuple[Kind, ...]] = {
    "gpu": ("gpu",),
    "cpu": ("cpu", "cxl", "nvme"),
    "dma": ("cxl", "cpu", "nvme"),
}
_REASONS: dict[tuple[Walker, Kind], str] = {
    ("gpu", "gpu"): "kernels read it where it is",
    ("cpu", "cpu"): "the CPU walks it, and waits for every cache line",
    ("cpu", "cxl"): "the CPU walks it, but DRAM is full",
    ("cpu", "nvme"): "no memory is left; staged through DRAM for the CPU",
    ("dma", "cxl"): "only copied; leaves DRAM to what the CPU walks",
    ("dma", "cpu"): "only copied, and there is no CXL memory left",
    ("dma", "nvme"): "only copied, and no memory is left",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorUse:
    """A tensor, or many alike, and how a step uses it.

    Raises:
        SpecError: a value is out of range; all of them at once.
    """

    name: str
    num_bytes: int
    walker: Walker
    reads_per_step: float = 1.0
    """How often a step goes through all of it, reading."""
    writes_per_step: float = 1.0
    when: When = "update"
    divisible: bool = True
    """Whether parts of it may lie in different tiers."""

    def __post_init__(self) -> None:
        problems = [
            f"tensor {self.name}: {key}: {value}; finite, at least 0"
            for key in ("num_bytes", "reads_per_step", "writes_per_step")
            if not 0 <= (value := getattr(self, key)) < math.inf
        ]
        if self.walker not in _PREFERENCES:
            problems.append(f"tensor {self.name}: walker: {self.walker!r}; allowed: {', '.join(_PREFERENCES)}")
        if problems:
            raise SpecError("\n".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class TierOffer:
    """A tier that a placement may use. Several of kind `cxl` are cards, over which tensors are striped."""

    kind: Kind
    spec: TierSpec


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a tensor in one tier."""

    tier: str
    """Its label, so an emulated one says so."""
    num_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a tensor is."""

    tensor: TensorUse
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything is."""

    assignments: tuple[Assignment, ...]
    offers: tuple[TierOffer, ...]

    @property
    def used_bytes(self) -> dict[str, int]:
        """Bytes in each tier, by label; all tiers, in the order in which they were offered."""
        used = {offer.spec.label: 0 for offer in self.offers}
        for assignment in self.assignments:
            for part in assignment.parts:
                used[part.tier] += part.num_bytes
        return used

    @property
    def step_s(self) -> dict[str, float]:
        """Seconds a step that each tier moves bytes, if reads and writes do not wait for each other."""
        taken = {}
        for offer in self.offers:
            reads = writes = 0.0
            for assignment in self.assignments:
                for part in assignment.parts:
                    if part.tier == offer.spec.label:
                        reads += part.num_bytes * assignment.tensor.reads_per_step
                        writes += part.num_bytes * assignment.tensor.writes_per_step
            taken[offer.spec.label] = max(reads / offer.spec.read_bytes_per_s, writes / offer.spec.write_bytes_per_s)
        return taken

    def table(self) -> str:
        """Return a line a part: tensor, tier, bytes, reason."""
        rows = [
            (assignment.tensor.name, part.tier, f"{part.num_bytes / 1e9:.3f} GB", part.reason)
            for assignment in self.assignments
            for part in assignment.parts
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {tier:<{widths[1]}}  {size:>{widths[2]}}  {reason}"
            for name, tier, size, reason in rows
        )


def place(tensors: Sequence[TensorUse], offers: Sequence[TierOffer]) -> Placement:
    """Return where each tensor goes.

    Raises:
        PlacementError: they do not fit; with the bytes that are missing, by which kind of tier would help.
    """
    free = [offer.spec.capacity_bytes for offer in offers]
    placed: dict[int, tuple[Part, ...]] = {}
    missing: dict[int, int] = {}
    for index in _order(tensors):
        parts, left = _put(tensors[index], offers, free)
        placed[index] = parts
        if left:
            missing[index] = left
    if missing:
        raise _refusal([(tensors[index], left) for index, left in sorted(missing.items())], offers, free)
    found = tuple(Assignment(tensor, placed[index]) for index, tensor in enumerate(tensors))
    return Placement(found, tuple(offers))


def _order(tensors: Sequence[TensorUse]) -> list[int]:
    """Return tensors in the order of their claims: walked before copied, often before seldom, then as given."""
    rank: dict[Walker, int] = {"gpu": 0, "cpu": 1, "dma": 2}
    return sorted(
        range(len(tensors)),
        key=lambda i: (rank[tensors[i].walker], -(tensors[i].reads_per_step + tensors[i].writes_per_step), i),
    )


def _put(tensor: TensorUse, offers: Sequence[TierOffer], free: list[int]) -> tuple[tuple[Part, ...], int]:
    """Take room for a tensor; return its parts and the bytes that found none."""
    parts: list[Part] = []
    left = tensor.num_bytes
    for kind in _PREFERENCES[tensor.walker]:
        members = [index for index, offer in enumerate(offers) if offer.kind == kind and free[index] > 0]
        room = sum(free[index] for index in members)
        if not left or not room or (not tensor.divisible and room < left):
            continue
        taken = min(left, room)
        striped = _stripe(taken, members, offers, free)
        reason = _REASONS[tensor.walker, kind]
        if len(striped) > 1:
            reason += f"; striped over {len(striped)}"
        for index, num_bytes in striped.items():
            free[index] -= num_bytes
            parts.append(Part(offers[index].spec.label, num_bytes, reason))
        left -= taken
    return tuple(parts), left


def _stripe(num_bytes: int, members: Sequence[int], offers: Sequence[TierOffer], free: Sequence[int]) -> dict[int, int]:
    """Share bytes out over tiers by their rates, as far as each has room."""
    shares: dict[int, int] = dict.fromkeys(members, 0)
    left, open_members = num_bytes, list(members)
    while left and open_members:
        rates = [min(offers[i].spec.read_bytes_per_s, offers[i].spec.write_bytes_per_s) for i in open_members]
        wanted = [int(left * rate / sum(rates)) for rate in rates]
        wanted[0] += left - sum(wanted)
        for index, share in zip(list(open_members), wanted, strict=True):
            given = min(share, free[index] - shares[index])
            shares[index] += given
            left -= given
        open_members = [index for index in open_members if shares[index] < free[index]]
    return {index: share for index, share in shares.items() if share}


def _refusal(
    missing: Iterable[tuple[TensorUse, int]], offers: Sequence[TierOffer], free: Sequence[int]
) -> PlacementError:
    lines, total = [], 0
    for tensor, left in missing:
        kinds = _PREFERENCES[tensor.walker]
        there = [
            f"{offer.spec.label} has {left_over} of {offer.spec.capacity_bytes} left"
            for offer, left_over in zip(offers, free, strict=True)
            if offer.kind in kinds
        ]
        wanted = " or ".join(kinds)
        lines.append(
            f"{tensor.name}: {left} bytes of {tensor.num_bytes} have no room "
            f"({'; '.join(there) or f'no {wanted} tier'}); give {left} bytes more of {wanted}"
        )
        total += left
    remedy = "or use fewer parameters, smaller micro-batches, or more ranks that share the state"
    return PlacementError("\n".join([*lines, f"{total} bytes are missing in all; add them as above, {remedy}"]), total)


def efficiency(*, flops: float, moved_bytes: float, bytes_per_s: float, peak_flops_per_s: float) -> float:
    """Return the share of the peak that is reached where bytes and compute take turns (ZeRO-Infinity, section 4).

    ait x bandwidth / (ait x bandwidth + peak), where ait is the operations for each byte that moves.
    """
    if not moved_bytes:
        return 1.0
    intensity = flops / moved_bytes
    return intensity * bytes_per_s / (intensity * bytes_per_s + peak_flops_per_s)
