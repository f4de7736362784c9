"""What a checkpoint of a run holds beside weights and optimizer: generators, position, counters; and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

import checkpoint as ck
from checkpoint.state import TensorLike
from trainsys.data import DataPosition, Order, TokenDataset
from trainsys.engines import Engine
from trainsys.errors import RunError
from trainsys.hostmemory import gather_on


class Progress(Protocol):
    """How far a run is, of whatever kind."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...

    def shared(self) -> Mapping[str, Any]:
        """Return what a checkpoint keeps of it beside the step: JSON values, equal on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the run a checkpoint was taken."""

    step: int
    """Optimizer steps done."""
    data: DataPosition
    """The next sample, and which data and order it counts in."""
    tokens_seen: int
    """Targets trained on so far, all ranks."""

    def shared(self) -> Mapping[str, Any]:
        """Return what `load_newest` makes it from again."""
        return {"data": self.data.state_dict(), "tokens_seen": self.tokens_seen}


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint is made of: references to what training mutates, and copies of the rest."""

    place: Progress
    tensors: Mapping[str, TensorLike]
    objects: Mapping[str, Any]
    shared: Mapping[str, Any]


def state_of(engine: Engine, place: Progress) -> State:
    """Return this rank's part of the run's state, as it is after a step."""
    generators = {f"generator.{name}": ck.RankLocal(state) for name, state in generator_states().items()}
    return State(
        place=place,
        tensors={**engine.slices(), **generators},
        objects={"python_random": _python_state()},
        shared={"counters": engine.counters(), **place.shared()},
    )


def load_newest(
    checkpointer: ck.Checkpointer, engine: Engine, dataset: TokenDataset, order: Order, control: dist.ProcessGroup
) -> tuple[Place, ck.Loaded] | None:
    """Restore the newest checkpoint of a run on text, and return where in the run it was taken; see `restore`.

    Raises:
        data.ResumeError: the tokens, the window length or the order changed since the save. And as `restore`.
    """
    loaded = restore(checkpointer, engine, control)
    if loaded is None:
        return None
    place = Place(
        step=loaded.step,
        data=DataPosition.resume(loaded.shared["data"], dataset, order),
        tokens_seen=loaded.shared["tokens_seen"],
    )
    return place, loaded


def restore(checkpointer: ck.Checkpointer, engine: Engine, control: dist.ProcessGroup) -> ck.Loaded | None:
    """Overwrite weights, optimizer state and generators with the newest checkpoint that is whole; None without any.

    Every rank calls it. Of a checkpoint's copies the one in the nearest tier is taken; where any rank finds damage, all
    go on to the next copy, then to the checkpoint before. With another number of ranks than at the save, ranks that
    have no generator state of their own keep their fresh, seeded one; everything else is resharded.

    Raises:
        RunError: there are checkpoints, and each is damaged; naming the damage.
        checkpoint.CheckpointError: a checkpoint describes another model, or cannot be read.
    """
    fresh = generator_states()
    generators = {f"generator.{name}": ck.RankLocal(state) for name, state in fresh.items()}
    try:
        loaded = checkpointer.recover({**engine.slices(), **generators}, gather=gather_on(control))
    except ck.CorruptCheckpoint as error:
        raise RunError(f"no checkpoint is whole: {error}; move them away to start the run anew") from error
    if loaded is not None:
        engine.after_load(loaded.shared["counters"])
        missing = {name.removeprefix("generator.") for name in loaded.missing_local}
        _set_generator_states({name: state for name, state in fresh.items() if name not in missing})
        if "python_random" in loaded.objects:
            _set_python_state(loaded.objects["python_random"])
    return loaded


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
