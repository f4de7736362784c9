"""Whether tensors were left alone from the call of `save` until their last byte was copied.

Two signs tell: torch counts the in-place operations on a tensor, and a few of its bytes, read at the call and again
after the last copy, catch what writes past torch's count (`.data`, fused optimizers). A write that undoes itself, or
one past the count that spares the bytes looked at, is not seen. Those of a GPU are read first where the copies are
ordered, a moment after the call.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoint.planning import LOOK_BYTES, Draft, version

_BYTES = [ctypes.c_char * nbytes for nbytes in range(LOOK_BYTES + 1)]
"""What so many bytes in memory are: reading them so takes a third of the time that `ctypes.string_at` takes."""


class Guard:
    """Watches the tensors of one save, each until its group is copied."""

    def __init__(self, draft: Draft) -> None:
        self._names = draft.blueprint.names
        self._tensors = draft.tensors
        self._groups = draft.blueprint.watched
        self._versions = draft.versions
        self._addresses = draft.addresses
        self._places = draft.blueprint.places
        self._samples = {i: self._sample(i) for i in self._places}
        self._devices: dict[tuple[int, torch.device], _DeviceSamples] = {}
        self._settled: set[int] = set()
        self._changed: set[str] = set()
        self._lock = threading.Lock()

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of tensors seen to have changed, sorted."""
        with self._lock:
            return tuple(sorted(self._changed))

    def look_on(self, device: torch.device) -> None:
        """Read the first samples of a device's memory, in the order of its current stream."""
        for group, members in enumerate(self._groups):
            found = [i for i in members if self._tensors[i].device == device and self._tensors[i].numel()]
            if found:
                self._devices[group, device] = _DeviceSamples(found, [self._tensors[i] for i in found])

    def look_again_on(self, device: torch.device, group: int) -> None:
        """Read a group's samples again, in the order of the device's current stream, and compare them there."""
        samples = self._devices.get((group, device))
        if samples:
            samples.compare()

    def settle(self, group: int) -> None:
        """Compare a group's counters and host samples for the only time: its tensors may be mutated from now on."""
        with self._lock:
            if group in self._settled:
                return
            self._settled.add(group)
            for i in self._groups[group]:
                if version(self._tensors[i]) != self._versions[i] or self._sample(i) != self._samples.get(i):
                    self._changed.add(self._names[i])

    def judge(self, group: int) -> None:
        """Take in what the devices found in a group, all of whose copies are over."""
        for (of_group, _), samples in self._devices.items():
            if of_group == group:
                with self._lock:
                    self._changed.update(self._names[i] for i in samples.changed())

    def let_go(self) -> None:
        """Drop the tensors; nothing is compared from here on."""
        with self._lock:
            self._settled.update(range(len(self._groups)))
            self._tensors = ()
            self._samples = {}
            self._devices = {}

    def _sample(self, entry: int) -> list[bytes] | None:
        """Return bytes of a host tensor; None of others, and of one whose memory is not where it was."""
        address = self._addresses[entry]
        if entry not in self._places or self._tensors[entry].data_ptr() != address:
            return None
        nbytes, starts = self._places[entry]
        return [_BYTES[nbytes].from_address(address + start).raw for start in starts]


class _DeviceSamples:
    """Bytes of several tensors of one device, compared on the device."""

    def __init__(self, members: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self._members = members
        self._views = [_middle(t) for t in tensors]
        self._ends = list(itertools.accumulate(v.numel() for v in self._views))
        self._before = torch.cat(self._views)
        self._differs: Tensor | None = None

    def compare(self) -> None:
        differs = torch.cat(self._views) != self._before
        self._differs = torch.empty(differs.shape, dtype=torch.bool, pin_memory=True)
        self._differs.copy_(differs, non_blocking=True)

    def changed(self) -> set[int]:
        """Return which members differ; the comparison must be over."""
        if self._differs is None:
            return set()
        places = self._differs.nonzero().flatten().tolist()
        return {self._members[bisect.bisect_right(self._ends, place)] for place in places}


def _middle(tensor: Tensor) -> Tensor:
    """Return a view of bytes from the middle of a tensor."""
    size = tensor.element_size()
    if tensor.is_contiguous():
        count = min(max(1, LOOK_BYTES // size), tensor.numel())
        start = (tensor.numel() - count) // 2
    else:
        count = 1
        start = sum(n // 2 * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((count,), (1,), tensor.storage_offset() + start).view(torch.uint8)
