"""Runs a function on many ranks, as processes or Ray actors, and watches them until they end."""

from launch.config import LaunchConfig
from launch.context import RankContext
from launch.diagnosis import Observation
from launch.errors import ClusterError, JobNotFound, LaunchError, PlacementError, RankFailed, TokenError
from launch.fleet import Recovery
from launch.job import Job, JobResult
from launch.launcher import run
from launch.rankenv import RankEnv

__all__ = [
    "ClusterError",
    "Job",
    "JobNotFound",
    "JobResult",
    "LaunchConfig",
    "LaunchError",
    "Observation",
    "PlacementError",
    "RankContext",
    "RankEnv",
    "RankFailed",
    "Recovery",
    "TokenError",
    "run",
]
