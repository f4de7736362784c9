"""Whole pages of memory: locked to a NUMA node where asked, and which node each really lies on."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
from collections import Counter

import torch

from offload.errors import TierError

PAGE_BYTES = mmap.PAGESIZE
_SYSCALLS = {"x86_64": (237, 279), "aarch64": (235, 239)}
"""Numbers of mbind and move_pages."""
_BIND = 2
"""MPOL_BIND: these nodes and no other."""
_STRICT_MOVE = 1 | 2
"""MPOL_MF_STRICT | MPOL_MF_MOVE: move what lies elsewhere, fail where that cannot be."""
_MASK_BITS = 1024


def allocate_pages(num_bytes: int, *, node: int | None = None) -> torch.Tensor:
    """Return zeroed pages as flat bytes, on `node` alone if given; they go when the tensor does.

    Pages take memory when they are first touched, and huge ones where the kernel gives them.

    Raises:
        TierError: the kernel refuses the memory or the node.
    """
    try:
        memory = mmap.mmap(-1, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise TierError(f"{num_bytes} bytes of memory: {error.strerror}; lower the tier's capacity") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do the same, slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    if node is not None:
        bind(pages, node)
    return pages[:num_bytes]


def bind(pages: torch.Tensor, node: int) -> None:
    """Let the pages lie on this node and no other, those that are touched already too.

    Raises:
        TierError: there is no such node, or it has no room.
    """
    mask = (ctypes.c_ulong * (_MASK_BITS // 64))()
    mask[node // 64] = 1 << node % 64
    mbind, _ = _numbers()
    _call(
        f"binding memory to NUMA node {node}",
        mbind,
        ctypes.c_void_p(pages.data_ptr()),
        ctypes.c_ulong(pages.nbytes),
        ctypes.c_int(_BIND),
        mask,
        ctypes.c_ulong(_MASK_BITS + 1),
        ctypes.c_uint(_STRICT_MOVE),
    )


def nodes_of(pages: torch.Tensor) -> dict[int, int]:
    """Return how many pages lie on each NUMA node; those never touched lie on none and are not counted.

    Raises:
        TierError: the kernel does not tell.
    """
    count = -(-pages.nbytes // PAGE_BYTES)
    addresses = (ctypes.c_void_p * count)(*(pages.data_ptr() + index * PAGE_BYTES for index in range(count)))
    status = (ctypes.c_int * count)()
    _, move_pages = _numbers()
    # Without a list of nodes nothing moves: each page's own is put into `status`, or a negative error.
    _call(
        "asking for the NUMA nodes of memory",
        move_pages,
        ctypes.c_int(0),
        ctypes.c_ulong(count),
        addresses,
        None,
        status,
        ctypes.c_int(0),
    )
    return dict(Counter(node for node in status if node >= 0))


def _numbers() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _SYSCALLS:
        raise TierError(f"NUMA calls are known for {', '.join(sorted(_SYSCALLS))}, and this is {machine}")
    return _SYSCALLS[machine]


def _call(what: str, number: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise TierError(f"{what}: {os.strerror(ctypes.get_errno())}")
