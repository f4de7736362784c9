"""Parallelism: where each rank stands, and with whom it shares what."""

from parallel.config import ParallelConfig
from parallel.errors import GroupError, MeshError, ParallelError
from parallel.groups import MeshGroups
from parallel.mesh import Coordinates, Mesh

__all__ = ["Coordinates", "GroupError", "Mesh", "MeshError", "MeshGroups", "ParallelConfig", "ParallelError"]
