"""Parallelism: where each rank stands, and with whom it shares what."""

from parallel.config import ParallelConfig
from parallel.errors import MeshError, ParallelError
from parallel.groups import MeshGroups
from parallel.mesh import Coordinates, Mesh

__all__ = ["Coordinates", "Mesh", "MeshError", "MeshGroups", "ParallelConfig", "ParallelError"]
