"""Which calls of torch are collectives and messages, and where in their arguments is what is recorded. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operation:
    """One way to start a collective or a message; arguments are named by their places."""

    name: str
    """Of the `c10d` operator without its `_` at the end, or of the backend's method."""
    kind: str
    """One of `events.KINDS`."""
    tensors: int | None
    """What is counted: a tensor, a list, or a list of lists; None: nothing is."""
    group: int | None = None
    """The process group; None: the object whose method it is."""
    peer: int | None = None
    """The other end's or the root's rank in the group."""
    device: int | None = None
    """A tensor that tells the device, where none is counted."""


OPERATORS = (
    Operation("allreduce_", "all_reduce", 0, 1),
    Operation("allreduce_coalesced_", "all_reduce_coalesced", 0, 1),
    Operation("broadcast_", "broadcast", 0, 1, 2),
    Operation("reduce_", "reduce", 0, 1, 3),
    Operation("allgather_", "all_gather", 1, 2),
    Operation("_allgather_base_", "all_gather_into_tensor", 1, 2),
    Operation("allgather_coalesced_", "all_gather_coalesced", 1, 2),
    Operation("allgather_into_tensor_coalesced_", "all_gather_into_tensor_coalesced", 1, 2),
    Operation("reduce_scatter_", "reduce_scatter", 1, 2),
    Operation("_reduce_scatter_base_", "reduce_scatter_tensor", 1, 2),
    Operation("reduce_scatter_tensor_coalesced_", "reduce_scatter_tensor_coalesced", 1, 2),
    Operation("gather_", "gather", 1, 2, 3),
    Operation("scatter_", "scatter", 0, 2, 3),
    Operation("alltoall_", "all_to_all", 1, 2),
    Operation("alltoall_base_", "all_to_all_single", 1, 2),
    Operation("barrier", "barrier", None, 1, device=0),
    Operation("monitored_barrier_", "monitored_barrier", None, 1, device=0),
    Operation("send", "send", 0, 1, 2),
    Operation("recv_", "recv", 0, 1, 2),
    Operation("recv_any_source_", "recv_any_source", 0, 1),
)
"""The operators of `c10d`: every caller of a `ProcessGroup` ends up there, from Python and from C++."""

BACKEND_METHODS = (
    Operation("send", "send", 0, peer=1),
    Operation("recv", "recv", 0, peer=1),
    Operation("recv_anysource", "recv_any_source", 0),
    Operation("allreduce", "all_reduce", 0),
    Operation("allreduce_coalesced", "all_reduce_coalesced", 0),
    Operation("broadcast", "broadcast", 0),
    Operation("reduce", "reduce", 0),
    Operation("allgather", "all_gather", 1),
    Operation("_allgather_base", "all_gather_into_tensor", 1),
    Operation("allgather_coalesced", "all_gather_coalesced", 1),
    Operation("reduce_scatter", "reduce_scatter", 1),
    Operation("_reduce_scatter_base", "reduce_scatter_tensor", 1),
    Operation("gather", "gather", 1),
    Operation("scatter", "scatter", 0),
    Operation("alltoall", "all_to_all", 1),
    Operation("alltoall_base", "all_to_all_single", 1),
    Operation("barrier", "barrier", None),
)
"""Methods of a bare `Backend`, which Python can call past the operators."""

ENDS_AT_WAIT = frozenset(
    {"send", "recv", "recv_any_source", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"}
)
"""Kinds whose gloo work is not `is_completed()` before somebody waited for it; of the reductions not even then."""
