"""What an index selects of a tensor, as a box of it and what is left to do with the box. Pure."""

from __future__ import annotations

from types import EllipsisType

from checkpoint.region import Region, Shape

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]
"""As for a torch.Tensor: integers, slices with steps from 1, and at most one `...`."""


def select_box(index: Index, shape: Shape) -> tuple[Region, tuple[int | slice, ...]]:
    """Return the smallest box that holds what an index selects, and the index that selects it from the box.

    Raises:
        IndexError: it leaves the tensor. TypeError, ValueError: it is of a kind that is not allowed.
    """
    offset, extent = [], []
    rest: list[int | slice] = []
    for dim, (part, size) in enumerate(zip(_full(index, len(shape)), shape, strict=True)):
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step < 1:
                raise ValueError(f"step {step} in dimension {dim}; allowed are steps from 1")
            offset.append(min(start, size))
            extent.append(max(0, stop - start))
            rest.append(slice(None, None, step))
        else:
            if not -size <= part < size:
                raise IndexError(f"index {part} is out of range for dimension {dim} of size {size}")
            offset.append(part % size)
            extent.append(1)
            rest.append(0)
    return Region.box(tuple(offset), tuple(extent)), tuple(rest)


def _full(index: Index, num_dims: int) -> tuple[int | slice, ...]:
    """Return an index with one part a dimension."""
    parts = index if isinstance(index, tuple) else (index,)
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    plain = [part for part in parts if isinstance(part, slice) or type(part) is int]
    if len(dots) > 1 or len(plain) + len(dots) != len(parts):
        raise TypeError(f"index {index!r}; allowed are integers, slices and one `...`")
    if len(plain) > num_dims:
        raise IndexError(f"{len(plain)} indices for a tensor of {num_dims} dimensions")
    at = dots[0] if dots else len(plain)
    return (*plain[:at], *(slice(None),) * (num_dims - len(plain)), *plain[at:])
