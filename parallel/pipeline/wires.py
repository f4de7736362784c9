"""Messages between neighbouring ranks of a pipeline, each in flight while its ranks compute.

A pair of ranks has a communicator of its own for each direction: with NCCL messages of one communicator wait for each
other, and one that was posted early would hold up the answer it waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

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

    def __init__(self, work: dist.Work, payload: Payload, device: torch.device) -> None:
        self._work, self._payload, self._device = work, payload, device

    def wait(self) -> Payload:
        """Return the payload when it is there (with NCCL: when the stream gets there)."""
        self._work.wait()
        x, aux = self._payload
        return x.to(self._device), aux.to(self._device)


class _Channel(Protocol):
    """What torch's backends offer; ranks are 0 and 1."""

    def send(self, tensors: list[Tensor], rank: int, tag: int, /) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int, /) -> dist.Work: ...

    def shutdown(self) -> None: ...


class Wires:
    """The channels of this rank to its neighbours along `group`; `close()` ends them.

    All ranks of the group make theirs at the same time. `pairs` are (lower, higher) ranks in the group, sorted alike
    everywhere, so that ranks meet in one order. The channels are bare backends: torch's groups of some ranks of a job
    are a matter of all its ranks (or, with `use_local_synchronization`, of how many groups each has made before).
    With `via_host` messages between GPUs go through the hosts' memory: slow, and no kernel of theirs waits on a GPU.
    """

    def __init__(
        self,
        group: ProcessGroup,
        pairs: Sequence[tuple[int, int]],
        device: torch.device,
        timeout_s: float,
        *,
        via_host: bool = False,
    ) -> None:
        rank, store = group.rank(), c10d._get_default_store()
        self._device = device
        self._memory = torch.device("cpu") if via_host else device
        self._channels: dict[tuple[int, int], _Channel] = {}
        counted = store.add(f"parallel/pipeline/{group.group_name}/{rank}", 1)
        for low, high in pairs:
            for source, target in ((low, high), (high, low)):
                if rank in (low, high):
                    name = f"parallel/pipeline/{group.group_name}/{counted}/{source} to {target}"
                    channel = _backend(PrefixStore(name, store), int(rank == high), self._memory, timeout_s)
                    self._channels[source, target] = channel
                    # NCCL connects at the first message and would then hold up both ranks.
                    byte = torch.zeros(1, dtype=torch.uint8, device=self._memory)
                    peer = int(rank == low)
                    (channel.send if rank == source else channel.recv)([byte], peer, 0).wait()

    def send(self, payload: Payload, source: int, target: int) -> Sending:
        """Post a message to the neighbour; the payload is copied."""
        x, aux = payload
        buffer, x_part, aux_part = _buffer(x, self._memory)
        x_part.copy_(x)
        aux_part.copy_(aux)
        return Sending(self._channels[source, target].send([buffer], int(target > source), 0), buffer)

    def receive(self, like: Tensor, source: int, target: int) -> Receiving:
        """Post the receipt of the neighbour's next message, with an x like `like`."""
        buffer, *payload = _buffer(like, self._memory)
        work = self._channels[source, target].recv([buffer], int(source > target), 0)
        return Receiving(work, (payload[0], payload[1]), self._device)

    def close(self) -> None:
        """End the channels; a second call does nothing."""
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            channel.shutdown()


def _backend(store: Store, rank: int, device: torch.device, timeout_s: float) -> _Channel:
    """Return one end of a channel between ranks 0 and 1."""
    timeout = timedelta(seconds=timeout_s)
    made: Any
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.config.max_ctas = _MAX_CTAS
        made = dist.ProcessGroupNCCL(store, rank, 2, options)
    else:
        made = dist.ProcessGroupGloo(store, rank, 2, timeout)
    channel: _Channel = made
    return channel


def aux_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the auxiliary loss beside `x`: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _buffer(like: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the memory of one message on `device`, and the views of it that are x and the auxiliary loss.

    A copy of x is cheaper than a second message.
    """
    aux = torch.empty((), dtype=aux_dtype(like))
    start = -(-like.numel() * like.element_size() // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(start + aux.element_size(), dtype=torch.uint8, device=device)
    x_bytes = buffer[: like.numel() * like.element_size()]
    return buffer, x_bytes.view(like.dtype).view(like.shape), buffer[start:].view(aux.dtype).reshape(())


_MAX_CTAS = 2
"""Multiprocessors that an NCCL message may hold: one that is posted early holds them until it comes.

On two H200s a step of 1f1b took 0.635 s with NCCL's own choice and 0.561 s with 2 (`parallel.bench.pipeline`).
"""

_ALIGNMENT = 16
"""Bytes; what kernels that load vectors want of where the auxiliary loss begins, and more than any dtype needs."""
