"""Several tiers as one: each block lies on all of them, in parts as large as each is fast."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import torch

from offload.blocks import flat_bytes, new_block, unknown
from offload.errors import SpecError, TierError, TierFull
from offload.tier import Block, Tier, TierSpec

_STRIPE_BYTES = 4096
"""Parts are multiples of it, but for the last of a block."""


class StripedTier:
    """A `Tier` over the cards, disks or nodes in `parts`, which it closes.

    A large transfer runs on all parts at once and so at the sum of their rates. Its capacity is what equally full
    parts hold: the part that is small for its rate decides.

    Raises:
        SpecError: no parts.
    """

    def __init__(self, name: str, parts: Sequence[Tier]) -> None:
        if not parts:
            raise SpecError(f"tier {name}: parts: none; at least one tier is needed")
        self._parts = list(parts)
        specs = [part.spec for part in parts]
        rates = [min(spec.read_bytes_per_s, spec.write_bytes_per_s) for spec in specs]
        self._shares = [rate / sum(rates) for rate in rates]
        fair = min(spec.capacity_bytes / share for spec, share in zip(specs, self._shares, strict=True))
        self._spec = TierSpec(
            name=name,
            capacity_bytes=int(fair),
            read_bytes_per_s=min(s.read_bytes_per_s / share for s, share in zip(specs, self._shares, strict=True)),
            write_bytes_per_s=min(s.write_bytes_per_s / share for s, share in zip(specs, self._shares, strict=True)),
            latency_s=max(spec.latency_s for spec in specs),
            emulated=any(spec.emulated for spec in specs),
        )
        self._closed = False
        self._lock = threading.RLock()
        self._blocks: dict[Block, list[tuple[Tier, Block, slice]]] = {}

    @property
    def spec(self) -> TierSpec:
        """What all parts hold together and how fast they are at once."""
        return self._spec

    @property
    def used_bytes(self) -> int:
        """Bytes that blocks take on all parts."""
        return sum(part.used_bytes for part in self._parts)

    def allocate(self, num_bytes: int, owner: str = "") -> Block:
        """Return a new block on all parts that its size reaches."""
        block = new_block(self._spec, num_bytes, owner)
        self._check_open()
        held: list[tuple[Tier, Block, slice]] = []
        with contextlib.ExitStack() as undo:
            try:
                for part, place in zip(self._parts, self._cuts(num_bytes), strict=True):
                    if place.stop > place.start:
                        held.append((part, part.allocate(place.stop - place.start, owner), place))
                        undo.callback(part.free, held[-1][1])
            except TierFull as error:
                free = max(0, self._spec.capacity_bytes - self.used_bytes)
                raise TierFull(
                    f"tier {self._spec.label}: no room for {num_bytes} bytes: {free} of {self._spec.capacity_bytes} "
                    f"are free; {error}"
                ) from error
            undo.pop_all()
        with self._lock:
            self._blocks[block] = held
        return block

    def view(self, block: Block) -> torch.Tensor | None:
        """Return the block's own bytes where they lie on one part that has them, else None."""
        held = self._find(block)
        return held[0][0].view(held[0][1]) if len(held) == 1 else None

    def write(self, block: Block, source: torch.Tensor) -> Future[None]:
        """Copy the bytes of `source` into the block, a part of them to every part."""
        return self._each(block, source, lambda tier, part, data: tier.write(part, data))

    def read(self, block: Block, into: torch.Tensor) -> Future[None]:
        """Copy what the last write of the block asked for into `into`."""
        return self._each(block, into, lambda tier, part, data: tier.read(part, data))

    def free(self, block: Block) -> None:
        """Give the block's room back on every part."""
        with self._lock:
            held = self._find(block)
            del self._blocks[block]
        for tier, part, _ in held:
            tier.free(part)

    def close(self) -> None:
        """Close all parts."""
        self._closed = True
        with contextlib.ExitStack() as all_of:
            for part in self._parts:
                all_of.callback(part.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cuts(self, num_bytes: int) -> list[slice]:
        """Return which bytes of a block go to each part."""
        cuts, start, reached = [], 0, 0.0
        for share in self._shares[:-1]:
            reached += share * num_bytes
            stop = max(start, min(num_bytes, round(reached / _STRIPE_BYTES) * _STRIPE_BYTES))
            cuts.append(slice(start, stop))
            start = stop
        return [*cuts, slice(start, num_bytes)]

    def _find(self, block: Block) -> list[tuple[Tier, Block, slice]]:
        self._check_open()
        with self._lock:
            held = self._blocks.get(block)
        if held is None:
            raise unknown(self._spec, block)
        return held

    def _each(
        self, block: Block, tensor: torch.Tensor, move: Callable[[Tier, Block, torch.Tensor], Future[None]]
    ) -> Future[None]:
        data = flat_bytes(self._spec, block, tensor)
        with self._lock:  # so that transfers of one block keep their order on every part
            return gathered([move(tier, part, data[place]) for tier, part, place in self._find(block)])

    def _check_open(self) -> None:
        if self._closed:
            raise TierError(f"tier {self._spec.label}: it is closed")


def gathered(futures: Sequence[Future[None]]) -> Future[None]:
    """Return a future that is done when all are, with the first error that any had."""
    whole: Future[None] = Future()
    whole.set_running_or_notify_cancel()
    lock, left = threading.Lock(), len(futures)

    def one_done(_: Future[None]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        error = next((error for future in futures if (error := future.exception())), None)
        if error is None:
            whole.set_result(None)
        else:
            whole.set_exception(error)

    for future in futures:
        future.add_done_callback(one_done)
    return whole
