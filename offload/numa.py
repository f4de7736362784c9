"""NUMA nodes of this machine, among them memory without CPUs: CXL expanders and memory of devices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A node as Linux shows it."""

    index: int
    cpus: str
    """As Linux writes lists, e.g. `0-15,32-47`; empty: memory alone."""
    memory_bytes: int


def numa_nodes(folder: Path = Path("/sys/devices/system/node")) -> list[NumaNode]:
    """Return the nodes, by index; none where the kernel shows none."""
    paths = [path for path in folder.glob("node*") if re.fullmatch(r"node\d+", path.name)]
    nodes = []
    for path in paths:
        total = re.search(r"MemTotal:\s+(\d+) kB", (path / "meminfo").read_text())
        nodes.append(
            NumaNode(
                index=int(path.name.removeprefix("node")),
                cpus=(path / "cpulist").read_text().strip(),
                memory_bytes=int(total[1]) << 10 if total else 0,
            )
        )
    return sorted(nodes, key=lambda node: node.index)


def memory_only(nodes: Sequence[NumaNode]) -> list[NumaNode]:
    """Return the nodes that have memory and no CPU: CXL memory, or that of a device such as a Grace GPU."""
    return [node for node in nodes if node.memory_bytes and not node.cpus]
