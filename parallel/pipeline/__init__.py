"""Pipeline parallelism: who runs which stage of which micro-batch when (pure), and the runtime that does it."""

from parallel.pipeline.actions import Action
from parallel.pipeline.replay import Costs, Prediction, predict
from parallel.pipeline.schedule import Kind, Schedule, build, check, forward_only, num_stages
from parallel.pipeline.split import Layer, Memory, check_layers, split

__all__ = [
    "Action",
    "Costs",
    "Kind",
    "Layer",
    "Memory",
    "Prediction",
    "Schedule",
    "build",
    "check",
    "check_layers",
    "forward_only",
    "num_stages",
    "predict",
    "split",
]
