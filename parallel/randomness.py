"""Random numbers that are equal on ranks which compute the same, and different on those which do not.

Dropout draws from the device's default generator, so what matters is where that stands. A rank keeps several streams,
each seeded by the coordinates along which it differs, and lets the default generator follow one of them at a time:

    what is dropped                                  coordinates of its stream
    activations that all tensor ranks have alike     all axes but tensor
    a sequence shard, a rank's heads                 all axes
    what even pipeline stages do alike               replicate, shard, context

Tensor ranks without a sequence shard drop the very elements that one process drops, if seeded alike. Where ranks see
different elements (parts of sequences, heads, batches) what they drop is equal in distribution only. A model whose only
dropout is of the residual stream needs one stream, that of `seeded_like`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping

import torch

from parallel.mesh import Coordinates, Mesh


def seeded_like(mesh: Mesh, rank: int) -> int:
    """Return the rank by which a rank's default generator is seeded, so that its residual stream drops what it must.

    That is the rank itself; but without a sequence shard, where tensor ranks compute one stream, the first of these.
    """
    return rank if mesh.degrees.sequence else mesh.rank_of(mesh.coordinates(rank)._replace(tensor=0))


def stream_seed(seed: int, coordinates: Coordinates, apart: Collection[str]) -> int:
    """Return the seed of the stream that differs along the axes in `apart` and is equal along all others."""
    at = [f"{axis}={index}" for axis, index in zip(Coordinates._fields, coordinates, strict=True) if axis in apart]
    unknown = sorted(set(apart) - set(Coordinates._fields))
    if unknown:
        raise ValueError(f"parallel: no axis {', '.join(unknown)}; axes are {', '.join(Coordinates._fields)}")
    return int.from_bytes(hashlib.sha256(":".join([str(seed), *at]).encode()).digest()[:8], "little") >> 1


class Streams:
    """Named streams of one device's random numbers; the default generator stands in one of them inside `use`.

    Not for several threads at once.
    """

    def __init__(
        self, seed: int, coordinates: Coordinates, apart: Mapping[str, Collection[str]], device: torch.device
    ) -> None:
        """`apart` maps each stream's name to the axes along which ranks draw different numbers."""
        self._device = device
        self._states: dict[str, torch.Tensor] = {}
        for name, axes in apart.items():
            generator = torch.Generator(device).manual_seed(stream_seed(seed, coordinates, axes))
            self._states[name] = generator.get_state()

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Draw from a stream inside, which goes on where it was left; afterwards the generator is where it was."""
        outside = self._read()
        self._write(self._states[name])
        try:
            yield
        finally:
            self._states[name] = self._read()
            self._write(outside)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return where every stream stands, to go on from there."""
        return dict(self._states)

    def load_state_dict(self, states: Mapping[str, torch.Tensor]) -> None:
        """Go on from where `state_dict` stood."""
        if states.keys() != self._states.keys():
            raise ValueError(f"parallel: streams {sorted(states)}; these are {sorted(self._states)}")
        self._states = dict(states)

    def _read(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _write(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
