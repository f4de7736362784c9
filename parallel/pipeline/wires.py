"""Messages between neighbouring ranks of a pipeline, each in flight while its ranks compute.

A pair of ranks has a communicator of its own for each direction: with NCCL messages of one communicator wait for each
other, and one that was posted early would hold up the answer it waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from parallel.errors import PipelineError

Payload = tuple[Tensor, Tensor]
"""What flows between stages, and the auxiliary loss so far; or the gradients of both."""


class Sending:
    """A message on its way out, which keeps its memory."""

    def __init__(self, work: dist.Work, buffer: Tensor) -> None:
        self._work, self._buffer = work, buffer

    def wait(self) -> None:
        """Wait until it has left (with NCCL: let the stream wait)."""
        self._work.wait()


class Receiving:
    """A message on its way in."""

    def __init__(self, work: dist.Work, payload: Payload) -> None:
        self._work, self._payload = work, payload

    def wait(self) -> Payload:
        """Return the payload when it is there (with NCCL: when the stream gets there)."""
        self._work.wait()
        return self._payload


class Wires:
    """The channels of this rank to its neighbours along `group`; `close()` ends them.

    All ranks of the group make theirs at the same time. `pairs` are (lower, higher) ranks in the group, sorted alike
    everywhere, so that ranks meet in one order.

    Raises: PipelineError if the default group is bound to a device: then all ranks must make each group.
    """

    def __init__(
        self, group: ProcessGroup, pairs: Sequence[tuple[int, int]], device: torch.device, timeout_s: float
    ) -> None:
        if c10d._get_default_group().bound_device_id is not None:
            raise PipelineError(
                "parallel.pipeline: the default process group is bound to a device, so that two ranks cannot make a "
                "group alone; call init_process_group without device_id"
            )
        self._members = dist.get_process_group_ranks(group)
        self._channels: dict[tuple[int, int], ProcessGroup] = {}
        self._timeout = timedelta(seconds=timeout_s)
        rank = group.rank()
        store = c10d._get_default_store()
        made = store.add(f"parallel/pipeline/{group.group_name}/{rank}", 1)
        for low, high in pairs:
            for source, target in ((low, high), (high, low)):
                if rank in (low, high):
                    name = f"{group.group_name}/pipeline/{made}/{source}>{target}"
                    self._channels[source, target] = self._join(name, source, target, group)
                    self._open(source, target, rank, device)

    def send(self, payload: Payload, source: int, target: int) -> Sending:
        """Post a message to the neighbour; the payload is copied."""
        x, aux = payload
        buffer, x_part, aux_part = _buffer(x)
        x_part.copy_(x)
        aux_part.copy_(aux)
        work = dist.isend(buffer, self._members[target], group=self._channels[source, target])
        assert work is not None
        return Sending(work, buffer)

    def receive(self, like: Tensor, source: int, target: int) -> Receiving:
        """Post the receipt of the neighbour's next message, with an x like `like`."""
        buffer, *payload = _buffer(like)
        work = dist.irecv(buffer, self._members[source], group=self._channels[source, target])
        assert work is not None
        return Receiving(work, (payload[0], payload[1]))

    def close(self) -> None:
        """Destroy the channels; a second call does nothing."""
        channels = list(self._channels.values())
        self._channels.clear()
        if dist.is_initialized():  # else they went with the default group
            for channel in channels:
                dist.destroy_process_group(channel)

    def _join(self, name: str, source: int, target: int, group: ProcessGroup) -> ProcessGroup:
        ranks = sorted((self._members[source], self._members[target]))
        me = dist.get_rank()
        backend, store = c10d._world.pg_map[group]
        # What new_group does, with a name of our own: its own names need all ranks to have made as many groups.
        channel: ProcessGroup
        channel, _ = c10d._new_process_group_helper(
            2,
            ranks.index(me),
            ranks,
            c10d.Backend(backend),
            store,
            c10d.GroupName(name),
            timeout=self._timeout,
            group_desc="pipeline",
        )
        c10d._world.pg_group_ranks[channel] = {rank: index for index, rank in enumerate(ranks)}
        return channel

    def _open(self, source: int, target: int, rank: int, device: torch.device) -> None:
        """Exchange a byte, since NCCL connects at the first message and would then hold up both ranks."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        channel = self._channels[source, target]
        if rank == source:
            dist.send(byte, self._members[target], group=channel)
        else:
            dist.recv(byte, self._members[source], group=channel)


def aux_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the auxiliary loss beside `x`: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _buffer(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the memory of one message, and the views of it that are x and the auxiliary loss.

    One message instead of two, for one copy: 32 MiB cost an H200 some 20 us.
    """
    aux = torch.empty((), dtype=aux_dtype(like))
    start = -(-like.numel() * like.element_size() // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(start + aux.element_size(), dtype=torch.uint8, device=like.device)
    x_bytes = buffer[: like.numel() * like.element_size()]
    return buffer, x_bytes.view(like.dtype).view(like.shape), buffer[start:].view(aux.dtype).reshape(())


_ALIGNMENT = 16
"""Bytes; what kernels that load vectors want of where the auxiliary loss begins, and more than any dtype needs."""
