"""The TCP connections between ranks: whose they are, what waits in them, and how fast they may send."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

_SO_MAX_PACING_RATE = 47
UNPACED = 0xFFFFFFFF
"""The kernel's value for no limit."""
Address = tuple[str, int]
End = tuple[int, Address, Address]
"""Descriptor, own address, address of the other end."""


def own_ends() -> list[End]:
    """Return this process's ends of established TCP connections."""
    found: list[End] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as end:
                if end.type != socket.SOCK_STREAM or end.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                found.append((int(name), _address(end.getsockname()), _address(end.getpeername())))
        except OSError:  # closed meanwhile, or listening
            continue
    return found


def peers(ends: Mapping[int, Iterable[End]], rank: int) -> dict[int, list[int]]:
    """Return the rank's descriptors by the rank at their other end, from the ends of all ranks.

    Addresses are compared as the two ends name them: no translation may lie between the ranks.
    """
    owner = {(own, other): peer for peer, theirs in ends.items() for _, own, other in theirs}
    found: dict[int, list[int]] = {}
    for descriptor, own, other in ends[rank]:
        peer = owner.get((other, own))
        if peer is not None and peer != rank:
            found.setdefault(peer, []).append(descriptor)
    return found


def connections(group: dist.ProcessGroup | None = None) -> dict[int, list[int]]:
    """Return this rank's descriptors by the rank in the job at their other end; all ranks of the group call it."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (dist.get_rank(), own_ends()), group=group)
    return peers(dict(gathered), dist.get_rank())


def backlog_bytes(descriptors: Iterable[int]) -> int:
    """Return what was sent on the connections and has not been acknowledged by the other end's kernel."""
    total = 0
    for descriptor in descriptors:
        try:
            (waiting,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
        except OSError:  # closed
            continue
        total += waiting
    return total


def pace(descriptors: Iterable[int], rate_bytes_per_s: int) -> int:
    """Hold sending on the connections to a rate (UNPACED: to none); return how many took it."""
    paced = 0
    for descriptor in descriptors:
        try:
            with socket.socket(fileno=os.dup(descriptor)) as end:
                end.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("I", rate_bytes_per_s))
        except OSError:  # closed
            continue
        paced += 1
    return paced


def _address(name: tuple[Any, ...]) -> Address:
    host = str(name[0])
    return host.removeprefix("::ffff:"), int(name[1])
