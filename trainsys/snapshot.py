"""What a checkpoint of a run holds beside weights and optimizer: generators, position, counters; and back."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

import checkpoint as ck
from trainsys.data import DataPosition, Order, TokenDataset
from trainsys.engine import Engine
from trainsys.errors import RunError
from trainsys.setup import all_or_none

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the run a checkpoint was taken."""

    step: int
    """Optimizer steps done."""
    data: DataPosition
    """The next sample, and which data and order it counts in."""
    tokens_seen: int
    """Targets trained on so far, all ranks."""


def save(checkpointer: ck.Checkpointer, engine: Engine, place: Place) -> ck.SaveHandle:
    """Start a checkpoint of this rank's part; every rank calls it after the same step."""
    generators = {f"generator.{name}": ck.RankLocal(state) for name, state in generator_states().items()}
    return checkpointer.save(
        place.step,
        {**engine.slices(), **generators},
        objects={"python_random": _python_state()},
        shared={
            "counters": engine.counters(),
            "data": place.data.state_dict(),
            "tokens_seen": place.tokens_seen,
        },
    )


def load_newest(
    checkpointer: ck.Checkpointer, engine: Engine, dataset: TokenDataset, order: Order, control: dist.ProcessGroup
) -> Place | None:
    """Overwrite weights, optimizer state and generators with the newest checkpoint that is whole; None without any.

    Every rank calls it. Rank 0 chooses; where any rank finds damage, all go back to the checkpoint before. With
    another number of ranks than at the save, ranks that have no generator state of their own keep their fresh, seeded
    one; everything else is resharded.

    Raises:
        RunError: there are checkpoints, and each is damaged; naming the damage.
        checkpoint.CheckpointError: a checkpoint describes another model, or cannot be read.
        data.ResumeError: the tokens, the window length or the order changed since the save.
    """
    fresh = generator_states()
    tried: set[str] = set()
    while (info := _choose(checkpointer, control)) is not None:
        if info.folder in tried:
            raise RunError(f"{info.path}: is damaged and cannot be marked so (storage not writable?); move it away")
        tried.add(info.folder)
        loaded, damage = _agree(partial(_fetch, checkpointer, info, engine, fresh), control)
        if loaded is not None:
            return _apply(loaded, engine, fresh, dataset, order)
        # The load has marked it, so that the next choice is another one.
        _log.warning("%s: is damaged, going back to the checkpoint before: %s", info.path, damage)
    return None


Fetched = tuple[ck.Loaded | None, str]
"""What was loaded, or nothing and what is damaged."""


def _agree(fetch: Callable[[], Fetched], control: dist.ProcessGroup) -> Fetched:
    """Return this rank's result if every rank loaded, else nothing and the damage that any rank found."""
    mine = all_or_none(fetch, control)
    damages = [""] * control.size()
    dist.all_gather_object(damages, mine[1], group=control)
    found = [f"rank {rank}: {damage}" for rank, damage in enumerate(damages) if damage]
    return (None, "; ".join(found)) if found else mine


def _choose(checkpointer: ck.Checkpointer, control: dist.ProcessGroup) -> ck.CheckpointInfo | None:
    """Return rank 0's newest checkpoint, on every rank."""
    box = [all_or_none(partial(_newest, checkpointer) if control.rank() == 0 else lambda: None, control)]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]


def _newest(checkpointer: ck.Checkpointer) -> ck.CheckpointInfo | None:
    try:
        return checkpointer.latest()
    except ck.CorruptCheckpoint as error:
        raise RunError(f"no checkpoint is whole: {error}; move them away to start the run anew") from error


def _fetch(
    checkpointer: ck.Checkpointer, info: ck.CheckpointInfo, engine: Engine, fresh: Mapping[str, Tensor]
) -> Fetched:
    generators = {f"generator.{name}": ck.RankLocal(state) for name, state in fresh.items()}
    try:
        return checkpointer.load(info, {**engine.slices(), **generators}), ""
    except ck.CorruptCheckpoint as error:
        return None, str(error)


def _apply(
    loaded: ck.Loaded, engine: Engine, fresh: Mapping[str, Tensor], dataset: TokenDataset, order: Order
) -> Place:
    engine.after_load(loaded.shared["counters"])
    missing = {name.removeprefix("generator.") for name in loaded.missing_local}
    _set_generator_states({name: state for name, state in fresh.items() if name not in missing})
    if "python_random" in loaded.objects:
        _set_python_state(loaded.objects["python_random"])
    return Place(
        step=loaded.step,
        data=DataPosition.resume(loaded.shared["data"], dataset, order),
        tokens_seen=loaded.shared["tokens_seen"],
    )


def seed_generators(seed: int, rank: int) -> None:
    """Seed every generator of this process, differently on each rank (dropout must not repeat across replicas)."""
    mixed = np.random.SeedSequence([seed, rank]).generate_state(3)
    torch.manual_seed(int(mixed[0]))
    random.seed(int(mixed[1]))
    np.random.seed(int(mixed[2]))


def generator_states() -> dict[str, Tensor]:
    """Return the states of torch's and NumPy's generators as tensors on the CPU."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.uint32).astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # this process trains on a GPU
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generator_states(states: Mapping[str, Tensor]) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy.keys" in states:
        position, has_gauss, gauss = states["numpy.rest"].tolist()
        keys = states["numpy.keys"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _python_state() -> list[Any]:
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


def _set_python_state(state: list[Any]) -> None:
    version, numbers, gauss = state
    random.setstate((version, tuple(numbers), gauss))
