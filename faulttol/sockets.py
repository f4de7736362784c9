"""The TCP connections between ranks: whose they are, what waits in them, and how fast they may send."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

_SO_MAX_PACING_RATE = 47
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_PAYLOAD = (
    (0x30, 0, 0, 12),  # A = byte 12 of the TCP header: its length in words, in the upper half
    (0x54, 0, 0, 0xF0),  # A &= 0xf0
    (0x74, 0, 0, 2),  # A >>= 2: in bytes
    (0x07, 0, 0, 0),  # X = A
    (0x80, 0, 0, 0),  # A = length of the segment with its header
    (0x1C, 0, 0, 0),  # A -= X: of the payload
    (0x15, 0, 1, 0),  # is it 0?
    (0x06, 0, 0, 0xFFFFFFFF),  # yes: let it pass
    (0x06, 0, 0, 0),  # no: drop it
)
"""Classic BPF, which every process may attach to its own sockets: code, jumps, operand."""
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
    return _set(descriptors, _SO_MAX_PACING_RATE, struct.pack("I", rate_bytes_per_s))


def block(descriptors: Iterable[int]) -> int:
    """Drop what arrives with a payload on the connections, unseen by their owner; return how many took it.

    What this end sends still arrives: acknowledgements pass. The senders repeat what was dropped, so that all goes on
    after `unblock`, once they try again.
    """
    program = (ctypes.c_uint64 * len(_DROP_PAYLOAD))(*(_instruction(*one) for one in _DROP_PAYLOAD))
    packed = struct.pack("HxxxxxxP", len(_DROP_PAYLOAD), ctypes.addressof(program))
    return _set(descriptors, _SO_ATTACH_FILTER, packed)


def unblock(descriptors: Iterable[int]) -> int:
    """Let arrive what `block` dropped; return on how many connections."""
    return _set(descriptors, _SO_DETACH_FILTER, struct.pack("i", 0))


def _instruction(code: int, if_true: int, if_false: int, operand: int) -> int:
    return int.from_bytes(struct.pack("HBBI", code, if_true, if_false, operand), sys.byteorder)


def _set(descriptors: Iterable[int], option: int, value: bytes) -> int:
    taken = 0
    for descriptor in descriptors:
        try:
            with socket.socket(fileno=os.dup(descriptor)) as end:
                end.setsockopt(socket.SOL_SOCKET, option, value)
        except OSError:  # closed, or it has no filter
            continue
        taken += 1
    return taken


def _address(name: tuple[Any, ...]) -> Address:
    host = str(name[0])
    return host.removeprefix("::ffff:"), int(name[1])
