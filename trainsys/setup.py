"""What a trainer works with: device, groups, prepared data, agreed on by all ranks before the first step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed as dist

from launch import RankContext
from parallel import Mesh, MeshGroups
from parallel.hybrid import GROUPS
from parallel.randomness import seeded_like
from trainsys import data
from trainsys.background import repeated
from trainsys.config import RunConfig
from trainsys.errors import ConfigError, TrainsysError
from trainsys.folder import RunFolder
from trainsys.precision import Asked, Choice, ability_of, agree, with_precision

_CONTROL_TIMEOUT = timedelta(hours=24)
"""While one rank prepares data or writes a model the others wait; the launcher notices a dead one long before."""
_BEAT_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything of a run that is not the model."""

    config: RunConfig
    """With the precision that `engine.precision = auto` came to."""
    folder: RunFolder
    context: RankContext
    device: torch.device
    groups: MeshGroups
    """Made with the process group of all ranks, and gone with it."""
    control: dist.ProcessGroup
    """gloo over all ranks, for small facts on the CPU."""
    run_id: str
    """Of the run, the same after every resume."""
    launch_id: str
    """Equal on all ranks, new at every start: names this process group's checkpoint attempts."""
    prepared: data.PreparedInfo
    tokenizer: data.Tokenizer
    precision: Choice

    @property
    def rank(self) -> int:
        return self.context.env.rank

    @property
    def mesh(self) -> Mesh:
        return self.groups.mesh

    @property
    def seed_index(self) -> int:
        """What tells this rank's generators from others'; equal on ranks that must drop the same."""
        return seeded_like(self.mesh, self.rank)

    @property
    def counts(self) -> bool:
        """Whether this rank's sequences count: of the ranks that have the same, one's do."""
        at = self.mesh.coordinates(self.rank)
        return at.pipeline == at.context == at.tensor == 0


def build(config: RunConfig, choose_folder: Callable[[], RunFolder], context: RankContext) -> Setup:
    """Join the other ranks and agree on what all share; every rank calls it. Only rank 0 calls `choose_folder`.

    Raises:
        TrainsysError, data.DataError: naming the rank and the cause; on every rank alike.
    """
    met = meet(config, choose_folder, context)
    prepared = _prepare(config, met.folder, context, met.control)
    return Setup(
        config=met.config,
        folder=met.folder,
        context=context,
        device=met.device,
        groups=met.groups,
        control=met.control,
        run_id=met.run_id,
        launch_id=met.launch_id,
        prepared=prepared,
        tokenizer=prepared.tokenizer(),
        precision=met.precision,
    )


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the ranks of any run agree on first; the fields are those of Setup."""

    config: RunConfig
    folder: RunFolder
    device: torch.device
    groups: MeshGroups
    control: dist.ProcessGroup
    run_id: str
    launch_id: str
    precision: Choice


def meet(config: RunConfig, choose_folder: Callable[[], RunFolder], context: RankContext) -> Meeting:
    """Join the other ranks: process groups, the run's folder, names and precision. As `build`, but for the data."""
    env = context.env
    device = device_of(config, env.local_rank if env.device_index < 0 else env.device_index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    context.init_process_group("nccl" if device.type == "cuda" else "gloo", config.engine.timeout_s)
    with context.making_groups():
        control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
    mine = all_or_none(lambda: _identify(choose_folder()) if env.rank == 0 else None, control)
    run = _from_rank_0(mine, control)
    ability = all_or_none(lambda: ability_of(device), control)
    precision = agree(config.engine.precision, run.began, ability, control)
    if run.began == "auto":
        all_or_none(lambda: run.folder.settle(precision.precision) if env.rank == 0 else None, control)
    return Meeting(
        config=with_precision(config, precision.precision),
        folder=run.folder,
        device=device,
        groups=_groups(config, context),
        control=control,
        run_id=run.run_id,
        launch_id=run.launch_id,
        precision=precision,
    )


def _groups(config: RunConfig, context: RankContext) -> MeshGroups:
    """Make every group of the layout now, when all ranks are here; later ones wait for nobody."""
    with context.making_groups():
        groups = MeshGroups(Mesh(config.parallel, context.env.world_size), timeout_s=config.engine.timeout_s)
        groups.prepare(*GROUPS)
    return groups


@dataclass(frozen=True, slots=True)
class _Identity:
    """What rank 0 knows of the run, and of this start."""

    folder: RunFolder
    run_id: str
    launch_id: str
    began: Asked
    """The precision of the run's record."""


def _identify(folder: RunFolder) -> _Identity:
    record = folder.record()
    return _Identity(folder, record["run_id"], f"{time.time_ns():x}", record["config"]["engine"]["precision"])


def _from_rank_0(mine: _Identity | None, control: dist.ProcessGroup) -> _Identity:
    box = [mine]
    dist.broadcast_object_list(box, src=0, group=control)
    assert box[0] is not None, "rank 0 has identified the run"
    return box[0]


def device_of(config: RunConfig, local_rank: int) -> torch.device:
    """Return the device of a rank.

    Raises:
        ConfigError: CUDA was asked for, or gets too many ranks.
    """
    wanted, count = config.engine.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return torch.device("cpu")
    if not count:
        ray = "; under Ray reserve one for every rank: --launch.gpus_per_rank=1" if config.launch.kind == "ray" else ""
        raise ConfigError([f"config: engine.device: 'cuda' was asked for and this rank is shown no GPU{ray}"])
    # Every launcher shows a rank all GPUs of the ranks on its machine.
    if local_rank >= count:
        raise ConfigError(
            [f"config: engine.device: local rank {local_rank} has no GPU of its own; this machine has {count}"]
        )
    return torch.device("cuda", local_rank)


def _prepare(
    config: RunConfig, folder: RunFolder, context: RankContext, control: dist.ProcessGroup
) -> data.PreparedInfo:
    """Return the prepared data; the first rank of each machine makes it if it is not there yet."""
    cache = Path(config.data.cache_dir).absolute() if config.data.cache_dir else folder.path.parent / ".data"

    def show(progress: data.PrepareProgress) -> None:
        context.heartbeat.beat(step=0, phase="prepare")

    def prepare() -> Path:
        return data.ensure_prepared(config.data, cache, on_progress=show)

    context.heartbeat.beat(step=0, phase="prepare")
    with _waiting(context):
        all_or_none(prepare if context.env.local_rank == 0 else lambda: None, control)
    return data.read_prepared(prepare())


@contextlib.contextmanager
def _waiting(context: RankContext) -> Iterator[None]:
    """Keep the heartbeat of a rank that does not prepare moving: the one that does is the one to be watched."""
    if context.env.local_rank == 0:
        yield
        return

    def beat() -> bool:
        context.heartbeat.beat(step=0, phase="prepare")
        return True

    with repeated(beat, _BEAT_S, name="waiting"):
        yield


def all_or_none(action: Callable[[], T], control: dist.ProcessGroup) -> T:
    """Return what `action` returns, once it has succeeded on every rank; a rank that raised alone would hang the rest.

    Raises:
        The rank's own error where it failed; TrainsysError naming the failed ranks elsewhere.
    """
    error: Exception | None = None
    try:
        value = action()
    except Exception as caught:  # noqa: BLE001  raised below, after the others have heard of it
        error = caught
    verdicts: list[str | None] = [None] * control.size()
    dist.all_gather_object(verdicts, str(error) if error else None, group=control)
    if error:
        raise error
    failed = {rank: verdict for rank, verdict in enumerate(verdicts) if verdict is not None}
    if failed:
        raise TrainsysError("; ".join(f"rank {rank}: {verdict}" for rank, verdict in failed.items()))
    return value
