"""Pure: how ranks fit on the nodes of a cluster, and which actor becomes which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Home:
    """Where one actor lives."""

    node_id: str
    pid: int
    start_ticks: int
    """When the process began, in the kernel's count: with `pid` it names one process for ever."""
    folder: str
    """On its node: its log and heartbeat."""
    gpu_ids: tuple[str, ...]
    """GPUs of the node that the cluster reserved for it."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's place, and the GPUs that it and its neighbours on the node can see."""

    actor: int
    local_rank: int
    local_world_size: int
    node_rank: int
    visible_gpus: tuple[str, ...]


def strategy(demand: Resources, world_size: int, nodes: Sequence[Resources]) -> str:
    """How to pack the ranks: on one node when one is large enough for all, else on as few as can be."""
    return "STRICT_PACK" if any(_capacity(demand, node) >= world_size for node in nodes) else "PACK"


def fits(demand: Resources, world_size: int, nodes: Sequence[Resources]) -> bool:
    """Whether the nodes, were they idle, could hold all ranks."""
    return sum(_capacity(demand, node) for node in nodes) >= world_size


def seats(homes: Sequence[Home], first_node_id: str) -> list[Seat]:
    """A seat per rank: ranks of a node are neighbours, `first_node_id` comes first, GPUs are taken in order.

    The processes of one node all see the GPUs of all of them, as NCCL and DeepSpeed expect: rank `local_rank`
    owns the GPU of that index among them when each reserved one.
    """
    node_ids = sorted({home.node_id for home in homes}, key=lambda node_id: (node_id != first_node_id, node_id))
    result: list[Seat] = []
    for node_rank, node_id in enumerate(node_ids):
        actors = [index for index, home in enumerate(homes) if home.node_id == node_id]
        actors.sort(key=lambda index: [_gpu_order(gpu) for gpu in homes[index].gpu_ids])
        gpus = sorted({gpu for index in actors for gpu in homes[index].gpu_ids}, key=_gpu_order)
        result += [
            Seat(actor, local_rank, len(actors), node_rank, tuple(gpus)) for local_rank, actor in enumerate(actors)
        ]
    return result


def _capacity(demand: Resources, node: Resources) -> int:
    """How many ranks an idle node holds; resources are counted in ten-thousandths, as Ray does."""
    wanted = {name: round(amount * 10_000) for name, amount in demand.items() if amount > 0}
    return min(round(node.get(name, 0.0) * 10_000) // amount for name, amount in wanted.items())


def _gpu_order(gpu_id: str) -> tuple[int, str]:
    return (int(gpu_id), "") if gpu_id.isdigit() else (0, gpu_id)
